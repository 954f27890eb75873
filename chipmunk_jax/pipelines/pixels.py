"""The small trained models: a transformer on pixels and a table of words, without text encoder and VAE."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from chipmunk_jax.convert.word_table import TEXT_ROWS, read_word_table
from chipmunk_jax.errors import InputError, listed
from chipmunk_jax.model import Condition
from chipmunk_jax.models.flux import FluxConfig
from chipmunk_jax.models.wan import WanConfig
from chipmunk_jax.pipelines.base import Pipeline
from chipmunk_jax.pipelines.packing import unit, unpack
from chipmunk_jax.pipelines.request import Request, Side
from chipmunk_jax.pipelines.variant import Settings, Variant
from chipmunk_jax.solvers import UniPC

COLOURS = 3  # channels of a pixel: a model that has as many makes pixels
GLUE = frozenset(("a", "an", "and", "at", "in", "of", "on", "the", "with"))  # words of a prompt that say nothing


@dataclass(frozen=True)
class WordTable:
    """The text encoder: an embedding for each of a few words, one word an attribute."""

    attributes: tuple[str, ...]
    words: tuple[tuple[str, ...], ...]  # of each attribute
    embeddings: np.ndarray  # f32 [words, C], in the order of the concatenated lists

    @classmethod
    def load(cls, folder: str | Path) -> "WordTable":
        """The table beside a checkpoint's weights.

        Raises:
            FileNotFoundError, InputError: it has no word table, or a bad one.
        """
        return cls(*read_word_table(folder))

    def encode(self, prompts: Sequence[str]) -> Condition:
        """{"text": [B, 16, C], "pooled": [B, C]}, f32, of sentences with one word of each attribute.

        Raises:
            InputError: prompts without a word of an attribute, with two, or with a word that is not in the table; it names all.
        """
        ids = {prompt: self._ids(prompt) for prompt in prompts}
        if wrong := [f"prompt {prompt!r}: expected {told}" for prompt, (_, told) in ids.items() if told]:
            raise InputError("; ".join(wrong))
        rows = np.stack([self.embeddings[ids[prompt][0]] for prompt in prompts])  # [B, attributes, C]
        padded = np.pad(rows, ((0, 0), (0, TEXT_ROWS - rows.shape[1]), (0, 0)))
        return {"text": jnp.asarray(padded), "pooled": jnp.asarray(rows.sum(1) / 2)}

    def _ids(self, prompt: str) -> tuple[list[int], str]:
        """Rows of the table, and what the prompt should have; empty where it has it."""
        said, ids, wrong, start = prompt.lower().replace(",", " ").replace(".", " ").split(), [], [], 0
        for attribute, words in zip(self.attributes, self.words, strict=True):
            found = [word for word in words if word in said]
            if len(found) == 1:
                ids.append(start + words.index(found[0]))
            else:
                given = f"both {' and '.join(found)}" if found else "none"
                wrong.append(f"one {attribute} of {', '.join(words)}, found {given}")
            start += len(words)
        if unknown := [word for word in said if word not in GLUE.union(*self.words)]:
            known = "" if wrong else f", known are {'; '.join(', '.join(words) for words in self.words)}"
            wrong.append(f"no unknown word, found {listed(unknown)}{known}")
        return ids, "; ".join(wrong)


class PixelPipeline(Pipeline):
    """A model whose tokens are patches of pixels in [-1, 1], and its table of words."""

    channels_first = False  # whether a token's values are (channel, row, column), else (.., row, column, channel)

    def load_parts(self) -> None:
        self.words = WordTable.load(self.folder.path)

    def check_request(self, request: Request) -> None:
        sides = [side.prompts for side in (request.wanted, request.unwanted) if side is not None]
        self.words.encode(
            list(dict.fromkeys(itertools.chain(*sides)))
        )  # together, so that all that is wrong is told at once

    def encode(self, side: Side, request: Request) -> Condition:
        encoded = self.words.encode(side.prompts)
        return {name: encoded[name] for name in self.network.prompted}

    def random_prompts(self, count: int, seed: int) -> list[str]:
        """Sentences of a word of each attribute by chance."""
        rng = np.random.default_rng(seed)
        return [" ".join(rng.choice(choice) for choice in self.words.words) for _ in range(count)]

    def decode(self, tokens: np.ndarray, settings: Settings) -> np.ndarray:
        return self.to_pixels(tokens, self.variant.grid(settings), self.variant.patch)

    @classmethod
    def to_pixels(cls, tokens: np.ndarray, grid: tuple[int, ...], patch: tuple[int, ...]) -> np.ndarray:
        """Images [B, H, W, 3] or videos [B, T, H, W, 3], f32 in [0, 1], of tokens [B, N, C] in raster order."""
        return unit(unpack(np.asarray(tokens), grid, patch, channels_first=cls.channels_first))


class PixelFluxPipeline(PixelPipeline):
    """FLUX's tokens are packed as its latents are: channels first."""

    channels_first = True


def _side(config: FluxConfig) -> int:
    """Pixels along each side of a token of FLUX, if it makes pixels."""
    return math.isqrt(config.in_channels // COLOURS)


VARIANTS = {
    "mini-flux": Variant(
        network="flux",
        config=FluxConfig(
            in_channels=12,
            vec_in_dim=64,
            context_in_dim=64,
            hidden_size=256,
            num_heads=2,
            depth=2,
            depth_single_blocks=4,
            guidance_embed=False,
        ),
        matches=lambda config: config.in_channels == COLOURS * _side(config) ** 2,
        adapt=lambda config: {"patch": (_side(config),) * 2},
        pipeline=PixelFluxPipeline,
        preset="mini-flux",
        patch=(2, 2),
        height=64,
        width=64,
        steps=28,
        guidance=2.0,
        text=TEXT_ROWS,
    ),
    "mini-wan": Variant(
        network="wan",
        config=WanConfig(
            dim=256, ffn_dim=1024, in_dim=3, out_dim=3, text_dim=64, num_heads=2, num_layers=8, patch_size=(1, 4, 4)
        ),
        matches=lambda config: config.out_dim == COLOURS,
        adapt=lambda config: {"patch": config.patch_size},
        pipeline=PixelPipeline,
        preset="mini-wan",
        patch=(1, 4, 4),
        frames=16,
        height=64,
        width=64,
        fps=8,  # the published models' 16 would show 16 frames in a second
        steps=30,
        solver=UniPC(),
        shift=3.0,
        guidance=3.0,
        text=TEXT_ROWS,
    ),
}

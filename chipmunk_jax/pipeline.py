"""From a checkpoint and prompts to pixels."""

import json
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chipmunk_jax import memory
from chipmunk_jax.convert.safetensors import read_weights
from chipmunk_jax.errors import InputError
from chipmunk_jax.families import TEXT_ROWS, Family, defaults
from chipmunk_jax.model import Condition
from chipmunk_jax.models.checkpoint import describe, load
from chipmunk_jax.sampling import check_seed, plan_stacks, sample
from chipmunk_jax.schedule import density
from chipmunk_jax.sparsity import Sparsity
from pallas_kernels import Implementation

GLUE = frozenset(("a", "an", "and", "at", "in", "of", "on", "the", "with"))  # words of a prompt that say nothing


@dataclass(frozen=True)
class WordTable:
    """The text encoder of the small trained models: an embedding for each of a few words, one word an attribute."""

    attributes: tuple[str, ...]
    words: tuple[tuple[str, ...], ...]  # of each attribute
    embeddings: np.ndarray  # f32 [words, C], in the order of the concatenated lists

    @classmethod
    def load(cls, folder: str | Path) -> "WordTable":
        """Of a converted checkpoint.

        Raises:
            FileNotFoundError, InputError: there is no such checkpoint, it has no word table, or a bad one.
        """
        folder = Path(folder)
        describe(folder)
        if not (folder / "words.json").is_file():
            raise InputError(
                f"{folder}: no words.json; prompts need a checkpoint with a word table, there is no text encoder and no VAE yet"
            )
        try:
            content = json.loads((folder / "words.json").read_text())
            attributes, words = tuple(content["attributes"]), tuple(map(tuple, content["words"]))
            embeddings = read_weights(folder / "word_embeddings.safetensors").tensors["embeddings"].read()
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder}: bad word table: {error}") from error
        total = sum(map(len, words))
        if not len(attributes) == len(words) <= TEXT_ROWS or embeddings.shape[:-1] != (total,):
            raise InputError(
                f"{folder}: bad word table: {len(attributes)} attributes, {len(words)} lists of {total} words, embeddings "
                f"{embeddings.shape}; expected a list an attribute, {TEXT_ROWS} at most, and an embedding a word"
            )
        return cls(attributes, words, np.array(embeddings, np.float32))

    def encode(self, prompts: Sequence[str]) -> Condition:
        """{"text": [B, 16, C], "pooled": [B, C]}, f32, of sentences with one word of each attribute.

        Raises:
            InputError: a prompt without a word of an attribute, with two, or with a word that is not in the table.
        """
        rows = np.stack([self.embeddings[self._ids(prompt)] for prompt in prompts])  # [B, attributes, C]
        padded = np.pad(rows, ((0, 0), (0, TEXT_ROWS - rows.shape[1]), (0, 0)))
        return {"text": jnp.asarray(padded), "pooled": jnp.asarray(rows.sum(1) / 2)}

    def _ids(self, prompt: str) -> list[int]:
        said, ids, start = prompt.lower().replace(",", " ").replace(".", " ").split(), [], 0
        for attribute, words in zip(self.attributes, self.words, strict=True):
            found = [word for word in words if word in said]
            if len(found) != 1:
                given = f"both {' and '.join(found)}" if found else "none"
                raise InputError(f"prompt {prompt!r}: expected one {attribute} of {', '.join(words)}; found {given}")
            ids.append(start + words.index(found[0]))
            start += len(words)
        if unknown := [word for word in said if word not in GLUE.union(*self.words)]:
            known = "; ".join(", ".join(words) for words in self.words)
            raise InputError(f"prompt {prompt!r}: unknown word {', '.join(unknown)}; known are {known}")
        return ids


def family_of(folder: str | Path) -> Family:
    """How a converted checkpoint turns tokens into pixels.

    Raises:
        FileNotFoundError, InputError: there is no such checkpoint, or it is of a model without such a small one.
    """
    family = defaults((found := describe(folder)).config)
    if not isinstance(family, Family):
        raise InputError(
            f"{folder}: a {found.model} model, whose text encoders and VAE are not here yet; prompts need them"
        )
    return family


@dataclass(frozen=True)
class Pipeline:
    """A model in pixel space and its word table."""

    model: nnx.Module
    words: WordTable
    family: Family

    @classmethod
    def load(cls, folder: str | Path, dtype: str | None = None) -> "Pipeline":
        """Of a folder written by `chipmunk convert`.

        Args:
            folder: the converted checkpoint.
            dtype: "bfloat16" or "float32"; None: float32 on a CPU, which is faster there, else as it was saved.

        Raises:
            FileNotFoundError, InputError: no such checkpoint, half a one, one of another model, or without a word table.
        """
        family, words = family_of(folder), WordTable.load(folder)
        model = load(folder, dtype or ("float32" if jax.default_backend() == "cpu" else None))
        return cls(model, words, family)

    def encode(self, prompts: Sequence[str]) -> Condition:
        """What the network takes of WordTable.encode."""
        encoded = self.words.encode(prompts)
        return {name: encoded[name] for name in self.family.conditions}

    def density(self, sparsity: Sparsity, **settings: int | float | None) -> dict[str, float]:
        """Mean share of columns that a sample of such a size and so many steps computes, {"attention": .., "mlp": ..}."""
        settings = self.family.complete(**settings)
        grid = self.family.grid(settings)
        prompt = self.words.encode([" ".join(choice[0] for choice in self.words.words)])
        stacks = self.model.stacks(math.prod(grid), prompt)
        return density(plan_stacks(stacks, sparsity, settings["steps"], grid), sum(s.layers for s in stacks.values()))

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        sparsity: Sparsity | None = None,
        progress: bool = False,
        callback: Callable[[int, float, np.ndarray], None] | None = None,
        implementation: Implementation | None = None,
    ) -> np.ndarray:
        """Images [B, height, width, 3] or videos [B, frames, height, width, 3], f32, with values in [0, 1].

        Args:
            prompts: B sentences.
            frames: of a video.
            height, width: pixels, multiples of a token's: 2 in FLUX, 4 in Wan.
            steps: of the family's solver.
            guidance: scale of true guidance against no words; 1 is none and takes half as long.
            seed: of the noise, 0 to 2^32 - B; sample i draws from seed + i, so it comes out the same in any batch.
            sparsity: None samples densely.
            progress, callback, implementation: see chipmunk_jax.sample.

        Where frames, height, width, steps or guidance is None, it is the family's.

        Raises:
            InputError: a prompt, size or setting that does not fit, before anything is compiled.
        """
        family = self.family
        settings = family.complete(frames=frames, height=height, width=width, steps=steps, guidance=guidance)
        check_request(family, self.words, prompts, **settings, seed=seed, sparsity=sparsity)
        grid = family.grid(settings)
        shape = (math.prod(grid), family.channels)
        scale = None if settings["guidance"] == 1 else settings["guidance"]
        # Before the noise is drawn and prompts are encoded, which for an absurd size or batch have no room either.
        options = dict(steps=settings["steps"], sparsity=sparsity, guidance=scale, implementation=implementation)
        rows = lambda *row: jax.ShapeDtypeStruct((len(prompts), *row), jnp.float32)
        cond = {name: rows(*x.shape[1:]) for name, x in self.encode(prompts[:1]).items()}
        memory.check_room(self.model, rows(*shape), cond, **options, placed=True)
        cond = self.encode(prompts)
        noise = jnp.stack([jax.random.normal(jax.random.key(seed + i), shape) for i in range(len(prompts))])
        tokens = sample(
            self.model,
            noise,
            cond,
            timesteps=family.timesteps(settings["steps"], shape[0]),
            grid=grid,
            sparsity=sparsity,  # its chance columns have a seed of their own, as a sample must not depend on the batch's
            guidance=scale,
            solver=family.solver,
            progress=progress,
            callback=callback,
            implementation=implementation,
        )
        return family.to_pixels(tokens, grid)


def check_request(
    family: Family,
    words: WordTable,
    prompts: Sequence[str],
    *,
    seed: int,
    sparsity: Sparsity | None,
    **settings: int | float | None,
) -> None:
    """Raises InputError unless Pipeline(model, words, family) can be called with these, so that none is loaded in vain."""
    if isinstance(prompts, str):
        raise InputError(f"prompts={prompts!r}: expected a list of sentences")
    if not prompts:
        raise InputError("no prompts: expected at least one")
    if wrong := [prompt for prompt in prompts if not isinstance(prompt, str)]:
        raise InputError(f"prompt {wrong[0]!r}: expected a sentence")
    words.encode(list(dict.fromkeys(prompts)))  # each of a batch once
    settings = family.complete(**settings)
    grid = family.grid(settings)
    family.timesteps(settings["steps"], math.prod(grid))
    if not isinstance(settings["guidance"], numbers.Real) or not np.isfinite(settings["guidance"]):
        raise InputError(f"guidance={settings['guidance']}: expected a finite number")
    check_seed(seed, len(prompts))
    if sparsity is not None:
        family.check_sparsity(sparsity, grid, settings["steps"])

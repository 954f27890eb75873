"""What the pipelines of published models share: tokenizers and text encoders before the transformer, a VAE after it."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import ClassVar

import jax
import numpy as np

from chipmunk_jax.convert.folder import TOKENIZERS, lack
from chipmunk_jax.errors import InputError
from chipmunk_jax.finite import finite
from chipmunk_jax.pipelines.base import Pipeline
from chipmunk_jax.pipelines.request import EMBEDDINGS, MOST_TOKENS, Request, Side
from chipmunk_jax.pipelines.text import Tokenizer, Tokens, load_tokenizers

KEPT = 64  # prompts whose texts are kept: 0.5 GB of a T5-XXL


class PromptedPipeline(Pipeline):
    """A transformer of latents between text encoders and a VAE. Subclasses say what encoders read, and how latents are packed."""

    conditions: ClassVar[tuple[tuple[str, str], ...]]  # what a text encoder gives, and the role of that encoder

    def load_parts(self) -> None:
        self._texts: OrderedDict[tuple[str, str, int], np.ndarray] = OrderedDict()

    @cached_property
    def tokenizers(self) -> dict[str, Tokenizer]:
        """Tokenizers by role of their text encoder, of those whose files are here.

        Raises:
            InputError: damaged files, or a tokenizer of another model.
        """
        folders = {
            role: self.folder.tokenizers[name] for role, name in TOKENIZERS.items() if name in self.folder.tokenizers
        }
        rows = {role: self.configs[role].vocab_size for role in folders if role in self.configs}
        return load_tokenizers(folders, rows)

    def check_request(self, request: Request) -> None:
        for side, said in ((request.wanted, ""), (request.unwanted, "negative_")):
            if side is not None and side.given:
                self._check_given(side, said, request)
            elif side is not None:
                self._check_prompts(side, request)
        if request.latents is not None:
            expected = self.latents_shape(request)
            if request.latents.shape != expected:
                raise InputError(f"latents {request.latents.shape}: expected {expected}")

    @property
    def missing(self) -> list[str]:
        return self.folder.missing

    def check_decoder(self) -> None:
        if "vae" not in self.folder.components:
            raise InputError(
                f'{self.folder.path}: {lack(self.folder.path, "vae")}, so only latents can be made: output_type="latent"'
            )

    def unwanted(self, request: Request) -> Side | None:
        """The other side of guidance; an empty prompt where nothing is said of it."""
        nothing = ("",) * request.batch
        return request.unwanted or Side(prompts=nothing, prompts_2=nothing)

    def text_rows(self, request: Request) -> int | None:
        given = request.wanted.given.get("text")
        return request.length if given is None else given.shape[1]

    def latents_shape(self, request: Request) -> tuple[int, ...]:
        """Of latents as the pipeline takes and gives them."""
        raise NotImplementedError

    def read(self, role: str, prompts: Sequence[str], request: Request) -> Tokens:
        """What a text encoder takes of prompts."""
        raise NotImplementedError

    def text(self, role: str, prompts: Sequence[str], request: Request, encode: Callable[..., jax.Array]) -> np.ndarray:
        """encode(encoder, ids, mask) [1, ..] of every prompt, joined, f32; prompts that were read before are remembered.

        Raises:
            InputError: what an encoder gives is not finite.
        """
        tokens = self.read(role, prompts, request)
        rows = []
        for prompt, ids, mask in zip(prompts, tokens.ids, tokens.mask, strict=True):
            key = role, prompt, len(ids)
            if key not in self._texts:
                made = np.asarray(self.residents.run(role, encode, ids[None], mask[None]), np.float32)
                if not finite(made):
                    raise InputError(f"{self.folder.components[role]}: gives NaN or infinity for {prompt!r}")
                self._texts[key] = made
            self._texts.move_to_end(key)
            rows.append(self._texts[key])
        while len(self._texts) > KEPT:
            self._texts.popitem(last=False)
        return np.concatenate(rows)

    def _check_prompts(self, side: Side, request: Request) -> None:
        """Raises InputError where prompts cannot be read; says once what is cut from them."""
        for _, role in self.conditions:
            for part in (role, TOKENIZERS[role]):
                if part not in {**self.folder.components, **self.folder.tokenizers}:
                    raise InputError(
                        f"{self.folder.path}: {lack(self.folder.path, part)}, so prompts cannot be read; give prompt_embeds in "
                        "their place"
                    )
            warning = self.read(role, list(dict.fromkeys(self.prompts_of(role, side))), request).warning
            if warning:
                self.tell(f"{role}: {warning}")

    def prompts_of(self, role: str, side: Side) -> Sequence[str]:
        """What a text encoder reads."""
        return side.prompts

    def _check_given(self, side: Side, said: str, request: Request) -> None:
        """Raises InputError unless embeddings are all that prompts would make."""
        names = {name: f"{said}{EMBEDDINGS[name]}" for name, _ in self.conditions}
        if side.given.keys() != names.keys():
            given = ", ".join(f"{said}{EMBEDDINGS[name]}" for name in side.given)
            raise InputError(f"{given} alone: expected {' and '.join(names.values())}")
        usual = self.variant.shapes(request.settings, request.batch, self.network.dtype)[2]
        for name, array in side.given.items():
            sides = f"[B{', T' * (len(usual[name].shape) - 2)}, {usual[name].shape[-1]}]"
            if array.ndim != len(usual[name].shape) or array.shape[-1] != usual[name].shape[-1]:
                raise InputError(f"{names[name]} {array.shape}: expected {sides}")
            if array.ndim > 2 and array.shape[1] > MOST_TOKENS:
                raise InputError(f"{names[name]} of {array.shape[1]} tokens: expected 1 to {MOST_TOKENS}")
        shapes = self.shapes(request)[2]
        for name, array in side.given.items():
            if array.shape != shapes[name].shape:
                raise InputError(f"{names[name]} {array.shape}: expected {shapes[name].shape}")

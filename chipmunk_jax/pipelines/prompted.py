"""What the pipelines of published models share: tokenizers and text encoders before the transformer, a VAE after it."""

import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import ClassVar

import jax
import numpy as np
from tqdm import tqdm

from chipmunk_jax.convert.folder import TOKENIZERS
from chipmunk_jax.errors import InputError
from chipmunk_jax.finite import finite
from chipmunk_jax.pipelines.base import Pipeline
from chipmunk_jax.pipelines.request import Request, Side
from chipmunk_jax.pipelines.text import Tokenizer, Tokens

KEPT = 64  # prompts whose texts are kept: 0.5 GB of a T5-XXL


class PromptedPipeline(Pipeline):
    """A transformer of latents between text encoders and a VAE. Subclasses say what encoders read, and how latents are packed."""

    conditions: ClassVar[tuple[tuple[str, str], ...]]  # what a text encoder gives, and the role of that encoder

    def load_parts(self) -> None:
        self._texts: OrderedDict[tuple[str, str, int], np.ndarray] = OrderedDict()
        self._warned: set[str] = set()

    @cached_property
    def tokenizers(self) -> dict[str, Tokenizer]:
        """Tokenizers by role of their text encoder, of those whose files are here.

        Raises:
            InputError: damaged files, or a tokenizer of another model.
        """
        found = {}
        for role, name in TOKENIZERS.items():
            if folder := self.folder.tokenizers.get(name):
                found[role] = Tokenizer.load(folder)
                if role in self.configs:
                    try:
                        found[role].check_rows(self.configs[role].vocab_size)
                    except InputError as error:
                        raise InputError(f"{folder}: {error}") from error
        return found

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

    def check_decoder(self) -> None:
        if "vae" not in self.folder.components:
            raise InputError(f'{self.folder.path}: no vae, so only latents can be made: output_type="latent"')

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
                        f"{self.folder.path}: no {part}, so prompts cannot be read; give prompt_embeds in their place"
                    )
            warning = self.read(role, list(dict.fromkeys(self.prompts_of(role, side))), request).warning
            if warning and warning not in self._warned:
                self._warned.add(warning)
                tqdm.write(f"{role}: {warning}", file=sys.stderr)

    def prompts_of(self, role: str, side: Side) -> Sequence[str]:
        """What a text encoder reads."""
        return side.prompts

    def _check_given(self, side: Side, said: str, request: Request) -> None:
        """Raises InputError unless embeddings are all that prompts would make."""
        names = {"text": f"{said}prompt_embeds", "pooled": f"{said}pooled_prompt_embeds"}
        if side.given.keys() != dict(self.conditions).keys():
            wanted = " and ".join(names[name] for name, _ in self.conditions)
            raise InputError(f"embeddings of {', '.join(side.given)}: expected {wanted}")
        shapes = {name: shape.shape[1:] for name, shape in self._shapes(request)[2].items() if name in side.given}
        for name, array in side.given.items():
            if array.shape != (request.batch, *shapes[name]):
                raise InputError(f"{names[name]} {array.shape}: expected {(request.batch, *shapes[name])}")

"""FLUX.1: CLIP and T5, the transformer, a VAE, as diffusers' FluxPipeline puts them together.

The variants are sampled as Black Forest Labs does (black-forest-labs/flux); the size is that of the Chipmunk paper.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import jax
import numpy as np

from chipmunk_jax.arguments import check_guidance
from chipmunk_jax.errors import InputError
from chipmunk_jax.model import Condition
from chipmunk_jax.models.clip import ClipText, ClipTextConfig
from chipmunk_jax.models.flux import FluxConfig
from chipmunk_jax.models.flux_vae import FluxVae, FluxVaeConfig
from chipmunk_jax.models.t5 import T5Config, T5Encoder
from chipmunk_jax.pipelines.packing import unit, unpack
from chipmunk_jax.pipelines.prompted import PromptedPipeline
from chipmunk_jax.pipelines.request import Arguments, Request, Side
from chipmunk_jax.pipelines.text import Tokens
from chipmunk_jax.pipelines.variant import Settings, Variant

SIDE = 2  # latent pixels of a token, along each side


class FluxPipeline(PromptedPipeline):
    """FLUX.1-dev and FLUX.1-schnell."""

    takes = (
        "prompt_2", "negative_prompt_2", "true_cfg_scale", "prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds",
        "negative_pooled_prompt_embeds", "max_sequence_length",
    )  # fmt: skip
    names: ClassVar = PromptedPipeline.names | {"guidance": "true_cfg_scale"}
    conditions = (("pooled", "text_encoder"), ("text", "text_encoder_2"))
    published: ClassVar = {"text_encoder": ClipTextConfig(), "text_encoder_2": T5Config(), "vae": FluxVaeConfig()}

    def load_parts(self) -> None:
        super().load_parts()
        if "vae" in self.configs:
            self.variant = replace(self.variant, patch=(SIDE * self.configs["vae"].compression,) * 2)

    def scales(self, given: Arguments) -> dict[str, Any]:
        scale, negative = given.true_cfg_scale, (given.negative_prompt, given.negative_prompt_embeds)
        check_guidance(scale)
        if scale is not None and scale > 1 and all(one is None for one in negative):
            raise InputError(f"true_cfg_scale={scale}: expected a negative_prompt with it")
        if self.variant.distilled is not None:
            return {"guidance": scale, "distilled": given.guidance_scale}
        if given.guidance_scale:
            raise InputError(
                f"guidance_scale={given.guidance_scale}: expected 0 or none, as this FLUX was trained without one"
            )
        return {"guidance": scale}

    def read(self, role: str, prompts: Sequence[str], request: Request) -> Tokens:
        if role == "text_encoder":
            return self.tokenizers[role](prompts, self.configs[role].max_position_embeddings)
        return self.tokenizers[role](prompts, request.length or self.variant.text_rows)

    def prompts_of(self, role: str, side: Side) -> Sequence[str]:
        return side.prompts if role == "text_encoder" else side.prompts_2

    def encode(self, side: Side, request: Request) -> Condition:
        encode = {"pooled": pooled_of, "text": states_of}
        return dict(side.given) or {
            name: self.text(role, self.prompts_of(role, side), request, encode[name]) for name, role in self.conditions
        }

    def latents_shape(self, request: Request) -> tuple[int, ...]:
        grid = self.variant.grid(request.settings)
        return request.batch, grid[0] * grid[1], self.network.channels

    def decode(self, tokens: np.ndarray, settings: Settings) -> np.ndarray:
        latents = unpack(tokens, self.variant.grid(settings), (SIDE, SIDE), channels_first=True)
        return unit(np.concatenate([np.asarray(self.residents.run("vae", pixels_of, one[None])) for one in latents]))


def pooled_of(model: ClipText, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """[B, D] of CLIP."""
    return model(ids)[1]


def states_of(model: T5Encoder, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """[B, T, D] of T5, whose padding FLUX attends to."""
    return model(ids)


def pixels_of(model: FluxVae, latents: jax.Array) -> jax.Array:
    """[B, H, W, 3]."""
    return model.decode(latents)


# The VAE halves the sides three times and the transformer's patch once more.
_FLUX = dict(network="flux", pipeline=FluxPipeline, preset="flux", patch=(16, 16), height=768, width=1280)

VARIANTS = {
    "flux-dev": Variant(**_FLUX, config=FluxConfig(), matches=lambda config: config.guidance_embed, distilled=3.5),
    "flux-schnell": Variant(
        **_FLUX,
        config=FluxConfig(guidance_embed=False),
        matches=lambda config: True,
        steps=4,
        shift=1.0,
    ),
    # For tests and a first look at the harness: the same blocks, few and narrow.
    "flux-tiny": Variant(
        **_FLUX | dict(patch=(4, 4), pipeline=None),
        config=FluxConfig(hidden_size=256, num_heads=2, depth=2, depth_single_blocks=4),
        distilled=3.5,
        text=16,
    ),
}

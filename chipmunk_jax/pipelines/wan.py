"""Wan2.1 and Wan2.2: UMT5, one transformer or two, a causal VAE, as diffusers' WanPipeline puts them together.

The variants are sampled as their team does (Wan-Video/Wan2.1 and Wan2.2 generate.py, wan/configs).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from chipmunk_jax.errors import InputError
from chipmunk_jax.model import Condition
from chipmunk_jax.models.t5 import UMT5_XXL, T5Encoder
from chipmunk_jax.models.wan import WanConfig
from chipmunk_jax.models.wan_vae import WanVae, WanVaeConfig
from chipmunk_jax.pipelines.packing import pack, unit, unpack
from chipmunk_jax.pipelines.prompted import PromptedPipeline
from chipmunk_jax.pipelines.request import Arguments, Request, Side
from chipmunk_jax.pipelines.text import Tokens, clean
from chipmunk_jax.pipelines.variant import Settings, Variant
from chipmunk_jax.solvers import UniPC


class WanPipeline(PromptedPipeline):
    """Wan2.1 and Wan2.2-A14B from text to video."""

    takes = ("guidance_scale_2", "prompt_embeds", "negative_prompt_embeds", "max_sequence_length")
    conditions = (("text", "text_encoder"),)
    published: ClassVar = {"text_encoder": UMT5_XXL, "vae": WanVaeConfig()}

    def load_parts(self) -> None:
        super().load_parts()
        if "vae" in self.configs:
            time, side = self.configs["vae"].compression
            frames, rows, columns = self.variant.config.patch_size
            self.variant = replace(self.variant, patch=(time * frames, side * rows, side * columns))

    def scales(self, given: Arguments) -> dict[str, Any]:
        found = {"guidance": given.guidance_scale}
        if self.variant.boundary is not None:
            second = given.guidance_scale if given.guidance_scale_2 is None else given.guidance_scale_2
            return found | {"guidance_2": second}
        return found

    def refuse_unused(self, given: Arguments) -> None:
        super().refuse_unused(given)
        if given.guidance_scale_2 is not None and self.variant.boundary is None:
            raise InputError(f"guidance_scale_2={given.guidance_scale_2}: expected none, as this Wan has one network")

    def read(self, role: str, prompts: Sequence[str], request: Request) -> Tokens:
        return self.tokenizers[role]([clean(one) for one in prompts], request.length or self.text_rows(request))

    def encode(self, side: Side, request: Request) -> Condition:
        text = side.given.get("text")
        text = self.text("text_encoder", side.prompts, request, states_of) if text is None else text
        rows = self.text_rows(request)
        return {"text": np.pad(text, ((0, 0), (0, max(0, rows - text.shape[1])), (0, 0)))}

    def text_rows(self, request: Request) -> int:
        return self.variant.config.text_rows[1] or super().text_rows(request) or self.variant.text_rows

    def latents_shape(self, request: Request) -> tuple[int, ...]:
        sides = np.multiply(self.variant.grid(request.settings), self.variant.config.patch_size)
        return request.batch, self.variant.config.out_dim, *sides.tolist()

    def to_tokens(self, latents: np.ndarray, settings: Settings) -> np.ndarray:
        return pack(np.moveaxis(latents, 1, -1), self.variant.config.patch_size, channels_first=False)

    def to_latents(self, tokens: np.ndarray, settings: Settings) -> np.ndarray:
        return np.moveaxis(self._unpack(tokens, settings), -1, 1)

    def inexact(self, settings: Settings) -> dict[str, Any]:
        tile = self._portions(settings)["tile"]
        if tile is None:
            return {}
        size = "x".join(map(str, tile))
        self.tell(f"vae: no room for whole frames: decoded in tiles of {size} latents, pixels differ a little")
        return {"vae_tile": list(tile)}

    def decode(self, tokens: np.ndarray, settings: Settings) -> np.ndarray:
        videos = self._unpack(tokens, settings)
        decode = video_in(**self._portions(settings))
        return unit(np.concatenate([np.asarray(self.residents.run("vae", decode, one[None])) for one in videos]))

    def _portions(self, settings: Settings) -> dict[str, Any]:
        """In which portions the VAE decodes a video, in the room that there is."""
        sides = np.multiply(self.variant.grid(settings), self.variant.config.patch_size).tolist()
        shape = 1, *sides, self.variant.config.out_dim
        return self.residents.shapes["vae"].portions(shape, self.residents.room("vae"))

    def _unpack(self, tokens: np.ndarray, settings: Settings) -> np.ndarray:
        return unpack(tokens, self.variant.grid(settings), self.variant.config.patch_size, channels_first=False)


def states_of(model: T5Encoder, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """[B, T, D] of UMT5, zero after the prompt."""
    return jnp.where(mask[..., None], model(ids, mask), 0)


@lru_cache(maxsize=8)  # the same function for the same portions, which is compiled once
def video_in(**portions: Any) -> Callable[[WanVae, jax.Array], jax.Array]:
    """The function that decodes latents [B, T, h, w, C] to [B, F, H, W, 3] in these portions."""
    return lambda model, latents: model.decode(latents, **portions)


# wan/configs/shared_config.py
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，"
    "背景人很多，倒着走"
)
# The VAE takes four frames together, and halves the sides three times; the transformer's patch once more.
_WAN = dict(
    network="wan", pipeline=WanPipeline, patch=(4, 16, 16), lone_first=True, frames=81, fps=16, solver=UniPC(), shift=5.0,
    guidance=5.0, negative_prompt=NEGATIVE_PROMPT,
)  # fmt: skip
_14B = dict(dim=5120, ffn_dim=13_824, num_heads=40, num_layers=40)

VARIANTS = {
    "wan-i2v-14b": Variant(
        **_WAN | dict(pipeline=None, steps=40, negative_prompt=f"镜头晃动，{NEGATIVE_PROMPT}"),
        config=WanConfig(**_14B, in_dim=36, image_dim=1280),
        matches=lambda config: config.image_dim is not None,
        preset="wan-14b",
        height=720,
        width=1280,
        small_shift=3.0,  # the checkpoint for 480p has the sizes of the one for 720p
    ),
    # Two networks: the first samples down to the boundary, the second from there.
    "wan2.2-i2v-a14b": Variant(
        **_WAN | dict(pipeline=None, steps=40, guidance=3.5, guidance_2=3.5, boundary=0.9),
        config=WanConfig(**_14B, in_dim=36),
        matches=lambda config: config.in_dim > config.out_dim,
        preset="wan-14b",
        height=720,
        width=1280,
    ),
    "wan2.2-t2v-a14b": Variant(
        **_WAN | dict(steps=40, shift=12.0, guidance=4.0, guidance_2=3.0, boundary=0.875),
        config=WanConfig(**_14B),
        matches=lambda config: True,
        preset="wan-14b",
        height=720,
        width=1280,
    ),
    # Another VAE: it takes 16 x 16 pixels, as 48 channels.
    "wan2.2-ti2v-5b": Variant(
        **_WAN | dict(pipeline=None, patch=(4, 32, 32), frames=121, fps=24),
        config=WanConfig(dim=3072, ffn_dim=14_336, in_dim=48, out_dim=48, num_heads=24),
        matches=lambda config: config.out_dim == 48,
        preset="wan-14b",
        height=704,
        width=1280,
    ),
    # Guidance 6 and a shift of 8 to 12 are what Wan's README recommends for this one, over the 5 and 5 of its code.
    "wan-1.3b": Variant(
        **_WAN | dict(shift=8.0, guidance=6.0),
        config=WanConfig(),
        matches=lambda config: config.dim <= WanConfig.dim,
        preset="wan-1.3b",
        height=480,
        width=832,
    ),
    "wan-14b": Variant(
        **_WAN, config=WanConfig(**_14B), matches=lambda config: True, preset="wan-14b", height=720, width=1280
    ),
    # For tests and a first look at the harness: the same blocks, few and narrow.
    "wan-tiny": Variant(
        **_WAN | dict(pipeline=None, patch=(4, 4, 4), shift=8.0, guidance=6.0, frames=17, text=16),
        config=WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=4, text_dim=256),
        preset="wan-1.3b",
        height=64,
        width=64,
    ),
}

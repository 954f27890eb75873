"""HunyuanVideo as Tencent samples it (Tencent-Hunyuan/HunyuanVideo sample_video.py, hyvideo/config.py)."""

from chipmunk_jax.models.hunyuan_video import HunyuanVideoConfig
from chipmunk_jax.pipelines.variant import Variant

# The VAE takes four frames together, and halves the sides three times; the transformer's patch once more.
_HUNYUAN = dict(
    network="hunyuan_video", preset="hunyuan-video", patch=(4, 16, 16), lone_first=True, height=720, width=1280, frames=129,
    fps=24, shift=7.0, distilled=6.0,
)  # fmt: skip

VARIANTS = {
    "hunyuan-video": Variant(**_HUNYUAN, config=HunyuanVideoConfig(), matches=lambda config: True),
    # For tests and a first look at the harness: the same blocks, few and narrow.
    "hunyuan-tiny": Variant(
        **_HUNYUAN | dict(patch=(4, 4, 4)),
        config=HunyuanVideoConfig(hidden_size=256, num_heads=2, depth=2, depth_single_blocks=4),
        text=16,
    ),
}

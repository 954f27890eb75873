"""FLUX.1 as Black Forest Labs samples it (black-forest-labs/flux); the size is that of the Chipmunk paper."""

from chipmunk_jax.models.flux import FluxConfig
from chipmunk_jax.pipelines.variant import Variant

# The VAE halves the sides three times and the transformer's patch once more.
_FLUX = dict(network="flux", preset="flux", patch=(16, 16), height=768, width=1280)

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
        **_FLUX | dict(patch=(4, 4)),
        config=FluxConfig(hidden_size=256, num_heads=2, depth=2, depth_single_blocks=4),
        distilled=3.5,
        text=16,
    ),
}

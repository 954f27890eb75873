"""Diffusion transformers in JAX, sampled faster by recomputing only the columns that matter (Chipmunk, arXiv 2506.03275)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chipmunk_jax.convert.rules import Layout, Rule
    from chipmunk_jax.delta import attend
    from chipmunk_jax.errors import InputError, NotFiniteError
    from chipmunk_jax.layers import Mlp
    from chipmunk_jax.media import save_image, save_video
    from chipmunk_jax.model import Stack
    from chipmunk_jax.models import FluxConfig, HunyuanVideoConfig, Network, WanConfig
    from chipmunk_jax.models.checkpoint import load, save
    from chipmunk_jax.pipelines import Pipeline, PipelineOutput, Variant, register, variant_of
    from chipmunk_jax.pipelines.flux import FluxPipeline
    from chipmunk_jax.pipelines.wan import WanPipeline
    from chipmunk_jax.sampling import denoise, plan, sample, start
    from chipmunk_jax.solvers import Euler, UniPC, flux_timesteps, shifted_timesteps, wan_timesteps
    from chipmunk_jax.sparsity import AttentionSparsity, GuidanceCache, MlpSparsity, Sparsity, StepCache, load_sparsity

# Module -> what users find here of it.
_EXPORTS = {
    "convert.rules": ("Layout", "Rule"),
    "delta": ("attend",),
    "errors": ("InputError", "NotFiniteError"),
    "layers": ("Mlp",),
    "media": ("save_image", "save_video"),
    "model": ("Stack",),
    "models": ("FluxConfig", "HunyuanVideoConfig", "Network", "WanConfig"),
    "models.checkpoint": ("load", "save"),
    "pipelines": ("Pipeline", "PipelineOutput", "Variant", "register", "variant_of"),
    "pipelines.flux": ("FluxPipeline",),
    "pipelines.wan": ("WanPipeline",),
    "sampling": ("denoise", "plan", "sample", "start"),
    "solvers": ("Euler", "UniPC", "flux_timesteps", "shifted_timesteps", "wan_timesteps"),
    "sparsity": ("AttentionSparsity", "GuidanceCache", "MlpSparsity", "Sparsity", "StepCache", "load_sparsity"),
}
_MODULES = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = [
    "AttentionSparsity",
    "Euler",
    "FluxConfig",
    "FluxPipeline",
    "GuidanceCache",
    "HunyuanVideoConfig",
    "InputError",
    "Layout",
    "Mlp",
    "MlpSparsity",
    "Network",
    "NotFiniteError",
    "Pipeline",
    "PipelineOutput",
    "Rule",
    "Sparsity",
    "Stack",
    "StepCache",
    "UniPC",
    "Variant",
    "WanConfig",
    "WanPipeline",
    "attend",
    "denoise",
    "flux_timesteps",
    "load",
    "load_sparsity",
    "plan",
    "register",
    "sample",
    "save",
    "save_image",
    "save_video",
    "shifted_timesteps",
    "start",
    "variant_of",
    "wan_timesteps",
]


if not TYPE_CHECKING:  # or a checker would take any name

    def __getattr__(name: str) -> Any:
        """One of the above, imported when it is asked for: the command line begins before JAX is there (cli/main.py)."""
        if name in _MODULES:
            return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

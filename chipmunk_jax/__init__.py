"""Diffusion transformers in JAX, sampled faster by recomputing only the columns that matter (Chipmunk, arXiv 2506.03275)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chipmunk_jax.sampling import sample
    from chipmunk_jax.solvers import Euler, UniPC, flux_timesteps, shifted_timesteps, wan_timesteps
    from chipmunk_jax.sparsity import AttentionSparsity, MlpSparsity, Sparsity, StepCache, load_sparsity

__all__ = [
    "AttentionSparsity",
    "Euler",
    "MlpSparsity",
    "Sparsity",
    "StepCache",
    "UniPC",
    "flux_timesteps",
    "load_sparsity",
    "sample",
    "shifted_timesteps",
    "wan_timesteps",
]


def __getattr__(name: str) -> Any:
    """One of the above, imported when it is asked for: the command line begins before JAX is there (cli/main.py)."""
    for module in ("sampling", "solvers", "sparsity") if name in __all__ else ():
        if (found := getattr(import_module(f"{__name__}.{module}"), name, None)) is not None:
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

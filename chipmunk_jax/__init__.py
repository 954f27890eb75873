"""Diffusion transformers in JAX, sampled faster by recomputing only the columns that matter (Chipmunk, arXiv 2506.03275)."""

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

"""Diffusion transformers in JAX, sampled faster by recomputing only the columns that matter (Chipmunk, arXiv 2506.03275)."""

from chipmunk_jax.sparsity import AttentionSparsity, MlpSparsity, Sparsity, load_sparsity

__all__ = [
    "AttentionSparsity",
    "MlpSparsity",
    "Sparsity",
    "load_sparsity",
]

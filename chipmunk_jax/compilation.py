"""Compiled programs, kept from one process to the next."""

import os
from pathlib import Path

import jax


def keep_compilations() -> None:
    """Keeps compiled programs, and which of several equal algorithms was fastest, between runs on a GPU.

    XLA chooses by timing, and another choice rounds otherwise: kept, the same seed gives the same bits in the next process too, and
    a program is compiled once. The folder is $JAX_COMPILATION_CACHE_DIR, or chipmunk-jax under $XDG_CACHE_HOME or ~/.cache.
    """
    if jax.default_backend() == "gpu" and not jax.config.jax_compilation_cache_dir:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "chipmunk-jax"))

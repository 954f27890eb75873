"""Skipped steps: which they are, and what a sample keeps through them, since they run no block."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from chipmunk_jax.model import Model, Stack
from chipmunk_jax.sparsity import StepCache


def skipped(config: StepCache, steps: int) -> np.ndarray:
    """bool[steps]: the steps that run no block."""
    return np.isin(np.arange(steps), config.skip_steps)


def unless_skipped(skip: jax.Array | None, run: Callable, x: jax.Array, *kept: Any) -> tuple[Any, ...]:
    """Returns run(x, *kept), what this step makes of what was kept, or in a skipped step what was kept, unchanged.

    Args:
        skip: bool, whether this step runs no block; None: no step is ever skipped.
        run: runs the blocks.
        x: [B, N, C], the tokens that enter the blocks.
        kept: arrays of the last step that ran: the tokens after its last block, and the caches.
    """
    if skip is None:
        return run(x, *kept)
    # A loop of one turn or none: a conditional would make XLA copy every cache.
    return lax.fori_loop(0, 1 - skip.astype(jnp.int32), lambda _, kept: run(x, *kept), kept)


def hidden_zeros(model: Model, stacks: dict[str, Stack], batch: int, tokens: int) -> jax.Array:
    """Zeros in place of the tokens after the last block before there are any, [B, N, D]."""
    return jnp.zeros((batch, tokens, next(iter(stacks.values())).width), model.dtype)

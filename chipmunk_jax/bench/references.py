"""What the kernels should give, in float32 NumPy, for a few rows: naive, and apart from the code under test."""

import jax
import numpy as np
from jax import lax

from pallas_kernels.groups import group_count


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    """softmax(scale q k^T) v for one head: q [r, d], k and v [n, d] -> [r, d]."""
    return _softmax(q, k, scale) @ v


def column_mass(q: np.ndarray, k: np.ndarray, scale: float) -> np.ndarray:
    """Sum over the queries of their softmax over the keys: q [r, d], k [n, d] -> [n]."""
    return _softmax(q, k, scale).sum(axis=0)


def _softmax(q: np.ndarray, k: np.ndarray, scale: float) -> np.ndarray:
    logits = scale * (q @ k.T)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def activations(x: np.ndarray, fc1: np.ndarray, b1: np.ndarray) -> np.ndarray:
    """gelu_tanh(x fc1^T + b1): x [r, D], fc1 [f, D], b1 [f] -> [r, f]."""
    hidden = x @ fc1.T + b1
    return 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi).astype(np.float32) * (hidden + 0.044715 * hidden**3)))


def top(scores: np.ndarray, k: int) -> np.ndarray:
    """Ids of the k largest of every row in ascending order, ties from the left: [r, n] -> [r, k]."""
    return np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., :k], axis=-1)


def one_head(x: jax.Array, head: int) -> np.ndarray:
    """x [B, N, H, d] of the first of the batch and one head: f32 [N, d]."""
    return host(_index_head(x, head))


_index_head = jax.jit(lambda x, head: lax.dynamic_index_in_dim(x[0], head, axis=1, keepdims=False))


def some_rows(x: jax.Array, most: int) -> np.ndarray:
    """Rows of an array [.., n], from the first to the last: [rows, n] on the host."""
    places = np.unravel_index(np.array(some(x.size // x.shape[-1], most)), x.shape[:-1])
    return np.asarray(_take(x, places))


_take = jax.jit(lambda x, places: x[places])


def host(x: jax.Array) -> np.ndarray:
    """x as float32 on the host."""
    return np.asarray(x).astype(np.float32)


def some_groups(rows: int, group: int, most: int = 3) -> list[tuple[int, slice]]:
    """Some groups of so many rows: (g, its rows)."""
    return [(g, slice(g * group, (g + 1) * group)) for g in some(group_count(rows, group), most)]


def some(n: int, most: int = 3) -> list[int]:
    """First, last and one between of range(n), without repetition."""
    return sorted({round(i * (n - 1) / max(1, most - 1)) for i in range(most)})

"""Groups of rows that share one column list: group g holds rows g * group to (g + 1) * group - 1, the last may be ragged."""

import jax
import jax.numpy as jnp


def group_count(rows: int, group: int) -> int:
    """Groups of a sequence: ceil(rows / group)."""
    return -(-rows // group)


def split_groups(x: jax.Array, group: int) -> jax.Array:
    """x [..., N, D] as [..., G, group, D], zeros after the last row."""
    rows = x.shape[-2]
    groups = group_count(rows, group)
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, groups * group - rows), (0, 0)])
    return padded.reshape(*x.shape[:-2], groups, group, x.shape[-1])


def join_groups(x: jax.Array, rows: int) -> jax.Array:
    """The inverse of split_groups: x [..., G, group, D] as [..., rows, D]."""
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])[..., :rows, :]


def check_group(group: int) -> None:
    """Raises ValueError unless the kernels can tile the group."""
    if group < 64 or group % 64:
        raise ValueError(f"group={group}: expected a multiple of 64")


def row_tile(group: int) -> int:
    """Rows of one program: 128 where the group allows it, else 64."""
    return 128 if group % 128 == 0 else 64

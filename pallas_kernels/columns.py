"""Lists of chosen columns, pinned keys and residuals of 8 bits: passed to kernels whole.

A column is a key of attention or a neuron of an MLP. Lists of keys may be packed, two ids a word of 32 bits: an ascending list
passes 65,536 at most once on its way to 131,071, and `wrap` says where. What is stacked by layers, [L, B, ..], may have more
entries than the call: its first B of a layer are used, and the others left alone.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

WRAP = 65_536  # ids that 16 bits tell apart


class Columns(NamedTuple):
    """Chosen columns of each group, distinct and ascending: keys of all layers [L, B, H, G, K], or neurons [L, B, G, K]."""

    indices: jax.Array  # [.., G, K], i32; packed [.., G, ceil(K / 2)]; only the first counts of each list are ever used
    counts: jax.Array  # [.., G], i32, 0 to K
    wrap: jax.Array | None = None  # [.., G], i32, of packed lists: entries from there on are less by 65,536

    @classmethod
    def empty(cls, lists: tuple[int, ...], capacity: int, packed: bool = False) -> "Columns":
        """Lists [*lists, capacity] without any column; no two arrays are the same one, so that they can be donated."""
        none = lambda shape: jnp.zeros(shape, jnp.int32)
        words = (capacity + 1) // 2 if packed else capacity
        return cls(none((*lists, words)), none(lists), none(lists) if packed else None)

    @property
    def capacity(self) -> int:
        """K, the columns that a list has room for."""
        return self.indices.shape[-1] * (1 if self.wrap is None else 2)

    def check(self, lists: tuple[int, ...], to_fit: str, *, packable: bool = False) -> None:
        """Raises ValueError unless there is a list for each of [L, *lists], of B or more entries.

        Args:
            lists: B, .., G.
            to_fit: the array that asks for these, and its shape, for the message.
            packable: whether the lists may be packed.
        """
        shapes, expected = f"indices {self.indices.shape}, counts {self.counts.shape}", ", ".join(map(str, lists))
        if not covers(self.indices.shape[1:-1], lists) or self.counts.shape != self.indices.shape[:-1]:
            raise ValueError(f"{shapes}: expected [L, {expected}, K], [L, {expected}] to fit {to_fit}")
        if self.wrap is not None and not packable:
            raise ValueError(f"{shapes}, packed: expected lists of neurons as they are, only those of keys are packed")
        if self.wrap is not None and self.wrap.shape != self.counts.shape:
            raise ValueError(f"{shapes}, wrap {self.wrap.shape}: expected wrap [L, {expected}] to fit {to_fit}")

    def listed(self, layer: jax.Array | int, batch: int) -> tuple[jax.Array, jax.Array]:
        """Ids [B, .., G, K], i32, of one layer's lists, and which of these entries count, bool; those that do not are 0."""
        ids, counts, wrap = jax.tree.map(lambda stack: stack[layer, :batch], self)
        if wrap is not None:
            ids = jnp.stack([ids & (WRAP - 1), lax.shift_right_logical(ids, 16)], -1).reshape(*ids.shape[:-1], -1)
            ids += WRAP * (jnp.arange(ids.shape[-1]) >= wrap[..., None])
        listed = jnp.arange(ids.shape[-1]) < counts[..., None]
        return jnp.where(listed, ids, 0), listed

    def loader(self, *at: jax.Array) -> tuple[Callable[[jax.Array], jax.Array], jax.Array]:
        """The list of [layer, b, .., g] in the body of a kernel: a function, slots [n] -> columns [n], and how many there are.

        The function takes a mask, too, bool [n]: slots that are not read.
        """

        def load(slots, mask=None):
            if self.wrap is None:
                return plgpu.load(self.indices.at[*at, slots], mask=mask, other=_other(mask))
            words = plgpu.load(self.indices.at[*at, slots >> 1], mask=mask, other=_other(mask))
            ids = (words >> ((slots & 1) * 16)) & (WRAP - 1)
            return ids + jnp.where(slots < self.wrap[*at], 0, WRAP)

        return load, self.counts[*at]


def covers(stacked: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether the shape of one layer of a stack is [B, ..], or has more entries than B: the kernels use the first B."""
    return stacked[1:] == shape[1:] and stacked[0] >= shape[0]


def pack_lists(columns: Columns) -> Columns:
    """The same lists in half the size: [.., ceil(K / 2)], two ids of 16 bits a word, the first in its lower half.

    Args:
        columns: not packed, of ids 0 to 131,071, ascending.
    """
    indices, counts = columns.indices, columns.counts
    halves = jnp.pad(indices & (WRAP - 1), [(0, 0)] * counts.ndim + [(0, indices.shape[-1] % 2)])
    words = halves[..., ::2] | (halves[..., 1::2] << 16)
    listed = jnp.arange(indices.shape[-1]) < counts[..., None]
    return Columns(words, counts, (listed & (indices < WRAP)).sum(-1, dtype=jnp.int32))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["ids", "starts"], meta_fields=["heavy"])
@dataclass(frozen=True)
class PinnedKeys:
    """Keys that all heads and layers of a group attend to besides their own lists, which must not name them again."""

    ids: jax.Array  # [n], i32: those of group 0, then those of group 1, .., ascending within a group
    starts: jax.Array  # [G + 1], i32: where each group's begin, and n
    heavy: int = 0  # the last groups that have far more: their programs start first, lest all others wait for them

    def listed(self, valid: jax.Array | None, keys: int) -> tuple[jax.Array, jax.Array]:
        """Ids [B or 1, 1, G, N], i32, and which of these entries count, bool; those that do not, padding among them, are 0.

        Args:
            valid: [B], i32: keys from there on are padding; None: there is none.
            keys: N.
        """
        places = self.starts[:-1, None] + jnp.arange(keys)  # a group has no more than all of them
        ids = jnp.asarray(self.ids).at[places].get(mode="clip")
        valid = jnp.full(1, keys) if valid is None else valid
        listed = (places < self.starts[1:, None]) & (ids < valid[:, None, None, None])
        return jnp.where(listed, ids, 0), listed

    def counted(self, valid: jax.Array | None, batch: int) -> "CountedKeys":
        """The same keys as a kernel reads them; valid as in `listed`."""
        ids, starts = self.ids, jnp.asarray(self.starts)
        if valid is None:
            return CountedKeys(ids, starts[:-1], jnp.broadcast_to(starts[1:] - starts[:-1], (batch, len(starts) - 1)))
        before = jnp.pad(jnp.cumsum(ids < valid[:, None], axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))[:, starts]
        return CountedKeys(ids, starts[:-1], before[:, 1:] - before[:, :-1])


class CountedKeys(NamedTuple):
    """PinnedKeys as a kernel reads them."""

    ids: jax.Array  # [n], i32
    starts: jax.Array  # [G], i32: where each group's begin
    counts: jax.Array  # [B, G], i32: how many of these are no padding

    def loader(self, b: jax.Array, g: jax.Array) -> tuple[Callable[[jax.Array], jax.Array], jax.Array]:
        """As Columns.loader, of one group."""
        start = self.starts[g]
        load = lambda slots, mask=None: plgpu.load(self.ids.at[start + slots], mask=mask, other=_other(mask))
        return load, self.counts[b, g]


def _other(mask: jax.Array | None) -> int | None:
    """What a load gives where it is masked."""
    return None if mask is None else 0


class Scaled(NamedTuple):
    """A stack of arrays in 8 bits: values times the scale of their row."""

    values: jax.Array  # [L, B, N, H, d], float8_e4m3fn
    scale: jax.Array  # [L, B, H, N], f32

    @classmethod
    def zeros(cls, shape: tuple[int, ...]) -> "Scaled":
        """Zeros [L, B, N, H, d], which is the shape."""
        layers, batch, rows, heads, _ = shape
        return cls(jnp.zeros(shape, jnp.float8_e4m3fn), jnp.zeros((layers, batch, heads, rows), jnp.float32))

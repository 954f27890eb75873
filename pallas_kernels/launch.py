"""How a kernel's programs cover its rows: wide ones in whole waves, narrow ones for the rows that are left.

4,352 rows are 34 tiles of 128. A kernel with 24 programs a tile, of which 264 run at once on an H100, is through with 33 tiles in
three waves; the 34th alone would keep a tenth of the card busy for as long as a whole wave. Its rows go into a launch of their own,
with more and smaller programs.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl

from pallas_kernels import dispatch
from pallas_kernels.groups import group_count
from pallas_kernels.tiles import Tile


class Launch(NamedTuple):
    """One call of a kernel."""

    first: int  # row tile
    grid: tuple[int, int, int]  # row tiles, column tiles, batch
    tile: Tile


def launches(rows: int, columns: int, batch: int, wide: Tile, narrow: Tile) -> list[Launch]:
    """The calls that cover [batch, rows, columns]: one or two. wide.rows is a multiple of narrow.rows."""
    whole = _whole_waves(group_count(rows, wide.rows), batch * group_count(columns, wide.columns), wide.resident)
    first = whole * wide.rows // narrow.rows
    parts = ((0, whole, wide), (first, group_count(rows, narrow.rows) - first, narrow))
    return [
        Launch(start, (count, group_count(columns, tile.columns), batch), tile)
        for start, count, tile in parts
        if count > 0  # the last wide tile may reach past the last narrow one
    ]


def _whole_waves(tiles: int, programs: int, resident: int) -> int:
    """How many of the row tiles, of `programs` programs each, fill whole waves.

    All of them where the last wave is half full, or one of nine and more: it costs less than a second launch could save.
    """
    slots = dispatch.card().multiprocessors * resident
    waves, rest = divmod(tiles * programs, slots)
    if waves >= 8 or rest > slots // 2:
        return tiles
    return waves * slots // programs


def run(body: Callable, name: str, inputs: tuple, outputs: list, launch: Launch, implementation: str) -> list:
    """outputs after one launch of body(*input refs, *refs of given outputs, *output refs).

    Args:
        inputs: pytrees of arrays to read.
        outputs: arrays are written in place, shapes are allocated, None stays None.
    """
    wanted = [a for a in outputs if a is not None]
    given = [place for place, a in enumerate(wanted) if not isinstance(a, jax.ShapeDtypeStruct)]
    results = iter(
        pl.pallas_call(
            body,
            grid=launch.grid,
            name=name,
            out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in wanted],
            input_output_aliases={len(jax.tree.leaves(inputs)) + n: place for n, place in enumerate(given)},
            interpret=implementation == "interpret",
            compiler_params=dispatch.compiler_params(num_warps=launch.tile.warps, num_stages=launch.tile.stages),
        )(*inputs, *(wanted[place] for place in given))
    )
    return [None if a is None else next(results) for a in outputs]

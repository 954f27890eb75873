"""Tiles of the kernels that feed the matrix units, by card: the fastest that were measured, and smaller ones for smaller cards.

A kernel has two: a wide one for whole waves of programs, a narrow one for the rows that are left (see launch.py).
"""

from typing import NamedTuple

from pallas_kernels import dispatch
from pallas_kernels.groups import row_tile


class Tile(NamedTuple):
    """The part of the output that one program computes, and how."""

    rows: int
    columns: int  # of the output: features, neurons, heads
    warps: int
    resident: int = 1  # programs that fit a multiprocessor
    stages: int = 3  # of the loop's pipeline: narrow tiles wait for memory, not for matrix units, and take more
    inner: int = 64  # width of a step of the contraction


# Measured on an H100 at the sizes of FLUX.1, and of HunyuanVideo for attention: NOTES.md has what others took.
TILES = {
    "column_attention": (Tile(128, 1, warps=4, resident=2), Tile(32, 1, warps=4, resident=2, stages=4)),
    "column_fc1": (Tile(128, 256, warps=8), Tile(128, 32, warps=4, stages=4, inner=128)),
    "column_fc2": (Tile(128, 128, warps=4, resident=2), Tile(64, 32, warps=4, stages=6)),
}
# In place of tiles that do not fit the 99 KiB of shared memory that a program has on Ada and on Blackwell's workstation cards.
# Compiled for these cards, never timed on one.
SMALL_CARDS = ("8.6", "8.9", "12.0", "12.1")
SMALL_TILES = {"column_fc1": (Tile(128, 128, warps=4), Tile(64, 32, warps=4, stages=4))}


def tiles(kernel: str, group: int) -> tuple[Tile, Tile]:
    """The wide tile of a kernel and its narrow one, on this card, with no more rows than share a list."""
    small = dispatch.card().compute_capability in SMALL_CARDS
    wide, narrow = SMALL_TILES.get(kernel, TILES[kernel]) if small else TILES[kernel]
    most = row_tile(group)
    return wide._replace(rows=min(wide.rows, most)), narrow._replace(rows=min(narrow.rows, most))

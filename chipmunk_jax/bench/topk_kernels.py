"""topk_columns against lax.top_k."""

import math
from dataclasses import dataclass

import jax
import numpy as np
from jax import lax

from chipmunk_jax.bench import draw, references
from chipmunk_jax.bench.measure import EXACT, Candidate
from chipmunk_jax.bench.timing import input_sets
from chipmunk_jax.memory import nbytes
from pallas_kernels import Implementation, topk_columns

CHECKED_ROWS = 16


@dataclass(frozen=True)
class TopkCase:
    """Scores of one shape, and the number to take of each row."""

    shape: dict[str, int]  # H heads, G groups; N keys or F neurons, the columns of a row; K, of which so many are taken
    baseline_share: int = 1  # the baseline sorts 1 / share of the rows: all of them would take gigabytes and seconds


def topk_candidates(case: TopkCase, most_sets: int, implementation: Implementation | None) -> list[Candidate]:
    """lax.top_k, which orders its result by score, and topk_columns, whose lists ascend."""
    *lists, columns, kept = case.shape.values()
    rows = math.prod(lists)
    sets = input_sets(lambda key: draw.scores(key, (*lists, columns)), jax.random.key(0), most=most_sets)
    part = [_first_rows(x, rows // case.baseline_share) for x in sets] if case.baseline_share > 1 else sets
    top_k = lambda x, state: (lax.top_k(x, kept)[1], state)
    ours = lambda x, state: (topk_columns(x, kept, capacity=kept, implementation=implementation).indices, state)
    check = lambda arrange: lambda x, ids, *_: [(arrange(_checked(ids)), references.top(_checked(x), kept))]
    work = dict(bytes=nbytes(sets[0]) + 4 * kept * rows, tolerance=EXACT)
    return [
        Candidate("lax.top_k", case.shape, top_k, part, check(np.sort), **work, share=1 / case.baseline_share),
        Candidate("ascending lists", case.shape, ours, sets, check(np.asarray), **work),
    ]


_first_rows = jax.jit(lambda x, rows: x.reshape(-1, x.shape[-1])[:rows], static_argnums=1)


def _checked(x: jax.Array) -> np.ndarray:
    """Some rows of an array [.., columns]: f32 [rows, columns], whole numbers to 2^24 exact."""
    return references.some_rows(x, CHECKED_ROWS).astype(np.float32)

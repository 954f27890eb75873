"""topk_columns against lax.top_k."""

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

    lists: dict[str, int]  # sizes of the axes in front: H heads, G groups
    columns: int  # of a row: N keys or F neurons
    axis: str  # its letter
    k: int
    baseline_share: int = 1  # the baseline sorts 1 / share of the rows: all of them would take gigabytes and seconds

    @property
    def shape(self) -> dict[str, int]:
        return self.lists | {self.axis: self.columns, "K": self.k}


def topk_candidates(case: TopkCase, most_sets: int, implementation: Implementation | None) -> list[Candidate]:
    """lax.top_k, which orders its result by score, and topk_columns, whose lists ascend."""
    shape = (*case.lists.values(), case.columns)
    sets = input_sets(lambda key: draw.scores(key, shape), jax.random.key(0), most=most_sets)
    rows = int(np.prod(shape[:-1]))
    part = [_first_rows(x, rows // case.baseline_share) for x in sets] if case.baseline_share > 1 else sets
    common = dict(
        shape=case.shape,
        sparsity=1 - case.k / case.columns,
        expected=lambda scores, state: [references.top(_checked(scores), case.k)],
        tolerance=EXACT,
    )
    baseline = Candidate(
        variant="lax.top_k", sets=part, share=1 / case.baseline_share,
        call=lambda scores, state: (lax.top_k(scores, case.k)[1], state),
        observed=lambda ids, state: [np.sort(_checked(ids), axis=-1)],
        bytes=nbytes(part[0]) + 4 * case.k * rows // case.baseline_share, **common,
    )  # fmt: skip
    ours = Candidate(
        variant="ascending lists", sets=sets,
        call=lambda scores, state: (
            topk_columns(scores, case.k, capacity=case.k, implementation=implementation).indices,
            state,
        ),
        observed=lambda ids, state: [_checked(ids)],
        bytes=nbytes(sets[0]) + 4 * case.k * rows, **common,
    )  # fmt: skip
    return [baseline, ours]


_first_rows = jax.jit(lambda x, rows: x.reshape(-1, x.shape[-1])[:rows], static_argnums=1)


def _checked(x: jax.Array) -> np.ndarray:
    """Some rows of an array [.., columns]: f32 [rows, columns], whole numbers to 2^24 exact."""
    return references.some_rows(x, CHECKED_ROWS).astype(np.float32)

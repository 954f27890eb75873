"""column_attention against dense attention, and what column sums add to it."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from chipmunk_jax.bench import draw, references, torch_baselines
from chipmunk_jax.bench.measure import Candidate
from chipmunk_jax.bench.references import one_head, some
from chipmunk_jax.bench.timing import input_sets
from chipmunk_jax.memory import nbytes
from pallas_kernels import Implementation, column_attention, column_sums, dense_attention
from pallas_kernels.groups import group_count

LAYERS = 2  # of stacked arrays; the last one is read
RESIDUAL = 0.1  # about the size of attention over some hundred random columns, so that neither hides in the other


@dataclass(frozen=True)
class AttentionCase:
    """One shape, and the numbers of keys to keep."""

    heads: int  # H
    tokens: int  # N
    head_dim: int  # d
    group: int
    plain: tuple[int, ...] = ()  # keys kept, attention over them alone
    residual: tuple[int, ...] = ()  # keys kept, added to the stacked residual, as a delta step runs it

    @property
    def shape(self) -> dict[str, int]:
        return {"B": 1, "H": self.heads, "N": self.tokens, "d": self.head_dim}

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def product(self, keys: float) -> float:
        """Operations of one matrix product of all queries with a number of keys."""
        return 2 * self.heads * self.tokens * keys * self.head_dim

    def slices(self):
        """(head, group, its rows) of what is checked."""
        for head in some(self.heads, 2):
            for g in some(group_count(self.tokens, self.group)):
                yield head, g, slice(g * self.group, min(self.tokens, (g + 1) * self.group))


def column_attention_candidates(
    case: AttentionCase, most_sets: int, implementation: Implementation | None
) -> list[Candidate]:
    """Dense attention, PyTorch's where it is there, and column attention at every number of keys."""
    arrays = input_sets(lambda key: _draw(case, key), jax.random.key(0), most=most_sets)
    dense = _dense(case, arrays, implementation)
    kept = [*((k, False) for k in case.plain), *((k, True) for k in case.residual)]
    columns = [_columns(case, arrays, k, with_residual, implementation) for k, with_residual in kept]
    return [dense, *torch_baselines.attention(dense, case.scale), *columns]


def dense_colsum_candidates(
    case: AttentionCase, most_sets: int, implementation: Implementation | None
) -> list[Candidate]:
    """Dense attention, and the same with the column sums of every group: of all its queries, every second, every fourth."""
    arrays = input_sets(lambda key: _draw(case, key), jax.random.key(0), most=most_sets)
    return [_dense(case, arrays, implementation), *(_summed(case, arrays, n, implementation) for n in (1, 2, 4))]


def _summed(case: AttentionCase, arrays, stride: int, implementation) -> Candidate:
    groups = group_count(case.tokens, case.group)
    tiling = dict(scale=case.scale, implementation=implementation)

    def call(inputs, state):
        q, k, v = inputs
        out, lse = dense_attention(q, k, v, **tiling)
        return (out, lse, column_sums(q, k, lse, group=case.group, stride=stride, **tiling)), state

    def expected(inputs, state):
        heads = _heads(case, inputs[:2])
        sampled = lambda rows: [i for i in range(rows.start, rows.stop) if i % stride == i // stride % stride]
        mass = lambda head, rows: references.column_mass(heads[head][0][sampled(rows)], heads[head][1], case.scale)
        return [*_expected_dense(case, inputs, state), *(mass(h, rows) for h, _, rows in case.slices())]

    def observed(output, state):
        out, _, sums = output
        row = lambda h, g: references.host(_index_row(sums, h, g))
        return [*_rows(case, out), *(row(h, g) for h, g, _ in case.slices())]

    return Candidate(
        variant="with sums" if stride == 1 else f"with sums of 1/{stride} of the queries",
        shape=case.shape | {"group": case.group, "stride": stride}, sparsity=0.0, call=call, sets=arrays,
        expected=expected, observed=observed,
        operations=(2 + 1 / stride) * case.product(case.tokens),
        bytes=nbytes(arrays[0]) * 4 / 3 + 4 * case.heads * case.tokens + 2 * case.heads * groups * case.tokens,
    )  # fmt: skip


def _draw(case: AttentionCase, key: jax.Array):
    shape = (1, case.tokens, case.heads, case.head_dim)
    return tuple(draw.normal(k, shape) for k in jax.random.split(key, 3))


def _dense(case: AttentionCase, arrays, implementation) -> Candidate:
    return Candidate(
        variant="dense", shape=case.shape, sparsity=0.0, sets=arrays,
        call=lambda inputs, state: (
            dense_attention(*inputs, scale=case.scale, implementation=implementation)[0],
            state,
        ),
        expected=lambda inputs, state: _expected_dense(case, inputs, state),
        observed=lambda output, state: _rows(case, output),
        operations=2 * case.product(case.tokens),
        bytes=nbytes(arrays[0]) * 4 / 3,
    )  # fmt: skip


def _columns(case: AttentionCase, arrays, kept: int, with_residual: bool, implementation) -> Candidate:
    layers = LAYERS if with_residual else 1
    lists = (layers, 1, case.heads, group_count(case.tokens, case.group))
    sets = []
    for i, qkv in enumerate(arrays):
        keys = jax.random.split(jax.random.key(kept + i), 2)
        columns = draw.lists(keys[0], lists, kept, case.tokens)
        residual = draw.normal(keys[1], (layers, *qkv[0].shape), scale=RESIDUAL) if with_residual else None
        caches = dict(lse=jnp.stack([_lse(*qkv[:2], case.scale)] * layers), residual=residual)
        sets.append((*qkv, columns, jnp.int32(layers - 1), caches))

    def call(inputs, state):
        *arrays, caches = inputs
        tiling = dict(group=case.group, scale=case.scale, implementation=implementation)
        return column_attention(*arrays, **caches, **tiling), state

    def expected(inputs, state):
        *qkv, columns, _, caches = inputs
        heads, lists, residual = _heads(case, qkv), np.asarray(columns.indices[-1, 0]), caches["residual"]
        found = []
        for head, g, rows in case.slices():
            (q, k, v), keys = heads[head], lists[head, g]
            base = 0 if residual is None else one_head(residual[-1], head)[rows]
            found.append(base + references.attention(q[rows], k[keys], v[keys], case.scale))
        return found

    return Candidate(
        variant="residual" if with_residual else "plain",
        shape=case.shape | {"K": kept, "group": case.group},
        sparsity=1 - kept / case.tokens,
        call=call, sets=sets, expected=expected, observed=lambda output, state: _rows(case, output),
        operations=2 * case.product(kept),
        bytes=nbytes(arrays[0]) * (5 if with_residual else 4) / 3 + 4 * (sets[0][3].indices[0].size + case.heads * case.tokens),
    )  # fmt: skip


@partial(jax.jit, static_argnums=2)
def _lse(q, k, scale):
    """About the log-sum-exp of every query, f32 [1, H, N], as an earlier step would have left it: the mean over normal keys."""
    lengths = jnp.square(q.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
    return jnp.log(k.shape[1]) + scale**2 * lengths / 2


def _expected_dense(case: AttentionCase, inputs, state) -> list[np.ndarray]:
    heads = _heads(case, inputs)
    attend = lambda q, k, v, rows: references.attention(q[rows], k, v, case.scale)
    return [attend(*heads[head], rows) for head, _, rows in case.slices()]


def _heads(case: AttentionCase, arrays) -> dict[int, list[np.ndarray]]:
    """The heads that are checked: f32 [N, d] each."""
    return {head: [one_head(x, head) for x in arrays] for head in some(case.heads, 2)}


def _rows(case: AttentionCase, out: jax.Array) -> list[np.ndarray]:
    heads = _heads(case, [out])
    return [heads[head][0][rows] for head, _, rows in case.slices()]


_index_row = jax.jit(lambda sums, head, g: sums[0, head, g])

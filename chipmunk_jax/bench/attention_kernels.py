"""column_attention against dense attention, and what column sums add to it."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from chipmunk_jax.bench import draw, references, torch_baselines
from chipmunk_jax.bench.measure import Candidate, Pairs
from chipmunk_jax.bench.references import host, one_head, some, some_groups
from chipmunk_jax.bench.timing import input_sets
from chipmunk_jax.memory import nbytes
from pallas_kernels import Columns, Implementation, column_attention, column_sums, dense_attention
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

    def inputs(self, most_sets: int) -> list[tuple[jax.Array, ...]]:
        """Sets of queries, keys and values, bf16 [1, N, H, d] each."""
        shape = (1, self.tokens, self.heads, self.head_dim)
        qkv = lambda key: tuple(draw.normal(k, shape) for k in jax.random.split(key, 3))
        return input_sets(qkv, jax.random.key(0), most=most_sets)

    def product(self, keys: float) -> float:
        """Operations of one matrix product of all queries with a number of keys."""
        return 2 * self.heads * self.tokens * keys * self.head_dim

    def slices(self, *arrays: jax.Array):
        """(head, group, its rows, that head of each array [1, N, H, d]: f32 [N, d]) of what is checked."""
        for head in some(self.heads, 2):
            heads = [one_head(x, head) for x in arrays]
            yield from ((head, g, rows, heads) for g, rows in some_groups(self.tokens, self.group))

    def check(self, qkv, out: jax.Array, columns: Columns | None = None, residual: jax.Array | None = None) -> Pairs:
        """Attention over all keys, or over those listed and with the residual, of the last layer both."""
        lists = None if columns is None else np.asarray(columns.indices[-1, 0])
        added = [] if residual is None else [residual[-1]]
        for head, g, rows, (q, k, v, found, *base) in self.slices(*qkv, out, *added):
            keys = slice(None) if lists is None else lists[head, g]
            expected = references.attention(q[rows], k[keys], v[keys], self.scale)
            yield found[rows], sum((x[rows] for x in base), expected)


def column_attention_candidates(
    case: AttentionCase, most_sets: int, implementation: Implementation | None
) -> list[Candidate]:
    """Dense attention, PyTorch's where it is there, and column attention at every number of keys."""
    sets = case.inputs(most_sets)
    dense = _dense(case, sets, implementation)
    plain = [_columns(case, sets, kept, False, implementation) for kept in case.plain]
    residual = [_columns(case, sets, kept, True, implementation) for kept in case.residual]
    return [dense, *torch_baselines.attention(dense, case.scale), *plain, *residual]


def dense_colsum_candidates(
    case: AttentionCase, most_sets: int, implementation: Implementation | None
) -> list[Candidate]:
    """Dense attention, and the same with the column sums of every group: of all its queries, every second, every fourth."""
    sets = case.inputs(most_sets)
    return [_dense(case, sets, implementation), *(_summed(case, sets, n, implementation) for n in (1, 2, 4))]


def _dense(case: AttentionCase, sets, implementation) -> Candidate:
    attend = partial(dense_attention, scale=case.scale, implementation=implementation)
    call = lambda qkv, state: (attend(*qkv)[0], state)
    check = lambda qkv, out, *_: case.check(qkv, out)
    work = dict(operations=2 * case.product(case.tokens), bytes=nbytes(sets[0]) * 4 / 3)
    return Candidate("dense", case.shape, call, sets, check, **work)


def _summed(case: AttentionCase, sets, stride: int, implementation) -> Candidate:
    tiling = dict(scale=case.scale, implementation=implementation)

    def call(qkv, state):
        q, k, v = qkv
        out, lse = dense_attention(q, k, v, **tiling)
        return (out, lse, column_sums(q, k, lse, group=case.group, stride=stride, **tiling)), state

    def check(qkv, output, *_):
        out, _, sums = output
        yield from case.check(qkv, out)
        for head, g, rows, (q, k) in case.slices(*qkv[:2]):
            sampled = [i for i in range(case.tokens)[rows] if i % stride == i // stride % stride]
            yield host(_index_row(sums, head, g)), references.column_mass(q[sampled], k, case.scale)

    variant = "with sums" if stride == 1 else f"with sums of 1/{stride} of the queries"
    lse, sums = 4 * case.heads * case.tokens, 2 * case.heads * group_count(case.tokens, case.group) * case.tokens
    work = dict(operations=(2 + 1 / stride) * case.product(case.tokens), bytes=nbytes(sets[0]) * 4 / 3 + lse + sums)
    return Candidate(variant, case.shape | {"group": case.group, "stride": stride}, call, sets, check, **work)


_index_row = jax.jit(lambda sums, head, g: sums[0, head, g])


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

    def check(inputs, out, *_):
        *qkv, columns, _, caches = inputs
        return case.check(qkv, out, columns, caches["residual"])

    lists_and_lse = 4 * (sets[0][3].indices[0].size + case.heads * case.tokens)
    touched = nbytes(arrays[0]) * (5 if with_residual else 4) / 3 + lists_and_lse
    work = dict(operations=2 * case.product(kept), bytes=touched)
    variant, shape = "residual" if with_residual else "plain", case.shape | {"K": kept, "group": case.group}
    return Candidate(variant, shape, call, sets, check, **work)


@partial(jax.jit, static_argnums=2)
def _lse(q, k, scale):
    """About the log-sum-exp of every query, f32 [1, H, N], as an earlier step would have left it: the mean over normal keys."""
    lengths = jnp.square(q.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
    return jnp.log(k.shape[1]) + scale**2 * lengths / 2

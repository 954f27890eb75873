"""The MLP over chosen neurons, as delta steps run it, against the dense one."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from chipmunk_jax.bench import draw, references, torch_baselines
from chipmunk_jax.bench.measure import Candidate
from chipmunk_jax.bench.references import host, some
from chipmunk_jax.bench.timing import input_sets
from chipmunk_jax.memory import nbytes
from pallas_kernels import Implementation, column_fc1, column_fc2, move_column_fc2
from pallas_kernels.dispatch import COMPILER_OPTIONS
from pallas_kernels.groups import group_count

LAYERS = 2  # of stacked arrays; the last one is used
LAST = LAYERS - 1


@dataclass(frozen=True)
class MlpCase:
    """One shape, and the numbers of neurons to keep."""

    rows: int  # M
    width: int  # D
    mlp_width: int  # F
    group: int
    kept: tuple[int, ...]

    @property
    def shape(self) -> dict[str, int]:
        return {"M": self.rows, "D": self.width, "F": self.mlp_width}

    def slices(self) -> list[tuple[int, slice]]:
        """(group, its rows) of what is checked."""
        groups = some(group_count(self.rows, self.group), 2)
        return [(g, slice(g * self.group, min(self.rows, (g + 1) * self.group))) for g in groups]


def mlp_candidates(case: MlpCase, most_sets: int, implementation: Implementation | None) -> list[Candidate]:
    """The dense MLP, PyTorch's where it is there, and both ways to cache it at every number of neurons."""
    keys = jax.random.split(jax.random.key(0), 5)
    # Sizes that keep every product near 1, where GELU bends.
    fc1 = draw.normal(keys[0], (LAYERS, case.mlp_width, case.width), scale=case.width**-0.5)
    b1 = draw.normal(keys[1], (LAYERS, case.mlp_width))
    fc2 = draw.normal(keys[2], (LAYERS, case.mlp_width, case.width), scale=case.mlp_width**-0.5)
    b2 = draw.normal(keys[3], (LAYERS, case.width), scale=0.1)
    # At least two, as the change of activations between equal inputs is zero, and zeros are cheap to multiply.
    tokens = input_sets(lambda key: draw.normal(key, (1, case.rows, case.width)), keys[4], least=2, most=most_sets)
    dense = _dense(case, tokens, fc1[LAST], b1[LAST], fc2[LAST], b2[LAST])
    candidates = [dense, *torch_baselines.mlp(dense)]
    for kept in case.kept:
        lists = draw.lists(jax.random.key(kept), (LAYERS, 1, group_count(case.rows, case.group)), kept, case.mlp_width)
        sets = [(x, fc1, b1, fc2, lists, jnp.int32(LAST)) for x in tokens]
        candidates += [_residual(case, sets, implementation), _activations(case, sets, implementation)]
    return candidates


def _dense(case: MlpCase, tokens, fc1, b1, fc2, b2) -> Candidate:
    def call(inputs, state):
        x, fc1, b1, fc2, b2 = inputs
        hidden = jax.nn.gelu(jnp.einsum("bmd,fd->bmf", x, fc1) + b1, approximate=True)
        return jnp.einsum("bmf,fd->bmd", hidden, fc2) + b2, state

    def expected(inputs, state):
        x, fc1, b1, fc2, b2 = map(host, inputs)
        return [references.activations(x[0, rows], fc1, b1) @ fc2 + b2 for _, rows in case.slices()]

    return Candidate(
        variant="dense", shape=case.shape, sparsity=0.0, call=call,
        sets=[(x, fc1, b1, fc2, b2) for x in tokens],
        expected=expected, observed=lambda out, state: _rows(case, out),
        operations=4 * case.rows * case.width * case.mlp_width,
        bytes=2 * nbytes(tokens[0]) + nbytes((fc1, b1, fc2, b2)),
        compiler_options=COMPILER_OPTIONS,
    )  # fmt: skip


def _residual(case: MlpCase, sets, implementation) -> Candidate:
    """Residual + the chosen neurons: the output of the other neurons is kept."""
    state = (draw.normal(jax.random.key(1), (LAYERS, *sets[0][0].shape), scale=0.5),)
    options = dict(group=case.group, implementation=implementation)

    def call(inputs, state):
        x, fc1, b1, fc2, columns, layer = inputs
        packed, _ = column_fc1(x, fc1, b1, columns, layer, **options)
        return column_fc2(packed, fc2, columns, layer, residual=state[0], **options), state

    def expected(inputs, state):
        base = host(state[0][LAST, 0])
        chosen = zip(case.slices(), _chosen(case, inputs), strict=True)
        return [base[rows] + new @ fc2 for (_, rows), (new, fc2, _) in chosen]

    return _candidate(case, "residual", call, sets, state, expected, lambda out, state: _rows(case, out))


def _activations(case: MlpCase, sets, implementation) -> Candidate:
    """Cached activations, all of them, moved together with the output."""
    shape, keys = sets[0][0].shape, jax.random.split(jax.random.key(2), 2)
    cached = jax.nn.gelu(draw.normal(keys[0], (LAYERS, 1, case.mlp_width, case.rows)))
    state = (cached, draw.normal(keys[1], (LAYERS, *shape), scale=0.5))
    options = dict(group=case.group, implementation=implementation)

    def call(inputs, state):
        x, fc1, b1, fc2, columns, layer = inputs
        cached, out = state
        packed, cached = column_fc1(x, fc1, b1, columns, layer, activations=cached, **options)
        moved, fresh = move_column_fc2(packed, fc2, columns, layer, out=out, **options)
        return fresh, (cached, moved)

    def expected(inputs, state):
        # After any number of calls with these lists: what the chosen neurons gave before goes, what the last input gives comes.
        cached, out = (host(x[LAST, 0]) for x in state)
        outs, news = [], []
        for (_, rows), (new, fc2, columns) in zip(case.slices(), _chosen(case, inputs), strict=True):
            outs.append(out[rows] + (new - cached[columns, rows].T) @ fc2)
            moved = cached[:, rows].copy()
            moved[columns] = new.T
            news.append(moved)
        return outs + news

    def observed(output, state):
        cached = host(state[0][LAST, 0])
        return [*_rows(case, output), *(cached[:, rows] for _, rows in case.slices())]

    return _candidate(case, "activations", call, sets, state, expected, observed)


def _candidate(case: MlpCase, variant: str, call, sets, state, expected, observed) -> Candidate:
    x, fc1, b1, fc2, columns, _ = sets[0]
    kept = columns.capacity
    moved = 4 * case.rows * kept if variant == "activations" else 0  # read and written
    return Candidate(
        variant=variant, shape=case.shape | {"K": kept, "group": case.group}, sparsity=1 - kept / case.mlp_width,
        call=call, sets=sets, state=state, expected=expected, observed=observed,
        operations=4 * case.rows * case.width * kept,
        # Groups with lists of their own need nearly all neurons between them. The array that the output is added to is read, too.
        bytes=3 * nbytes(x) + nbytes((fc1, b1, fc2, columns.indices)) / LAYERS + moved,
    )  # fmt: skip


def _chosen(case: MlpCase, inputs):
    """The activations of the neurons [r, K] of every group that is checked, their rows of fc2 [K, D], and their ids [K]."""
    x, *weights, columns, _ = inputs
    x, fc1, b1, fc2, lists = map(host, (x[0], *(a[LAST] for a in weights), columns.indices[LAST, 0]))
    for g, rows in case.slices():
        neurons = lists[g].astype(int)
        yield references.activations(x[rows], fc1[neurons], b1[neurons]), fc2[neurons], neurons


def _rows(case: MlpCase, out: jax.Array) -> list[np.ndarray]:
    """The rows of out [1, M, D] that are checked."""
    out = host(out[0])
    return [out[rows] for _, rows in case.slices()]

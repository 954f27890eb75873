"""The MLP over chosen neurons, as delta steps run it, against the dense one."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from chipmunk_jax.bench import draw, references, torch_baselines
from chipmunk_jax.bench.measure import Candidate
from chipmunk_jax.bench.references import host, some_groups
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

    def product(self, neurons: int) -> int:
        """Operations of one matrix product of all rows with a number of neurons."""
        return 2 * self.rows * self.width * neurons

    def checked(self):
        """(group, its rows) of what is checked."""
        return some_groups(self.rows, self.group, 2)

    def chosen(self, inputs):
        """The rows of every group that is checked, its neurons' activations [r, K] and rows of fc2 [K, D], and their ids [K]."""
        x, *weights, columns, _ = inputs
        x, fc1, b1, fc2, lists = map(host, (x[0], *(a[LAST] for a in weights), columns.indices[LAST, 0]))
        for g, rows in self.checked():
            neurons = lists[g].astype(int)
            yield rows, references.activations(x[rows], fc1[neurons], b1[neurons]), fc2[neurons], neurons


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
    last = [a[LAST] for a in (fc1, b1, fc2, b2)]
    dense = _dense(case, [(x, *last) for x in tokens])
    candidates = [dense, *torch_baselines.mlp(dense)]
    for kept in case.kept:
        lists = draw.lists(jax.random.key(kept), (LAYERS, 1, group_count(case.rows, case.group)), kept, case.mlp_width)
        sets = [(x, fc1, b1, fc2, lists, jnp.int32(LAST)) for x in tokens]
        candidates += [_residual(case, sets, implementation), _activations(case, sets, implementation)]
    return candidates


def _dense(case: MlpCase, sets) -> Candidate:
    def call(inputs, state):
        x, fc1, b1, fc2, b2 = inputs
        hidden = jax.nn.gelu(jnp.einsum("bmd,fd->bmf", x, fc1) + b1, approximate=True)
        return jnp.einsum("bmf,fd->bmd", hidden, fc2) + b2, state

    def check(inputs, out, *_):
        x, fc1, b1, fc2, b2, found = map(host, (*inputs, out))
        for _, rows in case.checked():
            yield found[0, rows], references.activations(x[0, rows], fc1, b1) @ fc2 + b2

    work = dict(operations=2 * case.product(case.mlp_width), bytes=nbytes(sets[0]) + nbytes(sets[0][0]))
    return Candidate("dense", case.shape, call, sets, check, **work, compiler_options=COMPILER_OPTIONS)


def _residual(case: MlpCase, sets, implementation) -> Candidate:
    """Residual + the chosen neurons: the output of the other neurons is kept."""
    state = (draw.normal(jax.random.key(1), (LAYERS, *sets[0][0].shape), scale=0.5),)
    options = dict(group=case.group, implementation=implementation)

    def call(inputs, state):
        x, fc1, b1, fc2, columns, layer = inputs
        packed, _ = column_fc1(x, fc1, b1, columns, layer, **options)
        return column_fc2(packed, fc2, columns, layer, residual=state[0], **options), state

    def check(inputs, out, before, _):
        found, base = host(out[0]), host(before[0][LAST, 0])
        for rows, new, fc2, _ in case.chosen(inputs):
            yield found[rows], base[rows] + new @ fc2

    return _sparse(case, "residual", call, sets, state, check)


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

    def check(inputs, output, before, after):
        # After any number of calls with these lists: what the chosen neurons gave before goes, what the last input gives comes.
        cached, out, moved = (host(x[LAST, 0]) for x in (*before, after[0]))
        found = host(output[0])
        for rows, new, fc2, neurons in case.chosen(inputs):
            yield found[rows], out[rows] + (new - cached[neurons, rows].T) @ fc2
            cached[neurons, rows] = new.T
            yield moved[:, rows], cached[:, rows]

    return _sparse(case, "activations", call, sets, state, check, 4 * case.rows)


def _sparse(case: MlpCase, variant: str, call, sets, state, check, bytes_a_neuron: int = 0) -> Candidate:
    x, fc1, b1, fc2, columns, _ = sets[0]
    kept = columns.capacity
    shape = case.shape | {"K": kept, "group": case.group}
    # Groups with lists of their own need nearly all neurons between them. The array that the output is added to is read, too.
    touched = 3 * nbytes(x) + nbytes((fc1, b1, fc2, columns.indices)) / LAYERS + bytes_a_neuron * kept
    work = dict(operations=2 * case.product(kept), bytes=touched)
    return Candidate(variant, shape, call, sets, check, state=state, **work)

"""The algorithm against a naive one in NumPy, one head, group and column at a time, over a schedule of drifting inputs.

Tolerances: both sides compute in float32 and float64 from the same float32 inputs; differences of sums of some hundred terms of
order 1 stay below 2e-5.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chipmunk_jax import cache as caches
from chipmunk_jax import delta
from chipmunk_jax.delta import MlpWeights, attend, feed_forward
from chipmunk_jax.model import Stack
from chipmunk_jax.pinned_keys import pinned_keys
from chipmunk_jax.schedule import AttentionPhase, MlpPhase, plan_steps
from chipmunk_jax.sparsity import AttentionSparsity, MlpSparsity, Sparsity
from pallas_kernels import Scaled, columns

B, N, H, D, F, L = 2, 150, 2, 16, 200, 3
GROUP, LAYER, STEPS = 64, 1, 12
STACK = Stack(layers=L, tokens=N, heads=H, head_dim=D, mlp_tokens=N, width=D, mlp_width=F)
ATTENTION = AttentionSparsity(top_keys=0.3, first_n_dense_layers=0, full_step_every=4, group=GROUP)
MLP = MlpSparsity(top_keys=0.3, random_keys=0.0, first_n_dense_layers=0, full_step_every=5, group=GROUP)


def drifting(*shape, seed=0):
    """One array a step, each a little off the last."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    for _ in range(STEPS):
        yield jnp.asarray(x, jnp.float32)
        x = x + 0.1 * rng.standard_normal(shape)


def start(sparsity, pinned=None, sides=1):
    """An empty cache and the plan of a stack's one layer in the middle."""
    cache = caches.zeros({"stack": STACK}, sparsity, B, jnp.float32)["stack"]
    table = plan_steps(sparsity, STEPS, tokens=N, mlp_width=F, pinned=pinned)
    table = table.replace(key=jax.random.key(0), sides=sides)
    return cache, lambda i: table.at_step(i).at_layer(LAYER, LAYER)


def naive_softmax(logits, times=1):
    """With columns that count so many times."""
    weights = times * np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def naive_top(scores, k):
    return np.sort(np.argsort(-scores, kind="stable")[:k])


class NaiveAttention:
    """Chipmunk, section 3, head by head and group by group."""

    def __init__(self, config, pinned=None, valid=(N, N), sides=1):
        self.config, self.keep, self.valid, self.sides = config, config.kept(N), valid, sides
        self.pinned = pinned or [[] for _ in range(0, N, GROUP)]  # of every group
        self.columns, self.residual, self.lse = {}, {}, {}

    def __call__(self, phase, q, k, v):
        out = np.zeros_like(q)
        for b, h in np.ndindex(B, H):
            logits = q[b, :, h] @ k[b, :, h].T * D**-0.5
            logits[:, self.valid[b] :] = -np.inf
            dense = naive_softmax(logits) @ v[b, :, h]
            lse = np.log(np.exp(logits).sum(-1))
            for g, first in enumerate(range(0, N, GROUP)):
                rows, at = slice(first, min(first + GROUP, N)), (b, h, g)
                if phase == AttentionPhase.SELECT:
                    there = min(self.valid[b], rows.stop) - first
                    mass = np.exp(logits[rows] - self.lse[b, h][rows, None])[:there].sum(0)
                    always = [j for j in self.pinned[g] if j < self.valid[b]]
                    free = np.setdiff1d(np.arange(self.valid[b]), always)
                    self.columns[at] = np.sort([*always, *free[naive_top(mass[free], self.keep)]]).astype(int)
                    if b >= B // self.sides:
                        self.columns[at] = self.columns[b - B // self.sides, h, g]
                out[b, rows, h] = dense[rows]
                if phase >= AttentionPhase.SELECT:
                    keys, values, times = self.chosen_and_means(at, k[b, :, h], v[b, :, h])
                    sparse = naive_softmax(q[b, rows, h] @ keys.T * D**-0.5, times) @ values
                    if phase == AttentionPhase.DELTA:
                        out[b, rows, h] = sparse + (self.residual[at] if self.config.residual_bits else 0)
                    else:
                        self.residual[at] = dense[rows] - sparse
            if phase in (AttentionPhase.MEASURE, AttentionPhase.SELECT):
                self.lse[b, h] = lse
        return out

    def chosen_and_means(self, at, k, v):
        """Keys, values and how often each counts: the chosen ones, once, and means of blocks, as often as they stand for a key."""
        chosen, block = self.columns[at], self.config.block_means
        starts = range(0, self.valid[at[0]], block) if block else ()
        blocks = [np.arange(start, min(start + block, self.valid[at[0]])) for start in starts]
        mean = lambda x: np.concatenate([x[chosen], *(x[keys].mean(0, keepdims=True) for keys in blocks)])
        return mean(k), mean(v), np.array([1] * len(chosen) + [len(np.setdiff1d(keys, chosen)) for keys in blocks])


@pytest.mark.parametrize(
    ("recompute_mask", "block", "bits", "sides"), [(False, 64, 16, 1), (True, 0, 16, 2), (True, 128, 0, 1)]
)
def test_attention_equals_a_naive_one_through_every_phase(recompute_mask, block, bits, sides):
    changes = {"recompute_mask": recompute_mask, "block_means": block, "residual_bits": bits}
    config = AttentionSparsity(**(vars(ATTENTION) | changes))
    cache, step = start(Sparsity(attention=config, mlp=None), sides=sides)
    naive, run = NaiveAttention(config, sides=sides), jax.jit(attend)
    seen = set()
    for i, (q, k, v) in enumerate(zip(*(drifting(B, N, H, D, seed=s) for s in range(3)), strict=True)):
        phase = int(step(i).attention.phase)
        out, cache = run(q, k, v, cache, step(i))
        expected = naive(phase, *(np.asarray(x, np.float64) for x in (q, k, v)))
        np.testing.assert_allclose(out, expected, atol=2e-5)
        seen.add(phase)
    assert seen == {1, 2, 4} | (set() if recompute_mask else {3})
    assert not np.asarray(cache.attention.lse[0]).any()  # other layers' entries are untouched


@pytest.mark.parametrize("portions", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_pinned_keys_and_padding_through_every_phase(packed, portions, monkeypatch):
    """Text at the end, of which one of the batch has less; a window along the order; queries of the text see all."""
    if portions > 1:
        monkeypatch.setattr(delta, "SCORES", 1)
        assert delta.head_portions(B, H, 3, N, jnp.float32) == H == portions
    if packed:
        monkeypatch.setattr(caches, "PACKED_LENGTHS", range(N, N + 1))
        monkeypatch.setattr(columns, "WRAP", 128)
    valid = np.array([N, N - 13])
    config = AttentionSparsity(
        **vars(ATTENTION)
        | dict(recompute_mask=True, text_keys=True, text_queries=True, local_1d_window=0.02)
        | dict(block_means=64 if packed else 0)
    )
    pinned = pinned_keys(config, (N - 20,), (), (N - 20, N))
    lists = [pinned.ids[a:b] for a, b in itertools.pairwise(pinned.starts)]
    assert len(lists) == 3 and len(lists[0]) < 90 and len(lists[2]) == N
    cache, step = start(Sparsity(attention=config, mlp=None), pinned)
    assert (cache.attention.columns.wrap is not None) == packed
    naive, run = NaiveAttention(config, lists, valid), jax.jit(attend)
    rows = np.arange(N) < valid[:, None]
    for i, (q, k, v) in enumerate(zip(*(drifting(B, N, H, D, seed=s) for s in range(3)), strict=True)):
        expected = naive(int(step(i).attention.phase), *(np.asarray(x, np.float64) for x in (q, k, v)))
        poisoned = (
            jnp.where(rows[..., None, None], x, poison)
            for x, poison in zip((q, k, v), (1e3, jnp.nan, jnp.nan), strict=True)
        )
        out, cache = run(*poisoned, cache, step(i), jnp.asarray(valid))
        np.testing.assert_allclose(np.asarray(out)[rows], expected[rows], atol=2e-5)
    assert np.isfinite(cache.attention.residual).all()


def test_a_residual_of_8_bits_rounds_and_no_more():
    """Three bits of mantissa: a residual of order 1/10 is off by a hundredth at most, and no error adds up."""
    outputs = []
    for bits in (16, 8):
        config = AttentionSparsity(**vars(ATTENTION) | dict(residual_bits=bits))
        cache, step = start(Sparsity(attention=config, mlp=None))
        assert isinstance(cache.attention.residual, Scaled) == (bits == 8)
        run, outs = jax.jit(attend), []
        for i, arrays in enumerate(zip(*(drifting(B, N, H, D, seed=s) for s in range(3)), strict=True)):
            out, cache = run(*arrays, cache, step(i))
            outs.append(np.asarray(out))
        outputs.append(np.stack(outs))
    phases = np.asarray(
        plan_steps(Sparsity(attention=ATTENTION, mlp=None), STEPS, tokens=N, mlp_width=F).attention.phase
    )
    error = np.abs(outputs[0] - outputs[1]).max((1, 2, 3, 4))
    assert not error[phases != AttentionPhase.DELTA].any()
    assert (error[phases == AttentionPhase.DELTA] > 0).all() and error.max() < 0.04


def test_all_keys_are_kept_once_however_many_are_pinned():
    config = AttentionSparsity(**vars(ATTENTION) | dict(top_keys=1.0, text_keys=True, local_1d_window=0.5))
    pinned = pinned_keys(config, (N - 20,), (), (N - 20, N))
    cache, step = start(Sparsity(attention=config, mlp=None), pinned)
    q, k, v = (next(drifting(B, N, H, D, seed=s)) for s in range(3))
    valid = jnp.array([N, N - 13])
    dense, _ = attend(q, k, v, None, step(0), valid)
    for i in range(STEPS):
        out, cache = attend(q, k, v, cache, step(i), valid)
        np.testing.assert_allclose(out, dense, atol=2e-5)
    free = N - np.diff(pinned.starts)  # the padding is among the text, which is pinned
    np.testing.assert_array_equal(cache.attention.columns.counts[LAYER], np.broadcast_to(free, (B, H, 3)))


def test_fixed_random_keys_are_those_of_the_whole_sample():
    fixed = AttentionSparsity(**vars(ATTENTION) | dict(top_keys=0.01, fixed_random_keys=0.4, recompute_mask=True))
    cache, step = start(Sparsity(attention=fixed, mlp=None))
    lists = []
    for i, (q, k, v) in enumerate(zip(*(drifting(B, N, H, D, seed=s) for s in range(3)), strict=True)):
        _, cache = attend(q, k, v, cache, step(i).replace(sample_key=jax.random.key(7)))
        lists.append(np.asarray(cache.attention.columns.indices[LAYER]))
    drawn = np.asarray(jax.random.bernoulli(jax.random.key(7), 0.4, (3, N)))
    for b, h, g in np.ndindex(B, H, 3):
        for i in (1, 4, 8):
            keep = lists[i][b, h, g]
            assert set(np.flatnonzero(drawn[g])[: len(keep)]) <= set(keep)


def naive_gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


class NaiveMlp:
    """The incremental form (activations) and the residual form, group by group."""

    def __init__(self, config, weights):
        self.config, self.keep = config, config.kept(F)
        self.fc1, self.b1, self.fc2, self.b2 = weights
        self.columns, self.state = {}, {}

    def __call__(self, phase, x):
        out = np.zeros_like(x)
        for b in range(B):
            for g, first in enumerate(range(0, N, GROUP)):
                rows, at = slice(first, min(first + GROUP, N)), (b, g)
                form = self.moved if self.config.cache == "activations" else self.fixed
                out[b, rows] = form(phase, x[b, rows], at)
        return out

    def moved(self, phase, x, at):
        hidden = x @ self.fc1.T + self.b1
        activations, mean = naive_gelu(hidden), hidden.mean(0)
        if phase == MlpPhase.FULL:
            self.state[at] = [activations, activations @ self.fc2 + self.b2, mean]
            return self.state[at][1]
        cached, out, old_mean = self.state[at]
        if phase == MlpPhase.SELECT_DELTA:
            self.columns[at] = naive_top(np.abs(mean - old_mean), self.keep)
            old_mean[self.columns[at]] = mean[self.columns[at]]
        chosen = self.columns[at]
        out = out + (activations[:, chosen] - cached[:, chosen]) @ self.fc2[chosen]
        cached[:, chosen] = activations[:, chosen]
        self.state[at] = [cached, out, old_mean]
        return out

    def fixed(self, phase, x, at):
        activations = naive_gelu(x @ self.fc1.T + self.b1)
        if phase == MlpPhase.FULL:
            score = np.abs(activations).mean(0) * np.linalg.norm(self.fc2, axis=-1)
            self.columns[at] = naive_top(score, self.keep)
            dense = activations @ self.fc2 + self.b2
            self.state[at] = dense - activations[:, self.columns[at]] @ self.fc2[self.columns[at]]
            return dense
        chosen = self.columns[at]
        return self.state[at] + activations[:, chosen] @ self.fc2[chosen]


def draw_mlp():
    rng = np.random.default_rng(9)
    shapes = {"fc1": (L, F, D), "b1": (L, F), "fc2": (L, F, D), "b2": (L, D)}
    scale = {"fc1": D**-0.5, "fc2": F**-0.5}
    arrays = {n: jnp.asarray(scale.get(n, 0.1) * rng.standard_normal(s), jnp.float32) for n, s in shapes.items()}
    return MlpWeights(**arrays)


@pytest.mark.parametrize("kind", ["activations", "residual"])
def test_mlp_equals_a_naive_one_through_every_phase(kind):
    config = MlpSparsity(**(vars(MLP) | {"cache": kind}))
    weights = draw_mlp()
    cache, step = start(Sparsity(attention=None, mlp=config))
    naive = NaiveMlp(config, [np.asarray(w[LAYER], np.float64) for w in weights])
    run, seen = jax.jit(feed_forward), set()
    for i, x in enumerate(drifting(B, N, D)):
        phase = int(step(i).mlp.phase)
        out, cache = run(x, weights, cache, step(i))
        np.testing.assert_allclose(out, naive(phase, np.asarray(x, np.float64)), atol=2e-5)
        seen.add(phase)
    assert seen == ({1, 2, 3} if kind == "activations" else {1, 3})


def everything(**changes):
    """A sparsity that keeps all columns."""
    return Sparsity(
        attention=AttentionSparsity(top_keys=1.0, first_n_dense_layers=0, group=GROUP),
        mlp=MlpSparsity(top_keys=1.0, random_keys=0.0, first_n_dense_layers=0, group=GROUP, **changes),
    )


@pytest.mark.parametrize("kind", ["activations", "residual"])
def test_all_columns_kept_equals_dense(kind):
    cache, step = start(everything(cache=kind))
    weights = draw_mlp()
    for i, (q, k, v, x) in enumerate(
        zip(*(drifting(B, N, H, D, seed=s) for s in range(3)), drifting(B, N, D), strict=True)
    ):
        out, cache = attend(q, k, v, cache, step(i))
        np.testing.assert_allclose(out, attend(q, k, v, None, step(i))[0], atol=2e-5)
        out, cache = feed_forward(x, weights, cache, step(i))
        np.testing.assert_allclose(out, feed_forward(x, weights, None, step(i))[0], atol=2e-5)


@pytest.mark.parametrize("kind", ["activations", "residual"])
def test_unchanged_input_gives_unchanged_output(kind):
    sparsity = Sparsity(attention=ATTENTION, mlp=MlpSparsity(**(vars(MLP) | {"cache": kind})))
    cache, step = start(sparsity)
    weights = draw_mlp()
    q, k, v = (next(drifting(B, N, H, D, seed=s)) for s in range(3))
    x = next(drifting(B, N, D))
    dense_out, dense_mlp = attend(q, k, v, None, step(0))[0], feed_forward(x, weights, None, step(0))[0]
    for i in range(STEPS):
        out, cache = attend(q, k, v, cache, step(i))
        np.testing.assert_allclose(out, dense_out, atol=2e-5)
        out, cache = feed_forward(x, weights, cache, step(i))
        np.testing.assert_allclose(out, dense_mlp, atol=2e-5)


def test_traced_phases_equal_static_phases():
    sparsity = Sparsity(attention=ATTENTION, mlp=MLP)
    weights = draw_mlp()

    def one_step(q, k, v, x, cache, step):
        out, cache = attend(q, k, v, cache, step)
        y, cache = feed_forward(x, weights, cache, step)
        return (out, y), cache

    traced = jax.jit(one_step)
    results = []
    for static in (False, True):
        cache, step = start(sparsity)
        outputs = []
        inputs = zip(*(drifting(B, N, H, D, seed=s) for s in range(3)), drifting(B, N, D), strict=True)
        for i, arrays in enumerate(inputs):
            if static:  # the phase is a constant of the program: a program a step
                run = jax.jit(partial(one_step, step=step(i)))
                out, cache = run(*arrays, cache)
            else:
                out, cache = traced(*arrays, cache, step(i))
            outputs += out
        results.append(outputs)
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_random_columns_come_from_the_key_and_are_kept_whatever_their_score():
    config = AttentionSparsity(top_keys=0.1, random_keys=0.5, first_n_dense_layers=0, group=GROUP)
    lists = []
    for seed in (0, 0, 1):
        cache, step = start(Sparsity(attention=config, mlp=None))
        q, k, v = (next(drifting(B, N, H, D, seed=s)) for s in range(3))
        for i in range(2):
            _, cache = attend(q, k, v, cache, step(i).replace(key=jax.random.fold_in(jax.random.key(seed), i)))
        lists.append(np.asarray(cache.attention.columns.indices[LAYER]))
    np.testing.assert_array_equal(lists[0], lists[1])
    assert (lists[0] != lists[2]).any()
    assert (np.diff(lists[0], axis=-1) > 0).all()  # ascending and distinct

"""Skipped steps: what gates decide by while a sample runs, and what steps that run keep for those that do not.

Which steps a list, a share or MagCache's ratios skip is known before, see fit(). A gate that decides in the scan sums an estimate
of how far the network's output has moved since the last step that ran, on the prompt's side of guidance, and skips below a
threshold:

    tea    p(rho(m, m of the step before)), m the model's tea_signal(), p a polynomial    TeaCache, arXiv 2411.19108
    sea    rho(w, w of the step before), w the model's signal(), filtered by _wiener()     SeaCache, arXiv 2602.18993
    easy   k mean|x - x of the step before| / mean|v|, where k = mean|change of v| / mean|change of x| and v is the
           velocity, between the last two steps that ran                                   EasyCache

    rho(a, b) = mean|a - b| / mean|b|
"""

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from chipmunk_jax.errors import InputError
from chipmunk_jax.model import Model, Stack
from chipmunk_jax.sparsity import PLANNED_GATES, Gate, Predict, Sparsity, StepCache

THRESHOLDS = {"sea": 0.25, "easy": 0.05}  # published for gates without constants of a model
SIGNALS = {"tea": "tea_signal", "sea": "signal"}  # the method of a model that a gate calls


@struct.dataclass
class Caching:
    """A StepCache as the scan takes it. Numbers are data; the gate, the prediction and its order are structure."""

    threshold: jax.Array  # f32
    most: jax.Array  # i32, skips in a row
    coefficients: jax.Array | None  # f32, of the polynomial, highest power first
    gate: Gate = struct.field(pytree_node=False)
    predict: Predict = struct.field(pytree_node=False)
    order: int = struct.field(pytree_node=False)
    grid: tuple[int, ...] = struct.field(pytree_node=False)  # of the tokens in raster order

    @property
    def decides(self) -> bool:
        """Whether the gate decides while the sample runs."""
        return self.gate not in PLANNED_GATES


@struct.dataclass
class Kept:
    """What the last steps that ran leave to those that are skipped: hidden tokens, what blocks added, or a velocity."""

    last: jax.Array  # [B, N, ..], of the last step that ran
    slope: jax.Array | None  # its change over time between the last two, 0 before there are two; None: order 0
    time: jax.Array  # f32, of the last step that ran

    def at(self, t: jax.Array) -> jax.Array:
        """What it would be at a time; at its own, the last bit for bit."""
        if self.slope is None:
            return self.last
        return (self.last.astype(jnp.float32) + (t - self.time) * self.slope).astype(self.last.dtype)

    def after(self, value: jax.Array, t: jax.Array) -> "Kept":
        """With a step that ran at a time, later in the sample."""
        if self.slope is None:
            return Kept(value, None, t)
        change = value.astype(jnp.float32) - self.last
        return Kept(value, (change / (t - self.time)).astype(self.slope.dtype), t)


@struct.dataclass
class GateState:
    """What a gate that decides carries from step to step."""

    total: jax.Array  # f32, estimated change since the last step that ran
    row: jax.Array  # i32, steps skipped since then
    signal: jax.Array  # of the step before: what the model's method gives, filtered; of "easy" x, f32 [B, N, C]
    # Of "easy" alone: x and the velocity of the last step that ran, and the ratio of their changes, infinite before there are two.
    ran_x: jax.Array | None = None
    ran_velocity: jax.Array | None = None
    ratio: jax.Array | None = None


def caching_of(config: StepCache, grid: tuple[int, ...]) -> Caching:
    """A fitted StepCache for the scan over tokens of a grid.

    Raises:
        InputError: a gate without its threshold or its coefficients.
    """
    if config.gate == "tea" and config.coefficients is None:
        raise InputError("gate='tea': expected coefficients, those of a polynomial, and a threshold with them")
    threshold = THRESHOLDS.get(config.gate, 0.0) if config.threshold is None else config.threshold
    polynomial = np.float32(config.coefficients) if config.gate == "tea" else None
    structure = dict(gate=config.gate, predict=config.predict, order=config.order, grid=tuple(map(int, grid)))
    return Caching(np.float32(threshold), np.int32(config.max_skips), polynomial, **structure)


def check_caching(config: StepCache, model: Model) -> None:
    """Raises InputError where a gate needs what the model has not."""
    method = SIGNALS.get(config.gate)
    if method and not hasattr(model, method):
        raise InputError(
            f"gate={config.gate!r}: {type(model).__name__} has no {method}(); expected one of list, share, easy"
        )


def with_constants(sparsity: Sparsity, model: str) -> Sparsity:
    """The Sparsity with the threshold and the coefficients that were published for its gate, where it has none.

    Args:
        sparsity: any.
        model: a name of VARIANTS.

    Raises:
        InputError: a gate without constants for this model; it names those that have some.
    """
    config = sparsity.step_cache
    if config is None or config.gate not in ("mag", "tea") or (config.coefficients and config.threshold is not None):
        return sparsity
    known = constants()[config.gate]
    if model not in known:
        raise InputError(
            f"gate={config.gate!r}: no constants for {model}, only for {', '.join(known)}; expected coefficients and a "
            f"threshold, or one of the gates list, share, sea, easy"
        )
    threshold = known[model]["threshold"] if config.threshold is None else config.threshold
    coefficients = config.coefficients or tuple(known[model]["coefficients"])
    return replace(sparsity, step_cache=replace(config, threshold=threshold, coefficients=coefficients))


@functools.cache
def constants() -> dict[str, Any]:
    """Gate -> model -> threshold and coefficients, of step_cache.json, which names their sources."""
    return json.loads((files("chipmunk_jax") / "step_cache.json").read_text())


def start_kept(caching: Caching, model: Model, stacks: dict[str, Stack], x: jax.Array, entries: int) -> Kept:
    """Before any step ran; the first one must.

    Args:
        caching: of caching_of().
        model: the network.
        stacks: its stacks.
        x: [B, N, C].
        entries: whose hidden tokens are kept, with guidance those of both sides or, where steps are one-sided, of the prompt's.
    """
    width = next(iter(stacks.values())).width
    velocity = caching.predict == "velocity"
    last = jnp.zeros(x.shape, jnp.float32) if velocity else jnp.zeros((entries, x.shape[1], width), model.dtype)
    # No step was at an infinite time: the first slope is 0.
    return Kept(last, jnp.zeros_like(last) if caching.order else None, jnp.float32(jnp.inf))


def start_gate(caching: Caching, x: jax.Array, signal: Callable[[], jax.Array]) -> GateState | None:
    """Before any step; signal() has the shape of what the gate sees. None: all is decided already."""
    if not caching.decides:
        return None
    nothing = dict(total=jnp.float32(0), row=jnp.int32(0))
    zeros = jnp.zeros(x.shape, jnp.float32)
    if caching.gate == "easy":
        return GateState(**nothing, signal=zeros, ran_x=zeros, ran_velocity=zeros, ratio=jnp.float32(jnp.inf))
    shape = jax.eval_shape(signal)
    return GateState(**nothing, signal=jnp.zeros(shape.shape, shape.dtype))


def decide(caching: Caching, gate: GateState, allowed: jax.Array, signal: jax.Array) -> tuple[jax.Array, GateState]:
    """Whether this step is skipped, bool, and the state with it; signal as of GateState."""
    if caching.gate == "easy":
        moved, speed = jnp.abs(signal - gate.signal).mean(), jnp.abs(gate.ran_velocity).mean()
        change = gate.ratio * moved / speed
    else:
        change = relative_change(signal, gate.signal)
    if caching.gate == "tea":
        change = jnp.polyval(caching.coefficients, change)
    total = gate.total + change
    skip = allowed & (total < caching.threshold) & (caching.threshold > 0) & (gate.row < caching.most)
    return skip, gate.replace(total=jnp.where(skip, total, 0), row=jnp.where(skip, gate.row + 1, 0), signal=signal)


def ran(gate: GateState, x: jax.Array, velocity: jax.Array) -> GateState:
    """The state of the gate "easy" after a step that ran; the prompt's side of x and of the velocity, f32 [B, N, C]."""
    ratio = jnp.abs(velocity - gate.ran_velocity).mean() / jnp.abs(x - gate.ran_x).mean()
    two = jnp.any(gate.ran_velocity != 0)
    return gate.replace(ran_x=x, ran_velocity=velocity, ratio=jnp.where(two, ratio, jnp.inf))


def filtered(caching: Caching, signal: jax.Array, back: jax.Array, t: jax.Array) -> jax.Array:
    """The signal of the gate "sea" at time t: tokens [B, N, D] in the order of which `back` is the inverse, by _wiener()."""
    grid = signal[:, back].reshape(len(signal), *caching.grid, -1).astype(jnp.float32)
    axes = tuple(range(1, 1 + len(caching.grid)))
    gain = _wiener(caching.grid, t)[..., None]
    return jnp.fft.ifftn(jnp.fft.fftn(grid, axes=axes) * gain, axes=axes).real.reshape(signal.shape)


def _wiener(grid: tuple[int, ...], t: jax.Array) -> jax.Array:
    """The Wiener filter of noise t for the grid's frequencies, divided by its mean, in which its factors 1 - t cancel.

    A product over the axes of (1 - t) S / ((1 - t)^2 S + t^2), with S = |f|^-3 as in natural images.
    """
    gain = jnp.ones(())
    for side in grid:
        f = np.abs(np.fft.fftfreq(side))
        power = np.float32(np.maximum(f, 1 / side) ** -3.0)  # the mean as the lowest frequency, which is finite
        gain = gain[..., None] * (power / ((1 - t) ** 2 * power + t**2))
    return gain / gain.mean()


def relative_change(a: jax.Array, b: jax.Array) -> jax.Array:
    """mean|a - b| / mean|b|, f32."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.abs(a - b).mean() / jnp.abs(b).mean()


def unless_skipped(skip: jax.Array | None, run: Callable, *kept: Any) -> tuple[Any, ...]:
    """Returns run(*kept), what this step makes of what was kept, or where that is skipped what was kept, unchanged.

    Args:
        skip: bool, whether it does not run in this step; None: it runs in every step.
        run: runs the blocks.
        kept: pytrees of arrays.
    """
    if skip is None:
        return run(*kept)
    # A loop of one turn or none: a conditional would make XLA copy every cache.
    return lax.fori_loop(0, 1 - skip.astype(jnp.int32), lambda _, kept: run(*kept), kept)

"""The arguments of sample(), checked on the host before anything is compiled."""

import math
import numbers
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from chipmunk_jax import memory
from chipmunk_jax.errors import InputError
from chipmunk_jax.finite import finite
from chipmunk_jax.fit import fit
from chipmunk_jax.model import LARGEST_GUIDANCE, Condition, Model
from chipmunk_jax.pinned_keys import check_grid
from chipmunk_jax.solvers import Solver
from chipmunk_jax.sparsity import Sparsity
from pallas_kernels import Implementation


def placed(
    model: Model, noise: jax.Array, cond: Condition, uncond: Condition | None
) -> tuple[jax.Array, Condition, Condition | None]:
    """Noise and conditions on the device, float64 cast to f32.

    Raises:
        InputError: one is no array of finite numbers, or has no numbers yet, as within a transformation of JAX.
    """
    for name, given in (("cond", cond), ("uncond", {} if uncond is None else uncond)):
        if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
            raise InputError(f"{name} {type(given).__name__}: expected the conditions by name, a dict of arrays")
    # An array made here is a tracer within jit, whatever is given.
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((model, noise, cond, uncond, jnp.zeros(())))):
        raise InputError(
            "sample() under jit, grad, vmap or the like: use start() and denoise() of chipmunk_jax.sampling, which are pure"
        )
    if isinstance(model, type) or not hasattr(model, "hidden") or not all(map(_is_array, jax.tree.leaves(model))):
        raise InputError(f"model {type(model).__name__}: expected a network with its weights, as load() gives")
    every = lambda given: given and {name: _placed(f"condition {name}", x, "fbiu") for name, x in given.items()}
    return _placed("noise", noise, "f"), every(cond), every(uncond)


def _placed(name: str, x: jax.Array, kinds: str) -> jax.Array:
    if not _is_array(x):
        raise InputError(f"{name} {type(x).__name__}: expected an array of JAX or NumPy, and none that is deleted")
    # NumPy's kind of bf16 is V, and a key of jax.random has none.
    kind = "f" if jnp.issubdtype(x.dtype, jnp.floating) else getattr(x.dtype, "kind", "")
    if kind not in kinds:
        raise InputError(f"{name} of {x.dtype}: expected {'floats' if kinds == 'f' else 'real numbers'}")
    if not x.dtype.isnative:  # JAX takes none of the other byte order
        x = x.astype(x.dtype.newbyteorder("="))
    if kind == "f" and x.dtype.itemsize > 4:
        with np.errstate(over="ignore"):  # becomes infinite, which is refused below
            x = x.astype(np.float32)
    if kind == "f" and not finite(np.asarray(x)):
        raise InputError(f"{name}: holds NaN or infinity, expected finite numbers")
    return jax.device_put(x)


def _is_array(x: Any) -> bool:
    if isinstance(x, jax.Array):
        return not x.is_deleted()  # as one that was donated is
    return isinstance(x, np.ndarray) and not isinstance(x, np.ma.MaskedArray)


def check(
    model: Model,
    noise: jax.Array,
    cond: Condition,
    *,
    timesteps: np.ndarray,
    grid: tuple[int, ...],
    sparsity: Sparsity | None,
    guidance: float | None,
    uncond: Condition | None,
    seed: int,
    solver: Solver | None,
    implementation: Implementation | None,
    at_once: int | None = None,
) -> Sparsity | None:
    """The sparsity as fit() makes it of arguments of sample(), arrays as of placed(); at_once as of memory.plan().

    Raises:
        InputError: arguments that do not fit together, or no room.
    """
    fixed = dict(guidance=guidance, solver=solver, implementation=implementation)
    steps = len(parse_timesteps(timesteps)) - 1
    check_settings(noise, grid, sparsity=sparsity, seed=seed, **fixed)
    if guidance is None and uncond is not None:
        raise InputError("uncond without guidance: expected both, or neither")
    model.check(noise, cond)
    if uncond is not None:
        model.check(noise, uncond)
        for name, x in uncond.items():
            if x.shape != cond[name].shape:
                raise InputError(
                    f"uncond: condition {name} {x.shape}, expected {cond[name].shape}, as of cond: one batch holds both"
                )
    fitted = sparsity and fit(sparsity, steps, guided=guidance is not None)
    memory.check_room(model, noise, cond, placed=True, sparsity=fitted, steps=steps, at_once=at_once, **fixed)
    return fitted


def check_settings(noise, grid, *, sparsity, guidance, seed, solver, implementation) -> None:
    """Raises InputError where an argument of plan() is wrong in itself, or does not fit the shape of the noise."""
    shape, sides = getattr(noise, "shape", ()), tuple(grid) if isinstance(grid, (tuple, list)) else ()
    positive = sides and all(is_whole(side) and side > 0 for side in sides)
    if len(shape) != 3 or not shape[0] or not positive or math.prod(sides) != shape[1]:
        raise InputError(f"noise {shape}, grid {grid!r}: expected [B, N, C] with N the product of the grid")
    check_guidance(guidance)
    check_seed(seed)
    if solver is not None and (isinstance(solver, type) or not hasattr(solver, "step")):
        raise InputError(f"solver={solver!r}: expected one such as Euler() or UniPC(), or None")
    check_implementation(implementation)
    if sparsity is not None:
        check_grid(sparsity, grid)


def check_seed(seed: int, samples: int = 1) -> None:
    """Raises InputError unless this many samples can have seeds of their own from this one on; JAX takes seeds modulo 2^32."""
    last = 2**32 - samples
    if not is_whole(seed) or not 0 <= seed <= last:
        raise InputError(f"seed={seed!r}: expected a whole number from 0 to {last}")


def check_implementation(implementation: Implementation | None) -> None:
    """Raises InputError unless it is None or one that the kernels have."""
    known = get_args(Implementation)
    if implementation not in (None, *known):
        raise InputError(f"implementation={implementation!r}: expected None or one of {', '.join(known)}")


def check_guidance(guidance: float | None, name: str = "guidance") -> None:
    """Raises InputError, which names it, unless the scale of guidance is None or a number that makes sense."""
    number = isinstance(guidance, numbers.Real) and not isinstance(guidance, (bool, np.bool_))
    if guidance is not None and not (number and abs(guidance) <= LARGEST_GUIDANCE):
        raise InputError(f"{name}={guidance!r}: expected a number, the plain scale, up to {LARGEST_GUIDANCE:g}")


def parse_timesteps(given: Any) -> np.ndarray:
    """The times of a sample, f32 [steps + 1].

    Raises:
        InputError: they are no numbers, or do not fall from 1 at most to 0 at least.
    """
    try:
        times = np.asarray(given)
        times = times.astype(np.float32) if times.dtype.kind in "fiu" else np.zeros(0)
    except (ValueError, TypeError):  # of unequal length, say
        times = np.zeros(0)
    if times.ndim != 1 or len(times) < 2 or not np.all(np.diff(times) < 0):
        raise InputError(f"timesteps {given!r}: expected at least two numbers that fall, in float32 too")
    if times[0] > 1 or times[-1] < 0:
        raise InputError(f"timesteps from {times[0]:g} to {times[-1]:g}: expected them within 1 and 0")
    return times


def is_whole(number: Any) -> bool:
    """Whether it is a whole number, of Python or NumPy; True is none."""
    return isinstance(number, (int, np.integer)) and not isinstance(number, bool)

"""The memory plan: what a sample holds on its device, in bytes by name, known before anything is compiled.

    peak = weights + inputs + modulations + caches + working set

All but the working set are arrays whose shapes are known. The working set, what one layer holds while it computes, follows XLA's
buffer assignment: benchmarks/results/memory-aot-h100.json has both for whole compiled samples.

plan() is the one place that counts, check_room() the one that refuses.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from chipmunk_jax import cache as caches
from chipmunk_jax.delta import head_portions
from chipmunk_jax.errors import InputError
from chipmunk_jax.model import Condition, Model, Stack, modulations_of
from chipmunk_jax.solvers import Euler, Solver
from chipmunk_jax.sparsity import Sparsity, StepCache, load_sparsity
from chipmunk_jax.step_cache import caching_of, start_kept
from pallas_kernels import Implementation
from pallas_kernels.dispatch import choose
from pallas_kernels.groups import group_count

Parts = dict[str, int]  # bytes by name; a cache's name is its path, "double.attention.residual"

# Parts that lie on the device before a sample begins.
PLACED = ("weights", "noise and conditions")
WORKSPACE = 32 * 2**20  # of cuBLAS on Hopper

# What the caches of all stacks together are called, by the end of their names without the stack.
NAMES = {
    "attention.residual": "attention residuals",
    "attention.columns": "lists of keys",
    "attention.lse": "log-sum-exps",
    "mlp.columns": "lists of neurons",
    "mlp.out": "MLP outputs",
    "mlp.activations": "MLP activations",
    "mlp.group_mean": "MLP group means",
}
# Settings of a Sparsity, (name, value), that make a part smaller, or do without it: by the end of its name, which they change.
SMALLER = {"attention.residual": ("attention.residual_bits", 8), "mlp.activations": ("mlp.cache", "residual")}

DEVICES = {"h100": 84_942_979_072, "h200": 150_110_000_000}  # bytes as CUDA counts them: 79.1 and 139.8 GiB
SHARE = 0.75  # of a device that JAX takes unless it is told otherwise


def plan(
    model: Model,
    noise: jax.Array,
    cond: Condition,
    *,
    steps: int,
    sparsity: Sparsity | None,
    guidance: float | None = None,
    solver: Solver | None = None,
    implementation: Implementation | None = None,
    at_once: int | None = None,
) -> Parts:
    """Bytes by name of all that a sample holds on its device.

    The arguments are those of sample(), or their shapes alone; sparsity is what fit() makes of it. at_once is how many of the
    samples the network sees at once; None: all, or one where the sparsity decides.
    """
    sides, tokens = 1 if guidance is None else 2, noise.shape[1]
    samples = at_once or (1 if sparsity and sparsity.decides else noise.shape[0])
    batch = sides * samples
    stacks = model.stacks(tokens, cond)
    x = jax.ShapeDtypeStruct((samples, *noise.shape[1:]), jnp.float32)
    state, caching = jax.eval_shape((solver or Euler()).init, x), sparsity and sparsity.step_cache
    one_sided = sparsity is not None and sparsity.guidance_cache is not None
    kept = samples if one_sided else batch
    # Times and conditions of all entries, and where steps are one-sided of the prompt's.
    told = [
        (
            jax.ShapeDtypeStruct((steps, entries), jnp.float32),
            jax.tree.map(lambda a, entries=entries: jax.ShapeDtypeStruct((entries, *a.shape[1:]), a.dtype), cond),
        )
        for entries in [batch, samples][: 1 + one_sided]
    ]
    return {
        "weights": nbytes(model),
        "noise and conditions": nbytes(noise) + sides * nbytes(cond),
        # x at one step and the next, and the velocity between them.
        "latents of the solver": 3 * nbytes(x) + nbytes(state),
        "modulations of all steps": sum(nbytes(modulations_of.eval_shape(model, *one)) for one in told),
        **caches.nbytes(stacks, sparsity, batch, model.dtype),
        **({"kept for skipped steps": of_skipped(model, stacks, x, kept, caching)} if caching else {}),
        **({"difference of both sides": nbytes(x)} if one_sided else {}),
        **({"velocities of the drift guard": 2 * nbytes(x)} if sparsity and sparsity.max_drift else {}),
        **of_layers(stacks, sparsity, batch, model.dtype, implementation),
    }


def check_room(
    model: Model,
    noise: jax.Array,
    cond: Condition,
    *,
    placed: bool,
    sparsity: Sparsity | None,
    spare: int = 0,
    **options: Any,
) -> None:
    """Raises InputError if a sample cannot fit the default device beside what lies there.

    It names settings only where with them there is room.

    Args:
        model, noise, cond, sparsity, options: as of plan().
        placed: whether model, noise and conditions are on the device already; else they need room, too.
        spare: bytes in use that can be released.
    """

    def parts_of(sparsity: Sparsity | None) -> Parts:
        parts = plan(model, noise, cond, sparsity=sparsity, **options)
        return {name: size for name, size in parts.items() if not (placed and name in PLACED)}

    parts, free = parts_of(sparsity), free_bytes()
    free = None if free is None else free + spare
    if free is not None and (error := shortage(parts, free, str(jax.devices()[0]), " free")):
        fits = lambda changed: sum(parts_of(changed).values()) <= free
        settings = next((settings for settings, changed in economize(sparsity, parts) if fits(changed)), {})
        words = " and ".join(f"{name}={value!r}" for name, value in settings.items())
        if parts.get("weights", 0) > free:
            raise InputError(f"{error}; use a larger device")
        raise InputError(f"{error}; use {words}{words and ', '}a smaller batch or a smaller size")


def nbytes(tree: Any) -> int:
    """Bytes of all arrays of a pytree, or of what stands for them."""
    leaves = [a for a in jax.tree.leaves(tree) if hasattr(a, "dtype")]
    return sum(a.size * a.dtype.itemsize for a in leaves if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key))


def working_set(stack: Stack, sparsity: Sparsity | None, batch: int, dtype: jnp.dtype) -> Parts:
    """Bytes that a layer holds at once, by what it is doing; the largest counts.

    Args:
        stack: the layer's.
        sparsity: None for dense.
        batch: entries that the network sees, both sides of guidance.
        dtype: of the tokens.
    """
    itemsize = jnp.dtype(dtype).itemsize
    array = batch * stack.tokens * stack.heads * stack.head_dim * itemsize  # [B, N, D]
    hidden = batch * stack.tokens * stack.mlp_width * itemsize
    # Two more, always: the tokens as they were, and their norm, which an MLP beside the attention has yet to read.
    phases = {
        # Their product, and they.
        "making queries, keys and values": (3 + 3 + 2) * array,
        # Its neurons and its output.
        "in the MLP": hidden + (1 + 2) * array,
    }
    if sparsity and (config := sparsity.attention):
        groups = group_count(stack.tokens, config.group)
        lists = batch * stack.heads * groups // head_portions(batch, stack.heads, groups, stack.tokens, dtype)
        sums = lists * stack.tokens * itemsize
        # Queries, keys and values wait for the choice; its lists are not packed yet.
        phases["choosing keys"] = sums + lists * config.capacity(stack.tokens) * 4 + (3 + 2) * array
    return phases


def of_layers(
    stacks: dict[str, Stack],
    sparsity: Sparsity | None,
    batch: int,
    dtype: jnp.dtype,
    implementation: Implementation | None = None,
) -> Parts:
    """The working set of all layers as one part, named by what a layer does at its peak; and the reference's scores."""
    sizes = [item for stack in stacks.values() for item in working_set(stack, sparsity, batch, dtype).items()]
    doing, largest = max(sizes, key=lambda item: item[1])
    itemsize = jnp.dtype(dtype).itemsize
    # The bias of fc1 in the product's epilogue costs a copy of the layer's weights; cos and sin of the rotary angles are float32.
    constant = max(s.width * s.mlp_width * itemsize + 2 * s.tokens * s.head_dim * 4 for s in stacks.values())
    parts = {f"working set, {doing}": largest + constant + WORKSPACE}
    stack = max(stacks.values(), key=lambda s: s.tokens)
    if choose(implementation, dtype=dtype, head_dim=stack.head_dim) != "pallas":
        parts["scores of the reference attention"] = 2 * batch * stack.heads * stack.tokens**2 * 4
    return parts


def of_skipped(model: Model, stacks: dict[str, Stack], x: jax.ShapeDtypeStruct, batch: int, config: StepCache) -> int:
    """Bytes of what steps keep for those that are skipped, and of what gates that decide see of the step before and of this one."""
    caching, width = caching_of(config, ()), next(iter(stacks.values())).width
    kept = nbytes(jax.eval_shape(lambda: start_kept(caching, model, stacks, jnp.zeros(x.shape), batch)))
    itemsize = jnp.dtype(model.dtype).itemsize
    guess = batch * x.shape[1] * width * itemsize if config.predict == "residual" else 0
    tokens = x.shape[0] * x.shape[1] * width
    return (
        kept + guess + {"tea": 2 * tokens * itemsize, "sea": 4 * tokens * 4, "easy": 4 * nbytes(x)}.get(config.gate, 0)
    )


def summed(parts: Parts) -> Parts:
    """The parts with the caches of all stacks together, under the names that people call them by."""
    total: Parts = {}
    for name, size in parts.items():
        stack, _, rest = name.partition(".")
        known = next((called for path, called in NAMES.items() if rest.startswith(path)), rest or stack)
        total[known] = total.get(known, 0) + size
    return total


def savings(parts: Parts) -> list[tuple[str, Any]]:
    """Settings of a Sparsity, (name, value), that would make some of the parts smaller, those of the largest ones first."""
    sizes = {setting: sum(v for k, v in parts.items() if k.endswith(f".{end}")) for end, setting in SMALLER.items()}
    return sorted((setting for setting in sizes if sizes[setting]), key=sizes.get, reverse=True)


def economize(sparsity: Sparsity | None, parts: Parts) -> Iterator[tuple[dict[str, Any], Sparsity]]:
    """Those settings by name, one more each time, and the Sparsity with all of them; `parts` are its own."""
    settings: dict[str, Any] = {}
    for name, value in savings(parts):
        settings = settings | {name: value}
        yield settings, load_sparsity(sparsity, settings)


def shortage(parts: Parts, room: int, where: str, which: str = "") -> str | None:
    """What is too large, beginning with "no room on", or None where the parts fit `room` bytes, `which` says which."""
    need, parts = sum(parts.values()), summed(parts)
    if need <= room:
        return None
    largest = max(parts, key=parts.get)
    return (
        f"no room on {where}: this needs {need / 1e9:.1f} GB, JAX has {room / 1e9:.1f} GB{which}; "
        f"the largest part is {largest} ({parts[largest] / 1e9:.1f} GB)"
    )


def device_bytes(name: str) -> int | None:
    """What the default device tells of its memory under a name of memory_stats(), "peak_bytes_in_use" for one; None: nothing."""
    return (jax.devices()[0].memory_stats() or {}).get(name)


def free_bytes() -> int | None:
    """Free memory of the default device, None where it does not tell."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    if jax.default_backend() == "cpu" and Path("/proc/meminfo").exists():
        # "Free" pages leave out the files that Linux keeps in memory and drops on demand: a checkpoint just read, for one.
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    return None


def share() -> float:
    """The fraction of a device that JAX takes, as XLA_PYTHON_CLIENT_MEM_FRACTION has it.

    Raises:
        InputError: that is no fraction.
    """
    given = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", str(SHARE))
    try:
        fraction = float(given)
    except ValueError:
        fraction = 0.0
    if not 0 < fraction <= 1:
        raise InputError(f"XLA_PYTHON_CLIENT_MEM_FRACTION={given}: expected a fraction above 0 and up to 1")
    return fraction


def capacity(device: str) -> int:
    """Bytes of a device: "h100", "h200", or a number of GiB.

    Raises:
        InputError: anything else.
    """
    if device.lower() in DEVICES:
        return DEVICES[device.lower()]
    try:
        size = float(device) * 2**30
    except ValueError:
        size = 0.0
    if not 0 < size < 2**60:
        raise InputError(f"--device {device}: expected {', '.join(DEVICES)} or a number of GiB")
    return int(size)

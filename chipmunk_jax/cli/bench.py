"""chipmunk bench: measured speed, sparse against dense in one process."""

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from chipmunk_jax.cli.device import keep_compilations
from chipmunk_jax.cli.images import check_writable
from chipmunk_jax.cli.sparsity_flags import add_sparsity_flags, read_sparsity
from chipmunk_jax.models.flux import Flux, FluxConfig
from chipmunk_jax.quality import relative_l2
from chipmunk_jax.sampling import sample
from chipmunk_jax.schedule import density, plan
from chipmunk_jax.solvers import flux_timesteps
from chipmunk_jax.sparsity import to_dict

DESCRIPTION = """\
Time whole samples of a model with random weights, dense and sparse in turn: compiled and warmed up first, synchronised with
the device, median and spread of repeats. Speed does not depend on what the weights are; quality does, so none is reported."""

EXAMPLES = """\
examples:
  chipmunk bench --model flux-dev --height 768 --width 1280 --steps 50 -o benchmarks/results/flux-dev.jsonl
  chipmunk bench --model flux-tiny --height 64 --width 64 --steps 4          a minute on a CPU
  chipmunk bench --model flux-dev --sparsity.mlp.cache residual"""

# name -> (config, text tokens, pixels on a side of a token)
MODELS = {
    "flux-dev": (FluxConfig(), 512, 16),
    "flux-schnell": (FluxConfig(guidance_embed=False), 256, 16),
    "flux-tiny": (FluxConfig(hidden_size=256, num_heads=2, depth=2, depth_single_blocks=4), 16, 4),
}


def add_parser(subparsers) -> None:
    """Adds `chipmunk bench` to the subparsers of an ArgumentParser."""
    parser = subparsers.add_parser(
        "bench",
        usage="chipmunk bench [--model MODEL] [options]",
        allow_abbrev=False,
        help="time dense and sparse samples",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=tuple(MODELS), default="flux-dev", help="default: flux-dev")
    parser.add_argument("--height", type=int, default=768, help="pixels (default: 768)")
    parser.add_argument("--width", type=int, default=1280, help="pixels (default: 1280)")
    parser.add_argument("--steps", type=int, default=50, help="of the sampler (default: 50)")
    parser.add_argument("--batch", type=int, default=1, help="images at once (default: 1)")
    parser.add_argument("--repeats", type=int, default=3, help="timed samples of each kind (default: 3)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="default: bfloat16")
    parser.add_argument("--commit", help="what to record as the commit where git is not there")
    parser.add_argument("-o", "--output", help="JSON lines file to append the record to")
    add_sparsity_flags(parser, "flux")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status of `chipmunk bench`."""
    config, text_tokens, pixels = MODELS[args.model]
    _check(args, pixels)
    sparsity = read_sparsity(args)
    grid = (args.height // pixels, args.width // pixels)
    tokens = grid[0] * grid[1]
    table = plan(sparsity, args.steps, tokens=tokens + text_tokens, mlp_width=config.mlp_width)
    keep_compilations()
    model = random_flux(config, jnp.dtype(args.dtype))
    noise, cond = random_inputs(config, args.batch, tokens, text_tokens)
    timesteps = flux_timesteps(args.steps, tokens)
    kinds = {
        name: lambda s=s: sample(model, noise, cond, timesteps=timesteps, grid=grid, sparsity=s)
        for name, s in (("dense", None), ("sparse", sparsity))
    }
    seconds, first, outputs = time_in_turn(kinds, args.repeats)
    stacks = model.stacks(tokens, cond)
    base = record(args, text_tokens) | {
        "sparsity": to_dict(sparsity),
        "density": density(table, sum(stack.layers for stack in stacks.values())),
    }
    dense_ms = 1e3 * statistics.median(seconds["dense"])
    records = []
    for name, times in seconds.items():
        ms = 1e3 * statistics.median(times)
        records.append(base | {
            "variant": name,
            "ms": ms,
            "ms_spread": 1e3 * (max(times) - min(times)),
            "ms_per_step": ms / args.steps,
            "baseline": "dense",
            "baseline_ms": dense_ms,
            "speedup": dense_ms / ms,
            "rel_err": relative_l2(outputs[name], outputs["dense"]),  # of the final latents, random weights
            "first_call_s": first[name],
        })  # fmt: skip
    if args.output:
        with Path(args.output).open("a") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in records)
    for entry in records:
        print(
            f"{entry['variant']:7} {entry['ms']:10.1f} ms  +- {entry['ms_spread']:6.1f}  {entry['ms_per_step']:8.2f} ms a step"
            f"  {entry['speedup']:5.2f} x  first call {entry['first_call_s']:.1f} s"
        )
    return 0


def _check(args: argparse.Namespace, pixels: int) -> None:
    for name in ("height", "width"):
        size = getattr(args, name)
        if size < pixels or size % pixels:
            raise ValueError(f"--{name} {size}: expected a positive multiple of {pixels}")
    for name in ("steps", "batch", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: expected at least 1")
    if args.output:
        check_writable(args.output, suffix=None)


def random_flux(config: FluxConfig, dtype: jnp.dtype) -> Flux:
    """A model whose every parameter is drawn, leaf by leaf on the device: never more than one beside the model."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Flux(config, dtype=dtype, rngs=nnx.Rngs(0))))
    leaves, tree = jax.tree.flatten(state)
    draw = jax.jit(lambda key, shape, dtype: 0.02 * jax.random.normal(key, shape, dtype), static_argnums=(1, 2))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return nnx.merge(graph, tree.unflatten(draw(k, a.shape, a.dtype) for k, a in zip(keys, leaves, strict=True)))


def random_inputs(
    config: FluxConfig, batch: int, tokens: int, text_tokens: int
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """noise [B, N, C] and conditions, unit normal."""
    keys = jax.random.split(jax.random.key(1), 3)
    cond = {
        "text": jax.random.normal(keys[1], (batch, text_tokens, config.context_in_dim)),
        "pooled": jax.random.normal(keys[2], (batch, config.vec_in_dim)),
    }
    if config.guidance_embed:
        cond["guidance"] = jnp.full(batch, 3.5)
    return jax.random.normal(keys[0], (batch, tokens, config.in_channels)), cond


def time_in_turn(kinds: dict[str, Callable[[], jax.Array]], repeats: int):
    """Seconds of each kind's repeats, run in turn; seconds of its first call, which compiles; its output."""
    first, seconds, outputs = {}, {name: [] for name in kinds}, {}
    bar = tqdm(total=len(kinds) * (1 + repeats), unit="sample")
    for name, call in kinds.items():
        bar.set_description(f"compiling {name}")
        start = time.perf_counter()
        outputs[name] = np.asarray(call())
        bar.update()
        first[name] = time.perf_counter() - start
        if not np.isfinite(outputs[name]).all():
            raise ValueError(f"{name}: the output is not finite, so its time means nothing")
    for _ in range(repeats):
        for name, call in kinds.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
            bar.set_description(f"timed {name}")
            bar.update()
    bar.close()
    return seconds, first, outputs


def record(args: argparse.Namespace, text_tokens: int) -> dict:
    """What was run, where and with which versions."""
    device = jax.devices()[0]
    return {
        "benchmark": "sample",
        "model": args.model,
        "shape": {
            "height": args.height,
            "width": args.width,
            "batch": args.batch,
            "steps": args.steps,
            "text": text_tokens,
        },
        "dtype": args.dtype,
        "repeats": args.repeats,
        "device": device.device_kind,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "jax": jax.__version__,
        "commit": args.commit or _output("git", "rev-parse", "--short", "HEAD"),
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
    }


def _output(*command: str) -> str | None:
    """What a command prints, None where it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None

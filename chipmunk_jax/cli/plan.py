"""chipmunk inspect --plan: what a sample would take of a device's memory, before anything is compiled."""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import jax.numpy as jnp

from chipmunk_jax import memory
from chipmunk_jax.bench.models import MODELS, BenchModel, model_of, plan_memory
from chipmunk_jax.cli.sparsity_flags import add_sparsity_flags, read_sparsity
from chipmunk_jax.errors import InputError
from chipmunk_jax.models.checkpoint import describe
from chipmunk_jax.sparsity import Sparsity

RESERVE = "reserve, a fortieth of these"  # what XLA or a GPU had in use was up to 2.3 % more (tests/test_memory.py)
MORE = 0.95  # of a device, the most that is safe to give JAX: the rest is the driver's and the libraries'


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --plan and what a sample's size depends on to the parser."""
    group = parser.add_argument_group(
        "memory plan", "What a sample takes of a device, part by part; nothing is compiled."
    )
    group.add_argument(
        "--plan", action="store_true", help="print the memory plan; PATH is a converted folder, or --model"
    )
    group.add_argument("--model", choices=tuple(MODELS), help="a published model in place of PATH")
    group.add_argument("--height", type=int, help="pixels (default: the model's usual)")
    group.add_argument("--width", type=int, help="pixels (default: the model's usual)")
    group.add_argument("--frames", type=int, help="of a video (default: the model's usual)")
    group.add_argument("--batch", type=int, default=1, help="images or videos at once (default: 1)")
    group.add_argument("--steps", type=int, help="of the sampler (default: the model's usual)")
    group.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: as saved, bfloat16 for --model")
    group.add_argument("--device", default="h100", help=f"{', '.join(memory.DEVICES)} or its GiB (default: h100)")
    group.add_argument("--dense", action="store_true", help="without sparsity, whatever --sparsity says")
    add_sparsity_flags(parser)


@dataclass(frozen=True)
class Request:
    """One sample to plan."""

    name: str  # of the model, or its folder
    model: BenchModel
    sizes: dict[str, int]
    batch: int
    steps: int
    dtype: str
    sparsity: Sparsity | None

    def plan(self) -> memory.Parts:
        """Bytes by name."""
        options = dict(steps=self.steps, dtype=jnp.dtype(self.dtype), sparsity=self.sparsity)
        plan = lambda body: plan_memory(self.model, self.sizes, self.batch, **options, implementation=body)
        try:
            parts = plan("pallas")
        except NotImplementedError:  # the kernels cannot take it: a GPU, too, runs the reference
            parts = plan("reference")
        return parts | {RESERVE: sum(parts.values()) // 40}

    def check(self) -> None:
        """Raises InputError where the sampler has no such steps, or the sizes do not fit."""
        grid = self.model.grid(self.sizes)
        self.model.defaults.timesteps(self.steps, math.prod(grid))
        if self.sparsity:
            self.model.defaults.check_sparsity(self.sparsity, grid, self.steps)

    def runs(self) -> bool:
        """Whether check() has nothing to say."""
        try:
            self.check()
        except InputError:
            return False
        return True

    def smaller(self) -> Iterator[tuple[str, "Request"]]:
        """Requests that take less, each with the flags that make it: settings first, then less of everything."""
        for settings, sparsity in memory.economize(self.sparsity, self.plan()):
            flags = (f"--sparsity.{name.replace('_', '-')} {value}" for name, value in settings.items())
            yield " ".join(flags), replace(self, sparsity=sparsity)
        for batch in range(self.batch - 1, 0, -1):
            yield f"--batch {batch}", replace(self, batch=batch)
        stride, *_, pixels = self.model.defaults.patch
        for frames in range(self.sizes.get("frames", 1) - stride, 0, -stride):
            changed = replace(self, sizes=self.sizes | {"frames": frames})
            if changed.runs():
                yield f"--frames {frames}", changed
        for eighths in range(7, 0, -1):
            sides = {name: self.sizes[name] * eighths // 8 // pixels * pixels for name in ("height", "width")}
            changed = replace(self, sizes=self.sizes | sides)
            if changed.runs():
                yield " ".join(f"--{name} {size}" for name, size in sides.items()), changed
        if self.sparsity:
            yield "--dense", replace(self, sparsity=None)


def run_plan(args: argparse.Namespace) -> int:
    """Exit status of `chipmunk inspect --plan`: 0 where the sample fits the device, else 1."""
    request, total = read_request(args), memory.capacity(args.device)
    parts = request.plan()
    room = int(total * memory.share())
    print(table(request, parts))
    device = args.device if args.device.lower() in memory.DEVICES else f"{args.device} GiB"
    print(f"  {device}: {room / 1e9:.1f} GB, {memory.share():.0%} of {total / 1e9:.1f} GB, which is JAX's share")
    error = memory.shortage(parts, room, device)
    left = (room - sum(parts.values())) / 1e9
    print(f"{error}; {remedies(request, parts, room, total)}" if error else f"it fits: {left:.1f} GB are left")
    return 1 if error else 0


def read_request(args: argparse.Namespace) -> Request:
    """What the flags ask for.

    Raises:
        InputError, FileNotFoundError: both or neither of PATH and --model, or sizes that do not fit.
    """
    if (args.path is None) == (args.model is None):
        raise InputError("--plan: expected a converted folder or --model, one of them")
    if args.batch < 1:
        raise InputError(f"--batch {args.batch}: expected at least 1")
    if args.model:
        model, dtype = MODELS[args.model], "bfloat16"
    else:
        found = describe(args.path)
        model, dtype = model_of(found.config), found.dtype
    sparsity = None if args.dense else read_sparsity(args, model.defaults.preset)
    sizes = model.sizes(args.height, args.width, args.frames)
    steps = model.defaults.steps if args.steps is None else args.steps
    request = Request(args.model or args.path, model, sizes, args.batch, steps, args.dtype or dtype, sparsity)
    request.check()
    return request


def table(request: Request, parts: memory.Parts) -> str:
    """A line a part, and their sum."""
    sizes = ", ".join(f"{name} {size}" for name, size in (request.sizes | {"batch": request.batch}).items())
    kind = "sparse" if request.sparsity else "dense"
    rows = memory.summed(parts) | {"peak": sum(parts.values())}
    width = max(map(len, rows))
    lines = [f"  {name:<{width}}  {size / 1e9:9,.3f} GB" for name, size in rows.items()]
    return "\n".join([f"{request.name}: {sizes}, steps {request.steps}, {request.dtype}, {kind}", *lines])


def remedies(request: Request, parts: memory.Parts, room: int, total: int) -> str:
    """What would make it fit, all of it tried: the least change of each kind, and another device."""
    need, found, most = sum(parts.values()), {}, max(room, int(MORE * total))
    share = f"XLA_PYTHON_CLIENT_MEM_FRACTION={MORE}"
    if need <= most:
        found["share"] = share
    for flags, smaller in request.smaller():
        kind = flags.split()[0].partition(".")[0]
        size = sum(smaller.plan().values()) if kind not in found else most + 1
        if size <= room:
            found[kind] = flags
        elif size <= most and kind == "--sparsity":  # nothing is lost by a larger share
            found[kind] = f"{flags} and {share}"
    larger = (f"--device {name}" for name, size in memory.DEVICES.items() if need <= memory.share() * size)
    if device := next(larger, None):
        found["device"] = device
    return f"it fits with {', or with '.join(found.values())}" if found else "no smaller batch or size fits either"

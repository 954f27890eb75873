"""chipmunk inspect --plan: what a sample would take of a device's memory, before anything is compiled."""

import argparse

from chipmunk_jax import memory
from chipmunk_jax.cli.sparsity_flags import add_sparsity_flags, read_sparsity
from chipmunk_jax.errors import InputError
from chipmunk_jax.models.checkpoint import describe
from chipmunk_jax.pipelines import VARIANTS, variant_of
from chipmunk_jax.pipelines.request import MOST_SAMPLES
from chipmunk_jax.pipelines.room import PlannedSample, remedies


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --plan and what a sample's size depends on to the parser."""
    group = parser.add_argument_group(
        "memory plan", "What a sample takes of a device, part by part; nothing is compiled."
    )
    group.add_argument(
        "--plan", action="store_true", help="print the memory plan; PATH is a converted folder, or --model"
    )
    group.add_argument(
        "--model", metavar="MODEL", choices=tuple(VARIANTS), help=f"in place of PATH, one of {', '.join(VARIANTS)}"
    )
    group.add_argument("--height", type=int, help="pixels (default: the model's usual)")
    group.add_argument("--width", type=int, help="pixels (default: the model's usual)")
    group.add_argument("--frames", type=int, help="of a video (default: the model's usual)")
    group.add_argument("--batch", type=int, default=1, help="images or videos at once (default: 1)")
    group.add_argument("--steps", type=int, help="of the sampler (default: the model's usual)")
    group.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: as saved, bfloat16 for --model")
    group.add_argument("--device", default="h100", help=f"{', '.join(memory.DEVICES)} or its GiB (default: h100)")
    group.add_argument("--dense", action="store_true", help="without sparsity, whatever --sparsity says")
    add_sparsity_flags(parser)


def run_plan(args: argparse.Namespace) -> int:
    """Exit status of `chipmunk inspect --plan`: 0 where the sample fits the device, else 1."""
    (name, sample), total = read_sample(args), memory.capacity(args.device)
    parts, room = sample.parts(), int(total * memory.share())
    print(table(name, sample, parts))
    device = args.device if args.device.lower() in memory.DEVICES else f"{args.device} GiB"
    print(f"  {device}: {room / 1e9:.1f} GB, {memory.share():.0%} of {total / 1e9:.1f} GB, which is JAX's share")
    error = memory.shortage(parts, room, device)
    if error is None:
        print(f"it fits: {(room - sum(parts.values())) / 1e9:.1f} GB are left")
        return 0
    found = remedies(sample, room, total)
    print(
        f"{error}; " + (f"it fits with {', or with '.join(found)}" if found else "no smaller batch or size fits either")
    )
    return 1


def read_sample(args: argparse.Namespace) -> tuple[str, PlannedSample]:
    """What the flags ask for, and what it is called.

    Raises:
        InputError, FileNotFoundError: both or neither of PATH and --model, or sizes that do not fit.
    """
    if (args.path is None) == (args.model is None):
        raise InputError("--plan: expected a converted folder or --model, one of them")
    if not 1 <= args.batch <= MOST_SAMPLES:
        raise InputError(f"--batch {args.batch}: expected at least 1 and at most {MOST_SAMPLES}")
    if args.model:
        variant, dtype = VARIANTS[args.model], "bfloat16"
    else:
        found = describe(args.path)
        variant, dtype = variant_of(found.config), found.dtype
    settings = variant.complete(height=args.height, width=args.width, frames=args.frames, steps=args.steps)
    sparsity = None if args.dense else read_sparsity(args, variant.preset)
    variant.check(settings, sparsity)
    options = dict(batch=args.batch, dtype=args.dtype or dtype, sparsity=sparsity)
    return args.model or args.path, PlannedSample(variant=variant, settings=settings, **options)


def table(name: str, sample: PlannedSample, parts: memory.Parts) -> str:
    """A line a part, and their sum."""
    sizes = sample.variant.sizes(sample.settings) | {"batch": sample.batch, "steps": sample.settings["steps"]}
    kind = "sparse" if sample.sparsity else "dense"
    rows = memory.summed(parts) | {"peak": sum(parts.values())}
    width = max(map(len, rows))
    lines = [f"  {part:<{width}}  {size / 1e9:9,.3f} GB" for part, size in rows.items()]
    title = ", ".join(f"{size} {value}" for size, value in sizes.items())
    return "\n".join([f"{name}: {title}, {sample.dtype}, {kind}", *lines])

"""chipmunk inspect --plan: what a sample would take of a device's memory, before anything is compiled."""

import argparse
import sys

from chipmunk_jax import memory
from chipmunk_jax.cli.sparsity_flags import add_sparsity_flags, sparsity_of
from chipmunk_jax.errors import InputError
from chipmunk_jax.pipelines import VARIANTS
from chipmunk_jax.pipelines.request import MOST_SAMPLES
from chipmunk_jax.pipelines.room import PlannedSample, planned, published, remedies


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --plan and what a sample's size depends on to the parser."""
    group = parser.add_argument_group(
        "memory plan", "What a sample takes of a device, part by part; nothing is compiled."
    )
    group.add_argument("--plan", action="store_true", help="print the memory plan, of a checkpoint or of --model")
    group.add_argument(
        "--model",
        metavar="MODEL",
        choices=tuple(VARIANTS),
        help=f"in place of PATH, one of {', '.join(VARIANTS)}; -tiny: a few narrow blocks, for a first look",
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
    stages, room = sample.stages(), int(total * memory.share())
    print(table(name, sample, stages["transformer"], "the transformer" if len(stages) > 1 else "peak"))
    if len(stages) > 1:
        print(table_of_stages(sample, stages))
    device = args.device if args.device.lower() in memory.DEVICES else f"{args.device} GiB"
    print(f"  {device}: {room / 1e9:.1f} GB, {memory.share():.0%} of {total / 1e9:.1f} GB, which is JAX's share")
    error = memory.shortage(max(stages.values(), key=total_of), room, device)
    if error is None:
        print(
            f"it fits: {(room - sample.size()) / 1e9:.1f} GB are left" + (kept(sample, room) if len(stages) > 1 else "")
        )
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
        raise InputError("--plan: expected a checkpoint or --model, one of them")
    if not 1 <= args.batch <= MOST_SAMPLES:
        raise InputError(f"--batch {args.batch}: expected at least 1 and at most {MOST_SAMPLES}")
    what = published(VARIANTS[args.model]) if args.model else planned(args.path)
    variant = what.variant
    settings = variant.complete(height=args.height, width=args.width, frames=args.frames, steps=args.steps)
    sparsity = None if args.dense else sparsity_of(args, variant.preset)
    if sparsity == "auto":
        sparsity, line = variant.own_sparsity(settings)
        if line:
            print(line, file=sys.stderr)
    variant.check(settings, sparsity)
    options = dict(batch=args.batch, dtype=args.dtype or what.dtype, sparsity=sparsity, beside=what.beside)
    return args.model or args.path, PlannedSample(variant=variant, settings=settings, **options)


def table(name: str, sample: PlannedSample, parts: memory.Parts, sum_of: str) -> str:
    """A line a part of the network, and their sum."""
    sizes = sample.variant.sizes(sample.settings) | {"batch": sample.batch, "steps": sample.settings["steps"]}
    kind = "dense" if sample.fitted is None or sample.fitted.saves_nothing else "sparse"
    rows = memory.summed(parts) | {sum_of: total_of(parts)}
    width = max(map(len, rows))
    lines = [f"  {part:<{width}}  {size / 1e9:9,.3f} GB" for part, size in rows.items()]
    title = ", ".join(f"{size} {value}" for size, value in sizes.items())
    return "\n".join([f"{name}: {title}, {sample.dtype}, {kind}", *lines])


def table_of_stages(sample: PlannedSample, stages: dict[str, memory.Parts]) -> str:
    """A line a component, its weights and what it holds beside them, and what the device holds of all at once."""
    width = max(map(len, (*stages, OFFLOADS[0])))
    lines = [f"  {'stage':<{width}}  {'weights':>12}  {'beside them':>12}  {'together':>12}"]
    for role, parts in stages.items():
        whole, weights = total_of(parts), parts["weights"]
        sizes = "  ".join(f"{size / 1e9:9,.3f} GB" for size in (weights, whole - weights, whole))
        lines.append(f"  {role:<{width}}  {sizes}")
    peaks = zip(
        OFFLOADS,
        (sample.size(), sample.size_together()),
        ("the largest stage", "all weights and the most beside them"),
        strict=True,
    )
    lines += [f"  {offload:<{width}}  {size / 1e9:9,.3f} GB, {what}" for offload, size, what in peaks]
    return "\n".join(lines)


def kept(sample: PlannedSample, room: int) -> str:
    """Whether all components fit at once, the end of a sentence."""
    left = room - sample.size_together()
    return (
        f", {left / 1e9:.1f} GB with {OFFLOADS[1]}" if left >= 0 else f"; {OFFLOADS[1]} needs {-left / 1e9:.1f} GB more"
    )


OFFLOADS = ('offload="auto" or "model"', 'offload="none"')


def total_of(parts: memory.Parts) -> int:
    """Bytes in all."""
    return sum(parts.values())

"""chipmunk bench: measured speed, against dense in one process."""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import jax

from chipmunk_jax.bench.inputs import Workload, shortened
from chipmunk_jax.bench.kernels import CANDIDATES, SIZES, bench_kernels
from chipmunk_jax.bench.pipelines import bench_pipeline
from chipmunk_jax.bench.record import Record
from chipmunk_jax.bench.samples import bench_sample
from chipmunk_jax.bench.schedule import by_schedule
from chipmunk_jax.bench.steps import KINDS, bench_step
from chipmunk_jax.cli.parser import Menu, Parser
from chipmunk_jax.cli.prompts import some_prompts
from chipmunk_jax.cli.sample import open_pipeline
from chipmunk_jax.cli.sparsity_flags import add_sparsity_flags, read_sparsity
from chipmunk_jax.compilation import keep_compilations
from chipmunk_jax.errors import InputError
from chipmunk_jax.media import check_output, check_writable
from chipmunk_jax.pipelines import VARIANTS
from chipmunk_jax.pipelines.residents import Offload
from chipmunk_jax.report import records
from chipmunk_jax.report.compare import compare
from chipmunk_jax.report.configurations import read_configurations
from chipmunk_jax.report.perceptual import Weights, load_features
from chipmunk_jax.report.plot import PLOTTED, check_plotting, plot
from chipmunk_jax.report.price import read_prices
from chipmunk_jax.report.quality import compare_configurations, judge
from chipmunk_jax.report.tables import kernel_table, quality_table, record_table, stages_text
from chipmunk_jax.report.ways import Sampler

DESCRIPTION = """\
Time kernels, single steps or whole samples against the best dense baseline in the same process: compiled and warmed up
first, synchronised with the device, baseline and candidates in turn, median and spread of repeats, results checked before
they are timed. Weights and inputs are random, as speed does not depend on what they are; `quality` alone samples a trained
model. The exit status is 1 where a result was wrong, which then has no time."""

EXAMPLES = """\
examples:
  chipmunk bench kernels -o kernels.jsonl                                every kernel at full size; small ones without a GPU
  chipmunk bench kernels --only mlp,topk --compare kernels.jsonl         what did a change bring?
  chipmunk bench step --model flux-dev --layers 6                        one step of each kind of a short model
  chipmunk bench step --model flux-dev --kernels                         and its kernels, the longest first
  chipmunk bench step --model wan-14b --only dense                       of a model whose caches have no room here
  chipmunk bench step --model hunyuan-video --layers 6 --frames 33       of a video
  chipmunk bench sample --model flux-dev --steps 50 -o flux-dev.jsonl    whole samples
  chipmunk bench pipeline --model flux-dev --height 1024 --width 1024    from a prompt to pixels, stage by stage
  chipmunk bench schedule steps.jsonl --sparsity wan-14b-step-cache      what a sample of those steps would take
  chipmunk bench quality mini-wan variants.yaml                          quality and cost of many settings of a trained model
  chipmunk bench plot kernels.jsonl -o kernels.png                       speed-up against sparsity
  chipmunk bench plot quality.jsonl -o frontier.png                      quality against cost"""

KERNELS = "Time each kernel against its dense baseline, at the shapes of the published models on a GPU, at small ones elsewhere."
STEP = """\
Time one step of each kind of a published model: dense; full, which fills the caches; select, which chooses keys; select
neurons; delta, which computes the chosen columns alone; skipped, which runs no block."""
SAMPLE = "Time whole samples of a published model, dense and sparse, once both are compiled."
PIPELINE = """\
Time whole pipelines of published models at full size, from prompts to pixels: seconds and memory of text encoders, transformer and
decoder, of a first prompt, which reads weights and compiles, and of later ones. Weights are drawn on the device, in place of
being read from a disk."""
SCHEDULE = "Say what whole samples would take by the steps that `chipmunk bench step` timed, under any schedule; nothing is run."
QUALITY = """\
Sample the same prompts and seeds dense and by each configuration of a YAML file; print how near they come (PSNR, SSIM,
perceptual distance) and at what cost: share of the dense work by count, measured seconds and, with --cost-of, the share of a
dense sample's time that the same steps would take on a published model. A file:
  mini-wan: {}                                      a preset, by its name; the others change it by dotted names
  fewer keys: {attention.top_keys: 0.1}
  another: {preset: flux, attention: null}          or another preset that they name
  20 of 30 steps: {dense: true, steps: 20}          the rival: dense, in fewer steps
  more guidance: {guidance: 6, solver: euler}       against dense samples of that guidance by the usual solver
  by chance: {attention.random_keys: 0.2, method: random keys}     in plots a line of its own"""
PLOT = """\
Draw the speed-up of column_attention and mlp against the columns left out, from records of `chipmunk bench kernels`; or
quality against cost, a line a method, from records of `chipmunk bench quality`."""


class Command(NamedTuple):
    """One of the commands under `chipmunk bench`."""

    usage: str  # arguments that are not flags
    help: str  # one line of the list of commands
    description: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments of `chipmunk bench COMMAND`, and `run`, what runs it."""
    helps = {name: command.help for name, command in COMMANDS.items()}
    menu = Menu("chipmunk bench", "what to time", helps, description=DESCRIPTION, epilog=EXAMPLES)
    name, words = menu.choose(words)
    command = COMMANDS[name]
    examples = [line for line in EXAMPLES.splitlines() if line.startswith(f"  chipmunk bench {name} ")]
    layout = dict(description=command.description, epilog="\n".join(["examples:", *examples]))
    parser = Parser(f"chipmunk bench {name}", f"{command.usage}[options]", **layout)
    command.add_flags(parser)
    parser.set_defaults(run=command.run)
    return parser.parse_args(words)


def run(args: argparse.Namespace) -> int:
    """Exit status of `chipmunk bench`."""
    return args.run(args)


def _kernels_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", default=",".join(CANDIDATES), help=f"some of {','.join(CANDIDATES)} (default: all)")
    parser.add_argument("--size", choices=tuple(SIZES), help="default: full on a GPU, toy elsewhere")
    parser.add_argument(
        "--implementation", choices=("pallas", "interpret", "reference"), help="default: the fastest that runs here"
    )
    parser.add_argument("--plot", metavar="PNG", help="draw speed-up against sparsity, too")
    _add_common(parser, repeats=7)


def _step_flags(parser: argparse.ArgumentParser) -> None:
    _add_model_flags(parser)
    parser.add_argument("--only", metavar="KINDS", help=f"some of {','.join(KINDS)} (default: all)")
    parser.add_argument("--layers", type=int, help="shorten the model to so many (default: all)")
    parser.add_argument("--kernels", action="store_true", help="show in which kernels each kind spends its time (GPU)")
    _add_common(parser, repeats=5)
    add_sparsity_flags(parser)


def _sample_flags(parser: argparse.ArgumentParser) -> None:
    _add_model_flags(parser)
    parser.add_argument("--steps", type=int, help="of the sampler (default: the model's usual: 50 for FLUX.1-dev)")
    _add_common(parser, repeats=3)
    add_sparsity_flags(parser)


def _pipeline_flags(parser: argparse.ArgumentParser) -> None:
    _add_model_flags(parser)
    parser.add_argument("--steps", type=int, help="of the sampler (default: the model's usual)")
    parser.add_argument(
        "--offload",
        choices=get_args(Offload),
        default="auto",
        help="what leaves the device between stages (default: auto)",
    )
    parser.add_argument("--dense", action="store_true", help="dense samples alone")
    _add_common(parser, repeats=2)
    add_sparsity_flags(parser)


def _schedule_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("records", metavar="RECORDS", help="file that `chipmunk bench step -o` wrote")
    parser.add_argument("--steps", type=int, default=50, help="of the sampler (default: 50)")
    parser.add_argument("-o", "--output", help="JSON lines file to append the records to")
    add_sparsity_flags(parser, "that of the steps")


def _quality_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="folder written by chipmunk convert")
    parser.add_argument("configurations", metavar="YAML", help="configurations by name")
    parser.add_argument(
        "--prompts",
        metavar="FILE|N",
        default="16",
        help="text file of prompts, one a line, or a number of them, drawn by chance for a small model (default: 16)",
    )
    parser.add_argument("--batch", type=int, default=4, help="samples at once (default: 4); the first is not timed")
    parser.add_argument(
        "--cost-of", metavar="RECORDS", help="file of `chipmunk bench step -o`, by whose times steps are priced, too"
    )
    for name, kind in (("frames", int), ("height", int), ("width", int), ("steps", int), ("guidance", float)):
        parser.add_argument(f"--{name}", type=kind, help="default: the model's")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and noise (default: 0)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: float32 on a CPU, else as saved")
    parser.set_defaults(offload="auto")
    parser.add_argument("--commit", help="what to record as the commit where git is not there")
    parser.add_argument("-o", "--output", help="JSON lines file to append the records to")


def _plot_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("records", nargs="+", metavar="RECORDS", help="files of JSON lines written by -o")
    parser.add_argument("-o", "--output", default="plot.png", help="PNG to write (default: plot.png)")


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    models = dict(metavar="MODEL", choices=tuple(VARIANTS), default="flux-dev")
    parser.add_argument("--model", **models, help=f"one of {', '.join(VARIANTS)} (default: flux-dev)")
    usual = "default: the model's usual"
    parser.add_argument("--height", type=int, help=f"pixels ({usual}: 768 for FLUX.1)")
    parser.add_argument("--width", type=int, help=f"pixels ({usual}: 1280 for FLUX.1)")
    parser.add_argument(
        "--frames", type=int, help=f"of a video, a multiple of 4 and one ({usual}: 129 for HunyuanVideo)"
    )
    parser.add_argument("--batch", type=int, default=1, help="images or videos at once (default: 1)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="default: bfloat16")


def _add_common(parser: argparse.ArgumentParser, repeats: int) -> None:
    parser.add_argument("--repeats", type=int, default=repeats, help=f"timed runs of each (default: {repeats})")
    parser.add_argument("--commit", help="what to record as the commit where git is not there")
    parser.add_argument("--compare", metavar="OLD", help="JSON lines file of an earlier run: print old / new")
    parser.add_argument("-o", "--output", help="JSON lines file to append the records to")


def run_kernels(args: argparse.Namespace) -> int:
    """Exit status of `chipmunk bench kernels`."""
    names = args.only.split(",")
    if args.plot and not set(names) & set(PLOTTED):
        raise InputError(f"--plot with --only {args.only}: nothing to plot; expected {' or '.join(PLOTTED)} among them")
    _check(args, "repeats")
    if unknown := [name for name in names if name not in CANDIDATES]:
        raise InputError(
            f"--only {args.only}: no kernel {', '.join(map(repr, unknown))}; expected some of {', '.join(CANDIDATES)}"
        )
    on_gpu = jax.default_backend() == "gpu"
    size = args.size or ("full" if on_gpu else "toy")
    if size == "full" and not on_gpu:
        raise InputError(f"--size full: expected a GPU, found {jax.default_backend()}; use --size toy")
    if args.implementation == "pallas" and not on_gpu:
        raise InputError(f"--implementation pallas: expected a GPU, found {jax.default_backend()}; use interpret")
    options = dict(repeats=args.repeats, implementation=args.implementation)
    return _report(args, lambda: bench_kernels(names, SIZES[size], **options))


def run_step(args: argparse.Namespace) -> int:
    """Exit status of `chipmunk bench step`."""
    _check(args, "batch", "repeats")
    if args.kernels and jax.default_backend() != "gpu":
        raise InputError(f"--kernels: expected a GPU, found {jax.default_backend()}")
    options = dict(kernels=args.kernels, only=args.only and args.only.split(","))
    work = _workload(args, layers=args.layers)
    return _report(args, lambda: [bench_step(work, repeats=args.repeats, **options)])


def run_sample(args: argparse.Namespace) -> int:
    """Exit status of `chipmunk bench sample`."""
    _check(args, "steps", "batch", "repeats")
    work = _workload(args, steps=args.steps)
    return _report(args, lambda: [bench_sample(work, repeats=args.repeats)])


def run_pipeline(args: argparse.Namespace) -> int:
    """Exit status of `chipmunk bench pipeline`."""
    _check(args, "steps", "batch", "repeats")
    work = _workload(args, steps=args.steps)
    names = dict(num_frames="frames", num_inference_steps="steps", height="height", width="width")
    settings = {theirs: work.settings[ours] for theirs, ours in names.items() if ours in work.settings}
    settings["num_images_per_prompt"] = args.batch
    options = dict(dtype=args.dtype, offload=args.offload, repeats=args.repeats)
    options["sparsity"] = None if args.dense else work.sparsity
    return _report(args, lambda: bench_pipeline(work.variant, settings, **options))


def run_schedule(args: argparse.Namespace) -> int:
    """Exit status of `chipmunk bench schedule`."""
    _check(args, "steps")
    entries = records.read(args.records)
    steps = [entry for entry in entries if entry["benchmark"] == "step"]
    if not steps:
        raise InputError(f"{args.records}: no record of `chipmunk bench step`")
    samples = by_schedule(steps, args.steps, read_sparsity(args, steps[0]["sparsity"]))
    if args.output:
        records.append(args.output, samples)
    print(record_table(samples))
    for entry in samples:
        print(f"{entry['variant']}: " + ", ".join(f"{count} {kind}" for kind, count in entry["counts"].items()))
    return 0


def run_quality(args: argparse.Namespace) -> int:
    """Exit status of `chipmunk bench quality`."""
    _check(args, "batch")
    configurations = read_configurations(args.configurations)
    prices = args.cost_of and read_prices(args.cost_of)
    names = dict(
        num_frames="frames", num_inference_steps="steps", guidance_scale="guidance", height="height", width="width"
    )
    settings = {theirs: getattr(args, ours) for theirs, ours in names.items()}
    pipeline = open_pipeline(args)
    prompts = some_prompts(pipeline, args.prompts, args.seed)
    given = dict(at_once=args.batch, settings=settings | {"seed": args.seed})
    sampler = Sampler(pipeline=pipeline, prompts=prompts, **given)
    comparison = compare_configurations(sampler, configurations)
    features = _features()
    keep_compilations()
    entries = []
    for entry in judge(comparison, prices=prices, features=features):
        entries.append(entry | ({"commit": args.commit} if args.commit else {}))
        if args.output:
            records.append(args.output, entries[-1:])
    print(quality_table(entries))
    return 0


def _features() -> Weights | None:
    """For the perceptual distance; None, and one line, where they are not installed."""
    try:
        return load_features()
    except InputError as error:
        print(f"chipmunk: {error}", file=sys.stderr)
        return None


def run_plot(args: argparse.Namespace) -> int:
    """Exit status of `chipmunk bench plot`."""
    check_plotting()
    output = check_output(args.output, video=False)
    plot([entry for path in args.records for entry in records.read(path, timed=False)], output)
    print(output)
    return 0


def _workload(args: argparse.Namespace, *, layers: int | None = None, steps: int | None = None) -> Workload:
    """What the flags of a model ask for."""
    variant = shortened(VARIANTS[args.model], layers)
    settings = variant.complete(height=args.height, width=args.width, frames=args.frames, steps=steps)
    given = dict(batch=args.batch, dtype=args.dtype, sparsity=read_sparsity(args, variant.preset))
    return Workload(name=args.model, variant=variant, settings=settings, **given)


def _check(args: argparse.Namespace, *counts: str) -> None:
    """Raises InputError for what is wrong whatever is timed."""
    for name in counts:
        if (count := getattr(args, name)) is not None and count < 1:
            raise InputError(f"--{name} {count}: expected at least 1")
    if args.output:
        _check_appendable(check_writable(args.output))
    if getattr(args, "compare", None):
        records.read(args.compare)
    if getattr(args, "plot", None):
        check_plotting()
        check_output(args.plot, video=False)


def _check_appendable(path: Path) -> None:
    """Raises InputError for a file that holds something else than records."""
    if path.is_file() and path.stat().st_size:
        try:
            records.read(path, timed=False)
        except InputError as error:
            raise InputError(f"{error}; -o appends to a file of records, or makes one") from error


def _report(args: argparse.Namespace, measure) -> int:
    """Runs, writes records as they come, prints the table and the comparison: 1 where a result was wrong, else 0."""
    old = records.read(args.compare) if args.compare else []  # the file may be the one that is appended to
    keep_compilations()
    entries = []
    portions: Iterable[list[Record]] = measure()
    for portion in portions:
        new = [record.as_dict(args.commit) for record in portion]
        if args.output:
            records.append(args.output, new)
        entries += new
    print(record_table(entries))
    for entry in entries:
        if "stages" in entry:
            print(f"{entry['variant']}: {stages_text(entry['stages'])}")
        if "kernels" in entry:
            print(f"\n{entry['benchmark']}, {entry['variant']}\n{kernel_table(entry['kernels'])}")
    if getattr(args, "plot", None):
        plot(entries, Path(args.plot))
        print(args.plot)
    if old:
        print(compare(entries, old, args.compare))
    return 1 if any(entry["error"] for entry in entries) else 0


COMMANDS = {
    "kernels": Command("", "each kernel against its dense baseline", KERNELS, _kernels_flags, run_kernels),
    "step": Command("", "one step of each kind: dense, full, selecting, delta", STEP, _step_flags, run_step),
    "sample": Command("", "whole samples, dense and sparse", SAMPLE, _sample_flags, run_sample),
    "pipeline": Command(
        "", "whole pipelines, from prompts to pixels, stage by stage", PIPELINE, _pipeline_flags, run_pipeline
    ),
    "schedule": Command(
        "RECORDS ", "a whole sample from the steps that were timed", SCHEDULE, _schedule_flags, run_schedule
    ),
    "quality": Command(
        "CKPT YAML ",
        "how near samples of a trained model come to dense ones, at what cost",
        QUALITY,
        _quality_flags,
        run_quality,
    ),
    "plot": Command("RECORDS .. ", "draw speed-up, or quality against cost, of records", PLOT, _plot_flags, run_plot),
}

"""chipmunk verify: dense and sparse samples of the same prompts and seeds, side by side."""

import argparse
import json
import time
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageDraw

from chipmunk_jax.cli.device import keep_compilations
from chipmunk_jax.cli.images import check_writable, to_bytes, write_png
from chipmunk_jax.cli.sample import add_sampling_flags
from chipmunk_jax.cli.sparsity_flags import add_sparsity_flags, read_sparsity
from chipmunk_jax.pipeline import PATCH, Pipeline, WordTable, check_request
from chipmunk_jax.quality import psnr
from chipmunk_jax.sampling import plan_stacks
from chipmunk_jax.schedule import density
from chipmunk_jax.sparsity import Sparsity, to_dict

DESCRIPTION = """\
Sample the same prompts and seeds twice, dense and sparse; print time, share of columns computed and PSNR; draw dense,
sparse and their difference side by side. The exit status is 1 where the median PSNR is below --min-psnr."""

EXAMPLES = """\
examples:
  chipmunk verify mini --sparsity mini-flux -o compare.png
  chipmunk verify mini --sparsity.attention.top-keys 0.3 --min-psnr 30 --json report.json"""

PROMPTS = ("red striped heart on meadow", "blue plain ring on night", "yellow checkered disc on sky")
ZOOM = 3  # of the pictures, so that a person sees 64 pixels
GAIN = 5  # of the differences
SAME = 1000.0  # dB, in place of the infinity of equal pictures, which JSON cannot hold


def add_parser(subparsers) -> None:
    """Adds `chipmunk verify` to the subparsers of an ArgumentParser."""
    parser = subparsers.add_parser(
        "verify",
        usage="chipmunk verify CKPT [-o COMPARE.png] [options]",
        allow_abbrev=False,
        help="compare sparse samples with dense ones",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="folder written by chipmunk convert")
    parser.add_argument(
        "--prompt", action="append", help=f"may be given several times (default: {len(PROMPTS)} of ours)"
    )
    parser.add_argument("-o", "--output", default="compare.png", help="PNG to write (default: compare.png)")
    parser.add_argument("--json", help="file to write the numbers to")
    parser.add_argument("--min-psnr", type=float, default=0.0, help="dB, of the median picture (default: 0)")
    add_sampling_flags(parser)
    add_sparsity_flags(parser, "flux")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status of `chipmunk verify`."""
    output, prompts = check_writable(args.output), args.prompt or PROMPTS
    if args.json:
        check_writable(args.json, suffix=None)
    if args.steps == 1:
        raise ValueError("--steps 1: expected at least 2, as the first is not timed")
    sparsity = read_sparsity(args)
    settings = {name: getattr(args, name) for name in ("height", "width", "steps", "guidance", "seed")}
    check_request(WordTable.load(args.checkpoint), prompts, **settings, sparsity=sparsity)
    keep_compilations()
    pipeline = Pipeline.load(args.checkpoint, args.dtype)
    dense, dense_seconds = _timed(pipeline, prompts, settings, None)
    sparse, sparse_seconds = _timed(pipeline, prompts, settings, sparsity)
    dense_seconds *= args.steps / (args.steps - 1)
    sparse_seconds += dense_seconds / args.steps  # its first step is full, as long as a dense one
    decibels = [psnr(a, b) for a, b in zip(sparse, dense, strict=True)]
    report = {
        "prompts": list(prompts),
        **settings,
        "sparsity": to_dict(sparsity),
        "density": _density(pipeline, prompts, args, sparsity),
        "dense_seconds": dense_seconds,
        "sparse_seconds": sparse_seconds,
        "psnr": decibels,
        "median_psnr": float(np.median(decibels)),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    finite = report | {
        "psnr": [min(level, SAME) for level in decibels],
        "median_psnr": min(report["median_psnr"], SAME),
    }
    write_png(output, _sheet(prompts, dense, sparse, decibels), {"settings": json.dumps(finite)})
    if args.json:
        Path(args.json).write_text(json.dumps(finite, indent=1) + "\n")
    _print(report, output)
    return 0 if report["median_psnr"] >= args.min_psnr else 1


def _timed(pipeline: Pipeline, prompts, settings, sparsity: Sparsity | None) -> tuple[np.ndarray, float]:
    """Images, and seconds of all steps but the first, whose time holds the compilation."""
    ends: list[float] = []
    images = pipeline(
        prompts, **settings, sparsity=sparsity, progress=True, callback=lambda *_: ends.append(time.perf_counter())
    )
    return images, ends[-1] - ends[0]


def _density(pipeline: Pipeline, prompts, args: argparse.Namespace, sparsity: Sparsity) -> dict[str, float]:
    cond = pipeline.words.encode(prompts[:1])
    grid = (args.height // PATCH, args.width // PATCH)
    stacks = pipeline.model.stacks(grid[0] * grid[1], cond)
    return density(plan_stacks(stacks, sparsity, args.steps, grid), sum(stack.layers for stack in stacks.values()))


def _sheet(prompts, dense: np.ndarray, sparse: np.ndarray, decibels: list[float]) -> np.ndarray:
    """A row a prompt: dense, sparse, difference around grey; [H, W, 3] in [0, 1]."""
    height, width = (ZOOM * n for n in dense.shape[1:3])
    gap, line = 8, 16
    sheet = Image.new("RGB", (3 * width + 4 * gap, len(prompts) * (height + line + gap) + line + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(("dense", "sparse", f"difference x {GAIN}")):
        draw.text((gap + column * (width + gap), 4), title, fill="black")
    for row, (prompt, a, b, level) in enumerate(zip(prompts, dense, sparse, decibels, strict=True)):
        top = line + gap + row * (height + line + gap)
        for column, image in enumerate((a, b, 0.5 + GAIN * (b - a))):
            picture = Image.fromarray(to_bytes(image)).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (gap + column * (width + gap), top))
        draw.text((gap, top + height + 2), f"{prompt}: {level:.1f} dB", fill="black")
    return np.asarray(sheet) / 255


def _print(report: dict, output: Path) -> None:
    density, ratio = report["density"], report["dense_seconds"] / report["sparse_seconds"]
    levels = " ".join(f"{level:.1f}" for level in report["psnr"])
    print(f"dense   {report['dense_seconds']:7.1f} s for {len(report['prompts'])} images, {report['steps']} steps")
    print(f"sparse  {report['sparse_seconds']:7.1f} s, {ratio:.2f} x as fast, on {report['device']}")
    if report["device"] == "cpu":
        print("        (a CPU runs the plain references of the kernels: exact, not fast)")
    shares = 100 * density["attention"], 100 * density["mlp"]
    print(f"density {shares[0]:7.1f} % of attention keys, {shares[1]:.1f} % of MLP neurons, over all steps and layers")
    print(f"PSNR    {report['median_psnr']:7.1f} dB against the dense sample (median of {levels})")
    print(output)

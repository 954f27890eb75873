"""chipmunk verify: dense and sparse samples of the same prompts and seeds, and their rivals, side by side."""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chipmunk_jax.cli.parser import Parser
from chipmunk_jax.cli.prompts import read_prompts
from chipmunk_jax.cli.sample import add_checkpoint, add_sampling_flags, open_pipeline, read_settings
from chipmunk_jax.cli.sparsity_flags import add_sparsity_flags, sparsity_of
from chipmunk_jax.compilation import keep_compilations
from chipmunk_jax.errors import InputError
from chipmunk_jax.media import check_fps, check_output, check_outputs, check_writable
from chipmunk_jax.pipelines.pixels import PixelPipeline
from chipmunk_jax.pipelines.request import MOST_SAMPLES
from chipmunk_jax.report.folder import check_folder, files_of, write_report
from chipmunk_jax.report.verify import check_verify, noise_floor, verify
from chipmunk_jax.whole import whole

DESCRIPTION = """\
Sample the same prompts and seeds dense, sparse, and by two rivals at the cost of the sparse samples: dense in fewer steps,
and dense with steps skipped. Print times, shares of the work and PSNR; draw all of them and the sparse one's difference side
by side: of images in a .png, of videos as an .mp4 or animated .webp, and in a .png some frames of each. The cost is the
share of a dense sample's matrix products, by count. The exit status is 1 where the median PSNR is below --min-psnr.

--report writes a page, FOLDER/index.html, which needs no other file and no network, and its numbers, FOLDER/report.json:
pictures, quality against cost, drift by step, which steps were full, shares by layer, what rounding alone does (one more
dense sample, in the other dtype), times, memory, settings."""

EXAMPLES = """\
examples:
  chipmunk verify flux-dev --prompt "a lighthouse in a storm" -o compare.png
  chipmunk verify flux-dev --prompts prompts.txt --seeds 4 --report out/
  chipmunk verify mini -o compare.png
  chipmunk verify mini --sparsity flux -o compare.png
  chipmunk verify mini --sparsity.attention.top-keys 0.3 --min-psnr 30 --json report.json
  chipmunk verify mini-wan --prompt "red striped heart on meadow" -o heart.webp -o heart.png"""

# Of the small models, and of those that read any sentence.
PROMPTS = ("red striped heart on meadow", "blue plain ring on night", "yellow checkered disc on sky")
EVERYDAY = ("a cat asleep on a kitchen chair", "a street with bicycles after rain", "a bowl of fruit by a window")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments of `chipmunk verify`."""
    usage = "CKPT [-o COMPARE] [--report FOLDER] [options]"
    parser = Parser("chipmunk verify", usage, description=DESCRIPTION, epilog=EXAMPLES)
    add_checkpoint(parser)
    parser.add_argument(
        "--prompt", action="append", help=f"may be given several times (default: {len(PROMPTS)} of ours)"
    )
    parser.add_argument(
        "--prompts", metavar="FILE", help="text file of prompts, one a line, sampled one after the other; - reads stdin"
    )
    parser.add_argument(
        "--seeds", metavar="N", type=int, default=1, help="samples of each prompt (default: 1), one after the other"
    )
    parser.add_argument(
        *("-o", "--output"),
        action="append",
        help="file to draw to; may be given several times (default: compare.png, compare.webp for videos; with --report none)",
    )
    parser.add_argument("--report", metavar="FOLDER", help="folder to write index.html and report.json to")
    parser.add_argument("--no-rivals", action="store_true", help="leave the rivals out, in half the time or less")
    parser.add_argument("--json", help="file to write the numbers to")
    parser.add_argument("--min-psnr", type=float, default=0.0, help="dB, of the median sample (default: 0)")
    add_sampling_flags(parser)
    add_sparsity_flags(parser)
    return parser.parse_args(words)


def run(args: argparse.Namespace) -> int:
    """Exit status of `chipmunk verify`."""
    pipeline = open_pipeline(args)
    variant = pipeline.variant
    prompts = _prompts(args, PROMPTS if isinstance(pipeline, PixelPipeline) else EVERYDAY)
    usual = [] if args.report else ["compare.webp" if variant.video else "compare.png"]
    outputs = [check_output(path, video=variant.video) for path in args.output or usual]
    if args.json:
        check_writable(args.json)
    report = None if args.report is None else check_folder(args.report)
    check_outputs([*outputs, *filter(None, [args.json]), *(files_of(report) if report else ())])
    if math.isnan(args.min_psnr):
        raise InputError("--min-psnr nan: expected a number of dB")
    fps = check_fps(args.fps, variant.fps)
    settings = read_settings(args) | {"sparsity": sparsity_of(args, variant.preset)}
    check_verify(pipeline, prompts, **settings)
    keep_compilations()
    # Prompts of flags are one batch, as those of `chipmunk sample`; of more there may be more than have room.
    at_once = 1 if args.prompts is not None or args.seeds > 1 else None
    found = verify(pipeline, prompts, at_once=at_once, against_rivals=not args.no_rivals, **settings)
    for path in outputs:
        found.draw(path, fps)
    if args.json:
        with whole(args.json) as file:
            file.write_text(json.dumps(found.numbers, indent=1) + "\n")
    if report is not None:
        floor = noise_floor(pipeline, found.samples["dense"][0], prompts[0], **settings | {"sparsity": None})
        outputs += write_report(report, found, floor, fps)
    _print(found.numbers, outputs)
    return 0 if found.numbers["median_psnr"] >= args.min_psnr else 1


def _prompts(args: argparse.Namespace, usual: Sequence[str]) -> list[str]:
    """The prompt of each sample."""
    if args.seeds < 1:
        raise InputError(f"--seeds {args.seeds}: expected at least 1")
    given = [*(args.prompt or ()), *(read_prompts(args.prompts) if args.prompts is not None else ())] or usual
    if len(given) * args.seeds > MOST_SAMPLES:
        raise InputError(f"--seeds {args.seeds}: expected at most {MOST_SAMPLES // len(given)}")
    return [prompt for prompt in given for _ in range(args.seeds)]


def _print(report: dict[str, Any], outputs: Sequence[Path]) -> None:
    density, ratio = report["density"], report["dense_seconds"] / report["sparse_seconds"]
    levels, kind = " ".join(f"{level:.1f}" for level in report["psnr"]), "video" if "frames" in report else "image"
    count = f"{len(report['psnr'])} {kind}{'s' * (len(report['psnr']) > 1)}"
    print(f"dense   {report['dense_seconds']:7.1f} s for {count}, {report['steps']} steps")
    print(f"sparse  {report['sparse_seconds']:7.1f} s, {ratio:.2f} x as fast, on {report['device']}")
    if report["device"] == "cpu":
        print("        (a CPU runs the plain references of the kernels: exact, not fast)")
    shares = 100 * density["attention"], 100 * density["mlp"]
    print(f"density {shares[0]:7.1f} % of attention keys, {shares[1]:.1f} % of MLP neurons, over all steps and layers")
    print(f"work    {100 * report['executed']:7.1f} % of the dense sample's, by count")
    print(f"PSNR    {report['median_psnr']:7.1f} dB against the dense sample (median of {levels})")
    if frames := [level for clip in report.get("psnr_of_frames", ()) for level in clip]:
        print(f"frames  {min(frames):7.1f} to {max(frames):.1f} dB")
    for one in report["rivals"]:
        print(f"rival   {one['median_psnr']:7.1f} dB by {one['name']}, {100 * one['executed']:.1f} % of the work")
    if nearer := [one["name"] for one in report["rivals"] if one["median_psnr"] > report["median_psnr"]]:
        print(f"        at this cost {' and '.join(nearer)} come{'s' * (len(nearer) == 1)} nearer to the dense sample")
    print(*outputs, sep="\n")

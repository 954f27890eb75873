"""chipmunk verify: dense and sparse samples of the same prompts and seeds, side by side."""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chipmunk_jax.cli.parser import Parser
from chipmunk_jax.cli.sample import add_checkpoint, add_sampling_flags, open_pipeline, read_settings
from chipmunk_jax.cli.sparsity_flags import add_sparsity_flags, sparsity_of
from chipmunk_jax.compilation import keep_compilations
from chipmunk_jax.errors import InputError
from chipmunk_jax.media import check_fps, check_output, check_outputs, check_writable
from chipmunk_jax.pipelines.pixels import PixelPipeline
from chipmunk_jax.report.verify import check_verify, verify
from chipmunk_jax.whole import whole

DESCRIPTION = """\
Sample the same prompts and seeds twice, dense and sparse; print time, share of columns computed and PSNR; draw dense,
sparse and their difference side by side: of images in a .png, of videos as an .mp4 or animated .webp, and in a .png some
frames of each. The exit status is 1 where the median PSNR is below --min-psnr."""

EXAMPLES = """\
examples:
  chipmunk verify flux-dev --prompt "a lighthouse in a storm" -o compare.png
  chipmunk verify mini -o compare.png
  chipmunk verify mini --sparsity flux -o compare.png
  chipmunk verify mini --sparsity.attention.top-keys 0.3 --min-psnr 30 --json report.json
  chipmunk verify mini-wan --prompt "red striped heart on meadow" -o heart.webp -o heart.png"""

# Of the small models, and of those that read any sentence.
PROMPTS = ("red striped heart on meadow", "blue plain ring on night", "yellow checkered disc on sky")
EVERYDAY = ("a cat asleep on a kitchen chair", "a street with bicycles after rain", "a bowl of fruit by a window")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments of `chipmunk verify`."""
    parser = Parser("chipmunk verify", "CKPT [-o COMPARE] [options]", description=DESCRIPTION, epilog=EXAMPLES)
    add_checkpoint(parser)
    parser.add_argument(
        "--prompt", action="append", help=f"may be given several times (default: {len(PROMPTS)} of ours)"
    )
    parser.add_argument(
        *("-o", "--output"),
        action="append",
        help="file to draw to; may be given several times (default: compare.png, compare.webp for videos)",
    )
    parser.add_argument("--json", help="file to write the numbers to")
    parser.add_argument("--min-psnr", type=float, default=0.0, help="dB, of the median sample (default: 0)")
    add_sampling_flags(parser)
    add_sparsity_flags(parser)
    return parser.parse_args(words)


def run(args: argparse.Namespace) -> int:
    """Exit status of `chipmunk verify`."""
    pipeline = open_pipeline(args)
    prompts = args.prompt or (PROMPTS if isinstance(pipeline, PixelPipeline) else EVERYDAY)
    variant = pipeline.variant
    outputs = args.output or ["compare.webp" if variant.video else "compare.png"]
    outputs = [check_output(path, video=variant.video) for path in outputs]
    if args.json:
        check_writable(args.json)
    check_outputs([*outputs, *filter(None, [args.json])])
    if math.isnan(args.min_psnr):
        raise InputError("--min-psnr nan: expected a number of dB")
    fps = check_fps(args.fps, variant.fps)
    settings = read_settings(args) | {"sparsity": sparsity_of(args, variant.preset)}
    check_verify(pipeline, prompts, **settings)
    keep_compilations()
    found = verify(pipeline, prompts, **settings)
    for path in outputs:
        found.draw(path, fps)
    if args.json:
        with whole(args.json) as file:
            file.write_text(json.dumps(found.numbers, indent=1) + "\n")
    _print(found.numbers, outputs)
    return 0 if found.numbers["median_psnr"] >= args.min_psnr else 1


def _print(report: dict[str, Any], outputs: list[Path]) -> None:
    density, ratio = report["density"], report["dense_seconds"] / report["sparse_seconds"]
    levels, kind = " ".join(f"{level:.1f}" for level in report["psnr"]), "video" if "frames" in report else "image"
    count = f"{len(report['psnr'])} {kind}{'s' * (len(report['psnr']) > 1)}"
    print(f"dense   {report['dense_seconds']:7.1f} s for {count}, {report['steps']} steps")
    print(f"sparse  {report['sparse_seconds']:7.1f} s, {ratio:.2f} x as fast, on {report['device']}")
    if report["device"] == "cpu":
        print("        (a CPU runs the plain references of the kernels: exact, not fast)")
    shares = 100 * density["attention"], 100 * density["mlp"]
    print(f"density {shares[0]:7.1f} % of attention keys, {shares[1]:.1f} % of MLP neurons, over all steps and layers")
    print(f"PSNR    {report['median_psnr']:7.1f} dB against the dense sample (median of {levels})")
    if frames := [level for clip in report.get("psnr_of_frames", ()) for level in clip]:
        print(f"frames  {min(frames):7.1f} to {max(frames):.1f} dB")
    print(*outputs, sep="\n")

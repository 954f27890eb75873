"""chipmunk verify: dense and sparse samples of the same prompts and seeds, side by side."""

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from chipmunk_jax.cli.parser import Parser
from chipmunk_jax.cli.sample import add_sampling_flags, read_settings
from chipmunk_jax.cli.sparsity_flags import add_sparsity_flags, read_sparsity
from chipmunk_jax.compilation import keep_compilations
from chipmunk_jax.errors import InputError
from chipmunk_jax.media import check_fps, check_output, check_writable, save_image, save_video
from chipmunk_jax.pipeline import Pipeline, WordTable, check_request, family_of
from chipmunk_jax.quality import psnr
from chipmunk_jax.report import compare_frames, compare_images, compare_videos
from chipmunk_jax.sparsity import Sparsity, to_dict

DESCRIPTION = """\
Sample the same prompts and seeds twice, dense and sparse; print time, share of columns computed and PSNR; draw dense,
sparse and their difference side by side: of images in a .png, of videos as an .mp4 or animated .webp, and in a .png some
frames of each. The exit status is 1 where the median PSNR is below --min-psnr."""

EXAMPLES = """\
examples:
  chipmunk verify mini -o compare.png
  chipmunk verify mini --sparsity flux -o compare.png
  chipmunk verify mini --sparsity.attention.top-keys 0.3 --min-psnr 30 --json report.json
  chipmunk verify mini-wan --prompt "red striped heart on meadow" -o heart.webp -o heart.png"""

PROMPTS = ("red striped heart on meadow", "blue plain ring on night", "yellow checkered disc on sky")
SAME = 1000.0  # dB, in place of the infinity of equal samples, which JSON cannot hold


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments of `chipmunk verify`."""
    usage = "CKPT [-o COMPARE] [options]"
    parser = Parser("chipmunk verify", usage, description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("checkpoint", metavar="CKPT", help="folder written by chipmunk convert")
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
    family, prompts = family_of(args.checkpoint), args.prompt or PROMPTS
    outputs = args.output or ["compare.webp" if family.video else "compare.png"]
    outputs = [check_output(path, video=family.video) for path in outputs]
    if args.json:
        check_writable(args.json)
    if math.isnan(args.min_psnr):
        raise InputError("--min-psnr nan: expected a number of dB")
    fps, settings = check_fps(args.fps, family.fps), read_settings(args, family)
    if settings["steps"] == 1:
        raise InputError("--steps 1: expected at least 2, as the first is not timed")
    sparsity = read_sparsity(args, family.preset)
    check_request(family, WordTable.load(args.checkpoint), prompts, **settings, sparsity=sparsity)
    keep_compilations()
    pipeline = Pipeline.load(args.checkpoint, args.dtype)
    dense, dense_seconds = _timed(pipeline, prompts, settings, None)
    sparse, sparse_seconds = _timed(pipeline, prompts, settings, sparsity)
    dense_seconds *= settings["steps"] / (settings["steps"] - 1)
    sparse_seconds += dense_seconds / settings["steps"]  # its first step is full, as long as a dense one
    decibels = [psnr(a, b) for a, b in zip(sparse, dense, strict=True)]
    report = {
        "prompts": list(prompts),
        **settings,
        "sparsity": to_dict(sparsity),
        "density": pipeline.density(sparsity, **{name: settings[name] for name in settings if name != "seed"}),
        "dense_seconds": dense_seconds,
        "sparse_seconds": sparse_seconds,
        "psnr": [min(level, SAME) for level in decibels],
        "median_psnr": min(float(np.median(decibels)), SAME),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    if family.video:
        clips = zip(sparse, dense, strict=True)
        report["psnr_of_frames"] = [[min(psnr(*pair), SAME) for pair in zip(*clip, strict=True)] for clip in clips]
    captions = [f"{prompt}: {level:.1f} dB" for prompt, level in zip(prompts, decibels, strict=True)]
    for path in outputs:
        _draw(path, captions, dense, sparse, fps, {"settings": report})
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    _print(report, decibels, outputs)
    return 0 if np.median(decibels) >= args.min_psnr else 1


def _timed(pipeline: Pipeline, prompts, settings, sparsity: Sparsity | None) -> tuple[np.ndarray, float]:
    """Samples, and seconds of all steps but the first, whose time holds the compilation."""
    ends: list[float] = []
    samples = pipeline(
        prompts, **settings, sparsity=sparsity, progress=True, callback=lambda *_: ends.append(time.perf_counter())
    )
    return samples, ends[-1] - ends[0]


def _draw(path: Path, captions: list[str], dense: np.ndarray, sparse: np.ndarray, fps: float | None, text) -> None:
    if fps is None:
        save_image(path, compare_images(captions, dense, sparse), text)
    elif path.suffix.lower() == ".png":
        save_image(path, compare_frames(captions, dense, sparse), text)
    else:
        save_video(path, compare_videos(captions, dense, sparse), fps, text)


def _print(report: dict, decibels: list[float], outputs: list[Path]) -> None:
    density, ratio = report["density"], report["dense_seconds"] / report["sparse_seconds"]
    levels, kind = " ".join(f"{level:.1f}" for level in decibels), "video" if "frames" in report else "image"
    count = f"{len(decibels)} {kind}{'s' * (len(decibels) > 1)}"
    print(f"dense   {report['dense_seconds']:7.1f} s for {count}, {report['steps']} steps")
    print(f"sparse  {report['sparse_seconds']:7.1f} s, {ratio:.2f} x as fast, on {report['device']}")
    if report["device"] == "cpu":
        print("        (a CPU runs the plain references of the kernels: exact, not fast)")
    shares = 100 * density["attention"], 100 * density["mlp"]
    print(f"density {shares[0]:7.1f} % of attention keys, {shares[1]:.1f} % of MLP neurons, over all steps and layers")
    print(f"PSNR    {np.median(decibels):7.1f} dB against the dense sample (median of {levels})")
    if frames := [level for clip in report.get("psnr_of_frames", ()) for level in clip]:
        print(f"frames  {min(frames):7.1f} to {max(frames):.1f} dB")
    print(*outputs, sep="\n")

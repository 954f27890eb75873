"""chipmunk sample: images and videos from prompts."""

import argparse
import time
from collections.abc import Sequence
from typing import Any

from chipmunk_jax.cli.parser import Parser
from chipmunk_jax.cli.sparsity_flags import add_sparsity_flags, read_sparsity
from chipmunk_jax.compilation import keep_compilations
from chipmunk_jax.errors import InputError
from chipmunk_jax.families import FAMILIES, Family
from chipmunk_jax.media import check_fps, check_output, save_image, save_video
from chipmunk_jax.pipeline import Pipeline, WordTable, check_request, family_of
from chipmunk_jax.sparsity import to_dict

DESCRIPTION = """\
Sample images (FLUX) or videos (Wan) from a folder written by `chipmunk convert`. The same seed gives the same sample, alone
or in a batch; a sparse one is nearly the dense one (see `chipmunk verify`). Prompts of the small models are sentences with
one word each of
  shape       disc square triangle star ring cross hexagon heart
  colour      red orange yellow green teal blue purple white
  texture     plain striped checkered marbled
  background  sky night desert meadow
Images are .png; videos .mp4 (needs PyAV: pip install 'av>=14'), animated .webp, or a .png of all frames in rows. Each file
holds its prompt, seed and settings."""

EXAMPLES = """\
examples:
  chipmunk sample mini --prompt "red striped heart on meadow" --sparsity -o heart.png           by the model's own preset
  chipmunk sample mini --prompt "blue plain ring on night" --batch 4 --dense -o ring.png        ring-1.png .. ring-4.png
  chipmunk sample mini --prompt "teal marbled star on sky" --sparsity flux --sparsity.attention.top-keys 0.1 -o star.png
  chipmunk sample mini-wan --prompt "red striped heart on meadow" --sparsity --fps 12 -o heart.webp"""


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments of `chipmunk sample`."""
    usage = "CKPT --prompt PROMPT [-o OUT] [options]"
    parser = Parser("chipmunk sample", usage, description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("checkpoint", metavar="CKPT", help="folder written by chipmunk convert")
    parser.add_argument("--prompt", action="append", required=True, help="what to draw; may be given several times")
    parser.add_argument("--batch", type=int, default=1, help="samples of each prompt (default: 1)")
    parser.add_argument(
        "-o", "--output", help="file to write, numbered where there are several (default: out.png, out.webp)"
    )
    add_sampling_flags(parser)
    parser.add_argument("--dense", action="store_true", help="recompute everything, whatever --sparsity says")
    add_sparsity_flags(parser, "dense")
    return parser.parse_args(words)


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the size, steps, seed, guidance and dtype of a sample to the parser."""
    parser.add_argument("--frames", type=int, help=f"of a video ({_default('frames')})")
    parser.add_argument("--height", type=int, help=f"pixels ({_default('height')})")
    parser.add_argument("--width", type=int, help=f"pixels ({_default('width')})")
    parser.add_argument("--steps", type=int, help=f"of the sampler ({_default('steps')})")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument(
        "--guidance", type=float, help=f"scale of true guidance; 1 is none, in half the time ({_default('guidance')})"
    )
    parser.add_argument("--fps", type=float, help=f"frames a second that a video is shown at ({_default('fps')})")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: float32 on a CPU, else as saved")


def _default(name: str) -> str:
    found = {family: getattr(kind, name) for family, kind in FAMILIES.items()}
    if len(set(found.values())) == 1:
        return f"default: {next(iter(found.values()))}"
    return "default: " + ", ".join(f"{value:g} for {family}" for family, value in found.items() if value is not None)


def read_settings(args: argparse.Namespace, family: Family) -> dict[str, Any]:
    """What the flags of a sample say, the family's where they say nothing."""
    given = {name: getattr(args, name) for name in ("frames", "height", "width", "steps", "guidance")}
    return family.complete(**given) | {"seed": args.seed}


def run(args: argparse.Namespace) -> int:
    """Exit status of `chipmunk sample`."""
    if args.batch < 1:
        raise InputError(f"--batch {args.batch}: expected at least 1")
    family = family_of(args.checkpoint)
    output = check_output(args.output or ("out.webp" if family.video else "out.png"), video=family.video)
    fps, settings = check_fps(args.fps, family.fps), read_settings(args, family)
    sparsity = None if args.dense else read_sparsity(args, family.preset, dense=True)
    prompts = [prompt for prompt in args.prompt for _ in range(args.batch)]
    check_request(family, WordTable.load(args.checkpoint), prompts, **settings, sparsity=sparsity)
    keep_compilations()
    pipeline = Pipeline.load(args.checkpoint, args.dtype)
    start = time.perf_counter()
    samples = pipeline(prompts, **settings, sparsity=sparsity, progress=True)
    seconds = time.perf_counter() - start
    for i, (prompt, pixels) in enumerate(zip(prompts, samples, strict=True)):
        path = output if len(samples) == 1 else output.with_stem(f"{output.stem}-{i + 1}")
        described = settings | {"seed": args.seed + i, "sparsity": sparsity and to_dict(sparsity)}
        text = {"prompt": prompt, "seed": args.seed + i, "settings": described}
        if family.video:
            save_video(path, pixels, fps, text)
        else:
            save_image(path, pixels, text)
        print(path)
    kind = "video" if family.video else "image"
    print(f"{len(samples)} {kind}{'s' * (len(samples) > 1)} in {seconds:.1f} s, compilation included")
    return 0

"""chipmunk sample: images and videos from prompts."""

import argparse
import json
import re
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

from chipmunk_jax.cli.parser import Parser
from chipmunk_jax.cli.prompts import calls_of, shown
from chipmunk_jax.cli.sampled import how, numbers, said, summary, total
from chipmunk_jax.cli.sparsity_flags import add_sparsity_flags, sparsity_of
from chipmunk_jax.compilation import keep_compilations
from chipmunk_jax.convert.folder import lack
from chipmunk_jax.errors import InputError
from chipmunk_jax.media import check_fps, check_output, most_bytes, save_image, save_video
from chipmunk_jax.models.checkpoint import is_pipeline
from chipmunk_jax.pipelines import Pipeline
from chipmunk_jax.pipelines.request import SOLVERS
from chipmunk_jax.pipelines.residents import Offload
from chipmunk_jax.whole import check_space

DESCRIPTION = """\
Sample images (FLUX.1) or videos (Wan2.1, Wan2.2) from a folder written by `chipmunk convert`, or from the checkpoint
itself, sparse by the model's own preset unless told --dense. The same seed gives the same sample, alone or in a batch; a
sparse one is nearly the dense one (see `chipmunk verify`).

Images are .png; videos .mp4 (needs PyAV: pip install 'av>=14'), animated .webp, or a .png of all frames in rows. Each file
holds its prompt, seed and settings, and which checkpoint, solver, dtype and version made it.

Prompts of the small models of examples/ are sentences with one word each of
  shape       disc square triangle star ring cross hexagon heart
  colour      red orange yellow green teal blue purple white
  texture     plain striped checkered marbled
  background  sky night desert meadow"""

EXAMPLES = """\
examples:
  chipmunk sample flux-dev --prompt "a chipmunk in a scarf, autumn leaves" -o chipmunk.png
  chipmunk sample flux-dev --prompt "a lighthouse in a storm" --height 1024 --width 1024 --steps 28 --guidance 4 --seed 7
  chipmunk sample flux-dev --prompt "a street at dawn" --negative-prompt "cars" --true-cfg 4 --batch 4 -o street.png
  chipmunk sample flux-dev --prompts prompts.txt --json -o out.png          out-1.png, out-2.png, .. one for each line
  chipmunk sample wan-1.3b --prompt "a fox runs over fresh snow" --frames 81 -o fox.mp4
  chipmunk sample wan2.2-t2v --prompt "waves on a pebble beach" --guidance 4 --guidance-2 3 -o waves.mp4
the small models:
  chipmunk sample mini --prompt "red striped heart on meadow" -o heart.png
  chipmunk sample mini --prompt "blue plain ring on night" --batch 4 --dense -o ring.png        ring-1.png .. ring-4.png
  chipmunk sample mini --prompt "teal marbled star on sky" --sparsity flux --sparsity.attention.top-keys 0.1 -o star.png
  chipmunk sample mini-wan --prompt "red striped heart on meadow" --fps 12 -o heart.webp"""


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments of `chipmunk sample`."""
    usage = "CKPT (--prompt PROMPT | --prompts FILE) [-o OUT] [options]"
    parser = Parser("chipmunk sample", usage, description=DESCRIPTION, epilog=EXAMPLES)
    add_checkpoint(parser)
    parser.add_argument("--prompt", action="append", help="what to draw; may be given several times")
    parser.add_argument(
        "--prompts", metavar="FILE", help="text file of prompts, one a line, sampled one after the other; - reads stdin"
    )
    parser.add_argument(
        "--prompt-2",
        metavar="PROMPT",
        action="append",
        help="what T5 reads, of FLUX (default: the prompt); one for all prompts, or one each",
    )
    parser.add_argument(
        "--negative-prompt",
        metavar="PROMPT",
        action="append",
        help="what to guide away from (default: the model's usual, or nothing); one for all prompts, or one each",
    )
    parser.add_argument("--batch", type=int, default=1, help="samples of each prompt (default: 1)")
    parser.add_argument(
        "-o", "--output", help="file to write, numbered where there are several (default: out.png, out.webp)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object: files, prompts, seeds, times, memory"
    )
    add_sampling_flags(parser)
    parser.add_argument(
        "--guidance-2",
        metavar="SCALE",
        type=float,
        help="of the second network of Wan2.2 (default: --guidance, or usual)",
    )
    parser.add_argument(
        "--true-cfg", metavar="SCALE", type=float, help="scale of FLUX's guidance against --negative-prompt, above 1"
    )
    parser.add_argument("--solver", choices=tuple(SOLVERS), help="default: the model's usual")
    parser.add_argument(
        "--max-sequence-length",
        metavar="TOKENS",
        type=int,
        help="tokens of a prompt that T5 or UMT5 reads (default: all it takes, 512)",
    )
    parser.add_argument("--dense", action="store_true", help="recompute everything, whatever --sparsity says")
    add_sparsity_flags(parser)
    args = parser.parse_args(words)
    if args.prompt is None and args.prompts is None:
        parser.error("the following arguments are required: --prompt or --prompts")
    return args


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Adds what a pipeline is read from to the parser."""
    parser.add_argument(
        "checkpoint",
        metavar="CKPT",
        help="folder written by chipmunk convert, a PyTorch checkpoint or whole folder as it takes them, or hf:owner/name",
    )


def add_sampling_flags(parser: argparse.ArgumentParser, *, shown: bool = True) -> None:
    """Adds the size, steps, seed, guidance, dtype and place of a sample to the parser; and the speed of a video that is shown."""
    usual = "default: the model's usual, see chipmunk inspect"
    parser.add_argument("--frames", type=int, help=f"of a video ({usual})")
    parser.add_argument("--height", type=int, help=f"pixels ({usual})")
    parser.add_argument("--width", type=int, help=f"pixels ({usual})")
    parser.add_argument("--steps", type=int, help=f"of the sampler ({usual})")
    parser.add_argument("--seed", type=int, default=0, help="of the noise, one more for each sample (default: 0)")
    parser.add_argument(
        "--guidance",
        type=float,
        help=f"scale; FLUX.1-dev was trained with it, for the others 1 is none, in half the time ({usual})",
    )
    if shown:
        parser.add_argument("--fps", type=float, help=f"frames a second that a video is shown at ({usual})")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: float32 on a CPU, else as saved")
    parser.add_argument(
        "--offload",
        choices=get_args(Offload),
        default="auto",
        help="when text encoders, transformers and VAE leave the device: where another one needs their room (auto, the "
        "default), once another one is used (model), or never (none)",
    )


def read_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags that all samples have say, as a call of a pipeline takes it."""
    names = dict(
        num_frames="frames", height="height", width="width", num_inference_steps="steps", guidance_scale="guidance", seed="seed"
    )  # fmt: skip
    return {theirs: getattr(args, ours) for theirs, ours in names.items()}


def open_pipeline(args: argparse.Namespace) -> Pipeline:
    """The pipeline that the flags name.

    Raises:
        FileNotFoundError, InputError: see Pipeline.from_pretrained(); a component is missing, as the flags give only prompts.
    """
    pipeline = Pipeline.from_pretrained(args.checkpoint, dtype=args.dtype, offload=args.offload)
    if pipeline.missing:
        folder, name = pipeline.folder, pipeline.missing[0]
        command = shlex.join(("chipmunk", "convert", "SOURCE", str(folder.path), "--component", name))
        if is_pipeline(folder.path):
            remedy = f"`{command}` adds it from a release that has it"
        elif folder.several:
            remedy = "download it into this folder"
        else:
            remedy = "expected the folder of a whole pipeline"
        raise InputError(f"{folder.path}: {lack(folder.path, name)}: {remedy}")
    return pipeline


def numbered(output: Path, count: int, number: int) -> Path:
    """The file of one of so many samples, the first of which is 1."""
    return output if count == 1 else output.with_stem(f"{output.stem}-{number}")


def check_no_folders(output: Path, count: int) -> None:
    """Raises InputError where one of the files of so many samples is a folder already."""
    number = re.compile(rf"{re.escape(output.stem)}-([1-9]\d{{0,9}}){re.escape(output.suffix)}")
    for folder in sorted(path for path in output.parent.iterdir() if path.is_dir()):
        found = number.fullmatch(folder.name)
        if folder.name == output.name if count == 1 else found and int(found[1]) <= count:
            raise InputError(f"{folder}: a folder, expected the name of a file")


def run(args: argparse.Namespace) -> int:
    """Exit status of `chipmunk sample`."""
    if args.batch < 1:
        raise InputError(f"--batch {args.batch}: expected at least 1")
    calls = calls_of(args)
    pipeline = open_pipeline(args)
    variant = pipeline.variant
    output = check_output(args.output or ("out.webp" if variant.video else "out.png"), video=variant.video)
    fps = check_fps(args.fps, variant.fps)
    settings = read_settings(args) | dict(
        guidance_scale_2=args.guidance_2, true_cfg_scale=args.true_cfg, solver=args.solver,
        max_sequence_length=args.max_sequence_length, num_images_per_prompt=args.batch,
        sparsity=None if args.dense else sparsity_of(args, variant.preset),
    )  # fmt: skip
    requests = [pipeline.check(**settings | call) for call in calls]
    count = sum(request.batch for request in requests)
    path_of = partial(numbered, output, count)
    check_output(path_of(count), video=variant.video)  # the longest name
    check_no_folders(output, count)
    check_space(output, count * most_bytes(output, **variant.sizes(requests[0].settings)))
    keep_compilations()
    outs, files = [], []
    for call, request in zip(calls, requests, strict=True):
        if len(calls) > 1:
            tqdm.write(f"{len(outs) + 1} of {len(calls)}: {shown(call['prompt'][0])}", file=sys.stderr)
        outs.append(pipeline(**settings | call))
        made = how(pipeline, request, outs[-1])
        for i, pixels in enumerate(outs[-1].frames if variant.video else outs[-1].images):
            path, text = path_of(len(files) + 1), said(pipeline, request, i)
            seed = {"seed": request.seed + i}
            files.append({"path": str(path)} | text | seed)
            if variant.video:
                save_video(path, pixels, fps, text | seed | {"settings": made | seed})
            else:
                save_image(path, pixels, text | seed | {"settings": made | seed})
    out = total(outs)
    if args.json:
        print(json.dumps(numbers(out, files, made | {"seed": args.seed}), indent=1))
        return 0
    print(*(file["path"] for file in files), sep="\n")
    print(summary(out, count, "video" if variant.video else "image"))
    return 0

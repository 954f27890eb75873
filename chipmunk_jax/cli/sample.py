"""chipmunk sample: images and videos from prompts."""

import argparse
from collections.abc import Sequence
from typing import Any

from chipmunk_jax.cli.parser import Parser
from chipmunk_jax.cli.sparsity_flags import add_sparsity_flags, read_sparsity
from chipmunk_jax.compilation import keep_compilations
from chipmunk_jax.errors import InputError
from chipmunk_jax.media import check_fps, check_output, most_bytes, save_image, save_video
from chipmunk_jax.pipelines import Pipeline, PipelineOutput
from chipmunk_jax.sparsity import to_dict
from chipmunk_jax.whole import check_space

DESCRIPTION = """\
Sample images (FLUX) or videos (Wan) from a folder written by `chipmunk convert`, sparse by the model's own preset unless
told --dense. The same seed gives the same sample, alone or in a batch; a sparse one is nearly the dense one (see `chipmunk
verify`). Prompts of the small models are sentences with one word each of
  shape       disc square triangle star ring cross hexagon heart
  colour      red orange yellow green teal blue purple white
  texture     plain striped checkered marbled
  background  sky night desert meadow
Images are .png; videos .mp4 (needs PyAV: pip install 'av>=14'), animated .webp, or a .png of all frames in rows. Each file
holds its prompts, seed and settings, and which checkpoint, solver, dtype and version made it."""

EXAMPLES = """\
examples:
  chipmunk sample mini --prompt "red striped heart on meadow" -o heart.png
  chipmunk sample mini --prompt "blue plain ring on night" --batch 4 --dense -o ring.png        ring-1.png .. ring-4.png
  chipmunk sample mini --prompt "teal marbled star on sky" --sparsity flux --sparsity.attention.top-keys 0.1 -o star.png
  chipmunk sample mini-wan --prompt "red striped heart on meadow" --fps 12 -o heart.webp"""


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments of `chipmunk sample`."""
    usage = "CKPT --prompt PROMPT [-o OUT] [options]"
    parser = Parser("chipmunk sample", usage, description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument(
        "checkpoint", metavar="CKPT", help="folder written by chipmunk convert, or a PyTorch checkpoint"
    )
    parser.add_argument("--prompt", action="append", required=True, help="what to draw; may be given several times")
    parser.add_argument("--negative-prompt", help="what to guide away from (default: the model's usual, or nothing)")
    parser.add_argument("--batch", type=int, default=1, help="samples of each prompt (default: 1)")
    parser.add_argument(
        "-o", "--output", help="file to write, numbered where there are several (default: out.png, out.webp)"
    )
    add_sampling_flags(parser)
    parser.add_argument("--dense", action="store_true", help="recompute everything, whatever --sparsity says")
    add_sparsity_flags(parser)
    return parser.parse_args(words)


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the size, steps, seed, guidance and dtype of a sample to the parser."""
    usual = "default: the model's usual, see chipmunk inspect"
    parser.add_argument("--frames", type=int, help=f"of a video ({usual})")
    parser.add_argument("--height", type=int, help=f"pixels ({usual})")
    parser.add_argument("--width", type=int, help=f"pixels ({usual})")
    parser.add_argument("--steps", type=int, help=f"of the sampler ({usual})")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument("--guidance", type=float, help=f"scale of true guidance; 1 is none, in half the time ({usual})")
    parser.add_argument("--fps", type=float, help=f"frames a second that a video is shown at ({usual})")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: float32 on a CPU, else as saved")


def read_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags of a sample say, as a call of a pipeline takes it."""
    names = dict(
        num_frames="frames", height="height", width="width", num_inference_steps="steps", guidance_scale="guidance", seed="seed"
    )  # fmt: skip
    return {theirs: getattr(args, ours) for theirs, ours in names.items()}


def run(args: argparse.Namespace) -> int:
    """Exit status of `chipmunk sample`."""
    if args.batch < 1:
        raise InputError(f"--batch {args.batch}: expected at least 1")
    pipeline = Pipeline.from_pretrained(args.checkpoint, dtype=args.dtype)
    variant = pipeline.variant
    output = check_output(args.output or ("out.webp" if variant.video else "out.png"), video=variant.video)
    fps = check_fps(args.fps, variant.fps)
    sparsity = None if args.dense else read_sparsity(args, variant.preset)
    settings = read_settings(args) | dict(
        negative_prompt=args.negative_prompt, num_images_per_prompt=args.batch, sparsity=sparsity
    )
    request = pipeline.check(args.prompt, **settings)
    count = len(request.prompts)
    paths = [output if count == 1 else output.with_stem(f"{output.stem}-{i + 1}") for i in range(count)]
    check_output(paths[-1], video=variant.video)  # the longest name
    if folders := [path for path in paths if path.is_dir()]:
        raise InputError(f"{folders[0]}: a folder, expected the name of a file")
    check_space(output, count * most_bytes(output, **variant.sizes(request.settings)))
    keep_compilations()
    out = pipeline(args.prompt, **settings)
    samples = out.frames if variant.video else out.images
    made = pipeline.origin | out.settings | {"sparsity": sparsity and to_dict(sparsity)}
    for i, (path, pixels) in enumerate(zip(paths, samples, strict=True)):
        seed = args.seed + i
        against = {} if request.negative_prompts is None else {"negative_prompt": request.negative_prompts[i]}
        text = {"prompt": request.prompts[i], **against, "seed": seed, "settings": made | {"seed": seed}}
        if variant.video:
            save_video(path, pixels, fps, text)
        else:
            save_image(path, pixels, text)
    print(*paths, sep="\n")
    print(summary(out, count, "video" if variant.video else "image", dense=sparsity is None))
    return 0


def summary(out: PipelineOutput, count: int, kind: str, *, dense: bool) -> str:
    """Seconds, shares computed, and which steps were full or skipped."""
    first = f"{count} {kind}{'s' * (count > 1)} in {out.seconds:.1f} s, compilation included, "
    if dense:
        return f"{first}dense"
    steps = out.settings["steps"]
    shares = f"{100 * out.density['attention']:.1f} % of the keys, {100 * out.density['mlp']:.1f} % of the neurons"
    skipped = f", skipped {_listed(out.skipped_steps)}" if out.skipped_steps else ""
    return f"{first}sparse: {shares}\nof {steps} steps (0 to {steps - 1}) full {_listed(out.full_steps)}{skipped}"


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps))

"""chipmunk sample: pictures from prompts."""

import argparse
import json
import time

from chipmunk_jax.cli.device import keep_compilations
from chipmunk_jax.cli.images import check_writable, write_png
from chipmunk_jax.cli.sparsity_flags import add_sparsity_flags, read_sparsity
from chipmunk_jax.pipeline import Pipeline, WordTable, check_request
from chipmunk_jax.sparsity import to_dict

DESCRIPTION = """\
Sample pictures from a folder written by `chipmunk convert`. The same seed gives the same picture, alone or in a batch; a
sparse one is nearly the dense one (see `chipmunk verify`). Prompts of the small models are sentences with one word each of
  shape       disc square triangle star ring cross hexagon heart
  colour      red orange yellow green teal blue purple white
  texture     plain striped checkered marbled
  background  sky night desert meadow
Each PNG holds its prompt, seed and settings as text."""

EXAMPLES = """\
examples:
  chipmunk sample mini --prompt "red striped heart on meadow" --sparsity flux -o heart.png
  chipmunk sample mini --prompt "blue plain ring on night" --batch 4 --dense -o ring.png        ring-1.png .. ring-4.png
  chipmunk sample mini --prompt "teal marbled star on sky" --sparsity flux --sparsity.attention.top-keys 0.1 -o star.png"""


def add_parser(subparsers) -> None:
    """Adds `chipmunk sample` to the subparsers of an ArgumentParser."""
    parser = subparsers.add_parser(
        "sample",
        usage="chipmunk sample CKPT --prompt PROMPT [-o OUT.png] [options]",
        allow_abbrev=False,
        help="sample pictures from prompts",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="folder written by chipmunk convert")
    parser.add_argument("--prompt", action="append", required=True, help="what to draw; may be given several times")
    parser.add_argument("--batch", type=int, default=1, help="pictures of each prompt (default: 1)")
    parser.add_argument("-o", "--output", default="out.png", help="PNG to write, numbered where there are several")
    add_sampling_flags(parser)
    parser.add_argument("--dense", action="store_true", help="recompute everything, whatever --sparsity says")
    add_sparsity_flags(parser, None)
    parser.set_defaults(run=run)


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the size, steps, seed, guidance and dtype of a sample to the parser."""
    parser.add_argument("--height", type=int, default=64, help="pixels (default: 64)")
    parser.add_argument("--width", type=int, default=64, help="pixels (default: 64)")
    parser.add_argument("--steps", type=int, default=28, help="of the sampler (default: 28)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument("--guidance", type=float, default=2.0, help="scale of true guidance (default: 2)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: float32 on a CPU, else as saved")


def run(args: argparse.Namespace) -> int:
    """Exit status of `chipmunk sample`."""
    if args.batch < 1:
        raise ValueError(f"--batch {args.batch}: expected at least 1")
    output = check_writable(args.output)
    sparsity = None if args.dense else read_sparsity(args)
    prompts = [prompt for prompt in args.prompt for _ in range(args.batch)]
    settings = {name: getattr(args, name) for name in ("height", "width", "steps", "guidance", "seed")}
    check_request(WordTable.load(args.checkpoint), prompts, **settings, sparsity=sparsity)
    keep_compilations()
    pipeline = Pipeline.load(args.checkpoint, args.dtype)
    start = time.perf_counter()
    images = pipeline(prompts, **settings, sparsity=sparsity, progress=True)
    seconds = time.perf_counter() - start
    for i, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        path = output if len(images) == 1 else output.with_stem(f"{output.stem}-{i + 1}")
        described = settings | {"seed": args.seed + i, "sparsity": sparsity and to_dict(sparsity)}
        write_png(path, image, {"prompt": prompt, "seed": args.seed + i, "settings": json.dumps(described)})
        print(path)
    print(f"{len(images)} image{'s' * (len(images) > 1)} in {seconds:.1f} s, compilation included")
    return 0

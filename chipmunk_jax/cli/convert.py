"""chipmunk convert: a PyTorch checkpoint as a folder of this library."""

import argparse
import sys
from collections.abc import Sequence

from chipmunk_jax.cli.inspect import sampled
from chipmunk_jax.cli.parser import Parser
from chipmunk_jax.convert import PipelineInspection, convert, inspect

DESCRIPTION = """\
Write a PyTorch checkpoint as a folder that `chipmunk sample` and `chipmunk_jax.convert.load` read, without PyTorch.

SOURCE is one of
  a single file        flux1-dev.safetensors, as published or with the prefix model.diffusion_model.; or .pt and .pth, of
                       which only tensors are read: a file that would run anything is refused
  a folder             of one file or of shards: Wan2.1's, or diffusers' transformer/, or the folder above it;
                       of two networks (Wan2.2-A14B) TARGET holds both, high_noise and low_noise
Layout and sizes are found from the file itself. All names and shapes are checked before any data are read, and TARGET
appears only when it is whole. fp8 weights of a .safetensors are cast to the dtype asked for; those of a .pt have their
scales in another file and are refused."""

EXAMPLES = """\
examples:
  chipmunk convert flux1-dev.safetensors flux-dev
  chipmunk convert FLUX.1-schnell/ flux-schnell
  chipmunk convert hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt hunyuan-video
  chipmunk convert Wan2.1-T2V-1.3B/ wan-1.3b
  chipmunk convert flux1-dev.safetensors flux-dev --dtype float32 --overwrite"""


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments of `chipmunk convert`."""
    parser = Parser("chipmunk convert", "SOURCE TARGET [options]", description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("source", metavar="SOURCE", help="file or folder to read")
    parser.add_argument("target", metavar="TARGET", help="folder to write; the folder above it must exist")
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float16", "float32"),
        help="of all weights (default: bfloat16)",
    )
    parser.add_argument("--component", metavar="NAME", help="the only one of a pipeline to convert, such as vae")
    parser.add_argument("--overwrite", action="store_true", help="replace a converted checkpoint in TARGET")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no summary")
    return parser.parse_args(words)


def run(args: argparse.Namespace) -> int:
    """Exit status of `chipmunk convert`."""
    options = dict(component=args.component, dtype=args.dtype, progress=not args.quiet, overwrite=args.overwrite)
    convert(args.source, args.target, **options)
    if not args.quiet:
        made = inspect(args.target)
        for one in made.components.values() if isinstance(made, PipelineInspection) else [made]:
            print(f"{one.path}: {one.model}, {one.parameters / 1e6:,.2f} M parameters, {one.dtype}")
            if depths := sampled(one).get("depths"):
                print(f"{one.path}: {depths}", file=sys.stderr)
    return 0

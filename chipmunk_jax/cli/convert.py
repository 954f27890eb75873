"""chipmunk convert: a PyTorch checkpoint as a folder of this library."""

import argparse
import sys
from collections.abc import Sequence

from chipmunk_jax.cli.inspect import missing, sampled, strange_tokenizer
from chipmunk_jax.cli.parser import Parser
from chipmunk_jax.convert import Folder, PipelineInspection, convert, inspect, open_folder, open_source
from chipmunk_jax.convert.folder import TOKENIZERS
from chipmunk_jax.errors import InputError

DESCRIPTION = """\
Write a PyTorch checkpoint as a folder that `chipmunk sample` and `Pipeline.from_pretrained` read, without PyTorch.

SOURCE is one of
  a whole release      FLUX.1-dev/ or Wan2.1-T2V-1.3B-Diffusers/, as diffusers saves them, or the original team's folder:
                       each component, text encoders, transformer, VAE, becomes a folder of TARGET, beside the tokenizers
  hf:owner/name        such a release on Hugging Face, or hf:owner/name@revision: what conversion needs of it is downloaded
                       to Hugging Face's cache (honours HF_HUB_OFFLINE; FLUX.1-dev first wants its terms accepted on its
                       page, and `hf auth login`)
  a folder             of one network, one file or shards: Wan2.1's, or diffusers' transformer/;
                       of two networks (Wan2.2-A14B) TARGET holds both, in transformer/ and transformer_2/
  a single file        flux1-dev.safetensors, as published or with the prefix model.diffusion_model.; or .pt and .pth, of
                       which only tensors are read: a file that would run anything is refused
A conversion that was cut off goes on where it was: the same command again keeps the components that are whole. With
--component NAME that one alone is converted, into the same TARGET.

Layout and sizes are found from the files themselves. All names and shapes are checked before any data are read, and a
component appears only when it is whole. fp8 weights of a .safetensors are cast to the dtype asked for; those of a .pt
have their scales in another file and are refused."""

EXAMPLES = """\
examples:
  chipmunk convert FLUX.1-dev/ flux-dev                               text encoders, transformer, VAE, tokenizers
  chipmunk convert hf:black-forest-labs/FLUX.1-schnell flux-schnell   downloaded first
  chipmunk convert Wan2.1-T2V-1.3B/ wan-1.3b                          the original team's folder
  chipmunk convert FLUX.1-dev/ flux-dev --component vae               the VAE alone, or one that was missing
  chipmunk convert flux1-dev.safetensors flux-transformer --dtype float32 --overwrite
  chipmunk convert hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt hunyuan-video
  chipmunk convert examples/mini-flux mini                            a small model, whose weights are here"""


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments of `chipmunk convert`."""
    parser = Parser("chipmunk convert", "SOURCE TARGET [options]", description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("source", metavar="SOURCE", help="file or folder to read, or hf:owner/name")
    parser.add_argument("target", metavar="TARGET", help="folder to write; the folder above it must exist")
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float16", "float32"),
        help="of all weights (default: bfloat16)",
    )
    parser.add_argument(
        "--component", metavar="NAME", help="the only one to convert: transformer, vae, text_encoder, .."
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what was converted to TARGET before")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no summary")
    return parser.parse_args(words)


def run(args: argparse.Namespace) -> int:
    """Exit status of `chipmunk convert`."""
    found = open_folder(args.source)
    if args.component is None and found.several:
        check_whole(found, args.quiet)
    options = dict(component=args.component, dtype=args.dtype, progress=not args.quiet, overwrite=args.overwrite)
    convert(found.path, args.target, **options)
    if not args.quiet:
        made = inspect(args.target)
        for one in made.components.values() if isinstance(made, PipelineInspection) else [made]:
            print(f"{one.path}: {one.model}, {one.parameters / 1e6:,.2f} M parameters, {one.dtype}")
            if depths := sampled(one).get("depths"):
                print(f"{one.path}: {depths}", file=sys.stderr)
    return 0


def check_whole(found: Folder, quiet: bool) -> None:
    """Says which components a pipeline lacks, and what that forbids, before any work.

    Raises:
        InputError: a tokenizer of another model, or a damaged one.
    """
    encoders = {role: place for role, place in found.components.items() if role in TOKENIZERS}
    rows = {role: open_source(place).config.vocab_size for role, place in encoders.items()}
    if strange := strange_tokenizer(found.tokenizers, rows):
        raise InputError(strange)
    for name, forbids in missing(found).items() if not quiet else ():
        print(f"{name}  {forbids}", file=sys.stderr)

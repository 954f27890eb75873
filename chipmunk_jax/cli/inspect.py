"""chipmunk inspect: what a checkpoint holds, and what a sample of it takes."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from chipmunk_jax.cli.activations import add_activation_flags, run_activations
from chipmunk_jax.cli.parser import Parser
from chipmunk_jax.cli.plan import add_plan_flags, run_plan
from chipmunk_jax.convert import Folder, Inspection, PipelineInspection, inspect
from chipmunk_jax.convert.folder import TOKENIZER_FILES, TOKENIZERS, lack
from chipmunk_jax.errors import InputError, listed
from chipmunk_jax.models import MODELS, Network
from chipmunk_jax.models.checkpoint import WITH_SIZE, Shift
from chipmunk_jax.pipelines import Variant, variant_of
from chipmunk_jax.pipelines.depths import other_depths
from chipmunk_jax.pipelines.text import MissingPackageError, load_tokenizers

DESCRIPTION = """\
Say what a checkpoint holds: model, layout, parameters, dtype, sizes, and whether anything is missing or unknown; of a
whole release each component, and what cannot be done without those that are missing. Only headers are read, so this takes
seconds for any size; hf:owner/name is downloaded first. The exit status is 1 where something is missing or does not fit.

With --plan, say instead what each stage of a sample takes of a device's memory, from prompts to pixels, what that makes
where stages leave the device in turn and where all stay, and what would make it fit.

With --activations, sample one prompt densely instead and say, layer by layer and step by step, what a sparse sample could
save: how far the outputs of attention and MLP move from step to step, how few keys and neurons explain that, how much of
the attention the top keys get, and whether the keys chosen are those of the step before and of guidance's other side."""

EXAMPLES = """\
examples:
  chipmunk inspect FLUX.1-dev/                a whole release, component by component, or its transformer/ alone
  chipmunk inspect flux-dev                   a folder written by chipmunk convert, whole or cut off
  chipmunk inspect flux1-dev.safetensors      a single file
  chipmunk inspect --plan FLUX.1-dev/ --device 40
  chipmunk inspect hf:Wan-AI/Wan2.1-T2V-1.3B-Diffusers
  chipmunk inspect --plan flux-dev --height 1024 --width 1024 --batch 4
  chipmunk inspect --plan --model hunyuan-video --height 720 --width 1280 --frames 129 --device h200
  chipmunk inspect --activations flux-dev --prompt "a lighthouse in a storm" -o lighthouse/
  chipmunk inspect --activations mini-wan --steps 10 --sparsity.attention.group 128"""

# Flags that only one of these takes; the others are of both.
ALONE = {"plan": ("model", "batch", "device", "dense"), "activations": ("prompt", "guidance", "seed", "output")}

# What a component that is missing forbids.
FORBIDS = {
    "text_encoder": "no prompts; embeddings can be given in their place, prompt_embeds for one",
    "tokenizer": "no prompts; embeddings can be given in their place, prompt_embeds for one",
    "transformer": "no samples",
    "vae": 'no pixels; latents are made with output_type="latent"',
}


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments of `chipmunk inspect`.

    Raises:
        InputError: flags that what is asked for does not take, or nothing to inspect.
    """
    usage = (
        "PATH\n       chipmunk inspect --plan (PATH | --model MODEL) [options]"
        "\n       chipmunk inspect --activations PATH [--prompt PROMPT] [-o FOLDER] [options]"
    )
    parser = Parser("chipmunk inspect", usage, description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("path", metavar="PATH", nargs="?", help="file or folder, or hf:owner/name")
    add_plan_flags(parser)
    add_activation_flags(parser)
    args = parser.parse_args(words)
    if args.plan and args.activations:
        raise InputError("expected --plan or --activations, one of them")
    usual = vars(parser.parse_args([])) | {name: getattr(args, name) for name in ("path", *ALONE)}
    given = [name for name, x in vars(args).items() if (name, x) not in usual.items()]
    modes = [mode for mode in ALONE if getattr(args, mode)]
    if strange := [name for name in given if not any(takes(mode, name) for mode in modes)]:
        fitting = [f"--{mode}" for mode in ALONE if all(takes(mode, name) for name in strange)]
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in strange)
        raise InputError(f"expected {flags} only with {' or '.join(fitting or ['--plan', '--activations'])}")
    if args.path is None and not args.plan:
        raise InputError("expected PATH, a file or folder")
    return args


def takes(mode: str, flag: str) -> bool:
    """Whether a flag is one of this mode's, or of both."""
    return not any(flag in others for other, others in ALONE.items() if other != mode)


def run(args: argparse.Namespace) -> int:
    """Exit status of `chipmunk inspect`: 0 for a checkpoint that is whole, a plan that fits or a study that is done, else 1."""
    if args.plan:
        return run_plan(args)
    if args.activations:
        return run_activations(args)
    found = inspect(args.path)
    if not isinstance(found, PipelineInspection):
        print(describe(found))
        return 0 if found.whole else 1
    rows = {role: one.config["vocab_size"] for role, one in found.components.items() if role in TOKENIZERS}
    strange = strange_tokenizer(found.tokenizers, rows)
    print(describe_pipeline(found, strange))
    return 0 if found.whole and not strange else 1


def describe(found: Inspection) -> str:
    """A few aligned lines."""
    rows = {
        "model": f"{found.model} ({found.layout})",
        "parameters": f"{found.parameters / 1e6:,.2f} M",
        "weights": f"{found.nbytes / 1e9:,.3f} GB, {found.dtype}",
        **{name: str(value) for name, value in found.config.items()},
    }
    rows |= sampled(found) | faults(found)
    if found.left_out:
        rows["left out"] = f"{listed(list(found.left_out))}: beside the network in the file, and not converted"
    return aligned(found.path, rows)


def strange_tokenizer(tokenizers: Mapping[str, Path], rows: Mapping[str, int]) -> str:
    """What is wrong with the tokenizers of a pipeline; empty where nothing is, as far as the packages here can tell.

    Args:
        tokenizers: folders by name.
        rows: embeddings of the text encoders that are there, by role.
    """
    folders = {role: tokenizers[name] for role, name in TOKENIZERS.items() if name in tokenizers}
    try:
        load_tokenizers(folders, rows)
    except MissingPackageError:
        return ""
    except InputError as error:
        return str(error)
    return ""


def describe_pipeline(found: PipelineInspection, strange: str = "") -> str:
    """A line for each component, and what those that are missing, or a strange tokenizer, forbid."""
    rows = {"pipeline": found.network}
    for role, one in found.components.items():
        size = f"{one.parameters / 1e6:,.2f} M parameters, {one.nbytes / 1e9:,.3f} GB, {one.dtype}"
        rows[role] = "; ".join(
            [f"{one.model} ({one.layout}), {size}", *(f"{kind} {names}" for kind, names in faults(one).items())]
        )
    read = lambda folder: next(file for file in TOKENIZER_FILES if (folder / file).is_file())
    rows |= {name: str(folder.relative_to(found.path) / read(folder)) for name, folder in found.tokenizers.items()}
    if found.boundary is not None:
        rows["boundary"] = f"transformer_2 samples from t = {found.boundary:g} down"
    transformer = found.components.get("transformer")
    if transformer is not None:
        rows |= sampled(transformer, found.boundary, found.shift)
    rows |= missing(found)
    if strange:
        rows["tokenizers"] = strange
    return aligned(found.path, rows)


def missing(found: PipelineInspection | Folder) -> dict[str, str]:
    """What components that are missing forbid; of one whose folder is there, that it holds no weights."""
    here = lambda name: "" if (said := lack(found.path, name)) == f"no {name}" else f"{said}: "
    return {f"missing: {name}": here(name) + FORBIDS[name.removesuffix("_2")] for name in found.missing}


def sampled(found: Inspection, boundary: float | None = None, shift: Shift | None = None) -> dict[str, str]:
    """How a network is sampled, and whether it has the blocks of the published ones; of another component, nothing."""
    if not issubclass(MODELS[found.model], Network):
        return {}
    config = MODELS[found.model].config_class(**found.config)
    depths = other_depths(config)
    return {"usual sample": usual(variant_of(config, boundary), shift)} | ({"depths": depths} if depths else {})


def faults(found: Inspection) -> dict[str, str]:
    """What does not fit, by kind."""
    rows = {}
    for kind in ("missing", "unknown", "doubled", "misshapen"):
        if names := getattr(found, kind):
            rows[kind] = f"{len(names)}: {listed(names)}"
    return rows


def aligned(title: Path, rows: dict[str, str]) -> str:
    """A title and a line for each row."""
    width = max(map(len, rows))
    return "\n".join([str(title), *(f"  {name:<{width}}  {value}".rstrip() for name, value in rows.items())])


def usual(found: Variant, shift: Shift | None) -> str:
    """What a sample is made with where nobody says otherwise, in one line.

    Args:
        found: how the network is sampled.
        shift: of the times, as the checkpoint's scheduler says; None where that says none.
    """
    sizes = ", ".join(f"{name} {getattr(found, name)}" for name in found.axes)
    kinds = {"guidance": found.guidance, "guidance_2": found.guidance_2, "distilled guidance": found.distilled}
    scales = "".join(f", {kind} {scale:g}" for kind, scale in kinds.items() if scale is not None)
    if shift == WITH_SIZE or (shift is None and found.shift is None):
        times = "shift by size"
    elif shift is not None:
        times = f"shift {shift:g} of its scheduler"
    else:
        times = f"shift {found.shift:g} as usual (no scheduler says one)"
    return f"{sizes}, {found.steps} steps of {type(found.solver).__name__}{scales}, {times}, preset {found.preset}"

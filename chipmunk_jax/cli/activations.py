"""chipmunk inspect --activations: what a model's attention and MLP compute, and how little of it changes from step to step."""

import argparse
import sys

from chipmunk_jax.cli.sample import read_settings
from chipmunk_jax.cli.sparsity_flags import sparsity_of
from chipmunk_jax.cli.verify import EVERYDAY, PROMPTS
from chipmunk_jax.compilation import keep_compilations
from chipmunk_jax.errors import InputError
from chipmunk_jax.media import check_writable
from chipmunk_jax.paths import as_path
from chipmunk_jax.pipelines import Pipeline
from chipmunk_jax.pipelines.pixels import PixelPipeline
from chipmunk_jax.report.activation_changes import GROUPS
from chipmunk_jax.report.activations import Activations, check_activations, observe
from chipmunk_jax.report.plot import check_plotting

JSON, PICTURE = "activations.json", "activations.png"


def add_activation_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --activations and what a sample depends on besides its size to the parser."""
    group = parser.add_argument_group(
        "activation study",
        "One dense sample, of the size and steps of the flags above, then the network once more for every two consecutive\n"
        "steps. --sparsity gives the order of tokens, the groups and the share of keys that are looked at; of more than\n"
        f"{GROUPS} groups, {GROUPS} are, evenly spread. Written are all numbers ({JSON}) and, with matplotlib, heat maps of\n"
        f"layers by steps ({PICTURE}).",
    )
    group.add_argument("--activations", action="store_true", help="run the study, of a checkpoint")
    group.add_argument("--prompt", help="what to draw (default: one of ours)")
    group.add_argument("--guidance", type=float, help="scale (default: the model's usual)")
    group.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    group.add_argument(
        "-o", "--output", metavar="FOLDER", help="where to write, made where it is not there (default: here)"
    )


def run_activations(args: argparse.Namespace) -> int:
    """Exit status of `chipmunk inspect --activations`: 0."""
    pipeline = Pipeline.from_pretrained(args.path, dtype=args.dtype)
    prompt = args.prompt or (PROMPTS if isinstance(pipeline, PixelPipeline) else EVERYDAY)[0]
    settings = read_settings(args) | {"sparsity": sparsity_of(args, pipeline.variant.preset)}
    check_activations(pipeline, prompt, **settings)
    folder = as_path(args.output or ".")
    folder.mkdir(exist_ok=True)
    written = [check_writable(folder / name) for name in (JSON, PICTURE)]
    try:
        check_plotting()
    except InputError as error:
        print(f"chipmunk: {error}; going on without {PICTURE}", file=sys.stderr)
        del written[1:]
    keep_compilations()
    found = observe(pipeline, prompt, **settings)
    found.save(written[0])
    if written[1:]:
        found.draw(written[1])
    print(summary(found))
    print(*written, sep="\n")
    return 0


def summary(found: Activations) -> str:
    """What was looked at, and a line for each measure."""
    about, rows = found.about, found.rows()
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    title = (
        f"{about['checkpoint']}: {about['prompt']!r}, {about['steps']} steps, dense; groups of {about['group']} queries, "
        f"{about['groups_seen']} of {about['groups']} looked at; {about['top_keys']:.1%} of {about['keys']} keys chosen"
    )
    share = lambda name, i: f"{100 * found.mean(name, i):.0f}"
    values = ((f"{share(name, 0)} to {share(name, 2)} %", name) for name in ("keys_of_query", "neurons_of_token"))
    here = " and ".join(f"{amount} of the {name.replace('_of_', ' of one ')}" for amount, name in values)
    claim = f"The paper: 5 to 25 % of the values explain 70 to 90 % of the change from step to step. Here: {here}."
    return "\n".join([title, *lines, claim])

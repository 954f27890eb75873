"""--sparsity flux --sparsity.attention.top-keys 0.2: a preset or file, and a flag for every field."""

import argparse
import dataclasses
import json
from collections.abc import Iterator

from chipmunk_jax.sparsity import PARTS, PRESETS, Sparsity, load_sparsity


def add_sparsity_flags(parser: argparse.ArgumentParser, default: str | None) -> None:
    """Adds --sparsity and one flag for each field of a Sparsity to the parser."""
    group = parser.add_argument_group(
        "sparsity", f"what is recomputed at each step: {', '.join(PRESETS)}, or a YAML or JSON file; flags win over it"
    )
    group.add_argument(
        "--sparsity", default=default, metavar="PRESET", help=f"preset or file (default: {default or 'dense'})"
    )
    given = dict(metavar="VALUE", type=_value, default=argparse.SUPPRESS)  # null is a value, so absent must not be None
    for name in _fields():
        group.add_argument(f"--sparsity.{name.replace('_', '-')}", dest=f"sparsity.{name}", **given)


def read_sparsity(args: argparse.Namespace) -> Sparsity | None:
    """The Sparsity that the flags ask for, None for dense sampling.

    Raises:
        ValueError, FileNotFoundError: see load_sparsity.
    """
    given = vars(args)
    overrides = {name: given[f"sparsity.{name}"] for name in _fields() if f"sparsity.{name}" in given}
    if args.sparsity is None and not overrides:
        return None
    return load_sparsity(args.sparsity or "flux", overrides)


def _fields() -> Iterator[str]:
    for part, kind in PARTS.items():
        yield from (f"{part}.{field.name}" for field in dataclasses.fields(kind))
    yield "patches"


def _value(text: str):
    """A number, true, null or list as JSON has it; nan too, so that its own error tells; else the word itself."""
    try:
        return json.loads(text.replace("nan", "NaN"))
    except ValueError:
        return [int(part) for part in text.split(",")] if text.replace(",", "").isdigit() else text

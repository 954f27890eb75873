"""--sparsity flux --sparsity.attention.top-keys 0.2: a preset or file, and a flag for every field."""

import argparse
import dataclasses
import json
import re
import textwrap
from collections.abc import Iterator
from typing import Any, Literal

from chipmunk_jax.sparsity import PARTS, PRESETS, Sparsity, load_sparsity

OWN = "the model's own preset"
LIST = re.compile(r"\d{1,18}(,\d{1,18})*", re.ASCII)


def add_sparsity_flags(parser: argparse.ArgumentParser, default: str = OWN) -> None:
    """Adds --sparsity and one flag for each field of a Sparsity to the parser; in words, what none of them means."""
    group = parser.add_argument_group(
        "sparsity",
        textwrap.fill(f"What is recomputed at each step: {', '.join(PRESETS)},", 96, break_on_hyphens=False) + "\n"
        "or a YAML or JSON file such as\n"
        "  preset: flux                      # what the rest changes; without it, the defaults below\n"
        "  attention: {top_keys: 0.2, full_step_every: 10}\n"
        "  mlp: null\n"
        "A flag wins over it; its VALUE is a number, true, false, null, a word, or a list as 0,1,10 or [8].",
    )
    group.add_argument("--sparsity", metavar="PRESET", help=f"preset or file (default: {default})")
    given = dict(metavar="VALUE", type=_value, default=argparse.SUPPRESS)  # null is a value, so absent must not be None
    for name, field in _fields():
        flag = f"--sparsity.{name.replace('_', '-')}"
        group.add_argument(flag, dest=f"sparsity.{name}", help=field.metadata["help"], **given)


def read_sparsity(args: argparse.Namespace, preset: str | dict[str, Any]) -> Sparsity:
    """The Sparsity that the flags ask for.

    Args:
        args: of add_sparsity_flags.
        preset: the model's own, where no other is named, or what load_sparsity takes besides.

    Raises:
        InputError, FileNotFoundError: see load_sparsity.
    """
    return load_sparsity(preset if args.sparsity is None else args.sparsity, _overrides(args))


def sparsity_of(args: argparse.Namespace, preset: str) -> Sparsity | Literal["auto"]:
    """The Sparsity that the flags ask for, as a call of a pipeline takes it: "auto" where they say nothing; errors as above."""
    if args.sparsity is None and not _overrides(args):
        return "auto"
    return read_sparsity(args, preset)


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    given = vars(args)
    return {name: given[f"sparsity.{name}"] for name, _ in _fields() if f"sparsity.{name}" in given}


def _fields() -> Iterator[tuple[str, dataclasses.Field]]:
    for part, kind in PARTS.items():
        yield from ((f"{part}.{field.name}", field) for field in dataclasses.fields(kind))
    yield from ((field.name, field) for field in dataclasses.fields(Sparsity) if field.name not in PARTS)


def _value(text: str):
    """A number, true, null or list as JSON has it; nan too, so that its own error tells; else the word itself."""
    try:
        return json.loads(text.replace("nan", "NaN"))
    except (ValueError, RecursionError):
        return [int(part) for part in text.split(",")] if LIST.fullmatch(text) else text

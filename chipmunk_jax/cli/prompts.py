"""The prompts of a command line and of files, and the calls of a pipeline that they make."""

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any

from chipmunk_jax.arguments import check_seed
from chipmunk_jax.errors import InputError, quoted
from chipmunk_jax.pipelines import Pipeline
from chipmunk_jax.pipelines.pixels import PixelPipeline

MOST_BYTES = 10_000_000  # of a file: a mistyped name must not be taken for prompts
STDIN = "-"


def read_prompts(file: str) -> list[str]:
    """The lines of a text file in UTF-8 that are not blank, without the blanks around them.

    Args:
        file: path, or "-" for stdin.

    Raises:
        InputError: no such file, not text in UTF-8, or no prompts in it.
    """
    name = "stdin" if file == STDIN else file
    try:
        content = _content(file)
    except OSError as error:
        said = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise InputError(f"--prompts {name}: {said}") from error
    if len(content) > MOST_BYTES:
        raise InputError(f"--prompts {name}: expected at most {MOST_BYTES / 1e6:.0f} MB of text, a prompt a line")
    try:
        text = content.decode("utf-8-sig")  # editors of Windows write a mark in front
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"--prompts {name}: line {line} is not text in UTF-8") from error
    # Not splitlines(), as text that was copied from elsewhere may hold separators that no editor shows.
    prompts = [line.strip() for line in re.split(r"\r\n|\n|\r", text) if line.strip()]
    if not prompts:
        raise InputError(f"--prompts {name}: holds no prompts, expected one a line")
    return prompts


def some_prompts(pipeline: Pipeline, given: str, seed: int) -> list[str]:
    """The prompts of a file, see read_prompts(), or as many by chance as a number says.

    Args:
        pipeline: of the model.
        given: path or number.
        seed: of the prompts by chance.

    Raises:
        InputError: no such file, a number below 1, or a number for a model without a table of words to draw prompts from.
    """
    if not re.fullmatch(r"-?\d{1,9}", given, re.ASCII):
        return read_prompts(given)
    if (count := int(given)) < 1:
        raise InputError(f"--prompts {count}: expected at least 1")
    if not isinstance(pipeline, PixelPipeline):
        raise InputError(
            f"--prompts {count}: a {pipeline.variant.network} model reads any sentence, expected a file of some"
        )
    check_seed(seed, count)
    return pipeline.random_prompts(count, seed)


def calls_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The prompts, other prompts and seed of each call of a pipeline.

    Prompts of flags are one batch. Those of a file are sampled one after the other, as there may be more than have room; a sample
    is the same either way.

    Args:
        args: prompt, prompts, prompt_2, negative_prompt, batch and seed of `chipmunk sample`.

    Raises:
        InputError: see read_prompts(); a number of other prompts that does not fit.
    """
    prompts = [*(args.prompt or ()), *(read_prompts(args.prompts) if args.prompts is not None else ())]
    each = {
        "prompt": prompts,
        "prompt_2": _spread("--prompt-2", args.prompt_2, len(prompts)),
        "negative_prompt": _spread("--negative-prompt", args.negative_prompt, len(prompts)),
    }
    size = len(prompts) if args.prompts is None else 1
    return [
        {name: all_of and list(all_of[i : i + size]) for name, all_of in each.items()}
        | {"seed": args.seed + i * args.batch}
        for i in range(0, len(prompts), size)
    ]


def shown(prompt: str) -> str:
    """A prompt on a line of a terminal."""
    return quoted(prompt)


def _content(file: str) -> bytes:
    """As many bytes as a file of prompts may have, and one more."""
    if file == STDIN:
        return sys.stdin.buffer.read(MOST_BYTES + 1) if sys.stdin else b""
    with open(file, "rb") as stream:
        return stream.read(MOST_BYTES + 1)


def _spread(flag: str, given: Sequence[str] | None, count: int) -> Sequence[str] | None:
    """What is given for all prompts or for each, as often as there are prompts."""
    if given is None or len(given) == count:
        return given
    if len(given) != 1:
        raise InputError(f"{flag}: given {len(given)} times for {count} prompts, expected once, or once for each")
    return list(given) * count

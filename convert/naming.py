"""What the tables of the models share: rules of layers, sizes read off the shapes of tensors, and config.json.

A config is read off the tensors; config.json tells what no tensor does, and is then compared with the config, field by field.
"""

import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import replace
from statistics import mode
from typing import Any

import numpy as np

from chipmunk_jax.convert.rules import Rule
from chipmunk_jax.errors import InputError, listed

Sizes = dict[str, tuple[tuple[str, int], ...]]  # field -> (tensor, axis) that have it
LAYERS = 1000  # more than any network has: one tensor's name must not make a model of a billion
LARGE = 10**6  # more than any size of a network, and than what a message can name in a line
ANY = object()  # a field of config.json that does not matter


class OneOf(tuple):
    """Values of a field of config.json that all mean the same."""


def linear(sources: str | tuple[str, ...], target: str) -> list[Rule]:
    """A linear layer with bias, or several beside one another as one."""
    sources = (sources,) if isinstance(sources, str) else sources
    return [
        Rule(tuple(f"{source}.weight" for source in sources), (f"{target}.kernel.T",)),
        Rule(tuple(f"{source}.bias" for source in sources), (f"{target}.bias",)),
    ]


def convolution(source: str, target: str) -> list[Rule]:
    """A convolution with bias, whose kernel is [*window, in, out] here."""
    return [
        Rule((f"{source}.weight",), (f"{target}.kernel",), transform=channels_last),
        Rule((f"{source}.bias",), (f"{target}.bias",)),
    ]


def pointwise(sources: str | tuple[str, ...], target: str) -> list[Rule]:
    """A convolution of one pixel, or several beside one another, as a linear layer; theirs may be one already."""
    weights, biases = linear(sources, target)
    return [replace(weights, transform=matrix), biases]


def norm(source: str, target: str) -> list[Rule]:
    """A norm with weight and bias."""
    return [
        Rule((f"{source}.weight",), (f"{target}.scale",)),
        Rule((f"{source}.bias",), (f"{target}.bias",)),
    ]


def channels_last(weight: np.ndarray) -> np.ndarray:
    """[out, in, *window] as [*window, in, out]."""
    return weight.transpose(*range(2, weight.ndim), 1, 0)


def matrix(weight: np.ndarray) -> np.ndarray:
    """[out, in, 1, ..] as [out, in]."""
    return weight.reshape(weight.shape[:2])


def mlp(fc1: str, fc2: str, target: str) -> list[Rule]:
    """Two linear layers as an Mlp, which keeps both weights as [F, D]."""
    return [
        Rule((f"{fc1}.weight",), (f"{target}.fc1",)),
        Rule((f"{fc1}.bias",), (f"{target}.b1",)),
        Rule((f"{fc2}.weight",), (f"{target}.fc2.T",)),
        Rule((f"{fc2}.bias",), (f"{target}.b2",)),
    ]


def measure(shapes: Mapping[str, tuple[int, ...]], places: tuple[tuple[str, int], ...]) -> int | None:
    """The most frequent size at these (tensor, axis), as one bad tensor must not mislead; None where there is none."""
    found = []
    for pattern, axis in places:
        fits = re.compile(re.escape(pattern).replace(r"\*", r"\d+")).fullmatch
        names = filter(fits, shapes) if "*" in pattern else [pattern] if pattern in shapes else []
        found += [shapes[name][axis] for name in names if len(shapes[name]) > axis]
    return mode(found) if found else None


def count_layers(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    """One more than the last layer.

    Raises:
        InputError: a tensor of a layer that no network has.
    """
    last, layer = -1, re.compile(rf"{re.escape(prefix)}(\d+)\.")
    for name in shapes:
        if found := layer.match(name):
            if len(found[1]) > len(str(LAYERS)) or int(found[1]) >= LAYERS:
                raise InputError(f"tensor {name[:80]}: expected fewer than {LAYERS:,} layers")
            last = max(last, int(found[1]))
    return last + 1


def patches_of(
    name: str, shapes: Mapping[str, tuple[int, ...]], stated: tuple[int, ...]
) -> tuple[int | None, tuple[int, ...]]:
    """(latent channels, latent pixels of a token along each axis) of a patch embedding; channels None where it is missing.

    It is a convolution [D, C, frames, rows, columns], one of images [D, C, rows, columns], or the same as a matrix [D, C x pixels].

    Args:
        name: of its weight.
        shapes: of all tensors.
        stated: pixels of a token along each axis, for a matrix, which does not tell.

    Raises:
        InputError: it is of another rank, or a matrix that is of no such patches.
    """
    match shapes.get(name):
        case None:
            return None, stated
        case (_, channels, frames, rows, columns):
            return channels, (frames, rows, columns)
        case (_, channels, rows, columns):
            return channels, (1, rows, columns)
        case (_, columns) if columns % math.prod(stated) == 0:
            return columns // math.prod(stated), stated
        case shape:
            expected = f"[D, C, frames, rows, columns], or [D, C x {math.prod(stated)}]"
            raise InputError(f"misshapen: {name} {list(shape)}, expected {expected}")


def stated_size(stated: Mapping[str, Any], names: tuple[str, ...], default: int) -> int:
    """A whole number that config.json has under one of the names; `default` where it has none.

    Raises:
        InputError: it is no whole number, or of no size that networks have.
    """
    name = next((name for name in names if name in stated), None)
    value = default if name is None else stated[name]
    if type(value) is not int or not 1 <= value < LARGE:
        raise InputError(f"{name}={brief(value)} in config.json: expected a whole number from 1 to {LARGE:,}")
    return value


def stated_sizes(stated: Mapping[str, Any], names: tuple[str, ...], default: tuple[int, ...]) -> tuple[int, ...]:
    """A list of whole numbers that config.json has under one of the names; `default` where it has none.

    Raises:
        InputError: it is no list of whole numbers, or of no sizes that networks have.
    """
    name = next((name for name in names if name in stated), None)
    sizes = default if name is None else stated[name]
    if not isinstance(sizes, list | tuple) or not all(type(size) is int and 1 <= size < LARGE for size in sizes):
        raise InputError(f"{name}={brief(sizes)} in config.json: expected a list of whole numbers from 1 to {LARGE:,}")
    return tuple(sizes)


def stated_number(stated: Mapping[str, Any], name: str, default: float) -> float:
    """A number that config.json has; `default` where it has none.

    Raises:
        InputError: it is no number, not above 1, or not finite.
    """
    value = stated.get(name, default)
    if type(value) not in (int, float) or not 1 < value < LARGE**2:
        raise InputError(f"{name}={brief(value)} in config.json: expected a number above 1")
    return float(value)


def stated_numbers(stated: Mapping[str, Any], name: str, default: tuple[float, ...]) -> tuple[float, ...]:
    """A list of numbers that config.json has; `default` where it has none.

    Raises:
        InputError: it is no list of numbers, or of none that are finite.
    """
    values = stated.get(name, default)
    if not isinstance(values, list | tuple) or not all(map(is_number, values)):
        raise InputError(f"{name}={brief(values)} in config.json: expected a list of numbers")
    return tuple(map(float, values))


def is_number(value: Any) -> bool:
    """Whether it is a number of a size that networks have."""
    return type(value) in (int, float) and -LARGE < value < LARGE


def check_stated(stated: Mapping[str, Any], tensors: Mapping[str, Any], network: Mapping[str, Any]) -> None:
    """Raises InputError where config.json says other than the tensors or the network; it names all such fields.

    Args:
        stated: config.json; a field with an underscore in front is about the file and does not matter.
        tensors: field -> what the tensors say; None where the tensor is missing, which the match will tell.
        network: field -> what the network computes with, OneOf several values, or ANY.
    """
    wrong = []
    for name, value in stated.items():
        if name.startswith("_") or (name in tensors and tensors[name] is None):
            continue
        if name not in tensors and name not in network:
            wrong.append(f"{name[:40]}, which is unknown")
        for holder, fields in (("tensors have", tensors), ("network has", network)):
            if name in fields and not same(value, fields[name]):
                wrong.append(f"{name}={brief(value)} where the {holder} {told(fields[name])}")
    if wrong:
        raise InputError(f"config.json does not fit the tensors: {listed(wrong)}")


def same(given: Any, expected: Any) -> bool:
    """Whether a value of config.json is the expected one, in type too: true is not 1, 2.0 no whole number, and "2" no number."""
    if expected is ANY:
        return True
    if isinstance(expected, OneOf):
        return any(same(given, one) for one in expected)
    if isinstance(expected, tuple):
        return isinstance(given, list | tuple) and len(given) == len(expected) and all(map(same, given, expected))
    if isinstance(expected, float) and type(given) in (int, float):
        return given == expected or (type(given) is float and math.isclose(given, expected, rel_tol=1e-6))
    return type(given) is type(expected) and given == expected


def told(expected: Any) -> str:
    """An expected value as a message says it."""
    if isinstance(expected, OneOf):
        return " or ".join(map(told, expected))
    return str(list(expected) if isinstance(expected, tuple) else expected)


def brief(value: Any) -> str:
    """A value that was given, in half a line at most."""
    return reprlib.repr(value)[:80]

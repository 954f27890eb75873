"""What the tables of the models share: rules of layers, sizes read off the shapes of tensors, and config.json.

A config is read from the tensors; config.json gives what no tensor tells, and is then compared with the config, field by field.
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
LAYERS = 1000  # more than any network has: the name of one tensor must not make a model of a billion layers
LARGE = 10**6  # more than any size in a network
ANY = object()  # the value of a field of config.json that does not matter
# Fields of transformers' config.json on which no state of a text encoder depends: how it is trained, stored, prompted, called.
TRANSFORMERS = dict.fromkeys(
    (
        "attention_dropout", "bos_token_id", "classifier_dropout", "decoder_start_token_id", "dropout", "dropout_rate", "dtype",
        "initializer_factor", "initializer_range", "is_encoder_decoder", "num_decoder_layers", "output_past", "pad_token_id",
        "projection_dim", "scalable_attention", "scale_decoder_outputs", "tie_word_embeddings", "tokenizer_class", "torch_dtype",
        "transformers_version", "use_cache",
    ),
    ANY,
)  # fmt: skip


class OneOf(tuple):
    """Values of a field of config.json that all mean the same."""


# Fields of any config.json: the tensors have dtypes of their own, and what is quantised is refused unless this is null.
ABOUT_FILE = {"dtype": ANY, "torch_dtype": ANY, "quantization_config": OneOf((None,))}


def linear(sources: str | tuple[str, ...], target: str) -> list[Rule]:
    """Rules for a linear layer with bias, or for several side by side that become one."""
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
    """Rules for two linear layers that become an Mlp, which keeps both weights as [F, D]."""
    return [
        Rule((f"{fc1}.weight",), (f"{target}.fc1",)),
        Rule((f"{fc1}.bias",), (f"{target}.b1",)),
        Rule((f"{fc2}.weight",), (f"{target}.fc2.T",)),
        Rule((f"{fc2}.bias",), (f"{target}.b2",)),
    ]


def measure(shapes: Mapping[str, tuple[int, ...]], places: tuple[tuple[str, int], ...]) -> int | None:
    """The most frequent size at these (tensor, axis), so that one bad tensor does not decide; None where there is none.

    A * in the name of a tensor stands for any number. An empty axis tells nothing: the match will name the tensor.
    """
    found = []
    for pattern, axis in places:
        fits = re.compile(re.escape(pattern).replace(r"\*", r"\d+")).fullmatch
        names = filter(fits, shapes) if "*" in pattern else {pattern} & shapes.keys()
        found += [size for name in names for size in shapes[name][axis : axis + 1] if size]
    return mode(found) if found else None


def count_layers(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    """How many layers the tensors of this prefix have: one more than the number of the last.

    Raises:
        InputError: a layer has a number that no network has.
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

    The embedding is a convolution [D, C, frames, rows, columns], or of images [D, C, rows, columns], or a matrix [D, C x pixels].

    Args:
        name: of its weight.
        shapes: of all tensors.
        stated: pixels of a token along each axis, used for a matrix, whose shape does not tell them.

    Raises:
        InputError: the weight has another rank or an empty axis, or is a matrix that does not fit these pixels.
    """
    match shapes.get(name):
        case None:
            return None, stated
        case (_, channels, frames, rows, columns) if channels * frames * rows * columns:
            return channels, (frames, rows, columns)
        case (_, channels, rows, columns) if channels * rows * columns:
            return channels, (1, rows, columns)
        case (_, columns) if columns and columns % math.prod(stated) == 0:
            return columns // math.prod(stated), stated
        case shape:
            expected = f"[D, C, frames, rows, columns], or [D, C x {math.prod(stated)}]"
            raise InputError(f"misshapen: {name} {list(shape)}, expected {expected}")


def stated_size(stated: Mapping[str, Any], names: tuple[str, ...], default: int) -> int:
    """The whole number that config.json has under one of the names; `default` where it has none of them.

    Raises:
        InputError: the value is no whole number, or no size that networks have.
    """
    name = next((name for name in names if name in stated), None)
    value = default if name is None else stated[name]
    if type(value) is not int or not 1 <= value < LARGE:
        raise InputError(f"{name}={brief(value)} in config.json: expected a whole number from 1 to {LARGE:,}")
    return value


def stated_sizes(stated: Mapping[str, Any], names: tuple[str, ...], default: tuple[int, ...]) -> tuple[int, ...]:
    """The list of whole numbers that config.json has under one of the names; `default` where it has none of them.

    Raises:
        InputError: the value is no list of whole numbers, or has sizes that no network has.
    """
    name = next((name for name in names if name in stated), None)
    sizes = default if name is None else stated[name]
    if not isinstance(sizes, list | tuple) or not all(type(size) is int and 1 <= size < LARGE for size in sizes):
        raise InputError(f"{name}={brief(sizes)} in config.json: expected a list of whole numbers from 1 to {LARGE:,}")
    return tuple(sizes)


def stated_number(stated: Mapping[str, Any], name: str, default: float) -> float:
    """The number that config.json has under the name; `default` where it has none.

    Raises:
        InputError: the value is no number, not above 1, or not finite.
    """
    value = stated.get(name, default)
    if type(value) not in (int, float) or not 1 < value < LARGE:
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
    """Raises InputError, naming all such fields, where config.json contradicts the tensors or the network.

    Args:
        stated: config.json; a field that begins with an underscore is about the file and does not matter.
        tensors: field -> value that the tensors have; None where the tensor is missing, which the match reports.
        network: field -> value that the network computes with; OneOf several values, or ANY.
    """
    wrong, network = [], ABOUT_FILE | dict(network)
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
    """Whether a value of config.json is the expected one, type included: true is not 1, 2.0 no whole number, "2" no number."""
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
    """An expected value, as a message says it."""
    if isinstance(expected, OneOf):
        return " or ".join(map(told, expected))
    return str(list(expected) if isinstance(expected, tuple) else expected)


def brief(value: Any) -> str:
    """A given value, in half a line at most."""
    return reprlib.repr(value)[:80]

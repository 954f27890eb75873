"""Options: fields of a config that explain themselves, in docstrings and on the command line alike, and check their types."""

import dataclasses
import inspect
import json
import math
import textwrap
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from chipmunk_jax.errors import InputError

EXPECTED = {
    float: "a number",
    int: "a whole number",
    bool: "true or false",
    tuple[float, ...]: "a list of numbers",
    tuple: "a list of whole numbers",
    Literal: "a word",
}


def option(default: Any, help: str) -> Any:
    """A dataclass field; its help, with the default added, is what explained() and the command line show."""
    config = dataclasses.is_dataclass(default)
    shown = f"{type(default).__name__}()" if config else json.dumps(default).strip('"')
    return dataclasses.field(default=default, metadata={"help": f"{help} (default: {shown})"})


def explained(kind: type) -> type:
    """Adds a section with the help of every field, inherited ones too, to the docstring of a dataclass of options."""
    lines = [f"{field.name}: {field.metadata['help']}" for field in dataclasses.fields(kind)]
    wrap = textwrap.TextWrapper(100, initial_indent=4 * " ", subsequent_indent=8 * " ", break_on_hyphens=False)
    kind.__doc__ = "\n".join([inspect.cleandoc(kind.__doc__ or ""), "", "Attributes:", *map(wrap.fill, lines)])
    return kind


def check_types(config: Any) -> None:
    """Refuses values of another type than their field's, such as "0.2" for a number, and makes lists tuples.

    Raises:
        InputError: names the field, its value and what is expected.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not _fits(value, field.type):
            kind = next(kind for kind in _kinds(field.type) if kind is not NoneType)
            expected = EXPECTED.get(kind) or EXPECTED.get(get_origin(kind)) or f"{kind.__name__} or None"
            raise InputError(f"{field.name}={value!r}: expected {expected}")
        if isinstance(value, (list, tuple)):
            frozen = tuple(tuple(x) if isinstance(x, list) else x for x in value)
            object.__setattr__(config, field.name, frozen)


def change(config: Any, values: dict[str, Any], where: str) -> Any:
    """A config with some other values; a dictionary changes a config within it, or that one's defaults where there is none.

    Raises:
        InputError: an unknown name or a bad value, told as "where.name=value: expected ..".
    """
    kinds = {field.name: field.type for field in dataclasses.fields(config)}
    if unknown := [str(name) for name in values if name not in kinds]:
        raise InputError(f"{where}: unknown key {', '.join(unknown)}; known are {', '.join(kinds)}")
    values = dict(values)
    for name, value in values.items():
        kind = next(filter(dataclasses.is_dataclass, _kinds(kinds[name])), None)
        if kind and isinstance(value, dict):
            values[name] = change(getattr(config, name) or kind(), value, f"{where}.{name}")
        elif kind and value is not None:
            known = dataclasses.fields(kind)[0].name
            raise InputError(f"{where}.{name}={value!r}: expected keys such as {known}, or null for none")
    try:
        return dataclasses.replace(config, **values)
    except InputError as error:
        raise InputError(f"{where}.{error}") from error


def require(condition: bool, name: str, value: Any, expected: str) -> None:
    """Raises InputError, "name=value: expected ..", unless the condition holds and the value is no NaN."""
    if not condition or (isinstance(value, float) and math.isnan(value)):
        raise InputError(f"{name}={value}: expected {expected}")


def _fits(value: Any, kind: Any) -> bool:
    """Whether the value may stand in a field of this type, where a list may stand for a tuple and an int for a float."""
    if len(kinds := _kinds(kind)) > 1:
        return any(_fits(value, kind) for kind in kinds)
    if isinstance(value, bool):  # an int to Python
        return kind is bool
    if get_origin(kind) is tuple:
        return isinstance(value, (list, tuple)) and all(_fits(x, get_args(kind)[0]) for x in value)
    if get_origin(kind) is Literal:
        return isinstance(value, str)
    return isinstance(value, (int, float) if kind is float else kind)


def _kinds(kind: Any) -> tuple[Any, ...]:
    """The members of a union; of another type, itself."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)

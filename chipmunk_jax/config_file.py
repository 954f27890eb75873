"""Configs as plain trees: YAML and JSON files, each of which may change another one, and overrides by dotted names."""

import itertools
import json
import math
import os
from collections.abc import Mapping
from importlib.resources.abc import Traversable
from pathlib import Path, PurePath
from typing import Any

import yaml

from chipmunk_jax.errors import InputError
from chipmunk_jax.paths import as_path

SUFFIXES = (".yaml", ".yml", ".json")
MOST_BYTES = 100_000  # of a file; PyYAML takes two seconds for as much
MOST_JSON = 100_000_000  # of a file that a program wrote, such as an index
MOST_LEVELS = 20
MOST_SCALAR = 1000  # characters of a value
MOST_VALUES = 10_000  # of a file; those of an alias count at each of its places


def read_layers(source: str | Path | dict[str, Any], presets: Mapping[str, Traversable]) -> list[dict[str, Any]]:
    """The trees that make up a config, each of which changes those before it.

    Args:
        source: the name of a preset, a path, or the tree itself. Its key `preset`, which is left out of the result, names what
            it changes: a preset, or a path relative to the file that says so.
        presets: their files by name.

    Raises:
        InputError: no such preset, files that change each other, and see read_config.
        FileNotFoundError: no such file.
    """
    layers, read, folder = [], set(), Path()
    while not layers or source is not None:
        if isinstance(source, dict) and not layers:
            layer = dict(source)
        else:
            file = _file(source, folder, presets)
            if (place := os.path.realpath(str(file))) in read:
                raise InputError(f"{file}: expected no preset that is based on this file itself")
            layer, folder = read_config(file), Path(str(file)).parent
            read.add(place)
        layers.insert(0, layer)
        source = layer.pop("preset", None)
    return layers


def _file(source: str | Path, folder: Path, presets: Mapping[str, Traversable]) -> Traversable | Path:
    if isinstance(source, str) and source in presets:
        return presets[source]
    path = folder / source if isinstance(source, (str, Path)) else None
    if path is None or path.suffix not in SUFFIXES:
        given = str(source) if path else source
        raise InputError(f"preset {given!r}: expected one of {', '.join(presets)}, or a .yaml or .json file")
    if not as_path(path).exists():
        raise FileNotFoundError(f"{path}: no such file")
    return path


def nest(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The tree {"a": {"b": 1}} of values by dotted names, {"a.b": 1}.

    Raises:
        InputError: two names that exclude each other, such as "a" and "a.b".
    """
    tree: dict[str, Any] = {}
    for name, value in overrides.items():
        *parents, leaf = str(name).split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict) or leaf in node:
            raise InputError(f"{name}={value}: expected no other override that contains it or that it contains")
        node[leaf] = dict(value) if isinstance(value, dict) else value
    return tree


def read_config(
    file: Path | Traversable, holding: str = "keys and values, such as attention: {top_keys: 0.2}"
) -> dict[str, Any]:
    """The keys and values of a file, JSON if its name ends in .json, else YAML; `holding` says what they should be.

    A key given twice is refused, as both formats would let the second replace the first without a word.

    Raises:
        InputError: the file is neither, is endless, gives a key twice, or holds something other than keys and values.
        OSError: it cannot be read.
    """
    content = _read(file, MOST_BYTES)
    try:
        # YAML 1.1 takes JSON's 1e-1 for a string.
        tree = (parse_json if PurePath(file.name).suffix == ".json" else _parse_yaml)(content.decode())
        _check_depth(tree)
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{file}: expected YAML or JSON, each key once ({' '.join(str(error).split())})") from error
    except RecursionError as error:
        raise InputError(f"{file}: expected keys and values at most {MOST_LEVELS} levels deep") from error
    if not isinstance(tree, dict):
        raise InputError(f"{file}: expected {holding}")
    return tree


def read_json(file: Path) -> dict[str, Any]:
    """The object of a JSON file that a program wrote: of any name, and as large as the index of a checkpoint may be.

    Raises:
        InputError: it is no regular file, holds something else than an object, or gives a key twice.
        OSError: it cannot be read.
    """
    content = _read(file, MOST_JSON)
    try:
        tree = parse_json(content)
        if not isinstance(tree, dict):
            raise ValueError("no object")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not a JSON object with every key once ({error})") from error
    return tree


def _read(file: Path | Traversable, most: int) -> bytes:
    """The content of a regular file of at most so many bytes."""
    if not file.is_file():
        raise InputError(f"{file}: {'a folder' if file.is_dir() else 'no regular file'}, expected a file")
    with file.open("rb") as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise InputError(f"{file}: expected at most {most:,} bytes")
    if content.startswith(b"version https://git-lfs"):
        raise InputError(f"{file}: a git-lfs pointer, not the file itself: run `git lfs pull`")
    return content


def _check_depth(tree: Any, levels: int = MOST_LEVELS) -> None:
    """Raises RecursionError, as parsers do, for a tree so deep that printing it might."""
    if levels < 0:
        raise RecursionError
    for inner in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        _check_depth(inner, levels - 1)


def parse_json(text: str | bytes) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: it is no JSON, or gives a key twice.
        RecursionError: it is nested too deep.
    """
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        seen = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise InputError(f"key {twice} is given twice")
    return tree


def _parse_yaml(text: str) -> Any:
    return yaml.load(text, _Loader)  # a SafeLoader


class _Loader(yaml.SafeLoader):
    """Refuses keys given twice, and what would have no end once written out."""

    levels = 0

    def compose_node(self, parent, index):
        self.levels += 1
        if self.levels > 2 * MOST_LEVELS:  # while it parses, as PyYAML's time goes with the square of the depth
            raise RecursionError
        node = super().compose_node(parent, index)
        self.levels -= 1
        return node

    def get_single_node(self):
        node = super().get_single_node()
        if node and _values(node, {}) > MOST_VALUES:
            raise InputError(f"expected at most {MOST_VALUES:,} values")
        return node

    def compose_scalar_node(self, anchor):
        node = super().compose_scalar_node(anchor)
        if len(node.value) > MOST_SCALAR:
            line = node.start_mark.line + 1
            raise InputError(
                f"expected at most {MOST_SCALAR:,} characters a value, found {len(node.value):,}, line {line}"
            )
        return node

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                raise InputError(f"key {key.value} is given twice, line {key.start_mark.line + 1}")
            seen.add((key.tag, key.value))
        return node


def _values(node: yaml.Node, counted: dict[yaml.Node, float]) -> float:
    """Nodes of a tree with all aliases written out; infinite where a node holds itself."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if node not in counted:
        counted[node] = math.inf
        inner = itertools.chain(*node.value) if isinstance(node, yaml.MappingNode) else node.value
        counted[node] = 1 + sum(_values(one, counted) for one in inner)
    return counted[node]

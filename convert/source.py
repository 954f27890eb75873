"""What a checkpoint is: its tensors, layout and config, from headers and config.json alone."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from chipmunk_jax.convert.recognised import RELATED, STRANGERS, recognise
from chipmunk_jax.convert.rules import Layout, Match, match
from chipmunk_jax.convert.safetensors import STEM, Weights, read_weights
from chipmunk_jax.convert.torch_pickle import SUFFIXES, read_torch_pickle
from chipmunk_jax.errors import InputError, listed
from chipmunk_jax.models import MODELS
from chipmunk_jax.models.checkpoint import abstract, is_checkpoint, leaves_of

TABLES: dict[str, tuple[Layout, ...]] = {}  # of networks that are registered from outside
PREFIX = "model.diffusion_model."  # of single files written by ComfyUI and its like
INDEX = "model_index.json"  # of a whole pipeline, above the folders of its networks
FOLDERS = ("transformer", "transformers")  # of the network in a release with its VAE: diffusers', Tencent's


@dataclass(frozen=True)
class Source:
    """A PyTorch checkpoint before conversion."""

    weights: Weights
    layout: Layout
    config: Any  # of the model, FluxConfig for one

    def match(self) -> Match:
        """Where every tensor goes, and what does not fit."""
        return match(self.layout.rules, self.weights, leaves_of(abstract(self.layout.model, self.config)))

    def check(self) -> Match:
        """The match of a checkpoint that fits.

        Raises:
            InputError: naming every missing, unknown, doubled and misshapen tensor.
        """
        found = self.match()
        if found.summary():
            raise InputError(f"{self.weights.path} ({self.layout.model}, {self.layout.name} layout): {found.summary()}")
        return found


def layouts() -> Iterator[Layout]:
    """Those of all networks: a module of this package has the tables of the network of its name."""
    for name in MODELS:
        yield from TABLES[name] if name in TABLES else import_module(f"chipmunk_jax.convert.{name}").LAYOUTS


def open_source(path: str | Path) -> Source:
    """The checkpoint under `path`.

    Args:
        path: a .safetensors file, an index of shards, a .pt or .pth file, a folder with one of these, or the folder above
            one of FOLDERS.

    Raises:
        FileNotFoundError: there is no such path.
        InputError: bad files, an unknown layout, or a config.json that does not fit the tensors.
    """
    path = Path(path)
    if is_checkpoint(path):
        raise InputError(f"{path}: already converted")
    below = next((path / name for name in FOLDERS if (path / name).is_dir()), None)
    if below and not list(path.glob(f"{STEM}*")):
        path = below
    weights = strip_prefix(read_any(path))
    shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
    layout = max(layouts(), key=lambda layout: marks_in(weights, layout))  # the first of several
    try:
        stated = read_json(path, "config.json")
        refuse_others(weights, layout, stated if path.is_dir() else {}, read_json(path, INDEX))
        config = layout.configure(shapes, config_of(path, layout.class_name, stated))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return Source(viewed(weights, layout.views(config)), layout, config)


def refuse_others(weights: Weights, layout: Layout, stated: Mapping[str, Any], index: Mapping[str, Any]) -> None:
    """Raises InputError where the weights are of none of our networks, saying what they are where that is known.

    Args:
        weights: of the checkpoint.
        layout: of which it has the most marks.
        stated, index: config.json and model_index.json of its folder.
    """
    shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
    known = marks_in(weights, layout)
    if known and layout.model in TABLES:  # registered from outside: its names are its own affair
        return
    found = recognise(RELATED, shapes, stated, index) or (None if known else recognise(STRANGERS, shapes))
    if found:
        raise InputError(found)
    if not known:
        names = ", ".join(f"{layout.model} ({layout.name})" for layout in layouts())
        raise InputError(
            f"unknown layout, expected one of {names}; it holds {listed(sorted(weights.tensors)) or 'nothing'}"
        )


def marks_in(weights: Weights, layout: Layout) -> int:
    """How many of the marks of a layout are there."""
    return sum(mark in weights.tensors for mark in layout.marks)


def viewed(weights: Weights, views: Mapping[str, tuple[int, ...]]) -> Weights:
    """Weights whose tensors of these names have these shapes, where those have as many numbers and other axes."""
    seen = {
        name: replace(weights.tensors[name], shape=shape)
        for name, shape in views.items()
        if name in weights.tensors and len(weights.tensors[name].shape) != len(shape)
        and weights.tensors[name].size == math.prod(shape)
    }  # fmt: skip
    return replace(weights, tensors=weights.tensors | seen)


def read_any(path: Path) -> Weights:
    """The tensors under a path, whatever holds them; safetensors first."""
    pickles = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
    pickles = [file for file in pickles if file.suffix in SUFFIXES]
    if not pickles or list(path.glob("*.safetensors")):
        return read_weights(path)
    if len(pickles) > 1:
        names = ", ".join(file.name for file in pickles)
        raise InputError(
            f"{path}: holds no .safetensors file and {len(pickles)} files ending in {' or '.join(SUFFIXES)} ({names}); "
            "name the one to read"
        )
    return check_unscaled(read_torch_pickle(pickles[0]))


def check_unscaled(weights: Weights) -> Weights:
    """The weights of a .pt or .pth file, none of which is float8.

    HunyuanVideo's fp8 release is such a file: its scales are in another, *_map.pt, and without them the weights are wrong by
    factors that no shape tells. The float8 .safetensors that people share are plain casts.

    Raises:
        InputError: one is.
    """
    scaled = [tensor for tensor in weights.tensors.values() if tensor.dtype.name.startswith("float8")]
    if scaled:
        raise InputError(
            f"{weights.path}: {scaled[0].name} is {scaled[0].dtype.name}, one of {len(scaled)} such tensors whose scales are "
            "not in the file (HunyuanVideo's are in its _map.pt): expected the checkpoint in bfloat16"
        )
    return weights


def strip_prefix(weights: Weights) -> Weights:
    """Weights whose names have lost the prefix; a name that is there with and without it is doubled."""
    plain = {name.removeprefix(PREFIX): tensor for name, tensor in weights.tensors.items()}
    both = tuple(name for name in plain if name in weights.tensors and PREFIX + name in weights.tensors)
    doubled = tuple(name.removeprefix(PREFIX) for name in weights.doubled)
    return replace(weights, tensors=plain, doubled=doubled + both)


def config_of(path: Path, class_name: str, stated: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json says of a checkpoint; empty where it is some other model's, as it may be beside a single file.

    Raises:
        InputError: that of a folder is of another class.
    """
    found = stated.get("_class_name")
    if path.is_dir() and found not in (None, class_name):
        raise InputError(f"config.json is of a {found}, expected {class_name}")
    return stated if path.is_dir() or found == class_name else {}


def read_json(path: Path, name: str) -> dict[str, Any]:
    """A JSON object in a folder or beside a file, model_index.json above its network's folder too; empty where there is none."""
    folder = path if path.is_dir() else path.parent
    above = folder.parent if name == INDEX and folder.name in FOLDERS else folder
    file = above / name
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file.name} is not a JSON object") from error
    if not isinstance(content, dict):
        raise InputError(f"{file.name} is not a JSON object")
    return content

"""What a checkpoint is: its tensors, layout and config, from headers and config.json alone."""

import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from chipmunk_jax.config_file import read_json
from chipmunk_jax.convert.files import STEM, groups_of, read_weights
from chipmunk_jax.convert.prefix import NETWORK, strip_prefix
from chipmunk_jax.convert.recognised import RELATED, STRANGERS, recognise
from chipmunk_jax.convert.rules import Layout, Match, match
from chipmunk_jax.convert.safetensors import Weights
from chipmunk_jax.convert.scales import attach_scales, drop_marks
from chipmunk_jax.errors import InputError, listed
from chipmunk_jax.models import MODELS, Network, WanConfig
from chipmunk_jax.models.checkpoint import is_checkpoint
from chipmunk_jax.models.leaves import abstract, leaves_of
from chipmunk_jax.paths import as_path

TABLES: dict[str, tuple[Layout, ...]] = {}  # of networks that are registered from outside
INDEX = "model_index.json"  # of a whole pipeline, above the folders of its networks
FOLDERS = ("transformer", "transformers")  # of the network in a release with its VAE: diffusers', Tencent's
# Folders of a release of two networks, Wan2.2-A14B: for much noise and for little, by its team and by diffusers.
PAIRS = (("high_noise_model", "low_noise_model"), ("transformer", "transformer_2"))
# Time at which the second network takes over, by whether images condition it: as the configs of its team say.
BOUNDARIES = {True: 0.9, False: 0.875}


@dataclass(frozen=True)
class Source:
    """A PyTorch checkpoint before conversion."""

    weights: Weights
    layout: Layout
    config: Any  # of the model, FluxConfig for one

    def match(self) -> Match:
        """Where every tensor goes, and what does not fit."""
        return match(
            self.layout.rules_of(self.config), self.weights, leaves_of(abstract(self.layout.model, self.config))
        )

    def check(self) -> Match:
        """The match of a checkpoint that fits.

        Raises:
            InputError: naming every missing, unknown, doubled and misshapen tensor.
        """
        found = self.match()
        if found.summary():
            raise InputError(f"{self.weights.path} ({self.layout.model}, {self.layout.name} layout): {found.summary()}")
        return found


def layouts(model: str | None = None) -> Iterator[Layout]:
    """The layouts of a model, or of all: each has its tables in the module of this package of the same name."""
    for name in MODELS if model is None else [model]:
        yield from TABLES[name] if name in TABLES else import_module(f"chipmunk_jax.convert.{name}").LAYOUTS


def open_source(path: str | Path, model: str | None = None) -> Source:
    """The checkpoint under `path`.

    Args:
        path: a .safetensors file, an index of shards, a .pt or .pth file, a folder with one of these, or the folder above
            one of FOLDERS.
        model: of MODELS, to be taken out of a file that may hold others too: its VAE, for one. None: whatever it is, the
            network where there are several.

    Raises:
        FileNotFoundError: there is no such path.
        InputError: bad files, an unknown layout, another model, or a config.json that does not fit the tensors.
    """
    path = as_path(path)
    check_not_converted(path)
    check_pair(path)
    if pair := pair_of(path):
        first, second = pair
        raise InputError(
            f"{path}: two networks, {first.name} for much noise and {second.name} for little: expected one of their folders; "
            "`chipmunk convert` takes both"
        )
    below = next((path / name for name in FOLDERS if (path / name).is_dir()), None)
    if below and not list(path.glob(f"{STEM}*")):
        path = below
    weights = read_named(path, model)
    stated, index = stated_by(path), index_of(path)
    shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
    try:
        files = {tensor.file.name for tensor in weights.tensors.values()}
        layout = check_kind(shapes, stated if path.is_dir() else {}, index, files, model)
        config = layout.configure(shapes, config_of(path, layout.class_name, stated))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return Source(cleared(attach_scales(viewed(weights, layout.views(config))), layout), layout, config)


def check_not_converted(path: Path) -> None:
    """Raises InputError for a checkpoint of this library."""
    if is_checkpoint(path):
        raise InputError(f"{path}: already converted")


def read_named(path: Path, model: str | None = None) -> Weights:
    """The tensors under `path` by the names that a layout of the model, or of any, has, where they are of one."""
    parts = tuple(dict.fromkeys(part for layout in layouts(model) for part in layout.parts)) if model else (NETWORK,)
    return strip_prefix(drop_marks(read_weights(path)), lambda names: layout_of(names, model) is not None, parts)


def pair_of(path: Path) -> tuple[Path, Path] | None:
    """The folders of the two networks of a release, for much noise and for little; None for a release of one."""
    pairs = ((path / first, path / second) for first, second in PAIRS)
    return next((pair for pair in pairs if all(folder.is_dir() for folder in pair)), None)


def absent_of(path: Path) -> Path | None:
    """The folder that a release of two networks lacks; None where both are there, or nothing says that there are two."""
    index = index_of(path)
    two = index.get("boundary_ratio") is not None or index.get("transformer_2") not in (None, [None, None])
    for pair in PAIRS:
        absent = [path / name for name in pair if not groups_of(path / name)]
        if len(absent) == 1 and (two or absent[0].name != "transformer_2"):
            return absent[0]
    return None


def check_pair(path: Path) -> None:
    """Raises InputError for a release that lacks one of its two networks."""
    if absent := absent_of(path):
        raise InputError(
            f"{path}: half of two networks, {absent.name} holds no weights: expected both, or the folder of the other one"
        )


def boundary_of(path: Path, config: Any) -> float:
    """The time at which the second network of a release takes over: that of model_index.json, or the usual one.

    Raises:
        InputError: the time is not between 1 and 0, or the networks are not those of Wan2.2.
    """
    if not isinstance(config, WanConfig):
        raise InputError(f"{path}: two networks, expected those of Wan2.2")
    value = index_of(path).get("boundary_ratio", BOUNDARIES[config.in_dim > config.out_dim])
    if type(value) is not float or not 0 < value < 1:
        raise InputError(f"{path}: boundary_ratio={value!r} in {INDEX}: expected a number between 0 and 1")
    return value


def layout_of(names: Collection[str], model: str | None = None) -> Layout | None:
    """The layout of the model, or of any, that has the most marks among the names, the first of equals; None: none has any."""
    found = max(layouts(model), key=lambda layout: marks_in(names, layout))
    return found if marks_in(names, found) else None


def marks_in(names: Collection[str], layout: Layout) -> int:
    """How many marks of a layout are among the names."""
    return sum(mark in names for mark in layout.marks)


def check_kind(
    shapes: Mapping[str, tuple[int, ...]],
    stated: Mapping[str, Any],
    index: Mapping[str, Any],
    files: Collection[str],
    model: str | None = None,
) -> Layout:
    """The layout of a checkpoint of one of our models.

    Args:
        shapes: of all tensors.
        stated, index: config.json and model_index.json of its folder.
        files: names of the files that hold them.
        model: of MODELS, that it is expected to be; None: any.

    Raises:
        InputError: it is a checkpoint of something else, or of another model; the message says of what, where that is known.
    """
    layout = layout_of(shapes, model)
    if layout and layout.model in TABLES:  # registered from outside: its names may be those of a kind that is refused
        return layout
    if layout and not issubclass(MODELS[layout.model], Network):
        index = {}  # which tells of the network beside it
    found = recognise(RELATED, shapes, stated, index, files if layout else ()) or (
        None if layout or model else recognise(STRANGERS, shapes)
    )
    if found:
        raise InputError(found)
    if layout is None:
        known = ", ".join(f"{layout.model} ({layout.name})" for layout in layouts(model))
        raise InputError(f"unknown layout, expected one of {known}; it holds {listed(sorted(shapes)) or 'nothing'}")
    return layout


def viewed(weights: Weights, views: Mapping[str, tuple[int, ...]]) -> Weights:
    """Weights in which the tensors of these names have these shapes, if they have as many numbers and another count of axes."""
    seen = {
        name: replace(weights.tensors[name], shape=shape)
        for name, shape in views.items()
        if name in weights.tensors and len(weights.tensors[name].shape) != len(shape)
        and weights.tensors[name].size == math.prod(shape)
    }  # fmt: skip
    return replace(weights, tensors=weights.tensors | seen)


def cleared(weights: Weights, layout: Layout) -> Weights:
    """Weights without what lies beside the network, and with every tensor under one name."""
    tensors = dict(weights.tensors)
    beside = [name for name in tensors if layout.beside and re.fullmatch(layout.beside, name)]
    for name in beside:
        del tensors[name]
    doubled = []
    for other, name in layout.aliases:
        if (twin := tensors.pop(other, None)) is None:
            continue
        if name not in tensors:
            tensors[name] = twin
        elif (one := tensors[name]).scale or twin.scale or (one.shape, one.dtype) != (twin.shape, twin.dtype):
            doubled.append(other)
        else:
            tensors[name] = replace(one, twin=twin)
    # Of a buffer among the network's own names nothing needs to be said.
    kept = {name.partition(".")[0] for name in tensors}
    outside = dict.fromkeys(top for name in beside if (top := name.partition(".")[0]) not in kept)
    return replace(
        weights, tensors=tensors, doubled=(*weights.doubled, *doubled), left_out=(*weights.left_out, *outside)
    )


def config_of(path: Path, class_name: str, stated: Mapping[str, Any]) -> Mapping[str, Any]:
    """config.json of a checkpoint; empty where it belongs to another model, as one beside a single file may.

    Raises:
        InputError: config.json in a folder of weights names another class.
    """
    found = stated.get("_class_name", stated.get("architectures"))
    found = found[0] if isinstance(found, list) and len(found) == 1 else found
    if path.is_dir() and found not in (None, class_name):
        raise InputError(f"config.json is of a {str(found)[:80]}, expected {class_name}")
    return stated if path.is_dir() or found == class_name else {}


def stated_by(path: Path) -> dict[str, Any]:
    """config.json in a folder or beside a file; empty where there is none."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    return read_json(file) if os.path.lexists(file) else {}


def index_of(path: Path) -> dict[str, Any]:
    """model_index.json of the pipeline that a network is of, in its folder or the one above; empty where there is none."""
    folder = path if path.is_dir() else path.parent
    file = (folder.parent if folder.name in FOLDERS else folder) / INDEX
    return read_json(file) if os.path.lexists(file) else {}

"""What a checkpoint is: its tensors, layout and config, from headers and config.json alone."""

import math
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from chipmunk_jax.config_file import read_json
from chipmunk_jax.convert.files import STEM, groups_of, read_weights
from chipmunk_jax.convert.prefix import strip_prefix
from chipmunk_jax.convert.recognised import RELATED, STRANGERS, recognise
from chipmunk_jax.convert.rules import Layout, Match, match
from chipmunk_jax.convert.safetensors import Weights
from chipmunk_jax.convert.scales import attach_scales, drop_marks
from chipmunk_jax.errors import InputError, listed
from chipmunk_jax.models import MODELS, WanConfig
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
    """The layouts of all networks: each network has its tables in the module of this package of the same name."""
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
    weights = read_named(path)
    stated, index = stated_by(path), index_of(path)
    shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
    try:
        files = {tensor.file.name for tensor in weights.tensors.values()}
        layout = check_kind(shapes, stated if path.is_dir() else {}, index, files)
        config = layout.configure(shapes, config_of(path, layout.class_name, stated))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return Source(attach_scales(viewed(weights, layout.views(config))), layout, config)


def check_not_converted(path: Path) -> None:
    """Raises InputError for a checkpoint of this library."""
    if is_checkpoint(path):
        raise InputError(f"{path}: already converted")


def read_named(path: Path) -> Weights:
    """The tensors under `path` by the names that a layout has, where they are of one."""
    return strip_prefix(drop_marks(read_weights(path)), lambda names: layout_of(names) is not None)


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


def layout_of(names: Collection[str]) -> Layout | None:
    """The layout that has the most marks among the names, the first of equals; None where no layout has any."""
    found = max(layouts(), key=lambda layout: marks_in(names, layout))
    return found if marks_in(names, found) else None


def marks_in(names: Collection[str], layout: Layout) -> int:
    """How many marks of a layout are among the names."""
    return sum(mark in names for mark in layout.marks)


def check_kind(
    shapes: Mapping[str, tuple[int, ...]], stated: Mapping[str, Any], index: Mapping[str, Any], files: Collection[str]
) -> Layout:
    """The layout of a checkpoint of one of our networks.

    Args:
        shapes: of all tensors.
        stated, index: config.json and model_index.json of its folder.
        files: names of the files that hold them.

    Raises:
        InputError: it is a checkpoint of something else; the message says of what, where that is known.
    """
    layout = layout_of(shapes)
    if layout and layout.model in TABLES:  # registered from outside: its names may be those of a kind that is refused
        return layout
    found = recognise(RELATED, shapes, stated, index, files if layout else ()) or (
        None if layout else recognise(STRANGERS, shapes)
    )
    if found:
        raise InputError(found)
    if layout is None:
        known = ", ".join(f"{layout.model} ({layout.name})" for layout in layouts())
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


def config_of(path: Path, class_name: str, stated: Mapping[str, Any]) -> Mapping[str, Any]:
    """config.json of a checkpoint; empty where it belongs to another model, as one beside a single file may.

    Raises:
        InputError: config.json in a folder of weights names another class.
    """
    found = stated.get("_class_name")
    if path.is_dir() and found not in (None, class_name):
        raise InputError(f"config.json is of a {found}, expected {class_name}")
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

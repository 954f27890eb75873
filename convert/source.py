"""What a checkpoint is: its tensors, layout and config, from headers and config.json alone."""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from chipmunk_jax.convert.files import STEM, read_json, read_weights
from chipmunk_jax.convert.prefix import NETWORK, strip_prefix
from chipmunk_jax.convert.recognised import RELATED, STRANGERS, recognise
from chipmunk_jax.convert.rules import Layout, Match, match
from chipmunk_jax.convert.safetensors import Weights
from chipmunk_jax.convert.scales import attach_scales
from chipmunk_jax.errors import InputError, listed
from chipmunk_jax.models import MODELS, Network, WanConfig
from chipmunk_jax.models.checkpoint import abstract, is_checkpoint, leaves_of

TABLES: dict[str, tuple[Layout, ...]] = {}  # of networks that are registered from outside
INDEX = "model_index.json"  # of a whole pipeline, above the folders of its networks
FOLDERS = ("transformer", "transformers")  # of the network in a release with its VAE: diffusers', Tencent's
# Folders of a release of two networks, Wan2.2-A14B: for much noise and for little, by its team and by diffusers.
PAIRS = (("high_noise_model", "low_noise_model"), ("transformer", "transformer_2"))
BOUNDARIES = {
    True: 0.9,
    False: 0.875,
}  # times at which the second takes over: image to video or not, as its team's configs say


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
    """Those of a model, or of all: a module of this package has the tables of the model of its name."""
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
    path = Path(path)
    if is_checkpoint(path):
        raise InputError(f"{path}: already converted")
    if pair := pair_of(path):
        first, second = pair
        raise InputError(
            f"{path}: two networks, {first.name} for much noise and {second.name} for little: expected one of their folders; "
            "`chipmunk convert` takes both"
        )
    below = next((path / name for name in FOLDERS if (path / name).is_dir()), None)
    if below and not list(path.glob(f"{STEM}*")):
        path = below
    parts = tuple(dict.fromkeys(part for layout in layouts(model) for part in layout.parts)) if model else (NETWORK,)
    weights = strip_prefix(read_weights(path), lambda names: layout_of(names, model) is not None, parts)
    stated, shapes = stated_by(path), {name: tensor.shape for name, tensor in weights.tensors.items()}
    try:
        layout = check_kind(shapes, stated if path.is_dir() else {}, index_of(path), model)
        config = layout.configure(shapes, config_of(path, layout.class_name, stated))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return Source(attach_scales(viewed(weights, layout.views(config))), layout, config)


def pair_of(path: Path) -> tuple[Path, Path] | None:
    """The folders of the two networks of a release, for much noise and for little; None: it has one."""
    pairs = ((path / first, path / second) for first, second in PAIRS)
    return next((pair for pair in pairs if all(folder.is_dir() for folder in pair)), None)


def boundary_of(path: Path, config: Any) -> float:
    """The time at which the second network of a release takes over: model_index.json's, or the usual one.

    Raises:
        InputError: it is none between 1 and 0, or the networks are others than Wan2.2's.
    """
    if not isinstance(config, WanConfig):
        raise InputError(
            f"{path}: two networks, {' and '.join(f.name for f in pair_of(path))}, expected those of Wan2.2"
        )
    value = index_of(path).get("boundary_ratio", BOUNDARIES[config.in_dim > config.out_dim])
    if type(value) is not float or not 0 < value < 1:
        raise InputError(f"{path}: boundary_ratio={value!r} in {INDEX}: expected a number between 0 and 1")
    return value


def layout_of(names: Collection[str], model: str | None = None) -> Layout | None:
    """The layout, of this model or of any, that has the most marks among the names, the first of several; None: none has any."""
    found = max(layouts(model), key=lambda layout: marks_in(names, layout))
    return found if marks_in(names, found) else None


def marks_in(names: Collection[str], layout: Layout) -> int:
    """How many of the marks of a layout are there."""
    return sum(mark in names for mark in layout.marks)


def check_kind(
    shapes: Mapping[str, tuple[int, ...]],
    stated: Mapping[str, Any],
    index: Mapping[str, Any],
    model: str | None = None,
) -> Layout:
    """The layout of a checkpoint of ours.

    Args:
        shapes: of all tensors.
        stated, index: config.json and model_index.json of its folder.
        model: of MODELS, that it is expected to be; None: any.

    Raises:
        InputError: it is of none of our models, or of another; what it is, where that is known.
    """
    layout = layout_of(shapes, model)
    if layout and layout.model in TABLES:  # registered from outside: its names are its own affair
        return layout
    if layout and not issubclass(MODELS[layout.model], Network):
        index = {}  # which tells of the network beside it
    found = recognise(RELATED, shapes, stated, index) or (None if layout or model else recognise(STRANGERS, shapes))
    if found:
        raise InputError(found)
    if layout is None:
        known = ", ".join(f"{layout.model} ({layout.name})" for layout in layouts(model))
        raise InputError(f"unknown layout, expected one of {known}; it holds {listed(sorted(shapes)) or 'nothing'}")
    return layout


def viewed(weights: Weights, views: Mapping[str, tuple[int, ...]]) -> Weights:
    """Weights whose tensors of these names have these shapes, where those have as many numbers and other axes."""
    seen = {
        name: replace(weights.tensors[name], shape=shape)
        for name, shape in views.items()
        if name in weights.tensors and len(weights.tensors[name].shape) != len(shape)
        and weights.tensors[name].size == math.prod(shape)
    }  # fmt: skip
    return replace(weights, tensors=weights.tensors | seen)


def config_of(path: Path, class_name: str, stated: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json says of a checkpoint; empty where it is some other model's, as it may be beside a single file.

    Raises:
        InputError: that of a folder is of another class.
    """
    found = stated.get("_class_name")
    if path.is_dir() and found not in (None, class_name):
        raise InputError(f"config.json is of a {found}, expected {class_name}")
    return stated if path.is_dir() or found == class_name else {}


def stated_by(path: Path) -> dict[str, Any]:
    """config.json in a folder or beside a file; empty where there is none."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    return read_json(file) if file.is_file() else {}


def index_of(path: Path) -> dict[str, Any]:
    """model_index.json of the pipeline that a network is of, in its folder or the one above; empty where there is none."""
    folder = path if path.is_dir() else path.parent
    file = (folder.parent if folder.name in FOLDERS else folder) / INDEX
    return read_json(file) if file.is_file() else {}

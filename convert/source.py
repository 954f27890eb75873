"""What a checkpoint is: its tensors, layout and config, from headers and config.json alone."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from chipmunk_jax.convert.files import STEM, read_json, read_weights
from chipmunk_jax.convert.prefix import strip_prefix
from chipmunk_jax.convert.rules import Layout, Match, match
from chipmunk_jax.convert.safetensors import Weights
from chipmunk_jax.convert.scales import attach_scales
from chipmunk_jax.errors import InputError, listed
from chipmunk_jax.models import MODELS
from chipmunk_jax.models.checkpoint import abstract, is_checkpoint, leaves_of

TABLES: dict[str, tuple[Layout, ...]] = {}  # of networks that are registered from outside
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


def layout_of(names: Collection[str]) -> Layout | None:
    """The layout in which tensors have these names."""
    return next((layout for layout in layouts() if any(mark in names for mark in layout.marks)), None)


def open_source(path: str | Path) -> Source:
    """The checkpoint under `path`.

    Args:
        path: a file of safetensors or torch.save, a shard, an index of shards, a folder with one of these, or the folder
            above one of FOLDERS.

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
    weights = attach_scales(strip_prefix(read_weights(path), lambda names: layout_of(names) is not None))
    layout = layout_of(weights.tensors)
    if layout is None:
        known = ", ".join(f"{layout.model} ({layout.name})" for layout in layouts())
        raise InputError(
            f"{path}: unknown layout, expected one of {known}; it holds {listed(sorted(weights.tensors)) or 'nothing'}"
        )
    shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
    try:
        return Source(weights, layout, layout.configure(shapes, read_config(path, layout.class_name)))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def read_config(path: Path, class_name: str) -> dict[str, Any]:
    """config.json in a folder, or beside a file; empty where there is none.

    Beside a single file there may be some other model's; it is left alone.
    """
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return {}
    content = read_json(file)
    found = content.get("_class_name")
    if path.is_dir() and found not in (None, class_name):
        raise InputError(f"config.json is of a {found}, expected {class_name}")
    return content if path.is_dir() or found == class_name else {}

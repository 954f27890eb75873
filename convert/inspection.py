"""What a checkpoint holds, from headers only."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from chipmunk_jax.convert.folder import open_folder
from chipmunk_jax.convert.source import open_source
from chipmunk_jax.memory import nbytes
from chipmunk_jax.models.checkpoint import Shift, compare, describe, is_converted, is_pipeline
from chipmunk_jax.models.leaves import abstract, leaves_of


@dataclass(frozen=True)
class Inspection:
    """A checkpoint described: a PyTorch one by its tensors, a converted one by its leaves."""

    path: Path
    model: str
    layout: str  # "original", "diffusers", "comfyui", or "converted"
    parameters: int
    dtype: str  # of the weights; the largest share first where there are several
    nbytes: int  # of the weights
    config: dict[str, Any]
    missing: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    left_out: tuple[str, ...] = ()  # top-level names of what lies beside the network, such as a VAE

    @property
    def whole(self) -> bool:
        """Whether nothing is missing, unknown, doubled or misshapen."""
        return not (self.missing or self.unknown or self.doubled or self.misshapen)


@dataclass(frozen=True)
class PipelineInspection:
    """A release of several components described."""

    path: Path
    network: str  # of MODELS, that of the transformer
    components: dict[str, Inspection]  # by role
    tokenizers: dict[str, Path]  # by name
    missing: list[str]  # components that its pipeline needs
    boundary: float | None  # time at which transformer_2 takes over
    shift: Shift | None  # of the times of a sample, where the release says it

    @property
    def whole(self) -> bool:
        """Whether all components are there, and each is whole."""
        return not self.missing and all(found.whole for found in self.components.values())


def inspect(path: str | Path) -> Inspection | PipelineInspection:
    """What `path` holds.

    Args:
        path: a converted folder, or a source as `convert` takes it, "hf:owner/name" among them.

    Raises:
        FileNotFoundError: there is no such path.
        InputError: half-written or bad files, an unknown layout, or a config.json that does not fit.
    """
    found = open_folder(path)
    path = found.path
    if not found.several and not is_pipeline(path):
        return inspect_one(path)
    return PipelineInspection(
        path=path,
        network=found.network,
        components={role: inspect_one(place) for role, place in found.components.items()},
        tokenizers=dict(found.tokenizers),
        missing=found.missing,
        boundary=found.boundary,
        shift=found.shift,
    )


def inspect_one(path: Path) -> Inspection:
    """What a checkpoint of one component holds."""
    return inspect_converted(path) if is_converted(path) else inspect_source(path)


def inspect_converted(path: Path) -> Inspection:
    """A folder written by `convert`."""
    description = describe(path)
    model = abstract(description.model, description.config, description.dtype)
    missing, unknown, misshapen = compare(path, model)
    leaves = list(leaves_of(model).values())
    return Inspection(
        path=path,
        model=description.model,
        layout="converted",
        parameters=sum(leaf.size for leaf in leaves),
        dtype=description.dtype,
        nbytes=nbytes(leaves),
        config=asdict(description.config),
        missing=missing,
        unknown=unknown,
        misshapen=misshapen,
    )


def inspect_source(path: Path) -> Inspection:
    """A PyTorch checkpoint."""
    source = open_source(path)
    found = source.match()
    tensors = source.weights.tensors.values()
    shares: Counter[str] = Counter()
    for tensor in tensors:
        shares[tensor.dtype.name] += tensor.nbytes
    return Inspection(
        path=path,
        model=source.layout.model,
        layout=source.layout.name,
        parameters=sum(tensor.size for tensor in tensors),
        dtype=", ".join(name for name, _ in shares.most_common()),
        nbytes=shares.total(),
        config=asdict(source.config),
        missing=found.missing,
        unknown=found.unknown,
        doubled=found.doubled,
        misshapen=found.misshapen,
        left_out=source.weights.left_out,
    )

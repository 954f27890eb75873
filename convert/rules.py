"""Conversion as a table: each rule says which tensors of a checkpoint are which leaves of a model.

A table is matched against headers and an abstract model before any data are read; then leaves are filled one by one.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from chipmunk_jax.convert.prefix import NETWORK
from chipmunk_jax.convert.safetensors import Tensor, Weights, repeated
from chipmunk_jax.errors import InputError, listed
from chipmunk_jax.finite import finite

# A transposed copy goes in bands of this many rows: each destination row gets one cache line or more at a time.
# 12,288 x 3,072 bf16: 2.0 ns an element, against 7.0 for the whole matrix at once.
BAND = 64


@dataclass(frozen=True)
class Rule:
    """The sources joined along `axis` are the targets joined along `axis`, all in PyTorch's layout.

    One source may fill several leaves (linear1 is qkv and fc1), several sources one leaf (to_q, to_k and to_v are qkv).

    Attributes:
        sources: names of equally large tensors; "*" stands for the layer.
        targets: dotted paths of leaves; ".T" at the end: the leaf holds the transpose. With "*" in the sources the
            leaf has the layers in front, [L, ...].
        axis: of the join.
        transform: of each source before the join, array -> array.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    axis: int = 0
    transform: Callable[[np.ndarray], np.ndarray] | None = None


@dataclass(frozen=True)
class Layout:
    """One way in which checkpoints of a model are written."""

    model: str
    class_name: str  # in its config.json
    name: str
    marks: tuple[str, ...]  # tensors that tell it: a checkpoint is of the layout of which it has the most
    # Of a config, where the names of its tensors depend on its sizes.
    rules: tuple[Rule, ...] | Callable[[Any], tuple[Rule, ...]]
    configure: Callable[[Mapping[str, tuple[int, ...]], Mapping[str, Any]], Any]  # (shapes, config.json) -> config
    # config -> shapes of tensors that some files hold in other shapes, their numbers in the same order
    views: Callable[[Any], Mapping[str, tuple[int, ...]]] = lambda config: {}
    parts: tuple[str, ...] = (NETWORK,)  # prefixes of its names in a file that holds other models too

    def rules_of(self, config: Any) -> tuple[Rule, ...]:
        """The rules for a checkpoint of these sizes."""
        return self.rules(config) if callable(self.rules) else self.rules


@dataclass(frozen=True)
class Piece:
    """A part of a tensor and its place in a leaf."""

    tensor: Tensor
    transform: Callable[[np.ndarray], np.ndarray] | None
    take: tuple[slice, ...]  # of the tensor
    layer: int | None
    transposed: bool
    put: tuple[slice, ...]  # of the leaf's layer, in PyTorch's layout

    def write(self, leaf: np.ndarray) -> int:
        """Copies the part into `leaf`, cast to its dtype. Returns the bytes written.

        Raises:
            InputError: a value that is not finite, or not after the cast.
        """
        source = self.tensor.read()
        source = (self.transform(source) if self.transform else source)[self.take]
        target = leaf if self.layer is None else leaf[self.layer]
        target = (target.T if self.transposed else target)[self.put]
        bits = f"u{leaf.itemsize}"  # NumPy copies its own integers faster than bf16
        for start in range(0, len(source), BAND):
            with np.errstate(over="ignore"):  # to infinity, which is told below
                band = source[start : start + BAND].astype(leaf.dtype, copy=False)
            if not finite(band):
                raise InputError(f"{self.tensor.file}: {self.tensor.name} {flaw(source, leaf.dtype)}")
            target[start : start + BAND].view(bits)[...] = band.view(bits)
        return target.size * leaf.itemsize


def flaw(source: np.ndarray, dtype: np.dtype) -> str:
    """Why some values of a tensor are not finite in this dtype."""
    values = np.abs(source if source.dtype == np.float64 else source.astype(np.float32))
    if not np.isfinite(values).all():
        return "holds NaN or infinity, expected finite numbers"
    hint = "; convert with dtype bfloat16" if dtype == np.float16 else ""
    return f"reaches {values.max():.6g}, and {dtype.name} ends at {float(jnp.finfo(dtype).max):.6g}{hint}"


@dataclass
class Match:
    """What a table finds in a checkpoint: the pieces of every leaf, and all that does not fit."""

    pieces: dict[str, list[Piece]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)  # tensors that a rule asks for
    unknown: list[str] = field(default_factory=list)  # tensors that no rule uses
    doubled: list[str] = field(default_factory=list)  # tensors that are there twice, leaves that are filled twice
    misshapen: list[str] = field(default_factory=list)  # "name: [..], expected [..]"
    unfilled: list[str] = field(default_factory=list)  # leaves that no rule fills

    def summary(self) -> str:
        """All that does not fit, in one clause; empty where everything fits."""
        kinds = ("missing", "unknown", "doubled", "misshapen", "unfilled")
        return "; ".join(
            f"{len(getattr(self, kind))} {kind}: {listed(getattr(self, kind))}" for kind in kinds if getattr(self, kind)
        )


def match(rules: tuple[Rule, ...], weights: Weights, leaves: Mapping[str, Any]) -> Match:
    """Where every tensor goes, from headers only.

    Args:
        rules: of the layout; a rule whose targets the model lacks is left out (guidance_in, for one).
        weights: of the checkpoint.
        leaves: dotted path -> anything with a shape, of the abstract model.
    """
    found = Match(pieces={path: [] for path in leaves}, doubled=list(weights.doubled))
    rules = tuple(rule for rule in rules if any(path_of(target) in leaves for target in rule.targets))
    used: list[str] = []
    for rule in rules:
        used += place(rule, weights.tensors, leaves, found)
    targets = [path_of(target) for rule in rules for target in rule.targets]
    found.unknown = [name for name in weights.tensors if name not in set(used)]
    found.doubled += [*repeated(used), *repeated(targets)]
    found.unfilled = [path for path in leaves if path not in targets]
    return found


def fill(found: Match, leaves: Mapping[str, Any], advance: Callable[[int], None]) -> Iterator[tuple[str, np.ndarray]]:
    """(path, array) of every leaf, in its dtype, one at a time; no source tensor is held whole, but float8 with a scale.

    Args:
        found: a match whose summary is empty.
        leaves: dotted path -> anything with a shape and a dtype.
        advance: called with the bytes written since the last call.
    """
    for path, leaf in leaves.items():
        array = np.empty(leaf.shape, leaf.dtype)
        for piece in found.pieces[path]:
            advance(piece.write(array))
        yield path, array


def place(rule: Rule, tensors: Mapping[str, Tensor], leaves: Mapping[str, Any], found: Match) -> list[str]:
    """Adds the pieces of one rule to `found`, and what does not fit. Returns the names that the rule asks for."""
    stacked = any("*" in name for name in rule.sources)
    shapes = [torch_shape(target, leaves[path_of(target)].shape[stacked:]) for target in rule.targets]
    ends = np.cumsum([shape[rule.axis] for shape in shapes])
    width = int(ends[-1]) // len(rule.sources)
    expected = (*shapes[0][: rule.axis], width, *shapes[0][rule.axis + 1 :])
    layers = range(leaves[path_of(rule.targets[0])].shape[0]) if stacked else [None]
    names = []
    for layer in layers:
        for position, pattern in enumerate(rule.sources):
            name = pattern.replace("*", str(layer))
            names.append(name)
            if fits(name, tensors, expected, rule.transform, found):
                for target, end, shape in zip(rule.targets, ends, shapes, strict=True):
                    begin = int(end) - shape[rule.axis]
                    low, high = max(begin, position * width), min(int(end), (position + 1) * width)
                    if low < high:
                        take = along(rule.axis, low - position * width, high - position * width)
                        put = along(rule.axis, low - begin, high - begin)
                        piece = Piece(tensors[name], rule.transform, take, layer, target.endswith(".T"), put)
                        found.pieces[path_of(target)].append(piece)
    return names


def fits(
    name: str, tensors: Mapping[str, Tensor], expected: tuple[int, ...], transform: Callable | None, found: Match
) -> bool:
    """Whether the tensor is there, a float, and of the expected shape; what is wrong goes to `found`."""
    if name not in tensors:
        found.missing.append(name)
        return False
    tensor, shape = tensors[name], tensors[name].shape
    try:
        shape = transform(np.broadcast_to(np.uint8(0), shape)).shape if transform else shape
    except (ValueError, TypeError):  # a transform of another number of axes
        shape = None
    if shape is None:
        found.misshapen.append(f"{name} {list(tensor.shape)}, expected another number of axes")
    elif shape != expected:
        found.misshapen.append(f"{name} {list(shape)}, expected {list(expected)}")
    elif not jnp.issubdtype(tensor.dtype, jnp.floating):
        found.misshapen.append(f"{name} {tensor.dtype}, expected a float")
    else:
        return True
    return False


def swap_halves(array: np.ndarray) -> np.ndarray:
    """The second half of the rows, then the first: diffusers' (scale, shift) as (shift, scale)."""
    return np.roll(array, len(array) // 2, axis=0)


def path_of(target: str) -> str:
    """A target without its mark."""
    return target.removesuffix(".T")


def torch_shape(target: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one layer of a leaf in PyTorch's layout."""
    return tuple(shape[::-1] if target.endswith(".T") else shape)


def along(axis: int, low: int, high: int) -> tuple[slice, ...]:
    """An index of [low, high) on `axis` and of everything elsewhere."""
    return (*(slice(None),) * axis, slice(low, high))

"""What to recompute at each step and what to keep: frozen configs, presets, files.

Fields keep the names of the original's YAML where these are plain. All fractions are of the columns: keys of an attention,
neurons of an MLP.
"""

import dataclasses
import functools
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

SUFFIXES = (".yaml", ".yml", ".json")  # of files
COLUMN_TILE = 64  # the kernels' step: keeping a multiple of it leaves no tile half used


def _option(default: Any, help: str) -> Any:
    """A field whose meaning `chipmunk sample --help` shows too."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class _ColumnSparsity:
    """What attention and MLP share."""

    top_keys: float = _option(1.0, "fraction of columns kept for their score, above 0 and up to 1, which keeps all")
    random_keys: float = _option(0.0, "fraction of columns kept by chance, from 0 to below 1")
    max_keys: float | None = _option(
        None, "static room for the lists, a fraction; with more, other shares compile nothing"
    )
    first_n_dense_layers: int = _option(2, "layers at the start of the model that are never sparse")
    full_step_every: int = _option(10, "steps between two that compute everything")
    full_step_schedule: tuple[int, ...] | None = _option(None, "full steps by number, in place of full_step_every")
    group: int = _option(128, "rows that share a list of columns, a multiple of 64")

    def __post_init__(self):
        _check_types(self)
        if self.full_step_schedule is not None:
            object.__setattr__(self, "full_step_schedule", tuple(sorted(set(self.full_step_schedule))))
        self._check_fractions()
        _require(64 <= self.group <= 4096 and self.group % 64 == 0, "group", self.group, "a multiple of 64 up to 4096")
        _require(1 <= self.full_step_every < 2**31, "full_step_every", self.full_step_every, "at least 1")
        _require(0 <= self.first_n_dense_layers < 2**31, "first_n_dense_layers", self.first_n_dense_layers, "0 or more")

    def _check_fractions(self):
        _require(0 < self.top_keys <= 1, "top_keys", self.top_keys, "a fraction above 0 and up to 1")
        for name, chance in self._chances().items():
            _require(0 <= chance < 1, name, chance, "a fraction from 0 to below 1")
        if self.max_keys is not None:
            _require(0 < self.max_keys <= 1, "max_keys", self.max_keys, "a fraction above 0 and up to 1")
            _require(self.max_keys >= self._fraction(), "max_keys", self.max_keys, f"at least {self._fraction():.3g}")

    def _chances(self) -> dict[str, float]:
        return {"random_keys": self.random_keys}

    def _fraction(self) -> float:
        # Random columns fall among the top ones too; those are then kept once.
        return functools.reduce(
            lambda kept, chance: kept + chance * (1 - kept), self._chances().values(), self.top_keys
        )

    def kept(self, columns: int) -> int:
        """Columns that a group keeps of so many: the nearest multiple of 64, at least one, at most all."""
        return _columns(self._fraction(), columns)

    def capacity(self, columns: int) -> int:
        """Static length of a group's list."""
        return max(self.kept(columns), _columns(self.max_keys or 0.0, columns))


@dataclass(frozen=True, kw_only=True)
class AttentionSparsity(_ColumnSparsity):
    """Column-sparse attention (Chipmunk, section 3): keys a head and group of queries. Defaults: the paper's, for FLUX."""

    top_keys: float = _option(0.165, "fraction of keys kept for their attention, above 0 and up to 1")
    recompute_mask: bool = _option(False, "choose keys anew at each full step, not at the second alone")
    query_stride: int = _option(
        1, "one query of so many judges the keys: choosing them takes that fraction of the time"
    )
    residual_bits: int = _option(
        16, "bits of what the other keys contributed: 16, or 8 with a scale a row, in half the memory"
    )
    fixed_random_keys: float = _option(0.0, "fraction of keys kept by chance, the same ones for a whole sample")
    text_keys: bool = _option(False, "all queries attend to all of the text, in models that have it among the tokens")
    text_queries: bool = _option(False, "queries of the text attend to all keys")
    local_voxels: int = _option(0, "side, in voxels, of the neighbourhood that queries attend to: odd, or 0 for none")
    local_1d_window: float = _option(0.0, "fraction of the tokens, around a query's own in order, that it attends to")

    def __post_init__(self):
        super().__post_init__()
        fits = self.query_stride >= 1 and self.group % self.query_stride == 0
        _require(fits, "query_stride", self.query_stride, f"a divisor of the group, {self.group}")
        odd = self.local_voxels == 0 or (self.local_voxels > 0 and self.local_voxels % 2 == 1)
        _require(odd, "local_voxels", self.local_voxels, "an odd number, or 0 for none")
        _require(self.residual_bits in (8, 16), "residual_bits", self.residual_bits, "8 or 16")
        _require(0 <= self.local_1d_window <= 1, "local_1d_window", self.local_1d_window, "a fraction from 0 to 1")
        if self.full_step_schedule is not None:
            _require(
                self.full_step_schedule[:2] == (0, 1), "full_step_schedule", self.full_step_schedule,
                "steps 0 and 1 among them (step 0 measures what step 1 selects by)",
            )  # fmt: skip

    def _chances(self) -> dict[str, float]:
        return super()._chances() | {"fixed_random_keys": self.fixed_random_keys}


@dataclass(frozen=True, kw_only=True)
class MlpSparsity(_ColumnSparsity):
    """Column-sparse MLP (Chipmunk, section 3): neurons a group of rows. Defaults: the paper's, for FLUX."""

    top_keys: float = _option(0.3, "fraction of neurons kept for their change, above 0 and up to 1")
    random_keys: float = _option(0.05, "fraction of neurons kept by chance, from 0 to below 1")
    select_every: int = _option(2, "steps between two choices of neurons, once the first full_step_every are over")
    # "activations": all post-GELU activations are kept and moved, neurons may change at any step (the paper's).
    # "residual": only the output less that of neurons fixed until the next full step; a 4th to a 40th of the memory.
    cache: Literal["activations", "residual"] = _option(
        "activations", "what is kept: 'activations', or the 'residual' of fixed neurons, which takes less memory"
    )

    def __post_init__(self):
        super().__post_init__()
        _require(self.select_every >= 1, "select_every", self.select_every, "at least 1")
        _require(self.cache in ("activations", "residual"), "cache", self.cache, "'activations' or 'residual'")
        if self.full_step_schedule is not None:
            _require(
                self.full_step_schedule[:1] == (0,), "full_step_schedule", self.full_step_schedule,
                "step 0 among them (it fills the cache)",
            )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StepCache:
    """Steps that run no block: the tokens of the last step that did go through the final layer, which knows the new time.

    Default: the original's fixed schedule for 50 steps, every second one in the mean, none at the start and the end.
    """

    skip_steps: tuple[int, ...] = _option(
        (7, 11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25, 26, 27, 29, 31, 33, 34, 35, 37, 38, 39, 41, 42, 43),
        "steps that run no block, by number; no full ones",
    )

    def __post_init__(self):
        _check_types(self)
        object.__setattr__(self, "skip_steps", tuple(sorted(set(self.skip_steps))))
        _require(min(self.skip_steps, default=0) > 0, "skip_steps", self.skip_steps, "at least one, none before step 1")


PARTS = {"attention": AttentionSparsity, "mlp": MlpSparsity, "step_cache": StepCache}


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """A whole configuration. None in place of a part leaves it dense, in place of step_cache runs every step."""

    attention: AttentionSparsity | None = dataclasses.field(default_factory=AttentionSparsity)
    mlp: MlpSparsity | None = dataclasses.field(default_factory=MlpSparsity)
    step_cache: StepCache | None = None
    patches: tuple[int | tuple[int, ...], ...] = _option(
        (8, 4), "sides of the nested patches that tokens are ordered by, as [8,4] or the voxel [[4,4,8]]; [] for rows"
    )

    def __post_init__(self):
        for name, kind in PARTS.items():
            part = getattr(self, name)
            _require(part is None or isinstance(part, kind), name, part, f"{kind.__name__} or None")
        _check_types(self)
        _require(_nested(self.patches), "patches", self.patches, "sides that divide each other, the largest first")


def _nested(patches: tuple[int | tuple[int, ...], ...]) -> bool:
    """Whether whole patches of every size fill one of the size before."""
    axes = max((len(patch) for patch in patches if isinstance(patch, tuple)), default=1)
    sides = [patch if isinstance(patch, tuple) else (patch,) * axes for patch in patches]
    whole = all(len(patch) == axes and min(patch, default=0) > 0 for patch in sides)
    return whole and all(
        a % b == 0 for big, small in itertools.pairwise(sides) for a, b in zip(big, small, strict=True)
    )


def load_sparsity(source: str | Path | dict[str, Any] | Sparsity, overrides: dict[str, Any] | None = None) -> Sparsity:
    """A Sparsity from a preset's name, a YAML or JSON file, or nested dictionaries; overrides win.

    Args:
        source: "flux", a path that ends in .yaml, .yml or .json, {"attention": {"top_keys": 0.2}, "mlp": None}, or a Sparsity.
            Keys left out keep their defaults.
        overrides: {"attention.top_keys": 0.2}, by dotted names.

    Raises:
        ValueError: an unknown preset or key, a value out of its range, or a file that is neither YAML nor JSON.
        FileNotFoundError: there is no such file.
    """
    tree = to_dict(source) if isinstance(source, Sparsity) else _read(source)
    for name, value in (overrides or {}).items():
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            below = node.get(parent) or {}
            if not isinstance(below, dict):
                break  # _build tells
            node[parent] = node = dict(below)
        else:
            node[leaf] = value
    return _build(Sparsity, tree, "sparsity")


def to_dict(sparsity: Sparsity) -> dict[str, Any]:
    """Plain nested dictionaries, as load_sparsity and YAML or JSON files take them."""
    return json.loads(json.dumps(dataclasses.asdict(sparsity)))


def _read(source: str | Path | dict[str, Any]) -> dict[str, Any]:
    if isinstance(source, dict):
        return dict(source)
    path = Path(source)
    if str(source) in PRESETS:
        return to_dict(PRESETS[str(source)])
    if path.suffix not in SUFFIXES:
        raise ValueError(f"sparsity {str(source)!r}: expected one of {', '.join(PRESETS)}, or a .yaml or .json file")
    if not path.is_file():
        raise FileNotFoundError(f"sparsity file {path}: no such file")
    try:
        # YAML 1.1 reads JSON's 1e-1 as a word.
        tree = (json.loads if path.suffix == ".json" else yaml.safe_load)(path.read_text())
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"sparsity file {path}: not YAML or JSON ({' '.join(str(error).split())})") from error
    if not isinstance(tree, dict):
        raise ValueError(f"sparsity file {path}: expected keys such as attention and mlp")
    return tree


def _build(kind: type, tree: dict[str, Any], where: str):
    known = _names(kind)
    if unknown := [str(key) for key in tree if key not in known]:
        raise ValueError(f"{where}: unknown key {', '.join(unknown)}; known are {', '.join(known)}")
    values = dict(tree)
    for name, part in PARTS.items() if kind is Sparsity else ():
        value = values.get(name)
        if isinstance(value, dict):
            values[name] = _build(part, value, f"{where}.{name}")
        elif value is not None:
            raise ValueError(f"{where}.{name}={value!r}: expected keys such as {_names(part)[0]}, or null for none")
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from error


def _names(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _check_types(config: Any) -> None:
    """Raises ValueError where a field has not its type, so that "0.2" or 3.5 layers is told; makes lists tuples."""
    for field in dataclasses.fields(config):
        if field.name not in PARTS:
            object.__setattr__(config, field.name, _typed(field, getattr(config, field.name)))


def _typed(field: dataclasses.Field, value: Any) -> Any:
    kind = str(field.type)
    if value is None and "None" in kind:
        return None
    fits = {
        "float": _is_whole(value) or isinstance(value, float),
        "int": _is_whole(value),
        "bool": isinstance(value, bool),
        "tuple": isinstance(value, (list, tuple))
        and all(map(_is_whole, _flat(value) if kind.count("tuple") > 1 else value)),
        "Literal": isinstance(value, str),
    }
    name = next(name for name in fits if name in kind.split("|")[0].replace("<class '", "").split("[")[0])
    if not fits[name]:
        expected = dict(tuple="a list of whole numbers", float="a number", int="a whole number", bool="true or false")
        raise ValueError(f"{field.name}={value!r}: expected {expected.get(name, 'a word')}")
    return tuple(tuple(x) if isinstance(x, list) else x for x in value) if name == "tuple" else value


def _flat(values: list | tuple) -> list:
    """The values of lists in a list, and those beside them."""
    return [x for value in values for x in (value if isinstance(value, (list, tuple)) else [value])]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _columns(fraction: float, columns: int) -> int:
    if fraction >= 1:
        return columns
    return min(columns, COLUMN_TILE * max(1, round(fraction * columns / COLUMN_TILE)))


def _require(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition or (isinstance(value, float) and math.isnan(value)):
        raise ValueError(f"{name}={value}: expected {expected}")


# Keys judged by every second query cost 0.2 +- 0.2 dB on a trained video model, by every fourth 0.7 +- 0.2: benchmarks/README.md.
_VIDEO = dict(recompute_mask=True, query_stride=2, random_keys=0.01, fixed_random_keys=0.01)
_VOXELS = ((4, 4, 8),)  # a voxel is a group

PRESETS: dict[str, Sparsity] = {
    # FLUX.1 at 4,352 tokens and 50 steps: the paper's values.
    "flux": Sparsity(),
    # HunyuanVideo at 118,800 tokens and 50 steps: the paper's values, but that keys are judged by every second query.
    "hunyuan-video": Sparsity(
        attention=AttentionSparsity(
            **_VIDEO, top_keys=0.05, text_keys=True, text_queries=True, full_step_schedule=(0, 1, 10, 40)
        ),
        mlp=None,
        patches=_VOXELS,
    ),
    # Wan2.1 14B at 75,600 tokens and 50 steps, likewise: 5 voxels to a side are a fifth of the video.
    "wan-14b": Sparsity(attention=AttentionSparsity(**_VIDEO, top_keys=0.1, local_voxels=5), mlp=None, patches=_VOXELS),
    # Wan2.1 1.3B at 32,760 tokens and 50 steps, of which the paper has no values: 5 voxels would be half of the video.
    "wan-1.3b": Sparsity(
        attention=AttentionSparsity(**_VIDEO, top_keys=0.1, local_voxels=3), mlp=None, patches=_VOXELS
    ),
    # The small model at 1,040 tokens and 28 steps: as many full steps a sample, as many groups an image.
    "mini-flux": Sparsity(
        attention=AttentionSparsity(group=64, full_step_every=5), mlp=MlpSparsity(group=64, full_step_every=5)
    ),
    # The small video model at 4,096 tokens and 30 steps, likewise, but that keys are chosen at each full step.
    "mini-wan": Sparsity(
        attention=AttentionSparsity(group=64, full_step_every=5, recompute_mask=True), mlp=None, patches=((4, 4, 4),)
    ),
}
# The paper stacks both: half of the steps run no layer.
PRESETS |= {
    f"{name}-step-cache": dataclasses.replace(PRESETS[name], step_cache=StepCache())
    for name in ("flux", "hunyuan-video", "wan-14b", "wan-1.3b")
}
# Of the presets, those that name steps, and how many steps they are made for.
SCHEDULES = {StepCache().skip_steps, *(p.attention.full_step_schedule for p in PRESETS.values())} - {None}
PRESET_STEPS = 50

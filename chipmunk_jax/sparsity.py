"""What to recompute at each step and what to keep: frozen configs, presets, files.

Fields keep the names of the original's YAML where these are plain. Columns are the keys of an attention and the neurons of an MLP;
all fractions are of them.
"""

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

from chipmunk_jax.config_file import nest, read_layers
from chipmunk_jax.errors import InputError
from chipmunk_jax.options import change, check_types, explained, option, require

MOST_STEPS = 100_000  # a mistyped number must not be taken for work
COLUMN_TILE = 64  # the kernels' step: keeping a multiple of it leaves no tile half used


@dataclass(frozen=True, kw_only=True)
class _ColumnSparsity:
    """What attention and MLP share."""

    top_keys: float  # these two have other defaults and words in each
    random_keys: float
    max_keys: float | None = option(
        None,
        "capacity of the column lists, as a fraction of all keys or neurons; raise it to change top_keys later without "
        "recompiling; null for the number computed now",
    )
    first_n_dense_layers: int = option(2, "number of layers at the start of the model that are never sparse")
    full_step_every: int = option(
        10, "number of steps from one full step, which computes everything, to the next, among schedule_steps"
    )
    full_step_schedule: tuple[int, ...] | None = option(
        None, "full steps by number, counted from 0 among schedule_steps, in place of full_step_every; null for none"
    )
    group: int = option(
        128, "number of consecutive tokens that share a list of keys or neurons: a multiple of 64 up to 4096"
    )

    def __post_init__(self):
        check_types(self)
        if self.full_step_schedule is not None:
            object.__setattr__(self, "full_step_schedule", tuple(sorted(set(self.full_step_schedule))))
        self._check_fractions()
        require(64 <= self.group <= 4096 and self.group % 64 == 0, "group", self.group, "a multiple of 64 up to 4096")
        require(1 <= self.full_step_every < 2**31, "full_step_every", self.full_step_every, "at least 1")
        require(0 <= self.first_n_dense_layers < 2**31, "first_n_dense_layers", self.first_n_dense_layers, "0 or more")

    def _check_fractions(self):
        require(0 < self.top_keys <= 1, "top_keys", self.top_keys, "a fraction above 0 and up to 1")
        for name, chance in self._chances().items():
            require(0 <= chance < 1, name, chance, "a fraction from 0 to below 1")
        if self.max_keys is not None:
            require(0 < self.max_keys <= 1, "max_keys", self.max_keys, "a fraction above 0 and up to 1")
            require(self.max_keys >= self._fraction(), "max_keys", self.max_keys, f"at least {self._fraction():.3g}")

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


@explained
@dataclass(frozen=True, kw_only=True)
class AttentionSparsity(_ColumnSparsity):
    """Column-sparse attention (Chipmunk, section 3): a list of keys for every head and group of queries.

    Defaults: the paper's, for FLUX, but for the block means and the keys of both sides of guidance.
    """

    top_keys: float = option(
        0.165,
        "fraction of the keys computed between full steps, those with the most attention: above 0 and up to 1, for all",
    )
    random_keys: float = option(
        0.0,
        "probability that a key is computed whatever its attention, drawn at each choice of keys: from 0 to below 1",
    )
    recompute_mask: bool = option(False, "choose keys anew at every full step, instead of at step 1 alone")
    query_stride: int = option(
        1, "score keys with every n-th query only, n a divisor of group; selection then takes 1/n of the time"
    )
    share_sides: bool = option(
        True,
        "choose keys once for both sides of guidance, by the prompt's, instead of for each as in the paper; padded texts always "
        "choose for each",
    )
    residual_bits: int = option(
        16,
        "bits per cached residual value: 16, or 8 (float8, one scale per row); 0 keeps none, so that a step gives its own keys' "
        "attention alone, as methods without deltas do",
    )
    fixed_random_keys: float = option(
        0.0, "probability that a key is computed whatever its attention, drawn once a sample: from 0 to below 1"
    )
    text_keys: bool = option(
        False, "let all queries attend to all keys of the text, in models with text among the tokens"
    )
    text_queries: bool = option(
        False, "let queries of the text attend to all keys, in models with text among the tokens"
    )
    local_voxels: int = option(
        0,
        "side of the neighbourhood whose keys a query always attends to, in voxels, which are the largest of the patches: "
        "an odd number, or 0 for no neighbourhood",
    )
    local_1d_window: float = option(
        0.0,
        "width of the window, around a query's own place in the order of tokens, whose keys it always attends to, as a "
        "fraction of all tokens: from 0 to 1",
    )
    block_means: int = option(
        64,
        "number of consecutive keys whose mean stands for those of them that are not chosen, 64 or 128, so that what they do "
        "is followed between full steps, too; 0: it is not, as in the paper",
    )

    def __post_init__(self):
        super().__post_init__()
        require(self.block_means in (0, 64, 128), "block_means", self.block_means, "64, 128, or 0 for none")
        fits = self.query_stride >= 1 and self.group % self.query_stride == 0
        require(fits, "query_stride", self.query_stride, f"a divisor of the group, {self.group}")
        odd = self.local_voxels == 0 or (self.local_voxels > 0 and self.local_voxels % 2 == 1)
        require(odd, "local_voxels", self.local_voxels, "an odd number, or 0 for none")
        require(self.residual_bits in (0, 8, 16), "residual_bits", self.residual_bits, "8 or 16, or 0 for none")
        require(0 <= self.local_1d_window <= 1, "local_1d_window", self.local_1d_window, "a fraction from 0 to 1")
        if self.full_step_schedule is not None:
            require(
                self.full_step_schedule[:2] == (0, 1), "full_step_schedule", self.full_step_schedule,
                "steps 0 and 1 among them (step 0 measures what step 1 selects by)",
            )  # fmt: skip

    def _chances(self) -> dict[str, float]:
        return super()._chances() | {"fixed_random_keys": self.fixed_random_keys}


@explained
@dataclass(frozen=True, kw_only=True)
class MlpSparsity(_ColumnSparsity):
    """Column-sparse MLP (Chipmunk, section 3): a list of neurons for every group of tokens.

    Defaults: the paper's, for FLUX.
    """

    top_keys: float = option(
        0.3, "fraction of the neurons computed between full steps, those that change most: above 0 and up to 1, for all"
    )
    random_keys: float = option(
        0.05,
        "probability that a neuron is computed whatever its change, drawn at each choice of neurons: from 0 to below 1",
    )
    select_every: int = option(
        2, "number of steps between two choices of neurons, after the first full_step_every, which choose at every step"
    )
    cache: Literal["activations", "residual"] = option(
        "activations",
        "what is kept from step to step: 'activations' of all neurons, so that any step may choose others (the paper's), or "
        "the 'residual', the output less that of neurons fixed until the next full step, in a 4th to a 40th of the memory",
    )

    def __post_init__(self):
        super().__post_init__()
        require(self.select_every >= 1, "select_every", self.select_every, "at least 1")
        require(self.cache in ("activations", "residual"), "cache", self.cache, "'activations' or 'residual'")
        if self.full_step_schedule is not None:
            require(
                self.full_step_schedule[:1] == (0,), "full_step_schedule", self.full_step_schedule,
                "step 0 among them (it fills the cache)",
            )  # fmt: skip


# Of the original: half of its steps, none at the start and the end.
PAPER_STEPS = 50
PAPER_SKIPS = (7, 11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25, 26, 27, 29, 31, 33, 34, 35, 37, 38, 39, 41, 42, 43)
PLANNED_GATES = ("list", "share", "mag")  # known before anything is computed; the others decide while a sample runs
Gate = Literal["list", "share", "mag", "tea", "sea", "easy"]
Predict = Literal["hidden", "residual", "velocity"]


@explained
@dataclass(frozen=True, kw_only=True)
class StepCache:
    """Skips all blocks at some steps: a gate says at which, and what they would give is predicted from the last steps that ran.

    A full step of the other parts always runs. Default: the original's fixed schedule, with the last tokens after the blocks.
    """

    gate: Gate = option(
        "list",
        "which steps are skipped: those of a 'list', a 'share' of them evenly, or those up to which an estimate of change, summed, "
        "stays below the threshold: that of 'mag' (MagCache), 'tea' (TeaCache), 'sea' (SeaCache) or 'easy' (EasyCache); the last "
        "three decide for each sample, which are made one after another, by the prompt's side of guidance for both",
    )
    predict: Predict = option(
        "hidden",
        "what a skipped step takes from the steps that ran: the 'hidden' tokens after the last block, for the final layer at the "
        "new time (the paper's), the 'residual' that the blocks added to their tokens, or the guided 'velocity'",
    )
    order: int = option(0, "0 to take that from the last step that ran as it is, 1 to extrapolate the last two in time")
    skip_steps: tuple[int, ...] | None = option(
        None,
        "steps that run no block, by number, counted from 0 among schedule_steps, none of them a full one; with a gate other than "
        "'list' those that it may skip; null for the paper's 25 of 50, or for all after warm_up but the last",
    )
    share: float = option(
        0.5,
        "fraction of the steps that the gate 'share' skips: above 0 and up to 1, for all, among which max_drift then chooses",
    )
    warm_up: float = option(0.1, "fraction of the steps, at the start, that gates other than 'list' run: from 0 to 1")
    max_skips: int = option(4, "most steps in a row that gates other than 'list' skip")
    threshold: float | None = option(
        None, "estimated change up to which steps are skipped; null for what was published for the gate and the model"
    )
    coefficients: tuple[float, ...] | None = option(
        None,
        "of the gate 'tea' a polynomial, highest power first, of 'mag' a ratio for each step; null for what was published for "
        "the model",
    )

    def __post_init__(self):
        check_types(self)
        for name, kind in (("gate", Gate), ("predict", Predict)):
            value = getattr(self, name)
            require(value in get_args(kind), name, value, f"one of {', '.join(get_args(kind))}")
        require(self.order in (0, 1), "order", self.order, "0 or 1")
        require(0 < self.share <= 1, "share", self.share, "a fraction above 0 and up to 1")
        require(0 <= self.warm_up <= 1, "warm_up", self.warm_up, "a fraction from 0 to 1")
        require(1 <= self.max_skips < 2**31, "max_skips", self.max_skips, "at least 1")
        fits = self.threshold is None or 0 <= self.threshold < math.inf
        require(fits, "threshold", self.threshold, "0 or more, or null")
        if self.coefficients is not None:
            finite = self.coefficients and all(map(math.isfinite, self.coefficients))
            require(bool(finite), "coefficients", self.coefficients, "at least one finite number, or null")
            positive = self.gate != "mag" or min(self.coefficients) > 0
            require(positive, "coefficients", self.coefficients, "ratios above 0")
        if self.skip_steps is not None:
            object.__setattr__(self, "skip_steps", tuple(sorted(set(self.skip_steps))))
            require(
                min(self.skip_steps, default=0) > 0, "skip_steps", self.skip_steps, "at least one, none before step 1"
            )

    @property
    def decides(self) -> bool:
        """Whether the gate decides while a sample runs."""
        return self.gate not in PLANNED_GATES


@explained
@dataclass(frozen=True, kw_only=True)
class GuidanceCache:
    """Runs the prompt's side of guidance alone at some steps: its difference to the other side is that of the last step with both.

    A full step of the other parts runs both. Saves nothing where there is one side, as in distilled models.
    """

    after: float = option(0.3, "fraction of the steps, at the start, that run both sides: from 0 to 1")
    every: int = option(
        3,
        "number of steps after that from one that runs both sides to the next, among schedule_steps; 1 for all of them",
    )
    one_sided_steps: tuple[int, ...] | None = option(
        None,
        "steps that run the prompt's side alone, by number, counted from 0 among schedule_steps, none of them a full one, in place "
        "of after and every; null for none",
    )

    def __post_init__(self):
        check_types(self)
        require(0 <= self.after <= 1, "after", self.after, "a fraction from 0 to 1")
        require(1 <= self.every < 2**31, "every", self.every, "at least 1")
        if self.one_sided_steps is not None:
            object.__setattr__(self, "one_sided_steps", tuple(sorted(set(self.one_sided_steps))))
            found = self.one_sided_steps
            require(min(found, default=0) > 0, "one_sided_steps", found, "at least one, none before step 1")


PARTS = {"attention": AttentionSparsity, "mlp": MlpSparsity, "step_cache": StepCache, "guidance_cache": GuidanceCache}


@explained
@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """A whole configuration."""

    attention: AttentionSparsity | None = option(AttentionSparsity(), "sparse attention, or null for dense")
    mlp: MlpSparsity | None = option(MlpSparsity(), "sparse MLP, or null for dense")
    step_cache: StepCache | None = option(None, "steps to skip, or null to run every step")
    guidance_cache: GuidanceCache | None = option(
        None, "steps of guidance that run one side, or null to run both in every step"
    )
    max_drift: float | None = option(
        None,
        "estimated relative error of the velocity above which a step computes more than its schedules say: a skipped step its "
        "columns, a delta step everything; decided for each sample, which are made one after another; null for the schedules alone",
    )
    schedule_steps: int | None = option(
        None,
        "number of steps of the sample that full_step_every, full_step_schedule, skip_steps, every and one_sided_steps are written "
        "for; in a sample of another number they are stretched to the same times of the path; null to take them as they are in any "
        "sample",
    )
    patches: tuple[int | tuple[int, ...], ...] = option(
        (8, 4),
        "sides, in tokens, of the nested patches that tokens are ordered by, the largest first: [8,4] for equal sides, "
        "[[4,4,8]] for frames, rows and columns, [] for tokens row by row",
    )

    def __post_init__(self):
        check_types(self)
        written = self.schedule_steps
        require(written is None or 1 <= written <= MOST_STEPS, "schedule_steps", written, f"1 to {MOST_STEPS}, or null")
        fits = self.max_drift is None or 0 < self.max_drift < math.inf
        require(fits, "max_drift", self.max_drift, "a finite number above 0, or null")
        require(_nested(self.patches), "patches", self.patches, "sides that divide each other, the largest first")

    @property
    def saves_nothing(self) -> bool:
        """Whether every step computes everything."""
        return not (self.attention or self.mlp or self.step_cache or self.guidance_cache)

    @property
    def decides(self) -> bool:
        """Whether a gate or the drift guard decides while a sample runs, so that samples run one after another."""
        gate = self.step_cache is not None and self.step_cache.decides
        return gate or (self.max_drift is not None and self.has_delta_or_skipped_steps)

    @property
    def has_delta_or_skipped_steps(self) -> bool:
        """Whether the drift guard has something to decide: one-sided steps that compute everything are full ones to it."""
        return bool(self.attention or self.mlp or self.step_cache)


def _nested(patches: tuple[int | tuple[int, ...], ...]) -> bool:
    """Whether whole patches of every size fill one of the size before."""
    axes = max((len(patch) for patch in patches if isinstance(patch, tuple)), default=1)
    sides = [patch if isinstance(patch, tuple) else (patch,) * axes for patch in patches]
    whole = all(len(patch) == axes and min(patch, default=0) > 0 for patch in sides)
    return whole and all(
        a % b == 0 for big, small in itertools.pairwise(sides) for a, b in zip(big, small, strict=True)
    )


def _columns(fraction: float, columns: int) -> int:
    if fraction >= 1:
        return columns
    return min(columns, COLUMN_TILE * max(1, round(fraction * columns / COLUMN_TILE)))


def to_dict(sparsity: Sparsity) -> dict[str, Any]:
    """Plain nested dictionaries, as load_sparsity and YAML or JSON files take them."""
    return json.loads(json.dumps(dataclasses.asdict(sparsity)))


def load_sparsity(source: str | Path | dict[str, Any] | Sparsity, overrides: dict[str, Any] | None = None) -> Sparsity:
    """A Sparsity from a preset's name, a YAML or JSON file, or nested dictionaries; overrides win.

    Args:
        source: "flux", a path that ends in .yaml, .yml or .json, {"attention": {"top_keys": 0.2}, "mlp": None}, or a Sparsity.
            Keys left out keep their defaults, or with a key `preset`, the values of that preset or file (relative to this one).
        overrides: {"attention.top_keys": 0.2}, by dotted names.

    Raises:
        InputError: an unknown preset or key, a value out of its range, overrides that contradict each other, files that are
            based on each other, or one that is neither YAML nor JSON.
        FileNotFoundError: there is no such file.
    """
    if not isinstance(overrides or {}, dict):
        raise InputError(
            f"overrides={overrides!r}: expected values by dotted names, such as {{'attention.top_keys': 0.2}}"
        )
    base, layers = (source, []) if isinstance(source, Sparsity) else (Sparsity(), read_layers(source, PRESETS.files))
    return functools.reduce(partial(change, where="sparsity"), [*layers, nest(overrides or {})], base)


@functools.cache
def _preset(name: str) -> Sparsity:
    return load_sparsity(name)


class _Presets(Mapping[str, Sparsity]):
    """Presets by name, each read from presets/NAME.yaml when it is first asked for."""

    def __init__(self):
        found = {file.name: file for file in (files("chipmunk_jax") / "presets").iterdir()}
        self.files = dict(sorted((name.removesuffix(".yaml"), found[name]) for name in found if name.endswith(".yaml")))

    def __getitem__(self, name: str) -> Sparsity:
        if name not in self.files:
            raise KeyError(name)
        return _preset(name)

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


PRESETS: Mapping[str, Sparsity] = _Presets()

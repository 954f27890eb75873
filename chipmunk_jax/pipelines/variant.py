"""Variant: one published or small model, and how it is sampled where nobody says otherwise."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from chipmunk_jax.errors import InputError
from chipmunk_jax.fit import check_schedules
from chipmunk_jax.model import Condition, Model, Stack
from chipmunk_jax.models.leaves import abstract
from chipmunk_jax.pinned_keys import check_grid, fitted
from chipmunk_jax.solvers import (
    Euler,
    Solver,
    UniPC,
    flux_timesteps,
    shifted,
    shifted_by_tokens,
    shifted_timesteps,
    wan_timesteps,
)
from chipmunk_jax.sparsity import PRESETS, Sparsity
from chipmunk_jax.step_cache import with_constants

MOST_SIDE = 2**20  # pixels or frames: a mistyped number must not be taken for work
SIZES = ("frames", "height", "width")  # of a video; the last two of an image
TEXT_ROWS = 512  # where a network takes any number: as many as those of the published models
Settings = dict[str, Any]  # of a sample: frames (of a video alone), height, width, steps, guidance


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A row of VARIANTS: a model of these sizes, and its usual sample."""

    network: str  # of MODELS
    config: Any  # sizes of the network, its config class
    matches: Callable[[Any], bool] = lambda config: False  # configs of other sizes that are sampled as this one
    adapt: Callable[[Any], dict[str, Any]] = lambda config: {}  # fields of this row that follow such a config
    pipeline: type | None = None  # the Pipeline from prompts to pixels; None: its text encoders and VAE are not here
    preset: str  # of sparsity
    patch: tuple[int, ...]  # pixels that a token stands for, an axis each: (rows, columns) or (frames, rows, columns)
    height: int  # pixels
    width: int
    frames: int | None = None  # None: images
    fps: int | None = None  # frames a second that a video is shown at
    lone_first: bool = False  # whether the first frame has tokens of its own, and only those after it share them
    steps: int = 50
    solver: Solver = field(default_factory=Euler)
    shift: float | None = None  # of the times; None: by the number of tokens, as in FLUX.1-dev
    small_shift: float | None = None  # in its place at up to 480 x 832 pixels; None: the same
    guidance: float | None = None  # scale of true guidance, as sample() takes it; None: none
    boundary: float | None = (
        None  # time, 1 to 0, at which a second network of the same sizes takes over; None: there is one
    )
    guidance_2: float | None = None  # scale of the second network's
    distilled: float | None = None  # scale of a guidance that is a condition, cond["guidance"]
    negative_prompt: str = ""  # the other side of true guidance
    text: int | None = None  # rows of text; None: as many as the network takes at most

    @property
    def video(self) -> bool:
        """Whether samples are videos, else images."""
        return self.frames is not None

    @property
    def name(self) -> str:
        """The row of VARIANTS with this network; of other sizes than any, the network."""
        sizes = lambda row: (row.config, row.boundary is None)
        return next((name for name, row in VARIANTS.items() if sizes(row) == sizes(self)), self.network)

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the sides of a sample."""
        return SIZES[-len(self.patch) :]

    @property
    def text_rows(self) -> int:
        """Rows of text of a sample."""
        return self.text or self.config.text_rows[1] or TEXT_ROWS

    def of(self, config: Any) -> "Variant":
        """This row for a network of other sizes."""
        return replace(self, config=config, **self.adapt(config))

    def complete(self, **settings: Any) -> Settings:
        """The settings of a sample; the usual ones where those given are None or none are.

        Raises:
            InputError: frames of an image, a scale that the model does not take, or another name.
        """
        if not self.video and (frames := settings.pop("frames", None)) is not None:
            raise InputError(f"frames={frames}: expected none, as this model makes images")
        scales = {"guidance_2": self.boundary, "distilled": self.distilled}  # only where the model has them
        names = (*self.axes, "steps", "guidance", *(name for name, has in scales.items() if has is not None))
        usual = {name: getattr(self, name) for name in names}
        if unknown := settings.keys() - usual.keys():
            raise InputError(f"unknown setting {', '.join(sorted(unknown))}; known are {', '.join(usual)}")
        return usual | {name: value for name, value in settings.items() if value is not None}

    def sizes(self, settings: Settings) -> dict[str, int]:
        """Height, width and, of a video, frames."""
        return {name: settings[name] for name in ("height", "width", "frames") if name in settings}

    def grid(self, settings: Settings | None = None) -> tuple[int, ...]:
        """Tokens along each side of a sample; None: of the usual one.

        Raises:
            InputError: a side that tokens do not fill.
        """
        settings = settings or self.complete()
        return tuple(self._tokens(name, side, settings[name]) for name, side in zip(self.axes, self.patch, strict=True))

    def _tokens(self, name: str, side: int, pixels: int) -> int:
        lone = int(self.lone_first and name == "frames")
        whole = isinstance(pixels, (int, np.integer)) and not isinstance(pixels, bool)
        if not whole or pixels < max(lone, 1) or (pixels - lone) % side:
            unit = "" if name == "frames" else " pixels"
            expected = f"a positive multiple of {side}{unit}" if side > 1 else "at least 1"
            expected = f"a multiple of {side}, and one" if lone else expected
            near = _nearest(pixels, side, lone) if whole and side > 1 else ""
            raise InputError(
                f"{name}={pixels}: expected {expected}{near}"
                if whole
                else f"{name}={pixels!r}: expected a whole number"
            )
        if pixels > MOST_SIDE:
            raise InputError(f"{name}={pixels}: expected at most {MOST_SIDE}")
        return lone + (pixels - lone) // side

    def timesteps(self, settings: Settings | None = None) -> np.ndarray:
        """Times for sample(), f32 [steps + 1]; None: of the usual sample.

        Raises:
            InputError: steps below 1, or absurdly many.
        """
        settings = settings or self.complete()
        if self.shift is None:
            return flux_timesteps(settings["steps"], math.prod(self.grid(settings)))
        spaced = wan_timesteps if isinstance(self.solver, UniPC) else shifted_timesteps
        return spaced(settings["steps"], self._shift(settings))

    def shifted(self, times: np.ndarray, settings: Settings) -> np.ndarray:
        """Evenly spaced or other times [steps + 1], 1 to 0, shifted as those of a sample are, f32."""
        if self.shift is None:
            return shifted_by_tokens(times, math.prod(self.grid(settings))).astype(np.float32)
        return shifted(np.asarray(times, np.float64), self._shift(settings)).astype(np.float32)

    def _shift(self, settings: Settings) -> float | None:
        small = self.small_shift is not None and settings["height"] * settings["width"] <= SMALL_IMAGE
        return self.small_shift if small else self.shift

    def check(self, settings: Settings, sparsity: Sparsity | None, *, schedules: bool = True) -> None:
        """Raises InputError where sizes, steps or a Sparsity do not fit; it names what does: the model's own preset, or none.

        Args:
            settings: of complete().
            sparsity: None for dense.
            schedules: whether its schedules must fit the steps, too.
        """
        grid, steps = self.grid(settings), settings["steps"]
        self.timesteps(settings)
        sparsity = sparsity and with_constants(sparsity, self.name)
        if sparsity is not None and (error := _misfit(sparsity, grid, steps if schedules else None)):
            own = _misfit(self.own_sparsity(settings)[0], grid, steps) is None
            advice = f"the model's own preset, {self.preset}, fits" if own else "dense sampling does without"
            raise InputError(f"{error}; {advice}")

    def own_sparsity(self, settings: Settings) -> tuple[Sparsity, str]:
        """The model's own preset, and a line where a sample is so small that it got smaller neighbourhoods; else ""."""
        preset, grid = PRESETS[self.preset], self.grid(settings)
        found = fitted(preset, grid)
        if found == preset:
            return found, ""
        sides = f"{found.attention.local_voxels} voxels in place of {preset.attention.local_voxels}"
        return found, f"preset {self.preset}: neighbourhoods of {sides}, as the grid is {grid} tokens"

    def shapes(
        self, settings: Settings, batch: int, dtype: Any, text: int | None = None
    ) -> tuple[Model, jax.ShapeDtypeStruct, Condition]:
        """The network, noise [B, N, C] and conditions [B, ..] of a sample, shapes in place of arrays.

        Args:
            settings: of complete().
            batch: B.
            dtype: of weights and tokens.
            text: rows of text; None: text_rows.
        """
        network, tokens = _abstract(self.network, self.config, dtype), math.prod(self.grid(settings))
        array = lambda *shape, kind=jnp.float32: jax.ShapeDtypeStruct((batch, *shape), kind)
        kinds = {"mask": jnp.bool_}
        rows = network.conditions(tokens, text or self.text_rows).items()
        cond = {name: array(*shape, kind=kinds.get(name, jnp.float32)) for name, shape in rows}
        return network, array(tokens, network.channels), cond

    def stacks(self, settings: Settings, text: int | None = None) -> dict[str, Stack]:
        """The stacks of layers of a sample, by name; arguments as of shapes()."""
        network, noise, cond = self.shapes(settings, 1, jnp.float32, text)
        return network.stacks(noise.shape[1], cond)


def _nearest(size: int, side: int, lone: int) -> str:
    """Those of the sizes lone + n side that are nearest to one that is none, in words."""
    below = (size - lone) // side * side + lone
    sizes = [one for one in (below, below + side) if max(lone, 1) <= one <= MOST_SIDE] or [max(side, lone)]
    return f", such as {' or '.join(map(str, sizes))}"


SMALL_IMAGE = 480 * 832  # pixels


_abstract = lru_cache(maxsize=4)(abstract)  # a second for a large one; nobody writes to it


def _misfit(sparsity: Sparsity, grid: tuple[int, ...], steps: int | None) -> str | None:
    try:
        check_grid(sparsity, grid)
        if steps is not None:
            check_schedules(sparsity, steps)
    except InputError as error:
        return str(error)
    return None


VARIANTS: dict[str, Variant] = {}  # by name: rows of the modules beside this one, and those of register()


def variant_of(config: Any, boundary: float | None = None) -> Variant:
    """How a network with this config is usually sampled: its row of VARIANTS, or else the first that says that it matches.

    Args:
        config: of the network.
        boundary: time at which a second network of the same sizes takes over; None: there is one.

    Raises:
        InputError: there is none.
    """
    two = boundary is not None
    rows = [row for row in VARIANTS.values() if type(row.config) is type(config)]
    rows.sort(key=lambda row: (row.boundary is not None) != two)  # one of two networks may be sampled alone
    same = next((row for row in rows if row.config == config), None)
    found = same or next((row.of(config) for row in rows if row.matches(config)), None)
    if found is None:
        kind = f"{type(config).__name__}, two networks" if two else type(config).__name__
        raise InputError(f"config {kind}: expected one of a model among {', '.join(VARIANTS)}")
    return found if found.boundary == boundary else replace(found, boundary=boundary)

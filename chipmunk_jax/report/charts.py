"""Charts of a page as fragments of HTML; places are shares of the width and the height, so that text keeps its size."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

HEIGHT = 300  # pixels of the frontier
LABEL = 20  # pixels from one label to the next
HEADROOM = 0.12  # of the height, above the best sample
# Kinds of steps as step_kinds() names them, from most work to none, in the words of the legend.
KINDS = {
    "dense": "dense",
    "dense, one side": "dense, one side of guidance",
    "full": "full",
    "select": "full, chooses keys",
    "select neurons": "delta, chooses neurons",
    "select neurons, one side": "delta, chooses neurons, one side of guidance",
    "delta": "delta",
    "delta, one side": "delta, one side of guidance",
    "skipped": "skipped",
}


@dataclass(frozen=True)
class Point:
    """A way to sample on the frontier."""

    name: str
    cost: float  # share of the dense sample's work
    levels: Sequence[float]  # PSNR of each sample, dB
    kind: str  # class of its colour

    @property
    def level(self) -> float:
        """The median."""
        return float(np.median(self.levels))


def frontier(points: Sequence[Point], best: float, floor: float | None = None, other: str = "") -> str:
    """HTML of PSNR against the share of the dense sample's work; the dense sample, which has no PSNR, at the upper edge.

    Args:
        points: of all ways but the dense one.
        best: PSNR, dB, above which samples are equal but for rounding; drawn at the upper edge, too.
        floor: PSNR of a dense sample in another dtype, where it was made.
        other: that dtype.
    """
    shown = [level for point in points for level in point.levels if level < best]
    shown += [floor] if floor is not None and floor < best else []
    low, high = (min(shown) - 1, max(shown) + 1) if shown else (0.0, best)
    ticks = _ticks(low, high)
    low = min(low, ticks[0])
    high += HEADROOM * (high - low) / (1 - HEADROOM)
    up = lambda level: 100 * (1 - (min(level, high) - low) / (high - low))
    lines = [f'<line class="grid" x1="0" x2="100%" y1="{up(t):.2f}%" y2="{up(t):.2f}%"/>' for t in ticks]
    lines += [f'<line class="grid" x1="{x}%" x2="{x}%" y1="0" y2="100%"/>' for x in (0, 25, 50, 75, 100)]
    if floor is not None and floor < best:
        y = up(floor)
        lines.append(f'<line class="floor" x1="0" x2="100%" y1="{y:.2f}%" y2="{y:.2f}%"/>')
        lines.append(f'<text class="note" x="6" y="{y:.2f}%" dy="-6">dense in {other}: {floor:.1f} dB</text>')
    marks = [
        f'<circle class="one {p.kind}" cx="{100 * p.cost:.2f}%" cy="{up(level):.2f}%" r="3"/>'
        for p in points
        for level in p.levels
    ]
    marks += [f'<circle class="{p.kind}" cx="{100 * p.cost:.2f}%" cy="{up(p.level):.2f}%" r="6"/>' for p in points]
    marks.append('<circle class="dense" cx="100%" cy="0%" r="6"/>')
    marks.append('<text class="label" x="100%" y="0%" dx="-12" dy="5" text-anchor="end">dense</text>')
    drawn = "".join(lines + marks + _labels(points, up))
    return (
        f'<div class="plot" style="--tall:{HEIGHT}px"><div class="y">{_marks(ticks, up, "top", "")}</div>'
        f'<svg role="img" aria-label="PSNR against the share of the dense work">{drawn}</svg>'
        f'<div class="x">{_marks((0, 25, 50, 75, 100), float, "left", " %")}</div></div>'
    )


def _labels(points: Sequence[Point], up: Callable[[float], float]) -> list[str]:
    """The names of points beside them, none on another or beneath the chart, on the side where there is room."""
    ordered, found = sorted(points, key=lambda point: -point.level), []
    heights = [up(point.level) * HEIGHT / 100 + 4 for point in ordered]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + LABEL)
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], HEIGHT - 4 - LABEL * (len(heights) - 1 - i))
    for point, y in zip(ordered, heights, strict=True):
        side = 'dx="14"' if point.cost < 0.5 else 'dx="-14" text-anchor="end"'
        place = f'x="{100 * point.cost:.2f}%" y="{y:.1f}" {side}'
        found.append(f'<text class="label {point.kind}" {place}>{escape(point.name)}</text>')
    return found


def drift(samples: Sequence[Sequence[float]]) -> str:
    """HTML of a line a sample and the mean of all, steps to the right.

    Args:
        samples: relative L2 of the clean tokens to the dense ones, from 0 up, [samples, steps].
    """
    lines = np.asarray(samples)
    high = float(lines.max()) * 1.08 or 1.0
    ticks = [tick for tick in _ticks(0, high) if tick <= high]
    up = lambda value: 100 * (1 - value / high)
    path = lambda line: " ".join(f"{i + 0.5:g},{up(value):.2f}" for i, value in enumerate(line))
    across = lines.shape[1]
    drawn = [f'<line class="grid" x1="0" x2="{across}" y1="{up(t):.2f}" y2="{up(t):.2f}"/>' for t in ticks]
    drawn += [f'<polyline class="one" points="{path(line)}"/>' for line in lines]
    drawn.append(f'<polyline class="mean" points="{path(lines.mean(0))}"/>')
    return (
        f'<div class="y"><em>drift</em>{_marks([100 * t for t in ticks], lambda t: up(t / 100), "top", " %")}</div>'
        f'<svg class="lines" role="img" aria-label="drift by step" viewBox="0 0 {across} 100" preserveAspectRatio="none">'
        f"{''.join(drawn)}</svg>"
    )


def kinds_strip(kinds: Sequence[str]) -> str:
    """HTML of a cell a step, coloured by its kind, one of KINDS."""
    cells = (f'<i class="{_word(kind)}" title="step {i}: {KINDS[kind]}"></i>' for i, kind in enumerate(kinds))
    return f'<div class="cells">{"".join(cells)}</div>'


def kinds_legend(kinds: Sequence[str]) -> str:
    """HTML of the kinds that there are, of KINDS, and how many steps are of each."""
    found = [kind for kind in KINDS if kind in kinds]
    items = (f'<li><i class="{_word(kind)}"></i>{KINDS[kind]}: {list(kinds).count(kind)}</li>' for kind in found)
    return f'<ul class="legend">{"".join(items)}</ul>'


def heat_rows(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """For layers that are alike their name, and HTML of a cell a step, the darker the more of the columns it computes.

    Args:
        runs: of by_layer().
    """
    rows = []
    for run in runs:
        first, last = run["layers"]
        name = f"layer {first}" if first == last else f"layers {first} to {last}"
        cells = (
            f'<i title="step {i}, {name}: {100 * share:.0f} %"><b style="opacity:{share:.3f}"></b></i>'
            for i, share in enumerate(run["shares"])
        )
        rows.append((name, f'<div class="cells heat">{"".join(cells)}</div>'))
    return rows


def step_axis(steps: int) -> str:
    """HTML of the numbers of so many steps, under the middles of their cells."""
    every = next(gap for gap in (1, 2, 5, 10, 20, 50, 100, steps) if steps / gap <= 12)
    return f'<div class="x">{_marks(range(0, steps, every), lambda i: 100 * (i + 0.5) / steps, "left", "")}</div>'


def _marks(values: Iterable[float], place: Callable[[float], float], side: str, unit: str) -> str:
    """Numbers beside an axis, in their places, percent."""
    return "".join(f'<span style="{side}:{place(value):.2f}%">{value:g}{unit}</span>' for value in values)


def _ticks(low: float, high: float) -> list[float]:
    """A few round numbers from at most `low` to at most `high`."""
    rough = (high - low) / 4
    scale = 10.0 ** np.floor(np.log10(rough))
    step = next(scale * factor for factor in (1, 2, 2.5, 5, 10) if scale * factor >= rough)
    first = np.floor(low / step)
    return [float(round(tick, 10)) for tick in step * np.arange(first, np.floor(high / step) + 1)]


def _word(kind: str) -> str:
    """The classes of a kind of step."""
    return kind.replace(" ", "-").replace(",-", " ")

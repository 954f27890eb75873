"""Speed-up against sparsity, with the line that nothing can pass without doing less; quality against cost, a line a method."""

import importlib.util
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chipmunk_jax.errors import InputError
from chipmunk_jax.report.ways import SAME
from chipmunk_jax.whole import whole

PLOTTED = ("column_attention", "mlp")  # whose time should fall with the columns left out
PANELS = 2  # of quality in a row
Series = dict[str, list[tuple[float, float]]]  # points in ascending order, by name


def check_plotting() -> None:
    """Raises InputError unless matplotlib is there."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("matplotlib is not installed: a plot needs it (pip install 'matplotlib>=3.9')")


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the records of column_attention and mlp to a PNG file, or where there are none, those of quality.

    Raises:
        InputError: no matplotlib, or no record to draw.
    """
    check_plotting()
    from matplotlib.figure import Figure  # without pyplot: no display, no state

    speedups, frontiers = _speedups(records), _frontiers(records)
    if not speedups and not frontiers:
        kinds = ", ".join(sorted({entry["benchmark"] for entry in records}))
        wanted = f"{' or '.join(PLOTTED)} with a time and some sparsity, or quality with a cost"
        raise InputError(f"records of {kinds}: nothing to plot; expected some of {wanted}")
    panels = {"": speedups} if speedups else frontiers
    across = min(len(panels), PANELS)
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(3 + 5 * across, 1 + 5 * down), layout="constrained")
    every = list(figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flat)
    for axes in every[len(panels) :]:
        axes.remove()
    for axes, (name, series) in zip(every, panels.items(), strict=False):
        if speedups:
            _draw_speedups(axes, series)
        else:
            _draw_frontier(axes, series, list(dict.fromkeys(itertools.chain(*panels.values()))))
        axes.set_title(name, fontsize="medium")
        axes.grid(True, which="both", alpha=0.3)
        axes.set_ylabel("times as fast as dense" if speedups else "mean PSNR to the dense sample, dB")
        axes.set_xlabel("columns left out, %" if speedups else "cost, %")
        axes.label_outer()
    devices = ", ".join(sorted({str(entry.get("device")) for entry in records}))
    figure.suptitle(devices if speedups else f"{devices}; {_cost_of(records)}", fontsize="medium")
    lines = {line.get_label(): line for axes in figure.axes for line in axes.get_legend_handles_labels()[0]}
    inside, below = dict(loc="upper left"), dict(loc="outside lower center", ncols=1 + across)
    (axes if speedups else figure).legend(lines.values(), lines, fontsize="small", **(inside if speedups else below))
    with whole(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


def _draw_speedups(axes, series: Series) -> None:
    most = max(sparsity for points in series.values() for sparsity, _ in points)
    sparsities = [most * i / 200 for i in range(201)]
    axes.plot([100 * s for s in sparsities], [1 / (1 - s) for s in sparsities], "--", color="gray", label="ideal")
    for name, points in series.items():
        axes.plot(*zip(*((100 * s, speedup) for s, speedup in points), strict=True), "o-", label=name)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")


def _speedups(records: Sequence[dict[str, Any]]) -> Series:
    """(sparsity, speed-up) in ascending order, of each benchmark, variant and shape but for the columns kept.

    Of several records of the same the last one counts.
    """
    series: dict[str, dict[float, float]] = {}
    for entry in records:
        if entry["benchmark"] in PLOTTED and entry.get("speedup") and "K" in entry["shape"]:
            shape = " ".join(f"{name} {size}" for name, size in entry["shape"].items() if name not in ("B", "K"))
            name = f"{entry['benchmark']} {entry['variant']}, {shape}"
            series.setdefault(name, {})[entry["sparsity"]] = entry["speedup"]
    return {name: sorted(points.items()) for name, points in series.items()}


def _draw_frontier(axes, series: Series, methods: Sequence[str]) -> None:
    """Each method's points, and a line through those that no cheaper one of it beats; a colour for each of the methods."""
    from matplotlib import colormaps

    colours = colormaps["tab20"]  # strong and pale ones in turn
    for name, points in series.items():
        best = [(c, level) for c, level in points if all(other < level for cost, other in points if cost < c)]
        colour = colours(methods.index(name) * 2 % 19)
        axes.plot(*zip(*best, strict=True), "o-", color=colour, label=name)
        axes.plot(*zip(*points, strict=True), "o", color=colour, alpha=0.4)


def _cost_of(records: Sequence[dict[str, Any]]) -> str:
    """What the costs of a frontier are."""
    priced = sorted({entry["cost_of"] for entry in records if "cost_of" in entry})
    by = f"by the step times of {' and '.join(priced)}" if priced else "by count"
    return f"cost, % of the dense sample, {by}"


def _frontiers(records: Sequence[dict[str, Any]]) -> dict[str, Series]:
    """(cost in percent, mean PSNR) of each method, for each model, size and guidance by name.

    The cost is that of a published model or, where no record has one, by count. Samples that are the dense ones but for rounding
    are left out: they would need a scale of their own.
    """
    judged = [entry for entry in records if entry["benchmark"] == "quality" and "method" in entry]
    cost = "cost" if any("cost" in entry for entry in judged) else "executed"
    found: dict[str, Series] = {}
    for entry in judged:
        if cost in entry and entry["mean_psnr"] < SAME:
            size = "x".join(str(entry[axis]) for axis in ("frames", "height", "width") if axis in entry)
            series = found.setdefault(f"{entry['model']} {size}, guidance {entry['guidance']:g}", {})
            series.setdefault(entry["method"], []).append((100 * entry[cost], entry["mean_psnr"]))
    return {name: {method: sorted(points) for method, points in series.items()} for name, series in found.items()}

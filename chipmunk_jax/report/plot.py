"""Speed-up against sparsity, with the line that nothing can pass without doing less; quality against cost, a line a method."""

import importlib.util
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chipmunk_jax.errors import InputError
from chipmunk_jax.report.quality import SAME
from chipmunk_jax.whole import whole

PLOTTED = ("column_attention", "mlp")  # whose time should fall with the columns left out
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

    speedups, frontier = _speedups(records), _frontier(records)
    if not speedups and not frontier:
        kinds = ", ".join(sorted({entry["benchmark"] for entry in records}))
        wanted = f"{' or '.join(PLOTTED)} with a time and some sparsity, or quality with a cost"
        raise InputError(f"records of {kinds}: nothing to plot; expected some of {wanted}")
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    if speedups:
        _draw_speedups(axes, speedups)
    else:
        _draw_frontier(axes, frontier, records)
    names = (
        sorted({str(entry.get(key)) for entry in records}) for key in (("device",) if speedups else ("model", "device"))
    )
    axes.set_title(", ".join(itertools.chain(*names)), fontsize="medium")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize="small")
    with whole(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


def _draw_speedups(axes, series: Series) -> None:
    most = max(sparsity for points in series.values() for sparsity, _ in points)
    sparsities = [most * i / 200 for i in range(201)]
    axes.plot([100 * s for s in sparsities], [1 / (1 - s) for s in sparsities], "--", color="gray", label="ideal")
    for name, points in series.items():
        axes.plot(*zip(*((100 * s, speedup) for s, speedup in points), strict=True), "o-", label=name)
    axes.set(xlabel="columns left out, %", ylabel="times as fast as dense", yscale="log")
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


def _draw_frontier(axes, series: Series, records: Sequence[dict[str, Any]]) -> None:
    """Each method's points, and a line through those that no cheaper one of it beats."""
    for name, points in series.items():
        best = [(c, level) for c, level in points if all(other < level for cost, other in points if cost < c)]
        (line,) = axes.plot(*zip(*best, strict=True), "o-", label=name)
        axes.plot(*zip(*points, strict=True), "o", color=line.get_color(), alpha=0.4)
    priced = sorted({entry["cost_of"] for entry in records if "cost_of" in entry})
    cost = "\n".join(["by the step times of", *priced]) if priced else "by count"
    axes.set(xlabel=f"cost, % of the dense sample, {cost}", ylabel="mean PSNR to the dense sample, dB")


def _frontier(records: Sequence[dict[str, Any]]) -> Series:
    """(cost in percent, mean PSNR) of each method and, where they differ, model and guidance.

    The cost is that of a published model or, where no record has one, by count. Samples that are the dense ones but for rounding
    are left out: they would need a scale of their own.
    """
    judged = [entry for entry in records if entry["benchmark"] == "quality" and "method" in entry]
    cost = "cost" if any("cost" in entry for entry in judged) else "executed"
    of = lambda entry: {"model": entry["model"], "guidance": f"guidance {entry['guidance']}"}
    differing = [key for key in ("model", "guidance") if len({of(entry)[key] for entry in judged}) > 1]
    series: Series = {}
    for entry in judged:
        if cost in entry and entry["mean_psnr"] < SAME:
            name = ", ".join([entry["method"], *(of(entry)[key] for key in differing)])
            series.setdefault(name, []).append((100 * entry[cost], entry["mean_psnr"]))
    return {name: sorted(points) for name, points in series.items()}

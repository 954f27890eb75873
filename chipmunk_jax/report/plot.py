"""Speed-up against sparsity, with the line that nothing can pass without doing less."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chipmunk_jax.errors import InputError
from chipmunk_jax.whole import whole

PLOTTED = ("column_attention", "mlp")  # whose time should fall with the columns left out


def check_plotting() -> None:
    """Raises InputError unless matplotlib is there."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("matplotlib is not installed: a plot needs it (pip install 'matplotlib>=3.9')")


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the records of column_attention and mlp to a PNG file.

    Raises:
        InputError: no matplotlib, or no record to draw.
    """
    check_plotting()
    from matplotlib.figure import Figure  # without pyplot: no display, no state

    series = _series(records)
    if not series:
        kinds = ", ".join(sorted({entry["benchmark"] for entry in records}))
        wanted = f"{' or '.join(PLOTTED)} with a time and some sparsity"
        raise InputError(f"records of {kinds}: nothing to plot; expected some of {wanted}")
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    most = max(sparsity for points in series.values() for sparsity, _ in points)
    sparsities = [most * i / 200 for i in range(201)]
    axes.plot([100 * s for s in sparsities], [1 / (1 - s) for s in sparsities], "--", color="gray", label="ideal")
    for name, points in series.items():
        axes.plot(*zip(*((100 * s, speedup) for s, speedup in points), strict=True), "o-", label=name)
    devices = ", ".join(sorted({str(entry.get("device")) for entry in records}))
    axes.set(xlabel="columns left out, %", ylabel="times as fast as dense", yscale="log", title=devices)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize="small")
    with whole(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


def _series(records: Sequence[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
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

"""Records of measurements: one JSON object a line, and the table that a terminal shows."""

import json
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jaxlib

from chipmunk_jax.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measurement. None where a number does not apply, or could not be had."""

    benchmark: str  # column_attention, dense_colsum, topk, mlp, step or sample
    variant: str
    shape: dict[str, int]  # by the letters of the kernels (H, N, d, K, M, D, F, G, group), or height, width, batch, ..
    sparsity: float | dict[str, Any] | None  # fraction of columns left out; of a step or a sample, its configuration
    dtype: str
    ms: float | None  # median of the repeats, of one call; None where the result was wrong
    ms_spread: float | None = None  # slowest less fastest repeat; None of one
    repeats: int
    baseline: str
    baseline_ms: float | None
    speedup: float | None = None  # baseline_ms / ms
    rel_err: float | None  # |x - reference| / |reference|
    error: str | None = None  # why there is no time
    tflops: float | None = None  # counted operations, 10^12 a second
    gbps: float | None = None  # counted bytes that must be read and written, 10^9 a second
    of_matrix_ceiling: float | None = None  # fraction of what a large matrix product reached in this run
    of_copy_ceiling: float | None = None  # fraction of what a large copy reached in this run
    model: str | None = None
    implementation: str | None = None  # that was asked for; None for the fastest
    extra: dict[str, Any] = field(default_factory=dict)  # of one benchmark alone; keys beside the others in the file

    def as_dict(self, commit: str | None = None) -> dict[str, Any]:
        """All fields and where they were measured, ready for JSON."""
        entry = asdict(self)
        return entry | entry.pop("extra") | machine(commit)


def times(seconds: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """The fields of a Record that follow from seconds of its repeats and of the baseline's; none where it has no time."""
    ms, baseline_ms = (1e3 * statistics.median(s) if s else None for s in (seconds, baseline))
    return {
        "ms": ms,
        "ms_spread": 1e3 * (max(seconds) - min(seconds)) if len(seconds) > 1 else None,
        "repeats": len(seconds),
        "baseline_ms": baseline_ms,
        "speedup": baseline_ms / ms if ms and baseline_ms else None,
    }


@cache
def _versions() -> dict[str, Any]:
    """What does not change in a process."""
    return {
        "device": jax.devices()[0].device_kind,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "runtime": " ".join(jax.devices()[0].client.platform_version.split()),  # its own words: CUDA's version, or cpu
        "commit": _output("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"),
    }


def machine(commit: str | None = None) -> dict[str, Any]:
    """Device, driver and versions; and the most memory the process has had in use so far, in bytes.

    Args:
        commit: what to record where git is not there.
    """
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return _versions() | ({"commit": commit} if commit else {}) | {"peak_bytes": peak}


def _output(*command: str) -> str | None:
    """What a command prints, None where it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def append(path: str | Path, records: Iterable[dict[str, Any]]) -> None:
    """Adds a line a record to a file."""
    with Path(path).open("a") as file:
        file.writelines(json.dumps(entry, allow_nan=False) + "\n" for entry in records)


def read(path: str | Path, *, timed: bool = True) -> list[dict[str, Any]]:
    """The records of a file of JSON lines.

    Args:
        path: of the file.
        timed: whether records of quality, which have no time, are refused.

    Raises:
        InputError: no such file, or a line that is no record.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    records = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not _has(entry, {"benchmark": str, "variant": str}):
            raise InputError(f"{path}: line {number} is no record of chipmunk bench")
        if timed and not _has(entry, TIMED):
            raise InputError(
                f"{path}: line {number} is a record of {entry['benchmark']}, without a time; expected those of "
                "kernels, steps or samples"
            )
        records.append(entry)
    if not records:
        raise InputError(f"{path}: holds no record")
    return records


TIMED = {"shape": dict, "sparsity": object, "ms": (int, float, type(None))}


def _has(entry: Any, types: dict[str, Any]) -> bool:
    return isinstance(entry, dict) and all(key in entry and isinstance(entry[key], types[key]) for key in types)


def shape_text(entry: dict[str, Any]) -> str:
    """H 24 N 4352 d 128 .."""
    return " ".join(f"{name} {size}" for name, size in entry["shape"].items())


def sparsity_text(entry: dict[str, Any]) -> str:
    """In percent; nothing for a configuration, which has no single number."""
    return f"{100 * entry['sparsity']:.1f} %" if isinstance(entry["sparsity"], (int, float)) else ""


def ms_text(ms: float | None, digits: int = 4, *, of: float | None = None) -> str:
    """Milliseconds; beyond 10 s, or where those that they belong to are, seconds with their unit; nothing for None."""
    if ms is None:
        return ""
    return f"{ms / 1e3:.{digits}g} s" if (of or ms) > 1e4 else f"{ms:.{digits}g}"


COLUMNS = {  # title -> (key, format)
    "speed-up": ("speedup", "{:.2f} x"),
    "rel err": ("rel_err", "{:.1e}"),
    "TFLOP/s": ("tflops", "{:.3g}"),
    "GB/s": ("gbps", "{:.4g}"),
    "of matrix": ("of_matrix_ceiling", "{:.1%}"),
    "of copy": ("of_copy_ceiling", "{:.1%}"),
}


def table(records: Sequence[dict[str, Any]]) -> str:
    """Aligned lines under a header, without columns that say nothing; an error stands where the numbers would be."""
    spreads = [ms_text(r["ms_spread"], 2, of=r["ms"]) for r in records]
    shown = {"ms": [ms_text(r["ms"]) for r in records], "+-": spreads}
    shown |= {
        title: [form.format(r[key]) if r[key] is not None else "" for r in records]
        for title, (key, form) in COLUMNS.items()
    }
    texts = {
        "benchmark": [r["benchmark"] for r in records],
        "variant": [r["variant"] for r in records],
        "shape": [shape_text(r) for r in records],
        "sparsity": [sparsity_text(r) for r in records],
    }
    return align(texts | shown, [r["error"] and f"no time: {r['error']}" for r in records])


def align(columns: dict[str, list[str]], notes: Sequence[str | None]) -> str:
    """Columns by title as text, numbers to the right, words to the left, a note behind each line."""
    columns = {title: cells for title, cells in columns.items() if any(cells)}
    widths = [max(map(len, (title, *cells))) for title, cells in columns.items()]
    words = [any(cell[:1].isalpha() for cell in cells) for cells in columns.values()]
    lines = []
    for cells, note in zip([tuple(columns), *zip(*columns.values(), strict=True)], [None, *notes], strict=True):
        fields = zip(cells, widths, words, strict=True)
        line = "  ".join(cell.ljust(width) if word else cell.rjust(width) for cell, width, word in fields)
        lines.append(f"{line}  {note or ''}".rstrip())
    return "\n".join(lines)

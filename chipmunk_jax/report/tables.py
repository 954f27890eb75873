"""Records as a terminal shows them: tables of aligned columns."""

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

from chipmunk_jax.report.records import Entry


def table(
    rows: Sequence[Entry],
    columns: Mapping[str, Callable[[Entry], str]],
    note: Callable[[Entry], str | None] = lambda row: None,
) -> str:
    """Aligned lines under a header, numbers to the right, words to the left, without columns that are empty.

    Args:
        rows: one a line.
        columns: by title, what a row says there.
        note: what stands after the last column.
    """
    cells = {title: [text(row) for row in rows] for title, text in columns.items()}
    cells = {title: texts for title, texts in cells.items() if any(texts)}
    widths = [max(map(len, (title, *texts))) for title, texts in cells.items()]
    words = [any(text[:1].isalpha() for text in texts) for texts in cells.values()]
    lines = []
    for texts, end in zip([tuple(cells), *zip(*cells.values(), strict=True)], [None, *map(note, rows)], strict=True):
        fields = zip(texts, widths, words, strict=True)
        line = "  ".join(text.ljust(width) if word else text.rjust(width) for text, width, word in fields)
        lines.append(f"{line}  {end or ''}".rstrip())
    return "\n".join(lines)


def shape_text(entry: Entry) -> str:
    """The sizes of a record in words: H 24 N 4352 d 128 .."""
    return " ".join(f"{name} {size}" for name, size in entry["shape"].items())


def sparsity_text(entry: Entry) -> str:
    """The share of columns that a record leaves out, in percent; "" for a configuration, which has no single one."""
    return f"{100 * entry['sparsity']:.1f} %" if isinstance(entry["sparsity"], (int, float)) else ""


def ms_text(ms: float | None, digits: int = 4, *, of: float | None = None) -> str:
    """Milliseconds as digits; beyond 10 s seconds with their unit; "" for None.

    Args:
        ms: milliseconds.
        digits: that are significant.
        of: milliseconds that these belong to, as a spread does, and whose unit they get; None: they stand alone.
    """
    if ms is None:
        return ""
    return f"{ms / 1e3:.{digits}g} s" if (of or ms) > 1e4 else f"{ms:.{digits}g}"


def _number(key: str, form: str) -> Callable[[Entry], str]:
    return lambda entry: "" if entry[key] is None else form.format(entry[key])


WORDS = {  # columns that say what was measured
    "benchmark": itemgetter("benchmark"),
    "variant": itemgetter("variant"),
    "shape": shape_text,
    "sparsity": sparsity_text,
}
NUMBERS = {
    "ms": lambda entry: ms_text(entry["ms"]),
    "+-": lambda entry: ms_text(entry["ms_spread"], 2, of=entry["ms"]),
    "speed-up": _number("speedup", "{:.2f} x"),
    "rel err": _number("rel_err", "{:.1e}"),
    "TFLOP/s": _number("tflops", "{:.3g}"),
    "GB/s": _number("gbps", "{:.4g}"),
    "of matrix": _number("of_matrix_ceiling", "{:.1%}"),
    "of copy": _number("of_copy_ceiling", "{:.1%}"),
}


def record_table(entries: Sequence[Entry]) -> str:
    """A table of a line a record; an error stands where its numbers would be."""
    return table(entries, WORDS | NUMBERS, lambda entry: entry["error"] and f"no time: {entry['error']}")


def _share(number: float | None) -> str:
    """In percent."""
    return "" if number is None else f"{100 * number:.1f}"


def _of_dense(entry: Entry, part: str) -> float:
    """Share of the keys or neurons of a dense sample, whose steps may be more."""
    return entry["density"][part] * entry["steps"] / entry.get("reference_steps", entry["steps"])


def _change(entry: Entry) -> str:
    """Of the mean PSNR from the first record, with its standard error."""
    error = entry["difference_error"]
    return f"{entry['difference']:+.2f}" + ("" if error is None else f" +- {error:.2f}")


def _likeness(key: str, form: str) -> Callable[[Entry], str]:
    return lambda entry: form.format(entry[key]) if key in entry else ""


LIKENESS = {  # percentages are of what the dense samples compute
    "variant": itemgetter("variant"),
    "steps": lambda entry: f"{entry['steps'] - entry['skipped_steps']:.4g}",
    "keys %": lambda entry: _share(_of_dense(entry, "attention")),
    "MLP %": lambda entry: _share(_of_dense(entry, "mlp")),
    "work %": lambda entry: _share(entry.get("executed")),
    "cost %": lambda entry: _share(entry.get("cost")),
    "s": _likeness("seconds", "{:.3g}"),
    "mean dB": _likeness("mean_psnr", "{:.2f}"),
    "median": _likeness("median_psnr", "{:.2f}"),
    "worst": _likeness("worst_psnr", "{:.2f}"),
    "to the first": _change,
    "SSIM": _likeness("mean_ssim", "{:.3f}"),
    "distance": _likeness("mean_perceptual", "{:.3f}"),
}


def quality_table(entries: Sequence[Entry]) -> str:
    """A table of a line a configuration: what it computes, what that costs, how near it comes; without what was not recorded."""
    return table(entries, LIKENESS)


def stages_text(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """Seconds, and where they are known GB of peak memory, of the stages of a pipeline, in one line."""
    peak = lambda stage: f" ({stage['peak_bytes'] / 1e9:.1f} GB)" if stage["peak_bytes"] else ""
    return ", ".join(f"{name} {stage['seconds']:.2f} s{peak(stage)}" for name, stage in stages.items())


SHOWN = 24  # kernels of a table; the rest is one line


def kernel_table(kernels: list[Entry]) -> str:
    """Aligned lines: kernel, calls, ms of all calls, us a call, share of the step."""
    *kernels, gap = kernels
    shown, rest = kernels[:SHOWN], kernels[SHOWN:]
    if rest:
        shown.append({"kernel": "(others)"} | {key: sum(k[key] for k in rest) for key in ("calls", "ms")})
    shown.append(gap)
    total = sum(k["ms"] for k in shown)
    columns = {
        "kernel": lambda k: k["kernel"][:48],
        "calls": lambda k: f"{k['calls']:g}" if k["calls"] else "",
        "ms": lambda k: f"{k['ms']:.2f}",
        "us a call": lambda k: f"{1e3 * k['ms'] / k['calls']:.1f}" if k["calls"] else "",
        "share": lambda k: f"{k['ms'] / total:.1%}",
    }
    return table(shown, columns)

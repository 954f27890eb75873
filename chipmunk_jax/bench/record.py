"""Record: one measurement of a time."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from chipmunk_jax.report.records import Entry, machine


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measurement. None where a number does not apply, or could not be had."""

    benchmark: str  # column_attention, dense_colsum, topk, mlp, step or sample
    variant: str
    shape: dict[str, int]  # by the letters of the kernels (H, N, d, K, M, D, F, G, group), or height, width, batch, ..
    sparsity: float | dict[str, Any] | None = None  # fraction of columns left out; of a step or a sample, all settings
    dtype: str = "bfloat16"
    ms: float | None = None  # median of the repeats, of one call; None where the result was wrong
    ms_spread: float | None = None  # slowest less fastest repeat; None of one
    repeats: int = 0
    baseline: str = "none"
    baseline_ms: float | None = None
    speedup: float | None = None  # baseline_ms / ms
    rel_err: float | None = None  # |x - reference| / |reference|
    error: str | None = None  # why there is no time
    tflops: float | None = None  # counted operations, 10^12 a second
    gbps: float | None = None  # counted bytes that must be read and written, 10^9 a second
    of_matrix_ceiling: float | None = None  # fraction of what a large matrix product reached in this run
    of_copy_ceiling: float | None = None  # fraction of what a large copy reached in this run
    model: str | None = None
    implementation: str | None = None  # that was asked for; None for the fastest
    extra: dict[str, Any] = field(default_factory=dict)  # of one benchmark alone; keys beside the others in the file

    def as_dict(self, commit: str | None = None) -> Entry:
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

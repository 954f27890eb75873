"""Where a step spends its time: its kernels, from the profiler's trace of some runs."""

import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from chipmunk_jax.errors import InputError
from chipmunk_jax.report.records import Entry

RUNS = 3


def kernel_times(run: Callable[[], Any]) -> list[Entry]:
    """{"kernel", "calls", "ms"} of every kernel of one run on a GPU, the longest first; then the time in which none ran.

    Args:
        run: compiled and warm; enqueues its work and returns what to wait for.

    Raises:
        InputError: a trace without a GPU.
    """
    jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(RUNS):
                last = run()
            jax.block_until_ready(last)
        (trace,) = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(trace)).planes
        lines = [line for plane in planes if plane.name.startswith("/device:GPU") for line in plane.lines]
        events = [event for line in lines if line.name.startswith("Stream") for event in line.events]
    if not events:
        raise InputError(f"no kernels in a trace of {jax.devices()[0].device_kind}: expected a GPU")
    busy, calls = Counter(), Counter()
    for event in events:
        # The compiler numbers what occurs more than once: column_fc1__1, fusion_12.
        name = re.sub(r"([._]+\d*)+$", "", event.name)
        busy[name] += event.duration_ns
        calls[name] += 1
    span = max(event.end_ns for event in events) - min(event.start_ns for event in events)
    rows = [
        {"kernel": name, "calls": round(calls[name] / RUNS, 1), "ms": ns / RUNS / 1e6}
        for name, ns in busy.most_common()
    ]
    return [*rows, {"kernel": "(between kernels)", "calls": None, "ms": (span - busy.total()) / RUNS / 1e6}]

"""Whole samples by their schedules: so many steps of each kind, times what `chipmunk bench step` measured of one."""

from collections import Counter
from typing import Any

import numpy as np

from chipmunk_jax.schedule import AttentionPhase, MlpPhase, attention_phases, check_schedules, mlp_phases
from chipmunk_jax.sparsity import Sparsity, load_sparsity, to_dict

Entry = dict[str, Any]  # of a file of records


def by_schedule(entries: list[Entry], steps: int, sparsity: Sparsity | None = None) -> list[Entry]:
    """Records of a dense and of a sparse sample: that of the dense step with other times, so measured where that was.

    Args:
        entries: records of a file, among them those of the steps of one model and size.
        steps: of the sampler.
        sparsity: whose schedules count; its other values do not, as the steps were timed with those they name. None: those.

    Raises:
        ValueError: steps of several models or sizes, of none, or a kind that the schedule needs and that has no time.
    """
    timed = {entry["variant"]: entry for entry in entries if entry["benchmark"] == "step"}
    asked = {(entry["model"], str(entry["shape"])) for entry in entries if entry["benchmark"] == "step"}
    if len(asked) != 1:
        raise ValueError(f"steps of {len(asked)} models and sizes: expected those of one")
    sparsity = sparsity or load_sparsity(timed["dense"]["sparsity"])
    check_schedules(sparsity, steps)
    samples = {"dense": Counter(dense=steps), "sparse": Counter(kinds(sparsity, steps))}
    ms = {name: _ms(timed, counts) for name, counts in samples.items()}
    return [
        timed["dense"]
        | {
            "benchmark": "sample",
            "variant": f"{name}, by its steps",
            "shape": timed["dense"]["shape"] | {"steps": steps},
            "sparsity": to_dict(sparsity),
            "ms": ms[name],
            "ms_spread": None,
            "rel_err": None,
            "baseline": "dense, by its steps",
            "baseline_ms": ms["dense"],
            "speedup": ms["dense"] / ms[name],
            "counts": dict(counts),
            "peak_bytes": max(entry["peak_bytes"] or 0 for entry in timed.values()),
        }
        for name, counts in samples.items()
    ]


def kinds(sparsity: Sparsity, steps: int) -> list[str]:
    """The kind of every step, as bench_step names them; where none is the same, one that computes more."""
    attention, mlp = sparsity.attention, sparsity.mlp
    attending = attention_phases(attention, steps) if attention else np.full(steps, AttentionPhase.DELTA)
    feeding = mlp_phases(mlp, steps) if mlp else np.full(steps, MlpPhase.DELTA)
    skipped = np.isin(np.arange(steps), sparsity.step_cache.skip_steps if sparsity.step_cache else ())
    names = np.select(
        [
            skipped,
            attending == AttentionPhase.SELECT,
            (attending != AttentionPhase.DELTA) | (feeding == MlpPhase.FULL),
            feeding == MlpPhase.SELECT_DELTA,
        ],
        ["skipped", "select", "full", "select neurons"],
        "delta",
    )
    return names.tolist()


def _ms(timed: dict[str, Entry], counts: Counter) -> float:
    if missing := [kind for kind in counts if kind not in timed or timed[kind]["ms"] is None]:
        raise ValueError(f"no time of a step of kind {', '.join(missing)}: expected one in the records")
    return sum(count * timed[kind]["ms"] for kind, count in counts.items())

"""Whole samples by their schedules: so many steps of each kind, times what `chipmunk bench step` measured of one."""

import json
from collections import Counter
from dataclasses import replace
from typing import Any

from chipmunk_jax.errors import InputError
from chipmunk_jax.fit import check_schedules, fit
from chipmunk_jax.pipelines import VARIANTS
from chipmunk_jax.report.price import ONE_SIDE, by_kind, step_kinds
from chipmunk_jax.report.records import Entry, sparsity_of
from chipmunk_jax.schedule import plan_steps
from chipmunk_jax.sparsity import PLANNED_GATES, Sparsity, to_dict


def by_schedule(entries: list[Entry], steps: int, sparsity: Sparsity | None = None) -> list[Entry]:
    """Records of whole samples: dense, sparse, and where some steps are skipped, with and without; without the drift guard.

    Each is the record of the dense step with other times, so measured where that was.

    Args:
        entries: records of the steps of one run.
        steps: of the sampler.
        sparsity: what the steps were timed with, but for its schedules; None: that.

    Raises:
        InputError: steps of several runs, of none, of another sparsity, or a kind that the schedule needs and that has no time.
    """
    timed = {entry["variant"]: entry for entry in entries}
    runs = {json.dumps([entry[key] for key in ("model", "shape", "dtype", "sparsity")]) for entry in entries}
    if len(runs) != 1:
        raise InputError(f"steps of {len(runs)} models, sizes, dtypes or sparsities: expected those of one")
    measured = sparsity_of(entries[0])
    sparsity = replace(sparsity or measured, max_drift=None)  # what it would add depends on the sample
    given, timed_with = _settings(sparsity), _settings(replace(measured, max_drift=None))
    if names := [name for name in given if name in timed_with and given[name] != timed_with[name]]:
        found = ", ".join(f"{name}={given[name]}: timed with {timed_with[name]}" for name in names)
        raise InputError(f"{found}; expected the sparsity of the timed steps, but for its schedules")
    check_schedules(sparsity, steps)
    every = replace(sparsity, step_cache=None)
    variant = VARIANTS.get(entries[0]["model"])
    sides = 2 if variant and variant.guidance is not None else 1
    samples = {"dense": (measured, Counter(dense=steps)), "sparse": (every, Counter(kinds(every, steps, sides)))}
    if sparsity.step_cache:
        samples["sparse, steps skipped"] = (sparsity, Counter(kinds(sparsity, steps, sides)))
    ms = {name: _ms(timed, counts) for name, (_, counts) in samples.items()}
    common = {key: value for key, value in timed["dense"].items() if key != "kernels"}
    return [
        common
        | {
            "benchmark": "sample",
            "variant": f"{name}, by its steps",
            "shape": common["shape"] | {"steps": steps},
            "sparsity": to_dict(config),
            "ms": ms[name],
            "ms_spread": None,
            "rel_err": None,
            "baseline": "dense, by its steps",
            "baseline_ms": ms["dense"],
            "speedup": ms["dense"] / ms[name],
            "counts": dict(counts),
            "peak_bytes": max(entry["peak_bytes"] or 0 for entry in timed.values()) or None,
        }
        for name, (config, counts) in samples.items()
    ]


# Settings that say when.
SCHEDULES = {"full_step_every", "full_step_schedule", "select_every", "step_cache", "guidance_cache", "schedule_steps"}


def _settings(sparsity: Sparsity) -> dict[str, Any]:
    """All settings but the schedules by their dotted names; a part is "some" or None."""
    found: dict[str, Any] = {}
    for name, value in to_dict(sparsity).items():
        fields = value if isinstance(value, dict) else {}
        found |= {name: "some" if fields else value} | {f"{name}.{field}": x for field, x in fields.items()}
    return {name: value for name, value in found.items() if not SCHEDULES & set(name.split("."))}


def kinds(sparsity: Sparsity, steps: int, sides: int = 1) -> list[str]:
    """The kind of every step, as of step_kinds(), with so many sides of guidance."""
    fitted = fit(sparsity, steps)
    if fitted.step_cache and fitted.step_cache.decides:
        raise InputError(
            f"gate={fitted.step_cache.gate!r}: it decides in a sample; expected one of {', '.join(PLANNED_GATES)}"
        )
    plan = plan_steps(fitted, steps, tokens=1, mlp_width=1, sides=sides)  # its phases are those of any size
    return step_kinds(plan, steps)


def _ms(timed: dict[str, Entry], counts: Counter) -> float:
    ms = {kind: entry["ms"] for kind, entry in timed.items() if entry["ms"] is not None}
    if missing := [kind for kind in (kind.removesuffix(ONE_SIDE) for kind in counts) if kind not in ms]:
        raise InputError(
            f"no time of a step of kind {', '.join(missing)}; time the steps again with `chipmunk bench step`"
        )
    return sum(count * by_kind(ms, kind) for kind, count in counts.items())

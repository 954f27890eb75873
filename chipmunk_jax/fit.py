"""fit(): a Sparsity whose schedules name steps of a sample of one length, for a sample of any length, or for a part of one."""

from collections.abc import Set
from dataclasses import replace
from typing import Any

import numpy as np

from chipmunk_jax.errors import InputError
from chipmunk_jax.sparsity import AttentionSparsity, MlpSparsity, Sparsity, StepCache

Span = tuple[int, int]  # steps from the first to before the second
Part = AttentionSparsity | MlpSparsity


def fit(sparsity: Sparsity, steps: int, span: Span | None = None) -> Sparsity:
    """The Sparsity for so many steps: its schedules are lists of these steps, and a part that would save nothing is None.

    A full step stays at its time of the path. A step is skipped where the number of skipped steps so far, in proportion, reaches a
    whole number; where that step must run, a later one that need not, or else an earlier one. Steps 0 and 1 are full in attention,
    step 0 in the MLP. For as many steps as the schedules are written for they are what they were.

    Args:
        sparsity: its schedules are stretched from schedule_steps, or where that is None, as they are.
        steps: of the sampler.
        span: the steps that one of several networks runs, which has caches of its own; they count from 0 in the result. None: all.

    Raises:
        InputError: a schedule that names a step beyond those that it is written for, or skips a full one.
    """
    check_schedules(sparsity, steps)
    written, span = sparsity.schedule_steps or steps, span or (0, steps)
    full = {name: _full(part, written, steps, span) for name, part in _parts(sparsity).items()}
    cache = sparsity.step_cache
    skips = _skips(cache, written, steps, span, set().union(*full.values())) if cache else ()
    fitted: dict[str, Any] = {"step_cache": replace(cache, skip_steps=skips) if cache and skips else None}
    for name, numbers in full.items():
        part, delta = getattr(sparsity, name), span[1] - span[0] > len(numbers.union(skips))
        every = min(max(1, _stretched(part.full_step_every, written, steps)), steps)
        schedule = dict(full_step_schedule=tuple(sorted(numbers)), full_step_every=every)
        fitted[name] = replace(part, **schedule) if delta else None
    return replace(sparsity, **fitted, schedule_steps=None)


def check_schedules(sparsity: Sparsity, steps: int) -> None:
    """Raises InputError where a schedule names a step beyond those that it is written for, or skips a full one."""
    written, parts = sparsity.schedule_steps or steps, _parts(sparsity)
    schedules = {f"{name}.full_step_schedule": part.full_step_schedule or () for name, part in parts.items()}
    skipped = sparsity.step_cache.skip_steps if sparsity.step_cache else ()
    latest = {name: max(numbers, default=0) for name, numbers in schedules.items()}
    latest["step_cache.skip_steps"] = max(skipped, default=0)
    name = max(latest, key=latest.get)
    if (last := latest[name]) >= written:
        are = "schedule_steps says" if sparsity.schedule_steps else "there are"
        raise InputError(
            f"{name} names step {last}, but {are} {written} steps (0 to {written - 1}): expected {last + 1} or more, or "
            f"another {name}"
        )
    for name, part in parts.items():
        if both := sorted(_full(part, written, written, (0, written)) & set(skipped)):
            raise InputError(
                f"step_cache.skip_steps names step {both[0]}: expected none that the {name} computes in full"
            )


def _parts(sparsity: Sparsity) -> dict[str, Part]:
    """Those of attention and MLP that are sparse."""
    parts = {"attention": sparsity.attention, "mlp": sparsity.mlp}
    return {name: part for name, part in parts.items() if part}


def _full(part: Part, written: int, steps: int, span: Span) -> set[int]:
    """Steps of a span, counted from 0, that a part computes in full."""
    first, stop = span
    named = part.full_step_schedule or range(0, written, part.full_step_every)
    stretched = {min(_stretched(step, written, steps), steps - 1) for step in named}
    # A network's first steps fill its caches: attention's measures what its second chooses keys by.
    filling = range(min(2 if isinstance(part, AttentionSparsity) else 1, stop - first))
    return {step - first for step in stretched if first <= step < stop}.union(filling)


def _stretched(step: int, written: int, steps: int) -> int:
    """The step of so many at the nearest time of the path to that of a step of `written`."""
    return (2 * step * steps + written) // (2 * written)


def _skips(config: StepCache, written: int, steps: int, span: Span, full: Set[int]) -> tuple[int, ...]:
    """The skipped steps of a span, counted from 0, as many as in proportion where there is room within the times of the list."""
    first, stop = span
    skipped = np.isin(np.arange(written + 1), config.skip_steps)
    so_far = np.concatenate([[0], np.cumsum(skipped)])
    # Of every step's start: how many steps are skipped before it, in whole numbers.
    step, part = np.divmod(np.arange(first, stop + 1) * written, steps)
    due = (so_far[step] * steps + skipped[step] * part) // written
    due = (due - due[0]).tolist()
    start, end = min(config.skip_steps) * steps, (max(config.skip_steps) + 1) * steps
    # Never the first, nor the last, unless the list names its own.
    last = steps - 1 if end < written * steps else steps
    within = [i - first for i in range(first, stop) if (i + 1) * written > start and i * written < end and i != last]
    free = [step for step in within if step not in {0, *full}]
    chosen: list[int] = []
    for step in free:
        if due[step + 1] > len(chosen):
            chosen.append(step)
    left = [step for step in reversed(free) if step not in chosen]
    return tuple(sorted(chosen + left[: due[-1] - len(chosen)]))

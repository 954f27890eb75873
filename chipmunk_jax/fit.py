"""fit(): a Sparsity whose schedules name steps of a sample of one length, for a sample of any length, or for a part of one."""

import itertools
import math
from collections.abc import Collection, Sequence, Set
from dataclasses import replace
from typing import Any

import numpy as np

from chipmunk_jax.errors import InputError
from chipmunk_jax.sparsity import (
    PAPER_SKIPS,
    PAPER_STEPS,
    AttentionSparsity,
    GuidanceCache,
    MlpSparsity,
    Sparsity,
    StepCache,
)

Span = tuple[int, int]  # steps from the first to before the second
Part = AttentionSparsity | MlpSparsity


def fit(sparsity: Sparsity, steps: int, span: Span | None = None, guided: bool = True) -> Sparsity:
    """The Sparsity for so many steps: its schedules are lists of these steps, and a part that would save nothing is None.

    A full step stays at its time of the path. A step is skipped where the number of skipped steps so far, in proportion, reaches a
    whole number; where that step must run, a later one that need not, or else an earlier one. Steps 0 and 1 are full in attention,
    step 0 in the MLP. Both sides of guidance run in full steps and in step 0. For as many steps as the schedules are written for
    they are what they were. Where nothing is left to save, tokens have no patches, either: samples are dense ones, bit for bit.

    Args:
        sparsity: its schedules are stretched from schedule_steps, or where that is None, as they are.
        steps: of the sampler.
        span: the steps that one of several networks runs, which has caches of its own; they count from 0 in the result. None: all.
        guided: whether there are two sides of guidance; with one no step is one-sided.

    Raises:
        InputError: a schedule that names a step beyond those that it is written for, or a full one as skipped or one-sided.
    """
    check_schedules(sparsity, steps)
    written, span = sparsity.schedule_steps or steps, span or (0, steps)
    full = {name: _full(part, written, steps, span) for name, part in _parts(sparsity).items()}
    whole, halved = set().union(*full.values()), sparsity.guidance_cache if guided else None
    cache = sparsity.step_cache and _fit_cache(sparsity.step_cache, written, steps, span, whole)
    skipped = cache.skip_steps if cache and cache.gate == "list" else ()
    halved = halved and _fit_sides(halved, written, steps, span, whole, skipped)
    fitted: dict[str, Any] = {"step_cache": cache, "guidance_cache": halved}
    for name, numbers in full.items():
        part, delta = getattr(sparsity, name), span[1] - span[0] > len(numbers.union(skipped))
        every = min(max(1, _stretched(part.full_step_every, written, steps)), steps)
        schedule = dict(full_step_schedule=tuple(sorted(numbers)), full_step_every=every)
        fitted[name] = replace(part, **schedule) if delta else None
    result = replace(sparsity, **fitted, schedule_steps=None)
    result = result if result.has_delta_or_skipped_steps else replace(result, max_drift=None)
    return replace(result, patches=()) if result.saves_nothing else result


def check_schedules(sparsity: Sparsity, steps: int) -> None:
    """Raises InputError where a schedule names a step beyond those it is written for, or a full one as skipped or one-sided."""
    written, parts = sparsity.schedule_steps or steps, _parts(sparsity)
    schedules = {f"{name}.full_step_schedule": part.full_step_schedule or () for name, part in parts.items()}
    saving = {
        "step_cache.skip_steps": (sparsity.step_cache and sparsity.step_cache.skip_steps) or (),
        "guidance_cache.one_sided_steps": (sparsity.guidance_cache and sparsity.guidance_cache.one_sided_steps) or (),
    }
    latest = {name: max(numbers, default=0) for name, numbers in (schedules | saving).items()}
    name = max(latest, key=latest.get)
    if (last := latest[name]) >= written:
        are = "schedule_steps says" if sparsity.schedule_steps else "there are"
        raise InputError(
            f"{name} names step {last}, but {are} {written} steps (0 to {written - 1}): expected {last + 1} or more, or "
            f"another {name}"
        )
    for part, (name, numbers) in itertools.product(parts, saving.items()):
        if both := sorted(_full(parts[part], written, written, (0, written)) & set(numbers)):
            raise InputError(f"{name} names step {both[0]}: expected none that the {part} computes in full")


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


def _fit_cache(config: StepCache, written: int, steps: int, span: Span, full: Set[int]) -> StepCache | None:
    """The StepCache with a list of the steps that it skips, or of those that its gate may skip; None where there are none."""
    first, stop = span
    warm = max(1, math.ceil(config.warm_up * (stop - first)))
    free = [step for step in range(warm, stop - first) if step not in full and first + step != steps - 1]
    if config.skip_steps is not None or config.gate == "list":
        named, of = (PAPER_SKIPS, PAPER_STEPS) if config.skip_steps is None else (config.skip_steps, written)
        skips = _stretched_skips(named, of, steps, span, full)
    elif config.gate == "share":
        skips = _even_skips(round(config.share * (stop - first)), free, config.max_skips)
    elif config.gate == "mag":
        skips = _magcache_skips(config, steps, first, free)
    else:
        skips = free
    gate = config.gate if config.decides else "list"
    return replace(config, gate=gate, skip_steps=tuple(skips)) if skips else None


def _fit_sides(
    config: GuidanceCache, written: int, steps: int, span: Span, full: Set[int], skipped: Collection[int]
) -> GuidanceCache | None:
    """The GuidanceCache with a list of the steps that run one side; None where there are none."""
    first, stop = span
    run = [step for step in range(stop - first) if step not in skipped]
    if config.one_sided_steps is not None:
        chosen = [step for step in run if (first + step) * written // steps in config.one_sided_steps]
        chosen = [step for step in chosen if step and step not in full]
    else:
        chosen, last = [], 0
        for step in run:
            late = first + step >= config.after * steps
            if late and step not in full and 0 < (step - last) * written < config.every * steps:
                chosen.append(step)
            else:
                last = step
    return replace(config, one_sided_steps=tuple(chosen)) if chosen else None


def _stretched_skips(named: Sequence[int], written: int, steps: int, span: Span, full: Set[int]) -> list[int]:
    """Steps of a span, counted from 0, as many as in proportion where there is room within the times of the list."""
    first, stop = span
    skipped = np.isin(np.arange(written + 1), named)
    so_far = np.concatenate([[0], np.cumsum(skipped)])
    # Of every step's start: how many steps are skipped before it, in whole numbers.
    step, part = np.divmod(np.arange(first, stop + 1) * written, steps)
    due = (so_far[step] * steps + skipped[step] * part) // written
    due = (due - due[0]).tolist()
    start, end = min(named) * steps, (max(named) + 1) * steps
    # Never the first, nor the last, unless the list names its own.
    last = steps - 1 if end < written * steps else steps
    within = [i - first for i in range(first, stop) if (i + 1) * written > start and i * written < end and i != last]
    free = [step for step in within if step not in {0, *full}]
    chosen: list[int] = []
    for step in free:
        if due[step + 1] > len(chosen):
            chosen.append(step)
    left = sorted(set(free).difference(chosen), reverse=True)
    return sorted(chosen + left[: due[-1] - len(chosen)])


def _even_skips(count: int, free: Sequence[int], most: int) -> list[int]:
    """So many of the free steps, evenly, at most so many in a row."""
    chosen: list[int] = []
    for place, step in enumerate(free, 1):
        if count * place // len(free) > len(chosen) and chosen[-most:] != [*range(step - most, step)]:
            chosen.append(step)
    return chosen


def _magcache_skips(config: StepCache, steps: int, first: int, free: Sequence[int]) -> list[int]:
    """The free steps until which the residual's magnitude is estimated to have changed little since the last that ran.

    With the ratios g of neighbouring steps, R = product of g and E = sum of |1 - R| since then: skipped while E < threshold. In a
    sample of another number of steps than there are ratios, their product over a part of the path stays.
    """
    if config.coefficients is None or config.threshold is None:
        raise InputError("gate='mag': expected coefficients, a ratio for each step, and a threshold with it")
    logs = np.cumsum(np.log(config.coefficients))
    at = np.interp(np.arange(steps) * len(logs) / steps, np.arange(len(logs)), logs)
    chosen, ratio, error, row, free_steps = [], 0.0, 0.0, 0, set(free)
    for step in range(1, max(free, default=0) + 1):
        ratio += at[first + step] - at[first + step - 1]
        error, row = error + abs(1 - math.exp(ratio)), row + 1
        if step in free_steps and error < config.threshold and row <= config.max_skips:
            chosen.append(step)
        else:
            ratio, error, row = 0.0, 0.0, 0
    return chosen

"""A baseline and its candidates: each checked against a reference, then all timed in turn."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from chipmunk_jax.bench.records import Record, times
from chipmunk_jax.bench.timing import PROGRAM_SECONDS, Chain, Inputs, State, Timed, time_in_turn
from chipmunk_jax.quality import relative_l2

# What bf16 may cost against float32: probabilities or activations, and the result, are each rounded to 2^-9 = 2e-3 of their size,
# which gives 1e-3 to 5e-3 in relative L2. A wrong column, group or layer gives 0.1 and more.
BF16_TOLERANCE = 1e-2
EXACT = 0.0  # of lists of columns


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches at best, measured in the same run."""

    flops: float  # of a large bf16 matrix product, a second
    bytes: float  # of a large copy, read and written, a second


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to compute something, with what is needed to time and to judge it."""

    variant: str
    shape: dict[str, int]
    sparsity: float  # fraction of the columns left out
    call: Callable[[Inputs, State], tuple[Any, State]]
    sets: Sequence[Inputs]
    state: State = ()
    expected: Callable[[Inputs, State], list[np.ndarray]]  # float32, of a part of the result; before the first call
    observed: Callable[[Any, State], list[np.ndarray]]  # the same part of a call's outputs and state
    tolerance: float = BF16_TOLERANCE  # of the relative L2 error
    operations: float = 0  # counted, of one call
    bytes: float = 0  # that one call must read and write, counted
    share: float = 1  # of the whole work that a call does: its time is divided by it
    compiler_options: dict[str, Any] | None = None
    chain: Callable[..., Any] = field(default=Chain)  # how calls are put in a row; another framework has its own


@dataclass
class Outcome:
    """What became of a candidate."""

    candidate: Candidate
    seconds: list[float] = field(default_factory=list)  # a call of the whole work, one number a repeat
    rel_err: float | None = None
    error: str | None = None


def measure(
    candidates: Sequence[Candidate], ceilings: Ceilings, *, repeats: int, most_calls: int, bar: tqdm
) -> list[Outcome]:
    """An outcome for each candidate, in order. A wrong one, or one that fails, has an error and no time.

    Args:
        candidates: timed in turn; the first is the baseline.
        ceilings: tell how many calls fill a program.
        repeats: timed runs of each.
        most_calls: in one program.
        bar: moves by 1 + repeats for each candidate.
    """
    outcomes, timed = [Outcome(candidate) for candidate in candidates], {}
    for i, outcome in enumerate(outcomes):
        bar.set_postfix_str(f"checking {outcome.candidate.variant}")
        try:
            timed[str(i)] = _check(outcome, ceilings, most_calls)
        except (ValueError, NotImplementedError, RuntimeError) as error:  # RuntimeError: of compilers and devices
            outcome.error = _sentence(error)
        if outcome.error:
            timed.pop(str(i), None)
            bar.update(repeats)
        bar.update()
    bar.set_postfix_str("timing")
    for name, seconds in time_in_turn(timed, repeats, report=lambda _: bar.update()).items():
        outcome = outcomes[int(name)]
        outcome.seconds = [second / outcome.candidate.share for second in seconds]
    return outcomes


def _check(outcome: Outcome, ceilings: Ceilings, most_calls: int) -> Timed:
    """The compiled candidate, run once: outcome gets its error against the reference."""
    c = outcome.candidate
    ideal = max(c.operations / ceilings.flops, c.bytes / ceilings.bytes, 1e-9)
    calls = int(min(most_calls, max(1, round(PROGRAM_SECONDS / ideal))))
    chain = c.chain(c.call, c.sets, c.state, calls=calls, compiler_options=c.compiler_options)
    expected = c.expected(chain.last_inputs, c.state)
    outputs, state = chain.dispatch()
    found = c.observed(outputs[-1], state)
    del outputs, state
    outcome.error, outcome.rel_err = judge(found, expected, c.tolerance)
    return chain.timed()


def judge(found: Sequence[np.ndarray], expected: Sequence[np.ndarray], tolerance: float) -> tuple[str | None, Any]:
    """What is wrong, or None; and the largest relative L2 error of the arrays, None where one is not finite."""
    if not all(np.isfinite(x).all() for x in found):
        return "the result is not finite", None
    rel_err = max(relative_l2(x, y) for x, y in zip(found, expected, strict=True))
    if rel_err <= tolerance:
        return None, rel_err
    return f"relative error {rel_err:.2g} against float32, expected at most {tolerance:g}", rel_err


def to_records(
    benchmark: str, outcomes: Sequence[Outcome], ceilings: Ceilings, dtype: str = "bfloat16"
) -> list[Record]:
    """A record for each outcome, the first being the baseline."""
    baseline = outcomes[0]
    name = baseline.candidate.variant
    if baseline.candidate.share != 1:
        name += f" on 1/{round(1 / baseline.candidate.share)} of the rows, scaled"
    return [_record(benchmark, outcome, name, baseline.seconds, ceilings, dtype) for outcome in outcomes]


def _record(
    benchmark: str, outcome: Outcome, baseline: str, baseline_seconds: Sequence[float], ceilings: Ceilings, dtype: str
) -> Record:
    c, seconds = outcome.candidate, outcome.seconds
    one_call = statistics.median(seconds) * c.share if seconds else None
    rate = lambda work: work / one_call if one_call and work else None
    flops, moved = rate(c.operations), rate(c.bytes)
    return Record(
        benchmark=benchmark,
        variant=c.variant,
        shape=c.shape,
        sparsity=round(c.sparsity, 6),
        dtype=dtype,
        baseline=baseline,
        rel_err=outcome.rel_err,
        error=outcome.error,
        tflops=flops and flops / 1e12,
        gbps=moved and moved / 1e9,
        of_matrix_ceiling=flops and flops / ceilings.flops,
        of_copy_ceiling=moved and moved / ceilings.bytes,
        **times(seconds, baseline_seconds),
    )


def failed(benchmark: str, shape: dict[str, int], error: Exception) -> Record:
    """The record of a case whose inputs could not be drawn, or that failed while it was timed."""
    return Record(
        benchmark=benchmark, variant="all", shape=shape, sparsity=None, dtype="bfloat16", baseline="none",
        rel_err=None, error=_sentence(error), **times((), ()),
    )  # fmt: skip


def _sentence(error: Exception) -> str:
    """Its first words, on one line."""
    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        return f"out of memory on {jax.devices()[0]}"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]

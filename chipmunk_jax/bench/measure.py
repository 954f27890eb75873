"""A baseline and its candidates: each checked against a reference, then all timed in turn."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from chipmunk_jax.bench.record import Record, times
from chipmunk_jax.bench.timing import PROGRAM_SECONDS, Chain, Inputs, State, time_in_turn
from chipmunk_jax.quality import relative_l2

# What bf16 may cost against float32: probabilities or activations, and the result, are each rounded to 2^-9 = 2e-3 of their size,
# which gives 1e-3 to 5e-3 in relative L2. A wrong column, group or layer gives 0.1 and more.
BF16_TOLERANCE = 1e-2
EXACT = 0.0  # of lists of columns

Pairs = Iterable[tuple[np.ndarray, np.ndarray]]  # parts of a result as they were found, and as a reference has them


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches at best, measured in the same run."""

    flops: float  # of a large bf16 matrix product, a second
    bytes: float  # of a large copy, read and written, a second


@dataclass(frozen=True)
class Candidate:
    """One way to compute something, with what is needed to time and to judge it."""

    variant: str
    shape: dict[str, int]  # by letters; K columns are computed of F neurons, or else of N keys
    call: Callable[[Inputs, State], tuple[Any, State]]
    sets: Sequence[Inputs]
    # (inputs, outputs of a call, state before the first call, state after this one) -> parts in float32. Before is on the host.
    check: Callable[[Inputs, Any, State, State], Pairs]
    _: KW_ONLY
    state: State = ()
    operations: float = 0  # counted, of the whole work
    bytes: float = 0  # that the whole work must read and write, counted
    share: float = 1  # of the whole work that a call does: its time is divided by it
    tolerance: float = BF16_TOLERANCE  # of the relative L2 error
    compiler_options: dict[str, Any] | None = None
    chain: type[Chain] = Chain  # how calls are put in a row; another framework has its own

    @property
    def sparsity(self) -> float:
        """Fraction of the columns left out."""
        return 1 - self.shape["K"] / self.shape.get("F", self.shape.get("N")) if "K" in self.shape else 0.0


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
            outcome.error = sentence(error)
        if outcome.error:
            timed.pop(str(i), None)
            bar.update(repeats)
        bar.update()
    bar.set_postfix_str("timing")
    for name, seconds in time_in_turn(timed, repeats, report=lambda _: bar.update()).items():
        outcome = outcomes[int(name)]
        outcome.seconds = [second / outcome.candidate.share for second in seconds]
    return outcomes


def _check(outcome: Outcome, ceilings: Ceilings, most_calls: int) -> Chain:
    """The compiled candidate, run once: outcome gets its error against the reference."""
    c = outcome.candidate
    ideal = max(c.share * c.operations / ceilings.flops, c.share * c.bytes / ceilings.bytes, 1e-9)
    calls = int(min(most_calls, max(1, round(PROGRAM_SECONDS / ideal))))
    before = jax.tree.map(np.array, c.state)  # a copy: the first call may write over the state
    chain = c.chain(c.call, c.sets, c.state, calls=calls, compiler_options=c.compiler_options)
    outputs, after = chain.dispatch()
    outcome.error, outcome.rel_err = judge(c.check(chain.last_inputs, outputs.pop(), before, after), c.tolerance)
    return chain


def judge(pairs: Pairs, tolerance: float) -> tuple[str | None, float | None]:
    """What is wrong, or None; and the largest relative L2 error of what was found, None where that is not finite."""
    pairs = list(pairs)
    if not all(np.isfinite(found).all() for found, _ in pairs):
        return "the result is not finite", None
    rel_err = max(relative_l2(found, expected) for found, expected in pairs)
    if rel_err <= tolerance:
        return None, rel_err
    return f"relative error {rel_err:.2g} against float32, expected at most {tolerance:g}", rel_err


def to_records(
    benchmark: str, outcomes: Sequence[Outcome], ceilings: Ceilings, implementation: str | None = None
) -> list[Record]:
    """A record for each outcome, the first being the baseline."""
    baseline = outcomes[0]
    name, parts = baseline.candidate.variant, round(1 / baseline.candidate.share)
    name += f" on 1/{parts} of the rows, scaled" if parts > 1 else ""
    common = dict(benchmark=benchmark, baseline=name, implementation=implementation)
    return [
        Record(
            variant=outcome.candidate.variant,
            shape=outcome.candidate.shape,
            sparsity=round(outcome.candidate.sparsity, 6),
            rel_err=outcome.rel_err,
            error=outcome.error,
            **times(outcome.seconds, baseline.seconds),
            **_rates(outcome, ceilings),
            **common,
        )
        for outcome in outcomes
    ]


def _rates(outcome: Outcome, ceilings: Ceilings) -> dict[str, float | None]:
    """The fields of a Record that follow from counted work; None where there is no time, or nothing was counted."""
    second = statistics.median(outcome.seconds) if outcome.seconds else None
    rate = lambda work: work / second if second and work else None
    flops, moved = rate(outcome.candidate.operations), rate(outcome.candidate.bytes)
    return {
        "tflops": flops and flops / 1e12,
        "gbps": moved and moved / 1e9,
        "of_matrix_ceiling": flops and flops / ceilings.flops,
        "of_copy_ceiling": moved and moved / ceilings.bytes,
    }


def sentence(error: Exception) -> str:
    """Its first words, on one line."""
    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        return f"out of memory on {jax.devices()[0]}"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]

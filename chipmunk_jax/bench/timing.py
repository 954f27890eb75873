"""Seconds a call on the device, of several candidates in turn.

Why the times mean what they say:

- Everything is compiled and has run before the clock starts, and one whole run of each candidate is dropped as its warm-up, but of
  steps and samples that take longer than one: those have run when they were checked.
- A timed run is many calls and one wait at its end. Dispatching a compiled program from Python takes 50 to 100 us, but it only
  fills the device's queue: where a program keeps the device busy for longer (PROGRAM_SECONDS), the next one is queued before it
  ends, and the wait itself (some 20 us) is spread over REPEAT_SECONDS. Short kernels therefore run several times in one program.
- Every call inside a program really runs: each has inputs of its own, so that no two are equal and merged, and all outputs are
  results of the program, so that none is dropped. Barriers would not do: XLA removes elements of a barrier that nobody reads, and
  on a CPU merges equal calls behind barriers (both tried). XLA queues the kernels of a program one after the other. Nothing is
  sliced or stacked in front of a kernel: inputs are separate arguments, the loop over them is unrolled, as a slice would be copied.
- The sets of inputs together exceed the L2 cache, most many times, or one does alone: a call finds nothing of its own there.
- Candidates alternate, run by run, so that a drift of the clock or the temperature meets them all. A run is long enough for the
  clock that its own power leaves: in the 25 ms after dense attention a kernel still runs at the clock of that.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from chipmunk_jax.memory import nbytes

PROGRAM_SECONDS = 5e-4  # of device work in one program: several times what its dispatch takes
REPEAT_SECONDS = 0.3  # of a timed run: ten thousand times the wait at its end
MOST_DISPATCHES = 1000  # of a timed run, whatever a clock says
SETS_BYTES = 1e9  # of all sets of inputs: twenty times the L2 cache of an H100
MOST_SETS = 256  # of inputs too small to reach it; a quarter of a megabyte each still exceeds the cache

Inputs = Any  # a pytree of arrays
State = Any  # a pytree of arrays that calls update in place


@dataclass(frozen=True)
class Timed:
    """Work to time: dispatch() enqueues `calls` calls and returns what to wait for."""

    dispatch: Callable[[], Any]
    calls: int = 1
    wait: Callable[[Any], Any] = jax.block_until_ready


def time_in_turn(
    timed: "Mapping[str, Timed | Chain]",
    repeats: int,
    *,
    warm: bool = True,
    clock: Callable[[], float] = time.perf_counter,
    report: Callable[[str], None] = lambda name: None,
) -> dict[str, list[float]]:
    """Seconds a call, for each candidate one number a repeat.

    Args:
        timed: candidates by name; their first call, which compiles, is over.
        repeats: timed runs of each.
        warm: first run each, untimed: one dispatch, which says how many fill a repeat, and if that is more than one, these too.
            Without, a repeat is one dispatch.
        clock: seconds.
        report: called with a candidate's name after each of its timed runs.
    """
    dispatches = dict.fromkeys(timed, 1)
    for name, one in timed.items() if warm else ():
        fill = REPEAT_SECONDS / max(_run(one, 1, clock), 1e-9)
        dispatches[name] = min(MOST_DISPATCHES, max(1, math.ceil(fill)))
        if dispatches[name] > 1:  # a longer one has warmed up by now
            _run(one, dispatches[name], clock)
    seconds = {name: [] for name in timed}
    for _ in range(repeats):
        for name, one in timed.items():
            seconds[name].append(_run(one, dispatches[name], clock) / (dispatches[name] * one.calls))
            report(name)
    return seconds


def _run(one: Timed, dispatches: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(dispatches):
        last = one.dispatch()  # the previous result goes, and its memory with it
    one.wait(last)
    return clock() - start


class Chain:
    """Work to time: calls in a row as one compiled program, over rotating sets of inputs."""

    def __init__(
        self,
        call: Callable[[Inputs, State], tuple[Any, State]],
        sets: Sequence[Inputs],
        state: State = (),
        *,
        calls: int,
        compiler_options: dict[str, Any] | None = None,
    ):
        """A chain of `calls` calls, or of as many as there are sets.

        Args:
            call: inputs, state -> outputs, state; pure. What it updates in place is state and no output.
            sets: of inputs, of equal shapes. Where there are more than calls, programs take turns over portions of them.
            state: before the first call. Donated: the caller's is gone after the first dispatch.
            calls: in a program.
            compiler_options: of XLA, for the whole program.
        """
        self.calls = calls = min(calls, len(sets))
        self.portions = [list(sets[i * calls : (i + 1) * calls]) for i in range(len(sets) // calls)]
        self.state, self.turn = state, 0
        call = jax.jit(call)  # traced and lowered once, however often it stands in the program

        def program(portion, state):
            outputs = []
            for inputs in portion:
                output, state = call(inputs, state)
                outputs.append(output)
            return outputs, state

        self.program = jax.jit(program, donate_argnums=1, compiler_options=compiler_options)

    wait = staticmethod(jax.block_until_ready)

    @property
    def last_inputs(self) -> Inputs:
        """Of the last call in the first dispatch."""
        return self.portions[0][-1]

    def dispatch(self) -> tuple[Any, State]:
        """Outputs of all calls of the next program, and the state after it."""
        outputs, self.state = self.program(self.portions[self.turn % len(self.portions)], self.state)
        self.turn += 1
        return outputs, self.state


def input_sets(
    draw: Callable[[jax.Array], Inputs], key: jax.Array, *, least: int = 1, most: int = MOST_SETS
) -> list[Inputs]:
    """As many sets of inputs as make SETS_BYTES.

    Args:
        draw: key -> a set of arrays of its own.
        key: of the first.
        least, most: sets.
    """
    sets = [draw(key)]
    count = max(least, min(most, int(SETS_BYTES / nbytes(sets[0]))))
    return sets + [draw(jax.random.fold_in(key, i)) for i in range(1, count)]

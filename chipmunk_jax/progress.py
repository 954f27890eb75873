"""What the host shows and does while a sample runs: a bar, a callback, Ctrl-C. Nothing pure knows of it."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import io_callback
from tqdm import tqdm

from chipmunk_jax.strictness import usual_modes

Callback = Callable[[int, float, np.ndarray, np.ndarray], None]  # step, t, x, the clean sample that it leads to
Kind = Literal["", "steps", "samples"]  # what a run reports: nothing, that a step is over, or also its samples
# Seconds a step at any speed: a step takes 0.1 s on one model and 20 s on another, and the two are to be compared.
STEPS = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_inv_fmt}]"
REDRAWN = 1.0  # seconds after which a terminal shows the time again while nothing else changes


@dataclass
class Reporter:
    """The host's side of a run's progress, a context around it.

    The compiled program knows a run by its number alone, so that one program serves every run: it looks up the number here.
    """

    steps: int
    title: str  # of the bar: "dense" or "sparse"
    progress: bool
    callback: Callback | None
    first: int = 0  # number of the first step of the program that runs, where several make a sample
    error: BaseException | None = None  # the first one of the callback, raised when the run is over

    def __enter__(self) -> "Reporter":
        self.kind: Kind = "samples" if self.callback else "steps" if self.progress else ""
        self.run = np.int32(next(_numbers))
        options = dict(unit="step", bar_format=STEPS, disable=not self.progress)
        self.bar = tqdm(total=self.steps, desc=f"{self.title}: loading", **options)
        self._paused: float | None = time.time()  # since when no step runs; tqdm has this clock
        self._ticking = ticking(self.bar)
        self._ticking.__enter__()
        _reporters[int(self.run)] = self
        return self

    def __exit__(self, *_) -> None:
        del _reporters[int(self.run)]
        self._ticking.__exit__(None, None, None)
        self.bar.close()
        if self.error:
            raise self.error

    def pause(self, what: str) -> None:
        """Says what is done before the next step: "loading" or "compiling"."""
        self.bar.set_description(f"{self.title}: {what}")
        if self._paused is None:
            self._paused = time.time()

    def resume(self) -> None:
        """Says that steps run. The time and the rate that the bar shows are theirs alone."""
        if self._paused is not None and self.progress:
            now = time.time()
            self.bar.start_t += now - self._paused
            self.bar.last_print_t = now
        self._paused = None
        self.bar.set_description(f"{self.title}: sampling")

    def report(self, step: int, t: float, *samples: np.ndarray) -> None:
        self.bar.update()
        if self.callback and not self.error:
            try:
                self.callback(self.first + step, t, *samples)
            except BaseException as error:  # through the compiled program it would come out as an internal error of XLA
                self.error = error


_numbers = itertools.count()
_reporters: dict[int, Reporter] = {}


def on_step(run: jax.Array, kind: Kind) -> Callable[..., None] | None:
    """What denoise() calls after each step so that the Reporter of this number hears of it, ordered; None for nothing."""

    def tell(step: jax.Array, t: jax.Array, *samples: jax.Array) -> None:
        io_callback(_report, None, run, step, t, *(samples if kind == "samples" else ()), ordered=True)

    return tell if kind else None


def _report(run, step, t, *samples) -> None:
    if reporter := _reporters.get(int(run)):  # none for a run that was interrupted
        reporter.report(int(step), float(t), *map(np.asarray, samples))


def finished(program: jax.stages.Lowered, *args: Any, started: Callable[[], None] = lambda: None) -> Any:
    """What the program returns, once that and all callbacks are over; started() is called when it is compiled."""
    built = compiled(program)  # apart, so that nothing runs after a Ctrl-C while it compiles
    started()
    return executed(built, *args)


def compiled(program: jax.stages.Lowered) -> jax.stages.Compiled:
    """The program as the device runs it."""
    return _in_a_thread(program.compile)


def executed(program: jax.stages.Compiled, *args: Any) -> Any:
    """What a compiled program returns, once that and all callbacks are over."""

    def execute() -> Any:
        # The caller's modes are those of its thread. A compiled program is one whatever the caller debugs.
        with usual_modes(), jax.disable_jit(False):
            out = jax.block_until_ready(program(*args))
        jax.effects_barrier()  # of this thread
        return out

    return _in_a_thread(execute)


def _in_a_thread(work: Callable[[], Any]) -> Any:
    """What work() returns.

    JAX holds a KeyboardInterrupt until the device is done, and crashes in a process that ends while XLA compiles. So this thread
    only waits, which Ctrl-C ends at once, and another one works, which a process that ends waits for.
    """
    pool = ThreadPoolExecutor(1, "sample")
    try:
        return pool.submit(work).result()
    finally:
        pool.shutdown(wait=False)


@contextmanager
def phase(title: str, progress: bool) -> Iterator[None]:
    """Within, a line says what is being done, and for how long."""
    with tqdm(total=0, desc=title, bar_format="{desc}: {elapsed}", disable=not progress) as bar, ticking(bar):
        yield


@contextmanager
def ticking(bar: tqdm) -> Iterator[None]:
    """Within, a bar in a terminal shows how the time goes on, also while nothing happens."""
    if bar.disable or not bar.fp.isatty():
        yield
        return
    over = threading.Event()

    def tick() -> None:
        while not over.wait(REDRAWN):
            bar.refresh()

    thread = threading.Thread(target=tick, name="bar", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(REDRAWN)

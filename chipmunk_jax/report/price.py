"""What a sample would cost on a published model: each step of its plan, priced by the steps that were measured there."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from chipmunk_jax.errors import InputError
from chipmunk_jax.pipelines import VARIANTS, Variant
from chipmunk_jax.pipelines.variant import Settings
from chipmunk_jax.report import records
from chipmunk_jax.report.records import Entry, sparsity_of
from chipmunk_jax.report.work import Work, dense_work
from chipmunk_jax.sampling import plan_stacks
from chipmunk_jax.schedule import AttentionPhase, MlpPhase, Step, density, run_shares
from chipmunk_jax.sparsity import Sparsity

ONE_SIDE = ", one side"  # the end of the name of a kind of step that runs the prompt's side of guidance alone
NEEDED = ("dense", "full", "select", "delta", "skipped")  # kinds of steps, as `chipmunk bench step` names them


def step_kinds(plan: Step, steps: int) -> list[str]:
    """The kind of every step, as bench_step names them; where none computes just that, the one that is nearest.

    A one-sided step has the name of one that runs both sides, and ONE_SIDE.

    Args:
        plan: of plan_steps(), or a Step() for dense sampling.
        steps: of the sampler.
    """
    shares = np.broadcast_to(run_shares(plan), steps)
    end = {0.5: ONE_SIDE, 1.0: ""}
    return [name + end[run] if run else "skipped" for name, run in zip(_kinds(plan, steps), shares, strict=True)]


def _kinds(plan: Step, steps: int) -> list[str]:
    """Those of step_kinds(), as if every step ran both sides."""
    if not (plan.attention or plan.mlp):
        return ["dense"] * steps
    phases = lambda share, delta: np.full(steps, delta) if share is None else np.asarray(share.phase)
    attention, mlp = phases(plan.attention, AttentionPhase.DELTA), phases(plan.mlp, MlpPhase.DELTA)
    names = np.select(
        [
            attention == AttentionPhase.SELECT,
            (attention != AttentionPhase.DELTA) | (mlp == MlpPhase.FULL),
            mlp == MlpPhase.SELECT_DELTA,
        ],
        ["select", "full", "select neurons"],
        "delta",
    )
    return names.tolist()


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Prices of the steps of a published model, in dense steps."""

    name: str  # of the model, its size and the device
    kinds: dict[str, float]  # of the steps that were measured
    work: Work  # parts of a dense step's time
    column: float  # price of a chosen key or neuron in a delta step, over that of one in a dense step
    again: float  # the same in a full step, which computes it a second time

    def cost(self, plan: Step, steps: int, layers: int) -> float:
        """Sum of the prices of all steps of a sample, in dense steps; one-sided ones have half the price.

        Args:
            plan: of plan_steps(), or a Step() for dense sampling.
            steps: of the sampler.
            layers: of the model that the plan is of.
        """
        prices = self.of(plan, layers)
        return sum(by_kind(prices, kind) for kind in step_kinds(plan, steps))

    def of(self, plan: Step, layers: int) -> dict[str, float]:
        """The price of each kind of step with a plan's shares of columns, in dense steps; choosing columns costs the same for any.

        Args:
            plan, layers: as of cost().
        """
        dense, chosen = _delta_parts(self.work, plan, layers)
        full, delta = 1 + self.again * chosen, dense + self.column * chosen
        return {
            "dense": 1.0,
            "full": full,
            "select": full + self.kinds["select"] - self.kinds["full"],
            "select neurons": delta + self.kinds.get("select neurons", self.kinds["delta"]) - self.kinds["delta"],
            "delta": delta,
            "skipped": self.kinds["skipped"],
        }


def by_kind(known: Mapping[str, float], kind: str) -> float:
    """What is known of a kind of step_kinds(), half of it for one side."""
    whole = kind.removesuffix(ONE_SIDE)
    return known[whole] if kind == whole else known[whole] / 2


def read_prices(path: str | Path) -> Prices:
    """The prices by a file of `chipmunk bench step`; records of samples and kernels in it do not count.

    Args:
        path: of JSON lines.

    Raises:
        InputError: no such file, no steps in it, or what prices_of() refuses.
    """
    entries = records.read(path)
    if not (steps := [entry for entry in entries if entry["benchmark"] == "step"]):
        kinds = ", ".join(sorted({entry["benchmark"] for entry in entries}))
        raise InputError(f"{path}: records of {kinds}; expected those of `chipmunk bench step`")
    try:
        return prices_of(steps)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def prices_of(entries: Sequence[Entry]) -> Prices:
    """The prices by the step records of one run of `chipmunk bench step`, times in ms.

    The price of a kind of step is its time over that of the dense step, and two of them tell how a dense step's time splits into
    what may be sparse (a part P, the layers that are never sparse left out) and the rest, and what a share K of its columns costs:

        delta = (1 - P) + column P K
        full  = 1 + column P K              dense, and the chosen columns a second time, for the residual

    So delta, full and selecting steps have a price for any share. `column` is 1 where a kernel over columns is as fast, column by
    column, as the dense one. P is shared out between attention and MLP, where both are sparse, and the rest between what else there
    is, by the FLOPs of the model at the record's size. Where the MLP's cache is of activations, a full step copies these in place
    of computing columns twice: there P itself is by FLOPs, and only the delta step tells `column`.

    Raises:
        InputError: steps of several runs, a model that is not known, or shortened; a kind that has no time, or times that leave
            nothing for the rest or for the chosen columns.
    """
    if len({json.dumps([entry.get(key) for key in ("model", "shape", "dtype", "sparsity")]) for entry in entries}) != 1:
        raise InputError("steps of several models, sizes, dtypes or sparsities: expected those of one")
    first, ms = entries[0], {entry["variant"]: entry.get("ms") for entry in entries}
    if missing := [kind for kind in NEEDED if not ms.get(kind)]:
        raise InputError(f"no time of a step of kind {', '.join(missing)}; expected {', '.join(NEEDED)}")
    if (variant := VARIANTS.get(first.get("model"))) is None:
        raise InputError(f"steps of {first.get('model')}: expected one of {', '.join(VARIANTS)}")
    settings = variant.complete(**{axis: first["shape"][axis] for axis in variant.axes})
    sparsity = sparsity_of(first)
    plan, layers = _plan_of(variant, settings, sparsity, first)
    kinds = {kind: time / ms["dense"] for kind, time in ms.items() if time}
    work = dense_work(variant, settings)
    if not (sparsity.mlp and sparsity.mlp.cache == "activations"):
        dense, _ = _delta_parts(work, plan, layers)
        work = _rescaled(work, plan, (kinds["full"] - kinds["delta"]) / (1 - dense) if dense < 1 else 1.0)
    dense, chosen = _delta_parts(work, plan, layers)
    if min(work.attention, work.mlp, work.other, chosen) <= 0 or kinds["delta"] <= dense:
        times = ", ".join(f"{kind} {kinds[kind]:.3f}" for kind in ("full", "delta"))
        raise InputError(
            f"steps, over the dense one, of {times}: expected times that leave some for the chosen columns"
        )
    return Prices(
        name=f"{first['model']} {'x'.join(map(str, variant.sizes(settings).values()))}, {first['device']}",
        kinds=kinds,
        work=work,
        column=(kinds["delta"] - dense) / chosen,
        again=(kinds["full"] - 1) / chosen,
    )


def _plan_of(variant: Variant, settings: Settings, sparsity: Sparsity, entry: Entry) -> tuple[Step, int]:
    """A plan with the shares of columns that the steps of a record had, and the layers of its model."""
    stacks = variant.stacks(settings, entry["shape"]["text"])
    layers = sum(stack.layers for stack in stacks.values())
    if entry["shape"]["layers"] != layers:
        raise InputError(f"steps of {entry['shape']['layers']} layers: expected all {layers} of {entry['model']}")
    plain = lambda part: part and replace(part, full_step_schedule=None, full_step_every=10)  # whatever its schedule
    plain = replace(
        sparsity, attention=plain(sparsity.attention), mlp=plain(sparsity.mlp), step_cache=None, schedule_steps=None
    )
    return plan_stacks(stacks, plain, 4, variant.grid(settings)), layers  # so many that some are delta steps


def _rescaled(work: Work, plan: Step, scale: float) -> Work:
    """The parts that the plan has sparse `scale` times as large, the others so that all add up to 1."""
    sparse = work.attention * bool(plan.attention) + work.mlp * bool(plan.mlp)
    rest = (1 - scale * sparse) / (1 - sparse)
    return Work(
        work.attention * (scale if plan.attention else rest),
        work.mlp * (scale if plan.mlp else rest),
        work.other * rest,
    )


def _delta_parts(work: Work, plan: Step, layers: int) -> tuple[float, float]:
    """Parts of the work of a dense step that a delta step computes densely, and over chosen columns."""
    always = lambda share: min(share.dense_layers, layers) / layers if share else 1.0
    delta = lambda share, phase: share and share.replace(phase=np.array([phase]))
    one = Step(attention=delta(plan.attention, AttentionPhase.DELTA), mlp=delta(plan.mlp, MlpPhase.DELTA))
    dense = work.executed({"attention": always(plan.attention), "mlp": always(plan.mlp)}, 1.0)
    return dense, work.executed(density(one, layers), 1.0) - dense

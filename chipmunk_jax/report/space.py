"""The ways to sample that tune() searches: families, each a line of ways that differ by how many steps run."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import jax.numpy as jnp
import numpy as np

from chipmunk_jax.errors import InputError
from chipmunk_jax.pipelines import Variant
from chipmunk_jax.pipelines.request import guides
from chipmunk_jax.pipelines.variant import Settings
from chipmunk_jax.report.configurations import Configuration, rivals
from chipmunk_jax.report.price import Prices
from chipmunk_jax.report.work import dense_work
from chipmunk_jax.sampling import plan_stacks
from chipmunk_jax.schedule import Step, Taken, as_taken, density, run_shares
from chipmunk_jax.sparsity import Gate, Predict, Sparsity, StepCache
from chipmunk_jax.step_cache import SIGNALS, THRESHOLDS

KEYS = (None, 0.05, 0.1, 0.2, 0.3, 0.5)  # shares that are tried, in order; None: all, without sparse deltas
NEURONS = (None, 0.15, 0.3, 0.5)
FULL_EVERY = (2, 3, 5, 10)  # steps
VOXELS = (0, 1, 3)  # along a side of the neighbourhood
MEANS = (0, 64)  # keys a block
DENSE_LAYERS = (0, 2)  # at the start of the model
PREDICTIONS: tuple[tuple[Predict, int], ...] = (("hidden", 1), ("residual", 1), ("residual", 0), ("hidden", 0))
DRIFTS = (None, 0.08, 0.05, 0.03)  # bounds of the drift guard; None: there is none
FEWER = (1.0, 0.75, 0.5)  # of the usual steps, of which some are skipped
GATES: tuple[Gate, ...] = (
    "share",
    "sea",
    "easy",
)  # which steps are skipped: evenly, or as gates without constants decide


@dataclass(frozen=True, kw_only=True)
class Family:
    """Ways to sample that differ by how many steps run. Some choices do not matter where what they are of is dense."""

    steps: int | None  # of the sampler, of which some may be skipped; None: none is, and the sampler has as many as run
    gate: Gate = GATES[0]
    predict: tuple[Predict, int] = PREDICTIONS[0]  # what a skipped step gives, and its order
    keys: float | None = None
    neurons: float | None = None
    full_every: int = 5
    voxels: int = 0
    means: int = 0
    dense_layers: int = 0
    drift: float | None = None

    @property
    def sparse(self) -> bool:
        """Whether it has sparse deltas."""
        return self.keys is not None or self.neurons is not None

    def plain(self) -> "Family":
        """The family with one value for all choices that do not matter, so that equal ones compare equal."""
        family = self if self.keys is not None else replace(self, voxels=0, means=0)
        family = family if self.sparse else replace(family, full_every=5, dense_layers=0)
        family = family if self.steps is not None else replace(family, gate=GATES[0], predict=PREDICTIONS[0])
        return family if self.sparse or self.steps is not None else replace(family, drift=None)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to sample."""

    name: str
    family: Family
    configuration: Configuration
    rival: bool  # whether it is fewer steps, or skipped steps of the usual number, alone
    cost: float  # as it is planned, as a share of the dense sample's; where something is decided a guess


class Space:
    """All families of a model, and their ways at a cost."""

    def __init__(self, variant: Variant, settings: Settings, base: Sparsity, prices: Prices | None = None) -> None:
        """Args:
        variant, settings: the model, and its dense sample.
        base: has the groups and patches of all sparse ways.
        prices: of a published model's steps, by which costs are told; None: by count of the dense sample's products.
        """
        self.variant, self.settings, self.base, self.prices = variant, settings, base, prices
        self.steps = settings["steps"]

    def rivals(self) -> list[Family]:
        """Fewer steps, and skipped steps alone."""
        return [Family(steps=None), *(Family(steps=self.steps, predict=predict) for predict in PREDICTIONS)]

    def gated(self, rival: Family) -> list[Family]:
        """The same skipped steps at those that other gates decide for."""
        return [replace(rival, gate=gate) for gate in self.gates if gate != rival.gate]

    def seeds(self, rival: Family) -> list[Family]:
        """Families that the search for compositions begins with: the model's own shares on top of a rival, both rivals in one."""
        attention, mlp = self.base.attention, self.base.mlp
        keys, neurons = _nearest(KEYS, attention and attention.top_keys), _nearest(NEURONS, mlp and mlp.top_keys)
        # Steps of a known number: a gate takes several looks to be of a cost.
        skipping = replace(rival, steps=rival.steps or self.steps, gate=GATES[0], means=64, full_every=3)
        # The first is what measured best on mini-wan, benchmarks/frontier-mini-wan.yaml; the second has the model's own guard.
        best = replace(skipping, keys=keys or 0.2, full_every=5, predict=("residual", 0))
        found = [best, replace(best, drift=_nearest(DRIFTS, self.base.max_drift))]
        found += [replace(skipping, keys=keys or 0.2, full_every=every) for every in (5, 3)]
        if neurons:
            found += [replace(skipping, keys=keys or 0.2, neurons=neurons), replace(skipping, neurons=neurons)]
        found.append(replace(skipping, steps=round(FEWER[1] * self.steps)))
        found.append(replace(skipping, keys=keys or 0.2, steps=None))
        return list(dict.fromkeys(family.plain() for family in found))

    def moves(self, family: Family) -> list[Family]:
        """Families that differ in one choice, by the next value of it where values have an order."""
        beside = lambda values, value: [values[i] for i in _beside(values.index(value), len(values))]
        whole = [max(2, round(part * self.steps)) for part in FEWER]
        found = self.gated(family)
        found += [replace(family, keys=keys) for keys in beside(KEYS, family.keys)]
        found += [replace(family, means=means) for means in MEANS]
        found += [replace(family, drift=drift) for drift in beside(DRIFTS, family.drift)]
        found += [replace(family, full_every=every) for every in beside(FULL_EVERY, family.full_every)]
        found += [replace(family, neurons=neurons) for neurons in beside(NEURONS, family.neurons)]
        found += [replace(family, predict=predict) for predict in PREDICTIONS]
        found += [replace(family, dense_layers=layers) for layers in DENSE_LAYERS]
        found += [replace(family, voxels=side) for side in beside(VOXELS, family.voxels)]
        found += [replace(family, steps=steps) for steps in (*whole, None)]
        return [one for one in dict.fromkeys(family.plain() for family in found) if one != family.plain()]

    def at(self, family: Family, budget: float) -> Candidate | None:
        """The way of a family that runs the most steps at up to a planned cost; None: none does, or they are all that there are.

        Under a gate that decides, the way is planned as one that skips as many steps evenly; under a guard, as one without.
        """
        evenly = replace(family, gate=GATES[0])
        for run in range(min(self.steps, family.steps or self.steps), 0, -1):
            try:
                one, planned = (self.configuration(each, run) for each in (family, evenly))
                cost = self.cost(planned) if planned else 1.0
            except InputError:
                return None
            if one and cost <= budget:
                name = self._name(family, one)
                return Candidate(name=name, family=family, configuration=one, rival=self._rival(family), cost=cost)
        return None

    def configuration(self, family: Family, run: int) -> Configuration | None:
        """The way of a family that runs so many steps, or as few as it can; None: that is the dense sample.

        Args:
            family: under a gate that decides, the number is a guess.
            run: steps, 1 or more.
        """
        if self._rival(family):
            if not (found := rivals(run / self.steps, self.steps)):
                return None
            fewer, skipping = found.values()
            if family.steps is None:
                return fewer
            sparsity, cache = skipping.sparsity, _step_cache(family, run, self.steps)
            if family.gate == GATES[0]:  # the same steps as those of the rival that other reports show
                cache = replace(cache, gate="list", skip_steps=sparsity.step_cache.skip_steps)
            return replace(skipping, sparsity=replace(sparsity, step_cache=cache))
        steps = family.steps or run
        sparsity = self._sparsity(family, run, steps)
        return Configuration(sparsity=sparsity, steps=None if steps == self.steps else steps)

    def _sparsity(self, family: Family, run: int, steps: int) -> Sparsity:
        base, parts = self.base, {"attention": None, "mlp": None}
        shares = {"attention": family.keys, "mlp": family.neurons}
        for name, share in shares.items():
            if share is not None:
                of = getattr(base, name) or getattr(Sparsity(), name)
                schedule = dict(full_step_every=family.full_every, full_step_schedule=None)
                schedule["first_n_dense_layers"] = family.dense_layers
                parts[name] = replace(of, top_keys=share, random_keys=0.0, max_keys=None, **schedule)
        if parts["attention"]:
            keys = dict(local_voxels=family.voxels, block_means=family.means, share_sides=True)
            parts["attention"] = replace(parts["attention"], **keys)
        cache = _step_cache(family, run, steps) if run < steps else None
        return replace(base, **parts, step_cache=cache, max_drift=family.drift, schedule_steps=None)

    def cost(self, one: Configuration, taken: Taken | None = None) -> float:
        """Share of the dense sample's cost.

        Args:
            one: the way.
            taken: what its steps were; None: what they are planned to be, or where something is decided, may be.

        Raises:
            InputError: a neighbourhood that the grid has no room for, or too few steps for its sparse deltas to save anything.
        """
        steps = one.steps or self.steps
        sides = 2 if guides(self.settings.get("guidance")) else 1
        plan = plan_stacks(self._stacks, one.sparsity, steps, self._grid, sides) if one.sparsity else Step()
        for part in ("attention", "mlp"):
            if one.sparsity and getattr(one.sparsity, part) and getattr(plan, part) is None:
                raise InputError(f"{part}: {steps} steps are too few for it to save anything")
        if taken is not None:
            plan = as_taken(plan, steps, taken)
        if self.prices:
            return self.prices.cost(plan, steps, self._layers) / self.steps
        return self._work.executed(density(plan, self._layers), float(np.mean(run_shares(plan)))) * steps / self.steps

    def _rival(self, family: Family) -> bool:
        return not family.sparse and family.drift is None and family.steps in (None, self.steps)

    def _name(self, family: Family, one: Configuration) -> str:
        return ", ".join(_words(family, one, self.steps))

    @cached_property
    def _work(self):
        return dense_work(self.variant, self.settings)

    @cached_property
    def gates(self) -> tuple[Gate, ...]:
        """Those of GATES that the network can have."""
        network, *_ = self.variant.shapes(self.settings, 1, jnp.float32)
        return tuple(gate for gate in GATES if gate not in SIGNALS or hasattr(network, SIGNALS[gate]))

    @cached_property
    def _stacks(self):
        return self.variant.stacks(self.settings)

    @cached_property
    def _layers(self) -> int:
        return sum(stack.layers for stack in self._stacks.values())

    @cached_property
    def _grid(self) -> tuple[int, ...]:
        return self.variant.grid(self.settings)


def _step_cache(family: Family, run: int, steps: int) -> StepCache:
    """What skips steps so that about `run` of so many run; under a gate that decides by a guess of its threshold.

    A gate skips until the changes of these steps add up to its threshold. One of as many changes as steps / run - 1 would skip so
    many in a row, and those that are published skip about every second step.
    """
    predict, order = family.predict
    skips = {"share": (steps - run) / steps}
    if family.gate in THRESHOLDS:
        skips = {"threshold": round(THRESHOLDS[family.gate] * (steps / run - 1), 5)}
    return StepCache(gate=family.gate, predict=predict, order=order, max_skips=steps, **skips)


def _words(family: Family, one: Configuration, usual: int) -> Iterator[str]:
    """What a way does, in words."""
    steps, cache = one.steps or usual, one.sparsity and one.sparsity.step_cache
    yield f"{steps} steps" if steps == usual else f"{steps} of {usual} steps"
    if cache:
        count = len(cache.skip_steps) if cache.skip_steps else round(cache.share * steps)
        skipped = f"{cache.gate} up to {cache.threshold:g}" if cache.decides else f"{count} skipped"
        yield f"{skipped} ({cache.predict}, order {cache.order})"
    if family.keys is not None:
        near = f" and {family.voxels} voxels a side" * bool(family.voxels)
        yield f"{100 * family.keys:g} % of the keys{near}{' with block means' * bool(family.means)}"
    if family.neurons is not None:
        yield f"{100 * family.neurons:g} % of the neurons"
    if family.sparse:
        yield f"full every {family.full_every}{f' and {family.dense_layers} layers' * bool(family.dense_layers)}"
    if family.drift is not None:
        yield f"drift up to {family.drift:g}"


def _beside(place: int, count: int) -> list[int]:
    return [i for i in (place + 1, place - 1) if 0 <= i < count]


def _nearest(values: tuple[float | None, ...], wanted: float | None) -> float | None:
    """The value that is nearest; None of None."""
    return None if wanted is None else min(filter(None, values), key=lambda value: abs(value - wanted))

"""What each step does, known before anything is traced: plan_steps() turns a config into a table of phases.

A `Step` is one row of that table. Its phases, shares of columns and key are data: another schedule or seed never recompiles.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from enum import IntEnum
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from chipmunk_jax.fit import fit
from chipmunk_jax.sparsity import AttentionSparsity, MlpSparsity, Sparsity
from pallas_kernels import Implementation, PinnedKeys
from pallas_kernels.dispatch import choose
from pallas_kernels.groups import group_count


class AttentionPhase(IntEnum):
    """What a layer's attention computes, keeps and reads."""

    DENSE = 0  #    dense; no cache
    MEASURE = 1  #  dense; keeps the log-sum-exp
    SELECT = 2  #   dense; chooses columns by their sums against the last log-sum-exp, keeps its own and the residual
    REFRESH = 3  #  dense; keeps the log-sum-exp, and the residual over the columns chosen before
    DELTA = 4  #    residual + attention over the chosen columns, shifted by the last log-sum-exp


class MlpPhase(IntEnum):
    """What a layer's MLP computes, keeps and reads."""

    DENSE = 0  #         dense; no cache
    FULL = 1  #          dense; keeps activations, output and group means, or chooses neurons and keeps the residual
    SELECT_DELTA = 2  #  chooses the neurons that changed most, then as DELTA
    DELTA = 3  #         recomputes the chosen neurons


@struct.dataclass
class Share:
    """How an attention or an MLP is evaluated in one step, all scalars (of plan_steps(): phase [steps])."""

    phase: jax.Array | int  # i32, an AttentionPhase or MlpPhase; a Python int is known to the compiler
    keep: jax.Array  # i32, columns a group
    random: jax.Array  # f32, probability of a column to be kept whatever its score
    columns: int = struct.field(pytree_node=False)  # of which keep are kept
    group: int = struct.field(pytree_node=False)  # rows that share a list
    dense_layers: int = struct.field(pytree_node=False)  # the first layers of the model, always dense
    full: int = struct.field(pytree_node=False)  # the phase of its full steps
    # Of attention alone:
    fixed_random: jax.Array | None = None  # f32, probability of a key to be kept for the whole sample; None: 0
    pinned: PinnedKeys | None = None  # keys that groups attend to whatever their scores
    query_stride: int = struct.field(pytree_node=False, default=1)  # one query of so many scores the keys
    share_sides: bool = struct.field(
        pytree_node=False, default=False
    )  # whether both sides of guidance have the same keys
    block: int = struct.field(pytree_node=False, default=0)  # keys whose mean stands for those not chosen; 0: none does


@struct.dataclass
class Step:
    """One step as seen by one layer."""

    attention: Share | None = None
    mlp: Share | None = None
    skip: jax.Array | None = None  # bool, whether no block runs (of plan_steps(): [steps]); None: all of them do
    # bool, whether of both sides of guidance the prompt's alone runs (of plan_steps(): [steps]), in delta steps; None: both do
    one_sided: jax.Array | None = None
    key: jax.Array | None = None  # PRNG key of this step and layer
    sample_key: jax.Array | None = None  # PRNG key of the whole sample
    layer: jax.Array | int = 0  # i32, the layer's place in its stack
    sides: int = struct.field(
        pytree_node=False, default=1
    )  # 2: the entries are those of both sides of guidance, the prompt's first
    implementation: Implementation | None = struct.field(pytree_node=False, default=None)

    @property
    def is_full(self) -> jax.Array:
        """Whether it runs, and the attention or the MLP computes everything, or nothing is sparse; bool, of a table [steps]."""
        parts = [(self.attention, AttentionPhase.DELTA), (self.mlp, MlpPhase.SELECT_DELTA)]
        sparse = [share.phase >= first_delta for share, first_delta in parts if share]
        full = ~functools.reduce(operator.and_, sparse) if sparse else np.True_
        return full if self.skip is None else full & ~self.skip

    def made_full(self, full: jax.Array) -> "Step":
        """This as a full step of both sides where that is said, bool (of a table [steps]), and as it was elsewhere."""

        def share(one: Share | None, first_delta: IntEnum) -> Share | None:
            # Arithmetic serves tables in NumPy and steps in a trace.
            return one and one.replace(phase=one.phase + (full & (one.phase >= first_delta)) * (one.full - one.phase))

        unless = lambda flags: None if flags is None else flags & ~full
        shares = dict(attention=share(self.attention, AttentionPhase.DELTA), mlp=share(self.mlp, MlpPhase.SELECT_DELTA))
        return self.replace(**shares, skip=unless(self.skip), one_sided=unless(self.one_sided))

    @property
    def kind(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Whether it is a full one for all sides, a skipped one, a one-sided one, as Taken has them; bool, of a table [steps]."""
        skip, one = (np.False_ if flags is None else flags for flags in (self.skip, self.one_sided))
        return self.is_full & ~one, skip, one & ~skip

    def as_kind(self, full: jax.Array, skipped: jax.Array, one_sided: jax.Array) -> "Step":
        """This with the kind that it had in a sample where something was decided; arguments as of kind."""
        return self.made_full(full & ~self.is_full).replace(skip=skipped, one_sided=one_sided)

    def at_step(self, index: jax.Array) -> "Step":
        """Row `index` of a plan, with a key of its own."""
        row = lambda share: share and share.replace(phase=jnp.asarray(share.phase)[index])
        key = None if self.key is None else jax.random.fold_in(self.key, index)
        skip, one_sided = jax.tree.map(lambda flags: jnp.asarray(flags)[index], (self.skip, self.one_sided))
        shares = dict(attention=row(self.attention), mlp=row(self.mlp))
        return self.replace(**shares, skip=skip, one_sided=one_sided, key=key, sample_key=self.key)

    def runs(self, first: int, layers: int) -> list[tuple[int, int, "Step"]]:
        """Runs of alike layers of a stack whose first stands at depth `first` of the model: (start, stop, their step)."""
        shares = (self.attention, self.mlp)
        cuts = {min(max(share.dense_layers - first, 0), layers) for share in shares if share}
        return [
            (start, stop, self.replace(attention=_from(first + start, shares[0]), mlp=_from(first + start, shares[1])))
            for start, stop in itertools.pairwise(sorted({0, layers} | cuts))
        ]

    def at_layer(self, layer: jax.Array, depth: jax.Array) -> "Step":
        """This step as the layer sees it that stands at `layer` of its stack and at `depth` of the whole model."""
        return self.replace(key=None if self.key is None else jax.random.fold_in(self.key, depth), layer=layer)


def _from(depth: int, share: Share | None) -> Share | None:
    dense = share is not None and depth < share.dense_layers
    return share.replace(phase=0) if dense else share  # DENSE is 0 in both enums


def by_phase(phase: jax.Array | int, branches: Sequence[Callable], *operands):
    """branches[phase](*operands), chosen while it runs, or while it is traced where the phase is known."""
    return branches[phase](*operands) if isinstance(phase, int) else lax.switch(phase, branches, *operands)


# What most steps are; the rest are the first two, and one-sided ones are never the last.
KINDS = (
    dict(attention=AttentionPhase.DELTA, mlp=MlpPhase.DELTA),
    dict(attention=AttentionPhase.DELTA, mlp=MlpPhase.SELECT_DELTA),
    dict(attention=AttentionPhase.REFRESH, mlp=MlpPhase.FULL),
)


def by_kind(step: Step, run: Callable, *operands):
    """run(step, *operands), whose step.sides is 1 where it is one-sided; on a GPU compiled once more for each of KINDS.

    Their layers then have nothing to choose. A choice takes a GPU some 25 us, two in every layer of FLUX.1 3 ms of 79; and in a
    branch XLA copies every slice of a stack of weights.

    Args:
        step: what is known of it as it runs.
        run: runs the blocks.
        operands: of run.
    """
    apart = choose(step.implementation, dtype=jnp.bfloat16) == "pallas" and (step.attention or step.mlp)
    cases = [(True, step), *(_of_kinds(step, KINDS) if apart else [])]
    if step.one_sided is not None:
        halves = _of_kinds(step.replace(sides=1), KINDS[:2])
        cases += [(step.one_sided & here, half) for here, half in halves]
    if len(cases) == 1:
        return run(step, *operands)
    place = 0  # the last that holds
    for number, (here, _) in enumerate(cases):
        place = jnp.where(here, number, place)
    # One switch, one-sided steps in it: where none of its branches writes the attention's caches, as no delta step does, XLA copies
    # all others once a switch is in a loop of one turn or none, see unless_skipped().
    return lax.switch(place, [partial(run, case) for _, case in cases], *operands)


def _of_kinds(step: Step, kinds: Sequence[dict[str, IntEnum]]) -> list[tuple[jax.Array | bool, Step]]:
    """Whether the step is of a kind, and the step with its phases known, for all kinds that differ in what is sparse."""
    shares = {name: share for name in ("attention", "mlp") if (share := getattr(step, name))}
    found = []
    for phases in dict.fromkeys(tuple(kind[name] for name in shares) for kind in kinds):
        known = {name: shares[name].replace(phase=int(phase)) for name, phase in zip(shares, phases, strict=True)}
        here = (share.phase == known[name].phase for name, share in shares.items())
        found.append((functools.reduce(operator.and_, here, True), step.replace(**known)))
    return found


def plan_steps(
    sparsity: Sparsity,
    steps: int,
    *,
    tokens: int,
    mlp_width: int,
    pinned: PinnedKeys | None = None,
    sides: int = 1,
) -> Step:
    """A Step whose phases are arrays i32[steps]: the table that the step loop scans over.

    Args:
        sparsity: what to recompute, and when.
        steps: of the sampler.
        tokens: N of the attention, text included; its columns.
        mlp_width: F, the columns of the MLP.
        pinned: keys that groups of queries attend to whatever their scores.
        sides: of guidance.

    Raises:
        InputError: a schedule that the steps cannot follow.
    """
    fitted = fit(sparsity, steps, guided=sides > 1)
    attention, mlp = fitted.attention, fitted.mlp
    named = lambda numbers: np.isin(np.arange(steps), numbers)
    share = attention and _share(attention, attention_phases(attention, steps), tokens)
    if share:
        chance = np.float32(attention.fixed_random_keys) if attention.fixed_random_keys else None
        chosen = dict(query_stride=attention.query_stride, share_sides=attention.share_sides, fixed_random=chance)
        share = share.replace(**chosen, pinned=pinned, block=attention.block_means)
    return Step(
        attention=share,
        mlp=mlp and _share(mlp, mlp_phases(mlp, steps), mlp_width),
        skip=fitted.step_cache and named(fitted.step_cache.skip_steps),
        one_sided=fitted.guidance_cache and named(fitted.guidance_cache.one_sided_steps),
        sides=sides,
    )


def _share(config: AttentionSparsity | MlpSparsity, phases: np.ndarray, columns: int) -> Share:
    return Share(
        phase=phases,
        keep=np.int32(config.kept(columns)),
        random=np.float32(config.random_keys),
        dense_layers=config.first_n_dense_layers,
        full=_full_phase(config),
        columns=columns,
        group=config.group,
    )


def density(table: Step, layers: int) -> dict[str, float]:
    """Mean share of columns computed over all steps and layers, {"attention": .., "mlp": ..}; 1 is dense, as of run_shares().

    Args:
        table: of plan_steps().
        layers: of the whole model.
    """
    shares = {"attention": (table.attention, AttentionPhase.DELTA), "mlp": (table.mlp, MlpPhase.SELECT_DELTA)}
    run = run_shares(table)
    return {
        name: _density(share, first_delta, layers, run) if share else float(np.mean(run))
        for name, (share, first_delta) in shares.items()
    }


def run_shares(table: Step) -> np.ndarray:
    """Share of the entries that run: 0 in a skipped step, 0.5 in a one-sided one, else 1; [steps], or [] where all are alike.

    Args:
        table: of plan_steps().
    """
    skipped, one_sided = (False if flags is None else np.asarray(flags) for flags in (table.skip, table.one_sided))
    return np.where(skipped, 0.0, np.where(one_sided, 0.5, 1.0))


def _density(share: Share, first_delta: IntEnum, layers: int, run: np.ndarray) -> float:
    sparse_layers = max(0, layers - share.dense_layers) / layers
    sparse_steps = np.asarray(share.phase) >= first_delta
    return float(np.mean(run * (1 - sparse_layers * sparse_steps * (1 - _kept(share) / share.columns))))


def _kept(share: Share) -> float:
    """Columns a group in the mean, those of blocks of keys among them; at most all."""
    pinned = 0 if share.pinned is None else np.diff(share.pinned.starts)
    means = group_count(share.columns, share.block) if share.block else 0
    return float(np.minimum(pinned + np.minimum(share.keep, share.columns - pinned) + means, share.columns).mean())


@dataclass(frozen=True)
class Taken:
    """What the steps of a sample were, by number; those that are not named are delta steps."""

    full: tuple[int, ...] = ()  # attention or the MLP computed everything for all sides, or nothing was sparse
    skipped: tuple[int, ...] = ()  # no block ran
    one_sided: tuple[int, ...] = ()  # of guidance the prompt's side ran alone


def taken(table: Step, steps: int, first: int = 0) -> Taken:
    """What the steps of a table are.

    Args:
        table: of plan_steps(), or a Step() for dense sampling.
        steps: of the sampler.
        first: the number of the table's first step.
    """
    numbers = lambda flags: tuple((first + np.flatnonzero(np.broadcast_to(flags, steps))).tolist())
    return Taken(*map(numbers, table.kind))


def as_taken(table: Step, steps: int, taken: Taken) -> Step:
    """The table of a sample whose steps were these, where something was decided while it ran; table and steps as of taken()."""
    return table.as_kind(*(np.isin(np.arange(steps), numbers) for numbers in astuple(taken)))


def _full(config: AttentionSparsity | MlpSparsity, steps: int) -> np.ndarray:
    """bool[steps]: where a part is full by its schedule."""
    if config.full_step_schedule:
        return np.isin(np.arange(steps), config.full_step_schedule)
    return np.arange(steps) % config.full_step_every == 0


def _full_phase(config: AttentionSparsity | MlpSparsity) -> IntEnum:
    """The phase of a part's full steps; of attention, of those after the first two."""
    if isinstance(config, MlpSparsity):
        return MlpPhase.FULL
    return AttentionPhase.SELECT if config.recompute_mask else AttentionPhase.REFRESH


def attention_phases(config: AttentionSparsity, steps: int) -> np.ndarray:
    """AttentionPhase of every step, i32[steps]. Steps 0 and 1 are full: the first measures, the second can select."""
    phases = np.where(_full(config, steps), _full_phase(config), AttentionPhase.DELTA)
    phases[:2] = [AttentionPhase.MEASURE, AttentionPhase.SELECT][:steps]
    return phases.astype(np.int32)


def mlp_phases(config: MlpSparsity, steps: int) -> np.ndarray:
    """MlpPhase of every step, i32[steps]."""
    step = np.arange(steps)
    if config.cache == "residual":  # the neurons of a residual stay until it is remade
        select = np.zeros(steps, bool)
    else:  # every step until the first full one after the start has passed, then every select_every
        select = (step < config.full_step_every) | (step % config.select_every == 0)
    phases = np.where(select, MlpPhase.SELECT_DELTA, MlpPhase.DELTA)
    return np.where(_full(config, steps), MlpPhase.FULL, phases).astype(np.int32)

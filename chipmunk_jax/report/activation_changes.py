"""What the layers of a network compute at two steps, side by side: an Observer that compares them and keeps nothing but numbers."""

from functools import partial
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from chipmunk_jax.delta import Observer
from chipmunk_jax.model import Condition, Model, Stack
from chipmunk_jax.schedule import Step
from chipmunk_jax.sparsity import AttentionSparsity, MlpSparsity, Sparsity
from chipmunk_jax.strictness import usual_modes
from pallas_kernels.dispatch import COMPILER_OPTIONS
from pallas_kernels.groups import group_count

GROUPS = 64  # of queries and of rows of the MLP that are looked at, evenly spread: of HunyuanVideo's 931 one in 15
CHANGE = (0.7, 0.8, 0.9)  # shares of the change to explain (Chipmunk, abstract)
TOP = (0.05, 0.1, 0.2)  # shares of the keys whose attention is summed


class Measure(NamedTuple):
    """One thing that is measured in every layer and step."""

    title: str  # with {} for the shares
    shares: tuple[float, ...] = ()  # a number for each of them; (): one number
    compared: bool = True  # with the step before: the first step has none
    sides: bool = True  # a number for each side of guidance, else one of both

    def titled(self, *shares: float) -> str:
        """The title with these shares, fractions, in percent."""
        return self.title.format(" / ".join(f"{100 * share:.0f}" for share in shares) + " %")


MEASURES = {
    "attention_change": Measure("change of the attention output"),
    "mlp_change": Measure("change of the MLP output"),
    "activation_change": Measure("change of the MLP activations"),
    "keys_of_group": Measure("keys of a group that explain {} of the change", CHANGE),
    "keys_of_query": Measure("keys of one query that explain {} of the change", CHANGE),
    "neurons_of_group": Measure("neurons of a group that explain {} of the change", CHANGE),
    "neurons_of_token": Measure("neurons of one token that explain {} of the change", CHANGE),
    "mass": Measure("attention of a group to its top {} of the keys", TOP, compared=False),
    "overlap_of_steps": Measure("keys chosen at the step before, too"),
    "overlap_of_sides": Measure("keys chosen on both sides of guidance", compared=False, sides=False),
}


@struct.dataclass
class Comparison(Observer):
    """Numbers of the layers of a stack, whose batch is a step and the one before, of each side: [now, before, now, before]."""

    # f32, by name of MEASURES: [L, S, shares], axes that a measure lacks left out; mass has the heads after them.
    numbers: dict[str, jax.Array]
    group: int = struct.field(pytree_node=False)  # queries that share a list of keys
    mlp_group: int = struct.field(pytree_node=False)  # rows that share a list of neurons
    top_keys: float = struct.field(pytree_node=False)  # share of the keys that are chosen

    def attended(self, q, k, lse, out, step, valid) -> Self:
        """This with the numbers of a layer's attention.

        Args:
            q, k: [2 S, N, H, d], of both steps and S sides, as in Comparison.
            lse: [2 S, H, N], f32.
            out: [2 S, N, H, d], the attention output.
            step: whose `layer` they are of.
            valid: as of attend().
        """
        seen = compare_attention(q, k, lse, valid, group=self.group, top_keys=self.top_keys)
        return self._with(step.layer, {"attention_change": change(out)} | seen)

    def fed_forward(self, activations, out, step) -> Self:
        """This with the numbers of a layer's MLP.

        Args:
            activations: [2 S, N, F].
            out: [2 S, N, D], the MLP output.
            step: whose `layer` they are of.
        """
        seen = compare_activations(activations, group=self.mlp_group)
        return self._with(step.layer, {"mlp_change": change(out), "activation_change": change(activations)} | seen)

    def _with(self, layer: jax.Array | int, seen: dict[str, jax.Array]) -> Self:
        put = lambda name: self.numbers[name].at[layer].set(seen[name]) if name in seen else self.numbers[name]
        return self.replace(numbers={name: put(name) for name in self.numbers})

    @classmethod
    def zeros(cls, stack: Stack, sides: int, sparsity: Sparsity) -> Self:
        """The numbers before any layer, all 0.

        Args:
            stack: its layers and heads.
            sides: S, of guidance: 1 or 2.
            sparsity: whose groups and share of keys are looked at.
        """
        shape = lambda one: (stack.layers, *(sides,) * one.sides, *((len(one.shares),) if one.shares else ()))
        shapes = {name: shape(one) for name, one in MEASURES.items()}
        shapes["mass"] += (stack.heads,)
        attention, mlp = parts_of(sparsity)
        return cls(
            numbers={name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()},
            group=attention.group,
            mlp_group=mlp.group,
            top_keys=attention.top_keys,
        )


def parts_of(sparsity: Sparsity) -> tuple[AttentionSparsity, MlpSparsity]:
    """Attention and MLP of a Sparsity, the usual ones where it has none."""
    return sparsity.attention or AttentionSparsity(), sparsity.mlp or MlpSparsity()


def change(x: jax.Array) -> jax.Array:
    """|now - before| / |before|, Euclidean norms over all but the sides: f32 [S], of x [2 S, ..] as in Comparison."""
    pairs = x.reshape(-1, 2, x.size // len(x)).astype(jnp.float32)
    norm = lambda y: jnp.sqrt((y * y).sum(-1))
    return norm(pairs[:, 0] - pairs[:, 1]) / jnp.maximum(norm(pairs[:, 1]), 1e-30)


def compare_attention(
    q: jax.Array, k: jax.Array, lse: jax.Array, valid: jax.Array | None, *, group: int, top_keys: float
) -> dict[str, jax.Array]:
    """What of MEASURES looks at the attention probabilities exp(q k^T / sqrt(d) - lse), means over groups, but for mass over heads.

    Args:
        q, k: [2 S, N, H, d], entries as in Comparison.
        lse: [2 S, H, N], f32.
        valid: as of attend().
        group: consecutive queries that share a list of keys.
        top_keys: share of the keys that are chosen, those with the most attention.
    """
    entries, tokens, _, width = q.shape
    rows, inside = sampled(tokens, group)
    there = True if valid is None else (jnp.arange(tokens) < valid[:, None])[:, None]
    keep = max(1, round(top_keys * tokens))

    def of_head(head):
        q, k, lse = head

        def of_group(place):
            rows, inside = place
            logits = jnp.einsum("bqd,bkd->bqk", q[:, rows], k, preferred_element_type=jnp.float32) * width**-0.5
            weights = jnp.where(inside[:, None] & there, jnp.exp(logits - lse[:, rows, None]), 0)
            weights = weights.reshape(entries // 2, 2, *weights.shape[1:])
            moved, mass = jnp.abs(weights[:, 0] - weights[:, 1]), weights.sum(2)
            ranked = descending(mass)  # [S, 2, N]
            chosen = mass >= ranked[..., keep - 1 : keep]
            return {
                "keys_of_group": explaining(moved.sum(1)),
                "keys_of_query": explaining(moved[:, 0]),
                "mass": held(ranked[:, 0]),
                "overlap_of_steps": overlap(chosen[:, 0], chosen[:, 1]),
                "overlap_of_sides": overlap(chosen[0, 0], chosen[-1, 0]),
            }

        return jax.tree.map(lambda a: a.mean(0), lax.map(of_group, (rows, inside)))

    heads = lax.map(of_head, (*(jnp.moveaxis(a, 2, 0) for a in (q, k)), jnp.moveaxis(lse, 1, 0)))
    return {name: jnp.moveaxis(a, 0, -1) if name == "mass" else a.mean(0) for name, a in heads.items()}


def compare_activations(activations: jax.Array, *, group: int) -> dict[str, jax.Array]:
    """Numbers of MEASURES that look at activations, f32 [S, shares] by name: means over groups.

    Args:
        activations: [2 S, N, F], entries as in Comparison.
        group: consecutive rows that share a list of neurons.
    """

    def of_group(place):
        rows, inside = place
        some = activations[:, rows].astype(jnp.float32).reshape(-1, 2, len(rows), activations.shape[-1])
        moved = jnp.where(inside[:, None], jnp.abs(some[:, 0] - some[:, 1]), 0)
        return {"neurons_of_group": explaining(moved.sum(1)), "neurons_of_token": explaining(moved[:, 0])}

    return jax.tree.map(lambda a: a.mean(0), lax.map(of_group, sampled(activations.shape[1], group)))


def sampled(tokens: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of at most GROUPS groups, evenly spread, i32 [R, group], and which of them there are, bool [R, group].

    Args:
        tokens: N; where it is no multiple of group, the last group is ragged.
        group: rows in a group.
    """
    groups = group_count(tokens, group)
    chosen = np.linspace(0, groups - 1, min(groups, GROUPS)).round().astype(np.int32)
    rows = chosen[:, None] * group + np.arange(group, dtype=np.int32)
    return np.minimum(rows, tokens - 1), rows < tokens


def explaining(amounts: jax.Array) -> jax.Array:
    """The smallest shares of the amounts [.., N] whose sum is each of CHANGE of the whole, [.., 3]; 0 where that is 0."""
    sums = jnp.cumsum(descending(amounts), axis=-1)
    whole = sums[..., -1:]
    counts = [1 + (sums < share * whole).sum(-1) for share in CHANGE]
    return jnp.where(whole > 0, jnp.stack(counts, -1) / amounts.shape[-1], 0)


def held(ranked: jax.Array) -> jax.Array:
    """The shares of a mass, in descending order [.., N], that the largest of it hold, as many as each of TOP, [.., 3]."""
    sums = jnp.cumsum(ranked, axis=-1)
    last = [max(1, round(share * ranked.shape[-1])) - 1 for share in TOP]
    return sums[..., np.array(last)] / jnp.maximum(sums[..., -1:], 1e-30)


def descending(x: jax.Array) -> jax.Array:
    """x [.., N], the largest first."""
    return -jnp.sort(-x, axis=-1)


def overlap(one: jax.Array, other: jax.Array) -> jax.Array:
    """The share of one set that is in the other, of bools [.., N]."""
    return (one & other).sum(-1) / jnp.maximum(one.sum(-1), 1)


@partial(jax.jit, static_argnames="sparsity", compiler_options=COMPILER_OPTIONS)
@usual_modes()
def compare_steps(
    model: Model, x: jax.Array, t: jax.Array, cond: Condition, positions: jax.Array, *, sparsity: Sparsity
) -> dict[str, jax.Array]:
    """The numbers of MEASURES at a step and the one before, f32 by name: [L, S, shares] as in Comparison, L of all stacks.

    Args:
        model: the network.
        x: [2, N, C], the tokens now and before, in the order of the positions.
        t: f32 [2], what the network is told of the times.
        cond: [2 S, ..], of each side twice; those of the tokens in the order of the positions.
        positions: [N, axes].
        sparsity: whose groups and share of keys are looked at.
    """
    entries = len(next(iter(cond.values())))
    x, t = (jnp.tile(a, (entries // 2, *[1] * (a.ndim - 1))) for a in (x, t))
    stacks = model.stacks(x.shape[1], cond)
    seen = {name: Comparison.zeros(stack, entries // 2, sparsity) for name, stack in stacks.items()}
    tokens, modulations = model.embed(x, cond), model.modulations(t, cond)
    _, seen = model.hidden(tokens, t, cond, positions, seen, Step(), modulations)
    stacked = lambda *parts: jnp.concatenate(parts)
    return jax.tree.map(stacked, *(seen[name].numbers for name in stacks))

"""What a dense step of a model computes, counted in FLOPs, and the share of it that a sparse sample computes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from chipmunk_jax.model import modulations_of
from chipmunk_jax.pipelines import Variant
from chipmunk_jax.pipelines.variant import Settings
from chipmunk_jax.schedule import Step
from chipmunk_jax.strictness import usual_modes


@dataclass(frozen=True)
class Work:
    """Parts of a dense step, by its matrix products; they add up to 1."""

    attention: float  # q k^T and its product with v, of the attention that may be sparse
    mlp: float  # both products of the MLPs that may be sparse
    other: float  # every other one: projections, cross-attention, MLPs of a text, the first and last layer

    def executed(self, density: Mapping[str, float], run: float) -> float:
        """Share of the dense work that a sample computes, whose steps are as many as the dense one's.

        A full step counts as a dense one, and so does a step that chooses columns: their second look at the columns is left out.

        Args:
            density: shares of the keys, "attention", and of the neurons, "mlp", over all steps and layers.
            run: share of the steps that are not skipped, a one-sided one half.
        """
        return self.attention * density["attention"] + self.mlp * density["mlp"] + self.other * run


@usual_modes()
def dense_work(variant: Variant, settings: Settings) -> Work:
    """The parts of a dense step, counted in its trace: two FLOPs for each multiply-add of its matrix products.

    Nothing is compiled and no weights are read.

    Args:
        variant: the model.
        settings: of Variant.complete().
    """
    network, noise, cond = variant.shapes(settings, 1, jnp.float32)
    stacks = network.stacks(noise.shape[1], cond).values()
    t = jax.ShapeDtypeStruct((1,), jnp.float32)
    given = (network, noise, t, cond, network.positions(variant.grid(settings)))
    total = _flops(jax.make_jaxpr(_velocity)(*given, jax.eval_shape(modulations_of, network, t, cond)).jaxpr)
    attention = sum(4 * s.layers * s.tokens**2 * s.heads * s.head_dim for s in stacks) / total
    mlp = sum(4 * s.layers * s.mlp_tokens * s.width * s.mlp_width for s in stacks) / total
    return Work(attention, mlp, 1 - attention - mlp)


def _velocity(network, x, t, cond, positions, modulations):
    """A dense step whose every product can be seen: on a GPU attention would be one call of cuDNN."""
    step = Step(implementation="reference")
    tokens = network.embed(x, cond)
    return network.velocity(network.hidden(tokens, t, cond, positions, None, step, modulations)[0], modulations)


def _flops(jaxpr) -> int:
    """Two for each multiply-add of the matrix products of a trace, those in loops as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (summed, _), _ = equation.params["dimension_numbers"]
            total += 2 * equation.outvars[0].aval.size * math.prod(equation.invars[0].aval.shape[i] for i in summed)
        inner = [getattr(value, "jaxpr", value) for value in equation.params.values()]
        total += equation.params.get("length", 1) * sum(_flops(one) for one in inner if hasattr(one, "eqns"))
    return total

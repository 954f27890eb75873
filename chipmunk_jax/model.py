"""What sample() needs of a network: read this to add one, and chipmunk_jax.models.blocks.Network, which has half of it."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from chipmunk_jax.strictness import usual_modes

Condition = dict[str, jax.Array]  # by name, each [B, ..]
LARGEST_GUIDANCE = 100.0  # beyond any use: a scale of thousands is one that was multiplied for a time embedding


@struct.dataclass
class Stack:
    """Sizes of one stack of equal layers, as the caches need them. All static."""

    layers: int = struct.field(pytree_node=False)  # L
    tokens: int = struct.field(pytree_node=False)  # N of its attention
    heads: int = struct.field(pytree_node=False)  # H
    head_dim: int = struct.field(pytree_node=False)  # d
    mlp_tokens: int = struct.field(pytree_node=False)  # N of its sparse MLP
    width: int = struct.field(pytree_node=False)  # D
    mlp_width: int = struct.field(pytree_node=False)  # F
    # Rows of the tokens that are text: start, stop.
    text: tuple[int, int] = struct.field(pytree_node=False, default=(0, 0))


class Model(Protocol):
    """A network of blocks and a final layer: a pytree of weights that gives the velocity dx/dt of noisy tokens.

    For two gates of StepCache it may have more: signal(tokens, modulations), the modulated tokens [B, N, D] that the first block
    attends with, which "sea" needs, and tea_signal(tokens, modulations), [B, ..], what the polynomial of "tea" was fitted to.
    """

    @property
    def dtype(self) -> jnp.dtype:
        """Of its weights and tokens."""

    @property
    def prompted(self) -> tuple[str, ...]:
        """Conditions that a prompt makes: zeros are no prompt."""

    @property
    def on_grid(self) -> tuple[str, ...]:
        """Conditions of the tokens, each [B, N, ..]."""

    @property
    def channels(self) -> int:
        """C, values of a token."""

    def embed(self, x: jax.Array, cond: Condition, /) -> jax.Array:
        """The tokens that enter the blocks, [B, N, D] in the model's dtype, of x [B, N, C]."""

    def hidden(
        self,
        tokens: jax.Array,
        t: jax.Array,
        cond: Condition,
        positions: jax.Array,
        cache: Any,
        step: Any,
        modulations: Any,
    ) -> tuple[jax.Array, Any]:
        """The tokens after the last block, [B, N, D] in the model's dtype, of those of embed() at t [B]; and the caches."""

    def velocity(self, hidden: jax.Array, modulations: Any, /) -> jax.Array:
        """[B, N, C], f32: what the final layer makes of the tokens after the last block."""

    def modulations(self, t: jax.Array, cond: Condition) -> Any:
        """What depends on the times t [steps, B] and the conditions alone, the steps in front: computed before the loop."""

    def positions(self, grid: tuple[int, ...]) -> np.ndarray:
        """Coordinates of every token of the grid in raster order, [N, axes]."""

    def stacks(self, tokens: int, cond: Condition) -> dict[str, Stack]:
        """Sizes of the stacks of layers, for the caches."""

    def conditions(self, tokens: int, text: int | str) -> dict[str, tuple[int | str, ...]]:
        """Shapes of the conditions of one sample of N tokens and so many rows of text, without B; a letter is any number."""

    def check(self, noise: jax.Array, cond: Condition) -> None:
        """Raises InputError unless the arrays fit the network."""


@jax.jit
@usual_modes()
def modulations_of(model: Model, t: jax.Array, cond: Condition) -> Any:
    """model.modulations(t, cond), traced once for its shapes, and not again by every sample."""
    return model.modulations(t, cond)

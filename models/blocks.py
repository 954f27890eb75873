"""The parts of textbook transformers and VAEs: base classes, embedders, modulation, norms, positions, checks of inputs."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chipmunk_jax.cache import LayerCache
from chipmunk_jax.delta import product
from chipmunk_jax.errors import InputError
from chipmunk_jax.layers import Linear, Stacked
from chipmunk_jax.model import LARGEST_GUIDANCE, Condition, Model
from chipmunk_jax.options import check_types, require
from chipmunk_jax.schedule import Step
from pallas_kernels.rotary_qkv import Projection

Caches = dict[str, LayerCache | None]  # by stack
QUERIES = 1024  # of pixels whose scores are held at once: 4 bytes a pair, 67 MB at 16,384 pixels, where all would take 1.07 GB
LARGEST = 10**6  # more than any size in a network


class Component(nnx.Module):
    """What a checkpoint holds: a diffusion network, a text encoder or a VAE.

    Called as component(config, dtype=.., rngs=..), it keeps `config`, a frozen dataclass, and `dtype`.
    """

    config_class: type
    config: Any
    dtype: jnp.dtype


if TYPE_CHECKING:

    class _Network(Component, Model): ...

else:  # Protocol and nnx.Module have metaclasses of their own
    _Network = Component


class Network(_Network):
    """A network of blocks and a final layer: what all have in common of chipmunk_jax.model.Model, whose rest a network defines.

    A config says in `text_rows` how many rows of text the network takes: (fewest, most), None for any number.
    """

    depths: tuple[str, ...]  # fields of the config that count layers, one for each stack
    prompted: tuple[str, ...]
    on_grid: tuple[str, ...] = ()

    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        cond: Condition,
        positions: jax.Array,
        cache: Caches | None = None,
        step: Step | None = None,
        modulations: Any = None,
    ) -> tuple[jax.Array, Caches]:
        """velocity [B, N, C], f32, and the caches, of x [B, N, C] and of self.modulations(t, cond); the rest as in hidden()."""
        modulations = self.modulations(t, cond) if modulations is None else modulations
        tokens = self.embed(x, cond)
        hidden, cache = self.hidden(tokens, t, cond, positions, cache, step, modulations)
        return self.velocity(hidden, modulations), cache

    def check(self, noise: jax.Array, cond: Condition) -> None:
        """Raises InputError unless noise [B, N, C] and the conditions fit."""
        batch, tokens, channels = noise.shape
        if channels != self.channels:
            raise InputError(f"noise {noise.shape}: expected {self.channels} channels a token")
        # A letter is any size: the config alone bounds the rows of text.
        check_conditions(cond, {name: (batch, *shape) for name, shape in self.conditions(tokens, "T").items()})
        if "text" in cond:
            check_text(cond["text"], *self.config.text_rows)
        check_guidance(cond)


class Embedder(nnx.Module):
    """Linear, SiLU, linear, in float32 [.., D]."""

    def __init__(self, in_dim: int, width: int, **linear):  # of nnx.Linear
        linear |= dict(preferred_element_type=jnp.float32)
        self.in_layer = nnx.Linear(in_dim, width, **linear)
        self.out_layer = nnx.Linear(width, width, **linear)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out_layer(jax.nn.silu(self.in_layer(x)))


class Modulation(nnx.Module):
    """n vectors side by side, [.., 1, n D], f32, from the already activated condition [.., D]: shifts, scales and gates."""

    def __init__(self, width: int, n: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        # bf16 weights, float32 sums and result.
        self.linear = nnx.Linear(
            width, n * width, dtype=dtype, param_dtype=dtype, preferred_element_type=jnp.float32, rngs=rngs
        )

    def __call__(self, vec: jax.Array) -> jax.Array:
        return self.linear(vec)[..., None, :].astype(jnp.float32)


class Qkv(nnx.Module):
    """Queries, keys and values of all heads, and the weights of their norms over `normed` features, as `rotary_qkv` takes them."""

    def __init__(self, width: int, normed: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.linear = Linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.linear.bias = Stacked(jnp.zeros(3 * width, dtype))
        self.query_norm = Stacked(jnp.ones(normed, dtype))
        self.key_norm = Stacked(jnp.ones(normed, dtype))

    def __call__(self, x: jax.Array) -> Projection:
        linear = self.linear
        return Projection(product(x, linear.kernel[...]), linear.bias[...], self.query_norm[...], self.key_norm[...])


class GroupNorm(nnx.Module):
    """scale GroupNorm(x) + bias, computed in and as float32, for x [B, .., C]; each entry of B and group of channels on its own."""

    def __init__(self, channels: int, groups: int):
        self.groups = groups
        self.scale = nnx.Param(jnp.ones(channels, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(channels, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32).reshape(x.shape[0], -1, x.shape[-1])
        y = y - self.mean(y)
        y = y * jax.lax.rsqrt(self.mean(y * y) + 1e-6)
        return (self.scale[...] * y + self.bias[...]).reshape(x.shape)

    def mean(self, y: jax.Array) -> jax.Array:
        """[B, 1, C], over all pixels and a group's channels, of y [B, pixels, C]: pixels first, as a GPU sums contiguous rows."""
        channels = y.mean(1)
        groups = channels.reshape(len(y), self.groups, -1).mean(-1)
        return jnp.repeat(groups, channels.shape[1] // self.groups, axis=1)[:, None]


def attend_pixels(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(C)) v, in the dtype of q [B, N, C]: one head, which in VAEs is wider than cuDNN's attention takes (256).

    The scores, float32, take 4 N QUERIES bytes, whatever B is.
    """

    def attend(image):
        q, k, v = image

        def attend_one(q):
            scores = jnp.einsum("c,nc->n", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
            weights = jax.nn.softmax(scores).astype(v.dtype)
            return jnp.einsum("n,nc->c", weights, v, preferred_element_type=jnp.float32).astype(q.dtype)

        return jax.lax.map(attend_one, q, batch_size=QUERIES)

    return jax.lax.map(attend, (q, k, v))


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """(1 + scale) LayerNorm(x) + shift, computed in float32, in the dtype of x [B, N, D]."""
    return layer_norm(x, scale=1 + scale, shift=shift)


def layer_norm(x: jax.Array, *, scale: jax.Array, shift: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """scale LayerNorm(x) + shift, computed in float32, in the dtype of x [B, N, D]."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + epsilon)
    return (scale * y + shift).astype(x.dtype)


def add_gated(x: jax.Array, gate: jax.Array, y: jax.Array) -> jax.Array:
    """x + gate * y, added in float32, in the dtype of x."""
    return (x.astype(jnp.float32) + gate * y.astype(jnp.float32)).astype(x.dtype)


def merge_heads(x: jax.Array) -> jax.Array:
    """[B, N, H, d] as [B, N, D]."""
    return x.reshape(*x.shape[:2], -1)


def time_embedding(t: jax.Array, width: int = 256) -> jax.Array:
    """[cos, sin] of 1000 t at geometric frequencies, f32 [.., width]."""
    return sinusoids(1000.0 * t.astype(jnp.float32), width)


def sinusoids(x: jax.Array, width: int) -> jax.Array:
    """[cos, sin] of x, f32, at geometric frequencies, [.., width]."""
    # Rounded once from float64: at angles of 3,500 (guidance) a device's own float32 power would show in the result.
    frequencies = (10_000.0 ** (-np.arange(width // 2) / (width // 2))).astype(np.float32)
    angles = x[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def rotary_table(positions: jax.Array, axes_dim: tuple[int, ...], theta: float) -> tuple[jax.Array, jax.Array]:
    """cos and +-sin of the rotary angles as `rotary_qkv` takes them, f32 [N, d] each, of positions [N, axes]."""
    positions = positions.astype(jnp.float32)
    axes = [
        positions[:, axis, None] * theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
        for axis, width in enumerate(axes_dim)
    ]
    angles = jnp.repeat(jnp.concatenate(axes, axis=-1), 2, axis=-1)
    return jnp.cos(angles), jnp.sin(angles) * jnp.tile(jnp.array([-1.0, 1.0]), angles.shape[-1] // 2)


def grid_positions(grid: tuple[int, ...], axes: int) -> np.ndarray:
    """Coordinates of every token of a grid, in raster order, f32 [N, axes].

    Raises:
        InputError: a grid of another number of axes.
    """
    if len(grid) != axes:
        names = ("frames", "rows", "columns")[-axes:]
        raise InputError(f"grid {tuple(grid)}: expected {axes} sides, {', '.join(names)}")
    axes = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in grid), indexing="ij")
    return np.stack(axes, axis=-1).reshape(-1, len(grid))


def check_sizes(config: Any, counts: tuple[str, ...]) -> None:
    """Raises InputError where a field of a network's config has another type, or is no size; makes lists tuples.

    Args:
        config: a dataclass of numbers.
        counts: fields that may be 0, which count layers.
    """
    check_types(config)
    for name, value in vars(config).items():
        numbers = value if isinstance(value, tuple) else () if value is None or isinstance(value, bool) else (value,)
        fits = all(0 < n < LARGEST or (n == 0 and name in counts) for n in numbers)
        require(fits, name, value, f"a number above 0 and below {LARGEST:,}")


def check_conditions(cond: Condition, shapes: dict[str, tuple[int | str, ...]]) -> None:
    """Raises InputError unless cond has arrays of these names and shapes, floats but for a mask.

    A letter is any size, everywhere the same.
    """
    if cond.keys() != shapes.keys():
        raise InputError(f"conditions {sorted(cond)}: expected {sorted(shapes)}")
    known: dict[int | str, int] = {}
    for name, shape in shapes.items():
        found, expected = cond[name].shape, [known.get(n, n) for n in shape]
        fits = lambda size, wanted: isinstance(wanted, str) or size == wanted
        if len(found) != len(shape) or not all(map(fits, found, expected)):
            raise InputError(f"condition {name} {found}: expected {expected}")
        kind, expected = (np.bool_, "bool") if name == "mask" else (np.floating, "floats")
        if not jnp.issubdtype(cond[name].dtype, kind):
            raise InputError(f"condition {name} {cond[name].dtype}: expected {expected}")
        known |= {n: m for m, n in zip(found, shape, strict=True) if isinstance(n, str)}


def check_text(text: jax.Array, least: int, most: int | None) -> None:
    """Raises InputError unless text [B, T, ..] has from `least` to `most` rows; None: any number."""
    rows = text.shape[1]
    if rows < least or (most is not None and rows > most):
        expected = f"at least {least}" if most is None else f"{least} to {most}" if least < most else f"exactly {most}"
        raise InputError(f"condition text of {rows} rows: expected {expected}")


def check_guidance(cond: Condition) -> None:
    """Raises InputError where a guidance that is a condition is no plain scale."""
    scales = np.asarray(cond.get("guidance", 0), np.float32).ravel()
    if (wrong := scales[~(np.abs(scales) <= LARGEST_GUIDANCE)]).size:
        raise InputError(
            f"condition guidance {wrong[0]:g}: expected the plain scale, up to {LARGEST_GUIDANCE:g}, which the network itself "
            "takes times 1000 (6 where HunyuanVideo's own code passes 6000)"
        )

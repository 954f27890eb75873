"""Bias, norm, rotation and layout of q, k and v against naive NumPy, in every implementation that runs here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import cuda_target

from pallas_kernels.rotary_qkv import Projection, rotary_qkv

LAYERS, LAYER = 2, 1


def draw(rng, sizes, heads, width, batch, dtype, normed=None):
    """Parts with norms over `normed` features, by default those of a head, and their angles."""
    features, norm = 3 * heads * width, (LAYERS, normed or width)
    parts = [
        Projection(*(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes))
        for n in sizes
        for shapes in [((batch, n, features), (LAYERS, features), norm, norm)]
    ]
    angles = np.repeat(rng.standard_normal((sum(sizes), width // 2)), 2, axis=-1)
    signs = np.tile([-1, 1], width // 2)
    return parts, jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles) * signs, jnp.float32), angles


def naive(parts, heads, width, angles):
    """q, k, v in float64: every pair as a complex number that is turned."""
    sides = []
    for part in parts:
        x, bias, *norms = (np.asarray(a, np.float64) for a in (part.x, *(a[LAYER] for a in part[1:])))
        x = (x + bias).reshape(*x.shape[:2], 3, heads, width)
        for side, weight in enumerate(norms):
            together = -1 if len(weight) == width else (-2, -1)
            rms = np.sqrt((x[:, :, side] ** 2).mean(together, keepdims=True) + 1e-6)
            x[:, :, side] = x[:, :, side] / rms * weight.reshape(-1, width)
        sides.append(x)
    x = np.concatenate(sides, axis=1)
    turned = (x[:, :, :2, :, 0::2] + 1j * x[:, :, :2, :, 1::2]) * np.exp(1j * angles[:, None, None, 0::2])
    x[:, :, :2, :, 0::2], x[:, :, :2, :, 1::2] = turned.real, turned.imag
    return x[:, :, 0], x[:, :, 1], x[:, :, 2]


SHAPES = [  # sizes of the parts, heads, d, batch
    ((64,), 8, 16, 1),
    ((21, 30), 3, 32, 2),  # parts that meet inside a tile
    ((5, 16, 40), 1, 128, 1),
    ((33,), 5, 64, 2),
    ((7,), 12, 128, 2),  # tiles of several heads, and several of those
]


@pytest.mark.parametrize("together", [False, True], ids=["a_head", "all_heads"])
@pytest.mark.parametrize(("sizes", "heads", "width", "batch"), SHAPES)
def test_rotary_qkv_is_bias_norm_and_a_turn_of_every_pair(implementation, sizes, heads, width, batch, together):
    dtype = jnp.bfloat16 if implementation == "pallas" else jnp.float32
    normed = heads * width if together else width
    parts, cos, sin, angles = draw(np.random.default_rng(0), sizes, heads, width, batch, dtype, normed)
    run = jax.jit(
        lambda *args: rotary_qkv(*args, LAYER, implementation=implementation)
    )  # op by op costs a program each
    got = run(parts, cos, sin)
    for a, expected in zip(got, naive(parts, heads, width, angles), strict=True):
        assert a.shape == (batch, sum(sizes), heads, width) and a.dtype == dtype
        tolerance = 2**-8 if implementation == "pallas" else 1e-5  # one rounding; float32 all through
        np.testing.assert_allclose(np.asarray(a, np.float64), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("normed", [16, 32])
def test_the_gradient_is_that_of_the_reference(normed):
    parts, cos, sin, _ = draw(np.random.default_rng(1), (20, 13), 2, 16, 1, jnp.float32, normed)

    def loss(parts, implementation):
        q, k, v = rotary_qkv(parts, cos, sin, LAYER, implementation=implementation)
        return (jnp.sin(q) + jnp.cos(k) * v).sum()

    gradients = (jax.jit(jax.grad(loss), static_argnums=1)(parts, name) for name in ("interpret", "reference"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *gradients)


@pytest.mark.parametrize(
    ("sizes", "heads", "normed", "batch"),
    [((512, 3840), 24, 128, 1), ((32_760,), 12, 12 * 128, 2), ((75_600,), 40, 40 * 128, 2)],
    ids=["flux", "wan-1.3b", "wan-14b"],  # the last one's x has more than 2**31 elements
)
def test_it_lowers_for_cuda_at_published_sizes(sizes, heads, normed, batch):
    s = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    width = 3 * heads * 128
    parts = [Projection(s(batch, n, width), s(38, width), s(38, normed), s(38, normed)) for n in sizes]
    table = s(sum(sizes), 128, dtype=jnp.float32)
    with cuda_target():
        run = jax.jit(lambda *args: rotary_qkv(*args, implementation="pallas"))
        layer = s(dtype=jnp.int32)
        lowered = run.trace(parts, table, table, layer).lower(lowering_platforms=("cuda",))
    assert "triton" in lowered.as_text()


def test_shapes_that_do_not_fit_are_refused():
    parts, cos, sin, _ = draw(np.random.default_rng(2), (20,), 2, 16, 1, jnp.float32)
    with pytest.raises(ValueError, match=r"expected \[N, d\] with N = 20"):
        rotary_qkv(parts, cos[1:], sin[1:])
    with pytest.raises(ValueError, match=r"expected \[L, 3 H d\] and \[L, d\] or \[L, H d\]"):
        rotary_qkv([parts[0]._replace(query_norm=jnp.ones((LAYERS, 8)))], cos, sin)
    together = jnp.ones((LAYERS, 32))
    with pytest.raises(ValueError, match=r"norms \(2, 16\) \(2, 32\): expected"):
        rotary_qkv([parts[0]._replace(key_norm=together)], cos, sin)
    other = parts[0]._replace(query_norm=together, key_norm=together)
    for wrong in ([], [*parts, parts[0]._replace(x=jnp.zeros((2, 5, 96)))], [*parts, other]):
        with pytest.raises(ValueError, match="expected at least one, of equal batch"):
            rotary_qkv(wrong, cos, sin)

"""Bias, norm, rotation and layout of q, k and v against naive NumPy, in every implementation that runs here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import cuda_target

from pallas_kernels.rotary_qkv import Projection, rotary_qkv

LAYERS, LAYER = 2, 1


def draw(rng, sizes, heads, width, batch, dtype):
    parts = [
        Projection(*(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes))
        for n in sizes
        for shapes in [((batch, n, 3 * heads * width), (LAYERS, 3 * heads * width), (LAYERS, width), (LAYERS, width))]
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
            rms = np.sqrt((x[:, :, side] ** 2).mean(-1, keepdims=True) + 1e-6)
            x[:, :, side] = x[:, :, side] / rms * weight
        sides.append(x)
    x = np.concatenate(sides, axis=1)
    turned = (x[:, :, :2, :, 0::2] + 1j * x[:, :, :2, :, 1::2]) * np.exp(1j * angles[:, None, None, 0::2])
    x[:, :, :2, :, 0::2], x[:, :, :2, :, 1::2] = turned.real, turned.imag
    return x[:, :, 0], x[:, :, 1], x[:, :, 2]


@pytest.mark.parametrize(
    ("sizes", "heads", "width", "batch"),
    [((64,), 8, 16, 1), ((21, 30), 3, 32, 2), ((5, 16, 40), 1, 128, 1)],  # one part; parts that meet inside a tile
)
def test_rotary_qkv_is_bias_norm_and_a_turn_of_every_pair(implementation, sizes, heads, width, batch):
    dtype = jnp.bfloat16 if implementation == "pallas" else jnp.float32
    parts, cos, sin, angles = draw(np.random.default_rng(0), sizes, heads, width, batch, dtype)
    got = rotary_qkv(parts, cos, sin, LAYER, implementation=implementation)
    for a, expected in zip(got, naive(parts, heads, width, angles), strict=True):
        assert a.shape == (batch, sum(sizes), heads, width) and a.dtype == dtype
        tolerance = 2**-8 if implementation == "pallas" else 1e-5  # one rounding; float32 all through
        np.testing.assert_allclose(np.asarray(a, np.float64), expected, rtol=tolerance, atol=tolerance)


def test_the_gradient_is_that_of_the_reference():
    parts, cos, sin, _ = draw(np.random.default_rng(1), (20, 13), 2, 16, 1, jnp.float32)

    def loss(parts, implementation):
        q, k, v = rotary_qkv(parts, cos, sin, LAYER, implementation=implementation)
        return (jnp.sin(q) + jnp.cos(k) * v).sum()

    gradients = (jax.grad(loss)(parts, name) for name in ("interpret", "reference"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *gradients)


def test_it_lowers_for_cuda_at_flux_size():
    s = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    part = lambda n: Projection(s(1, n, 9216), s(38, 9216), s(38, 128), s(38, 128))
    table = s(4352, 128, dtype=jnp.float32)
    with cuda_target():
        run = jax.jit(lambda *args: rotary_qkv(*args, implementation="pallas"))
        layer = s(dtype=jnp.int32)
        lowered = run.trace([part(512), part(3840)], table, table, layer).lower(lowering_platforms=("cuda",))
    assert "triton" in lowered.as_text()


def test_shapes_that_do_not_fit_are_refused():
    parts, cos, sin, _ = draw(np.random.default_rng(2), (20,), 2, 16, 1, jnp.float32)
    with pytest.raises(ValueError, match=r"expected \[N, d\] with N = 20"):
        rotary_qkv(parts, cos[1:], sin[1:])
    with pytest.raises(ValueError, match=r"expected \[L, 3 H d\] and \[L, d\]"):
        rotary_qkv([parts[0]._replace(query_norm=jnp.ones((LAYERS, 8)))], cos, sin)
    for wrong in ([], [*parts, parts[0]._replace(x=jnp.zeros((2, 5, 96)))]):
        with pytest.raises(ValueError, match="expected at least one, of equal batch"):
            rotary_qkv(wrong, cos, sin)

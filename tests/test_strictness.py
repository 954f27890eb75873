"""Modes of JAX that are stricter or wider than usual change no sample: the program is the same one, and it runs in them."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import drawn

from chipmunk_jax import AttentionSparsity, MlpSparsity, Sparsity, StepCache, UniPC, sample, sampling, wan_timesteps
from chipmunk_jax.models.flux import Flux, FluxConfig
from chipmunk_jax.models.hunyuan_video import HunyuanVideo, HunyuanVideoConfig
from chipmunk_jax.models.wan import Wan, WanConfig
from chipmunk_jax.pipelines import Pipeline
from chipmunk_jax.strictness import key_of

MODES = dict(
    jax_enable_x64=True,
    jax_transfer_guard="disallow",
    jax_numpy_rank_promotion="raise",
    jax_numpy_dtype_promotion="strict",
    jax_check_tracer_leaks=True,
    jax_disable_jit=True,
    jax_debug_nans=True,
    jax_default_prng_impl="rbg",
    jax_threefry_partitionable=False,
    jax_random_seed_offset=1,
)
SIZES = dict(
    vec_in_dim=8, context_in_dim=8, hidden_size=16, num_heads=2, depth=1, depth_single_blocks=2, axes_dim=(4, 2, 2)
)
NETWORKS = {  # with the smallest of every part that a network has
    "flux": (Flux, FluxConfig(in_channels=4, **SIZES), (8, 16)),
    "hunyuan_video": (HunyuanVideo, HunyuanVideoConfig(in_channels=1, refiner_depth=1, **SIZES), (2, 8, 8)),
    "wan": (
        Wan,
        WanConfig(dim=16, ffn_dim=32, in_dim=2, out_dim=1, text_dim=8, num_heads=2, num_layers=2, image_dim=8),
        (2, 8, 8),
    ),
}
CHANCE = dict(random_keys=0.1, full_step_every=4, group=64)
SPARSE = Sparsity(
    attention=AttentionSparsity(first_n_dense_layers=1, residual_bits=8, recompute_mask=True, text_keys=True, **CHANCE),
    mlp=MlpSparsity(first_n_dense_layers=0, **CHANCE),
    step_cache=StepCache(gate="tea", threshold=0.1, coefficients=(1.0, 0.0), predict="residual", order=1),
)


@contextlib.contextmanager
def strict():
    """Within, all modes at once, for all threads."""
    before = {name: getattr(jax.config, name) for name in MODES}
    try:
        for name, value in MODES.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value if value is not None else "allow")


def arrays(network, config, grid):
    """A model, noise and conditions, these as NumPy's float64, which is cast in all modes."""
    rng, tokens = np.random.default_rng(0), int(np.prod(grid))
    model = drawn(network, config)
    shapes = model.conditions(tokens, 5)
    cond = {name: rng.standard_normal((1, *shape)) for name, shape in shapes.items()}
    cond |= {"mask": np.arange(5)[None] < 3} if "mask" in cond else {}
    return model, rng.standard_normal((1, tokens, model.channels)), cond


@pytest.fixture
def programs(monkeypatch):
    """The text of the programs that samples would run, which do not run."""
    found = []

    def keep(program, *_, **__):
        found.append(
            re.sub(r" {tf.aliasing_output = \d+ : i32}", "", program.as_text())
        )  # jax_debug_nans donates nothing
        return sampling.SampleState(x=jnp.zeros((1, 1, 1)), solver=None, cache=None, kept=None, broken=np.full(1, -1))

    monkeypatch.setattr(sampling, "finished", keep)
    return found


@pytest.mark.parametrize("seed", [0, 7, 2**31, 2**32 - 1])
def test_a_seed_is_the_usual_key(seed):
    np.testing.assert_array_equal(jax.random.key_data(key_of(seed)), jax.random.key_data(jax.random.key(seed)))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_program_of_a_sample_is_the_same_one_in_all_modes(name, programs):
    given = dict(timesteps=wan_timesteps(6, 3.0), grid=NETWORKS[name][2], sparsity=SPARSE, solver=UniPC(), guidance=2.0)
    model = arrays(*NETWORKS[name])
    sample(*model, **given)
    with strict():
        sample(*model, **given)
    assert programs[0] == programs[1]


@pytest.mark.parametrize(("kind", "sparsity"), [("checkpoint", "auto"), ("video_checkpoint", None)])
def test_a_pipeline_gives_the_same_pixels_in_all_modes(kind, sparsity, request):
    folder = request.getfixturevalue(kind)

    def draw():
        size = dict(height=32, width=32, num_inference_steps=3, num_frames=2 if kind == "video_checkpoint" else None)
        pipeline = Pipeline.from_pretrained(folder)
        out = pipeline("red striped disc on sky", **size, sparsity=sparsity, progress=False, output_type="np")
        return out.images if out.frames is None else out.frames

    usual = draw()
    with strict():
        np.testing.assert_array_equal(draw(), usual)

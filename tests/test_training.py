"""The scripts that train the small models, at a size of seconds."""

import itertools
import json
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chipmunk_jax.cli.main import main as chipmunk
from chipmunk_jax.convert import load, read
from chipmunk_jax.models.flux import FluxConfig
from chipmunk_jax.models.leaves import flatten, leaves_of
from chipmunk_jax.pipelines.pixels import WordTable

pytest.importorskip("optax", reason="pip install '.[train]'")
sys.path.append(str(Path(__file__).parents[1] / "examples"))

import export
import procgen_shapes
import train_mini_flux
import train_mini_wan
import training

FLUX = FluxConfig(
    in_channels=12, vec_in_dim=64, context_in_dim=64, hidden_size=24, num_heads=2, depth=1, depth_single_blocks=1,
    axes_dim=(4, 4, 4), guidance_embed=False,
)  # fmt: skip
WAN = replace(train_mini_wan.MINI_WAN, dim=24, ffn_dim=40, freq_dim=16, num_layers=2)
QUICK = dict(warmup_steps=1, learning_rate=1e-2)
RECIPES = {
    "flux": replace(train_mini_flux.TOY, model=FLUX, stages=(training.Stage(1.0, 8, 4),), **QUICK),
    "wan": replace(train_mini_wan.TOY, model=WAN, stages=(training.Stage(1.0, 8, 4, frames=4),), **QUICK),
}


@pytest.fixture(scope="module", params=RECIPES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def begun(name) -> tuple[nnx.GraphDef, training.TrainState]:
    """The graph of the network, and its start. Not to be donated."""
    return training.init_state(RECIPES[name], seed=0)


@pytest.fixture(scope="module")
def train(name, begun) -> list[Future]:
    """What trains it, compiled as the scripts do."""
    return training.compile_stages(RECIPES[name], *begun, ThreadPoolExecutor(1))


@pytest.fixture(autouse=True)
def quiet():
    """The log's handlers must not outlive a test."""
    yield
    for handler in list(training.log.handlers):
        training.log.removeHandler(handler)
        handler.close()


def test_exported_weights_convert_to_those_that_were_trained(name, begun, tmp_path):
    recipe, rng = RECIPES[name], np.random.default_rng(1)
    # None zero, none like another.
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), begun[1].params)
    export.write_checkpoint(recipe.diffusers_tensors(params), recipe.diffusers_config(), tmp_path)
    found, expected = leaves_of(read(tmp_path)), flatten(nnx.to_pure_dict(params))
    assert found.keys() == expected.keys()
    for path, array in found.items():
        np.testing.assert_array_equal(array, expected[path].astype(jnp.bfloat16), err_msg=path)


def test_training_lowers_the_loss(begun, train):
    steps, state, losses = train[0].result(), jax.tree.map(jnp.copy, begun[1]), []
    for progress in (0.0, 0.5, 1.0):
        state, loss, norm = steps(state, jax.random.key(0), 30, progress)
        losses.append(float(loss))
        assert 0 < norm < np.inf
    assert losses[-1] < 0.9 * losses[0] and state.step == 90


@pytest.mark.parametrize("name", ["wan"], indirect=True)
def test_a_trained_video_model_is_judged_converts_and_samples(begun, train, tmp_path, monkeypatch):
    """The script from its command line on, but for what it compiles to train."""
    recipe = replace(RECIPES["wan"], dispatch_seconds=0.2, judge_batch=8, judge_seconds=0.5)
    monkeypatch.setattr(train_mini_wan, "TOY", recipe)
    monkeypatch.setattr(train_mini_wan, "compile_stages", lambda *_: train)
    monkeypatch.setenv("XLA_FLAGS", "")  # what main() sets stays in here
    out, converted = tmp_path / "out", tmp_path / "converted"
    monkeypatch.setattr("sys.argv", ["train_mini_wan.py", "--toy", "--seconds", "1", "--out", str(out)])
    train_mini_wan.main()
    assert "0.02 M parameters" in (out / "info.txt").read_text() and (out / "guidance-3.png").is_file()
    judged = json.loads((out / "judge.json").read_text())
    assert judged["accuracy"].keys() == judged["motion"].keys() == {"real", "guidance 3", "guidance 1"}
    assert judged["recipe"]["model"]["dim"] == 24

    chipmunk(["convert", str(out), str(converted)])
    words = procgen_shapes.caption([1, 2, 3, 0])
    text = WordTable.load(converted).encode([words])["text"]
    label = jnp.array([[1, 2, 3, 0]])
    np.testing.assert_array_equal(text, recipe.condition(label, jnp.ones(1, bool))["text"])
    model = load(converted)
    clips = train_mini_wan.sample_videos(recipe, model, recipe.stages[0], label, jax.random.key(0), 3.0)
    assert clips.shape == (1, 4, 8, 8, 3) and np.isfinite(clips).all()


def test_a_replay_is_of_the_first_stage(tmp_path, monkeypatch):
    stages = training.Stage(0.5, 8, 4, frames=4), training.Stage(0.5, 12, 4)
    recipe, ran, clock = replace(RECIPES["wan"], stages=stages, replay=3), [], itertools.count()
    monkeypatch.setattr(training, "time", SimpleNamespace(time=lambda: next(clock)))
    _, state = training.init_state(recipe, seed=0)

    def run(number, state, key, steps, progress):
        ran.append(number)
        return state, 1.0, 1.0

    with ThreadPoolExecutor(1) as pool:
        train = [pool.submit(lambda number=number: partial(run, number)) for number in range(2)]
    training.run_training(recipe, state, train, seed=0, deadline=200, out=tmp_path)
    first, second = ran[: ran.index(1)], ran[ran.index(1) :]
    assert len(first) > 9 and set(first) == {0} and second[:9] == [1, 1, 0] * 3


def test_images_are_the_first_frames_of_videos():
    film, draw = procgen_shapes.make_videos, procgen_shapes.make_images
    videos, labels = jax.jit(film, static_argnums=(1, 2, 3))(jax.random.key(3), 3, 4, 16)
    images, same = jax.jit(draw, static_argnums=(1, 2))(jax.random.key(3), 3, 16)
    np.testing.assert_array_equal(labels, same)
    np.testing.assert_allclose(videos[:, 0], images, atol=1e-4)  # a centre folded at the border and back, in float32
    assert np.abs(np.diff(videos, axis=1)).mean() > 0.01


def test_tokens_of_a_video_are_its_patches_where_positions_say():
    grid = (3, 2, 2)
    stage = training.Stage(1.0, 8, 1, frames=3)
    places = jnp.stack(jnp.meshgrid(jnp.arange(3), jnp.arange(8), jnp.arange(8), indexing="ij"), -1)[None]
    tokens = train_mini_wan.patchify(places)
    corners = tokens[0].reshape(12, 16, 3)[:, 0] // jnp.array([1, 4, 4])
    recipe = RECIPES["wan"]
    model = nnx.eval_shape(lambda: recipe.make_model(nnx.Rngs(0)))
    np.testing.assert_array_equal(corners, recipe.positions(stage))
    np.testing.assert_array_equal(corners, model.positions(grid))
    np.testing.assert_array_equal(train_mini_wan.unpatchify(tokens, grid), places)

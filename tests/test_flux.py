"""FLUX against the PyTorch original (golden/make_flux_golden.py), and the laws it obeys by itself."""

import json
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chipmunk_jax.convert import read
from chipmunk_jax.layers import run_layers
from chipmunk_jax.models import flux, mmdit

GOLDEN = Path(__file__).parent / "golden"
LAYOUTS = {"diffusers": "flux_{0}/transformer", "original": "flux_{0}/original/flux1-{0}.safetensors"}

# Float32 knows the angle 1000 guidance = 3500 radians to 2e-4, which moves the output, of size 5, by up to 5e-5.
# With equal embeddings 3e-6 remain. An exact GELU instead of its tanh form costs 4e-4, swapped rows and columns 3e-1.
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=["dev", "schnell"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def golden(name):
    return load_arrays(GOLDEN / f"flux_{name}/io.safetensors")


@pytest.fixture(scope="module")
def models(name):
    return {layout: read(GOLDEN / path.format(name), dtype="float32") for layout, path in LAYOUTS.items()}


@pytest.fixture(scope="module", params=LAYOUTS)
def model(models, request):
    return models[request.param]


def test_output_equals_the_original(model, golden):
    out = forward(model, *inputs(golden))
    assert out.dtype == jnp.float32
    assert_close(out, golden["out"])


def test_every_block_equals_the_original(model, golden):
    blocks = activations(model, *inputs(golden))
    depth = model.config.depth
    assert len(blocks) == depth + model.config.depth_single_blocks
    for i, (img, txt) in enumerate(blocks[:depth]):
        assert_close(img, golden[f"double.{i}.img"])
        assert_close(txt, golden[f"double.{i}.txt"])
    for i, x in enumerate(blocks[depth:]):
        assert_close(x, golden[f"single.{i}"])


def test_both_layouts_hold_the_same_weights(models):
    jax.tree.map(np.testing.assert_array_equal, *(nnx.to_pure_dict(nnx.state(model)) for model in models.values()))


def test_permuted_tokens_and_positions_give_the_permuted_output(models, golden):
    img, t, cond, positions = inputs(golden)
    order = np.random.default_rng(0).permutation(img.shape[1])
    out = forward(models["diffusers"], img[:, order], t, cond, positions[order])
    assert_close(out, golden["out"][:, order])


def test_only_dev_has_a_guidance_embedding(model, name):
    assert (model.guidance_in is not None) == model.config.guidance_embed == (name == "dev")


def test_a_width_that_the_heads_do_not_fill_is_refused():
    with pytest.raises(ValueError, match=r"hidden_size=3072, num_heads=24, axes_dim=.*: expected"):
        flux.FluxConfig(axes_dim=(16, 56, 48))


def inputs(golden):
    """Arguments of a Flux, as the original was given them."""
    given = {key.removeprefix("in."): a for key, a in golden.items() if key.startswith("in.")}
    return given.pop("img"), given.pop("t"), given, given.pop("positions")


@nnx.jit
def forward(model, *arguments):
    """The velocity alone; compiled once for both layouts."""
    return model(*arguments)[0]


@nnx.jit
def activations(model, *arguments):
    """What every block hands on: (img, txt) of the double blocks, then the sequence of the single ones."""
    outputs = []

    # As chipmunk_jax.layers.run_layers, one block at a time.
    def run(blocks, x, cache, *args, per_layer, first=0, **options):
        graph, params = nnx.split(blocks)
        for i in range(jax.tree.leaves(params)[0].shape[0]):
            one = lambda tree, i=i: jax.tree.map(lambda a: a[i : i + 1], tree)
            block = nnx.merge(graph, one(params))
            x, cache = run_layers(block, x, cache, *args, per_layer=one(per_layer), first=first + i, **options)
            outputs.append(x)
        return x, cache

    with mock.patch.object(mmdit, "run_layers", run):
        model(*arguments)
    return outputs


def assert_close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)


def load_arrays(path):
    """The float32 arrays of a .safetensors file, read apart from the package's own reader."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    arrays = {}
    for key, entry in header.items():
        assert entry["dtype"] == "F32", key
        begin, end = entry["data_offsets"]
        arrays[key] = np.frombuffer(data[start + begin : start + end], "<f4").reshape(entry["shape"])
    return arrays

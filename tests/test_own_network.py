"""A network outside the package: its file, table and variant are examples/own_network.py, and nothing here knows it but by name."""

import importlib.util
import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import WORDS, drawn
from PIL import Image
from test_safetensors import write_safetensors

from chipmunk_jax import InputError, Pipeline, register
from chipmunk_jax.cli.main import main
from chipmunk_jax.convert import convert, inspect, load
from chipmunk_jax.models import MODELS
from chipmunk_jax.models.flux import Flux
from chipmunk_jax.pipelines import VARIANTS
from chipmunk_jax.report.activations import observe

PROMPT = "red striped heart on meadow"


@pytest.fixture(scope="module")
def own():
    """The example, imported: it registers itself."""
    spec = importlib.util.spec_from_file_location("own_network", Path(__file__).parents[1] / "examples/own_network.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(own, tmp_path_factory):
    """A checkpoint of it as PyTorch would write one, with a table of words; and its converted folder."""
    source, rng = tmp_path_factory.mktemp("own"), np.random.default_rng(0)
    draw = lambda *shape: (rng.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)
    sizes = {
        "token_in": (64, 12),
        "token_out": (12, 64),
        "text_in": (64, 64),
        "time_in.0": (64, 256),
        "time_in.2": (64, 64),
    }
    for layer in range(3):
        block = dict(
            adaln=(384, 64), to_q=(64, 64), to_k=(64, 64), to_v=(64, 64), proj=(64, 64), fc1=(256, 64), fc2=(64, 256)
        )
        sizes |= {f"blocks.{layer}.{name}": size for name, size in block.items()}
    tensors = {f"{name}.weight": draw(*size) for name, size in sizes.items()}
    tensors |= {f"{name}.bias": draw(size[0]) for name, size in sizes.items()}
    tensors |= {f"blocks.{i}.{x}_norm.weight": 1 + draw(32) for i in range(3) for x in ("query", "key")}
    write_safetensors(source / "model.safetensors", tensors)
    (source / "words.json").write_text(json.dumps({"attributes": list(WORDS), "words": list(WORDS.values())}))
    write_safetensors(source / "word_embeddings.safetensors", {"embeddings": draw(sum(map(len, WORDS.values())), 64)})
    convert(source / "model.safetensors", source / "converted", dtype="float32", progress=False)
    return source


def test_it_converts_and_every_tensor_has_its_place(own, folder):
    found = inspect(folder / "model.safetensors")
    assert (found.model, found.layout, found.whole) == ("own", "original", True)
    model = load(folder / "converted")
    assert isinstance(model, own.Own) and model.config == own.OwnConfig()


def test_it_samples_sparse_and_with_all_columns_kept_as_dense(own, folder):
    pipeline = Pipeline.from_pretrained(folder / "converted")
    draw = lambda **options: pipeline(PROMPT, output_type="np", **options)
    sparse, dense = (
        draw(sparsity={"preset": "flux", "attention": {"group": 64}, "mlp": {"group": 64}}),
        draw(sparsity=None),
    )
    assert (
        sparse.images.shape == (1, 32, 32, 3) and sparse.density["attention"] < 1 and np.isfinite(sparse.images).all()
    )
    assert sparse.full_steps == (0, 1, 2, 3, 5, 6) and np.any(sparse.images != dense.images)
    everything = {
        "attention": {"top_keys": 1.0, "group": 64, "first_n_dense_layers": 0},
        "mlp": {"top_keys": 1.0, "random_keys": 0.0, "group": 64, "first_n_dense_layers": 0},
    }
    np.testing.assert_allclose(draw(sparsity=everything).images, dense.images, atol=1e-4, rtol=0)


def test_the_command_line_knows_it(own, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["sample", str(folder / "converted"), "--prompt", PROMPT, "-o", "own.png"]) == 0
    with Image.open("own.png") as image:
        assert image.size == (32, 32)
    assert main(["inspect", "--plan", str(folder / "converted")]) == 0
    assert main(["inspect", "--plan", "--model", "own-small", "--batch", "4"]) == 0
    assert "own-small: height 32, width 32, batch 4, steps 8" in capsys.readouterr().out
    step = ["bench", "step", "--model", "own-small", "--dtype", "float32", "--repeats", "1", "--layers", "2"]
    assert main([*step, "--sparsity.mlp.first-n-dense-layers", "0", "-o", "own.jsonl"]) == 0
    entries = [json.loads(line) for line in Path("own.jsonl").read_text().splitlines()]
    assert {entry["variant"] for entry in entries} >= {"dense", "delta"} and not any(
        entry["error"] for entry in entries
    )


def test_its_weights_in_another_order_of_tokens_give_the_same_velocity(own):
    model = drawn(own.Own, own.OwnConfig())
    rng = np.random.default_rng(1)
    x, positions, order = rng.standard_normal((1, 48, 12)), model.positions((6, 8)), rng.permutation(48)
    t, cond = jnp.full(1, 0.3), {"text": jnp.asarray(rng.standard_normal((1, 16, 64)), jnp.float32)}
    plain, _ = model(jnp.asarray(x, jnp.float32), t, cond, positions)
    mixed, _ = model(jnp.asarray(x[:, order], jnp.float32), t, cond, positions[order])
    np.testing.assert_allclose(mixed, plain[:, order], atol=1e-5, rtol=0)
    assert MODELS["own"] is own.Own


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, Flux), "expected a name and a subclass of Network"),
        (("mine", dict), "expected a name and a subclass of Network"),
        (("flux", Flux), "flux: already registered"),
        (("mine", Flux, ["x"]), "mine: layouts=x: expected Layouts whose model is 'mine'"),
        (("mine", Flux, [], {"small": 3}), "mine: variant 'small': expected a Variant of network 'mine'"),
        (
            ("mine", Flux, [], {"small": VARIANTS["flux-dev"]}),
            "mine: variant 'small': expected a Variant of network 'mine'",
        ),
    ],
)
def test_what_does_not_belong_together_is_not_registered(arguments, message):
    name, network, layouts, variants = (*arguments, [], {})[:4]
    before = dict(MODELS), dict(VARIANTS)
    with pytest.raises(InputError, match=re.escape(message)):
        register(name, network, layouts=layouts, variants=variants)
    assert (dict(MODELS), dict(VARIANTS)) == before


def test_its_activations_are_studied(own, folder):
    found = observe(Pipeline.from_pretrained(folder / "converted"), PROMPT, num_inference_steps=2, progress=False)
    assert found.about["layers"] == {"blocks": 3} and found.about["sides"] == ["prompt"]
    assert all(np.isfinite(values[1]).all() and (values[1] > 0).all() for values in found.numbers.values())

"""From words to pixels, around a sampler that test_sampling.py tests."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import WORDS
from test_safetensors import write_safetensors

from chipmunk_jax import MlpSparsity, Sparsity, sampling
from chipmunk_jax.convert import convert, inspect, load, read
from chipmunk_jax.convert.files import read_weights
from chipmunk_jax.errors import InputError
from chipmunk_jax.memory import nbytes
from chipmunk_jax.pipelines import Pipeline
from chipmunk_jax.pipelines.denoising import plan_spans
from chipmunk_jax.pipelines.pixels import PixelFluxPipeline, WordTable
from chipmunk_jax.pipelines.residents import Residents
from chipmunk_jax.sparsity import PRESETS

MINI = Path(__file__).parents[1] / "examples/mini-flux"
PROMPTS = ("red striped heart on meadow", "a Blue, plain ring on night.", "yellow checkered disc on sky")
SIZE = dict(height=20, width=12, num_inference_steps=3)  # a grid of 10 x 6 tokens, ragged in patches and in groups
SPARSITY = Sparsity(mlp=MlpSparsity(first_n_dense_layers=0, random_keys=0.2))


@pytest.fixture(scope="module")
def pipeline(checkpoint):
    return Pipeline.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def words(checkpoint):
    return WordTable.load(checkpoint)


def fails(act, *words):
    """act() raises one ValueError of one line that holds all words."""
    with pytest.raises(InputError) as error:
        act()
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_words_become_rows_of_the_table_one_an_attribute_and_their_sum(checkpoint, words):
    table = read_weights(checkpoint / "word_embeddings.safetensors").tensors["embeddings"].read()
    said = [["heart", "red", "striped", "meadow"], ["ring", "blue", "plain", "night"]]
    cond = words.encode(PROMPTS[:2])
    everything = [word for group in WORDS.values() for word in group]
    text, pooled = np.zeros((2, 16, 64), np.float32), np.zeros((2, 64), np.float32)
    for i, sentence in enumerate(said):
        for j, word in enumerate(sentence):
            text[i, j] = table[everything.index(word)]
            pooled[i] += text[i, j] / 2  # of unit variance, as four independent rows add to twice their deviation
    assert cond.keys() == {"text", "pooled"}
    np.testing.assert_array_equal(cond["text"], text)
    np.testing.assert_allclose(cond["pooled"], pooled, rtol=1e-6, atol=1e-6)  # summed in another order
    assert cond["text"].dtype == cond["pooled"].dtype == np.float32


def test_all_that_is_wrong_with_a_prompt_is_said_at_once(words):
    told = ("one shape of disc, ring, heart, found none", "one background", "both sky and night", "found dog")
    fails(lambda: words.encode(["red striped dog on sky, night"]), *told)


@pytest.mark.parametrize(
    ("prompt", "words_of_the_error"),
    [
        ("red striped dog on meadow", ["one shape of disc, ring, heart", "none"]),
        ("", ["one shape", "none"]),
        ("striped heart on meadow", ["one colour of red, yellow, blue, white", "none"]),
        ("red heart on meadow", ["one texture", "none"]),
        ("red striped heart", ["one background", "none"]),
        ("red striped heart on sky, meadow", ["one background", "both sky and meadow"]),
        ("red hearty striped ringlet on meadow", ["one shape", "none"]),
        ("a red striped heart with a dragon on the meadow", ["no unknown word, found dragon", "known are"]),
    ],
)
def test_a_prompt_needs_one_word_of_each_attribute(words, prompt, words_of_the_error):
    fails(lambda: words.encode([PROMPTS[0], prompt]), repr(prompt), *words_of_the_error)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: (folder / "words.json").unlink(), ["no words.json"]),
        (lambda folder: (folder / "words.json").write_text("{"), ["bad word table"]),
        (lambda folder: (folder / "words.json").write_text("[]"), ["bad word table"]),
        (
            lambda folder: (folder / "words.json").write_text(json.dumps({"words": []})),
            ["bad word table", "attributes"],
        ),
        (
            lambda folder: (folder / "words.json").write_text(json.dumps({"attributes": ["a"], "words": [["x"]]})),
            ["bad word table", "1 words", "(14, 64)"],
        ),
        (
            lambda folder: write_safetensors(
                folder / "word_embeddings.safetensors", {"other": np.zeros(3, np.float32)}
            ),
            ["bad word table", "embeddings"],
        ),
        (
            lambda folder: write_safetensors(
                folder / "word_embeddings.safetensors", {"embeddings": np.full((14, 64), np.nan, np.float32)}
            ),
            ["bad word table", "NaN or infinite"],
        ),
    ],
)
def test_a_bad_word_table_is_one_error_that_names_its_folder(tmp_path, checkpoint, damage, expected):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    damage(folder)
    fails(lambda: Pipeline.from_pretrained(folder), str(folder), *expected)


def test_a_checkpoint_without_its_embeddings_or_its_folder_is_not_found(tmp_path, checkpoint):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    (folder / "word_embeddings.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"word_embeddings\.safetensors"):
        WordTable.load(folder)
    with pytest.raises(FileNotFoundError, match="none: no such file or folder"):
        Pipeline.from_pretrained(tmp_path / "none")


@pytest.mark.parametrize("folder", [None, 3, b"mini", "a\0b", "x" * 300])
@pytest.mark.parametrize("use", [Pipeline.from_pretrained, load, read, inspect, lambda path: convert(MINI, path)])
def test_what_is_no_path_is_one_error(use, folder):
    with pytest.raises(InputError, match=r"expected a str or a pathlib\.Path|embedded null byte|File name too long"):
        use(folder)


@pytest.mark.parametrize("use", [load, lambda path: Pipeline.from_pretrained(path)(PROMPTS[0], progress=False)])
def test_weights_are_not_read_while_jax_traces(use, checkpoint):
    with pytest.raises(InputError, match=r"load\(\) under jit"):
        jax.jit(lambda: use(checkpoint))()


def test_half_a_checkpoint_is_no_pipeline(tmp_path, checkpoint):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    (folder / "config.json").unlink()
    fails(lambda: Pipeline.from_pretrained(folder), str(folder), "half-written")


def test_pixels_undo_patches():
    grid, random = (5, 3), np.random.default_rng(0)
    images = random.random((2, 10, 6, 3), np.float32)
    tokens = np.zeros((2, 15, 12), np.float32)
    for b in range(2):
        for row in range(5):
            for column in range(3):
                for c in range(3):
                    for y in range(2):
                        for x in range(2):
                            value = 2 * images[b, 2 * row + y, 2 * column + x, c] - 1
                            tokens[b, row * 3 + column, c * 4 + y * 2 + x] = value
    to_pixels = lambda tokens: PixelFluxPipeline.to_pixels(tokens, grid, (2, 2))
    np.testing.assert_allclose(to_pixels(tokens), images, rtol=0, atol=1e-7)  # scaled and back in float32
    assert to_pixels(np.full((1, 15, 12), 1.5, np.float32)).max() == 1
    assert to_pixels(np.full((1, 15, 12), -1.5, np.float32)).min() == 0


@pytest.mark.parametrize("sparsity", [None, SPARSITY], ids=["dense", "sparse"])
def test_an_image_is_the_same_alone_and_in_any_batch(pipeline, sparsity):
    """Alone to 1e-5: a CPU sums some hundred float32 terms in another order for another batch (seen: 3e-7)."""
    draw = lambda prompts, seed: pipeline(prompts, **SIZE, sparsity=sparsity, seed=seed, output_type="np").images
    batch = draw(PROMPTS, 5)
    assert batch.shape == (3, 20, 12, 3) and batch.dtype == np.float32
    assert batch.min() >= 0 and batch.max() <= 1 and batch.std() > 0.1
    np.testing.assert_array_equal(draw(PROMPTS, 5), batch)
    for i in (0, 2):
        np.testing.assert_allclose(draw(PROMPTS[i], 5 + i)[0], batch[i], rtol=0, atol=1e-5)


def test_seed_prompt_guidance_and_negative_prompt_each_change_the_image(pipeline):
    draw = lambda prompt, **settings: pipeline(prompt, **SIZE | dict(seed=1, output_type="np") | settings).images
    image = draw(PROMPTS[0])
    for change in (dict(seed=2), dict(guidance_scale=3.0), dict(negative_prompt=PROMPTS[1])):
        assert np.any(draw(PROMPTS[0], **change) != image), change
    assert np.any(draw(PROMPTS[1]) != image)


def test_a_result_says_how_it_was_made_and_comes_in_three_kinds(pipeline, capsys):
    """The model's own preset where nothing is said: over and over a full, a delta and a skipped step."""
    options = SIZE | dict(num_inference_steps=28, guidance_scale=1, seed=3)
    guarded, preset = pipeline(PROMPTS[0], **options), replace(PRESETS["mini-flux"], max_drift=None)
    assert guarded.full_steps == tuple(range(28))  # random weights drift
    assert "max_drift=0.05: all steps drifted too far to leave anything out\n" in capsys.readouterr().err
    options |= {"sparsity": preset}
    out = pipeline(PROMPTS[0], **options, num_images_per_prompt=2)
    assert [image.size for image in out.images] == [(12, 20)] * 2 and out.frames is None and out.seconds > 0
    assert (out.full_steps, out.skipped_steps) == ((0, 1, *range(2, 28, 3)), tuple(range(4, 28, 3)))
    # In 9 of 28 steps all layers keep 64 of 76 keys and the means of two blocks; 8 are skipped.
    assert out.density == pytest.approx({"attention": 20 / 28 - 9 / 28 * 10 / 76, "mlp": 20 / 28})
    assert out.settings == {"height": 20, "width": 12, "num_inference_steps": 28, "guidance_scale": 1, "seed": 3}
    pixels = pipeline([PROMPTS[0]] * 2, **options, output_type="np").images
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in out.images]), np.round(255 * pixels))
    latents = pipeline([PROMPTS[0]] * 2, **options, output_type="latent").images
    assert latents.shape == (2, 60, 12)
    np.testing.assert_array_equal(pipeline.decode(latents, pipeline.variant.complete(height=20, width=12)), pixels)
    dense = pipeline(PROMPTS[0], **SIZE, sparsity=None)
    assert (dense.full_steps, dense.density) == ((0, 1, 2), {"attention": 1.0, "mlp": 1.0})


def test_steps_that_a_gate_skipped_are_known_after_the_run_and_are_in_the_shares(pipeline):
    cache = {"gate": "easy", "threshold": 1e3, "warm_up": 0.25, "max_skips": 2}
    options = SIZE | dict(num_inference_steps=8, sparsity={"attention": None, "mlp": None, "step_cache": cache})
    out = pipeline(PROMPTS[0], **options)
    # After two steps that ran the estimate is finite, and below the threshold.
    assert (out.skipped_steps, out.full_steps) == ((2, 3, 5, 6), (0, 1, 4, 7))
    assert out.density == {"attention": 0.5, "mlp": 0.5}


def test_a_gate_decides_for_each_sample_as_for_that_sample_alone_in_one_program(pipeline):
    cache = {"gate": "sea", "threshold": 0.6, "warm_up": 0.1}
    fixed = dict(num_inference_steps=12, sparsity={"attention": None, "mlp": None, "step_cache": cache})
    options = SIZE | fixed | dict(output_type="np", progress=False)
    alone = [pipeline(prompt, **options, seed=5 + i) for i, prompt in enumerate(PROMPTS)]
    seen, compiled = [], sampling._run._cache_size()
    tell = lambda step, t, latents, clean: seen.append((step, latents.shape, clean.shape))
    out = pipeline(PROMPTS, **options, seed=5, callback_on_step_end=tell)
    assert sampling._run._cache_size() == compiled
    np.testing.assert_array_equal(out.images, np.concatenate([one.images for one in alone]))
    assert seen == [(step, (1, 60, 12), (1, 60, 12)) for step in range(12)] * 3
    assert out.steps_by_sample == tuple(one.steps_by_sample[0] for one in alone)
    assert len({one.skipped for one in out.steps_by_sample}) > 1
    for steps in ("skipped_steps", "full_steps"):
        assert set(getattr(out, steps)) == set.intersection(*(set(getattr(one, steps)) for one in alone))
    assert out.density == pytest.approx({"attention": np.mean([one.density["attention"] for one in alone]),
        "mlp": np.mean([one.density["mlp"] for one in alone])})  # fmt: skip
    twice = pipeline(PROMPTS[1], **options, num_images_per_prompt=2, seed=6)
    np.testing.assert_array_equal(twice.images[0], alone[1].images[0])
    assert np.any(twice.images[1] != twice.images[0])


def test_a_dense_sample_of_a_guarded_preset_runs_all_prompts_at_once_with_the_bits_of_no_sparsity(pipeline):
    assert PRESETS["mini-flux"].decides and pipeline.check(PROMPTS, **SIZE | dict(num_inference_steps=28)).apart
    seen, options = [], SIZE | dict(seed=5, output_type="np", progress=False)
    tell = lambda step, t, latents, clean: seen.append((step, latents.shape))
    dense = pipeline(PROMPTS[:2], **options, callback_on_step_end=tell)
    np.testing.assert_array_equal(dense.images, pipeline(PROMPTS[:2], **options, sparsity=None).images)
    assert seen == [(step, (2, 60, 12)) for step in range(3)]


@pytest.mark.parametrize("bound", [None, 0.05])
def test_memory_is_planned_for_the_samples_that_run_at_once_whichever_network_decides(pipeline, bound):
    """With two networks, of which the second has too few steps to leave anything out."""
    sparsity, network = replace(PRESETS["mini-flux"], max_drift=bound), pipeline.network
    residents, need = Residents(None, dict.fromkeys(("transformer", "transformer_2"), network), "none"), {}
    for batch in (1, 2):
        found = pipeline.check(PROMPTS[:batch], **SIZE | dict(num_inference_steps=28), sparsity=sparsity)
        two = replace(found, boundary=found.timesteps[26], settings=found.settings | {"guidance_2": 1.0})
        assert [(turn.role, turn.span) for turn in two.turns] == [("transformer", (0, 27)), ("transformer_2", (27, 28))]
        first, second = (turn.sparsity for turn in two.turns)
        assert (first.decides, second.decides, second.saves_nothing, two.dense) == (
            bound is not None,
            False,
            True,
            False,
        )
        assert two.at_once == (1 if bound else batch)
        need[batch] = [
            span.need for span in plan_spans(two, pipeline.variant, residents, *pipeline.shapes(two)[1:], None)
        ]
    *_, noise, cond = pipeline.shapes(found)
    given = [(nbytes(noise) + sides * nbytes(cond)) // 2 for sides in (2, 1)]
    more = np.subtract(need[2], need[1])
    assert (more == given).all() if bound else (more > given).all()


def test_the_callback_sees_step_time_latents_and_the_clean_ones(pipeline):
    seen = []
    options = SIZE | dict(sparsity=None, callback_on_step_end=lambda *args: seen.append(args))
    out = pipeline(PROMPTS[0], **options, output_type="latent")
    assert [step for step, *_ in seen] == [0, 1, 2]
    np.testing.assert_allclose([t for _, t, *_ in seen], pipeline.variant.timesteps(pipeline.variant.complete(
        height=20, width=12, steps=3))[1:])  # fmt: skip
    np.testing.assert_array_equal(seen[-1][2], out.images)
    np.testing.assert_allclose(seen[-1][3], out.images, rtol=0, atol=1e-5)  # at t = 0 they are clean


def test_a_checkpoint_of_pytorch_is_read_as_it_is():
    pipeline = Pipeline.from_pretrained(Path(__file__).parents[1] / "examples/mini-flux")
    request = pipeline.check("red striped heart on meadow", num_images_per_prompt=2)
    assert len(request.prompts) == 2 and request.settings["steps"] == 28
    assert pipeline.model.config == pipeline.variant.config


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (dict(prompt=[]), ["no prompts"]),
        (dict(prompt=["red"]), ["'red'", "shape"]),
        (dict(prompt=["red", "blue"], negative_prompt="sky"), ["prompt 'red'", "prompt 'blue'", "prompt 'sky'"]),
        (dict(prompt=[3]), ["prompt 3", "a sentence"]),
        (dict(prompt=3), ["prompt 3", "a sentence"]),
        (dict(prompt=None), ["no prompts", "at least one"]),
        (dict(prompt=PROMPTS[0], negative_prompt=3), ["prompt 3", "a sentence"]),
        (dict(negative_prompt="red"), ["'red'", "shape"]),
        (dict(negative_prompt=PROMPTS[:2]), ["2 negative prompts for 3 prompts"]),
        (dict(num_images_per_prompt=0), ["num_images_per_prompt=0", "at least 1"]),
        (dict(height="16"), ["height='16'", "a whole number"]),
        (dict(height=20.5), ["height=20.5", "a whole number"]),
        (dict(num_frames=4), ["num_frames=4", "expected none"]),
        (dict(num_inference_steps=2.5), ["num_inference_steps=2.5", "a whole number"]),
        (dict(num_inference_steps=2.0), ["num_inference_steps=2.0", "a whole number"]),
        (dict(seed=0.5), ["seed=0.5", "a whole number"]),
        (dict(guidance_scale="2"), ["guidance_scale='2'", "expected a number"]),
        (dict(sparsity="fluks"), ["'fluks'", "expected one of"]),
        (dict(output_type="jpg"), ["output_type='jpg'", "pil, np, latent"]),
        (dict(height=33), ["height=33", "multiple of 2"]),
        (dict(height=0), ["height=0", "multiple of 2"]),
        (dict(width=-2), ["width=-2", "multiple of 2"]),
        (dict(num_inference_steps=0), ["num_inference_steps=0", "at least 1"]),
        (dict(guidance_scale=float("nan")), ["guidance_scale=nan", "expected a number"]),
        (dict(guidance_scale=6016.0), ["guidance_scale=6016", "plain scale, up to 100"]),
        (dict(seed=-1), ["seed=-1", "0 to"]),
        (dict(seed=2**32), [f"seed={2**32}", "0 to"]),
        (dict(sparsity=Sparsity(mlp=MlpSparsity(full_step_schedule=(0, 3)))), ["mlp.full_step_schedule", "step 3"]),
        (dict(sparsity={"step_cache": {"gate": "tea"}}), ["gate='tea'", "no constants for", "only for flux-dev"]),
    ],
)
def test_a_bad_request_is_one_error_before_any_weights_are_read(checkpoint, monkeypatch, change, expected):
    monkeypatch.setattr("chipmunk_jax.pipelines.base.load", None)
    pipeline, request = Pipeline.from_pretrained(checkpoint), dict(prompt=PROMPTS) | SIZE | change
    fails(lambda: pipeline(request.pop("prompt"), **request), *expected)


def test_a_pipeline_of_another_kind_is_refused(checkpoint):
    class Other(Pipeline):
        pass

    fails(lambda: Other.from_pretrained(checkpoint), str(checkpoint), "a flux model", "Other")

"""From words to pixels, around a sampler that test_sampling.py tests."""

import json
import shutil

import numpy as np
import pytest
from conftest import WORDS
from test_safetensors import write_safetensors

from chipmunk_jax import MlpSparsity, Sparsity
from chipmunk_jax.convert.safetensors import read_weights
from chipmunk_jax.families import FAMILIES
from chipmunk_jax.pipeline import Pipeline, WordTable

PROMPTS = ("red striped heart on meadow", "a Blue, plain ring on night.", "yellow checkered disc on sky")
SIZE = dict(height=20, width=12, steps=3)  # a grid of 10 x 6 tokens, ragged in patches and in groups
SPARSITY = Sparsity(mlp=MlpSparsity(first_n_dense_layers=0, random_keys=0.2))


@pytest.fixture(scope="module")
def pipeline(checkpoint):
    return Pipeline.load(checkpoint)


@pytest.fixture(scope="module")
def words(checkpoint):
    return WordTable.load(checkpoint)


def fails(act, *words):
    """act() raises one ValueError of one line that holds all words."""
    with pytest.raises(ValueError) as error:
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
        ("a red striped heart with a dragon on the meadow", ["unknown word dragon", "known are"]),
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
        (lambda folder: (folder / "config.json").unlink(), ["half-written"]),
    ],
)
def test_a_bad_word_table_is_one_error_that_names_its_folder(tmp_path, checkpoint, damage, expected):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    damage(folder)
    fails(lambda: WordTable.load(folder), str(folder), *expected)
    fails(lambda: Pipeline.load(folder), str(folder), *expected)


def test_a_checkpoint_without_its_embeddings_or_its_folder_is_not_found(tmp_path, checkpoint):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    (folder / "word_embeddings.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"word_embeddings\.safetensors"):
        WordTable.load(folder)
    with pytest.raises(FileNotFoundError, match="none: no such folder"):
        Pipeline.load(tmp_path / "none")


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
    np.testing.assert_allclose(
        FAMILIES["flux"].to_pixels(tokens, grid), images, rtol=0, atol=1e-7
    )  # scaled and back in float32
    assert FAMILIES["flux"].to_pixels(np.full((1, 15, 12), 1.5, np.float32), grid).max() == 1
    assert FAMILIES["flux"].to_pixels(np.full((1, 15, 12), -1.5, np.float32), grid).min() == 0


@pytest.mark.parametrize("sparsity", [None, SPARSITY], ids=["dense", "sparse"])
def test_an_image_is_the_same_alone_and_in_any_batch(pipeline, sparsity):
    """Alone to 1e-5: a CPU sums some hundred float32 terms in another order for another batch (seen: 3e-7)."""
    settings = SIZE | dict(sparsity=sparsity, progress=True)  # as test_cli.py, to share its compiled program
    batch = pipeline(PROMPTS, **settings, seed=5)
    assert batch.shape == (3, 20, 12, 3) and batch.dtype == np.float32
    assert batch.min() >= 0 and batch.max() <= 1 and batch.std() > 0.1
    np.testing.assert_array_equal(pipeline(PROMPTS, **settings, seed=5), batch)
    for i in (0, 2):
        alone = pipeline(PROMPTS[i : i + 1], **settings, seed=5 + i)
        np.testing.assert_allclose(alone[0], batch[i], rtol=0, atol=1e-5)


def test_seed_prompt_and_guidance_each_change_the_image(pipeline):
    settings = SIZE | dict(seed=1, progress=True)
    image = pipeline(PROMPTS[:1], **settings)
    for change in (dict(seed=2), dict(guidance=3.0)):
        assert np.any(pipeline(PROMPTS[:1], **settings | change) != image)
    assert np.any(pipeline(PROMPTS[1:2], **settings) != image)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (dict(prompts=[]), ["no prompts"]),
        (dict(prompts=["red"]), ["'red'", "shape"]),
        (dict(prompts="red"), ["prompts='red'", "a list of sentences"]),
        (dict(prompts=[3]), ["prompt 3", "a sentence"]),
        (dict(height=20.5), ["height=20.5", "a whole number"]),
        (dict(frames=4), ["frames=4", "expected none"]),
        (dict(steps=2.5), ["steps=2.5", "a whole number"]),
        (dict(steps=2.0), ["steps=2.0", "a whole number"]),
        (dict(seed=0.5), ["seed=0.5", "a whole number"]),
        (dict(guidance="2"), ["guidance=2", "a finite number"]),
        (dict(sparsity="flux"), ["sparsity='flux'", "load_sparsity()"]),
        (dict(height=33), ["height=33", "multiple of 2"]),
        (dict(height=0), ["height=0", "multiple of 2"]),
        (dict(width=-2), ["width=-2", "multiple of 2"]),
        (dict(steps=0), ["steps=0", "at least 1"]),
        (dict(guidance=float("nan")), ["guidance=nan", "finite"]),
        (dict(seed=-1), ["seed=-1", "0 to"]),
        (dict(seed=2**32), [f"seed={2**32}", "0 to"]),
        (dict(sparsity=Sparsity(mlp=MlpSparsity(full_step_schedule=(0, 3)))), ["mlp.full_step_schedule", "step 3"]),
    ],
)
def test_a_bad_request_is_one_error_before_the_model_is_called(words, change, expected):
    request = dict(prompts=PROMPTS) | SIZE | change
    fails(lambda: Pipeline(None, words, FAMILIES["flux"])(request.pop("prompts"), **request), *expected)

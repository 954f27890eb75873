"""Prompts to ids: those of transformers, whatever the prompt; how they are padded and cut; and files that are no tokenizer."""

import importlib.util
import json
import random
import shutil
import tomllib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from golden_pipelines import GOLDEN, PIPELINES, assemble
from golden_texts import PROMPTS, TEXTS, of_clip, random_texts

from chipmunk_jax.errors import InputError
from chipmunk_jax.pipelines.text import PACKAGES, Tokenizer, clean

FOLDERS = GOLDEN / "tokenizers"
NAMES = ("clip", "clip_real", "t5", "umt5")
END = {"clip": 673, "clip_real": 49_407, "t5": 1, "umt5": 1, "t5 spiece": 1, "umt5 spiece": 1}
PAD = {"clip": 673, "clip_real": 49_407, "t5": 0, "umt5": 0, "t5 spiece": 0, "umt5 spiece": 0}


@cache
def texts(name: str) -> list[str]:
    return of_clip() if name == "clip_real" else random_texts(1000, seed=0)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "tokenizers.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Name -> that of golden/tokenizers; "<name> spiece": of its spiece.model alone."""

    @cache
    def load(name: str) -> Tokenizer:
        name, _, alone = name.partition(" ")
        folder = FOLDERS / name
        if alone:
            folder = tmp_path_factory.mktemp(name)
            shutil.copy(FOLDERS / name / "spiece.model", folder)
        return Tokenizer.load(folder)

    return load


@pytest.fixture
def copied(tmp_path):
    """Name -> a copy of that folder, which may be written to."""
    return lambda name: Path(shutil.copytree(FOLDERS / name, tmp_path / name))


@pytest.mark.parametrize("name", NAMES)
def test_ids_equal_those_of_transformers(name, tokenizer, golden):
    lengths = golden[f"{name}.lengths"].tolist()
    expected = np.split(golden[f"{name}.ids"].astype(int), np.cumsum(lengths)[:-1])
    made = tokenizer(name)(texts(name), max(lengths))
    assert len(expected) == len(texts(name))
    different = [
        text for text, ids, mask, row in zip(texts(name), *made[:2], expected, strict=True) if [*ids[mask]] != [*row]
    ]
    assert (different, made.warning) == ([], "")


@pytest.mark.parametrize("name", NAMES)
def test_padding_and_cutting_equal_those_of_transformers(name, tokenizer, golden):
    ids, mask = (golden[f"{name}.{key}"] for key in ("padded", "mask"))
    made = tokenizer(name)(texts(name)[: len(ids)], ids.shape[1])
    np.testing.assert_array_equal(made.ids, ids)
    np.testing.assert_array_equal(made.mask, mask)
    assert (made.ids.dtype, made.mask.dtype) == (np.int32, bool)


def test_published_ids_of_clip(tokenizer):
    """As every implementation of CLIP has them."""
    made = tokenizer("clip_real")(["A photo of a  CHIPMUNK"], 77)
    assert made.ids[0, :5].tolist() == [49_406, 320, 1125, 539, 320]
    assert made.ids[0, -1] == 49_407


@pytest.mark.parametrize("name", END)
def test_what_is_cut_is_the_end_of_the_prompt(name, tokenizer):
    """And the ids are the start of the whole ones, between the same special tokens."""
    prompts = texts(name)[:300]
    whole, short = tokenizer(name)(prompts, 400), tokenizer(name)(prompts, 7)
    assert set(whole.cut) == {""}
    for prompt, all_ids, all_mask, ids, mask, cut in zip(prompts, *whole[:2], *short, strict=True):
        count = all_mask.sum()
        assert prompt.endswith(cut) and bool(cut) == (count > 7)
        assert mask.tolist() == [place < count for place in range(7)]
        assert ids[: min(count, 7) - 1].tolist() == all_ids[: min(count, 7) - 1].tolist()
        assert ids[mask.sum() - 1] == END[name] and set(ids[~mask]) <= {PAD[name]}


@pytest.mark.parametrize(
    ("name", "cut"), [("clip", "rabbit"), ("t5", "rabbit"), ("umt5", "rabbit"), ("t5 spiece", "rabbit")]
)
def test_what_is_cut_is_said_in_one_line(name, cut, tokenizer):
    prompt = "a chipmunk in the rain and a rabbit"
    length = int(tokenizer(name)([prompt.removesuffix(" rabbit")], 40).mask.sum())
    made = tokenizer(name)(["rain", prompt, prompt], length)
    assert [text.strip() for text in made.cut] == ["", cut, cut]
    assert f"takes {length} tokens" in made.warning and made.warning.count(cut) == 1 and "\n" not in made.warning


@pytest.mark.parametrize("name", ["t5", "umt5"])
def test_a_sentencepiece_model_alone_makes_the_ids_of_tokenizer_json(name, tokenizer):
    """Of text whose letters it knows, without special tokens in it: those are letters to SentencePiece."""
    known = PROMPTS if name == "t5" else [*PROMPTS, *TEXTS]
    known = [text for text in known if 2 not in tokenizer(name)([text], 100).ids]
    assert len(known) >= 5
    one, other = tokenizer(name)(known, 100), tokenizer(f"{name} spiece")(known, 100)
    np.testing.assert_array_equal(one.ids, other.ids)


def test_a_batch_is_its_prompts_one_by_one(tokenizer):
    made = tokenizer("umt5")(TEXTS, 20)
    for i, text in enumerate(TEXTS):
        np.testing.assert_array_equal(made.ids[i], tokenizer("umt5")([text], 20).ids[0])
    assert tokenizer("umt5")([], 20).ids.shape == (0, 20)


def test_the_token_that_pads_is_the_one_that_is_named(copied):
    folder = copied("clip")
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"pad_token": {"content": "!", "lstrip": False}}))
    assert Tokenizer.load(folder)(["a"], 5).ids[0, -1] == 0
    config.unlink()
    assert Tokenizer.load(folder)(["a"], 5).ids[0, -1] == PAD["clip"]
    config.write_text(json.dumps(settings | {"pad_token": "padding"}))
    with pytest.raises(InputError, match="no padding; expected the vocabulary of CLIP"):
        Tokenizer.load(folder)


def test_lengths_that_a_tokenizer_was_saved_with_do_not_count(copied, tokenizer):
    folder = copied("t5")
    tree = json.loads((folder / "tokenizer.json").read_text())
    tree["truncation"] = {"direction": "Left", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    tree["padding"] = {
        "strategy": {"Fixed": 30}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 2, "pad_type_id": 0,
        "pad_token": "<unk>",
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    saved, usual = Tokenizer.load(folder), tokenizer("t5")
    assert (saved.before, saved.after, saved.pad) == ((), (1,), 0)
    np.testing.assert_array_equal(saved(PROMPTS, 20).ids, usual(PROMPTS, 20).ids)


@pytest.mark.parametrize("name", PIPELINES)
def test_tokenizers_of_whole_pipelines_fit_their_encoders(name, tmp_path):
    folder = assemble(name, tmp_path / name)
    for tokenizer, encoder in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
        if (folder / tokenizer).is_dir():
            rows = json.loads((folder / encoder / "config.json").read_text())["vocab_size"]
            Tokenizer.load(folder / tokenizer).check_rows(rows)


@pytest.mark.parametrize("rows", [389, 390 + 512, 32_128])
def test_a_tokenizer_of_another_model_is_told_by_its_size(rows, tokenizer):
    assert tokenizer("t5").vocabulary == 390
    with pytest.raises(
        InputError, match=f"390 tokens beside a text encoder with {rows:,} embeddings: expected as many"
    ):
        tokenizer("t5").check_rows(rows)


@pytest.mark.parametrize("name", END)
def test_every_id_is_of_the_vocabulary(name, tokenizer):
    assert tokenizer(name)(texts(name), 400).ids.max() < tokenizer(name).vocabulary


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("t5", lambda f: shutil.rmtree(f), None),
        ("t5", lambda f: [file.unlink() for file in f.iterdir()], "no tokenizer; expected tokenizer.json, vocab.json with merges"),
        ("t5", lambda f: (f / "tokenizer.json").write_text(""), "tokenizer.json: an empty file: fetch it again"),
        ("t5", lambda f: (f / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1"), "git lfs pull"),
        ("t5", lambda f: (f / "tokenizer.json").write_text("<!DOCTYPE html>"), "a web page"),
        ("t5", lambda f: (f / "tokenizer.json").write_text("{}"), r"damaged or of another kind: expected JSON of a tokenizer \("),
        ("t5", lambda f: (f / "tokenizer_config.json").write_text("{"), "tokenizer_config.json: not a JSON object"),
        ("t5", lambda f: (f / "tokenizer_config.json").write_text('{"pad_token": "none"}'), "pad_token 'none': expected a token"),
        ("clip", lambda f: (f / "merges.txt").unlink(), "vocab.json without merges.txt"),
        ("clip", lambda f: (f / "vocab.json").unlink(), "merges.txt without vocab.json"),
        ("clip", lambda f: (f / "vocab.json").write_text("[1]"), "vocab.json: not a JSON object"),
        ("clip", lambda f: (f / "vocab.json").write_text('{"a": 1, "a": 2}'), "key a is given twice"),
        ("clip", lambda f: (f / "vocab.json").write_text('{"a": 1, "b": 1}'), "each with an id of its own"),
        ("clip", lambda f: (f / "vocab.json").write_text('{"a": "1"}'), "each with an id of its own"),
        ("clip", lambda f: (f / "vocab.json").write_text('{"a": 0}'), r"no <\|startoftext\|>, <\|endoftext\|>; expected the vocab"),
        ("clip", lambda f: (f / "merges.txt").write_text("#version: 0.2\na b c\n"), "merges.txt: damaged or of another kind"),
        ("clip", lambda f: (f / "merges.txt").write_text("#version: 0.2\n0 qqq\n"), "merges.txt: damaged or of another kind"),
        ("t5", lambda f: (f / "tokenizer.json").unlink() or (f / "spiece.model").write_bytes(b"\n\x05"), "a model of Sen"),
        ("t5", lambda f: (f / "tokenizer.json").unlink() or (f / "spiece.model").write_bytes(b""), "an empty file"),
    ],
)  # fmt: skip
def test_what_is_no_tokenizer_says_so_in_one_sentence(name, change, message, copied):
    folder = copied(name)
    change(folder)
    with pytest.raises(InputError if message else FileNotFoundError, match=message) as error:
        Tokenizer.load(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["t5/tokenizer.json", "clip/vocab.json", "clip/merges.txt", "t5/spiece.model"])
def test_damaged_files_are_refused_or_read(file, copied):
    """Cut off, or with bytes changed, they raise no other error, when they are loaded and when they are used."""
    name, _, file = file.partition("/")
    folder, rng, refused = copied(name), random.Random(0), 0
    if file == "spiece.model":
        (folder / "tokenizer.json").unlink()
    whole = (folder / file).read_bytes()
    for case in range(30):
        content = bytearray(whole[: rng.randrange(len(whole))] if case % 2 else whole)
        for _ in range(3):
            content[rng.randrange(len(content))] = rng.randrange(256)
        (folder / file).write_bytes(content)
        try:
            Tokenizer.load(folder)(PROMPTS, 20)
        except InputError:
            refused += 1
    assert refused >= 5


@pytest.mark.parametrize(
    ("name", "length", "least"), [("clip", 2, 3), ("t5", 1, 2), ("t5", -3, 2), ("umt5 spiece", 0, 2)]
)
def test_a_length_has_room_for_a_prompt(name, length, least, tokenizer):
    with pytest.raises(InputError, match=f"^{length} tokens: expected at least {least}, special ones among them$"):
        tokenizer(name)(["a"], length)


@pytest.mark.parametrize("prompt", ["half \ud83d of a character", 3, None, b"bytes"])
def test_a_prompt_is_text(prompt, tokenizer):
    for name in ("clip", "t5", "t5 spiece"):
        with pytest.raises(InputError, match="expected a sentence of whole characters"):
            tokenizer(name)([prompt], 20)


def test_prompts_are_cleaned_as_by_the_pipeline_of_wan():
    pairs = json.loads((GOLDEN / "cleaned.json").read_text())
    assert len(pairs) > 50 and sum(text != cleaned for text, cleaned in pairs) > 30
    assert [clean(text) for text, _ in pairs] == [cleaned for _, cleaned in pairs]


@pytest.mark.parametrize("package", ["tokenizers", "sentencepiece", "ftfy"])
def test_a_missing_package_is_said_in_one_sentence(package, copied, monkeypatch):
    folder = copied("t5")
    if package == "sentencepiece":
        (folder / "tokenizer.json").unlink()
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(
        InputError, match=rf"needs {package}, which is not installed \(pip install '{package}>=[0-9.]+'\)"
    ):
        clean("a") if package == "ftfy" else Tokenizer.load(folder)


def test_the_packages_that_messages_name_are_declared():
    project = tomllib.loads((GOLDEN.parents[1] / "pyproject.toml").read_text())["project"]
    assert {PACKAGES["tokenizers"], PACKAGES["ftfy"]} <= {*project["dependencies"]}
    assert [PACKAGES["sentencepiece"]] == project["optional-dependencies"]["sentencepiece"]

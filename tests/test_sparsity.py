"""Configs: presets are the paper's, files and overrides say the same as code, and what is wrong is one sentence."""

import argparse
import dataclasses
import itertools
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from chipmunk_jax import AttentionSparsity, MlpSparsity, Sparsity, StepCache, config_file, load_sparsity
from chipmunk_jax.cli.sparsity_flags import add_sparsity_flags
from chipmunk_jax.errors import InputError
from chipmunk_jax.schedule import AttentionPhase, attention_phases
from chipmunk_jax.sparsity import PARTS as CONFIGS
from chipmunk_jax.sparsity import PRESETS, to_dict

ROOT = Path(__file__).parents[1]

PARTS = [AttentionSparsity, MlpSparsity]
# Every field away from its default.
OTHER = Sparsity(
    attention=AttentionSparsity(
        top_keys=0.2,
        random_keys=0.01,
        max_keys=0.5,
        first_n_dense_layers=1,
        full_step_every=7,
        full_step_schedule=(0, 1, 9),
        group=192,
        recompute_mask=True,
    ),
    mlp=MlpSparsity(top_keys=1.0, random_keys=0.0, full_step_schedule=(0, 5), select_every=3, cache="residual"),
    step_cache=StepCache(skip_steps=(3, 4)),
    schedule_steps=12,
    patches=(6, 3, 1),
)


def fails(act, *words):
    """act() raises one InputError of one line that holds all words."""
    with pytest.raises(InputError) as error:
        act()
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


# Every field of every preset, as it was measured.
KEYS = {
    "top_keys": 0.165,
    "random_keys": 0.0,
    "max_keys": None,
    "first_n_dense_layers": 2,
    "full_step_every": 10,
    "full_step_schedule": None,
    "group": 128,
    "recompute_mask": False,
    "share_sides": False,
    "query_stride": 1,
    "residual_bits": 16,
    "fixed_random_keys": 0.0,
    "text_keys": False,
    "text_queries": False,
    "local_voxels": 0,
    "local_1d_window": 0.0,
    "block_means": 0,
}
NEURONS = {
    "top_keys": 0.3,
    "random_keys": 0.05,
    "max_keys": None,
    "first_n_dense_layers": 2,
    "full_step_every": 10,
    "full_step_schedule": None,
    "group": 128,
    "select_every": 2,
    "cache": "activations",
}
SKIPPING = {
    "gate": "list",
    "predict": "hidden",
    "order": 0,
    "skip_steps": None,
    "share": 0.5,
    "warm_up": 0.1,
    "max_skips": 4,
    "threshold": None,
    "coefficients": None,
}
OF_VIDEOS = {"recompute_mask": True, "query_stride": 2, "random_keys": 0.01, "fixed_random_keys": 0.01}
OF_HUNYUAN = {"top_keys": 0.05, "text_keys": True, "text_queries": True, "full_step_schedule": [0, 1, 10, 40]}
OF_MINIS = {"group": 64, "first_n_dense_layers": 0, "block_means": 64, "share_sides": True}
# Full steps and, between these, in turn delta steps and one or two skipped ones.
BALANCED = {"full_step_every": 8, "full_step_schedule": [0, 1, *range(2, 43, 8)]}
FAST = {"full_step_every": 9, "full_step_schedule": [0, 1, *range(2, 48, 9)], "top_keys": 0.05}
SKIPPED = {
    "mini-flux": {"order": 1, "skip_steps": [*range(4, 26, 3)]},
    "mini-wan": {"skip_steps": [4, 6, 9, 11, 14, 16, 19, 21, 24, 26]},
    "-balanced": {"skip_steps": [step for step in range(4, 50, 2) if step % 8 != 2]},
    "-fast": {"skip_steps": [step for step in range(3, 49) if step % 3 != 2]},
}
VALUES = {
    "flux": (KEYS, NEURONS, [8, 4]),
    "hunyuan-video": (KEYS | OF_VIDEOS | OF_HUNYUAN, None, [[4, 4, 8]]),
    "wan-14b": (KEYS | OF_VIDEOS | {"top_keys": 0.1, "local_voxels": 5}, None, [[4, 4, 8]]),
    "wan-1.3b": (KEYS | OF_VIDEOS | {"top_keys": 0.1, "local_voxels": 3}, None, [[4, 4, 8]]),
    "mini-flux": (
        KEYS | OF_MINIS | {"top_keys": 0.33, "full_step_schedule": [0, 1, 2, *range(5, 27, 3)]},
        None,
        [8, 4],
    ),
    "mini-wan": (KEYS | OF_MINIS | {"full_step_schedule": [0, 1, *range(2, 28, 5)]}, None, [[4, 4, 4]]),
}
PUBLISHED = ("flux", "hunyuan-video", "wan-14b", "wan-1.3b")
STEP_CACHES = {f"{name}-step-cache": VALUES[name] for name in PUBLISHED}
for name in PUBLISHED:
    attention, _, patches = VALUES[name]
    no_chance = {"random_keys": 0.0, "fixed_random_keys": 0.0, "local_voxels": 0, "recompute_mask": False}
    means = {"top_keys": 0.165, "block_means": 64, "share_sides": True, "residual_bits": 16 if name == "flux" else 8}
    VALUES |= {f"{name}-balanced": (attention | no_chance | means | BALANCED, None, patches)}
    VALUES |= {f"{name}-fast": (attention | no_chance | means | FAST, None, patches)}


def test_the_presets_are_these():
    assert list(PRESETS) == sorted(VALUES | STEP_CACHES) and len(PRESETS) == 18
    with pytest.raises(KeyError):
        PRESETS["fluks"]
    with pytest.raises(TypeError):
        PRESETS["flux"] = Sparsity()


@pytest.mark.parametrize("name", VALUES | STEP_CACHES)
def test_every_field_of_the_presets_is_as_it_was_measured(name):
    attention, mlp, patches = (VALUES | STEP_CACHES)[name]
    step_cache = SKIPPING if name in STEP_CACHES else None
    for end, skipped in SKIPPED.items():
        step_cache = SKIPPING | skipped if name.endswith(end) else step_cache
    rest = {"schedule_steps": {"mini-flux": 28, "mini-wan": 30}.get(name, 50), "patches": patches}
    guarded = name.startswith("mini") or name.endswith("-balanced")
    rest |= {"step_cache": step_cache, "guidance_cache": None, "max_drift": 0.05 if guarded else None}
    assert to_dict(PRESETS[name]) == {"attention": attention, "mlp": mlp} | rest
    assert load_sparsity(name) == PRESETS[name]


def test_names_of_presets_are_known_without_reading_them(monkeypatch):
    monkeypatch.setattr(config_file, "read_config", lambda file: pytest.fail(f"{file} was read"))
    presets = type(PRESETS)()
    assert "flux" in presets and "fluks" not in presets and len(list(presets)) == len(presets) == 18


@pytest.mark.parametrize("file", sorted((ROOT / "chipmunk_jax/presets").iterdir()), ids=lambda file: file.stem)
def test_a_preset_file_names_its_source_and_a_measurement_that_is_there(file):
    text = file.read_text()
    assert file.suffix == ".yaml" and "\n# Source: " in text and "\n# Measured" in text
    records = re.findall(r"benchmarks/results/[\w.-]+\.jsonl?", text)
    assert records and all((ROOT / record).is_file() for record in records)
    bases = re.findall(r"[\w.-]+\.yaml", text)
    assert all((file.parent / base).is_file() for base in bases)


def test_the_flux_preset_has_the_values_of_the_paper():
    attention, mlp = PRESETS["flux"].attention, PRESETS["flux"].mlp
    assert (attention.top_keys, attention.random_keys, attention.recompute_mask) == (0.165, 0.0, False)
    assert (mlp.top_keys, mlp.random_keys, mlp.select_every, mlp.cache) == (0.3, 0.05, 2, "activations")
    for part in (attention, mlp):
        assert (part.first_n_dense_layers, part.full_step_every, part.full_step_schedule) == (2, 10, None)
        assert (part.group, part.max_keys) == (128, None)
    assert PRESETS["flux"].patches == (8, 4)
    paper = AttentionSparsity(block_means=0, share_sides=False)
    assert PRESETS["flux"] == Sparsity(attention=paper, schedule_steps=50) == load_sparsity("flux")


@pytest.mark.parametrize(
    ("preset", "top_keys", "local_voxels", "text", "full_steps"),
    [
        ("hunyuan-video", 0.05, 0, True, {0, 1, 10, 40}),
        ("wan-14b", 0.1, 5, False, {0, 1, 10, 20, 30, 40}),
        ("wan-1.3b", 0.1, 3, False, {0, 1, 10, 20, 30, 40}),
    ],
)
@pytest.mark.parametrize("suffix", ["", "-step-cache"])
def test_the_video_presets_have_the_values_of_the_paper(preset, suffix, top_keys, local_voxels, text, full_steps):
    """But that every second query judges; Wan 1.3B, of which it has none, is as 14B with a smaller neighbourhood."""
    sparsity = PRESETS[preset + suffix]
    attention = sparsity.attention
    assert (attention.top_keys, attention.local_voxels, attention.local_1d_window) == (top_keys, local_voxels, 0)
    assert (attention.random_keys, attention.fixed_random_keys, attention.max_keys) == (0.01, 0.01, None)
    assert attention.text_keys is attention.text_queries is text
    assert set(np.flatnonzero(attention_phases(attention, 50) != AttentionPhase.DELTA)) == full_steps
    assert (attention.recompute_mask, attention.query_stride, attention.residual_bits) == (True, 2, 16)
    assert (attention.first_n_dense_layers, attention.group, sparsity.patches) == (2, 128, ((4, 4, 8),))
    assert sparsity.mlp is None and sparsity.step_cache == (StepCache() if suffix else None)


@pytest.mark.parametrize(
    "sparsity",
    [Sparsity(), OTHER, Sparsity(attention=None, patches=()), Sparsity(mlp=None), Sparsity(patches=((4, 4, 8), 2))],
)
def test_dictionaries_and_files_give_back_the_same_config(tmp_path, sparsity):
    tree = to_dict(sparsity)
    (tmp_path / "a.json").write_text(json.dumps(tree))
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(tree))
    for source in (sparsity, tree, tmp_path / "a.json", str(tmp_path / "a.yaml")):
        found = load_sparsity(source)
        assert found == sparsity and hash(found) == hash(sparsity)


def test_keys_left_out_keep_their_defaults(tmp_path):
    (tmp_path / "a.yml").write_text("attention: {top_keys: 0.2}\nmlp: null\n")
    assert load_sparsity(tmp_path / "a.yml") == Sparsity(attention=AttentionSparsity(top_keys=0.2), mlp=None)
    assert load_sparsity({}) == Sparsity()


def test_a_file_may_change_a_preset_or_another_file(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.yaml").write_text("preset: wan-14b\nattention: {top_keys: 0.2}\nstep_cache: {}\n")
    (tmp_path / "folder/b.json").write_text('{"preset": "../a.yaml", "attention": {"group": 192}, "mlp": {}}')
    overrides = {"attention.top_keys": 0.2, "step_cache": {}}
    a = load_sparsity("wan-14b", overrides)
    b = load_sparsity("wan-14b", overrides | {"attention.group": 192, "mlp": {}})
    assert a.attention.local_voxels == 5 and a.step_cache == StepCache() and b.mlp == MlpSparsity()
    assert load_sparsity(tmp_path / "a.yaml") == a and load_sparsity(tmp_path / "folder/b.json") == b
    monkeypatch.chdir(tmp_path)
    assert load_sparsity("a.yaml") == a and load_sparsity("folder/b.json") == b
    assert load_sparsity({"preset": "folder/b.json", "patches": []}) == dataclasses.replace(b, patches=())
    source = {"preset": "flux", "attention": None}
    assert load_sparsity(source) == dataclasses.replace(PRESETS["flux"], attention=None)
    assert source == {"preset": "flux", "attention": None}
    assert load_sparsity({"preset": None}) == Sparsity()


def test_files_that_change_each_other_are_one_error(tmp_path):
    (tmp_path / "a.yaml").write_text("preset: b.yaml\n")
    (tmp_path / "b.yaml").write_text(f"preset: ../{tmp_path.name}/a.yaml\n")  # spelled otherwise
    (tmp_path / "c.yaml").write_text("preset: c.yaml\n")
    for name in "abc":
        fails(lambda name=name: load_sparsity(tmp_path / f"{name}.yaml"), f"{name}.yaml", "based on this file itself")


@pytest.mark.parametrize("preset", ["fluks", 3, ["flux"], {"mlp": None}, True])
def test_a_file_that_changes_no_known_preset_is_one_error(tmp_path, preset):
    (tmp_path / "a.yaml").write_text(json.dumps({"preset": preset}))
    fails(lambda: load_sparsity(tmp_path / "a.yaml"), repr(preset), "one of flux, ")
    with pytest.raises(FileNotFoundError, match=r"none\.yaml: no such file"):
        load_sparsity({"preset": "none.yaml"})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "mlp: null\nattention: {}\nmlp: {}\n"),
        ("a.yaml", "attention:\n  mlp: 0.2\n  mlp: 0.2\n"),
        ("a.yml", "attention: {group: 64, mlp: 0.2, mlp: 0.3}"),
        ("a.json", '{"mlp": null, "attention": null, "mlp": {}}'),
        ("a.json", '{"attention": {"mlp": 1, "mlp": 1}}'),
    ],
)
def test_a_key_given_twice_is_one_error(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    fails(lambda: load_sparsity(tmp_path / name), name, "key mlp is given twice")


def laughs(inner, outer):
    """A short YAML whose aliases stand for 10^9 values; inner and outer surround a list."""
    lists = [f"{b}: &{b} {inner}{','.join([f'*{a}'] * 10)}{outer}" for a, b in itertools.pairwise("abcdefghi")]
    return "\n".join(["a: &a {x: 1}", *lists])


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.yaml", laughs("[", "]"), "at most 10,000 values"),
        ("a.yaml", laughs("{<<: [", "]}"), "at most 10,000 values"),
        ("a.yaml", "mlp: &a [*a]", "at most 10,000 values"),
        ("a.yaml", "mlp: " + 40_000 * "[", "at most 20 levels deep"),
        ("a.json", '{"mlp": ' + 40_000 * "[", "at most 20 levels deep"),
        ("a.json", '{"mlp": ' + 900 * "[" + 900 * "]" + "}", "at most 20 levels deep"),
        ("a.yaml", "mlp: " + 10_000_000 * "a", "at most 100,000 bytes"),
        ("a.json", '{"mlp": "' + 90_000 * "a " + '"}', "at most 100,000 bytes"),
        ("a.yaml", "mlp: " + 9_000 * "a b ", "at most 1,000 characters a value, found 35,999, line 1"),
        ("a.yaml", "mlp: {top_keys: 0x" + 9_000 * "f" + "}", "at most 1,000 characters a value"),
        ("a.json", '{"mlp": {"top_keys": ' + 5_000 * "9" + "}}", "digits"),
        ("a.json", '{"mlp": "' + 9_000 * "a b " + '"}', "expected keys such as top_keys"),
    ],
    ids=lambda text: text[:20],
)
def test_what_has_no_end_is_one_sentence(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    fails(lambda: load_sparsity(tmp_path / name), expected)
    with pytest.raises(InputError) as error:
        load_sparsity(tmp_path / name)
    assert len(str(error.value)) < 400 + len(str(tmp_path))


def test_a_pipe_or_a_folder_is_no_config(tmp_path):
    os.mkfifo(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").mkdir()
    fails(lambda: load_sparsity(tmp_path / "a.yaml"), "a.yaml: no regular file, expected a file")
    fails(lambda: load_sparsity(tmp_path / "b.yaml"), "b.yaml: a folder, expected a file")


def test_yaml_may_merge_one_mapping_into_another(tmp_path):
    (tmp_path / "a.yaml").write_text("attention: &a {group: 64, top_keys: 0.2}\nmlp: {<<: *a, group: 192}\n")
    keys, neurons = AttentionSparsity(group=64, top_keys=0.2), MlpSparsity(group=192, top_keys=0.2)
    assert load_sparsity(tmp_path / "a.yaml") == Sparsity(attention=keys, mlp=neurons)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"attention.top_keys.x": 1}, ["sparsity.attention.top_keys={'x': 1}", "a number"]),
        ({"attention.random_keys.x.y": 1}, ["sparsity.attention.random_keys={'x': {'y': 1}}", "a number"]),
        ({"attention.max_keys.x": None}, ["sparsity.attention.max_keys={'x': None}", "a number"]),
        ({"patches.x": 1}, ["sparsity.patches={'x': 1}", "list of whole numbers"]),
        ({1: 2}, ["sparsity: unknown key 1"]),
        ({"attention.top_keys": 0.2, "attention.top_keys.x": 1}, ["attention.top_keys.x=1", "no other override"]),
        ({"attention.top_keys.x": 1, "attention.top_keys": 0.2}, ["attention.top_keys=0.2", "no other override"]),
        ({"mlp": None, "mlp.top_keys": 0.2}, ["mlp.top_keys=0.2", "no other override"]),
        ({"mlp.top_keys": 0.2, "mlp": None}, ["mlp=None", "no other override"]),
    ],
)
@pytest.mark.parametrize("source", ["flux", {"attention": {"max_keys": 1.0}}, Sparsity()])
def test_no_override_is_swallowed(source, overrides, words):
    fails(lambda: load_sparsity(source, overrides), *words)


def test_an_override_by_a_dictionary_changes_what_it_names():
    overrides = {"mlp": {"cache": "residual"}, "mlp.group": 192}
    assert load_sparsity("flux", overrides).mlp == MlpSparsity(cache="residual", group=192)
    assert overrides["mlp"] == {"cache": "residual"}  # the caller's own is left alone
    assert load_sparsity(OTHER, {"mlp": {"group": 64}}).mlp == dataclasses.replace(OTHER.mlp, group=64)


def words_of(text):
    """The words, however the lines were wrapped."""
    return " ".join(text.split())


@pytest.mark.parametrize("kind", [*PARTS, StepCache, Sparsity])
def test_the_docstring_explains_every_field_with_its_default(kind):
    for field in dataclasses.fields(kind):
        assert f" {field.name}: {field.metadata['help']}" in words_of(kind.__doc__)
        part = dataclasses.is_dataclass(field.default)
        default = f"{type(field.default).__name__}()" if part else json.dumps(field.default).strip('"')
        assert field.metadata["help"].endswith(f" (default: {default})")


def test_the_help_of_a_flag_is_that_of_the_docstring():
    parser = argparse.ArgumentParser()
    add_sparsity_flags(parser)
    flags = {action.dest: action.help for action in parser._actions if action.dest.startswith("sparsity.")}
    kinds = {f"sparsity.{part}.": kind for part, kind in CONFIGS.items()} | {"sparsity.": Sparsity}
    expected = {
        f"{prefix}{field.name}": field.metadata["help"]
        for prefix, kind in kinds.items()
        for field in dataclasses.fields(kind)
        if not (kind is Sparsity and field.name in CONFIGS)
    }
    assert flags == expected and "%" not in "".join(flags.values())  # which argparse would format


def test_overrides_by_dotted_names_win():
    overrides = {"attention.top_keys": 0.4, "mlp.cache": "residual", "mlp.full_step_schedule": [5, 0], "patches": []}
    expected = Sparsity(
        attention=AttentionSparsity(top_keys=0.4, block_means=0, share_sides=False),
        mlp=MlpSparsity(cache="residual", full_step_schedule=(0, 5)),
        schedule_steps=50,
        patches=(),
    )
    part = {"top_keys": 0.1, "block_means": 0, "share_sides": False}
    source = {"attention": part, "mlp": None}
    assert load_sparsity(source, overrides | {"schedule_steps": 50}) == load_sparsity("flux", overrides) == expected
    assert source == {"attention": part, "mlp": None} and part["top_keys"] == 0.1  # the caller's own is left alone
    paper = AttentionSparsity(block_means=0, share_sides=False)
    assert load_sparsity("flux", {"mlp": None, "schedule_steps": None}) == Sparsity(attention=paper, mlp=None)
    assert load_sparsity(OTHER, {"attention.max_keys": None}).attention.max_keys is None


@pytest.mark.parametrize(
    ("source", "overrides", "words"),
    [
        (
            {"atention": {}},
            {},
            [
                "sparsity: unknown key atention",
                "attention, mlp, step_cache, guidance_cache, max_drift, schedule_steps, patches",
            ],
        ),
        ({"attention": {"topkeys": 1}}, {}, ["sparsity.attention: unknown key topkeys", "top_keys", "recompute_mask"]),
        ({"mlp": {"recompute_mask": True, 7: 7}}, {}, ["sparsity.mlp: unknown key recompute_mask, 7", "select_every"]),
        ("flux", {"mlp.keys": 1}, ["sparsity.mlp: unknown key keys", "top_keys"]),
        ("flux", {"keys": 1}, ["sparsity: unknown key keys"]),
        ("flux", {"a.b": 1}, ["sparsity: unknown key a"]),
        ({"mlp": 3}, {}, ["sparsity.mlp=3", "expected keys"]),
        ({"mlp": 3}, {"mlp.top_keys": 0.2}, ["sparsity.mlp=3", "expected keys"]),
        ("fluks", {}, ["'fluks'", "flux"]),
    ],
)
def test_unknown_keys_are_one_error_that_names_them_and_the_known(source, overrides, words):
    fails(lambda: load_sparsity(source, overrides), *words)


@pytest.mark.parametrize("text", ["[1, 2]", "{", "just words", "", "a: b: c"])
def test_a_file_that_is_no_config_is_named(tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    fails(lambda: load_sparsity(tmp_path / "bad.yaml"), "bad.yaml")
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        load_sparsity(tmp_path / "none.yaml")


BAD = [
    ("top_keys", 0, "fraction above 0"),
    ("top_keys", 1.2, "fraction above 0"),
    ("top_keys", math.nan, "fraction above 0"),
    ("top_keys", -0.1, "fraction above 0"),
    ("top_keys", math.inf, "fraction above 0"),
    ("top_keys", "0.2", "a number"),
    ("top_keys", True, "a number"),
    ("top_keys", None, "a number"),
    ("random_keys", 1.0, "below 1"),
    ("random_keys", math.nan, "below 1"),
    ("max_keys", 0.0, "above 0"),
    ("max_keys", math.nan, "above 0"),
    ("group", 100, "multiple of 64"),
    ("group", 0, "multiple of 64"),
    ("group", 128.0, "whole number"),
    ("full_step_every", 0, "at least 1"),
    ("first_n_dense_layers", -1, "0 or more"),
    ("first_n_dense_layers", 3.5, "whole number"),
    ("full_step_schedule", 10, "list of whole numbers"),
    ("full_step_schedule", [0, True], "list of whole numbers"),
    ("full_step_schedule", (), "step"),
    ("full_step_schedule", (-1, 0, 1), "step"),
]


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize(("name", "value", "expected"), BAD)
def test_values_out_of_range_are_one_error_in_code_and_in_files(kind, name, value, expected):
    fails(lambda: kind(**{name: value}), name, expected)
    part = {AttentionSparsity: "attention", MlpSparsity: "mlp"}[kind]
    fails(lambda: load_sparsity({part: {name: value}}), f"sparsity.{part}.{name}=", expected)
    fails(lambda: load_sparsity("flux", {f"{part}.{name}": value}), f"sparsity.{part}.{name}=", expected)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AttentionSparsity(recompute_mask=1), ["recompute_mask=1", "true or false"]),
        (lambda: MlpSparsity(cache="disk"), ["cache=disk", "'activations' or 'residual'"]),
        (lambda: MlpSparsity(cache=3), ["cache=3", "word"]),
        (lambda: MlpSparsity(select_every=0), ["select_every=0"]),
        (lambda: Sparsity(patches=(8, 3)), ["patches=(8, 3)", "divide"]),
        (lambda: Sparsity(patches=(4, 8)), ["patches=(4, 8)", "divide"]),
        (lambda: Sparsity(patches=(0,)), ["patches=(0,)"]),
        (lambda: Sparsity(patches=((4, 4, 8), (2, 2, 3))), ["patches=((4, 4, 8), (2, 2, 3))", "divide"]),
        (lambda: Sparsity(patches=((4, 4, 8), (2, 2))), ["patches=((4, 4, 8), (2, 2))", "divide"]),
        (lambda: Sparsity(patches=((),)), ["patches=((),)", "divide"]),
        (lambda: Sparsity(patches=((4, "4"),)), ["list of whole numbers"]),
        (lambda: MlpSparsity(full_step_schedule=((0, 1),)), ["list of whole numbers"]),
        (lambda: Sparsity(patches=4), ["patches=4", "list of whole numbers"]),
        (lambda: Sparsity(attention={"top_keys": 0.2}), ["attention=", "AttentionSparsity or None"]),
        (lambda: Sparsity(mlp=AttentionSparsity()), ["mlp=", "MlpSparsity or None"]),
        (lambda: Sparsity(step_cache=(3, 4)), ["step_cache=(3, 4)", "StepCache or None"]),
        (lambda: StepCache(skip_steps=()), ["skip_steps=()", "at least one"]),
        (lambda: StepCache(skip_steps=(0, 2)), ["skip_steps=(0, 2)", "none before step 1"]),
        (lambda: StepCache(skip_steps=3), ["skip_steps=3", "list of whole numbers"]),
        (lambda: load_sparsity({"step_cache": [3]}), ["sparsity.step_cache=[3]", "expected keys such as gate"]),
    ],
)
def test_values_of_one_part_are_checked_too(make, words):
    fails(make, *words)


def test_step_caching_is_off_until_it_is_asked_for():
    assert Sparsity().step_cache is None
    assert load_sparsity({"step_cache": {}}).step_cache == StepCache() == PRESETS["flux-step-cache"].step_cache
    assert load_sparsity("flux", {"step_cache.skip_steps": [5, 3, 5]}).step_cache.skip_steps == (3, 5)
    assert load_sparsity("flux-step-cache", {"step_cache": None}) == PRESETS["flux"]


def test_room_below_the_kept_share_is_refused():
    fails(lambda: AttentionSparsity(top_keys=0.2, max_keys=0.19), "max_keys=0.19", "at least 0.2")
    # Three tenths by score, and a twentieth of the other seven by chance: 0.335.
    fails(lambda: MlpSparsity(max_keys=0.33), "max_keys=0.33", "at least 0.335")
    assert MlpSparsity(max_keys=0.335).max_keys == 0.335


@pytest.mark.parametrize("schedule", [(0,), (1,), (0, 2), (1, 2), (0, 5, 10)])
def test_an_attention_schedule_holds_steps_0_and_1(schedule):
    fails(lambda: AttentionSparsity(full_step_schedule=schedule), "full_step_schedule", "0 and 1")


@pytest.mark.parametrize("schedule", [(1,), (1, 10)])
def test_an_mlp_schedule_holds_step_0(schedule):
    fails(lambda: MlpSparsity(full_step_schedule=schedule), "full_step_schedule", "step 0")


def test_schedules_are_sets_of_steps():
    assert AttentionSparsity(full_step_schedule=[40, 1, 0, 1]).full_step_schedule == (0, 1, 40)


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 100, 128, 1000, 4352, 12288, 119040])
@pytest.mark.parametrize("top_keys", [1e-6, 0.01, 0.165, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("kind", PARTS)
def test_kept_columns_are_the_nearest_multiple_of_64_and_never_more_than_all(kind, columns, top_keys):
    config = kind(top_keys=top_keys, random_keys=0.0)
    kept = config.kept(columns)
    assert kept == config.capacity(columns)
    assert kept == columns or (0 < kept < columns and kept % 64 == 0)
    if top_keys == 1.0:
        assert kept == columns
    else:
        nearest = min(range(64, columns + 128, 64), key=lambda n: abs(n - top_keys * columns))
        assert kept == min(nearest, columns)


def test_kept_columns_of_the_presets():
    # 0.165 x 4352 = 718, between 704 and 768; 0.335 x 12288 = 4116, between 4096 and 4160.
    assert AttentionSparsity().kept(4352) == 704
    assert MlpSparsity().kept(12288) == 4096


def test_room_for_more_columns_changes_the_capacity_alone():
    small, roomy = AttentionSparsity(top_keys=0.1), AttentionSparsity(top_keys=0.1, max_keys=0.5)
    assert roomy.kept(1000) == small.kept(1000) == small.capacity(1000) == 128
    assert roomy.capacity(1000) == 512
    assert AttentionSparsity(top_keys=0.1, max_keys=1.0).capacity(1000) == 1000

"""chipmunk bench quality: the same prompts and seeds for every configuration, whatever the batch."""

import json
from pathlib import Path

import numpy as np
import pytest

from chipmunk_jax.cli.main import main
from chipmunk_jax.errors import InputError
from chipmunk_jax.report.quality import SAME, read_configurations
from chipmunk_jax.sparsity import PRESETS, load_sparsity, to_dict

ROOT = Path(__file__).parents[1]
SIZE = ["--height", "12", "--width", "16", "--steps", "3", "--prompts", "3"]


def run(checkpoint, folder, text, *flags):
    (folder / "v.yaml").write_text(text)
    (folder / "out.jsonl").unlink(missing_ok=True)
    given = [
        "bench",
        "quality",
        str(checkpoint),
        str(folder / "v.yaml"),
        *SIZE,
        "-o",
        str(folder / "out.jsonl"),
        *flags,
    ]
    assert main(given) == 0
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def test_records_hold_every_prompt_and_the_mean_difference_to_the_first(checkpoint, tmp_path, capsys):
    text = "all: {preset: flux, attention.top_keys: 1.0, mlp: null}\nhalf: {attention: null, mlp: {top_keys: 0.5, group: 64}}\n"
    everything, half = run(checkpoint, tmp_path, text, "--commit", "abc")
    assert all(level > 90 for level in everything["psnr"])  # all keys: equal but for rounding
    assert len(half["psnr"]) == half["prompts"] == 3 and half["mean_psnr"] == pytest.approx(
        np.mean(half["psnr"]), abs=1e-3
    )
    assert half["difference"] == pytest.approx(np.mean(half["psnr"]) - np.mean(everything["psnr"]), abs=1e-2)
    assert half["difference_error"] > 0 and half["density"]["attention"] == 1 > half["density"]["mlp"]
    assert (half["variant"], half["steps"], half["seed"], half["commit"]) == ("half", 3, 0, "abc")
    assert half["sparsity"] == to_dict(
        load_sparsity("flux", {"attention": None, "mlp": {"top_keys": 0.5, "group": 64}})
    )
    assert "to the first" in capsys.readouterr().out


def test_the_batch_changes_nothing(checkpoint, tmp_path):
    text = "flux: {mlp.random_keys: 0.0}\n"
    together, apart = (run(checkpoint, tmp_path, text, "--batch", n)[0]["psnr"] for n in ("3", "2"))
    np.testing.assert_allclose(together, apart, atol=0.1)


def test_a_dense_configuration_is_the_dense_sample(checkpoint, tmp_path):
    (entry,) = run(checkpoint, tmp_path, "dense: {preset: flux, attention: null, mlp: null, patches: []}\n")
    assert entry["psnr"] == [SAME] * 3


def test_fewer_steps_are_a_configuration_compared_with_all_of_them(checkpoint, tmp_path):
    text = "flux: {mlp.random_keys: 0.0}\n2 of 3 steps: {dense: true, steps: 2}\nboth: {steps: 2}\n"
    sparse, fewer, both = run(checkpoint, tmp_path, text)
    assert [entry["steps"] for entry in (sparse, fewer, both)] == [3, 2, 2]
    assert (
        fewer["sparsity"] is None
        and fewer["density"] == {"attention": 1.0, "mlp": 1.0}
        and both["sparsity"] is not None
    )
    assert all(level < 60 for level in fewer["psnr"])  # another path through the noise, not a rounding


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {dense: true}", "^a: dense=True: expected true with a number of steps"),
        ("a: {dense: maybe, steps: 2}", "^a: dense=maybe"),
        ("a: {dense: true, steps: 2, mlp: null}", "and no other setting"),
        ("", "expected names"),
        ("[a, b]", "expected names"),
        ("flux: 3", "expected names"),
        ("flux: {attention.topkeys: 1}", "^flux: .*unknown key topkeys"),
        ("nothing: {}", "^nothing: .*expected one of flux"),
        ("flux: {b: [", "expected YAML or JSON, each key once"),
        ("flux: {1: 2}", "expected names"),
        ("flux: {preset: 3}", "expected one of flux"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, text, message):
    (tmp_path / "v.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_configurations(tmp_path / "v.yaml")
    with pytest.raises(InputError, match="no such file"):
        read_configurations(tmp_path / "w.yaml")


def test_a_configuration_that_does_not_fit_is_told_before_any_sample(checkpoint, tmp_path, capsys):
    (tmp_path / "v.yaml").write_text("flux: {}\nlater: {attention.full_step_schedule: [0, 1, 9]}\n")
    given = ["bench", "quality", str(checkpoint), str(tmp_path / "v.yaml"), *SIZE, "-o", str(tmp_path / "out.jsonl")]
    assert main(given) != 0
    error = capsys.readouterr().err
    assert "later: attention.full_step_schedule names step 9, but there are 3 steps" in error
    assert main([*given, "--seed", "-1"]) != 0
    assert (
        "--seed -1: expected a whole number from 0 to" in capsys.readouterr().err
        and not (tmp_path / "out.jsonl").exists()
    )


def test_the_shipped_configurations_can_be_read():
    found = read_configurations(ROOT / "benchmarks/quality-mini-wan.yaml")
    assert next(iter(found.values())).sparsity == PRESETS["mini-wan"] and len(found) > 10

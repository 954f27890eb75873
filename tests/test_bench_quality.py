"""chipmunk bench quality: the same prompts and seeds for every configuration, whatever the batch."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest

from chipmunk_jax.cli.main import main
from chipmunk_jax.errors import InputError
from chipmunk_jax.fit import fit
from chipmunk_jax.pipelines import Pipeline
from chipmunk_jax.report import plot, quality, records
from chipmunk_jax.report.configurations import read_configurations
from chipmunk_jax.report.quality import compare_configurations
from chipmunk_jax.report.tables import quality_table
from chipmunk_jax.report.ways import SAME, Sampler
from chipmunk_jax.sparsity import load_sparsity, to_dict

ROOT = Path(__file__).parents[1]
STEPS = ROOT / "benchmarks/results/wan-1.3b-480x832x81-h100.jsonl"  # of which costs are told
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
    text = "all: {preset: flux, schedule_steps: null, attention.top_keys: 1.0, mlp: null}\n"
    text += "half: {attention: null, mlp: {top_keys: 0.5, group: 64}}\n"
    everything, half = run(checkpoint, tmp_path, text, "--commit", "abc")
    assert all(level > 90 for level in everything["psnr"])  # all keys: equal but for rounding
    assert len(half["psnr"]) == half["prompts"] == 3 and half["mean_psnr"] == pytest.approx(
        np.mean(half["psnr"]), abs=1e-3
    )
    assert half["difference"] == pytest.approx(np.mean(half["psnr"]) - np.mean(everything["psnr"]), abs=1e-2)
    assert half["difference_error"] > 0 and half["density"]["attention"] == 1 > half["density"]["mlp"]
    assert (half["variant"], half["steps"], half["seed"], half["commit"]) == ("half", 3, 0, "abc")
    assert half["sparsity"] == to_dict(
        load_sparsity("flux", {"schedule_steps": None, "attention": None, "mlp": {"top_keys": 0.5, "group": 64}})
    )
    assert "to the first" in capsys.readouterr().out


def test_the_batch_changes_nothing(checkpoint, tmp_path):
    text = "flux: {schedule_steps: null, mlp.random_keys: 0.0}\n"
    together, apart = (run(checkpoint, tmp_path, text, "--batch", n)[0]["psnr"] for n in ("3", "2"))
    np.testing.assert_allclose(together, apart, atol=0.1)


def test_prompts_of_a_file_are_those_that_are_judged(checkpoint, tmp_path):
    (tmp_path / "p.txt").write_text("red striped heart on meadow\n\nblue plain ring on night\n")
    (entry,) = run(checkpoint, tmp_path, "a: {dense: true}\n", "--prompts", str(tmp_path / "p.txt"), "--batch", "1")
    assert entry["prompts"] == 2 and entry["psnr"] == [SAME] * 2


VARIANTS = """
flux: {schedule_steps: null, mlp.random_keys: 0.0}
2 of 3 steps: {dense: true, steps: 2}
both: {steps: 2, method: sparse and few}
skipping: {attention: null, mlp: null, step_cache.skip_steps: [2]}
all of guidance 4: {dense: true, guidance: 4}
euler: {dense: true, solver: euler}
unipc: {dense: true, solver: unipc}
"""


@pytest.fixture(scope="module")
def judged(checkpoint, tmp_path_factory):
    """Records of VARIANTS by name, priced, with a distance that is the mean absolute difference; and what was printed."""
    folder, printed = tmp_path_factory.mktemp("judged"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr("chipmunk_jax.cli.bench.load_features", dict)
        patch.setattr(quality, "perceptual_distance", lambda _, a, b: float(np.abs(a - b).mean()))
        found = run(checkpoint, folder, VARIANTS, "--cost-of", str(STEPS))
    return {entry["variant"]: entry for entry in found}, printed.getvalue()


def test_fewer_steps_are_a_configuration_compared_with_all_of_them(judged):
    sparse, fewer, both = (judged[0][name] for name in ("flux", "2 of 3 steps", "both"))
    assert [entry["steps"] for entry in (sparse, fewer, both)] == [3, 2, 2]
    assert (
        fewer["sparsity"] is None
        and fewer["density"] == {"attention": 1.0, "mlp": 1.0}
        and both["sparsity"] is not None
    )
    assert all(level < 60 for level in fewer["psnr"])  # another path through the noise, not a rounding


def test_a_dense_sample_costs_one_by_count_and_by_price(judged):
    entries, _ = judged
    for cost in ("executed", "cost"):
        assert entries["euler"][cost] == entries["all of guidance 4"][cost] == pytest.approx(1)
        assert entries["2 of 3 steps"][cost] == pytest.approx(2 / 3)
        assert entries["skipping"][cost] == pytest.approx(2 / 3, abs=1e-3)  # a skipped step runs the final layer
    # Its first two steps are full, the third is not; on that model the full ones are dearer than dense ones.
    assert entries["flux"]["executed"] < 1 < entries["flux"]["cost"]
    assert "wan-1.3b 480x832x81" in entries["flux"]["cost_of"]


def test_samples_are_compared_with_dense_ones_of_their_guidance_by_the_usual_solver(judged):
    entries, _ = judged
    assert entries["all of guidance 4"]["psnr"] == entries["euler"]["psnr"] == [SAME] * 3
    assert entries["all of guidance 4"]["guidance"] == 4 and entries["euler"]["guidance"] == 2
    assert entries["unipc"]["solver"] == "UniPC" and max(entries["unipc"]["psnr"]) < 60


def test_records_say_which_method_what_it_took_and_how_like_it_is(judged):
    entries, printed = judged
    methods = {name: entry["method"] for name, entry in entries.items()}
    assert methods == {
        "flux": "sparse deltas",
        "2 of 3 steps": "fewer steps",
        "both": "sparse and few",
        "skipping": "skipped steps",
        "all of guidance 4": "dense",
        "euler": "euler",
        "unipc": "unipc",
    }
    for entry in entries.values():
        assert entry["worst_psnr"] <= entry["median_psnr"] and entry["seconds"] > 0 and entry["batch"] == 3
        assert len(entry["ssim"]) == len(entry["perceptual"]) == 3
        alike = entry["psnr"] == [SAME] * 3
        assert (entry["mean_ssim"] == 1) == (entry["mean_perceptual"] == 0) == alike
    header, *lines = printed.splitlines()
    titles = ("variant", "steps", "keys %", "MLP %", "work %", "cost %", "s", "mean dB", "worst", "SSIM", "distance")
    assert all(title in header for title in titles) and len(lines) == len(entries)
    assert max(map(len, lines)) <= 130


def test_without_features_one_line_says_so_and_the_rest_is_judged(checkpoint, tmp_path, capsys):
    (entry,) = run(checkpoint, tmp_path, "half: {preset: flux, attention: null, mlp: null, patches: []}\n")
    captured = capsys.readouterr()
    assert entry["psnr"] == [SAME] * 3 and "perceptual" not in entry and "distance" not in captured.out
    assert captured.err.startswith("chipmunk: no perceptual distance") and captured.err.count("\n") == 1


def test_records_from_before_have_a_table():
    """Whatever they lack."""
    old = records.read(ROOT / "benchmarks/results/quality-rivals-h100.jsonl", timed=False)
    header, *lines = quality_table(old).splitlines()
    assert len(lines) == len(old) and "mean dB" in header and "SSIM" not in header and "cost" not in header


def test_the_frontier_is_a_line_a_method(judged):
    entries = list(judged[0].values())
    (series,) = plot._frontiers(entries[:4]).values()
    assert set(series) == {"sparse deltas", "fewer steps", "sparse and few", "skipped steps"}
    assert series["fewer steps"] == [(pytest.approx(200 / 3), entries[1]["mean_psnr"])]
    (by_count,) = plot._frontiers([{k: v for k, v in entry.items() if k != "cost"} for entry in entries[:1]]).values()
    assert by_count["sparse deltas"][0][0] == pytest.approx(100 * entries[0]["executed"])
    other = plot._frontiers([*entries, entries[1] | {"guidance": 4.0}])
    assert [name.partition(", ")[2] for name in other] == ["guidance 2", "guidance 4"]


def test_the_frontier_is_drawn(judged, tmp_path):
    pytest.importorskip("matplotlib")
    plot.plot(list(judged[0].values()), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {dense: maybe, steps: 2}", "^a: dense=maybe"),
        ("a: {dense: true, steps: 2, mlp: null}", "^a: dense=True: expected true, and no setting of sparsity"),
        ("flux: {stepz: 3}", "^flux: unknown key stepz; known are dense, steps, guidance, solver, method"),
        ("flux: {method: 3}", "^flux: method=3: expected words"),
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
    (tmp_path / "v.yaml").write_text("flux: {schedule_steps: null}\nlater: {attention.full_step_schedule: [0, 1, 9]}\n")
    given = ["bench", "quality", str(checkpoint), str(tmp_path / "v.yaml"), *SIZE, "-o", str(tmp_path / "out.jsonl")]
    assert main(given) != 0
    error = capsys.readouterr().err
    assert "later: attention.full_step_schedule names step 9, but there are 3 steps" in error
    kernels = str(ROOT / "benchmarks/results/kernels-h100.jsonl")
    for flags, message in (
        (["--seed", "-1"], "--seed -1: expected a whole number from 0 to"),
        (["--prompts", "0"], "--prompts 0: expected at least 1"),
        (["--batch", "0"], "--batch 0: expected at least 1"),
        (["--cost-of", "none.jsonl"], "none.jsonl: no such file"),
        (["--cost-of", kernels], "expected those of `chipmunk bench step`"),
        (["--height", "8"], "8 x 16 pixels: SSIM needs at least 11"),
        (["-o", "none/a.jsonl"], "none/a.jsonl: no folder none"),
    ):
        assert main([*given, *flags]) != 0
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and not (tmp_path / "out.jsonl").exists()


def test_the_shipped_configurations_can_be_read():
    found = read_configurations(ROOT / "benchmarks/quality-mini-wan.yaml")
    measured = records.read(ROOT / "benchmarks/results/quality-mini-wan-h100.jsonl", timed=False)[0]
    first = next(iter(found.values())).sparsity
    assert fit(first, measured["steps"]) == fit(records.sparsity_of(measured), measured["steps"]) and len(found) > 10


def test_the_shipped_frontier_is_what_was_measured():
    found = read_configurations(ROOT / "benchmarks/frontier-mini-wan.yaml")
    for entry in records.read(ROOT / "benchmarks/results/frontier-mini-wan-h200.jsonl", timed=False):
        if entry["sparsity"]:
            one = found[entry["variant"]].sparsity
            assert fit(one, entry["steps"]) == fit(records.sparsity_of(entry), entry["steps"]), entry["variant"]


@pytest.mark.parametrize("name", ["mini-wan", "mini-flux"])
def test_the_shipped_frontiers_fit_their_models_and_show_the_rivals(name):
    found = read_configurations(ROOT / f"benchmarks/frontier-{name}.yaml")
    pipeline = Pipeline.from_pretrained(ROOT / "examples" / name)
    sampler = Sampler(pipeline=pipeline, prompts=["red striped heart on meadow"], at_once=1, settings={})
    comparison = compare_configurations(sampler, found)
    steps = comparison.reference.settings["steps"]
    methods = [one.method(steps) for one in found.values()]
    rivals = (
        "fewer steps",
        "skipped steps (residual)",
        "skipped steps (hidden)",
        "sparse deltas",
        "sparse deltas + skipped steps",
    )
    assert all(methods.count(rival) >= 2 for rival in rivals) and "random keys + skipped steps" in methods, methods

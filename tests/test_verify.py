"""chipmunk verify: dense, sparse and the rivals at the same cost, of a tiny random FLUX; its sheet, numbers and report."""

import contextlib
import io
import json

import jax
import numpy as np
import pytest
from html_page import assert_whole
from PIL import Image

from chipmunk_jax.cli.main import main
from chipmunk_jax.report.configurations import rivals
from chipmunk_jax.report.verify import Verification
from chipmunk_jax.sparsity import load_sparsity, to_dict

PROMPTS = ("red striped heart on meadow", "blue plain ring on night")
# In three layers, of which a preset's first two are dense.
CHANGES = {"attention.full_step_every": 5, "attention.group": 64, "mlp.full_step_every": 5, "mlp.group": 64}
CHANGES |= {"schedule_steps": None, "mlp.first_n_dense_layers": 0}
SMALL = ["--height", "20", "--width", "12", "--steps", "4", "--sparsity", "flux"]
for name, value in CHANGES.items():
    SMALL += [f"--sparsity.{name.replace('_', '-')}", "null" if value is None else str(value)]
NUMBERS = {
    *("model", "checkpoint", "solver", "dtype", "version", "prompts", "seeds", "height", "width", "steps", "guidance", "seed"),
    *("sparsity", "density", "executed", "steps_by_sample", "dense_seconds", "sparse_seconds", "psnr", "median_psnr", "rivals"),
    *("device", "jax"),
}  # fmt: skip


@pytest.fixture(scope="module")
def verified(checkpoint, tmp_path_factory):
    """The folder of a verification of two prompts of a file, two seeds each, and what was printed."""
    folder, printed = tmp_path_factory.mktemp("verified"), io.StringIO()
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "out").mkdir()
    (folder / "out/kept.txt").write_text("")
    (folder / "out/index.html").write_text("old")
    outputs = ["-o", f"{folder}/sheet.png", "--json", f"{folder}/numbers.json", "--report", f"{folder}/out"]
    given = ["--prompts", f"{folder}/prompts.txt", "--seeds", "2", "--seed", "3", *SMALL, *outputs]
    with contextlib.redirect_stdout(printed):
        assert main(["verify", str(checkpoint), *given]) == 0
    return folder, printed.getvalue()


@pytest.fixture(scope="module")
def report(verified):
    return json.loads((verified[0] / "out/report.json").read_text())


def test_verify_writes_its_sheet_and_numbers(verified):
    folder, printed = verified
    assert {file.name for file in folder.iterdir()} == {"numbers.json", "out", "prompts.txt", "sheet.png"}
    numbers = json.loads((folder / "numbers.json").read_text())
    assert numbers.keys() == NUMBERS
    assert (numbers["prompts"], numbers["seeds"]) == ([PROMPTS[0]] * 2 + [PROMPTS[1]] * 2, [3, 4, 5, 6])
    assert numbers["sparsity"] == to_dict(load_sparsity("flux", CHANGES))
    assert (numbers["steps"], numbers["jax"]) == (4, jax.__version__)
    assert len(set(numbers["psnr"])) == 4 and numbers["median_psnr"] == pytest.approx(np.median(numbers["psnr"]))
    # Attention: 1 of 3 layers in 2 of 4 steps keeps 64 of 76 keys. MLP: 3 of 4 steps keep 64 of 128 neurons.
    assert numbers["steps_by_sample"] == [{"full": [0, 1], "skipped": [], "one_sided": []}] * 4
    assert numbers["density"] == pytest.approx({"attention": 1 - 12 / 76 / 6, "mlp": 1 - 3 / 4 / 2})
    with Image.open(folder / "sheet.png") as sheet:
        assert json.loads(sheet.text["settings"]) == numbers
        assert sheet.width > 5 * 3 * 12 and sheet.height > 4 * 3 * 20  # five pictures a row, a row a sample, enlarged
    assert f"{numbers['median_psnr']:.1f} dB" in printed and "sheet.png" in printed


def test_the_rivals_cost_what_the_sparse_sample_does(verified, report):
    assert [one["name"] for one in report["rivals"]] == list(rivals(report["executed"], 4))
    fewer, skipping = report["rivals"]
    for one in (fewer, skipping):
        assert one["executed"] == pytest.approx(3 / 4) and abs(one["executed"] - report["executed"]) <= 0.5 / 4
        assert f"{one['median_psnr']:.1f} dB by {one['name']}" in verified[1]
    assert (fewer["steps"], fewer["skipped_steps"], skipping["steps"], skipping["skipped_steps"]) == (3, 0, 4, 1)


def test_a_report_holds_all_numbers_and_replaces_its_own_files_alone(verified, report):
    folder, printed = verified
    assert {file.name for file in (folder / "out").iterdir()} == {"index.html", "kept.txt", "report.json"}
    assert report.items() >= json.loads((folder / "numbers.json").read_text()).items()
    assert f"{folder}/out/index.html\n{folder}/out/report.json\n" in printed
    page = (folder / "out/index.html").read_text()
    assert_whole(page)
    assert "steps_by_sample" not in page
    assert page.count('src="data:image/webp;base64,') == 4 * 5  # dense, sparse, two rivals and the difference of each


def test_drift_and_shares_by_step_are_those_of_the_plan(report):
    drift = np.array(report["drift"])
    assert (
        drift.shape == (4, 4) and (drift[:, 0] < 1e-5).all() and (drift[:, 1:] > 1e-4).all()
    )  # the first step is dense
    steps = report["steps_of"]
    assert steps["kinds"] == ["full", "select", "select neurons", "select neurons"]
    assert [run["layers"] for run in steps["attention"]] == [[1, 2], [3, 3]]
    assert [run["layers"] for run in steps["mlp"]] == [[1, 3]]
    for part, share in report["density"].items():
        layers = [run["layers"][1] - run["layers"][0] + 1 for run in steps[part]]
        found = np.average([run["shares"] for run in steps[part]], axis=0, weights=layers)
        assert found.mean() == pytest.approx(share, abs=1e-5)  # shares are rounded to five digits


def test_the_noise_floor_is_what_the_other_dtype_gives(report):
    floor = report["noise_floor"]
    assert floor["dtypes"] == ["float32", "bfloat16"] and 20 < floor["psnr"] < 100
    assert {way["ssim"] is None for way in report["ways"].values()} == {False}


@pytest.mark.parametrize(("least", "status"), [(999, 1), (0, 0)])
def test_the_psnr_asked_for_decides_and_rivals_may_be_left_out(
    least, status, verified, checkpoint, folder, monkeypatch, capsys
):
    numbers = json.loads((verified[0] / "numbers.json").read_text()) | {"rivals": []}

    def sampled(pipeline, prompts, *, against_rivals, **_):
        assert not against_rivals
        return Verification(samples={name: np.zeros((4, 20, 12, 3)) for name in ("dense", "sparse")}, numbers=numbers)

    monkeypatch.setattr("chipmunk_jax.cli.verify.verify", sampled)
    given = ["--prompt", PROMPTS[0], *SMALL, "--no-rivals", "--min-psnr", str(least)]
    assert main(["verify", str(checkpoint), *given]) == status
    assert [file.name for file in folder.iterdir()] == ["compare.png"]
    assert "rival" not in capsys.readouterr().out

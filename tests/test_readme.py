"""The README says what was measured: its numbers are those of the committed records; and what is shipped."""

import json
import re
from pathlib import Path

from chipmunk_jax.sparsity import PRESETS, load_sparsity

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def record(name: str) -> dict:
    return json.loads((ROOT / name).read_text())


def records(name: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / f"benchmarks/results/{name}.jsonl").read_text().splitlines()]


def test_numbers_of_the_speed_table_are_the_committed_records():
    dense, sparse = records("flux-dev-1280x768-h100")
    again, skipping = records("flux-dev-step-cache-1280x768-h100")
    assert [entry["variant"] for entry in (dense, sparse, again, skipping)] == ["dense", "sparse"] * 2
    for entry in (dense, sparse, skipping):
        assert f"| {entry['ms'] / 1e3:.2f} s | {entry['ms_per_step']:.1f} ms |" in README
    assert f"a dense run of {again['ms'] / 1e3:.2f} s" in README
    for entry in (sparse, skipping):
        assert f"**{entry['speedup']:.2f} x**" in README
        assert all(entry[key] in README for key in ("device", "driver", "jax"))
    keys, neurons = (f"{100 * sparse['density'][part]:.1f} %" for part in ("attention", "mlp"))
    skipped = " and ".join(f"{100 * skipping['density'][part]:.1f} %" for part in ("attention", "mlp"))
    assert f"{keys} of the keys and {neurons} of the neurons, with steps skipped {skipped}." in README
    assert f"Peak memory {sparse['peak_bytes'] / 1e9:.1f} GB" in README


def test_numbers_of_the_step_and_kernel_tables_are_the_committed_records():
    digits = lambda ms: f"{ms:.3f}" if ms < 1 else f"{ms:.2f}" if ms < 10 else f"{ms:.1f}"
    entries = {entry["variant"]: entry for entry in records("flux-dev-step-1280x768-h100")}
    skipped = entries.pop("skipped")
    steps = {f"| {e['ms']:.1f} | {e['speedup']:.2f} x |" for e in entries.values() if e["benchmark"] == "step"}
    steps.add(f"skipped | {skipped['ms']:.1f} |")
    kernels = [entry for entry in records("kernels-h100") if entry["ms"]]
    times = {(digits(e["ms"]), digits(e["baseline_ms"]), f"{e['speedup']:.2f}") for e in kernels}
    table = README[README.index("| step | ms |") : README.index("![speed-up of the kernels")]
    assert len(steps) == 6 and all(row in table for row in steps)
    sparse, skipping = (entries[f"{name}, by its steps"]["speedup"] for name in ("sparse", "sparse, steps skipped"))
    assert f"it would be {sparse:.2f} x, and {skipping:.2f} x with steps skipped" in table
    found = re.findall(r"^\| [^|]+ \| ([\d.]+) \| [^|]*, ([\d.]+) \| ([\d.]+) x \|$", table, re.MULTILINE)
    assert len(found) == 12 and set(found) <= times


def test_numbers_of_the_runs_of_the_mlp_are_the_committed_records():
    runs = [entry for entry in records("kernels-mlp-five-runs-h100") if entry["variant"] == "dense"]
    assert f"took {min(e['ms'] for e in runs):.3f} to {max(e['ms'] for e in runs):.2f} ms in [five runs]" in README
    assert len(runs) == len({entry["commit"] for entry in runs}) == 5


def test_the_demos_take_what_their_records_say():
    for name in ("mini-flux", "mini-wan"):
        path = f"benchmarks/results/{name}-demo-cpu.json"
        seconds = sum(record(path)[f"{kind}_seconds"] for kind in ("dense", "sparse"))
        assert re.search(rf"samples for {seconds:.0f} s [^.]*\(\[record\]\({path}\)\)", README)


def test_numbers_of_the_table_of_videos_are_the_committed_records():
    digits = lambda ms: f"{ms / 1e3:.0f}" if ms >= 1e5 else f"{ms / 1e3:#.3g}"
    rows = re.findall(
        r"^\| [^|]+\(\[records\]\(benchmarks/results/([^)]+)\.jsonl\)\) \| (.+) \|$", README, re.MULTILINE
    )
    for name, cells in rows:
        entries = {entry["variant"]: entry for entry in records(name)}
        times = [digits(entries[kind]["ms"]) for kind in ("dense", "full", "select", "delta", "dense, by its steps")]
        for kind in ("sparse, by its steps", "sparse, steps skipped, by its steps"):
            times += [digits(entries[kind]["ms"]), f"{entries[kind]['speedup']:.2f} x"]
        assert cells.replace("*", "") == " | ".join(times), name
        assert f"{entries['delta']['peak_bytes'] / 1e9:.1f}" in README
    assert len(rows) == 5


def test_numbers_at_the_top_are_those_of_the_tables():
    top = README[: README.index("## Three commands")]
    video = [entry["ms"] / 1e3 for entry in records("hunyuan-video-720x1280x129-h100")[-3:]]  # by its steps
    assert "{:.0f} s dense, {:.0f} s sparse, {:.0f} s where".format(*video) in top
    runs = [*records("flux-dev-1280x768-h100"), records("flux-dev-step-cache-1280x768-h100")[-1]]
    assert "1280x768 takes {:.1f}, {:.1f} and {:.1f} s.".format(*(entry["ms"] / 1e3 for entry in runs)) in top


def test_numbers_of_the_table_of_a_delta_step_are_the_committed_record():
    (kernels,) = (e["kernels"] for e in records("flux-dev-step-1280x768-h100") if e["variant"] == "delta")
    total = sum(k["ms"] for k in kernels)
    expected = {(f"{k['calls'] or 0:g}", f"{k['ms']:.2f}", f"{k['ms'] / total:.1%}") for k in kernels}
    text = (ROOT / "benchmarks/README.md").read_text()
    found = re.findall(r"^\| `[^`]+`[^|]*\| (\d+) \| ([\d.]+) \| ([\d.]+) % \|", text, re.MULTILINE)
    assert len(found) >= 12 and {(calls, ms, f"{share}%") for calls, ms, share in found} <= expected
    assert sum(float(ms) for _, ms, _ in found) > 0.95 * total


def test_numbers_of_the_fidelity_table_are_the_committed_records():
    for name in ("mini-flux-demo-cpu", "mini-flux-preset-flux-cpu"):
        entry = record(f"benchmarks/results/{name}.json")
        shares = [f"{100 * entry['density'][part]:.1f} %" for part in ("attention", "mlp")]
        assert f"| {' | '.join(shares)} | {', '.join(f'{level:.1f}' for level in entry['psnr'])} dB |" in README
    demo = record("benchmarks/results/mini-flux-demo-cpu.json")
    assert f"({demo['dense_seconds'] / demo['sparse_seconds']:.2f} x dense in the demo)" in README
    right = record("examples/mini-flux/judge.json")["accuracy"]["guidance 2"]["all"]
    assert right >= 0.6 and f"right in {100 * right:.1f} % of" in README


def test_numbers_of_the_tables_of_quality_are_the_committed_records():
    """In benchmarks/README.md all rows, in their order; in README.md some."""
    rows = []
    for entry in records("quality-mini-wan-h100"):
        shares = [f"{100 * entry['density'][part]:.1f} %" for part in ("attention", "mlp")]
        to_first = f"{entry['difference']:+.1f} +- {entry['difference_error']:.1f}"
        rows.append((*shares, f"{entry['mean_psnr']:.1f}", to_first))
    row = r"^\| [^|]+ \| ([\d.]+ %) \| ([\d.]+ %) \| ([\d.]+)(?: dB)? \| ?([^|]*?) \|$"
    assert re.findall(row, (ROOT / "benchmarks/README.md").read_text(), re.MULTILINE) == rows
    first, *some = re.findall(row, README, re.MULTILINE)
    assert first[:3] == rows[0][:3] and len(some) == 6 and set(some) <= set(rows)


def test_numbers_of_the_video_are_the_committed_record():
    entry = record("benchmarks/results/mini-wan-demo-cpu.json")
    assert (load_sparsity(entry["sparsity"]), entry["frames"]) == (PRESETS["mini-wan"], 16)
    assert f"{100 * entry['density']['attention']:.1f} % of the keys and all neurons" in README
    assert entry["density"]["mlp"] == 1
    frames = entry["psnr_of_frames"][0]
    found = f"{entry['median_psnr']:.1f} dB, its frames {min(frames):.1f} to {max(frames):.1f} dB"
    assert found in README
    right = record("examples/mini-wan/judge.json")["accuracy"]["guidance 3"]["all"]
    assert f"right in {100 * right:.1f} % of the frames" in README


def test_both_shipped_models_together_stay_under_40_megabytes():
    folders = [ROOT / "examples" / name for name in ("mini-flux", "mini-wan")]
    sizes = [[file.stat().st_size for file in folder.rglob("*.safetensors")] for folder in folders]
    assert all(sizes) and sum(map(sum, sizes)) < 40e6


def test_files_that_the_readme_names_exist():
    linked = re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", README)
    assert linked and all((ROOT / name).exists() for name in linked)

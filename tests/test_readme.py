"""What the documents say was measured is what the committed records say, number by number; and what is shipped.

Every table of README.md and benchmarks/README.md has its test here, which compares all of its cells but the words; every number
with a unit in their prose is one that a record, a preset or the setting of a benchmark gives.
"""

import ast
import itertools
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml

from chipmunk_jax.fit import fit
from chipmunk_jax.pipelines import VARIANTS
from chipmunk_jax.report.price import read_prices
from chipmunk_jax.report.records import sparsity_of
from chipmunk_jax.sampling import plan_stacks
from chipmunk_jax.sparsity import PRESETS, load_sparsity

ROOT = Path(__file__).parents[1]
README, BENCHMARKS, NOTES = (
    (ROOT / name).read_text() for name in ("README.md", "benchmarks/README.md", "pallas_kernels/NOTES.md")
)
PROJECTED = {"dense": "dense, by its steps", "sparse": "sparse, by its steps"}
PROJECTED["skipped"] = "sparse, steps skipped, by its steps"
RIVALS = "quality-rivals-h100"


def record(name: str) -> dict:
    return json.loads((ROOT / name).read_text())


def records(name: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / f"benchmarks/results/{name}.jsonl").read_text().splitlines()]


def by_variant(name: str) -> dict[str, dict]:
    return {entry["variant"]: entry for entry in records(name)}


def tables(text: str) -> dict[str, list[list[str]]]:
    """The rows of every table, by the first cell of its header; bold is left out."""
    found = {}
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        header, _, *rows = ([cell.strip() for cell in line.strip()[1:-1].split("|")] for line in block.splitlines())
        assert header[0] not in found and all(len(row) == len(header) for row in rows), header
        found[header[0]] = [[cell.replace("**", "") for cell in row] for row in rows]
    return found


def table(text: str, name: str) -> list[list[str]]:
    return tables(text)[name]


def cells(rows: list[list[str]]) -> list[list[str]]:
    """All but the words in front."""
    return [row[1:] for row in rows]


def linked(label: str) -> list[str]:
    """Names of the records that a label links to."""
    return re.findall(r"results/([^)]+?)\.jsonl?\)", label)


def seconds(ms: float) -> str:
    return f"{ms / 1e3:.0f}" if ms >= 1e5 else f"{ms / 1e3:#.3g}"


def milliseconds(ms: float) -> str:
    return f"{ms:.3f}" if ms < 0.9995 else f"{ms:.2f}" if ms < 10 else f"{ms:.1f}"


def times(ratio: float) -> str:
    return f"{ratio:.2f}x"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def gigabytes(entry: dict) -> str:
    return f"{entry['peak_bytes'] / 1e9:.1f}"


def card(entry: dict) -> str:
    return re.search(r"H\d00", entry["device"]).group()


def flux_samples() -> tuple[dict, dict, dict, dict]:
    """Whole samples of FLUX: dense and sparse, dense and sparse with steps skipped."""
    entries = (*records("flux-dev-1280x768-h100"), *records("flux-dev-step-cache-1280x768-h100"))
    assert [entry["variant"] for entry in entries] == ["dense", "sparse"] * 2
    return entries


def sample_cells(name: str) -> list[str]:
    """Card, dense, sparse, over dense, steps skipped, over dense, and how: of whole samples, or projected ones."""
    if name.startswith("flux"):
        (dense, sparse, _, skipped), how = flux_samples(), "measured"
    else:
        entries, how = by_variant(name), "projected"
        dense, sparse, skipped = (entries[variant] for variant in PROJECTED.values())
        assert dense["counts"] == {"dense": 50} and skipped["counts"]["skipped"] == 25
    ratios = [f"{seconds(e['ms'])} {times(e['speedup'])}".split() for e in (sparse, skipped)]
    return [card(dense), seconds(dense["ms"]), *ratios[0], *ratios[1], how]


def of_this_size(label: str, entry: dict) -> bool:
    """Whether a label says the pixels and frames of a record."""
    size = entry["shape"]
    frames = "frames" not in size or f"{size['frames']} frames" in label
    return f"{size['width']}x{size['height']}" in label and frames


def numbers(text: str) -> Counter:
    return Counter(re.findall(r"[\d.]*\d", text))


# What every table is tested by; a table that nothing here names fails. Those of words alone are the last ones.
TESTED = {
    "README.md": {
        "one card, full size, 50 steps", "one call, H100, measured", "setting, and mean PSNR in dB", "pipeline",
        "prompt to pixels, one H100, seconds",
    },
    "benchmarks/README.md": {
        "FLUX.1-dev, 50 steps", "prompt to pixels, seconds", "one step", "FLUX.1-dev, over dense", "video, seconds", "kernel",
        "exact top-k", "run of the MLP", "model and preset, or a rival at its cost",
        "setting", "pattern", "idea", "Chipmunk paper, H100", "pattern of images", "pattern of 50 steps", "pattern under the guard",
        "images under the guard", "50 steps under the guard", "gate, extrapolated or not", "dB, by the number of tokens",
        "which keys", "of one step, in per cent",
        "one-sided steps, and predictions", "13 steps", "cost by the steps of one H200",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", TESTED)
def test_no_table_is_untested(name):
    assert set(tables((ROOT / name).read_text())) == TESTED[name]


def test_the_table_at_the_top_is_the_committed_records():
    rows = table(README, "one card, full size, 50 steps")
    assert len({tuple(linked(row[0])) for row in rows}) == len(rows) == 4
    for row in rows:
        (name,) = linked(row[0])
        device, dense, sparse, ratio, skipped, skipped_ratio, how = sample_cells(name)
        assert row[0].endswith(f", {device}") and of_this_size(row[0], records(name)[0])
        shown = [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", cell) for cell in row[1:]]
        assert shown == [f"{dense} s", f"{sparse} s, {ratio}", f"{skipped} s, {skipped_ratio}", how], name
        bits = records(name)[0]["sparsity"]["attention"]["residual_bits"]
        assert bits == 16 or f"HunyuanVideo with residuals of {bits} bits" in " ".join(README.split())
    assert linked(rows[0][3]) == ["flux-dev-step-cache-1280x768-h100"]


def test_the_table_of_calls_is_the_committed_records():
    rows, places = table(README, "one call, H100, measured"), (0, 2, 3)
    for row, place in zip(rows, places, strict=True):
        ms, dense, ratio, pytorch, _ = kernel_cells(*KERNELS[place][1:])
        assert row[1:] == [f"{dense} ms", f"{pytorch} ms", f"{ms} ms", ratio], row[0]
        assert f"{KERNELS_LEFT_OUT[place][1]} %" in row[0]
    assert "kernels-h100" in linked(README)


def test_memory_of_the_supported_models_is_the_committed_records():
    compiled = {
        e["name"]: e["compiled"]["peak"] / 1e9 for e in record("benchmarks/results/memory-aot-h100.json")["samples"]
    }
    dense = lambda size: f"{compiled[f'{size} batch 1 dense']:.1f}"
    measured = lambda name: gigabytes(by_variant(name)["delta"])
    assert [row[3] for row in table(README, "pipeline")] == [
        "",
        f"{dense('flux-dev 768x1280')} / {gigabytes(flux_samples()[1])}",
        f"{dense('hunyuan-video 720x1280x129')} / {measured('hunyuan-video-720x1280x129-h100')}",
        f"{dense('wan-1.3b 480x832x81')} / {measured('wan-1.3b-480x832x81-h100')}",
        f"{dense('wan-14b 720x1280x81')} / {measured('wan-14b-720x1280x81-h200')}",
        f"- / {compiled['wan-i2v-14b 720x1280x81 batch 1 wan-14b']:.1f}",
        *("", ""),  # of Wan2.2
    ]
    attention = records("hunyuan-video-720x1280x129-h100")[0]["sparsity"]["attention"]
    fits = f"HunyuanVideo fits one H100 with `--sparsity.attention.residual-bits {attention['residual_bits']}`"
    assert fits in " ".join(README.split())


def test_the_table_of_whole_samples_is_the_committed_records():
    dense, sparse, again, skipped = flux_samples()
    shares = lambda e: [percent(e["density"][part]) for part in ("attention", "mlp")]
    row = lambda e: [seconds(e["ms"]), f"{e['ms_per_step']:.1f}", times(e["speedup"]), gigabytes(e)]
    rows = table(BENCHMARKS, "FLUX.1-dev, 50 steps")
    assert cells(rows) == [
        [*row(dense), "100.0 %", "100.0 %"],
        [*row(sparse), *shares(sparse)],
        [*row(skipped), *shares(skipped)],
    ]
    assert f"The dense run beside the third row took {seconds(again['ms'])} s, too." in " ".join(BENCHMARKS.split())
    for entry in (dense, skipped):
        assert all(entry[key] in BENCHMARKS for key in ("device", "driver", "jax"))


PIPELINES = {  # the records of whole pipelines, and which of them the tables show
    "flux-dev-pipeline-1024x1024-h100": ("dense", "sparse"),
    "wan-1.3b-pipeline-480x832x81-h100": ("dense", "sparse"),
    "wan-14b-pipeline-720x1280x81-h100": ("dense",),
    "wan2.2-t2v-a14b-pipeline-720x1280x81-h100": ("dense",),
}


def short(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds < 1 else f"{seconds:#.3g}".rstrip(".")


def stage_cells(name: str, kind: str) -> list[str]:
    """Seconds of text, transformer and decoder, of later prompts and of the first one, and the most memory in GB."""
    entries = by_variant(name)
    first, later = entries[f"{kind}, first prompt"], entries[f"{kind}, later prompts"]
    peak = max(
        stage["peak_bytes"] for entry in (first, later) for stage in entry["stages"].values() if stage["peak_bytes"]
    )
    stages = [short(later["stages"][stage]["seconds"]) for stage in ("text", "transformer", "decoder")]
    return [*stages, short(later["ms"] / 1e3), short(first["ms"] / 1e3), f"{peak / 1e9:.1f}"]


def test_the_tables_from_a_prompt_to_pixels_are_the_committed_records():
    places = [(name, kind) for name, kinds in PIPELINES.items() for kind in kinds]
    rows = table(BENCHMARKS, "prompt to pixels, seconds")
    assert cells(rows) == [stage_cells(*place) for place in places]
    for row, (name, kind) in zip(rows, places, strict=True):
        entry = by_variant(name)[f"{kind}, later prompts"]
        assert (linked(row[0]) == [name] and f"{entry['shape']['steps']} " in row[0]) or kind == "sparse"
        assert row[0].startswith("the same, sparse") or (of_this_size(row[0], entry) and "dense" in row[0])
    short_rows = table(README, "prompt to pixels, one H100, seconds")
    assert cells(short_rows) == [stage_cells(*place)[:4] for place in places[:4]]
    assert [linked(row[0]) for row in short_rows] == [[places[0][0]], [], [places[2][0]], []]


def test_the_tables_of_steps_are_the_committed_record():
    entries = by_variant("flux-dev-step-1280x768-h100")
    kinds = ("dense", "full", "select", "select neurons", "delta")
    expected = [[f"{entries[kind]['ms']:.1f}", times(entries[kind]["speedup"])] for kind in kinds]
    expected.append([f"{entries['skipped']['ms']:.1f}", f"{entries['skipped']['speedup']:.0f}x"])
    assert cells(table(BENCHMARKS, "one step")) == expected
    _, sparse, _, skipped = flux_samples()
    projected = [entries[PROJECTED[kind]] for kind in ("sparse", "skipped")]
    rows = table(BENCHMARKS, "FLUX.1-dev, over dense")
    pairs = zip(projected, (sparse, skipped), strict=True)
    assert cells(rows) == [[times(a["speedup"]), times(b["speedup"])] for a, b in pairs]
    counts = projected[0]["counts"]
    words = "{full} full steps, {select} that selects, {select neurons} that select neurons, {delta} delta"
    assert words.format(**counts) in rows[0][0]
    assert f"{projected[1]['counts']['skipped']} steps skipped" in rows[1][0]


def test_the_table_of_videos_is_the_committed_records():
    rows, names = table(BENCHMARKS, "video, seconds"), set()
    for label, device, *shown in rows:
        (name,) = linked(label)
        entries = by_variant(name)
        kinds = ["dense", "full", "select", "delta", *PROJECTED.values()]
        value = lambda kind, key, show, entries=entries: show(entries[kind][key]) if kind in entries else "-"
        expected = [value(kind, "ms", seconds) for kind in kinds[:6]]
        expected += [
            value(kinds[5], "speedup", times),
            value(kinds[6], "ms", seconds),
            value(kinds[6], "speedup", times),
        ]
        assert shown == [*expected, gigabytes(entries["delta"])], name
        assert device == card(entries["delta"])
        attention, mlp = (entries["delta"]["sparsity"][part] for part in ("attention", "mlp"))
        if name.startswith("hunyuan"):
            assert f"residuals of {attention['residual_bits']} bits" in label
        assert ("every 4th query" in label) == (attention["query_stride"] == 4)
        assert ("of the neurons" in label) == bool(mlp)
        assert not mlp or f"{100 * mlp['top_keys']:.0f} % of the neurons" in label
        assert label.startswith("the same") or of_this_size(label, entries["delta"])
        if "voxels" in label:
            assert " x ".join(3 * [str(attention["local_voxels"])]) + " voxels" in label
        names.add(name)
    kinds_of_files = ("hunyuan-video-*.jsonl", "wan-*.jsonl")
    files = {file.stem for kind in kinds_of_files for file in (ROOT / "benchmarks/results").glob(kind)}
    assert names == files - PIPELINES.keys()
    assert len(rows) == len(names)


def test_what_the_paper_published_is_told_apart_from_what_was_measured():
    assert cells(table(BENCHMARKS, "Chipmunk paper, H100")) == [
        ["1.37 to 1.41x", "2.25 to 2.56x"],
        ["477 s, 2.16x", "277 s, 3.72x"],
        ["", "2.67x"],
    ]
    assert "(not measured by us)" in BENCHMARKS


# Of every row of the table of kernels: its benchmark and variant, and the shape of it.
KERNELS = [
    ("84.6 % of the keys left out", "column_attention", "plain", {"N": 4352, "d": 128, "K": 672}),
    ("none left out", "column_attention", "plain", {"N": 4352, "d": 128, "K": 4352}),
    ("93.0 % left out", "column_attention", "plain", {"N": 119_040, "K": 8320}),
    ("70.8 % of the neurons left out, activations cached", "mlp", "activations", {"K": 3584}),
    ("70.8 % left out, residual cached", "mlp", "residual", {"K": 3584}),
    ("85.4 % left out, activations cached", "mlp", "activations", {"K": 1792}),
    ("85.4 % left out, residual cached", "mlp", "residual", {"K": 1792}),
    ("dense attention with column sums, 119,040 tokens", "dense_colsum", "with sums", {"N": 119_040}),
    ("every 2nd query", "dense_colsum", "with sums of 1/2 of the queries", {"N": 119_040}),
    ("every 4th query", "dense_colsum", "with sums of 1/4 of the queries", {"N": 119_040}),
]
PYTORCH = {"column_attention": "torch cuDNN", "mlp": "torch compile"}


def kernel(benchmark: str, variant: str, shape: dict, name: str = "kernels-h100") -> dict:
    """The one record of a kernel with this shape."""
    fits = lambda e: e["benchmark"] == benchmark and e["variant"] == variant and shape.items() <= e["shape"].items()
    (found,) = (entry for entry in records(name) if fits(entry))
    return found


def kernel_cells(benchmark: str, variant: str, shape: dict) -> list[str]:
    """Its time; JAX's dense one and the ratio; PyTorch's and the ratio."""
    entry = kernel(benchmark, variant, shape)
    ours = [milliseconds(entry["ms"]), milliseconds(entry["baseline_ms"]), times(entry["speedup"])]
    if benchmark not in PYTORCH:
        return [*ours, "-", "-"]
    same = {name: size for name, size in entry["shape"].items() if name not in ("K", "group")}
    pytorch = kernel(benchmark, PYTORCH[benchmark], same)["ms"]
    return [*ours, milliseconds(pytorch), times(pytorch / entry["ms"])]


def left_out(benchmark: str, variant: str, shape: dict) -> str:
    """Percentage of the columns that a kernel leaves out."""
    size = kernel(benchmark, variant, shape)["shape"]
    return f"{100 * (1 - size['K'] / size['F' if benchmark == 'mlp' else 'N']):.1f}"


KERNELS_LEFT_OUT = {place: (KERNELS[place][0], left_out(*KERNELS[place][1:])) for place in (0, 2, 3, 4, 5, 6)}


def test_the_table_of_kernels_is_the_committed_records():
    rows = table(BENCHMARKS, "kernel")
    assert cells(rows) == [kernel_cells(*size) for _, *size in KERNELS]
    assert all(words in row[0] for row, (words, *_) in zip(rows, KERNELS, strict=True))
    assert all(words.startswith(f"{share} % ") for words, share in KERNELS_LEFT_OUT.values())


def test_the_table_of_top_k_is_the_committed_records():
    rows = table(BENCHMARKS, "exact top-k")
    entries = [entry for entry in records("kernels-h100") if entry["variant"] == "ascending lists"]
    three = lambda e: [milliseconds(e["ms"]), milliseconds(e["baseline_ms"]), times(e["speedup"])]
    assert cells(rows) == [three(entry) for entry in entries]
    for row, entry in zip(rows, entries, strict=True):
        size = entry["shape"]
        count, columns = size.get("H", 1) * size["G"], size.get("N") or size["F"]
        assert row[0] == f"{count:,} rows of {columns:,}, k {size['K']:,}"


def test_the_table_of_runs_of_the_mlp_is_the_committed_records():
    entries, runs = records("kernels-mlp-five-runs-h100"), []
    for commit in dict.fromkeys(entry["commit"] for entry in entries):
        run = [entry for entry in entries if entry["commit"] == commit]
        dense, pytorch = (next(e["ms"] for e in run if e["variant"] == v) for v in ("dense", "torch compile"))
        sparse = {(e["shape"]["K"], e["variant"]): times(e["speedup"]) for e in run if "K" in e["shape"]}
        order = [sparse[neurons, cache] for neurons in (3584, 1792) for cache in ("activations", "residual")]
        runs.append([milliseconds(dense), milliseconds(pytorch), *order])
    rows = table(BENCHMARKS, "run of the MLP")
    assert cells(rows) == runs and [row[0] for row in rows] == list("12345")
    dense = [entry["ms"] for entry in entries if entry["variant"] == "dense"]
    assert f"took {milliseconds(min(dense))} to {milliseconds(max(dense))} ms in five runs" in NOTES
    fourth, fifth = ([e["ms"] for e in entries[i : i + 6] if "K" in e["shape"]] for i in (18, 24))
    assert all(abs(a / b - 1) < 0.01 for a, b in zip(fourth, fifth, strict=True))
    assert "sparse times of the last two are the same within 1 %" in BENCHMARKS


def test_the_table_of_a_delta_step_is_the_committed_record():
    (kernels,) = (e["kernels"] for e in records("flux-dev-step-1280x768-h100") if e["variant"] == "delta")
    total = sum(k["ms"] for k in kernels)
    expected = {(f"{k['calls'] or 0:g}", f"{k['ms']:.2f}", f"{100 * k['ms'] / total:.1f} %") for k in kernels}
    found = [tuple(row[1:4]) for row in table(NOTES, "kernel")]
    assert len(found) >= 12 and set(found) <= expected
    assert sum(float(ms) for _, ms, _ in found) > 0.95 * total


def test_measured_times_beside_the_bounds_are_the_committed_records():
    """And the time of the products, at the rate of a large one."""
    rate = int(re.search(r"and (\d+) TFLOP/s for long", NOTES).group(1))
    products = lambda e: e["tflops"] * e["ms"] / rate
    single = [kernel(*KERNELS[place][1:]) for place in (2, 0, 1)]
    expected = [(milliseconds(e["ms"]), products(e)) for e in single]
    for _, *size in KERNELS[7:]:
        entry = kernel(*size)
        dense = kernel("dense_colsum", "dense", {"N": 119_040})
        expected.append((f"{entry['ms'] - dense['ms']:.0f}", products(entry) - products(dense)))
    expected.append((milliseconds(kernel("topk", "ascending lists", {"N": 119_040})["ms"]), None))
    expected += [(milliseconds(e["ms"]), products(e)) for e in (kernel(*size) for _, *size in KERNELS[3:7])]
    rows = table(NOTES, "measured and bounds")
    assert [row[1] for row in rows] == [ms for ms, _ in expected]
    for row, (_, bound) in zip(rows, expected, strict=True):
        digits = len(row[2].partition(".")[2])
        assert row[2] == ("" if bound is None else f"{bound:.{digits}f}"), row[0]
    for size in (4352, 119_040):
        dense = kernel("column_attention", "dense", {"N": size, "d": 128})
        assert f"{dense['tflops']:.0f} TFLOP/s ({size:,} tokens)" in NOTES


def demo_seconds(entry: dict) -> float:
    """Of all samples that `chipmunk verify` recorded."""
    return entry["dense_seconds"] + entry["sparse_seconds"] + sum(one["seconds"] for one in entry.get("rivals", ()))


def test_the_demos_take_what_their_records_say():
    for name, target in (("mini-flux", "make demo"), ("mini-wan", "make demo-video")):
        path = f"benchmarks/results/{name}-demo-cpu.json"
        took = demo_seconds(record(path))
        assert re.search(rf"`{target}` samples for {took:.0f} s\s+\(\[record\]\({path}\)\)", README)


def test_the_table_of_the_models_in_the_repository_is_the_committed_records():
    rows, levels = (
        table(BENCHMARKS, "model and preset, or a rival at its cost"),
        lambda e: ", ".join(f"{x:.1f}" for x in e["psnr"]),
    )
    demos = [record(f"benchmarks/results/{name}-demo-cpu.json") for name in ("mini-flux", "mini-wan")]
    measured = [one for entry in demos for one in (entry, *entry["rivals"])]
    assert cells(rows) == [[percent(one["executed"]), levels(one)] for one in measured]
    assert [row[0] for row in rows[1:3]] == [f"rival: {one['name']}" for one in demos[0]["rivals"]]
    for name in ("mini-flux-query-stride-4-cpu", "mini-flux-preset-flux-cpu"):
        assert f"{levels(record(f'benchmarks/results/{name}.json'))} dB" in prose(BENCHMARKS)
    for name, entry in zip(("mini-flux", "mini-wan"), demos, strict=True):
        assert min(entry["median_psnr"] - one["median_psnr"] for one in entry["rivals"]) > 0, (
            "a demo that a rival beats"
        )
        assert fit(sparsity_of(entry), entry["steps"]) == fit(PRESETS[name], entry["steps"])


def quality_cells(entry: dict, against: int) -> list[str]:
    """Steps that ran, shares of what a dense sample of so many steps computes, mean PSNR, and its change from the first."""
    cache = (entry["sparsity"] or {}).get("step_cache") or {"skip_steps": []}  # of these records, all in a list
    shares = [percent(entry["density"][part] * entry["steps"] / against) for part in ("attention", "mlp")]
    change = f"{entry['difference']:+.1f} +- {entry['difference_error']:.1f}"
    return [str(entry["steps"] - len(cache["skip_steps"])), *shares, f"{entry['mean_psnr']:.1f}", change]


def rivals() -> list[tuple[str, list[str]]]:
    """Names and cells of all that was measured beside the preset at other costs."""
    first, *others = records(RIVALS)
    assert (first["variant"], first["difference"]) == ("mini-wan", 0), "the changes are from the preset"
    return [(e["variant"], quality_cells(e, first["steps"])) for e in others]


def fewer_steps() -> list[tuple[str, list[str]]]:
    """Those that are dense, in fewer steps."""
    return [(name, shown) for name, shown in rivals() if re.match(r"\d+ of \d+ steps", name)]


FRONTIER, LARGER = "frontier-mini-wan-h200", "frontier-mini-wan-128-h200"  # at 4,096 and 16,384 tokens
IMAGES, EXTRAPOLATED = "frontier-mini-flux-h200", "frontier-mini-flux-extrapolated-h200"
FIFTY, ONE_SIDED = "frontier-50-mini-wan-h200", "one-sided-mini-wan-h200"
GUARD, GUARD_LARGER = "guard-mini-wan-h200", "guard-mini-wan-128-h200"
GUARD_IMAGES, GUARD_FIFTY, TREND = "guard-mini-flux-h200", "guard-50-mini-wan-h200", "trend-mini-wan-h200"
SKIPPED = "S alone, hidden, extrapolated, drift below"  # and the bound
Row = list[dict | None]  # records of one setting: at the smaller size by guidance, then at the larger


def frontier(*files: str, some: str = "") -> dict[str, Row]:
    """Records of every setting in their order; of the last file those alone that have some words in their name."""
    found: dict[str, Row] = {}
    for file in files:
        for entry in records(file):
            place = 2 * (entry["height"] == 128) + (entry["guidance"] == 6)
            if file != files[-1] or some in entry["variant"]:
                found.setdefault(entry["variant"], [None] * 4)[place] = entry
    return found


def level(entry: dict) -> list[str]:
    """Mean PSNR and cost, as prose has them."""
    return [f"{entry['mean_psnr']:.1f}", f"{100 * entry['cost']:.1f}"]


def work_and_levels(entry: dict) -> list[str]:
    """Work by count, mean and worst PSNR, as tables have them."""
    return [percent(entry["executed"]), f"{entry['mean_psnr']:.1f}", f"{entry['worst_psnr']:.1f}"]


def shown(entries: Row, *columns: str) -> list[str]:
    """Cells of records: columns such as "0 cost", of the first of them."""
    show = {
        "cost": lambda entry: f"{100 * entry['cost']:.1f} %",
        "dB": lambda entry: f"{entry['mean_psnr']:.1f}",
        "SSIM": lambda entry: f"{entry['mean_ssim']:.3f}",
    }
    found = [(entries[int(column[0])], show[column[2:]]) for column in columns]
    return [show(entry) if entry else "-" for entry, show in found]


@pytest.mark.parametrize(
    ("first", "files", "columns"),
    [
        ("pattern", (FRONTIER, LARGER), "0 cost,0 dB,0 SSIM,1 dB,1 SSIM,2 cost,2 dB,2 SSIM,3 dB,3 SSIM"),
        ("pattern of images", (IMAGES, EXTRAPOLATED), "0 cost,0 dB,1 dB,2 cost,2 dB,3 dB"),
        ("pattern of 50 steps", (FIFTY,), "0 cost,0 dB,0 SSIM,1 dB,1 SSIM"),
        ("pattern under the guard", (GUARD, GUARD_LARGER), "0 cost,0 dB,1 cost,1 dB,2 cost,2 dB,3 cost,3 dB"),
        ("images under the guard", (GUARD_IMAGES,), "0 cost,0 dB,1 cost,1 dB,2 cost,2 dB,3 cost,3 dB"),
        ("50 steps under the guard", (GUARD_FIFTY,), "0 cost,0 dB,1 cost,1 dB"),
        ("one-sided steps, and predictions", (ONE_SIDED,), "0 cost,0 dB,0 SSIM,1 dB,1 SSIM"),
    ],
)
def test_the_tables_of_the_frontiers_are_the_committed_records(first, files, columns):
    """All rows, in their order."""
    every = frontier(*files, some="extrapolated" if first == "pattern of images" else "")
    assert table(BENCHMARKS, first) == [[f"`{name}`", *shown(row, *columns.split(","))] for name, row in every.items()]


def test_the_table_of_quality_in_the_readme_is_the_committed_records():
    """Some rows, the rivals among them."""
    every, named = frontier(FRONTIER, LARGER), lambda row: re.search("`(.*?)`", row[0]).group(1)
    rows = table(README, "setting, and mean PSNR in dB")
    assert cells(rows) == [shown(every[named(row)], "0 cost", "0 dB", "1 dB", "2 dB", "3 dB") for row in rows]
    methods = [every[named(row)][0]["method"] for row in rows if row[0].startswith("rival: ")]
    assert methods.count("fewer steps") >= 3 and sum(method.startswith("skipped steps (") for method in methods) >= 3


RIVAL = ("fewer steps", "skipped steps (", "top-k", "sliding", "random", "paper")  # methods


def test_block_means_and_skipped_steps_beat_every_rival_of_their_cost_or_less():
    """As both pages say; and that skipped steps alone beat the paper's deltas."""
    for place in range(4):
        measured = [found[place] for found in frontier(FRONTIER, LARGER).values() if found[place]]
        of = lambda *methods, measured=measured: [e for e in measured if e["method"].startswith(methods)]
        rivals = of(*RIVAL)
        assert {e["method"] for e in rivals} >= {
            f"skipped steps ({what})" for what in ("hidden", "hidden extrapolated")
        }
        for entry in of("sparse deltas"):
            assert all(entry["mean_psnr"] > rival["mean_psnr"] for rival in rivals if rival["cost"] <= entry["cost"])
        for entry in (entry for entry in measured if entry["method"] == "paper's deltas"):
            assert any(e["mean_psnr"] > entry["mean_psnr"] and e["cost"] < entry["cost"] for e in of("skipped steps ("))


def test_patterns_that_lose_to_rivals_are_those_that_are_named():
    """FSFDS, those that extrapolate, FSSDSSDSS of 5 % under the guard; of the small Wan, patterns measured beside its frontier."""
    every, beaten = frontier(FRONTIER, LARGER), set()
    for (name, row), place in itertools.product(frontier(GUARD, GUARD_LARGER).items(), range(4)):
        rivals = [found[place] for found in every.values() if found[place] and found[place]["method"].startswith(RIVAL)]
        if row[place] and not name.startswith("S alone"):
            cost, here = row[place]["cost"], row[place]["mean_psnr"]
            if any(rival["cost"] <= cost and rival["mean_psnr"] >= here for rival in rivals):
                beaten.add((name, place))
    assert ("FSFDS, hidden", 2) in beaten
    extrapolated = {(name, place) for name, place in beaten if name.endswith(", extrapolated")}
    guarded = {(name, place) for name, place in beaten if name.startswith("FSSDSSDSS, 5 %, drift")}
    assert beaten == {("FSFDS, hidden", 2)} | extrapolated | guarded and len(guarded) == 2


def test_skipped_steps_alone_under_the_guard_are_nearest_from_about_half_of_the_cost_up():
    """As both pages say, of the small Wan and, at the usual guidance, of the small FLUX; and at 50 steps what is said of them."""
    videos = frontier(FRONTIER, LARGER), frontier(GUARD, GUARD_LARGER)
    images = frontier(IMAGES, EXTRAPOLATED), frontier(GUARD_IMAGES)
    for found, places in ((videos, range(4)), (images, (0, 2))):
        rows = [row for some in found for row in some.values()]
        for place, cost in itertools.product(places, (0.55, 0.6, 0.7, 0.8)):
            affordable = [row[place] for row in rows if row[place] and row[place]["cost"] <= cost]
            assert max(affordable, key=lambda entry: entry["mean_psnr"])["method"].startswith("guarded skipped steps")
    fifty = frontier(GUARD_FIFTY)
    alone = [row[0] for name, row in fifty.items() if name.startswith("S of 50")]
    for pattern in (fifty[f"FSDSDSDS of 50, drift below {bound}"][0] for bound in ("0.05", "0.08", "0.12")):
        cheaper = [entry for entry in alone if entry["cost"] <= pattern["cost"]]
        assert pattern["cost"] < 0.44 and all(pattern["mean_psnr"] > entry["mean_psnr"] for entry in cheaper)


def test_the_setting_that_the_page_names_is_the_one_measured():
    named = re.search(r"`({attention: null.*?})` is this setting", BENCHMARKS, re.DOTALL).group(1)
    found, measured = yaml.safe_load(named), sparsity_of(frontier(GUARD)[f"{SKIPPED} 0.05"][0])
    steps = records(GUARD)[0]["steps"]
    said, ran = (fit(one, steps) for one in (load_sparsity("flux", found), measured))
    assert (said.step_cache.skip_steps, said.step_cache.predict) == (ran.step_cache.skip_steps, ran.step_cache.predict)
    assert (said.attention, said.mlp, said.step_cache.order, said.max_drift) == (None, None, 1, ran.max_drift)


def test_the_table_of_gates_is_the_committed_records():
    entries = records("gates-mini-flux-cpu")
    rows = [[f"`{entry['variant']}`", *work_and_levels(entry)] for entry in entries]
    assert table(BENCHMARKS, "gate, extrapolated or not") == rows


def test_the_table_by_the_number_of_tokens_is_the_committed_records():
    """All rows that were measured at each; fewer steps lose with every size at the usual guidance."""
    small, larger = frontier(TREND), frontier(FRONTIER, LARGER)
    every = {name: [*row[:2], *larger[name]] for name, row in small.items() if all(larger.get(name, [None]))}
    columns = "0 dB", "2 dB", "4 dB", "1 dB", "3 dB", "5 dB"
    shown_rows = [[f"`{name}`", *shown(row, *columns)] for name, row in every.items()]
    assert table(BENCHMARKS, "dB, by the number of tokens") == shown_rows
    for name, row in every.items():
        levels = [row[place]["mean_psnr"] for place in (0, 2, 4)]
        assert not name.endswith("of 30 steps") or levels == sorted(levels, reverse=True)
        assert not name.endswith("5 %") or levels[2] > levels[0]


def test_the_table_of_activations_is_the_committed_record():
    rows = []
    for measure in record("benchmarks/results/activations-mini-flux-cpu.json")["measures"].values():
        values = np.array(measure["values"], float)
        means = np.nanmean(values.mean(2) if "side" in measure["axes"] else values, (0, 1))
        rows.append([measure["what"], " / ".join(f"{100 * mean:.1f}" for mean in np.atleast_1d(means))])
    assert table(BENCHMARKS, "of one step, in per cent") == rows


def test_the_table_of_shares_by_need_is_the_committed_records():
    found: dict[str, dict] = {}
    for entry in records("shares-mini-wan-h200"):
        name, pattern = entry["variant"].rsplit(", ", 1)
        found.setdefault(name, {})[pattern, entry["guidance"]] = entry
    of = lambda row, g: [percent(row["FDSDS", g]["keys"]), *(f"{row[p, g]['mean_psnr']:.1f}" for p in ("FDSDS", "FDD"))]
    assert table(BENCHMARKS, "which keys") == [[name, *of(row, 3), *of(row, 6)] for name, row in found.items()]


def test_of_images_the_patterns_win_at_the_larger_size_and_at_the_smaller_what_is_said():
    """Gain over the best rival, dB, of the best pattern with block means within 40, 50 and 60 % of the cost."""
    gains = []
    for place in range(4):
        measured = [found[place] for found in frontier(IMAGES, EXTRAPOLATED).values() if found[place]]
        best = lambda methods, cost, measured=measured: max(
            e["mean_psnr"] for e in measured if e["method"].startswith(methods) and e["cost"] <= cost
        )
        gains.append([best("sparse deltas", cost) - best(RIVAL, cost) for cost in (0.4, 0.5, 0.6)])
    assert min(gains[2] + gains[3]) > 0
    for small in gains[:2]:
        assert small[2] < -1 and min(small[:2]) > 0
    assert max(gains[1]) < 2


def test_the_table_of_few_steps_is_the_committed_records():
    entries = records("few-steps-mini-wan-cpu")
    rows = table(BENCHMARKS, "13 steps")
    assert cells(rows) == [work_and_levels(entry) for entry in entries]
    assert {e["steps"] for e in entries} == {13, 10, 8} and entries[0]["worst_psnr"] >= 30
    assert fit(sparsity_of(entries[0]), 13) == fit(PRESETS["mini-wan"], 13)


def preset_costs() -> dict[str, list[float]]:
    """Of each published model the costs of its presets by the times of steps: the paper's, with skipped steps, balanced, fast."""
    found = {}
    for row in table(BENCHMARKS, "cost by the steps of one H200"):
        name, file = re.match(r"`(.*)` \(\[steps\]\((.*)\)\)", row[0]).groups()
        entry = records(Path(file).stem)[0]
        variant, prices = VARIANTS[entry["model"]], read_prices(ROOT / "benchmarks" / file)
        settings = variant.complete(**{axis: entry["shape"][axis] for axis in variant.axes}, steps=50)
        stacks, sides = variant.stacks(settings), 1 if variant.guidance is None else 2
        layers = sum(stack.layers for stack in stacks.values())
        presets = [PRESETS[name + end] for end in ("", "-step-cache", "-balanced", "-fast")]
        plans = [plan_stacks(stacks, preset, 50, variant.grid(settings), sides) for preset in presets]
        found[name] = [prices.cost(plan, 50, layers) / 50 for plan in plans]
    return found


def test_the_table_of_presets_is_what_their_steps_cost():
    costs = preset_costs()
    assert cells(table(BENCHMARKS, "cost by the steps of one H200")) == [
        [f"{100 * cost:.1f} %, {1 / cost:.2f}x" for cost in row] for row in costs.values()
    ]
    assert list(costs) == ["flux", "hunyuan-video", "wan-14b", "wan-1.3b"]


def test_the_patterns_of_the_presets_are_those_of_the_frontier_of_50_steps():
    """Full and skipped steps, share of keys and block means."""
    rows = list(frontier(FIFTY).values())
    for name in preset_costs():
        for end, row in (("balanced", rows[0]), ("fast", rows[4])):
            preset, measured = fit(PRESETS[f"{name}-{end}"], 50), fit(sparsity_of(row[0]), 50)
            assert preset.step_cache.skip_steps == measured.step_cache.skip_steps
            for key in ("full_step_schedule", "top_keys", "block_means", "share_sides", "recompute_mask"):
                assert getattr(preset.attention, key) == getattr(measured.attention, key), (name, key)


def test_the_table_of_ideas_is_the_committed_records():
    levels = {(e["variant"], e["guidance"]): np.array(e["psnr"]) for e in records("deltas-mini-wan-h200")}
    for label, *shown in table(BENCHMARKS, "idea"):
        for cell, (keys, guidance) in zip(shown, itertools.product(("5 %", "16.5 %"), (3, 6)), strict=True):
            found = [
                levels.get((name, guidance)) for name in (f"{keys}, {label}", label) if keys != "5 %" or name != label
            ]
            change = next((level - levels[keys, guidance] for level in found if level is not None), None)
            spread = None if change is None else change.std(ddof=1) / len(change) ** 0.5
            assert cell == ("-" if change is None else f"{change.mean():+.1f} +- {spread:.1f}"), label


def test_the_tables_of_quality_are_the_committed_records():
    """All rows, in their order; fewer steps, the rivals, among them."""
    entries = records("quality-mini-wan-h100")
    assert {entry["steps"] for entry in entries} == {30}
    measured = [quality_cells(entry, 30) for entry in entries]
    assert cells(table(BENCHMARKS, "setting")) == [*measured, *(shown for _, shown in rivals())]
    for row, entry in zip(table(BENCHMARKS, "setting"), entries, strict=False):
        assert numbers(entry["variant"]) <= numbers(row[0]), row[0]
    first, last = entries[0]["sparsity"]["attention"], entries[-1]["sparsity"]["attention"]
    chosen = f"{100 * first['top_keys']:g} % of the keys, chosen anew every {first['full_step_every']} steps"
    assert chosen in table(BENCHMARKS, "setting")[0][0]
    schedule = ", ".join(map(str, last["full_step_schedule"]))
    assert f"full steps {schedule}" in table(BENCHMARKS, "setting")[len(entries) - 1][0]


@pytest.mark.parametrize("text", [README, BENCHMARKS], ids=["README.md", "benchmarks/README.md"])
def test_no_published_model_was_judged_and_both_pages_say_so(text):
    assert "No sample of a published model has been judged" in " ".join(text.split())


def test_simpler_methods_stand_in_the_table_of_quality():
    """Skipping alone, said to win where it does, and samples of fewer steps."""
    text = BENCHMARKS
    labels = [row[0] for row in table(text, "setting")]
    assert "rival: 10 of 30 steps skipped, all keys" in labels
    alone, preset = (
        by_variant("quality-mini-wan-h100")[name] for name in ("10 of 30 steps skipped, all keys", "mini-wan")
    )
    assert (re.search("The rivals? wins?", text) is not None) == (alone["mean_psnr"] > preset["mean_psnr"])
    shown = [label for label in labels if re.search(r"\d+ of \d+ steps$", label)]
    assert len(shown) >= 3 and shown == [f"rival: {name}" for name, _ in fewer_steps()]


MEASURED = r"(?<![\w.,-])\d[\d.,]*(?= (?:s|ms|us|GB|dB|TFLOP/s|%)(?!\w)|x(?![\w]))"


def prose(text: str) -> str:
    """Running text: no code, tables, addresses."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"^\|.*\|$|`[^`]*`", "", text, flags=re.MULTILINE)
    return " ".join(re.sub(r"\]\([^)]*\)", "]", text).split())


def test_numbers_in_the_prose_of_the_readme_are_the_committed_records():
    """Those with a unit; each is asserted above or here."""
    demos = [record(f"benchmarks/results/{name}-demo-cpu.json") for name in ("mini-flux", "mini-wan")]
    expected = [f"{demo_seconds(entry):.0f}" for entry in demos]
    fifty, costs = list(frontier(FIFTY).values()), preset_costs()
    guarded, images = frontier(GUARD)[f"{SKIPPED} 0.05"][0], frontier(GUARD_IMAGES)
    rival = frontier(IMAGES, EXTRAPOLATED)["FS alone, hidden, extrapolated"][0]
    nearest = [guarded, *(images[f"{SKIPPED} {bound}"][0] for bound in (0.05, 0.03)), rival]
    expected += [number for entry in nearest for number in level(entry)]
    expected += [f"{1 / cost:.2f}" for name in ("hunyuan-video", "wan-14b", "flux") for cost in costs[name][2:]]
    expected += [*level(fifty[4][0]), *level(fifty[9][0])]
    assert re.findall(MEASURED, prose(README)) == expected
    rows = [row for file in (FRONTIER, FIFTY, GUARD, GUARD_IMAGES) for row in frontier(file).values()]
    assert {row[0]["prompts"] for row in rows if row[0]} == {16}
    assert f"PSNR to its dense samples of {records(FRONTIER)[0]['steps']} steps, 16 prompts" in prose(README)


def second_process() -> list[str]:
    """Percentage of text and decoder in a dense FLUX sample; seconds of the first prompt in a second process, and of Wan's."""
    entries = by_variant("flux-dev-pipeline-1024x1024-h100")
    later = entries["dense, later prompts"]
    around = sum(later["stages"][stage]["seconds"] for stage in ("text", "decoder"))
    firsts = [entries[f"{kind}, first prompt, second process"]["ms"] for kind in ("dense", "sparse")]
    firsts.append(by_variant("wan-1.3b-pipeline-480x832x81-h100")["dense, first prompt, second process"]["ms"])
    return [f"{100e3 * around / later['ms']:.1f}", *(short(ms / 1e3) for ms in firsts)]


def test_numbers_in_the_prose_of_the_benchmarks_are_the_committed_records():
    """Those with a unit, in their order: of records, or of settings."""
    flux, wan = (record(f"benchmarks/results/{name}-demo-cpu.json") for name in ("mini-flux", "mini-wan"))
    judges = [record(f"examples/{name}/judge.json")["accuracy"] for name in ("mini-flux", "mini-wan")]
    right = [f"{100 * judge[f'guidance {scale}']['all']:.1f}" for judge, scale in zip(judges, (2, 3), strict=True)]
    assert judges[0]["guidance 2"]["all"] >= 0.6
    frames = wan["psnr_of_frames"][0]
    levels = {name: np.array(entry["psnr"]) for name, entry in by_variant("quality-mini-wan-h100").items()}
    changes = [levels[f"groups of 128, one of {stride}"] - levels["groups of 128"] for stride in (2, 4)]
    costs = [f"{-change.mean():.1f} +- {change.std(ddof=1) / len(change) ** 0.5:.1f} dB" for change in changes]
    long = kernel(*KERNELS[2][1:])["shape"]
    every = {name: found for name, found in frontier(FRONTIER, LARGER).items() if found[0] and found[2]}
    gained = {name: found[2]["mean_psnr"] - found[0]["mean_psnr"] for name, found in every.items()}
    lost = [-gained[name] for name in gained if name.endswith("of 30 steps")]
    under = frontier(GUARD, GUARD_LARGER)
    told = [under[f"{SKIPPED} 0.05"][0], under["FDSDS, hidden"][0]]
    told += [under[f"{SKIPPED} 0.08"][3], under["FDS, hidden"][3]]
    told += [under["FSFDS, hidden"][2], frontier(LARGER)["FS alone, hidden, extrapolated"][2]]
    guarded = [number for entry in told for number in level(entry)]
    assert len(lost) >= 5 and all(gain > -0.6 for name, gain in gained.items() if name.endswith("5 %"))
    expected = [
        "0.3",  # seconds a kernel runs
        f"{flux_samples()[2]['ms'] / 1e3:.2f}",
        *second_process(),
        f"{100 * long['K'] / long['N']:.0f}",
        "1",  # per cent, of the last two runs of the MLP
        f"{max(frames):.1f}",
        f"{flux['dense_seconds'] / flux['sparse_seconds']:.2f}",
        *(
            f"{record(f'benchmarks/results/mini-flux-{name}-cpu.json')['psnr'][-1]:.1f}"
            for name in ("query-stride-4", "preset-flux")
        ),
        *right,
        f"{max(lost):.0f}",
        "5",  # per cent of the keys, in names of patterns
        f"{100 * records(IMAGES)[0]['sparsity']['mlp']['top_keys']:.0f}",
        *("60", "60", "50", "2", "35"),  # costs and gains of test_of_images_the_patterns_win_at_the_larger_size_...
        *guarded,
        "44",  # per cent, of test_skipped_steps_alone_under_the_guard_are_nearest_...
        "25",
        "90",  # per cent, of the paper
        *(cost.split()[2] for cost in costs),
        f"{100 * PRESETS['hunyuan-video'].attention.top_keys:.0f}",
    ]
    text = prose(BENCHMARKS)
    assert re.findall(MEASURED, text) == expected
    assert f"cost fewer steps {min(lost):.0f} to {max(lost):.0f} dB" in text
    assert f"have {min(frames):.1f} to {max(frames):.1f} dB" in text and wan["frames"] == len(frames)
    assert f"every 2nd query costs {costs[0]} and with every 4th {costs[1]}." in text
    judged = records("quality-mini-wan-h100")[0]
    setting = "{width}x{height} pixels, {steps} steps, guidance {guidance:g}"
    video = "{frames} frames of {width}x{height} pixels, 4,096 tokens, {steps} steps of UniPC, guidance {guidance:g}"
    assert text.count(setting.format(**flux)) == 1
    assert video.format(**wan) == video.format(**judged) and text.count(video.format(**wan)) == 2
    assert f"{judged['prompts']} prompts" in text


@pytest.mark.parametrize("text", [README, BENCHMARKS], ids=["README.md", "benchmarks/README.md"])
def test_code_blocks_of_python_parse(text):
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks or text is BENCHMARKS
    for block in blocks:
        ast.parse(block)


def test_the_network_of_your_own_is_that_of_the_example():
    """Every line of its blocks, but for what is left out with dots and comments."""
    block = README[README.index("## Your own model") :].split("```")[1].removeprefix("python\n")
    example = (ROOT / "examples/own_network.py").read_text()
    lines = [line.partition("  #")[0].strip() for line in block.splitlines()]
    said = [line for line in lines if line and "..." not in line]
    assert len(said) >= 6 and all(line in example for line in said)


def test_both_shipped_models_together_stay_under_40_megabytes():
    folders = [ROOT / "examples" / name for name in ("mini-flux", "mini-wan")]
    sizes = [[file.stat().st_size for file in folder.rglob("*.safetensors")] for folder in folders]
    assert all(sizes) and sum(map(sum, sizes)) < 40e6


@pytest.mark.parametrize(
    "name", ["README.md", "benchmarks/README.md", "pallas_kernels/NOTES.md", "docs/coming-from-diffusers.md"]
)
def test_what_the_documents_link_to_exists(name):
    """Files, and headings in them."""
    links = re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", (ROOT / name).read_text())
    assert links or name.startswith("docs")
    for path, heading in links:
        file = ROOT / name if not path else (ROOT / name).parent / path
        assert file.exists(), path
        headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE) if heading else []
        assert not heading or heading in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings], (
            heading
        )

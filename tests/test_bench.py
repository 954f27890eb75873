"""The benchmark harness: what it runs and records. No test asserts a time, or that something is fast."""

import dataclasses
import importlib.util
import json
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from chipmunk_jax import memory
from chipmunk_jax.bench import draw, kernels, measure, references, steps, timing
from chipmunk_jax.bench.inputs import random_inputs, shortened
from chipmunk_jax.bench.profile import kernel_times
from chipmunk_jax.bench.schedule import by_schedule, kinds
from chipmunk_jax.bench.timing import Chain, Timed, input_sets, time_in_turn
from chipmunk_jax.cli.main import main
from chipmunk_jax.errors import InputError
from chipmunk_jax.pipelines import VARIANTS
from chipmunk_jax.report import records
from chipmunk_jax.report.compare import compare
from chipmunk_jax.report.tables import kernel_table, record_table
from chipmunk_jax.sparsity import PRESETS, load_sparsity, to_dict
from pallas_kernels import Columns

REPEATS = ["--repeats", "1"]
KEYS = {
    *("benchmark", "variant", "shape", "sparsity", "dtype", "ms", "ms_spread", "baseline", "baseline_ms", "speedup"),
    *("rel_err", "error", "repeats", "model", "implementation", "device", "driver", "jax", "jaxlib", "runtime"),
    *("tflops", "gbps", "of_matrix_ceiling", "of_copy_ceiling", "commit", "peak_bytes"),
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def short_runs(request, monkeypatch):
    """No test looks at a time, so a timed run need not last, but in those of timing itself, which have a clock."""
    if not request.node.name.startswith("test_timing"):
        for module in (timing, steps):
            monkeypatch.setattr(module, "REPEAT_SECONDS", 1e-3)


class Clock:
    """Seconds that pass only when something runs."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, seconds, log, name):
        def dispatch():
            self.now += seconds
            log.append(name)
            return name

        return dispatch


def test_timing_fills_repeats_drops_the_warm_up_and_takes_turns():
    clock, log, waits = Clock(), [], []
    timed = {
        "slow": Timed(clock.work(0.5, log, "slow"), calls=1, wait=waits.append),
        "fast": Timed(clock.work(0.12, log, "fast"), calls=4, wait=waits.append),
    }
    seconds = time_in_turn(timed, 3, clock=clock)
    assert seconds == {"slow": pytest.approx([0.5] * 3), "fast": pytest.approx([0.03] * 3)}  # a call, not a dispatch
    # Each once to measure, then in turn; the fast one three times, to fill 0.3 s, and such a run is dropped, too.
    assert log == ["slow"] + ["fast"] * 4 + (["slow"] + ["fast"] * 3) * 3
    assert waits == ["slow"] + ["fast"] * 2 + ["slow", "fast"] * 3  # one wait a run


def test_timing_without_a_warm_up_is_one_dispatch_a_repeat():
    clock, log, reported = Clock(), [], []
    timed = {"a": Timed(clock.work(1e-3, log, "a"), wait=id)}
    time_in_turn(timed, 4, warm=False, clock=clock, report=reported.append)
    assert log == reported == ["a"] * 4


def test_an_instant_candidate_does_not_run_for_ever():
    log = []
    time_in_turn({"a": Timed(lambda: log.append(0), wait=id)}, 1, clock=lambda: 0.0)
    assert len(log) == 2001


def test_every_call_of_a_chain_is_compiled():
    """Sorting is neither fused nor folded, so that its instructions can be counted."""
    chain = Chain(lambda x, state: (jnp.sort(x), state), [jnp.arange(8.0) for _ in range(5)], calls=5)
    text = chain.program.lower(chain.portions[0], ()).compile().as_text()
    assert text.count(" sort(") == chain.calls == 5


@pytest.mark.parametrize(
    ("sets", "calls", "expected"),
    [
        (1, 3, [[0], [0]]),  # a call has inputs of its own
        (3, 3, [[0, 1, 2]] * 2),
        (4, 2, [[0, 1], [2, 3], [0, 1]]),  # programs take turns over portions
        (5, 2, [[0, 1], [2, 3], [0, 1]]),
    ],
)
def test_a_chain_rotates_its_inputs(sets, calls, expected):
    chain = Chain(lambda x, state: (2 * x, state), [jnp.float32(i) for i in range(sets)], calls=calls)
    assert float(chain.last_inputs) == expected[0][-1]
    for inputs in expected:
        outputs, _ = chain.dispatch()
        assert [float(x) / 2 for x in outputs] == inputs
    assert chain.calls == len(expected[0])


def test_a_chain_hands_its_state_on():
    chain = Chain(lambda x, state: ((), state + x), [jnp.float32(1), jnp.float32(10)], jnp.zeros(()), calls=2)
    assert [float(chain.dispatch()[1]) for _ in range(3)] == [11, 22, 33]


def test_input_sets_make_a_gigabyte_within_their_limits(monkeypatch):
    monkeypatch.setattr("chipmunk_jax.bench.timing.SETS_BYTES", 1e5)
    large = lambda key: (jax.random.normal(key, (5_000,)), jnp.zeros(1_000))  # 24 kB
    sets = input_sets(large, jax.random.key(0))
    assert len(sets) == 4 and len({float(x[0]) for x, _ in sets}) == 4
    small = lambda key: jax.random.normal(key, (8,))
    assert len(input_sets(small, jax.random.key(0), most=7)) == 7
    huge = lambda key: jnp.zeros(100_000)
    assert len(input_sets(huge, jax.random.key(0))) == 1
    assert len(input_sets(huge, jax.random.key(0), least=2)) == 2


@pytest.mark.parametrize(("kept", "columns"), [(1, 1), (1, 70), (7, 9), (63, 64), (64, 64), (300, 5000)])
def test_lists_are_distinct_ascending_and_in_range(kept, columns):
    indices, counts, wrap = draw.lists(jax.random.key(kept), (2, 3, 5), kept, columns)
    assert wrap is None
    assert indices.shape == (2, 3, 5, kept) and indices.dtype == counts.dtype == jnp.int32
    assert np.all(np.asarray(counts) == kept) and counts.shape == (2, 3, 5)
    indices = np.asarray(indices)
    assert indices.min() >= 0 and indices.max() < columns
    assert np.all(np.diff(indices, axis=-1) > 0)
    if 1 < kept < columns // 2:
        assert len({tuple(row) for row in indices.reshape(-1, kept)}) == 30
        assert abs(indices.mean() / columns - 0.5) < 0.05  # all over the columns


def test_scores_are_positive_and_uneven():
    scores = np.asarray(draw.scores(jax.random.key(0), (3, 2, 500))).astype(np.float32)
    assert scores.shape == (3, 2, 500) and scores.min() > 0 and scores.std() > scores.mean()
    assert not np.array_equal(scores[0], scores[1])


def test_the_reference_of_top_takes_equals_from_the_left():
    scores = np.array([[1, 3, 2, 3, 2], [0, 0, 0, 0, 0]], np.float32)
    np.testing.assert_array_equal(references.top(scores, 3), [[1, 2, 3], [0, 1, 2]])


def test_some_holds_the_ends():
    assert references.some(34) == [0, 16, 33] and references.some(1) == [0] and references.some(2) == [0, 1]


def candidate(variant="ours", factor=1.0, call=None):
    """Doubles a number, or not quite."""
    return measure.Candidate(
        variant=variant,
        shape={"N": 4},
        call=call or (lambda x, state: (2 * factor * x, state)),
        sets=[jnp.arange(4.0), jnp.arange(1.0, 5.0)],
        check=lambda x, found, *_: [(np.asarray(found), 2 * np.asarray(x))],
        operations=4.0,
        bytes=32.0,
    )


class Bar:
    """Counts what a progress bar is told."""

    n = 0

    def update(self, n=1):
        self.n += n

    def set_postfix_str(self, text):
        pass


def measured(*candidates):
    ceilings, bar = measure.Ceilings(flops=1e9, bytes=1e9), Bar()
    outcomes = measure.measure(candidates, ceilings, repeats=2, most_calls=2, bar=bar)
    assert bar.n == 3 * len(candidates)
    return [record.as_dict() for record in measure.to_records("mlp", outcomes, ceilings)]


def test_a_wrong_result_has_no_time():
    def fails(x, state):
        raise NotImplementedError("no such\nkernel")

    dense, right, wrong, infinite, failing = measured(
        candidate("dense"), candidate(), candidate(factor=1.02), candidate(factor=np.inf), candidate(call=fails)
    )
    assert dense["error"] is right["error"] is None and dense["speedup"] == 1
    assert right["ms"] > 0 and right["rel_err"] == 0 and right["repeats"] == 2
    assert right["speedup"] == right["baseline_ms"] / right["ms"] and right["baseline_ms"] == dense["ms"]
    for entry in (wrong, infinite, failing):
        nothing = ("ms", "ms_spread", "speedup", "tflops", "gbps", "of_matrix_ceiling", "of_copy_ceiling")
        assert all(entry[key] is None for key in nothing) and entry["baseline_ms"] == dense["ms"]
    assert wrong["rel_err"] == pytest.approx(0.02) and "0.02 against float32, expected at most 0.01" in wrong["error"]
    assert infinite["error"] == "the result is not finite" and infinite["rel_err"] is None
    assert failing["error"] == "NotImplementedError: no such kernel"
    assert "no time: the result is not finite" in record_table([dense, infinite])


def test_candidates_of_a_wrong_baseline_have_times_and_no_speedup():
    dense, ours = measured(candidate("dense", factor=2), candidate())
    assert dense["ms"] is None and ours["ms"] > 0 and ours["speedup"] is ours["baseline_ms"] is None


def test_rates_are_counted_work_over_the_median():
    outcome = measure.Outcome(candidate(), seconds=[3.0, 1.0, 2.0], rel_err=0.0)
    (record,) = measure.to_records("mlp", [outcome], measure.Ceilings(flops=8.0, bytes=64.0))
    assert (record.ms, record.ms_spread, record.repeats) == (2000, 2000, 3)
    assert (record.tflops, record.gbps) == (pytest.approx(2e-12), pytest.approx(16e-9))
    assert (record.of_matrix_ceiling, record.of_copy_ceiling) == (0.25, 0.25)


def test_a_part_of_the_rows_counts_as_all():
    part = dataclasses.replace(candidate("lax.top_k"), share=1 / 16, bytes=16 * 32.0)  # of all rows
    outcomes = [measure.Outcome(part, seconds=[16.0]), measure.Outcome(candidate(), seconds=[2.0])]
    baseline, ours = measure.to_records("topk", outcomes, measure.Ceilings(flops=8.0, bytes=64.0))
    assert baseline.baseline == ours.baseline == "lax.top_k on 1/16 of the rows, scaled"
    assert (baseline.ms, ours.speedup, baseline.of_copy_ceiling) == (16000, 8, 0.5)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_bench_kernels_runs_every_kernel(folder, capsys, monkeypatch):
    monkeypatch.setattr("chipmunk_jax.bench.torch_baselines.obstacle", lambda: "none here")
    assert main(["bench", "kernels", "--size", "toy", *REPEATS, "-o", "a.jsonl", "--commit", "abc"]) == 0
    entries = read(folder / "a.jsonl")
    assert all(entry.keys() == KEYS for entry in entries)
    assert {entry["benchmark"] for entry in entries} == kernels.CANDIDATES.keys()
    variants = {(entry["benchmark"], entry["variant"]) for entry in entries}
    assert {("column_attention", "residual"), ("mlp", "activations"), ("mlp", "residual")} < variants
    assert len({json.dumps([e["benchmark"], e["variant"], e["shape"], e["sparsity"]]) for e in entries}) == len(entries)
    for entry in entries:
        assert entry["error"] is None and entry["ms"] > 0 and entry["speedup"] > 0 and entry["gbps"] > 0
        assert entry["commit"] == "abc" and 0 <= entry["sparsity"] < 1
        exact = entry["benchmark"] == "topk"
        assert entry["rel_err"] == 0 if exact else 0 < entry["rel_err"] < measure.BF16_TOLERANCE
        assert (entry["tflops"] is None) == exact
    out = capsys.readouterr().out
    assert "no baselines of PyTorch: none here" in out and out.count("column_attention  ") == 6


def test_bench_kernels_runs_the_implementation_asked_for(monkeypatch):
    from chipmunk_jax.bench import topk_kernels

    asked, topk_columns = set(), topk_kernels.topk_columns
    watch = lambda *args, **options: asked.add(options["implementation"]) or topk_columns(*args, **options)
    monkeypatch.setattr(topk_kernels, "topk_columns", watch)
    assert main(["bench", "kernels", "--size", "toy", "--only", "topk", *REPEATS, "--implementation", "interpret"]) == 0
    assert asked == {"interpret"}


def test_arrays_of_a_case_are_freed_before_the_next():
    live = lambda: sum(x.nbytes for x in jax.live_arrays())
    before, left = live(), []
    for _ in kernels.bench_kernels(["mlp", "topk"], kernels.SIZES["toy"], repeats=1):
        left.append(live() - before)
    assert max(left) < 1000  # a key or a scalar may stay


def test_a_case_without_room_leaves_the_others(folder, monkeypatch, capsys):
    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 5 GB")

    monkeypatch.setitem(kernels.CANDIDATES, "mlp", full)
    assert main(["bench", "kernels", "--size", "toy", "--only", "mlp,topk", *REPEATS, "-o", "a.jsonl"]) == 1
    first, *others = read(folder / "a.jsonl")
    assert first["ms"] is None and "out of memory" in first["error"] and first.keys() == KEYS
    assert len(others) == 6 and all(entry["ms"] > 0 for entry in others)
    assert "out of memory" in capsys.readouterr().out


def test_a_wrong_kernel_exits_1_after_all_others(folder, monkeypatch, capsys):
    name = "chipmunk_jax.bench.topk_kernels.topk_columns"
    zeros = lambda x, k, capacity, **_: Columns(jnp.zeros((*x.shape[:-1], capacity), jnp.int32), None)
    monkeypatch.setattr(name, zeros)
    assert main(["bench", "kernels", "--size", "toy", "--only", "topk", *REPEATS, "-o", "a.jsonl"]) == 1
    found = {(entry["variant"], entry["ms"] is None) for entry in read(folder / "a.jsonl")}
    assert found == {("lax.top_k", False), ("ascending lists", True)}
    assert capsys.readouterr().out.count("no time: relative error") == 3


TINY = ["--model", "flux-tiny", "--height", "32", "--width", "32", *REPEATS, "-o", "a.jsonl"]


STEP = ["bench", "step", *TINY, "--layers", "4"]  # of one size, so that all tests run one program


@pytest.fixture(scope="module")
def stepped(tmp_path_factory):
    """The file of a run of all kinds of steps. Not to be written to."""
    file = tmp_path_factory.mktemp("stepped") / "steps.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "REPEAT_SECONDS", 1e-3)
        patch.setattr(timing, "REPEAT_SECONDS", 1e-3)
        assert main([*STEP, "-o", str(file)]) == 0
    return file


def test_bench_step_times_each_kind(stepped):
    entries = read(stepped)
    assert [entry["variant"] for entry in entries] == ["dense", "full", "select", "select neurons", "delta", "skipped"]
    assert all(entry.keys() == KEYS for entry in entries)
    for entry in entries:
        assert entry["shape"] == {"height": 32, "width": 32, "batch": 1, "layers": 4, "text": 16}
        assert entry["ms"] > 0 and entry["sparsity"] == to_dict(PRESETS["flux"]) and entry["model"] == "flux-tiny"
    assert entries[0]["rel_err"] == 0 and all(
        entry["rel_err"] > 0 for entry in entries[2:5]
    )  # a full step may be exact


def test_bench_step_times_some_kinds_alone(folder, capsys):
    assert main([*STEP, "--only", "delta,full"]) == 0
    assert "delta" in capsys.readouterr().out
    entries = read(folder / "a.jsonl")
    assert [entry["variant"] for entry in entries] == ["full", "delta"]
    assert all(entry["ms"] > 0 and entry["speedup"] is None and entry["rel_err"] < 1e-2 for entry in entries)
    assert main(["bench", "schedule", "a.jsonl"]) == 2
    assert "no time of a step of kind dense" in capsys.readouterr().err
    assert main(["bench", "step", *TINY, "--only", "delta,fool"]) == 2
    expected = "expected some of dense, full, select, select neurons, delta, skipped"
    assert f"only=delta,fool: {expected}" in capsys.readouterr().err
    residual = ["--sparsity.mlp.cache", "residual", "--sparsity.mlp.select-every", "10"]
    assert main(["bench", "step", *TINY, "--only", "delta,select neurons", *residual]) == 2
    assert "only=delta,select neurons: expected some of dense, full, select, delta" in capsys.readouterr().err


def test_steps_without_caches_want_no_room_for_them(folder, monkeypatch):
    rooms = []
    monkeypatch.setattr("chipmunk_jax.bench.steps.caches", None)
    monkeypatch.setattr("chipmunk_jax.bench.steps.plan_stacks", None)
    monkeypatch.setattr(
        "chipmunk_jax.bench.inputs.check_room",
        lambda *shapes, placed, **options: rooms.append(memory.plan(*shapes, **options)),
    )
    assert main([*STEP, "--only", "dense,skipped"]) == 0
    assert [entry["variant"] for entry in read(folder / "a.jsonl")] == ["dense", "skipped"]
    assert "kept for skipped steps" in rooms[0] and not any("residual" in name for name in rooms[0])


def test_a_delta_step_timed_alone_has_neurons(folder):
    """Where a full step chooses no neurons, a step apart does, and is not left out."""
    again = [*STEP, "--sparsity.attention.recompute-mask", "true"]
    assert main(again) == 0
    assert main([*again, "--only", "delta"]) == 0
    *_, delta, _, alone = read(folder / "a.jsonl")
    assert delta["variant"] == alone["variant"] == "delta" and delta["rel_err"] == alone["rel_err"]
    assert delta["sparsity"]["attention"]["recompute_mask"]


def steps_of(**ms):
    common = {"model": "flux-dev", "peak_bytes": None, "benchmark": "step", "dtype": "bfloat16", "kernels": []}
    common |= {"shape": {"height": 32}, "sparsity": to_dict(PRESETS["flux"])}
    return [common | {"variant": kind.replace("_", " "), "ms": value} for kind, value in ms.items()]


def test_a_sample_takes_what_its_steps_take():
    steps = steps_of(dense=100.0, full=120.0, select=110.0, select_neurons=50.0, delta=40.0, skipped=1.0)
    dense, sparse = by_schedule(steps, 50)
    # FLUX.1: full at 0, 10, 20, 30, 40; keys are chosen at 1; neurons at 2 to 9, and then at every second.
    assert sparse["counts"] == {"full": 5, "select": 1, "select neurons": 8 + 16, "delta": 20}
    assert dense["ms"] == 5000 and sparse["ms"] == 5 * 120 + 110 + 24 * 50 + 20 * 40
    assert sparse["speedup"] == pytest.approx(5000 / 2710) and sparse["shape"] == {"height": 32, "steps": 50}
    assert "kernels" not in sparse and sparse["peak_bytes"] is None
    _, every, skipping = by_schedule(steps, 50, PRESETS["flux-step-cache"])
    assert skipping["counts"]["skipped"] == 25 and sum(skipping["counts"].values()) == 50
    assert every == sparse and skipping["sparsity"] == to_dict(PRESETS["flux-step-cache"])
    # A drift guard decides by the sample, so of its steps there is the plan alone.
    assert by_schedule(steps, 50, dataclasses.replace(PRESETS["flux"], max_drift=0.05)) == [dense, sparse]
    assert Counter(kinds(PRESETS["hunyuan-video"], 50)) == {"full": 1, "select": 3, "delta": 46}


def test_steps_without_a_time_or_of_two_models_make_no_sample():
    with pytest.raises(ValueError, match="no time of a step of kind skipped; time the steps again"):
        by_schedule(
            steps_of(dense=1.0, full=1.0, select=1.0, select_neurons=1.0, delta=1.0), 50, PRESETS["flux-step-cache"]
        )
    other = to_dict(load_sparsity("flux", {"attention.top_keys": 0.1}))
    for changed in ({"model": "wan-14b"}, {"dtype": "float32"}, {"shape": {"height": 48}}, {"sparsity": other}):
        with pytest.raises(ValueError, match="steps of 2 models, sizes, dtypes or sparsities: expected those of one"):
            by_schedule([*steps_of(dense=1.0), *({**step, **changed} for step in steps_of(dense=1.0))], 50)
    with pytest.raises(ValueError, match="steps of 0 models"):
        by_schedule([], 50)
    with pytest.raises(ValueError, match="but there are 30 steps"):
        by_schedule(
            steps_of(dense=1.0), 30, load_sparsity("flux", {"schedule_steps": None, "step_cache.skip_steps": [43]})
        )
    with pytest.raises(
        ValueError, match=r"^attention.top_keys=0.1: timed with 0.165; expected the sparsity of the timed"
    ):
        by_schedule(steps_of(dense=1.0), 50, load_sparsity(other))
    with pytest.raises(ValueError, match=r"^mlp=None: timed with some; expected the sparsity"):
        by_schedule(steps_of(dense=1.0), 50, dataclasses.replace(PRESETS["flux"], mlp=None))


def test_bench_schedule_reads_the_steps_that_were_timed(stepped, folder, capsys):
    assert main(["bench", "schedule", str(stepped), "--sparsity", "flux-step-cache", "-o", "b.jsonl"]) == 0
    dense, sparse, skipping = read(folder / "b.jsonl")
    assert (dense["benchmark"], dense["speedup"], skipping["counts"]["skipped"]) == ("sample", 1, 25)
    assert 0 < skipping["ms"] < sparse["ms"]
    assert "sparse, steps skipped, by its steps: 5 full" in capsys.readouterr().out


def test_a_wrong_step_has_no_time(folder, monkeypatch):
    from chipmunk_jax import delta

    zeros = lambda q, *_, **__: jnp.zeros_like(q)
    monkeypatch.setattr(delta, "column_attention", zeros)
    size = ["--layers", "2", "--width", "48"]  # of no other test: what is compiled here must serve none
    assert main(["bench", "step", *TINY, *size, "--sparsity.attention.first-n-dense-layers", "0"]) == 1
    assert [entry["ms"] is None for entry in read(folder / "a.jsonl")] == [False, False, False, True, True, False]


def test_bench_sample_times_dense_and_sparse_and_tells_what_a_gate_has_skipped(folder):
    gate = {"gate": "sea", "threshold": 1e9}  # skips step 2: those before it are full, and the last one runs
    (folder / "a.yaml").write_text(yaml.safe_dump({"preset": "flux", "schedule_steps": None, "step_cache": gate}))
    assert main(["bench", "sample", *TINY, "--steps", "4", "--sparsity", "a.yaml"]) == 0
    dense, sparse = read(folder / "a.jsonl")
    assert (dense["variant"], sparse["variant"], dense["speedup"], dense["rel_err"]) == ("dense", "sparse", 1, 0)
    for entry in (dense, sparse):
        assert entry.keys() == KEYS | {"density", "ms_per_step", "first_call_s"}
        assert entry["shape"] == {"height": 32, "width": 32, "batch": 1, "steps": 4, "text": 16}
        assert records.sparsity_of(entry) == load_sparsity("a.yaml") and entry["ms_per_step"] == entry["ms"] / 4
    assert all(0.5 < share <= 0.75 for share in sparse["density"].values())


NARROW = {  # for a CPU, on which all of the work of these is the products
    "hunyuan-tiny": dict(hidden_size=64, axes_dim=(8, 12, 12)),
    "wan-tiny": dict(dim=64, ffn_dim=128, num_layers=3),  # one more than its preset leaves dense
}


@pytest.mark.parametrize(("model", "frames"), [("hunyuan-tiny", 5), ("wan-tiny", 17)])  # more than Wan's neighbourhood
def test_videos_are_timed_with_their_preset_and_guidance(folder, monkeypatch, model, frames):
    variant = VARIANTS[model]
    config = dataclasses.replace(variant.config, **NARROW[model])
    monkeypatch.setitem(VARIANTS, model, dataclasses.replace(variant, config=config))
    given = [
        "--model",
        model,
        "--height",
        "64",
        "--width",
        "48",
        "--frames",
        str(frames),
        "--repeats",
        "1",
        "-o",
        "a.jsonl",
    ]
    given += ["--dtype", "float32"]
    assert main(["bench", "step", *given]) == 0
    entries = read(folder / "a.jsonl")
    assert [entry["variant"] for entry in entries] == [
        "dense",
        "full",
        "select",
        "delta",
        "skipped",
    ]  # no neurons are chosen
    preset = to_dict(PRESETS[VARIANTS[model].preset])
    for entry in entries:
        assert entry["shape"] | {"layers": 0} == dict(height=64, width=48, frames=frames, batch=1, layers=0, text=16)
        assert entry["sparsity"] == preset and entry["ms"] > 0
    (folder / "a.jsonl").unlink()
    assert main(["bench", "sample", *given, "--steps", "3", "--sparsity.attention.full-step-schedule", "0,1"]) == 0
    dense, sparse = read(folder / "a.jsonl")
    assert 0 < sparse["density"]["attention"] < 1 and dense["ms"] > 0


@pytest.mark.parametrize("name", VARIANTS)
def test_inputs_that_are_drawn_fit_the_model_and_are_as_its_shapes_say(name):
    variant = VARIANTS[name]
    settings = variant.complete()
    network, *shapes = variant.shapes(settings, 2, "bfloat16")
    inputs = jax.eval_shape(lambda: random_inputs(variant, settings, 2))
    described = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype.name), tree)
    assert described(inputs) == described(tuple(shapes))
    fewest, most = variant.config.text_rows  # the tiny ones take fewer than published models need
    if fewest <= variant.text_rows <= (most or variant.text_rows):
        network.check(
            *(jax.tree.map(lambda a: np.ones(a.shape, a.dtype), x) for x in variant.shapes(settings, 1, "bfloat16")[1:])
        )


@pytest.mark.parametrize(
    ("model", "given", "expected"),
    [
        ("flux-dev", (None, None, None), (48, 80)),
        ("hunyuan-video", (None, None, None), (33, 45, 80)),
        ("hunyuan-video", (320, 512, 1), (1, 20, 32)),
        ("wan-14b", (None, None, None), (21, 45, 80)),
        ("wan-1.3b", (None, 640, 5), (2, 30, 40)),
    ],
)
def test_sizes_that_are_not_given_are_the_usual_ones(model, given, expected):
    variant = VARIANTS[model]
    settings = variant.complete(**dict(zip(("height", "width", "frames"), given, strict=True)))
    assert variant.grid(settings) == expected
    names = ["height", "width", "frames"] if variant.video else ["height", "width"]
    assert list(variant.sizes(settings)) == names


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        ("flux-dev", (None, None, 5), "frames=5: expected none, as this model makes images"),
        ("wan-14b", (None, None, 80), "frames=80: expected a multiple of 4, and one"),
        ("wan-14b", (None, None, 0), "frames=0: expected"),
        ("wan-14b", (100, None, 81), "height=100: expected a positive multiple of 16"),
        ("hunyuan-video", (720, 0, None), "width=0: expected a positive multiple of 16"),
    ],
)
def test_sizes_that_no_token_divides_are_refused(model, given, message):
    settings = dict(zip(("height", "width", "frames"), given, strict=True))
    with pytest.raises(InputError, match=message):
        VARIANTS[model].grid(VARIANTS[model].complete(**settings))


@pytest.mark.parametrize(
    ("layers", "expected"), [(2, (1, 1)), (3, (1, 2)), (6, (2, 4)), (10, (3, 7)), (57, (19, 38)), (56, (19, 37))]
)
def test_a_shortened_model_keeps_the_proportion_of_its_stacks(layers, expected):
    config = shortened(VARIANTS["flux-dev"], layers).config
    assert (config.depth, config.depth_single_blocks) == expected


def entry(ms, **changes):
    base = dict(benchmark="mlp", variant="residual", shape={"M": 2, "K": 3}, sparsity=0.5, ms=ms, device="cpu")
    return base | changes


def test_compare_gives_old_over_new():
    new = [entry(2.0), entry(3.0, variant="activations"), entry(None, sparsity=0.7), entry(1.0, shape={"M": 4})]
    old = [
        entry(99.0),
        entry(5.0),  # the later of two counts
        entry(1.5, variant="activations", shape={"K": 3, "M": 2}),
        entry(1.0, sparsity=0.7),
        entry(1.0, shape={"M": 8}),
        entry(1.0, benchmark="topk"),  # nothing of topk was run now
    ]
    text = compare(new, old, "old.jsonl")
    lines = text.splitlines()
    assert [line.split()[-3:] for line in lines[1:3]] == [["5", "2", "2.500"], ["1.5", "3", "0.500"]]
    assert lines[3].endswith("no time          -")
    assert lines[4:] == ["not in old.jsonl: mlp residual M 4 50.0 %", "only in old.jsonl: mlp residual M 8 50.0 %"]


def test_compare_tells_when_the_devices_differ():
    text = compare([entry(2.0)], [entry(1.0, device="NVIDIA H100")], "old.jsonl")
    assert "the devices differ: NVIDIA H100 in old.jsonl, cpu here" in text
    assert compare([entry(1.0)], [entry(1.0, shape={})], "b").startswith("nothing here has a counterpart in b")
    text = compare([entry(1.0)], [entry(1.0, benchmark="sample", device="NVIDIA H100")], "b")
    assert text == "nothing here has a counterpart in b: sample there, mlp here"


def test_compare_reads_the_file_before_it_is_appended_to(folder, capsys):
    flags = ["bench", "kernels", "--size", "toy", "--only", "topk", *REPEATS, "-o", "a.jsonl"]
    assert main(flags) == 0
    old = [record["ms"] for record in read(folder / "a.jsonl")]
    assert main([*flags, "--compare", "a.jsonl"]) == 0
    new = [record["ms"] for record in read(folder / "a.jsonl")][len(old) :]
    lines = capsys.readouterr().out.splitlines()[-len(old) :]
    assert [line.split()[-1] for line in lines] == [f"{a / b:.3f}" for a, b in zip(old, new, strict=True)]


def test_committed_records_can_be_compared(folder):
    path = records.Path(__file__).parents[1] / "benchmarks/results/flux-dev-1280x768-h100.jsonl"
    old = records.read(path)
    assert compare(old, old, path.name).count("1.000") == 2


def test_a_table_of_kernels_sums_up_what_it_does_not_show():
    rows = [{"kernel": f"kernel_{n}", "calls": 2.0, "ms": 1.0} for n in range(30)]
    lines = kernel_table([*rows, {"kernel": "(between kernels)", "calls": None, "ms": 10.0}]).splitlines()
    assert lines[0].split() == ["kernel", "calls", "ms", "us", "a", "call", "share"]
    assert lines[1].split() == ["kernel_0", "2", "1.00", "500.0", "2.5%"]
    assert lines[-2].split() == ["(others)", "12", "6.00", "500.0", "15.0%"]
    assert lines[-1].split() == ["(between", "kernels)", "10.00", "25.0%"]


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_a_trace_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match="expected a GPU"):
        kernel_times(lambda: jnp.zeros(3))


@pytest.mark.gpu
def test_kernels_of_a_run_are_counted():
    x = jnp.ones((512, 512), jnp.bfloat16)
    kernels = kernel_times(lambda: x @ x)
    assert sum(k["calls"] or 0 for k in kernels) >= 1 and all(k["ms"] > 0 for k in kernels[:-1])


BAD = [
    (
        ["kernels", "--only", "mlp,atention"],
        ["no kernel 'atention'", "column_attention, dense_colsum, topk, mlp"],
    ),
    (["kernels", "--repeats", "0"], ["--repeats 0", "at least 1"]),
    (["kernels", "--compare", "none.jsonl"], ["none.jsonl", "no such file"]),
    (["kernels", "--compare", "bad.jsonl"], ["bad.jsonl", "line 2 is no record"]),
    (["kernels", "--compare", "empty.jsonl"], ["empty.jsonl", "holds no record"]),
    (["kernels", "-o", "none/a.jsonl"], ["none/a.jsonl", "no folder none"]),
    (["step", "--height", "50"], ["--height 50", "multiple of 16"]),
    (["step", "--layers", "1"], ["--layers 1", "expected 2 to 57"]),
    (["step", "--layers", "58"], ["--layers 58", "expected 2 to 57"]),
    (["step", "--kernels"], ["--kernels", "expected a GPU"]),
    (["step", "--batch", "0"], ["--batch 0", "at least 1"]),
    (["step", "--batch", "1000000"], ["no room on"]),
    (["sample", "--batch", "1000000"], ["no room on"]),
    (["kernels", "--only", "topk", "--plot", "a.png"], ["--only topk", "column_attention or mlp"]),
    (["step", "--sparsity", "fluks"], ["'fluks'", "one of flux"]),
    (["sample", "--width", "0"], ["--width 0", "positive multiple of 16"]),
    (["sample", "--steps", "0"], ["--steps 0", "at least 1"]),
    (
        ["sample", "--steps", "3", "--sparsity.mlp.full-step-schedule", "0,7", "--sparsity.schedule-steps", "null"],
        ["mlp.full_step_schedule", "step 7"],
    ),
    (["sample", "--steps", "1000000"], ["--steps 1000000", "at most 100000"]),
    (["sample", "--model", "wan-14b", "--frames", "80"], ["--frames 80", "multiple of 4, and one"]),
    (["sample", "--frames", "5"], ["--frames 5", "expected none, as this model makes images"]),
    (
        ["sample", "--model", "hunyuan-tiny", "--steps", "9", "--sparsity.schedule-steps", "null"],
        ["attention.full_step_schedule names step 40"],
    ),
    (["sample", "--model", "wan-tiny", "--height", "32"], ["local_voxels=3: expected at most 1"]),
    (["step", "--model", "wan-tiny", "--height", "32"], ["local_voxels=3: expected at most 1"]),
    (["step", "--sparsity", "wan-14b"], ["patch (4, 4, 8): expected 2 sides", "own preset, flux, fits"]),
    (["step", "--height", "-16"], ["--height -16", "positive multiple of 16"]),
    (["sample", "-o", "."], ["cannot be written"]),
    (["step", "-o", "bad.jsonl"], ["bad.jsonl", "line 2 is no record", "-o appends to a file of records"]),
    (["schedule", "good.jsonl"], ["good.jsonl: no record of `chipmunk bench step`"]),
    (["schedule", "good.jsonl", "-o", "bad.jsonl"], ["line 2 is no record"]),
    (["schedule", "quality.jsonl"], ["line 1 is a record of quality, without a time"]),
    (["kernels", "--compare", "quality.jsonl"], ["line 1 is a record of quality, without a time"]),
]


QUALITY = {"benchmark": "quality", "variant": "mini-flux", "median_psnr": 30.0}


@pytest.fixture
def no_work(monkeypatch):
    """Random weights and inputs are long work, too late for an error."""

    def never(*_, **__):
        raise AssertionError("something was drawn")

    for name in ("kernels.measure_ceilings", "steps.random_model", "samples.random_model", "steps.random_inputs"):
        monkeypatch.setattr(f"chipmunk_jax.bench.{name}", never)


@pytest.mark.parametrize(("flags", "words"), BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_bad_input_is_one_sentence_before_any_work(flags, words, folder, no_work, capsys):
    (folder / "bad.jsonl").write_text(json.dumps(entry(1.0)) + "\n{}\n")
    (folder / "empty.jsonl").write_text("")
    records.append("good.jsonl", [entry(1.0)])
    records.append("quality.jsonl", [QUALITY])
    assert main(["bench", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("chipmunk: ") and captured.err.count("\n") == 1
    assert all(word in captured.err for word in words), captured.err


def test_full_size_needs_a_gpu(no_work, capsys, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert main(["bench", "kernels", "--size", "full"]) == 2
    assert "--size full: expected a GPU, found cpu; use --size toy" in capsys.readouterr().err


def test_plot_without_matplotlib_is_one_sentence(folder, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "plot", "none.jsonl"]) == 2
    assert "matplotlib is not installed" in capsys.readouterr().err and not list(folder.iterdir())


def test_plot_draws_attention_and_mlp(folder, capsys):
    pytest.importorskip("matplotlib")
    timed = [entry(1.0, speedup=speedup, sparsity=s) for s, speedup in ((0.5, 1.8), (0.75, 3.0))]
    others = [entry(None, speedup=None), entry(1.0, benchmark="topk", speedup=2.0)]
    records.append("a.jsonl", timed + others)
    assert main(["bench", "plot", "a.jsonl", "-o", "a.png"]) == 0
    assert (folder / "a.png").read_bytes().startswith(b"\x89PNG")
    records.append("b.jsonl", [*others, QUALITY])
    assert main(["bench", "plot", "b.jsonl", "-o", "b.png"]) == 2
    error = capsys.readouterr().err
    assert "records of mlp, quality, topk: nothing to plot; expected some of column_attention or mlp" in error


def test_a_table_shows_long_times_in_seconds():
    rows = [entry(ms, ms_spread=400.0, error=None) for ms in (9_999.0, 1_037_000.0, None)]
    rows = [
        dict.fromkeys(("speedup", "rel_err", "tflops", "gbps", "of_matrix_ceiling", "of_copy_ceiling")) | r
        for r in rows
    ]
    lines = record_table(rows).splitlines()
    assert [line.split("50.0 %")[1].split() for line in lines[1:3]] == [["9999", "4e+02"], ["1037", "s", "0.4", "s"]]
    assert "1037 s" in compare(rows[1:2], rows[1:2], "b")

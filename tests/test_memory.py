"""The memory plan: exact where shapes tell, near what XLA makes of the rest, and obeyed before anything is compiled."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from chipmunk_jax import cache, memory, sample, sampling
from chipmunk_jax.bench.inputs import random_inputs, random_model
from chipmunk_jax.bench.steps import INPUTS
from chipmunk_jax.memory import DEVICES, NAMES, SMALLER, capacity, savings, shortage, summed, working_set
from chipmunk_jax.model import Stack
from chipmunk_jax.pipelines import VARIANTS
from chipmunk_jax.sparsity import load_sparsity

RESULTS = Path(__file__).parents[1] / "benchmarks/results"
RECORDS = json.loads((RESULTS / "memory-aot-h100.json").read_text())
TINY = {"flux-tiny": (16, 32), "hunyuan-tiny": (16, 32, 5), "wan-tiny": (32, 32, 17)}


def tiny(name, batch=1, sparsity="preset", steps=5):
    """A tiny model, the settings of a sample, its sparsity, and the plan of it."""
    variant = VARIANTS[name]
    settings = variant.complete(**dict(zip(("height", "width", "frames"), TINY[name], strict=False)), steps=steps)
    overrides = {"attention.group": 64, "attention.local_voxels": 0, "schedule_steps": None}
    sparsity = load_sparsity(variant.preset, overrides) if sparsity == "preset" else sparsity
    return variant, settings, sparsity, planned(variant, settings, batch, sparsity)


def planned(variant, settings, batch, sparsity, dtype="bfloat16", **options):
    """memory.plan() of a sample as it is usually guided."""
    usual = dict(steps=settings["steps"], guidance=variant.guidance, solver=variant.solver) | options
    return memory.plan(*variant.shapes(settings, batch, dtype), sparsity=sparsity, **usual)


def rows(variant, batch):
    """Entries of the batch that the network sees."""
    return batch if variant.guidance is None else 2 * batch


@pytest.mark.parametrize("name", TINY)
def test_bytes_of_arrays_are_exact(name, batch=3):
    variant, settings, sparsity, plan = tiny(name, batch)
    network = random_model(variant, jnp.bfloat16)
    noise, cond = random_inputs(variant, settings, rows(variant, batch))
    stacks = network.stacks(noise.shape[1], cond)
    arrays = cache.zeros(stacks, sparsity, rows(variant, batch), jnp.bfloat16)
    times = jnp.zeros((5, rows(variant, batch)))
    assert plan["weights"] == sum(a.nbytes for a in jax.tree.leaves(nnx.state(network)))
    assert plan["noise and conditions"] == noise[:batch].nbytes + sum(a.nbytes for a in cond.values())
    assert plan["modulations of all steps"] == sum(a.nbytes for a in jax.tree.leaves(network.modulations(times, cond)))
    assert sum(size for part, size in plan.items() if part.partition(".")[0] in stacks) == sum(
        a.nbytes for a in jax.tree.leaves(arrays)
    )


@pytest.mark.parametrize("name", TINY)
def test_the_parts_that_people_read_add_up_to_those_that_are_counted(name):
    plan = tiny(name)[-1]
    assert sum(summed(plan).values()) == sum(plan.values())
    assert not any("." in part for part in summed(plan))


def test_every_part_of_a_cache_has_a_name():
    sparsity = load_sparsity("flux", {"mlp.cache": "activations"})
    named = {part.partition(".")[2] for part in tiny("flux-tiny", sparsity=sparsity)[-1] if "." in part}
    assert named and all(any(part.startswith(path) for path in NAMES) for part in named)


def test_a_dense_plan_has_no_caches():
    plan = tiny("flux-tiny", sparsity=None)[-1]
    assert not any("." in part for part in plan) and "choosing" not in "".join(plan)


def test_both_sides_of_guidance_are_counted():
    """Wan's batch is twice that of its noise."""
    _, _, _, one = tiny("wan-tiny", 1)
    _, _, _, two = tiny("wan-tiny", 2)
    assert two["blocks.attention.residual"] == 2 * one["blocks.attention.residual"]
    assert one["noise and conditions"] * 2 == two["noise and conditions"]
    assert one["blocks.attention.residual"] == 4 * 2 * 5 * 8 * 8 * 2 * 128 * 2  # L, B, N = 5 x 8 x 8, H, d, bytes


@pytest.mark.parametrize("record", RECORDS["samples"], ids=lambda r: r["name"])
def test_predictions_are_within_a_tenth_of_what_xla_assigns(record):
    variant = VARIANTS[record["model"]]
    settings = variant.complete(**{name: record.get(name) for name in ("height", "width", "frames", "steps")})
    sparsity = record["sparsity"] and load_sparsity(record["sparsity"])
    plan = planned(variant, settings, record["batch"], sparsity, record["dtype"], implementation="pallas")
    assert sum(plan.values()) == pytest.approx(record["compiled"]["peak"], rel=0.1)
    caches = sum(size for part, size in plan.items() if "." in part)
    assert plan["weights"] + caches <= record["compiled"]["arguments"] <= 1.01 * (plan["weights"] + caches)
    # Apart: in a peak of weights and caches an error of the working set would hide.
    temporary = sum(plan.values()) - plan["weights"] - plan["noise and conditions"] - caches
    assert temporary == pytest.approx(record["compiled"]["temporaries"], rel=0.25)


def test_the_records_are_of_every_model_and_add_up():
    assert {record["model"] for record in RECORDS["samples"]} >= {"flux-dev", "hunyuan-video", "wan-14b", "wan-1.3b"}
    for record in RECORDS["samples"]:
        c = record["compiled"]
        assert c["peak"] == c["arguments"] + c["outputs"] + c["temporaries"] - c["aliased"]
        assert sum(record["predicted"].values()) == pytest.approx(c["peak"], rel=0.1)


FILES = [path.name for pattern in ("flux", "hunyuan", "wan") for path in RESULTS.glob(f"{pattern}*.jsonl")]
MEASURED = sorted(name for name in FILES if "-pipeline-" not in name)  # those hold stages


@pytest.mark.parametrize("name", MEASURED)
def test_predictions_are_within_a_tenth_of_the_measured_peak(name):
    """The most that one GPU had in use while whole samples, or a step of each kind, were timed."""
    *_, record = map(json.loads, (RESULTS / name).read_text().splitlines())
    variant, shape = VARIANTS[record["model"]], record["shape"]
    settings = variant.complete(**{name: shape.get(name) for name in ("height", "width", "frames")})
    options = dict(steps=shape.get("steps", INPUTS), implementation="pallas")
    plan = planned(variant, settings, shape["batch"], load_sparsity(record["sparsity"]), record["dtype"], **options)
    assert sum(plan.values()) == pytest.approx(record["peak_bytes"], rel=0.1)


@pytest.mark.parametrize("name", TINY)
def test_a_longer_sequence_never_takes_less(name):
    variant, settings, sparsity, _ = tiny(name)
    plan = lambda height: planned(variant, settings | {"height": height}, 1, sparsity)
    totals = [sum(plan(height).values()) for height in range(16, 129, 16)]
    assert totals == sorted(totals) and totals[0] < totals[-1]


def test_sample_refuses_what_the_plan_says_and_no_less(monkeypatch):
    variant, settings, sparsity, plan = tiny("flux-tiny")
    network = random_model(variant, jnp.bfloat16)
    noise, cond = random_inputs(variant, settings, 1)
    need = sum(size for part, size in plan.items() if part not in memory.PLACED)
    options = dict(timesteps=variant.timesteps(settings), grid=variant.grid(settings), sparsity=sparsity)

    def compiled(*_, **__):
        raise InterruptedError

    monkeypatch.setattr(sampling, "finished", compiled)
    monkeypatch.setattr(memory, "free_bytes", lambda: need)
    with pytest.raises(InterruptedError):
        sample(network, noise, cond, **options)
    monkeypatch.setattr(memory, "free_bytes", lambda: need - 1)
    with pytest.raises(ValueError, match=r"no room on .*; use .*a smaller batch or a smaller size$"):
        sample(network, noise, cond, **options)


def test_the_largest_part_is_named_and_the_setting_that_makes_it_smaller():
    parts = {"weights": 3, "double.mlp.activations": 2, "single.mlp.activations": 2, "double.mlp.out": 1}
    assert shortage(parts, 8, "h100") is None
    error = shortage(parts, 7, "h100")
    assert "no room on h100" in error and "MLP activations" in error


@pytest.mark.parametrize(("end", "setting"), SMALLER.items())
def test_a_setting_that_saves_makes_its_part_smaller_and_is_not_proposed_again(end, setting):
    name, value = setting
    before = tiny("flux-tiny", sparsity=load_sparsity("flux"))[-1]
    after = tiny("flux-tiny", sparsity=load_sparsity("flux", {name: value}))[-1]
    part = lambda plan: sum(size for path, size in plan.items() if f".{end}" in path)
    assert part(after) < part(before) and sum(after.values()) < sum(before.values())
    assert setting in savings(before) and setting not in savings(after)


def test_a_setting_is_proposed_only_where_with_it_there_is_room(monkeypatch):
    """One that is not enough stays beside the next, and none is named where all of them are not enough."""
    sparsity = load_sparsity("flux", {"mlp.cache": "activations"})
    plan = lambda sparsity: tiny("flux-tiny", sparsity=sparsity)[-1]
    variant, settings, *_ = tiny("flux-tiny")
    shapes = variant.shapes(settings, 1, "bfloat16")
    check = lambda sparsity: memory.check_room(*shapes, placed=False, steps=5, sparsity=sparsity)
    settings = savings(plan(sparsity))
    needs = [sum(plan(load_sparsity(sparsity, dict(settings[:n]))).values()) for n in range(3)]
    assert len(settings) == 2 and needs == sorted(needs, reverse=True)
    one, other = (re.escape(f"{name}={value!r}") for name, value in settings)
    expected = {needs[0] - 1: f"{one}, ", needs[1]: f"{one}, ", needs[1] - 1: f"{one} and {other}, ", needs[2] - 1: ""}
    for free, words in expected.items():
        monkeypatch.setattr(memory, "free_bytes", lambda free=free: free)
        with pytest.raises(ValueError, match=f"; use {words}a smaller batch or a smaller size$"):
            check(sparsity)
    monkeypatch.setattr(memory, "free_bytes", lambda: needs[0])
    check(sparsity)
    monkeypatch.setattr(memory, "free_bytes", lambda: plan(sparsity)["weights"] - 1)
    with pytest.raises(ValueError, match=r"; use a larger device$"):
        check(sparsity)


def test_choosing_keys_counts_its_sums_and_lists():
    stack = Stack(layers=9, tokens=1000, heads=2, head_dim=16, mlp_tokens=1000, width=32, mlp_width=128)
    sparsity = load_sparsity("flux", {"attention.group": 128, "attention.top_keys": 0.128})
    phases = working_set(stack, sparsity, 3, jnp.bfloat16)
    lists = 3 * 2 * 8  # B, H, G = 1000 / 128
    assert phases["choosing keys"] == 2 * lists * 1000 + 4 * lists * 128 + 5 * (2 * 3 * 1000 * 32)
    assert "choosing keys" not in working_set(stack, None, 3, jnp.bfloat16)


@pytest.mark.parametrize("given", ["0", "-0.5", "1.5", "75%", "nan", ""])
def test_a_share_of_the_device_that_is_no_fraction_is_refused(monkeypatch, given):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", given)
    with pytest.raises(ValueError, match=f"MEM_FRACTION={given}: expected a fraction above 0 and up to 1"):
        memory.share()


def test_a_device_is_a_name_or_gib():
    assert capacity("H100") == DEVICES["h100"] and capacity("80") == 80 * 2**30 and capacity("1.5") == 3 * 2**29
    for bad in ("a100x", "0", "-3", "nan", "inf", ""):
        with pytest.raises(ValueError, match=r"--device .*expected h100, h200 or a number of GiB"):
            capacity(bad)

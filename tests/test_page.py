"""The page of a report, of small numbers: whole, true to its numbers, and nothing in it that a prompt has written."""

import re

import numpy as np
import pytest
from html_page import assert_whole, elements

from chipmunk_jax.report import charts
from chipmunk_jax.report.page import page
from chipmunk_jax.report.pictures import pictures_of
from chipmunk_jax.report.steps import by_layer

STAGES = {name: {"seconds": 1.5, "peak_bytes": 2 * 10**9} for name in ("text", "transformer", "decoder")}
KINDS = ["full", "select", "delta", "skipped", "delta"]


def way(method, executed, levels):
    return dict(
        method=method, steps=5, skipped_steps=0.0, executed=executed, density={}, psnr=levels, seconds=4 * executed,
        median_psnr=float(np.median(levels)), ssim=[0.9, 0.8], stages=STAGES,
    )  # fmt: skip


def report(levels=(30.0, 34.0), floor=None, rivals=True, **changed):
    ways = {"dense": way("dense", 1.0, [100.0, 100.0]), "sparse": way("sparse deltas", 0.4, list(levels))}
    if rivals:
        ways["2 of 5 steps"] = way("fewer steps", 0.4, [31.0, 35.0])
        ways["3 of 5 skipped alone"] = way("skipped steps", 0.4, [30.5, 31.0])
    runs = [{"layers": [1, 2], "shares": [1.0] * 5}, {"layers": [3, 3], "shares": [1.0, 1.0, 0.25, 0.0, 0.25]}]
    return dict(
        model="mini", prompts=["<b>one</b> & \"two\"", "three"], seeds=[7, 8], height=16, width=20, steps=5, seed=7,
        dtype="float32", device="cpu", version="1", sparsity={"attention": {"top_keys": 0.1}, "mlp": None},
        density={"attention": 0.6, "mlp": 1.0}, executed=0.4,
        dense_seconds=4.0, sparse_seconds=1.6, median_psnr=float(np.median(levels)), ways=ways,
        rivals=[one | {"name": name} for name, one in list(ways.items())[2:]], drift=[[0.0, 0.1, 0.2, 0.1, 0.05]] * 2,
        steps_of={"kinds": KINDS, "attention": runs, "mlp": runs[:1]}, machine={"commit": "abc", "peak_bytes": 3 * 10**9},
        noise_floor=floor or {"dtypes": ["float32", "bfloat16"], "psnr": 45.0},
    ) | changed  # fmt: skip


def drawn(given, shape=(2, 16, 20, 3), fps=None):
    rng = np.random.default_rng(0)
    pictures = pictures_of({name: rng.random(shape, np.float32) for name in given["ways"]}, fps)
    return page(given, pictures).replace("\N{NO-BREAK SPACE}", " ")


def test_a_page_is_whole_and_says_what_its_numbers_say():
    text = drawn(report())
    assert_whole(text)
    assert sum(tag == "img" for tag, _ in elements(text)) == 2 * 5
    assert "&lt;b&gt;one&lt;/b&gt; &amp; &quot;two&quot;" in text and "<b>one" not in text
    for said in (
        "32.0 dB",
        "40.0 %",
        "2.50 x",
        "seeds 7 to 8",
        "bfloat16 in place of float32: 45.0 dB",
        "top_keys: 0.1",
    ):
        assert said in text, said


def test_clips_are_animations_and_rows_of_frames():
    text = drawn(report(frames=3), shape=(2, 3, 16, 20, 3), fps=8)
    assert_whole(text)
    assert sum(tag == "img" for tag, _ in elements(text)) == 2 * 5 * (1 + 3)
    assert "2 videos of 3 frames" in text


def test_a_rival_that_comes_nearer_is_told_first():
    text = drawn(report())
    assert "A rival at the same cost comes nearer</b>, 2 of 5 steps, by 1.0 dB" in text
    ahead = drawn(report(levels=(40.0, 41.0)))
    assert "No rival at the same cost comes nearer" in ahead and "comes nearer</b>," not in ahead
    alone = drawn(report(rivals=False))
    assert_whole(alone)
    assert "No rivals were sampled" in alone
    assert "the rivals are the dense sample itself" in drawn(report(rivals=False, executed=0.95))


def test_samples_that_equal_the_dense_ones_and_an_unknown_floor_are_told_in_words():
    text = drawn(report(levels=(100.0, 100.0), floor={"dtypes": ["a", "b"], "psnr": None, "error": "no room"}))
    assert_whole(text)
    assert "not measured: no room" in text and "100.0 dB" not in text and ">equal<" in text


@pytest.mark.parametrize("cost", [0.0, 0.4, 1.0])
def test_points_stand_at_their_cost_the_better_the_higher_and_no_label_on_another(cost):
    points = [charts.Point(f"n{i}", cost, [level], "ours") for i, level in enumerate((30.0, 30.1, 30.2, 60.0))]
    text = charts.frontier(points, 100.0)
    circles = [attributes for tag, attributes in elements(text) if tag == "circle" and attributes["class"] == "ours"]
    assert [float(one["cx"].rstrip("%")) for one in circles] == [100 * cost] * 4
    heights = [float(one["cy"].rstrip("%")) for one in circles]
    assert heights == sorted(heights, reverse=True) and min(heights) > 0 and max(heights) < 100
    labels = sorted(
        float(attributes["y"]) for tag, attributes in elements(text) if tag == "text" and "ours" in attributes["class"]
    )
    assert min(np.diff(labels)) >= charts.LABEL and max(labels) < charts.HEIGHT


def test_strips_have_a_cell_for_each_step():
    assert charts.kinds_strip(KINDS).count("<i ") == 5
    assert re.findall(r"delta: (\d)", charts.kinds_legend(KINDS)) == ["2"]
    (name, cells), *_ = charts.heat_rows(report()["steps_of"]["attention"])[1:]
    assert name == "layer 3" and re.findall(r"opacity:([\d.]+)", cells) == ["1.000", "1.000", "0.250", "0.000", "0.250"]


def test_drift_is_drawn_from_the_first_step_to_the_last():
    lines = re.findall(r'points="([^"]+)"', charts.drift([[0.0, 0.5, 1.0], [0.0, 0.5, 0.0]]))
    points = [[tuple(map(float, point.split(","))) for point in line.split()] for line in lines]
    assert [x for x, _ in points[0]] == [0.5, 1.5, 2.5] and points[0][0][1] == 100
    assert points[0][2][1] < points[2][2][1] < points[1][2][1]  # the mean of both, between them


def test_drift_of_nothing_is_a_line_at_zero():
    assert_whole("<!DOCTYPE html>" + charts.drift([[0.0, 0.0]]))


def test_layers_that_are_alike_are_told_together():
    shares = np.array([[1, 1, 0.5, 0.5, 1], [1, 1, 1, 1, 1]])
    assert [run["layers"] for run in by_layer(shares)] == [[1, 2], [3, 4], [5, 5]]
    assert by_layer(shares)[1]["shares"] == [0.5, 1.0]

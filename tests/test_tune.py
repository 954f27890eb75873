"""The tuner: what it decides for, nothing that it measured beats; and its file is one that --sparsity reads."""

import math
import zlib
from dataclasses import replace

import numpy as np
import pytest

from chipmunk_jax import load_sparsity
from chipmunk_jax.cli import sample
from chipmunk_jax.cli.main import main
from chipmunk_jax.pipelines import Pipeline
from chipmunk_jax.report import space
from chipmunk_jax.report.configurations import Configuration
from chipmunk_jax.report.space import Candidate, Family, Space
from chipmunk_jax.report.trials import Trials
from chipmunk_jax.report.tune import Goal, Point, Search, decide
from chipmunk_jax.schedule import Taken
from chipmunk_jax.sparsity import PRESETS

STEPS, SHARES = 20, (None, 0.1, 0.2, 0.4)


class Ways:
    """A line of families: two rivals, and compositions that differ by their share of keys; a delta step costs that share."""

    steps = STEPS

    def rivals(self):
        return [Family(steps=None), Family(steps=STEPS)]

    def gated(self, rival):
        return []

    def seeds(self, rival):
        return [replace(rival, keys=0.4)]

    def moves(self, family):
        place = SHARES.index(family.keys)
        return [replace(family, keys=SHARES[i]) for i in (place - 1, place + 1) if 0 < i < len(SHARES)]

    def at(self, family, budget):
        run = min(STEPS - 1, int(budget * STEPS / (family.keys or 1) + 1e-6))
        cost = run * (family.keys or 1) / STEPS
        name = f"{family} {run}"
        given = dict(name=name, family=family, cost=cost, rival=not family.keys)
        return Candidate(configuration=Configuration(sparsity=None), **given) if run else None


def drawn(*parts):
    """A number from 0 to 1 that looks like chance, the same for the same parts."""
    return zlib.crc32(repr(parts).encode()) / 2**32


def by_chance(seed, spread=10.0):
    """A judge whose levels rise with the cost, and with what chance gives to each family and prompt."""

    def judge(one, prompt):
        lucky = spread * drawn(seed, one.family) + 3 * drawn(seed, prompt) + 2 * drawn(seed, one.name, prompt)
        return 20 + 30 * one.cost + lucky, one.cost

    return judge


def search(judge, prompts=5, **options):
    return Search(Ways(), judge, prompts=prompts, **options)


GOALS = [Goal(budget=0.2), Goal(budget=0.35), Goal(target=32.0), Goal(target=40.0)]


@pytest.mark.parametrize("goal", GOALS, ids=str)
def test_no_rival_of_its_cost_beats_what_is_returned(goal):
    kinds = set()
    for seed in range(18):
        found = search(by_chance(seed)).run(goal)
        best, rivals = found.best, [point for point in found.points if point.candidate.rival]
        kinds.add(best.candidate.rival)
        assert found.finished and len(best.levels) == found.prompts == 5
        if goal.budget:
            assert best.cost <= goal.budget
        else:
            assert np.mean(best.levels) >= goal.target
        for rival in rivals:
            if best.candidate.rival:
                same = len(rival.levels) == 5 and (rival.cost <= best.cost)
                assert not same or np.mean(rival.levels) <= np.mean(best.levels)
            elif rival.cost <= best.cost + 0.5 / STEPS:
                differences = np.subtract(best.levels[: len(rival.levels)], rival.levels)
                many = len(differences) > 1
                assert differences.mean() > (differences.std(ddof=1) / math.sqrt(len(differences)) if many else 0)
        for family in {point.candidate.family for point in rivals}:
            of = [p for p in rivals if p.candidate.family == family and p.cost <= best.cost + 0.5 / STEPS]
            if of and not best.candidate.rival:  # the nearest in cost has met as many prompts
                assert len(max(of, key=lambda point: point.cost).levels) == 5
    assert kinds == {True, False}  # chance favours now these, now those


def test_rivals_of_its_cost_were_measured_for_every_composition_that_is_returned():
    for seed in range(20):
        found = search(by_chance(seed)).run(GOALS[1])
        if not found.best.candidate.rival:
            costs = [p.cost for p in found.points if p.candidate.rival and len(p.levels) == 5]
            assert any(abs(cost - found.best.cost) <= 0.5 / STEPS for cost in costs)


def test_compositions_that_are_level_with_a_rival_are_not_returned():
    level = lambda one, prompt: (20 + 30 * one.cost + 4 * drawn(one.name, prompt), one.cost)
    assert search(level).run(Goal(budget=0.5)).best.candidate.rival
    worse = lambda one, prompt: (30 * one.cost - 5 * (not one.rival), one.cost)
    assert search(worse).run(Goal(budget=0.5)).best.candidate.rival


def test_a_composition_that_is_better_is_returned():
    better = lambda one, prompt: (30 * one.cost + 5 * (one.family.keys == 0.2) + drawn(one.name, prompt), one.cost)
    for goal in (Goal(budget=0.15), Goal(target=9.5)):
        best = search(better).run(goal).best
        assert best.candidate.family.keys == 0.2 and best.cost <= 0.17  # a rival of 9.5 dB costs 0.3


class Gated(Ways):
    """With skipped steps of a gate that decides: what a way of it costs is known when it was measured."""

    def gated(self, rival):
        return [replace(rival, gate="easy")]


@pytest.mark.parametrize("budget", [0.2, 0.35, 0.6])
def test_a_gate_that_decides_is_searched_by_the_costs_that_it_has(budget):
    def judge(one, prompt):
        deciding = one.rival and one.family.gate == "easy"
        cost = one.cost**2 + 0.004 * drawn(one.name, prompt) if deciding else one.cost
        return 20 + 30 * cost + 3 * deciding + 20 * (one.family.keys == 0.2) + drawn(one.name, prompt), cost

    found = Search(Gated(), judge, prompts=3).run(Goal(budget=budget))
    gated = [point for point in found.points if point.candidate.family.gate == "easy"]
    assert any(budget - 1 / STEPS < point.cost <= budget for point in gated)
    assert found.best.candidate.family.keys == 0.2 and found.best.cost <= budget
    faced = [point for point in gated if point.candidate.rival and point.cost <= found.best.cost + 0.5 / STEPS]
    nearest = max(faced, key=lambda point: point.cost)
    assert len(nearest.levels) == 3 and nearest.cost > found.best.cost - 0.5 / STEPS


def test_rivals_that_exceed_the_budget_on_more_prompts_do_not_lead():
    def judge(one, prompt):
        deciding = one.rival and one.family.gate == "easy"
        return 20 + 30 * one.cost + 3 * deciding + drawn(one.name, prompt), one.cost + 0.1 * (deciding and prompt > 0)

    searched = Search(Gated(), judge, prompts=3)
    found = searched.run(Goal(budget=0.35))
    assert found.best.cost <= 0.35 and all(family.gate == "share" for family in searched.strongest)
    assert len(searched.strongest) == 2


def test_a_larger_budget_never_gives_less():
    for seed in range(8):
        judge = search(by_chance(seed))
        for budget in (0.2, 0.4, 0.6, 0.8):
            judge._to_budget(budget)
        may = [point for point in judge.points.values() if judge.admissible(point, 5)]
        levels = [decide(may, Goal(budget=share), 5) for share in np.linspace(0.05, 1, 30)]
        levels = [np.mean(point.levels) for point in levels if point]
        assert levels == sorted(levels)


def test_a_lower_target_never_costs_more():
    for seed in range(8):
        costs = [search(by_chance(seed, spread=0)).run(Goal(target=target)).best.cost for target in (30.0, 35.0, 40.0)]
        assert costs == sorted(costs)


def test_the_budget_holds_for_measured_costs_that_planned_ones_fall_short_of():
    for seed in range(20):
        judge = by_chance(seed)
        dearer = lambda one, prompt, judge=judge: (judge(one, prompt)[0], one.cost * (1 if one.rival else 1.3))
        best = search(dearer).run(Goal(budget=0.5)).best
        assert best.cost <= 0.5


@pytest.mark.parametrize("seconds", [0, 5, 95, 150])
def test_the_time_is_kept_and_what_was_measured_by_then_decides(seconds):
    now = [100.0]

    def judge(one, prompt):
        now[0] += 10
        return by_chance(3)(one, prompt)

    whole = search(by_chance(3)).run(GOALS[1])
    found = search(judge, seconds=seconds, clock=lambda: now[0]).run(GOALS[1])
    assert now[0] - 100 <= max(10, seconds) and not found.finished  # the first sample's time is not known before
    names = [point.candidate.name for point in found.points]
    assert names == [point.candidate.name for point in whole.points][: len(names)]
    assert sum(len(point.levels) for point in found.points) == max(1, seconds // 10)
    assert found.best is not None and len(found.best.levels) >= found.prompts > 0


def test_an_unreachable_target_is_not_reached():
    found = search(by_chance(0)).run(Goal(target=90.0))
    assert found.best is None and found.points


def test_the_same_judge_gives_the_same_search():
    one, other = (search(by_chance(7)).run(GOALS[1]) for _ in range(2))
    assert one == other


def test_standard_errors_are_of_paired_differences():
    point = lambda *levels: Point(candidate=Ways().at(Family(steps=None), 0.5), levels=list(levels))
    change, error = point(1, 20, 33).over(point(0, 18, 30))
    assert (change, error) == pytest.approx((2, 1 / math.sqrt(3)))
    assert point(5, 6).beats(point(4, 5, 90)) and point(5).beats(point(1, 9))
    assert not point(5, 6).beats(point(4)) and not point(5, 6).beats(point())  # which have met fewer prompts


@pytest.fixture(scope="module")
def real(checkpoint):
    pipeline = Pipeline.from_pretrained(checkpoint)
    settings = pipeline.variant.complete(height=64, width=64, steps=12)
    return Space(pipeline.variant, settings, PRESETS["mini-flux"])


def test_ways_of_the_space_are_within_the_budget_and_one_step_more_is_not(real):
    rivals = real.rivals()
    families = [*rivals, *real.gated(rivals[1]), *real.seeds(rivals[1])]
    families += [move for family in real.seeds(rivals[1]) for move in real.moves(family)]
    assert len(set(families)) > 20
    for family in dict.fromkeys(families):
        one = real.at(family, 0.55)
        if one:
            planned, sparsity = real.at(replace(family, gate="share"), 0.55), one.configuration.sparsity
            assert one.cost <= 0.55 and one.cost == planned.cost == real.cost(planned.configuration)
            if family.gate != "share" and sparsity.step_cache:  # what it costs is known by what it skips
                assert (sparsity.step_cache.gate, sparsity.step_cache.threshold > 0) == (family.gate, True)
                assert real.cost(one.configuration, Taken(skipped=range(2, 8))) < real.cost(one.configuration, Taken())
            assert not (sparsity and sparsity.attention) or sparsity.attention.share_sides
            assert one.rival == (not family.sparse and family.drift is None and family.steps in (None, 12))
            assert (family.keys is not None) == bool(sparsity and sparsity.attention)
    fewer, skipping = (real.at(family, 0.55) for family in rivals[:2])
    assert fewer.cost == skipping.cost == 0.5 and fewer.configuration.steps == 6


def test_moves_change_one_choice_and_those_that_do_not_matter_make_no_family(real):
    start = Family(steps=12, keys=0.2, means=64)
    for move in real.moves(start):
        assert sum(getattr(move, name) != getattr(start, name) for name in vars(start)) == 1 or not move.sparse
    assert len({move.plain() for move in real.moves(start)}) == len(real.moves(start))


def test_the_drift_guard_is_a_choice_of_compositions_and_returned_where_it_is_the_best(real):
    """It costs more than is planned, of which its samples tell. No other way has the guard of the model's preset."""
    gain = {None: 0.0, 0.08: 6.0, 0.05: 9.0, 0.03: 2.0}

    def judge(one, prompt):
        sparsity, drift = one.configuration.sparsity, one.family.drift
        assert (sparsity and sparsity.max_drift) == drift and (drift is None or not one.rival)
        return 20 + 30 * one.cost + gain[drift] + drawn(one.name, prompt), one.cost * (1 + 0.25 * bool(drift))

    assert real.base.max_drift == 0.05
    unguarded = Space(real.variant, real.settings, replace(real.base, max_drift=None))
    for ways in (real, unguarded):
        best = Search(ways, judge, prompts=2).run(Goal(budget=0.5)).best
        assert best.candidate.family.drift == 0.05 and best.cost <= 0.5 and "drift up to 0.05" in best.candidate.name
    assert real.at(replace(best.candidate.family, drift=None), 0.5).cost == real.at(best.candidate.family, 0.5).cost


def test_a_sample_of_a_gate_that_decides_costs_what_it_did_not_skip(checkpoint):
    pipeline, settings = Pipeline.from_pretrained(checkpoint), dict(height=20, width=12)
    small = Space(pipeline.variant, pipeline.variant.complete(**settings, steps=8), PRESETS["mini-flux"])
    given = settings | dict(num_inference_steps=8)
    trials = Trials(pipeline, ["red striped heart on meadow"], given, small)
    one = small.at(Family(steps=8, gate="sea"), 0.3)
    out, _ = trials.sampler.time(one.configuration, 0)  # the program that it runs below
    assert (skipped := out.skipped_steps) and trials(one, 0)[1] == pytest.approx(1 - len(skipped) / 8)


SMALL = ["--height", "12", "--width", "16", "--steps", "3", "--prompts", "2"]


def test_the_file_holds_what_was_measured_and_its_command_samples_so(checkpoint, folder, capsys, monkeypatch):
    monkeypatch.setattr(space, "PREDICTIONS", space.PREDICTIONS[:1])
    monkeypatch.setattr(space, "GATES", space.GATES[:1])
    monkeypatch.setattr(Space, "seeds", lambda self, rival: [Family(steps=3, neurons=0.5)])
    monkeypatch.setattr(Space, "moves", lambda self, family: [])
    assert main(["tune", str(checkpoint), *SMALL, "--budget", "0.95"]) == 0
    out = capsys.readouterr().out
    assert [file.name for file in folder.iterdir()] == ["tuned.yaml"]
    text = (folder / "tuned.yaml").read_text()
    sparsity = load_sparsity("tuned.yaml")
    *_, command = out.splitlines()
    assert command.startswith(f"chipmunk sample {checkpoint} --prompt .. --height 12 --width 16 --steps ")
    assert command.endswith(" --sparsity tuned.yaml") and f"# {command}" in text
    assert "by count" in text and "<- best" in out
    for way in (
        "2 of 3 steps  (rival)",
        "3 steps, 1 skipped (hidden, order 1)",
        "3 steps, 50 % of the neurons, full every 5",
    ):
        assert way in out
    args = sample.parse(command.split()[2:])
    best = next(line for line in text.splitlines() if "<- best" in line)
    assert f"{args.steps} of 3 steps" in best or args.steps == 3
    assert ("of the neurons" in best) == bool(sparsity.mlp) and ("skipped" in best) == bool(sparsity.step_cache)
    assert main(["tune", str(checkpoint), *SMALL, "--target-psnr", "99", "-o", "a.yaml"]) == 2
    captured = capsys.readouterr()
    assert "--target-psnr 99.0: not reached by" in captured.err and "the nearest is" in captured.err
    assert "(rival)" in captured.out and not (folder / "a.yaml").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--budget", "0"], ["--budget 0.0", "above 0 and below 1"]),
        (["--budget", "1.5"], ["--budget 1.5", "above 0 and below 1"]),
        (["--budget", "nan"], ["--budget nan", "above 0 and below 1"]),
        (["--budget", "0.1"], ["--budget 0.1", "at least 0.333", "one of 3 steps"]),
        (["--target-psnr", "-3"], ["--target-psnr -3.0", "dB above 0"]),
        (["--budget", "0.5", "--steps", "1"], ["--steps 1", "at least 2"]),
        (["--budget", "0.5", "--minutes", "0"], ["--minutes 0.0", "above 0"]),
        (["--budget", "0.5", "--prompts", "0"], ["--prompts 0", "at least 1"]),
        (["--budget", "0.5", "--prompts", "none.txt"], ["--prompts none.txt: no such file"]),
        (["--budget", "0.5", "--cost-of", "none.jsonl"], ["none.jsonl: no such file"]),
        (["--budget", "0.5", "-o", "tuned.txt"], ["tuned.txt", ".yaml"]),
        (["--budget", "0.5", "-o", "none/a.yaml"], ["none/a.yaml: no folder none"]),
    ],
)
def test_bad_input_is_one_sentence_before_a_model_is_loaded(checkpoint, flags, words, folder, monkeypatch, capsys):
    monkeypatch.setattr("chipmunk_jax.pipelines.base.load", lambda *_: pytest.fail("a model was loaded"))
    assert main(["tune", str(checkpoint), *SMALL, *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("chipmunk: ") and captured.err.count("\n") == 1
    assert all(word in captured.err for word in words), captured.err
    assert not list(folder.iterdir())

"""The search for the best way to sample at a cost, or the cheapest of a quality, by measurements alone.

Nothing here samples: a judge says how near a sample comes to the dense one, and what it costs. A composition is returned only where
it beats fewer steps and skipped steps alone at its own cost, on the same prompts.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from chipmunk_jax.report.space import Candidate, Family

SHRINK = 0.75  # of the best cost so far, where the search for a cheaper one of a quality begins
FAIR = 2  # prompts that every rival meets before it may fall behind: one may be unlike the others
FINE = 0.01  # of the dense cost: less is not worth another round of that search

Judge = Callable[
    [Candidate, int], tuple[float, float]
]  # a way and the number of a prompt -> dB to the dense sample, cost
Told = Callable[[Candidate, int], None]  # hears which way is measured next, on which prompt


class Ways(Protocol):
    """What is searched; see report.space.Space."""

    steps: int

    def rivals(self) -> list[Family]:
        """Families that compositions have to beat: fewer steps, and ways of skipping them."""

    def gated(self, rival: Family) -> list[Family]:
        """More of them: the best way of skipping at steps that a gate decides for."""

    def seeds(self, rival: Family) -> list[Family]:
        """Compositions to begin with, by the best rival."""

    def moves(self, family: Family) -> list[Family]:
        """Compositions near one."""

    def at(self, family: Family, budget: float) -> Candidate | None:
        """The way of a family that costs the most as it is planned, up to a budget."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """One of both: the best within a budget, a share of the dense cost, or the cheapest that reaches a mean PSNR, dB."""

    budget: float | None = None
    target: float | None = None


@dataclass(kw_only=True)
class Point:
    """A way to sample, and what was measured of it: an entry a prompt, in their order."""

    candidate: Candidate
    levels: list[float] = field(default_factory=list)  # dB
    costs: list[float] = field(default_factory=list)  # shares of the dense sample's

    @property
    def cost(self) -> float:
        """Share of the dense sample's cost: the median of those measured, before there are some the planned one."""
        return float(np.median(self.costs)) if self.costs else self.candidate.cost

    def mean(self, prompts: int) -> float:
        """Mean PSNR over the first prompts, so many, dB."""
        return float(np.mean(self.levels[:prompts]))

    def over(self, other: "Point") -> tuple[float, float]:
        """Mean paired difference to another point, dB, over the prompts of both, and its standard error, infinite of one prompt."""
        differences = [one - two for one, two in zip(self.levels, other.levels, strict=False)]
        error = float(np.std(differences, ddof=1)) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
        return float(np.mean(differences)) if differences else 0.0, error

    def leads(self, other: "Point") -> bool:
        """Whether it comes nearer by more than the standard error over the prompts of both; on one prompt, at all."""
        difference, error = self.over(other)
        return difference > (0.0 if math.isinf(error) else error)

    def beats(self, other: "Point") -> bool:
        """Whether it leads another point that has met as many prompts."""
        return len(other.levels) >= len(self.levels) and self.leads(other)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search measured, and which point it decided for."""

    points: list[Point]
    best: Point | None  # None: none reached the target, or nothing was measured in time
    prompts: int  # that the decision is over
    finished: bool  # whether the search came to its end before its time did


class OutOfTime(Exception):
    """The time is over."""


class Search:
    """A search as it goes on: points by name, and the time that is left."""

    def __init__(
        self,
        ways: Ways,
        judge: Judge,
        *,
        prompts: int,
        seconds: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
        told: Told = lambda candidate, prompt: None,
    ) -> None:
        """Args:
        ways: what is searched.
        judge: measures.
        prompts: on which points are decided.
        seconds: from now on; no sample is begun that, if it took as long as the longest so far, would end later.
        clock: seconds.
        told: hears of every sample before it is made.
        """
        self.ways, self.judge, self.prompts, self.clock, self.told = ways, judge, prompts, clock, told
        self.end, self.longest = clock() + seconds, 0.0
        self.points: dict[str, Point] = {}
        self.half = 0.5 / ways.steps  # a rival that costs up to half a step more counts as one of the same cost
        self.strongest: list[Family] = []  # the best rivals, of fewer steps and of skipped ones, the better one first

    def run(self, goal: Goal) -> Found:
        """The search to its end or to that of its time, and what it decides for.

        Args:
            goal: budget or target.
        """
        finished = True
        try:
            self._to_budget(goal.budget) if goal.budget is not None else self._to_target(goal.target)
        except OutOfTime:
            finished = False
        return self.found(goal, finished)

    def found(self, goal: Goal, finished: bool = False) -> Found:
        """What has been measured so far, and what that decides for.

        Args:
            goal: budget or target.
            finished: whether the search came to its end.
        """
        prompts = max((len(point.levels) for point in self.points.values() if point.candidate.rival), default=0)
        best = decide([p for p in self.points.values() if self.admissible(p, prompts)], goal, prompts)
        return Found(points=list(self.points.values()), best=best, prompts=prompts, finished=finished)

    def admissible(self, point: Point, prompts: int) -> bool:
        """Whether a point may be returned: a rival, or one that passes every rival that it faces, of each kind the strongest.

        Args:
            point: as measured so far.
            prompts: that it must have met.
        """
        if len(point.levels) < max(prompts, 1):
            return False
        if point.candidate.rival or prompts < 2:
            return point.candidate.rival
        facing, budget = self._facing(point), point.cost + self.half
        known = all(self._next(family, budget) is None for family in self.strongest)
        return known and bool(facing) and all(self._passed(point, rival) for rival in facing)

    def measure(self, candidate: Candidate, prompts: int) -> Point:
        """The point of a way, measured on the first so many prompts.

        Raises:
            OutOfTime: before a sample that might end too late.
        """
        point = self.points.get(candidate.name) or Point(candidate=candidate)
        while len(point.levels) < prompts:
            start = self.clock()
            if start + self.longest > self.end:
                raise OutOfTime
            self.told(candidate, len(point.levels))
            level, cost = self.judge(candidate, len(point.levels))
            self.longest = max(self.longest, self.clock() - start)
            self.points.setdefault(candidate.name, point)
            point.levels.append(level)
            point.costs.append(cost)
        return point

    def _facing(self, point: Point) -> list[Point]:
        """Measured rivals that cost as much as a point, or less."""
        return [
            other
            for other in self.points.values()
            if other.candidate.rival and other.cost <= point.cost + self.half and other.levels
        ]

    def _passed(self, point: Point, rival: Point) -> bool:
        """Whether a point beats a rival that it faces, or leads it where another of its family is nearer in cost."""
        nearest = self._within(rival.candidate.family, point.cost + self.half)
        return point.beats(rival) if rival is nearest else point.leads(rival)

    def _look(self, family: Family, budget: float) -> Point | None:
        """The way of a family that costs the most within a budget, as measured, on one prompt at least; None: there is none."""
        while one := self._next(family, budget):
            self.measure(one, 1)
        return self._within(family, budget)

    def _within(self, family: Family, budget: float) -> Point | None:
        points = [point for point in self._of(family) if point.cost <= budget]
        return max(points, key=lambda point: point.cost, default=None)

    def _next(self, family: Family, budget: float) -> Candidate | None:
        """The way that may come nearer to a budget than those measured, between the nearest two or in proportion; None: none."""
        below, planned = self._within(family, budget), budget
        if below and below.cost > budget - 2 * self.half:
            return None
        above = min((p for p in self._of(family) if p.cost > budget), key=lambda point: point.cost, default=None)
        if below and above:
            planned = (below.candidate.cost + above.candidate.cost) / 2
        elif near := below or above:
            planned *= near.candidate.cost / near.cost
        one = self.ways.at(family, planned)
        return None if one is None or one.name in self.points else one

    def _of(self, family: Family) -> list[Point]:
        return [point for point in self.points.values() if point.candidate.family == family]

    def _looks(self, families: Iterable[Family], budget: float) -> list[Point]:
        """Points of families within a budget, the best first look first."""
        found = {point.candidate.name: point for family in families if (point := self._look(family, budget))}
        return sorted(found.values(), key=lambda point: -point.levels[0])

    def _race(self, points: Sequence[Point], budget: float, least: int = 1) -> Point:
        """The best of some, measured on all prompts, of those that stay within a budget; where none does, of all.

        The one that is ahead, on the prompts that it shares with the one measured most, is measured on one more until it has all.
        Each meets at least so many.
        """
        for point in points:
            self.measure(point.candidate, min(least, self.prompts))
        while True:
            inside = [point for point in points if point.cost <= budget] or points
            first = max(inside, key=lambda point: (len(point.levels), point.mean(len(point.levels))))
            ahead = max([first, *inside], key=lambda point: point.over(first)[0])
            if len(ahead.levels) >= self.prompts:
                return ahead
            self.measure(ahead.candidate, len(ahead.levels) + 1)

    def _face_rivals(self, budget: float) -> None:
        """Measures the rivals of a cost, fewer steps and the best way of skipping, on all prompts."""
        kinds: dict[bool, list[Point]] = {}
        looks = self._looks(self.ways.rivals(), budget)
        if skipping := next((point for point in looks if point.candidate.family.steps is not None), None):
            looks += self._looks(self.ways.gated(skipping.candidate.family), budget)
        for point in looks:
            kinds.setdefault(point.candidate.family.steps is None, []).append(point)
        raced = [self._race(points, budget, FAIR) for points in kinds.values()]
        raced.sort(key=lambda point: -point.mean(self.prompts))
        self.strongest = [point.candidate.family for point in raced]

    def _to_budget(self, budget: float) -> None:
        self._face_rivals(budget)
        self._compose(budget)

    def _compose(self, budget: float, seeds: Sequence[Family] | None = None) -> Point | None:
        """The best composition within a budget that a walk from the seeds finds, faced with the rivals of its cost."""
        seeds = seeds or self.ways.seeds(self.strongest[0] if self.strongest else self.ways.rivals()[-1])
        if not (points := self._looks(seeds, budget)):
            return None
        best, before = self._race(points, budget), None
        while best is not before:
            self._confirm(best)
            before, best = best, self._better(best, budget) or self._race(self._compositions(budget) or [best], budget)
        return best

    def _better(self, best: Point, budget: float) -> Point | None:
        """The first way that differs from the best by one move and is better on all prompts, if it is so at a first look."""
        for family in self.ways.moves(best.candidate.family):
            point = self._look(family, budget)
            if point and point is not best and self._race([best, point], budget) is point:
                return point
        return None

    def _compositions(self, budget: float) -> list[Point]:
        return [point for point in self.points.values() if not point.candidate.rival and point.cost <= budget]

    def _confirm(self, point: Point) -> None:
        """Measures the rivals of its cost, and cheaper ones that it does not lead, on all prompts, until it does not pass one."""
        for family in self.strongest:
            while (rival := self._look(family, point.cost + self.half)) and len(rival.levels) < self.prompts:
                self.measure(rival.candidate, self.prompts)
        for rival in sorted(self._facing(point), key=lambda rival: point.over(rival)[0]):
            if not self._passed(point, rival):
                self.measure(rival.candidate, self.prompts)
            if not self._passed(point, rival):
                break

    def _to_target(self, target: float) -> None:
        """The cheapest rival that reaches the target, by bisection of the steps that run; then cheaper compositions."""
        low, high = 0, self.ways.steps  # steps that do not reach it, and that do
        while high - low > 1:
            middle = (low + high) // 2
            self._face_rivals(middle / self.ways.steps + 1e-9)
            reached = decide(self._rivals(), Goal(target=target), self.prompts)
            low, high = (low, middle) if reached else (middle, high)
        goal, shrink, seeds = Goal(target=target), SHRINK, None
        best = self.found(goal).best
        cost = best.cost if best else 1.0
        while (1 - shrink) * cost > FINE:
            composed = self._compose(cost * shrink, seeds)
            best = self.found(goal).best
            if best and best.cost < cost - 1e-9:
                cost, seeds = best.cost, None if best.candidate.rival else [best.candidate.family]
            else:
                shrink, seeds = (1 + shrink) / 2, [composed.candidate.family] if composed else None

    def _rivals(self) -> list[Point]:
        return [p for p in self.points.values() if p.candidate.rival and len(p.levels) >= self.prompts]


def decide(points: Sequence[Point], goal: Goal, prompts: int) -> Point | None:
    """The best point within a budget, of equal ones the cheapest; or the cheapest that reaches the target, of equal ones the best.

    Args:
        points: those that may be returned, measured on so many prompts.
        goal: budget or target.
        prompts: over which means are taken.
    """
    rank = lambda point: (-point.mean(prompts), point.cost)
    if goal.budget is not None:
        return min((point for point in points if point.cost <= goal.budget), key=rank, default=None)
    reached = [point for point in points if point.mean(prompts) >= goal.target]
    return min(reached, key=lambda point: rank(point)[::-1], default=None)

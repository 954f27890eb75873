"""The networks of a pipeline in turn: which steps each of them runs, planned and with room before anything is read; and the run."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from typing import Any

import jax
import numpy as np

from chipmunk_jax import memory, sampling
from chipmunk_jax.arguments import check, placed
from chipmunk_jax.model import Condition
from chipmunk_jax.pipelines.request import Request
from chipmunk_jax.pipelines.residents import Residents
from chipmunk_jax.pipelines.variant import Variant
from chipmunk_jax.progress import Reporter
from chipmunk_jax.schedule import Taken, density, taken
from pallas_kernels import Implementation


@dataclass(frozen=True, kw_only=True)
class Span:
    """Steps that one network runs."""

    role: str  # of the network
    first: int  # step
    table: sampling.Table
    need: int  # bytes that they take beside the weights
    options: dict[str, Any]  # arguments of sample()

    def as_run(self, state: sampling.SampleState) -> "Span":
        """The span with its steps as they ran, whatever was decided on the way to a state."""
        return replace(self, table=self.table.replace(step=state.as_run(self.table.step)))


def plan_spans(
    request: Request,
    variant: Variant,
    residents: Residents,
    noise: jax.ShapeDtypeStruct,
    cond: Condition,
    implementation: Implementation | None,
) -> list[Span]:
    """What each network does, planned.

    Args:
        request: what is sampled, and in which turns.
        variant: its model.
        residents: of the pipeline.
        noise, cond: shapes of [B, N, C], and of the conditions of one side of guidance.
        implementation: of the kernels.

    Raises:
        InputError: no room.
    """
    solver, grid = request.solver, variant.grid(request.settings)
    one = jax.ShapeDtypeStruct((request.at_once, *noise.shape[1:]), noise.dtype)
    spans = []
    for turn in request.turns:
        role, (first, stop) = turn.role, turn.span
        shapes = residents.shapes[role], noise, cond
        fixed = dict(sparsity=turn.sparsity, guidance=turn.guidance, solver=solver, implementation=implementation)
        sizes = fixed | dict(steps=stop - first, at_once=request.at_once)
        memory.check_room(*shapes, placed=role in residents, spare=residents.releasable, **sizes)
        planned = memory.plan(*shapes, **sizes)
        # The seed is of the columns kept by chance, which must not depend on a sample's place in its batch.
        options = fixed | dict(timesteps=request.timesteps[first : stop + 1], grid=grid, seed=0)
        spans.append(
            Span(
                role=role,
                first=first,
                table=sampling.plan(residents.shapes[role], one, cond, **options),
                need=sum(size for name, size in planned.items() if name != "weights"),
                options=options,
            )
        )
    return spans


def run_spans(
    spans: Sequence[Span],
    residents: Residents,
    noise: jax.Array,
    cond: Condition,
    uncond: Condition | None,
    reporter: Reporter,
    *,
    apart: bool,
) -> tuple[np.ndarray, list[list[Span]]]:
    """Tokens [B, N, C], f32, in raster order, that all networks in turn make of the noise; arrays as of sample().

    And the spans with their steps as they ran, whatever was decided: those of all samples, or of each where they are apart, one
    after another.
    """
    states: list[sampling.SampleState] = []
    done: list[list[Span]] = [[] for _ in range(len(noise) if apart else 1)]
    for span in spans:
        reporter.pause("loading")
        model = residents.place(span.role, span.need)
        *arrays, other = placed(model, noise, cond, uncond if span.options["guidance"] is not None else None)
        check(model, *arrays, uncond=other, **span.options, at_once=1 if apart else None)
        reporter.first = span.first
        given = dict(uncond=other, sparsity=span.options["sparsity"], carried=states, apart=apart)
        states = sampling.run(model, *arrays, span.table, reporter, **given)
        for found, state in zip(done, states, strict=True):
            found.append(span.as_run(state))
        del model, arrays, other  # whose room the next one may need
    return np.concatenate([state.x for state in states]), done


def computed(spans: Sequence[Span], layers: int, samples: int) -> dict[str, Any]:
    """What of so many samples was computed, of so many layers: density, full_steps, .. of PipelineOutput."""
    tables = [span.table for span in spans]
    counts = [len(table.times) for table in tables]
    shares = [density(table.step, layers) for table in tables]
    found = [taken(span.table.step, n, span.first) for span, n in zip(spans, counts, strict=True)]
    whole = Taken(*map(_joined, zip(*map(astuple, found), strict=True)))
    mean = lambda part: float(np.average([one[part] for one in shares], weights=counts))
    return {"density": {part: mean(part) for part in shares[0]}} | _named([whole] * samples)


def together(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What of all samples was computed, of several times what computed() gives of some of them."""
    samples = [one["steps_by_sample"] for one in found]
    mean = lambda part: float(np.average([one["density"][part] for one in found], weights=list(map(len, samples))))
    return {"density": {part: mean(part) for part in found[0]["density"]}} | _named(_joined(samples))


def _named(samples: Sequence[Taken]) -> dict[str, Any]:
    """The fields of PipelineOutput that tell of the steps of each sample."""
    in_all = lambda name: tuple(sorted(set.intersection(*(set(getattr(one, name)) for one in samples))))
    names = [field.name for field in fields(Taken)]
    return {f"{name}_steps": in_all(name) for name in names} | {"steps_by_sample": tuple(samples)}


def _joined(parts: Iterable[Iterable]) -> tuple:
    return tuple(itertools.chain(*parts))

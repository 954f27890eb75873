"""What each step of a sample was, and the share of the columns that each layer computed in it."""

import itertools
from dataclasses import astuple
from typing import Any

import numpy as np

from chipmunk_jax.pipelines import Pipeline
from chipmunk_jax.pipelines.denoising import plan_spans
from chipmunk_jax.pipelines.request import Request
from chipmunk_jax.report.price import step_kinds
from chipmunk_jax.schedule import Step, Taken, as_taken, density, run_shares

PARTS = ("attention", "mlp")


def steps_of(pipeline: Pipeline, request: Request, taken: Taken) -> dict[str, Any]:
    """The "kinds" of all steps, as step_kinds() names them, and of "attention" and "mlp" what by_layer() gives.

    Args:
        pipeline: of the model.
        request: what was sampled.
        taken: what its steps were.
    """
    variant, layers = pipeline.variant, pipeline.layers(request)
    _, noise, cond = variant.shapes(
        request.settings, request.batch, pipeline.network.dtype, pipeline.text_rows(request)
    )
    kinds: list[str] = []
    shares: dict[str, list[np.ndarray]] = {part: [] for part in PARTS}
    for span in plan_spans(request, variant, pipeline.residents, noise, cond, None):
        steps = len(span.table.times)
        own = Taken(*(tuple(i - span.first for i in numbers) for numbers in astuple(taken)))
        plan = as_taken(span.table.step, steps, own)
        kinds += step_kinds(plan, steps)
        for part in PARTS:
            shares[part].append(_shares(plan, part, steps, layers))
    return {"kinds": kinds} | {part: by_layer(np.concatenate(found)) for part, found in shares.items()}


def by_layer(shares: np.ndarray) -> list[dict[str, Any]]:
    """Of neighbouring layers that are alike: "layers", the first and the last, counted from 1, and their "shares", a step each.

    Args:
        shares: [steps, layers], of the columns that are computed.
    """
    columns = shares.T
    cuts = [0, *(1 + np.flatnonzero((columns[1:] != columns[:-1]).any(1))), len(columns)]
    return [
        {"layers": [int(first) + 1, int(stop)], "shares": columns[first].round(5).tolist()}
        for first, stop in itertools.pairwise(cuts)
    ]


def _shares(plan: Step, part: str, steps: int, layers: int) -> np.ndarray:
    """[steps, layers], of the columns of a part that are computed: of a one-sided step half, of a skipped one none."""
    share, found = getattr(plan, part), np.ones((steps, layers))
    for step in range(steps) if share else ():
        phase = np.asarray(share.phase)[step : step + 1]
        one = Step(**{part: share.replace(phase=phase, dense_layers=0)})
        found[step, share.dense_layers :] = density(one, 1)[part]
    return found * np.broadcast_to(run_shares(plan), steps)[:, None]

"""What attention and MLP of a model compute in a dense sample: how much of it changes from step to step, and in how few values.

The sample is the ordinary one, whose tokens are kept at every step. Then the network runs once more for every two consecutive
steps, both in one batch, which activation_changes.py compares layer by layer: only numbers leave a layer, whatever the size.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from chipmunk_jax.arguments import placed
from chipmunk_jax.errors import InputError
from chipmunk_jax.model import Condition
from chipmunk_jax.order import patch_order
from chipmunk_jax.pipelines import Pipeline
from chipmunk_jax.pipelines.denoising import Span, plan_spans
from chipmunk_jax.pipelines.request import Request
from chipmunk_jax.progress import compiled, executed
from chipmunk_jax.report.activation_changes import GROUPS, MEASURES, TOP, compare_steps, parts_of
from chipmunk_jax.report.plot import check_plotting
from chipmunk_jax.sampling import both_sides
from chipmunk_jax.sparsity import Sparsity
from chipmunk_jax.strictness import usual_modes
from chipmunk_jax.whole import whole
from pallas_kernels.groups import group_count


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Numbers of every layer and step of one dense sample."""

    about: dict[str, Any]  # what was sampled, and in which groups it was looked at
    # By name of MEASURES, f32 [steps, L, S, shares], axes that a measure lacks left out; NaN where nothing is compared.
    numbers: dict[str, np.ndarray]
    mass_by_head: np.ndarray  # f32 [L, H, shares], means over steps and sides

    def save(self, path: Path) -> None:
        """Writes all numbers as JSON; a number that there is not, as of the first step, is null.

        Raises:
            InputError: the file cannot be written.
        """
        measures = {
            name: {
                "what": one.titled(*one.shares),
                "axes": ["step", "layer", *["side"] * one.sides, *["share"] * bool(one.shares)],
                "shares": one.shares,
                "values": _plain(self.numbers[name]),
            }
            for name, one in MEASURES.items()
            if name in self.numbers
        }
        by_head = {"axes": ["layer", "head", "share"], "shares": TOP, "values": _plain(self.mass_by_head)}
        with whole(path) as file:
            file.write_text(json.dumps(self.about | {"measures": measures, "mass_by_head": by_head}) + "\n")

    def by_layer_and_step(self, name: str, share: int = 1) -> np.ndarray:
        """One measure, f32 [steps, L], means over sides.

        Args:
            name: of MEASURES.
            share: which of its shares, where it has several.
        """
        values, one = self.numbers[name], MEASURES[name]
        values = values[..., share] if one.shares else values
        return values.mean(2) if one.sides else values

    def draw(self, path: Path) -> None:
        """Draws heat maps, layers by steps, to a PNG file; of several shares the middle one.

        Raises:
            InputError: matplotlib is not installed.
        """
        check_plotting()
        from matplotlib.figure import Figure  # without pyplot: no display, no state

        columns = 2
        figure = Figure(figsize=(12, 2.6 * group_count(len(self.numbers), columns)), layout="constrained")
        figure.suptitle(f"{self.about['checkpoint']}: {self.about['prompt']}, {self.about['steps']} steps, dense")
        panels = figure.subplots(group_count(len(self.numbers), columns), columns).ravel()
        for axes, name in zip(panels, self.numbers, strict=False):
            values = 100 * self.by_layer_and_step(name).T
            image = axes.imshow(values, aspect="auto", origin="lower", interpolation="nearest")
            axes.set(title=_titled(name), xlabel="step", ylabel="layer")
            axes.title.set_fontsize("medium")
            figure.colorbar(image, ax=axes, format="%g %%")
        for axes in panels[len(self.numbers) :]:
            axes.set_axis_off()
        with whole(path) as partial_file:
            figure.savefig(partial_file, format="png", dpi=120)

    def rows(self) -> list[list[str]]:
        """A table in words, a row a measure; of several shares, layers and parts of the steps are those of the middle one."""
        rows = [["in %", "mean", "least (layer)", "most (layer)", "five parts of the steps"]]
        for name, one in MEASURES.items():
            if name in self.numbers:
                values = 100 * self.by_layer_and_step(name)
                values = values[~np.isnan(values[:, 0])]
                means = (self.mean(name, i) for i in range(len(one.shares) or 1))
                layers = values.mean(0)
                edges = [f"{layers[i]:.1f} ({i})" for i in (layers.argmin(), layers.argmax())]
                parts = (f"{part.mean():.1f}" for part in np.array_split(values, min(5, len(values))))
                rows.append(
                    [one.titled(*one.shares), " / ".join(f"{100 * m:.1f}" for m in means), *edges, "  ".join(parts)]
                )
        return rows

    def mean(self, name: str, share: int = 1) -> float:
        """One measure over all layers, sides and steps; arguments as of by_layer_and_step()."""
        return float(np.nanmean(self.by_layer_and_step(name, share)))


def _titled(name: str) -> str:
    """What by_layer_and_step() gives."""
    one = MEASURES[name]
    return one.titled(*one.shares[1:2])


def _plain(values: np.ndarray) -> Any:
    """Lists that JSON can hold, None for NaN, in four digits."""
    if values.ndim:
        return [_plain(one) for one in values]
    return None if np.isnan(values) else float(f"{values:.4g}")


@usual_modes()
def check_activations(
    pipeline: Pipeline, prompt: str, *, sparsity: Any = "auto", **settings: Any
) -> tuple[Sparsity, Request, list[Span]]:
    """What observe() looks at: whose groups and keys, and a dense request of two samples with the steps of each network.

    Raises:
        InputError: what Pipeline.check() refuses; no room; no two steps of one network.
    """
    request = pipeline.check(prompt, sparsity=sparsity, num_images_per_prompt=2, **settings)
    pair = replace(request, sparsity=None)
    spans = plan_spans(pair, pipeline.variant, pipeline.residents, *pipeline.shapes(pair)[1:], None)
    if all(len(span.table.times) == 1 for span in spans):
        expected = "at least 2" if len(spans) == 1 else "more, so that a network runs 2"
        raise InputError(f"num_inference_steps={pair.settings['steps']}: expected {expected}, as steps are compared")
    return request.sparsity or Sparsity(), pair, spans


@usual_modes()
def observe(
    pipeline: Pipeline, prompt: str, *, sparsity: Any = "auto", progress: bool = True, **settings: Any
) -> Activations:
    """Activations, what attention and MLP compute in the dense sample of a prompt, on both sides of guidance.

    It takes several times as long as the sample, and the room of two.

    Args:
        pipeline: of the model.
        prompt: a sentence.
        sparsity: whose groups, order of tokens and share of keys are looked at; as a call of the pipeline takes it.
        progress: draws bars.
        settings: as a call of the pipeline takes them.

    Raises:
        InputError: see check_activations().
    """
    found, pair, spans = check_activations(pipeline, prompt, sparsity=sparsity, **settings)
    inputs = pipeline.inputs(pair)
    tokens = [np.asarray(inputs[0][:1], np.float32)]
    keep = lambda step, t, x, clean: tokens.append(np.array(x))
    pipeline(prompt, **settings, sparsity=None, output_type="latent", callback_on_step_end=keep, progress=progress)
    steps: list[dict[str, np.ndarray]] = []
    with tqdm(total=len(tokens) - 1, desc="comparing", unit="step", disable=not progress) as bar:
        for span in spans:
            steps += _compare_span(pipeline, span, tokens, inputs, found, bar.update)
    return _activations(pipeline, prompt, pair, spans, found, steps)


def _compare_span(
    pipeline: Pipeline,
    span: Span,
    tokens: Sequence[np.ndarray],
    inputs: tuple[jax.Array, Condition, Condition | None],
    sparsity: Sparsity,
    done: Callable[[], Any],
) -> list[dict[str, np.ndarray]]:
    """The numbers of every step of one network; its first step is compared with itself."""
    model = pipeline.residents.place(span.role, span.need)
    order = patch_order(span.options["grid"], sparsity.patches)
    guided = span.options["guidance"] is not None
    noise, cond, uncond = inputs
    _, cond, uncond = placed(model, noise, cond, uncond if guided else None)
    cond = both_sides(model, cond, uncond) if guided else cond
    cond = {name: x[:, order] if name in model.on_grid else x for name, x in cond.items()}
    positions = jnp.asarray(model.positions(span.options["grid"])[order])
    program, numbers = None, []
    for step, time in enumerate(span.table.times):
        before = max(step - 1, 0)
        x = np.concatenate([tokens[span.first + i][:, order] for i in (step, before)])
        t = np.asarray([time, span.table.times[before]], np.float32)
        args = model, *jax.device_put((x, t)), cond, positions
        program = program or compiled(compare_steps.lower(*args, sparsity=sparsity))
        numbers.append({name: np.asarray(a) for name, a in executed(program, *args).items()})
        done()
    return numbers


def _activations(
    pipeline: Pipeline,
    prompt: str,
    pair: Request,
    spans: Sequence[Span],
    sparsity: Sparsity,
    steps: Sequence[dict[str, np.ndarray]],
) -> Activations:
    """All steps together; what has no step before it, or no other side, is left out."""
    numbers = {name: np.stack([step[name] for step in steps]) for name in MEASURES}
    by_head = np.moveaxis(numbers["mass"].mean((0, 2)), 1, -1)  # [L, H, shares]
    numbers["mass"] = numbers["mass"].mean(-1)
    firsts = [span.first for span in spans]
    for name, one in MEASURES.items():
        if one.compared:
            numbers[name][firsts] = np.nan
    sides = numbers["mass"].shape[2]
    if sides == 1:
        del numbers["overlap_of_sides"]
    network, noise, cond = pipeline.shapes(pair)
    stacks = network.stacks(noise.shape[1], cond)
    first, attention, mlp = next(iter(stacks.values())), *parts_of(sparsity)
    groups = group_count(first.tokens, attention.group)
    about = {
        "prompt": prompt,
        **pipeline.origin,
        **pair.settings,
        "seed": pair.seed,
        "layers": {name: stack.layers for name, stack in stacks.items()},
        "sides": ["prompt", "other"][:sides],
        "keys": first.tokens,
        "neurons": first.mlp_width,
        "group": attention.group,
        "mlp_group": mlp.group,
        "groups": groups,
        "groups_seen": min(groups, GROUPS),
        "top_keys": attention.top_keys,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    return Activations(about=about, numbers=numbers, mass_by_head=by_head)

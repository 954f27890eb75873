"""A program of a user, with the types that a user expects: mypy --strict reads it against the wheel, and nothing runs it.

Each public name is used once. Where a type matters, assert_type says it: a signature that changes fails here before a user sees it.
"""

from pathlib import Path
from typing import Any, assert_type

import jax
import numpy as np

import chipmunk_jax
from chipmunk_jax import (
    AttentionSparsity,
    Euler,
    FluxConfig,
    FluxPipeline,
    GuidanceCache,
    HunyuanVideoConfig,
    InputError,
    Layout,
    Mlp,
    MlpSparsity,
    Network,
    NotFiniteError,
    Pipeline,
    PipelineOutput,
    Rule,
    Sparsity,
    Stack,
    StepCache,
    UniPC,
    Variant,
    WanConfig,
    WanPipeline,
    attend,
    denoise,
    flux_timesteps,
    load,
    load_sparsity,
    plan,
    register,
    sample,
    save,
    save_image,
    save_video,
    shifted_timesteps,
    start,
    variant_of,
    wan_timesteps,
)
from chipmunk_jax.convert import convert, read
from chipmunk_jax.model import Condition, Model
from chipmunk_jax.models import MODELS, Component, Flux
from chipmunk_jax.pipelines import VARIANTS
from chipmunk_jax.pipelines.pixels import PixelPipeline
from chipmunk_jax.sampling import SampleState, Table
from chipmunk_jax.schedule import Taken
from chipmunk_jax.solvers import Solver
from chipmunk_jax.sparsity import PRESETS, to_dict
from pallas_kernels import Columns, Implementation, topk_columns


def images_of_prompts(folder: Path) -> PipelineOutput:
    pipe = Pipeline.from_pretrained(folder, dtype="bfloat16")
    assert_type(pipe, Pipeline)
    assert_type(PixelPipeline.from_pretrained(folder), PixelPipeline)
    assert_type(FluxPipeline.from_pretrained(folder), FluxPipeline)
    assert_type(WanPipeline.from_pretrained(folder), WanPipeline)
    try:
        out = pipe(
            ["red striped heart on meadow", "blue plain disc on sky"],
            negative_prompt="",
            height=64,
            width=64,
            num_inference_steps=28,
            guidance_scale=2.0,
            num_images_per_prompt=2,
            seed=0,
            sparsity="mini-flux",
            callback_on_step_end=on_step_end,
            output_type="np",
            progress=False,
        )
    except (InputError, NotFiniteError) as error:
        assert_type(str(error), str)
        raise
    assert_type(out.seconds, float)
    assert_type(out.density, dict[str, float])
    assert_type(out.full_steps, tuple[int, ...])
    assert_type(out.skipped_steps, tuple[int, ...])
    assert_type(out.one_sided_steps, tuple[int, ...])
    assert_type(out.steps_by_sample, tuple[Taken, ...])
    assert_type(out.settings, dict[str, Any])
    save_image("heart.png", pipe("red striped heart on meadow").images[0], {"seed": 0})
    save_video("heart.webp", pipe("red striped heart on meadow").frames[0], fps=8)
    return out


def on_step_end(step: int, t: float, latents: np.ndarray, clean: np.ndarray) -> None:
    print(step, t, latents.shape, clean.std())


def sparsities() -> dict[str, Sparsity]:
    own = Sparsity(
        attention=AttentionSparsity(top_keys=0.2, group=64, full_step_schedule=(0, 1, 10), query_stride=2),
        mlp=MlpSparsity(top_keys=0.3, random_keys=0.05, cache="residual"),
        step_cache=StepCache(gate="tea", threshold=0.2, coefficients=(1.0, 0.0), predict="residual", order=1),
        guidance_cache=GuidanceCache(after=0.4, every=5),
        patches=((4, 4, 8),),
    )
    assert_type(own.attention, AttentionSparsity | None)
    assert_type(PRESETS["flux"], Sparsity)
    assert_type(to_dict(own), dict[str, Any])
    return {
        "own": own,
        "preset": load_sparsity("flux", {"attention.top_keys": 0.2}),
        "file": load_sparsity(Path("quality.yaml")),
        "dictionary": load_sparsity({"mlp": None}),
    }


def samples(model: Model, noise: jax.Array, cond: Condition) -> list[jax.Array]:
    """sample(), and the pure functions that it stands on."""
    solvers: list[Solver] = [Euler(), UniPC()]
    times = [flux_timesteps(28, 1024), shifted_timesteps(50, 7.0), wan_timesteps(50, shift=5.0)]
    shared: dict[str, Any] = dict(guidance=2.0, uncond=cond, seed=1, progress=True)
    made = [
        sample(model, noise, cond, timesteps=t, grid=(32, 32), sparsity=sparsity, solver=solvers[0], **shared)
        for t, sparsity in zip(times, sparsities().values(), strict=False)
    ]
    assert_type(made, list[jax.Array])

    table = plan(model, noise, cond, timesteps=times[0], grid=(32, 32), solver=solvers[1])
    state = start(model, noise, cond, table)
    assert_type(table, Table)
    assert_type(state, SampleState)
    half = denoise(model, state, cond, table, span=(0, 14))
    return [*made, half.x]


def checkpoints(source: Path, folder: Path) -> Model:
    """A PyTorch checkpoint converted, and one read as it is; each is a Model."""
    convert(source, folder, dtype="bfloat16")
    save(load(folder), folder.with_name("copy"), overwrite=True)
    assert_type(load(folder, "float32"), Network)
    network: Model = load(folder)
    other: Model = read(source)
    return other if network.channels == 64 else network


def own_network(network: type[Network]) -> Variant:
    assert_type(MODELS, dict[str, type[Component]])
    MODELS["flux"] = Flux
    configs = FluxConfig(), HunyuanVideoConfig(), WanConfig(num_layers=2)
    assert_type([variant_of(config) for config in configs], list[Variant])
    variant = Variant(network="own", config=FluxConfig(depth=2), preset="flux", patch=(16, 16), height=768, width=1280)
    rules = (Rule(("theirs.weight",), ("ours.kernel.T",)),)
    config = lambda shapes, stated: FluxConfig()
    layout = Layout(
        model="own", class_name="Own", name="original", marks=("theirs.weight",), rules=rules, configure=config
    )
    register("own", network, layouts=[layout], variants={"own-small": variant})
    print(attend, Mlp)
    stack = Stack(layers=2, tokens=64, heads=2, head_dim=64, mlp_tokens=64, width=128, mlp_width=512)
    assert_type(stack.text, tuple[int, int])
    return VARIANTS["own-small"]


def kernels(scores: jax.Array) -> Columns:
    implementation: Implementation = "reference"
    return topk_columns(scores, 64, capacity=64, implementation=implementation)


def mistakes(pipe: Pipeline) -> None:
    """Each line has an error that the checker must see: an ignored one that is not there is an error, too."""
    pipe("red striped heart on meadow", steps=28)  # type: ignore[arg-type]
    pipe("red striped heart on meadow", output_type="jpeg")  # type: ignore[arg-type]
    MlpSparsity(cache="outputs")  # type: ignore[arg-type]
    Sparsity(mlp=AttentionSparsity())  # type: ignore[arg-type]
    print(chipmunk_jax.smaple)  # type: ignore[attr-defined]
    PRESETS["flux"].patches = ()  # type: ignore[misc]

"""Training by the clock: stages of growing size, AdamW, and an exponential moving average (EMA) of the weights.

What the scripts that train the small models have in common. Weights are float32 here and bf16 in the network.
"""

import json
import logging
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from export import write_checkpoint
from flax import nnx, struct
from jax import lax
from judge import accuracies, train_judge
from procgen_shapes import word_rows, word_table

TEXT_TOKENS = 16  # four words, then zeros
# cuBLASLt alone: quicker to compile, as fast for these products. Without excess precision bf16 stays bf16 in memory.
XLA_FLAGS = "--xla_gpu_enable_triton_gemm=false --xla_allow_excess_precision=false"
TOY_XLA_FLAGS = "--xla_backend_optimization_level=0"  # a toy is all compilation
log = logging.getLogger("training")


@dataclass(frozen=True)
class Stage:
    """A share of the training time spent on samples of one size."""

    share: float
    size: int  # pixels
    batch: int
    frames: int = 1

    def __str__(self) -> str:
        return f"{self.size} px" if self.frames == 1 else f"{self.frames} x {self.size} px"


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """What is trained, and how."""

    model: Any  # the network's config
    stages: tuple[Stage, ...]
    learning_rate: float = 1e-3
    final_learning_rate: float = 5e-5
    warmup_steps: int = 300
    weight_decay: float = 0.01
    ema: float = 0.999
    uniform: float = 0.1  # share of samples with uniform t: the ends of the schedule must be seen
    drop: float = 0.1  # share of samples without text, for guidance
    replay: int = 0  # every so manyth dispatch of a later stage is one of the first, which is else forgotten; 0: none
    judge_batch: int = 256
    judge_seconds: float = 15.0
    dispatch_seconds: float = 1.5  # of micro-steps between two looks at the clock

    @abstractmethod
    def make_model(self, rngs: nnx.Rngs) -> nnx.Module:
        """The network in bf16."""

    @abstractmethod
    def starts_at_zero(self, names: set[str]) -> bool:
        """Whether the leaf whose path has these names does, so that blocks start as the identity (adaLN-zero)."""

    @abstractmethod
    def make_batch(self, key: jax.Array, stage: Stage) -> tuple[jax.Array, jax.Array]:
        """tokens [B, N, C], f32 in -1..1, and labels [B, 4] of a batch of new samples."""

    @abstractmethod
    def condition(self, labels: jax.Array, keep: jax.Array) -> dict[str, jax.Array]:
        """The network's conditions for labels [B, 4]; zeros where keep [B] is false."""

    @abstractmethod
    def positions(self, stage: Stage) -> jax.Array:
        """Of every token, [N, 3]."""

    @abstractmethod
    def time_shift(self, tokens: int) -> float:
        """By how much the logits of times go towards noise for a sequence of so many tokens, as the sampler's do."""

    @abstractmethod
    def diffusers_tensors(self, params: nnx.State) -> dict[str, np.ndarray]:
        """Our weights under diffusers' names, transposed, split and joined as its layers are."""

    @abstractmethod
    def diffusers_config(self) -> dict[str, Any]:
        """config.json of the diffusers class."""


@struct.dataclass
class TrainState:
    """Everything that a step changes."""

    params: nnx.State  # f32
    ema: nnx.State  # f32, like params
    moments: optax.OptState
    step: jax.Array  # i32


def start_log(out: Path) -> None:
    """Messages with the milliseconds since the start go to the screen and to info.txt."""
    out.mkdir(parents=True, exist_ok=True)
    log.setLevel(logging.INFO)
    for handler in (logging.StreamHandler(sys.stdout), logging.FileHandler(out / "info.txt", mode="w")):
        handler.setFormatter(logging.Formatter("[%(relativeCreated)7d ms] %(message)s"))
        log.addHandler(handler)


# Model and objective.


def init_state(recipe: Recipe, seed: int, trained: nnx.Module | None = None) -> tuple[nnx.GraphDef, TrainState]:
    """The graph of the bf16 network, and its float32 start: new weights, or those of a trained network."""
    make = lambda: nnx.split(recipe.make_model(nnx.Rngs(seed)))

    def start(path, leaf):
        zero = recipe.starts_at_zero({str(getattr(key, "key", key)) for key in path})
        return jnp.zeros(leaf.shape) if zero else leaf.astype(jnp.float32)

    @jax.jit  # one program instead of hundreds
    def init(params):
        params = params or jax.tree_util.tree_map_with_path(start, make()[1])
        return TrainState(params, jax.tree.map(jnp.copy, params), optimizer(recipe).init(params), jnp.int32(0))

    graph, state = jax.eval_shape(make)[0], init(trained and nnx.state(trained))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    log.info("jax %s, %s, %.2f M parameters", jax.__version__, jax.devices()[0].device_kind, parameters / 1e6)
    return graph, state


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW without its learning rate, which depends on the clock; a step whose gradient is not finite is left out."""

    def is_matrix(params):
        named = lambda path, _: bool({"kernel", "fc1", "fc2"} & {str(getattr(key, "key", key)) for key in path})
        return jax.tree_util.tree_map_with_path(named, params)

    steps = (
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.99),
        optax.add_decayed_weights(recipe.weight_decay, mask=is_matrix),
    )
    return optax.apply_if_finite(optax.chain(*steps), max_consecutive_errors=10)


def velocity_loss(params, graph, recipe: Recipe, stage: Stage, key: jax.Array) -> jax.Array:
    """Mean squared error of the velocity noise - sample at a random time, on a fresh batch."""
    sample_key, time_key, noise_key, drop_key = jax.random.split(key, 4)
    sample, labels = recipe.make_batch(sample_key, stage)
    t = random_times(time_key, stage.batch, recipe.time_shift(sample.shape[1]), recipe.uniform)
    noise = jax.random.normal(noise_key, sample.shape)
    noisy = sample + t[:, None, None] * (noise - sample)
    cond = recipe.condition(labels, jax.random.bernoulli(drop_key, 1 - recipe.drop, t.shape))

    model = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    model.unroll = True
    velocity, _ = model(noisy, t, cond, recipe.positions(stage))
    return jnp.square(velocity - (noise - sample)).mean()


def random_times(key: jax.Array, batch: int, shift: float, uniform: float) -> jax.Array:
    """Times [B] in 0..1: logit-normal, some uniform, the logits of all shifted to noise (Esser et al., 2024)."""
    normal_key, uniform_key, choice_key = jax.random.split(key, 3)
    logits = jnp.where(
        jax.random.bernoulli(choice_key, uniform, (batch,)),
        jax.scipy.special.logit(jax.random.uniform(uniform_key, (batch,), minval=1e-4, maxval=1 - 1e-4)),
        jax.random.normal(normal_key, (batch,)),
    )
    return jax.nn.sigmoid(logits + shift)


def embed_words(labels: jax.Array, keep: jax.Array) -> jax.Array:
    """Embeddings of the words of labels [B, 4], f32 [B, 4, 64]; zeros where keep [B] is false."""
    return jnp.asarray(word_table())[word_rows(labels)] * keep[:, None, None]


def pad_text(words: jax.Array) -> jax.Array:
    """Embedded words [B, 4, 64] as text tokens [B, 16, 64]."""
    return jnp.pad(words, ((0, 0), (0, TEXT_TOKENS - words.shape[1]), (0, 0)))


# Training.


def train_steps(graph, recipe: Recipe, stage: Stage, state: TrainState, key, steps, progress) -> tuple:
    """The state after `steps` steps in one dispatch, their mean loss, and the last gradient's norm.

    Args:
        key: of the whole run.
        steps: i32, traced: the clock decides.
        progress: f32, share of the training time that has passed.
    """

    def step(_, carry):
        state, total, _ = carry
        step_key = jax.random.fold_in(key, state.step)
        loss, grads = jax.value_and_grad(velocity_loss)(state.params, graph, recipe, stage, step_key)
        updates, moments = optimizer(recipe).update(grads, state.moments, state.params)
        rate = learning_rate(recipe, state.step, progress)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
        decay = jnp.minimum(recipe.ema, (state.step + 1) / (state.step + 10))  # no bias from the initial weights
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params)
        norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)))
        return TrainState(params, ema, moments, state.step + 1), total + loss, norm

    state, total, norm = lax.fori_loop(0, steps, step, (state, jnp.float32(0), jnp.float32(0)))
    return state, total / steps, norm


def learning_rate(recipe: Recipe, step: jax.Array, progress: jax.Array) -> jax.Array:
    """Linear warm-up in steps, then a cosine in time."""
    cosine = (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1))) / 2
    rate = recipe.final_learning_rate + (recipe.learning_rate - recipe.final_learning_rate) * cosine
    return rate * jnp.minimum(1, (step + 1) / recipe.warmup_steps)


def compile_stages(recipe: Recipe, graph, state: TrainState, pool: ThreadPoolExecutor) -> list[Future]:
    """Executables to be of train_steps, by stage."""
    state, key = jax.eval_shape(lambda: (state, jax.random.key(0)))
    return [
        compile_later(pool, one, partial(train_steps, graph, recipe, one), state, key, 1, 0.0, donate_argnums=0)
        for one in recipe.stages
    ]


def compile_later(pool: ThreadPoolExecutor, name: Any, function: Callable, *args, **options) -> Future:
    """The executable to be of function(*args), compiled by a thread of the pool with jax.jit's options."""

    def compile_one():
        start = time.time()
        compiled = jax.jit(function, **options).lower(*args).compile()
        memory = compiled.memory_analysis().temp_size_in_bytes / 2**30
        log.info("compiled %s in %.0f s: %.1f GiB", name, time.time() - start, memory)
        return compiled

    return pool.submit(compile_one)


def run_training(
    recipe: Recipe, state: TrainState, train: list[Future], *, seed: int, deadline: float, out: Path
) -> nnx.State:
    """The bf16 EMA of the weights when the time is over; it is exported after every stage."""
    executables = [one.result() for one in train]
    key, begin, logged = jax.random.key(seed + 1), time.time(), 0.0
    deadline = max(deadline, begin + 5)  # a slow compiler must not leave the weights untrained
    ends = begin + (deadline - begin) * np.cumsum([stage.share for stage in recipe.stages])
    paces = [np.inf] * len(executables)  # seconds a step
    for number, (stage, end) in enumerate(zip(recipe.stages, ends, strict=True)):
        dispatches, losses = 0, []
        while (now := time.time()) < end:
            progress = (now - begin) / (deadline - begin)
            dispatches += 1
            chosen = 0 if recipe.replay and dispatches % recipe.replay == 0 else number
            steps = max(1, int(min(recipe.dispatch_seconds, end - now) / paces[chosen]))
            state, loss, norm = executables[chosen](state, key, steps, progress)
            loss = float(loss)  # waits for the device
            paces[chosen] = (time.time() - now) / steps
            losses += [loss] * (chosen == number)
            if losses and time.time() > min(logged + 10, end):
                logged = time.time()
                report = "step %d, %2.0f %%: %s, loss %.4f, gradient %.3f, %.1f ms a step"
                log.info(report, state.step, 100 * progress, stage, np.mean(losses), norm, 1e3 * paces[number])
                losses.clear()
        write_checkpoint(recipe.diffusers_tensors(state.ema), recipe.diffusers_config(), out)
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.ema)


# Judgement.


def judge_samples(
    recipe: Recipe,
    samples: dict[str, tuple[jax.Array, jax.Array]],
    make_images: Callable[[jax.Array, int], tuple[jax.Array, jax.Array]],
    *,
    seconds: float,
    seed: int,
    out: Path,
    **more: Any,
) -> None:
    """Write to judge.json how often a judge names what is on real images and on samples, with all that led there.

    Args:
        samples: images [B, S, S, 3] and labels [B, 4], by name.
        make_images: real ones of the samples' size, make_images(key, batch).
        seconds: of the judge's training.
        more: for judge.json.
    """
    judge, loss = train_judge(seconds, partial(make_images, batch=recipe.judge_batch), seed=seed)
    log.info("judge trained, loss %.4f", loss)
    real = jax.jit(make_images, static_argnums=1)(jax.random.key(1000), 4 * recipe.judge_batch)
    accuracy = {name: accuracies(judge, *pair) for name, pair in ({"real": real} | samples).items()}
    for name, shares in accuracy.items():
        log.info("%s: %s", name, ", ".join(f"{attribute} {share:.3f}" for attribute, share in shares.items()))
    report = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "recipe": asdict(recipe)}
    (out / "judge.json").write_text(json.dumps(report | {"accuracy": accuracy} | more, indent=1))
    log.info("done")

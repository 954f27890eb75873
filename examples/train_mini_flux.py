"""Train a small FLUX on procedural images within a time budget, export it in diffusers' layout, and judge its samples.

    python examples/train_mini_flux.py --seconds 460 --out mini-flux    one H100
    python examples/train_mini_flux.py --toy --out toy                  a minute of any CPU

The network is chipmunk_jax.models.flux.Flux on pixels: 2x2 patches of RGB are its tokens. Weights are float32 here and
bf16 in the network; the exported ones are an exponential moving average (EMA).
"""

import argparse
import json
import logging
import math
import os
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, struct
from jax import lax
from judge import accuracies, train_judge, write_grid
from procgen_shapes import CLASSES, WORD_WIDTH, caption, make_images, save_vocabulary, word_rows, word_table
from safetensors.numpy import save_file

from chipmunk_jax.models.flux import Flux, FluxConfig

TEXT_TOKENS = 16  # four words, then zeros
SHARD_BYTES = 9_000_000  # small files travel better
# cuBLASLt alone: quicker to compile, as fast for these products. Without excess precision bf16 stays bf16 in memory.
XLA_FLAGS = "--xla_gpu_enable_triton_gemm=false --xla_allow_excess_precision=false"
MINI_FLUX = FluxConfig(
    in_channels=12,  # a 2x2 patch of RGB
    vec_in_dim=WORD_WIDTH,
    context_in_dim=WORD_WIDTH,
    hidden_size=256,
    num_heads=2,
    depth=2,
    depth_single_blocks=4,
    guidance_embed=False,
)
log = logging.getLogger("train_mini_flux")


@dataclass(frozen=True)
class Stage:
    """A share of the training time spent on images of one size."""

    share: float
    size: int  # pixels
    batch: int


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how."""

    model: FluxConfig = MINI_FLUX
    stages: tuple[Stage, ...] = (Stage(0.2, 32, 512), Stage(0.8, 64, 128))
    learning_rate: float = 1e-3
    final_learning_rate: float = 5e-5
    warmup_steps: int = 300
    weight_decay: float = 0.01
    ema: float = 0.999
    uniform: float = 0.1  # share of samples with uniform t: the ends of the schedule must be seen
    drop: float = 0.1  # share of samples without text, for guidance
    sampling_steps: int = 28
    samples: tuple[int, int] = (64, 256)  # size and number, judged
    large_samples: tuple[int, int] = (128, 16)  # looked at
    judge_batch: int = 256
    judge_seconds: float = 15.0
    reserve: float = 55.0  # seconds kept for samples and judge
    dispatch_seconds: float = 1.5  # of micro-steps between two looks at the clock


TOY = Recipe(
    model=replace(MINI_FLUX, hidden_size=64, axes_dim=(8, 12, 12), depth=1, depth_single_blocks=2),
    stages=(Stage(0.4, 8, 8), Stage(0.6, 16, 8)),
    samples=(8, 16),
    large_samples=(16, 4),
    judge_batch=16,
    judge_seconds=3.0,
    reserve=20.0,
)


@struct.dataclass
class TrainState:
    """Everything that a step changes."""

    params: nnx.State  # f32
    ema: nnx.State  # f32, like params
    moments: optax.OptState
    step: jax.Array  # i32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="all of the run's wall-clock time (default: 460, toy 60)")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, samples, info.txt and judge.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--toy", action="store_true", help="a tiny model on tiny images, to test this script")
    args = parser.parse_args()
    recipe, seconds = (TOY if args.toy else Recipe()), args.seconds or (60 if args.toy else 460)
    deadline = time.time() + seconds - recipe.reserve
    flags = "--xla_backend_optimization_level=0" if args.toy else XLA_FLAGS  # the toy is all compilation
    os.environ.setdefault("XLA_FLAGS", flags)  # read when the first array is made
    start_log(args.out)

    graph, state = init_state(recipe, args.seed)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    log.info("jax %s, %s, %.2f M parameters", jax.__version__, jax.devices()[0].device_kind, parameters / 1e6)
    train, sample = compile_all(recipe, graph, state)
    state = run_training(recipe, state, train, args, deadline)
    weights = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.ema)
    del state  # frees the optimiser's memory
    accuracy = judge_weights(recipe, sample, weights, args)
    report = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "recipe": asdict(recipe)}
    (args.out / "judge.json").write_text(json.dumps(report | {"accuracy": accuracy}, indent=1))
    log.info("done")


def start_log(out: Path) -> None:
    """Messages with the milliseconds since the start go to the screen and to info.txt."""
    out.mkdir(parents=True, exist_ok=True)
    log.setLevel(logging.INFO)
    for handler in (logging.StreamHandler(sys.stdout), logging.FileHandler(out / "info.txt", mode="w")):
        handler.setFormatter(logging.Formatter("[%(relativeCreated)7d ms] %(message)s"))
        log.addHandler(handler)


# Model and objective.


def init_state(recipe: Recipe, seed: int) -> tuple[nnx.GraphDef, TrainState]:
    """The graph of the bf16 network, and its float32 start: modulations and the last layer at zero (adaLN-zero)."""
    make = lambda: nnx.split(Flux(recipe.model, dtype=jnp.bfloat16, rngs=nnx.Rngs(seed)))

    def start(path, leaf):
        names = {str(getattr(key, "key", key)) for key in path}
        return jnp.zeros(leaf.shape) if names & {"modulation", "final", "img_out"} else leaf.astype(jnp.float32)

    @jax.jit  # one program instead of hundreds
    def init():
        params = jax.tree_util.tree_map_with_path(start, make()[1])
        return TrainState(params, jax.tree.map(jnp.copy, params), optimizer(recipe).init(params), jnp.int32(0))

    return jax.eval_shape(make)[0], init()


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
    """Mean squared error of the velocity noise - image at a random time, on a fresh batch."""
    image_key, time_key, noise_key, drop_key = jax.random.split(key, 4)
    images, labels = make_images(image_key, stage.batch, stage.size)
    image = patchify(images)
    t = random_times(time_key, stage.batch, image.shape[1], recipe.uniform)
    noise = jax.random.normal(noise_key, image.shape)
    noisy = image + t[:, None, None] * (noise - image)
    cond = condition(labels, jax.random.bernoulli(drop_key, 1 - recipe.drop, t.shape))

    model = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    model.unroll = True
    velocity, _ = model(noisy, t, cond, grid_positions(stage.size))
    return jnp.square(velocity - (noise - image)).mean()


def random_times(key: jax.Array, batch: int, tokens: int, uniform: float) -> jax.Array:
    """Times [B] in 0..1: logit-normal, some uniform, all shifted to noise as the sampler's are (Esser et al., 2024)."""
    normal_key, uniform_key, choice_key = jax.random.split(key, 3)
    logits = jnp.where(
        jax.random.bernoulli(choice_key, uniform, (batch,)),
        jax.scipy.special.logit(jax.random.uniform(uniform_key, (batch,), minval=1e-4, maxval=1 - 1e-4)),
        jax.random.normal(normal_key, (batch,)),
    )
    return jax.nn.sigmoid(logits + time_shift(tokens))


def time_shift(tokens: int) -> float:
    """FLUX's mu: 0.5 at 256 tokens, 1.15 at 4,096."""
    return 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)


def condition(labels: jax.Array, keep: jax.Array) -> dict[str, jax.Array]:
    """Text [B, 16, 64] and pooled text [B, 64] of labels [B, 4]; zeros where keep [B] is false."""
    words = jnp.asarray(word_table())[word_rows(labels)] * keep[:, None, None]
    return {"text": jnp.pad(words, ((0, 0), (0, TEXT_TOKENS - 4), (0, 0))), "pooled": words.sum(1) / 2}


def grid_positions(size: int) -> jax.Array:
    """(0, row, column) of every 2x2 patch, row by row: i32 [N, 3]."""
    rows, columns = jnp.indices((size // 2, size // 2))
    return jnp.stack([jnp.zeros_like(rows), rows, columns], axis=-1).reshape(-1, 3)


def patchify(images: jax.Array) -> jax.Array:
    """Images [B, S, S, 3] as tokens [B, (S / 2)^2, 12], a token being (channel, row, column) of its patch."""
    batch, size = images.shape[:2]
    patches = images.reshape(batch, size // 2, 2, size // 2, 2, 3).transpose(0, 1, 3, 5, 2, 4)
    return patches.reshape(batch, -1, 12)


def unpatchify(tokens: jax.Array) -> jax.Array:
    """The inverse of patchify."""
    batch, half = tokens.shape[0], math.isqrt(tokens.shape[1])
    return tokens.reshape(batch, half, half, 3, 2, 2).transpose(0, 1, 4, 2, 5, 3).reshape(batch, 2 * half, 2 * half, 3)


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


def compile_all(recipe: Recipe, graph, state: TrainState) -> tuple[list[Future], dict[int, Future]]:
    """Executables to be of train_steps by stage and of sample_images by image size; the training waits for its own only."""
    state, key = jax.eval_shape(lambda: (state, jax.random.key(0)))
    weights = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), state.ema)
    pool = ThreadPoolExecutor(len(recipe.stages))  # the stages first

    def submit(name, function, *args, **options):
        def compile_one():
            start = time.time()
            compiled = jax.jit(function, **options).lower(*args).compile()
            memory = compiled.memory_analysis().temp_size_in_bytes / 2**30
            log.info("compiled %s in %.0f s: %.1f GiB", name, time.time() - start, memory)
            return compiled

        return pool.submit(compile_one)

    train = [
        submit(f"{one.size} px", partial(train_steps, graph, recipe, one), state, key, 1, 0.0, donate_argnums=0)
        for one in recipe.stages
    ]
    sample = {}
    for size, count in (recipe.samples, recipe.large_samples):
        labels = jax.ShapeDtypeStruct((count, len(CLASSES)), jnp.int32)
        sample[size] = submit(
            f"{size} px samples", partial(sample_images, graph, recipe, size), weights, labels, key, 1.0
        )
    return train, sample


def run_training(recipe: Recipe, state: TrainState, train: list[Future], args, deadline: float) -> TrainState:
    """The state when the time is over; its EMA is exported after every stage."""
    executables = [one.result() for one in train]
    key, begin, logged = jax.random.key(args.seed + 1), time.time(), 0.0
    deadline = max(deadline, begin + 5)  # a slow compiler must not leave the weights untrained
    ends = begin + (deadline - begin) * np.cumsum([stage.share for stage in recipe.stages])
    for stage, run, end in zip(recipe.stages, executables, ends, strict=True):
        steps, losses = 1, []
        while (now := time.time()) < end:
            progress = (now - begin) / (deadline - begin)
            state, loss, norm = run(state, key, steps, progress)
            losses.append(float(loss))  # waits for the device
            pace = (time.time() - now) / steps
            steps = max(1, int(min(recipe.dispatch_seconds, end - time.time()) / pace))
            if time.time() > min(logged + 10, end):
                logged = time.time()
                report = "step %d, %2.0f %%: %d px, loss %.4f, gradient %.3f, %.1f ms a step"
                log.info(report, state.step, 100 * progress, stage.size, np.mean(losses), norm, 1e3 * pace)
                losses.clear()
        export(state.ema, recipe.model, args.out)
    return state


# Samples.


def sample_images(graph, recipe: Recipe, size: int, params, labels, key, guidance) -> jax.Array:
    """Images [B, S, S, 3] of labels [B, 4] by Euler steps from noise at t = 1; guidance 1 is the plain model."""
    model, positions = nnx.merge(graph, params), grid_positions(size)
    keep = jnp.repeat(jnp.array([True, False]), len(labels))
    cond = condition(jnp.concatenate([labels, labels]), keep)
    noise = jax.random.normal(key, (len(labels), len(positions), 12))
    times = shifted_times(recipe.sampling_steps, len(positions))

    def step(i, x):
        both = jnp.concatenate([x, x])
        velocity, _ = model(both, jnp.full(len(both), times[i]), cond, positions)
        with_text, without = jnp.split(velocity, 2)
        return x + (times[i + 1] - times[i]) * (without + guidance * (with_text - without))

    return unpatchify(lax.fori_loop(0, recipe.sampling_steps, step, noise))


def shifted_times(steps: int, tokens: int) -> jax.Array:
    """Times from 1 to 0, [steps + 1], f32, dense near noise (FLUX's dynamic shift)."""
    times = np.linspace(1.0, 1.0 / steps, steps)
    shift = math.exp(time_shift(tokens))
    return jnp.asarray(np.append(shift / (shift + 1 / times - 1), 0), jnp.float32)


def judge_weights(recipe: Recipe, sample: dict, weights, args) -> dict[str, dict[str, float]]:
    """A judge's accuracies on real images and on samples with guidance 1 and 2; writes the grids on the way."""
    (size, count), (large, large_count) = recipe.samples, recipe.large_samples
    labels = np.random.RandomState(7).randint(0, CLASSES, (count, len(CLASSES))).astype(np.int32)
    key, start = jax.random.key(args.seed + 2), time.time()
    samples = {f"guidance {g:g}": np.asarray(sample[size].result()(weights, labels, key, g)) for g in (1.0, 2.0)}
    write_grid(args.out / "grid64.png", samples["guidance 2"])
    large_samples = sample[large].result()(weights, labels[:large_count], key, 2.0)
    write_grid(args.out / "grid128.png", np.asarray(large_samples))
    log.info("%.1f s for samples of %s", time.time() - start, "; ".join(caption(label) for label in labels[:64]))
    judge, loss = train_judge(recipe.judge_seconds, size=size, batch=recipe.judge_batch, seed=args.seed)
    log.info("judge trained, loss %.4f", loss)
    pairs = {"real": jax.jit(make_images, static_argnums=(1, 2))(jax.random.key(1000), 4 * recipe.judge_batch, size)}
    pairs |= {name: (images, labels) for name, images in samples.items()}
    accuracy = {name: accuracies(judge, *pair) for name, pair in pairs.items()}
    for name, shares in accuracy.items():
        log.info("%s: %s", name, ", ".join(f"{attribute} {share:.3f}" for attribute, share in shares.items()))
    return accuracy


# Export.


def export(params: nnx.State, config: FluxConfig, out: Path) -> None:
    """Write bf16 weights and vocabulary as diffusers' FluxTransformer2DModel.from_pretrained reads them."""
    tensors = {name: np.asarray(array, jnp.bfloat16) for name, array in diffusers_tensors(params, config).items()}
    shards, room = [], 0
    for name in sorted(tensors):
        if tensors[name].nbytes > room:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = np.ascontiguousarray(tensors[name])
        room -= tensors[name].nbytes
    index = {"metadata": {"total_size": sum(array.nbytes for array in tensors.values())}, "weight_map": {}}
    for number, shard in enumerate(shards, start=1):
        file = f"diffusion_pytorch_model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, out / file, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(shard, file)
    (out / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (out / "config.json").write_text(json.dumps(diffusers_config(config), indent=1))
    save_vocabulary(out)


def diffusers_config(config: FluxConfig) -> dict:
    """config.json of FluxTransformer2DModel."""
    return {
        "_class_name": "FluxTransformer2DModel",
        "_diffusers_version": "0.32.0",
        "patch_size": 1,
        "in_channels": config.in_channels,
        "out_channels": None,
        "num_layers": config.depth,
        "num_single_layers": config.depth_single_blocks,
        "attention_head_dim": sum(config.axes_dim),
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.context_in_dim,
        "pooled_projection_dim": config.vec_in_dim,
        "guidance_embeds": config.guidance_embed,
        "axes_dims_rope": list(config.axes_dim),
    }


def diffusers_tensors(params: nnx.State, config: FluxConfig) -> dict[str, np.ndarray]:
    """Our weights under diffusers' names, transposed, split and joined as its layers are."""
    p = jax.tree.map(np.asarray, nnx.to_pure_dict(params))
    # Ours is (shift, scale), diffusers' (scale, shift).
    final = {name: np.roll(array, config.hidden_size, axis=-1) for name, array in p["final"]["linear"].items()}
    tensors = linear("x_embedder", p["img_in"]) | linear("context_embedder", p["txt_in"])
    tensors |= linear("norm_out.linear", final) | linear("proj_out", p["img_out"])
    for name, embedder in (("timestep_embedder", p["time_in"]), ("text_embedder", p["vector_in"])):
        tensors |= linear(f"time_text_embed.{name}.linear_1", embedder["in_layer"])
        tensors |= linear(f"time_text_embed.{name}.linear_2", embedder["out_layer"])
    for i in range(config.depth):
        block, prefix = jax.tree.map(lambda x, i=i: x[i], p["double_blocks"]), f"transformer_blocks.{i}."
        tensors |= {prefix + name: array for name, array in double_block(block).items()}
    for i in range(config.depth_single_blocks):
        block, prefix = jax.tree.map(lambda x, i=i: x[i], p["single_blocks"]), f"single_transformer_blocks.{i}."
        tensors |= {prefix + name: array for name, array in single_block(block).items()}
    return tensors


def double_block(block: dict) -> dict[str, np.ndarray]:
    img, txt = block["img"], block["txt"]
    tensors = qkv(img["attention"], ("to_q", "to_k", "to_v"), "norm_")
    tensors |= qkv(txt["attention"], ("add_q_proj", "add_k_proj", "add_v_proj"), "norm_added_")
    tensors |= linear("attn.to_out.0", img["proj"]) | linear("attn.to_add_out", txt["proj"])
    for stream, norm, feed_forward in ((img, "norm1", "ff"), (txt, "norm1_context", "ff_context")):
        mlp = stream["mlp"]
        tensors |= linear(f"{norm}.linear", stream["modulation"]["linear"])
        tensors |= {f"{feed_forward}.net.0.proj.weight": mlp["fc1"], f"{feed_forward}.net.0.proj.bias": mlp["b1"]}
        tensors |= {f"{feed_forward}.net.2.weight": mlp["fc2"].T, f"{feed_forward}.net.2.bias": mlp["b2"]}
    return tensors


def single_block(block: dict) -> dict[str, np.ndarray]:
    mlp = block["mlp"]
    tensors = qkv(block["qkv"], ("to_q", "to_k", "to_v"), "norm_")
    tensors |= linear("norm.linear", block["modulation"]["linear"])
    tensors |= {"proj_mlp.weight": mlp["fc1"], "proj_mlp.bias": mlp["b1"], "proj_out.bias": mlp["b2"]}
    return tensors | {"proj_out.weight": np.concatenate([block["proj"]["kernel"], mlp["fc2"]]).T}


def qkv(attention: dict, names: tuple[str, str, str], norm: str) -> dict[str, np.ndarray]:
    kernels, biases = (np.split(attention["linear"][name], 3, axis=-1) for name in ("kernel", "bias"))
    tensors = {f"attn.{norm}q.weight": attention["query_norm"], f"attn.{norm}k.weight": attention["key_norm"]}
    for name, kernel, bias in zip(names, kernels, biases, strict=True):
        tensors |= linear(f"attn.{name}", {"kernel": kernel, "bias": bias})
    return tensors


def linear(name: str, layer: dict) -> dict[str, np.ndarray]:
    return {f"{name}.weight": layer["kernel"].T, f"{name}.bias": layer["bias"]}


if __name__ == "__main__":
    main()

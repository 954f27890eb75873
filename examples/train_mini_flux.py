"""Train a small FLUX on procedural images within a time budget, export it in diffusers' layout, and judge its samples.

    python examples/train_mini_flux.py --seconds 460 --out mini-flux    one H100
    python examples/train_mini_flux.py --toy --out toy                  a minute of any CPU

The network is chipmunk_jax.models.flux.Flux on pixels: 2x2 patches of RGB are its tokens. Weights are float32 here and
bf16 in the network; the exported ones are an exponential moving average (EMA).
"""

import argparse
import math
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from export import linear, linears
from flax import nnx
from jax import lax
from judge import write_square
from procgen_shapes import CLASSES, WORD_WIDTH, caption, make_images
from training import (
    TOY_XLA_FLAGS,
    XLA_FLAGS,
    Recipe,
    Stage,
    compile_later,
    compile_stages,
    embed_words,
    init_state,
    judge_samples,
    log,
    pad_text,
    run_training,
    start_log,
)

from chipmunk_jax.models.flux import Flux, FluxConfig

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


@dataclass(frozen=True, kw_only=True)
class FluxRecipe(Recipe):
    """A FLUX on images."""

    model: FluxConfig = MINI_FLUX
    stages: tuple[Stage, ...] = (Stage(0.2, 32, 512), Stage(0.8, 64, 128))
    sampling_steps: int = 28
    samples: tuple[int, int] = (64, 256)  # size and number, judged
    large_samples: tuple[int, int] = (128, 16)  # looked at
    reserve: float = 55.0  # seconds kept for samples and judge

    def make_model(self, rngs):
        return Flux(self.model, dtype=jnp.bfloat16, rngs=rngs)

    def starts_at_zero(self, names):
        return bool(names & {"modulation", "final", "img_out"})

    def make_batch(self, key, stage):
        images, labels = make_images(key, stage.batch, stage.size)
        return patchify(images), labels

    def condition(self, labels, keep):
        words = embed_words(labels, keep)
        return {"text": pad_text(words), "pooled": words.sum(1) / 2}

    def positions(self, stage):
        return grid_positions(stage.size)

    def time_shift(self, tokens):
        """FLUX's mu: 0.5 at 256 tokens, 1.15 at 4,096."""
        return 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)

    def diffusers_tensors(self, params):
        return diffusers_tensors(params, self.model)

    def diffusers_config(self):
        return diffusers_config(self.model)


TOY = FluxRecipe(
    model=replace(MINI_FLUX, hidden_size=64, axes_dim=(8, 12, 12), depth=1, depth_single_blocks=2),
    stages=(Stage(0.4, 8, 8), Stage(0.6, 16, 8)),
    samples=(8, 16),
    large_samples=(16, 4),
    judge_batch=16,
    judge_seconds=3.0,
    reserve=20.0,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="all of the run's wall-clock time (default: 460, toy 60)")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, samples, info.txt and judge.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--toy", action="store_true", help="a tiny model on tiny images, to test this script")
    args = parser.parse_args()
    recipe, seconds = (TOY if args.toy else FluxRecipe()), args.seconds or (60 if args.toy else 460)
    deadline = time.time() + seconds - recipe.reserve
    os.environ.setdefault("XLA_FLAGS", TOY_XLA_FLAGS if args.toy else XLA_FLAGS)  # read when the first array is made
    start_log(args.out)

    graph, state = init_state(recipe, args.seed)
    pool = ThreadPoolExecutor(len(recipe.stages))  # the stages first; the training waits for its own only
    train = compile_stages(recipe, graph, state, pool)
    weights = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), state.ema)
    sample = compile_samplers(recipe, graph, weights, pool)
    weights = run_training(recipe, state, train, seed=args.seed, deadline=deadline, out=args.out)
    judge_weights(recipe, sample, weights, args)


# Tokens.


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


# Samples.


def compile_samplers(recipe: FluxRecipe, graph, weights, pool: ThreadPoolExecutor) -> dict[int, Future]:
    """Executables to be of sample_images, by image size."""
    sample, key = {}, jax.eval_shape(lambda: jax.random.key(0))
    for size, count in (recipe.samples, recipe.large_samples):
        labels = jax.ShapeDtypeStruct((count, len(CLASSES)), jnp.int32)
        function = partial(sample_images, graph, recipe, size)
        sample[size] = compile_later(pool, f"{size} px samples", function, weights, labels, key, 1.0)
    return sample


def sample_images(graph, recipe: FluxRecipe, size: int, params, labels, key, guidance) -> jax.Array:
    """Images [B, S, S, 3] of labels [B, 4] by Euler steps from noise at t = 1; guidance 1 is the plain model."""
    model, positions = nnx.merge(graph, params), grid_positions(size)
    keep = jnp.repeat(jnp.array([True, False]), len(labels))
    cond = recipe.condition(jnp.concatenate([labels, labels]), keep)
    noise = jax.random.normal(key, (len(labels), len(positions), 12))
    times = shifted_times(recipe.sampling_steps, recipe.time_shift(len(positions)))

    def step(i, x):
        both = jnp.concatenate([x, x])
        velocity, _ = model(both, jnp.full(len(both), times[i]), cond, positions)
        with_text, without = jnp.split(velocity, 2)
        return x + (times[i + 1] - times[i]) * (without + guidance * (with_text - without))

    return unpatchify(lax.fori_loop(0, recipe.sampling_steps, step, noise))


def shifted_times(steps: int, mu: float) -> jax.Array:
    """Times from 1 to 0, [steps + 1], f32, dense near noise (FLUX's dynamic shift)."""
    times = np.linspace(1.0, 1.0 / steps, steps)
    shift = math.exp(mu)
    return jnp.asarray(np.append(shift / (shift + 1 / times - 1), 0), jnp.float32)


def judge_weights(recipe: FluxRecipe, sample: dict[int, Future], weights, args) -> None:
    """Judge samples with guidance 1 and 2, and write grids of them."""
    (size, count), (large, large_count) = recipe.samples, recipe.large_samples
    labels = np.random.RandomState(7).randint(0, CLASSES, (count, len(CLASSES))).astype(np.int32)
    key, start = jax.random.key(args.seed + 2), time.time()
    samples = {f"guidance {g:g}": np.asarray(sample[size].result()(weights, labels, key, g)) for g in (1.0, 2.0)}
    write_square(args.out / "grid64.png", samples["guidance 2"])
    large_samples = sample[large].result()(weights, labels[:large_count], key, 2.0)
    write_square(args.out / "grid128.png", np.asarray(large_samples))
    log.info("%.1f s for samples of %s", time.time() - start, "; ".join(caption(label) for label in labels[:64]))
    pairs = {name: (images, labels) for name, images in samples.items()}
    make = lambda key, batch: make_images(key, batch, size)
    judge_samples(recipe, pairs, make, seconds=recipe.judge_seconds, seed=args.seed, out=args.out)


# Export.


def diffusers_config(config: FluxConfig) -> dict[str, Any]:
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
    tensors = {f"attn.{norm}q.weight": attention["query_norm"], f"attn.{norm}k.weight": attention["key_norm"]}
    return tensors | linears(tuple(f"attn.{name}" for name in names), attention["linear"])


if __name__ == "__main__":
    main()

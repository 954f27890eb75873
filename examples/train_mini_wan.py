"""Train a small Wan2.1 on procedural videos within a time budget, export it in diffusers' layout, and judge its samples.

    python examples/train_mini_wan.py --out mini-wan                        8 minutes of one H100
    python examples/train_mini_wan.py --start mini-wan --out mini-wan-128   as long, to go on with videos of 128 x 128 pixels
    python examples/train_mini_wan.py --toy --out toy                       a minute of any CPU

The network is chipmunk_jax.models.wan.Wan on pixels: 4x4 patches of RGB of one frame are its tokens. Weights are float32
here and bf16 in the network; the exported ones are an exponential moving average (EMA).
"""

import argparse
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from export import linear, linears
from flax import nnx
from judge import write_grid
from procgen_shapes import CLASSES, WORD_WIDTH, caption, make_videos
from training import (
    TOY_XLA_FLAGS,
    XLA_FLAGS,
    Recipe,
    Stage,
    compile_stages,
    embed_words,
    init_state,
    judge_samples,
    log,
    pad_text,
    run_training,
    start_log,
)

from chipmunk_jax import sample, shifted_timesteps
from chipmunk_jax.convert import read
from chipmunk_jax.models.wan import Wan, WanConfig

PATCH = 4  # pixels on a side of a token
SHIFT = 3.0  # of the sampler's times
JUDGED_FRAMES = 4  # in the middle of a clip
SHOWN_CLIPS = 8
MINI_WAN = WanConfig(
    dim=256,
    ffn_dim=1024,
    in_dim=3,
    out_dim=3,
    text_dim=WORD_WIDTH,
    num_heads=2,
    num_layers=8,
    patch_size=(1, PATCH, PATCH),
)


@dataclass(frozen=True, kw_only=True)
class WanRecipe(Recipe):
    """A Wan on videos."""

    model: WanConfig = MINI_WAN
    stages: tuple[Stage, ...] = (
        Stage(0.35, 32, 512, frames=8),
        Stage(0.30, 48, 96, frames=16),
        Stage(0.35, 64, 48, frames=16),
    )
    replay: int = 10
    sampling_steps: int = 30
    guidance: float = 3.0
    clips: int = 64  # sampled at once
    judge_batch: int = 512  # frames
    reserve: float = 100.0  # seconds kept for samples and judge

    def make_model(self, rngs):
        return Wan(self.model, dtype=jnp.bfloat16, rngs=rngs)

    def starts_at_zero(self, names):
        return bool(names & {"modulation", "time_projection", "cross_proj", "final", "head"})

    def make_batch(self, key, stage):
        videos, labels = make_videos(key, stage.batch, stage.frames, stage.size)
        return patchify(videos), labels

    def condition(self, labels, keep):
        return {"text": pad_text(embed_words(labels, keep))}

    def positions(self, stage):
        return jnp.indices(grid_of(stage)).reshape(3, -1).T

    def time_shift(self, tokens):
        """0 at 256 tokens and log(SHIFT) at 4,096."""
        return math.log(SHIFT) * min(max((tokens - 256) / (4096 - 256), 0), 1.2)

    def diffusers_tensors(self, params):
        return diffusers_tensors(params, self.model)

    def diffusers_config(self):
        return diffusers_config(self.model)


# From trained weights to four times the tokens, 16,384: rotary positions reach as far.
LARGER = WanRecipe(
    stages=(Stage(1.0, 128, 6, frames=16),),
    learning_rate=3e-4,
    warmup_steps=50,
    ema=0.99,
    replay=0,
    clips=16,
    judge_batch=128,
)
TOY = WanRecipe(
    model=replace(MINI_WAN, dim=64, ffn_dim=128, num_layers=2),
    stages=(Stage(0.5, 8, 16, frames=4), Stage(0.5, 16, 8, frames=4)),
    replay=3,
    sampling_steps=4,
    clips=4,
    judge_batch=32,
    judge_seconds=3.0,
    reserve=30.0,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="of training, compilation included (default: 420, toy 40)")
    parser.add_argument("--deadline", type=float, help="seconds until all is over, judged and written (default: 550)")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, samples, info.txt and judge.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="weights to go on from, with larger videos")
    parser.add_argument("--toy", action="store_true", help="a tiny model on tiny videos, to test this script")
    args = parser.parse_args()
    start, recipe = time.time(), TOY if args.toy else LARGER if args.start else WanRecipe()
    seconds, deadline = args.seconds or (40 if args.toy else 420), start + (args.deadline or 550)
    os.environ.setdefault("XLA_FLAGS", TOY_XLA_FLAGS if args.toy else XLA_FLAGS)  # read when the first array is made
    start_log(args.out)

    trained = args.start and read(args.start, "float32")
    if trained:
        recipe = replace(recipe, model=trained.config)
    graph, state = init_state(recipe, args.seed, trained)
    train = compile_stages(recipe, graph, state, ThreadPoolExecutor(len(recipe.stages)))
    end = min(start + seconds, deadline - recipe.reserve)
    weights = run_training(recipe, state, train, seed=args.seed, deadline=end, out=args.out)
    judge_weights(recipe, nnx.merge(graph, weights), args.seed, deadline, args.out)


# Tokens.


def grid_of(stage: Stage) -> tuple[int, int, int]:
    """Tokens of (frames, rows, columns)."""
    return stage.frames, stage.size // PATCH, stage.size // PATCH


def patchify(videos: jax.Array) -> jax.Array:
    """Videos [B, T, S, S, 3] as tokens [B, T (S / 4)^2, 48], a token being (row, column, channel) of its patch."""
    batch, frames, size = videos.shape[:3]
    patches = videos.reshape(batch, frames, size // PATCH, PATCH, size // PATCH, PATCH, 3).swapaxes(3, 4)
    return patches.reshape(batch, -1, 3 * PATCH**2)


def unpatchify(tokens: jax.Array, grid: tuple[int, int, int]) -> jax.Array:
    """The inverse of patchify, of tokens of a grid."""
    frames, rows, columns = grid
    patches = tokens.reshape(-1, frames, rows, columns, PATCH, PATCH, 3).swapaxes(3, 4)
    return patches.reshape(-1, frames, rows * PATCH, columns * PATCH, 3)


# Samples.


def sample_videos(recipe: WanRecipe, model: Wan, stage: Stage, labels: np.ndarray, key, guidance: float) -> np.ndarray:
    """Videos [B, T, S, S, 3] of labels [B, 4] by Euler steps; guidance 1 is the plain model, as one program serves all."""
    tokens = sample(
        model,
        jax.random.normal(key, (len(labels), math.prod(grid_of(stage)), 3 * PATCH**2)),
        recipe.condition(jnp.asarray(labels), jnp.ones(len(labels), bool)),
        timesteps=shifted_timesteps(recipe.sampling_steps, SHIFT),
        grid=grid_of(stage),
        guidance=guidance,
    )
    return np.asarray(unpatchify(tokens, grid_of(stage)))


def judge_weights(recipe: WanRecipe, model: Wan, seed: int, deadline: float, out: Path) -> None:
    """Judge frames and motion of samples with and without guidance, as much as the time allows."""
    last = recipe.stages[-1]
    labels = np.random.RandomState(7).randint(0, CLASSES, (recipe.clips, len(CLASSES))).astype(np.int32)
    clips = sample_clips(recipe, model, labels, seed, deadline, out)
    real, _ = jax.jit(make_videos, static_argnums=(1, 2, 3))(jax.random.key(1000), recipe.clips, last.frames, last.size)
    motion = {name: motion_of(videos) for name, videos in ({"real": np.asarray(real)} | clips).items()}
    log.info("mean change from frame to frame: %s", ", ".join(f"{name} {x:.4f}" for name, x in motion.items()))
    pairs = {name: middle_frames(videos, labels) for name, videos in clips.items()}
    make = partial(make_frames, frames=last.frames, size=last.size)
    # Compiling the judge takes as long again.
    seconds = max(1.0, min(recipe.judge_seconds, deadline - time.time() - 2 * recipe.judge_seconds))
    judge_samples(recipe, pairs, make, seconds=seconds, seed=seed, out=out, motion=motion)


def sample_clips(recipe: WanRecipe, model: Wan, labels, seed: int, deadline: float, out: Path) -> dict[str, np.ndarray]:
    """Videos with guidance and, if there is time, without; writes a sheet of each, a clip a row."""
    log.info("clips: %s", "; ".join(caption(label) for label in labels[:SHOWN_CLIPS]))
    last, clips = recipe.stages[-1], {}
    for guidance in (recipe.guidance, 1.0):
        start, name = time.time(), f"guidance {guidance:g}"
        clips[name] = sample_videos(recipe, model, last, labels, jax.random.key(seed + 2), guidance)
        write_grid(out / f"{name.replace(' ', '-')}.png", clips[name][:SHOWN_CLIPS])
        taken = time.time() - start
        log.info("%s: %.1f s for %d clips of %s", name, taken, len(labels), last)
        if deadline - time.time() < taken + 3 * recipe.judge_seconds:
            log.info("no time for more clips")
            break
    return clips


def make_frames(key: jax.Array, batch: int, *, frames: int, size: int) -> tuple[jax.Array, jax.Array]:
    """All frames of as many videos as make up the batch, [B, S, S, 3], and their labels [B, 4]."""
    videos, labels = make_videos(key, batch // frames, frames, size)
    return videos.reshape(-1, size, size, 3), jnp.repeat(labels, frames, axis=0)


def middle_frames(videos: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The frames in the middle of videos [B, T, S, S, 3], and their labels."""
    first = (videos.shape[1] - JUDGED_FRAMES) // 2
    frames = videos[:, first : first + JUDGED_FRAMES]
    return frames.reshape(-1, *frames.shape[2:]), np.repeat(labels, JUDGED_FRAMES, axis=0)


def motion_of(videos: np.ndarray) -> float:
    """Mean absolute difference of neighbouring frames, 2 being from black to white."""
    return round(float(np.abs(np.diff(np.clip(videos, -1, 1), axis=1)).mean()), 4)


# Export.


def diffusers_config(config: WanConfig) -> dict[str, Any]:
    """config.json of WanTransformer3DModel."""
    return {
        "_class_name": "WanTransformer3DModel",
        "_diffusers_version": "0.42.1",
        "patch_size": list(config.patch_size),
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.in_dim,
        "out_channels": config.out_dim,
        "text_dim": config.text_dim,
        "freq_dim": config.freq_dim,
        "ffn_dim": config.ffn_dim,
        "num_layers": config.num_layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "image_dim": None,
        "added_kv_proj_dim": None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": None,
    }


def diffusers_tensors(params: nnx.State, config: WanConfig) -> dict[str, np.ndarray]:
    """Our weights under diffusers' names, transposed and split as its layers are."""
    p = jax.tree.map(np.asarray, nnx.to_pure_dict(params))
    patches = p["patch_in"]["kernel"].T.reshape(-1, *config.patch_size, config.in_dim)
    tensors = {"patch_embedding.weight": np.moveaxis(patches, -1, 1), "patch_embedding.bias": p["patch_in"]["bias"]}
    text, times = "condition_embedder.text_embedder", "condition_embedder.time_embedder"
    tensors |= linear(f"{text}.linear_1", p["text_in"]) | linear(f"{text}.linear_2", p["text_out"])
    tensors |= linear(f"{times}.linear_1", p["time_in"]["in_layer"])
    tensors |= linear(f"{times}.linear_2", p["time_in"]["out_layer"])
    tensors |= linear("condition_embedder.time_proj", p["time_projection"])
    tensors |= {"scale_shift_table": p["final"][None]} | linear("proj_out", p["head"])
    for i in range(config.num_layers):
        block = block_tensors(jax.tree.map(lambda x, i=i: x[i], p["blocks"]))
        tensors |= {f"blocks.{i}.{name}": array for name, array in block.items()}
    return tensors


def block_tensors(block: dict) -> dict[str, np.ndarray]:
    qkv, mlp = block["qkv"], block["mlp"]
    tensors = linears(("attn1.to_q", "attn1.to_k", "attn1.to_v"), qkv["linear"])
    tensors |= linear("attn1.to_out.0", block["proj"])
    tensors |= linear("attn2.to_q", block["cross_q"]) | linears(("attn2.to_k", "attn2.to_v"), block["cross_kv"])
    tensors |= linear("attn2.to_out.0", block["cross_proj"])
    tensors |= {"attn1.norm_q.weight": qkv["query_norm"], "attn1.norm_k.weight": qkv["key_norm"]}
    tensors |= {"attn2.norm_q.weight": block["cross_query_norm"], "attn2.norm_k.weight": block["cross_key_norm"]}
    tensors |= {"norm2.weight": block["cross_norm"], "norm2.bias": block["cross_norm_bias"]}
    tensors |= {"ffn.net.0.proj.weight": mlp["fc1"], "ffn.net.0.proj.bias": mlp["b1"]}
    tensors |= {"ffn.net.2.weight": mlp["fc2"].T, "ffn.net.2.bias": mlp["b2"]}
    return tensors | {"scale_shift_table": block["modulation"][None]}


if __name__ == "__main__":
    main()

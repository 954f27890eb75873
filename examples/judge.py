"""A small convolutional classifier of the four attributes, trained in seconds, and grids to look at."""

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from PIL import Image
from procgen_shapes import ATTRIBUTES, CLASSES

PEAK_LEARNING_RATE, WARMUP_STEPS = 2e-3, 50
LARGEST_NOISE = 0.08  # added to training images, so that small artefacts of a sampler do not mislead the judge
MakeImages = Callable[[jax.Array], tuple[jax.Array, jax.Array]]  # key -> images [B, S, S, 3] in -1..1, labels [B, 4]


class Judge(nnx.Module):
    """Logits of every attribute's classes."""

    def __init__(self, rngs: nnx.Rngs, widths: tuple[int, ...] = (64, 128, 256, 256)):
        inputs = (3, *widths[:-1])
        self.convolutions = nnx.List(
            nnx.Conv(n, m, (3, 3), strides=1 if n == 3 else 2, dtype=jnp.bfloat16, rngs=rngs)
            for n, m in zip(inputs, widths, strict=True)
        )
        self.norms = nnx.List(nnx.GroupNorm(m, num_groups=1, dtype=jnp.bfloat16, rngs=rngs) for m in widths)
        self.head = nnx.Linear(2 * widths[-1], sum(CLASSES), rngs=rngs)

    def __call__(self, images: jax.Array) -> list[jax.Array]:
        """A list of f32 [B, classes], one an attribute, from images [B, S, S, 3]."""
        x = images
        for layer, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = convolution(x)
            if layer == 0:
                x = nnx.max_pool(x, (2, 2), strides=(2, 2))
            x = jax.nn.relu(norm(x))
        pooled = jnp.concatenate([x.mean((1, 2)), x.max((1, 2))], axis=-1).astype(jnp.float32)
        return jnp.split(self.head(pooled), np.cumsum(CLASSES)[:-1], axis=-1)


def train_judge(seconds: float, make_images: MakeImages, *, seed: int) -> tuple[Judge, float]:
    """A judge of make_images(key) after about `seconds` (its compilation comes on top), and its last loss."""
    graph, params = nnx.split(Judge(nnx.Rngs(seed)))
    optimizer = optax.scale_by_adam(b2=0.99)
    state = (params, optimizer.init(params), jnp.int32(0), jnp.float32(0))
    train = partial(_train_steps, graph, optimizer, make_images)
    train = jax.jit(train, donate_argnums=0).lower(state, jax.random.key(seed), 1, 0.0).compile()
    start, steps, pace = time.time(), 1, 0.0
    while (elapsed := time.time() - start) < seconds:
        state = jax.block_until_ready(train(state, jax.random.key(seed), steps, elapsed / seconds))
        pace = (time.time() - start - elapsed) / steps
        steps = max(1, min(100, int(0.5 / pace)))
    return nnx.merge(graph, state[0]), float(state[-1])


def accuracies(judge: Judge, images: jax.Array, labels: jax.Array) -> dict[str, float]:
    """Share of images [B, S, S, 3] whose class the judge names as labels [B, 4] do, by attribute and for all four."""
    logits = _logits(judge, jnp.clip(images, -1, 1))
    right = np.stack([np.asarray(one.argmax(-1)) for one in logits], axis=-1) == np.asarray(labels)
    shares = dict(zip(ATTRIBUTES, right.mean(0), strict=True)) | {"all": right.all(1).mean()}
    return {name: round(float(share), 4) for name, share in shares.items()}


def write_square(path: Path, images: np.ndarray, most: int = 64) -> None:
    """Write the first images of [B, S, S, 3] in -1..1 as a square PNG."""
    side = math.isqrt(min(most, len(images)))
    write_grid(path, images[: side * side].reshape(side, side, *images.shape[1:]))


def write_grid(path: Path, images: np.ndarray) -> None:
    """Write images [rows, columns, S, S, 3] in -1..1 as one PNG."""
    rows, columns, size = images.shape[:3]
    pixels = np.uint8(np.clip((images + 1) * 127.5 + 0.5, 0, 255))
    Image.fromarray(pixels.swapaxes(1, 2).reshape(rows * size, columns * size, 3)).save(path)


@nnx.jit
def _logits(judge: Judge, images: jax.Array) -> list[jax.Array]:
    return judge(images)


def _train_steps(graph, optimizer, make_images, state, key, steps, progress):
    """The state after `steps` steps, all in one dispatch; progress is the share of the time that has passed."""

    def step(_, state):
        params, moments, count, _ = state
        loss, grads = jax.value_and_grad(_loss)(params, graph, make_images, jax.random.fold_in(key, count))
        updates, moments = optimizer.update(grads, moments)
        rate = PEAK_LEARNING_RATE * (0.51 + 0.49 * jnp.cos(jnp.pi * progress))
        rate = rate * jnp.minimum(1, (count + 1) / WARMUP_STEPS)
        params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
        return params, moments, count + 1, loss

    return lax.fori_loop(0, steps, step, state)


def _loss(params, graph, make_images, key):
    image_key, level_key, noise_key = jax.random.split(key, 3)
    images, labels = make_images(image_key)
    level = jax.random.uniform(level_key, (len(images), 1, 1, 1), maxval=LARGEST_NOISE)
    logits = nnx.merge(graph, params)(images + level * jax.random.normal(noise_key, images.shape))
    losses = (optax.softmax_cross_entropy_with_integer_labels(one, y) for one, y in zip(logits, labels.T, strict=True))
    return sum(one.mean() for one in losses)

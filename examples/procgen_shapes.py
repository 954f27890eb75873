"""Procedural images and videos with exact labels: a lit, textured shape with a soft shadow before a cloudy background.

In a video the shape flies, turns and bounces off the border, and the clouds drift.

Seedable, pure JAX, no files: a batch is generated on the device inside the training step. Four attributes label an
image, one word of each makes its caption ("red striped heart on meadow"), and fixed random vectors of the words stand
for a text encoder.
"""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

ATTRIBUTES = {
    "shape": ("disc", "square", "triangle", "star", "ring", "cross", "hexagon", "heart"),
    "colour": ("red", "orange", "yellow", "green", "teal", "blue", "purple", "white"),
    "texture": ("plain", "striped", "checkered", "marbled"),
    "background": ("sky", "night", "desert", "meadow"),
}
CLASSES = tuple(len(words) for words in ATTRIBUTES.values())
WORD_WIDTH = 64  # of an embedding

# RGB in 0..1, in the order of the words above.
COLOURS = np.array(
    [
        (0.90, 0.16, 0.18),
        (0.98, 0.55, 0.10),
        (0.97, 0.85, 0.20),
        (0.20, 0.70, 0.30),
        (0.15, 0.70, 0.75),
        (0.20, 0.35, 0.90),
        (0.60, 0.25, 0.80),
        (0.92, 0.92, 0.92),
    ],
    np.float32,
)
BACKGROUNDS = np.array(  # two colours each, mixed from top to bottom
    [
        ((0.55, 0.75, 0.95), (0.95, 0.95, 0.90)),
        ((0.10, 0.10, 0.22), (0.30, 0.22, 0.40)),
        ((0.80, 0.68, 0.50), (0.40, 0.30, 0.20)),
        ((0.35, 0.60, 0.35), (0.75, 0.85, 0.60)),
    ],
    np.float32,
)
TURN, HALF_TURN = 6.2832, 3.1416
BORDER = 0.6  # where centres bounce
DURATION = 1.5  # of a video
DRIFT = 0.25  # of the clouds' speed in the shape's


def make_images(key: jax.Array, batch: int, size: int) -> tuple[jax.Array, jax.Array]:
    """images [B, S, S, 3], f32 in -1..1, and labels [B, 4], i32: the classes in the order of ATTRIBUTES."""

    def draw(key):
        scene = _make_scene(key)
        return _draw(scene, size), scene.label

    with jax.default_matmul_precision("highest"):  # TF32 would jitter the outlines
        return jax.vmap(draw)(jax.random.split(key, batch))


def make_videos(key: jax.Array, batch: int, frames: int, size: int) -> tuple[jax.Array, jax.Array]:
    """videos [B, T, S, S, 3], f32 in -1..1, and labels [B, 4]; make_images(key, batch, size) are their first frames."""
    times = DURATION * jnp.arange(frames) / frames

    def film(key):
        scene = _make_scene(key)
        return jax.vmap(lambda time: _draw(_after(scene, time), size))(times), scene.label

    with jax.default_matmul_precision("highest"):
        return jax.vmap(film)(jax.random.split(key, batch))


def word_table() -> np.ndarray:
    """Embeddings of all words in the order of ATTRIBUTES, f32 [24, 64]; RandomState's stream is the same everywhere."""
    return np.random.RandomState(20240801).standard_normal((sum(CLASSES), WORD_WIDTH)).astype(np.float32)


def save_vocabulary(folder: Path) -> None:
    """Write words.json and word_embeddings.safetensors."""
    order = "the row of a word is its place in the concatenation of the four lists"
    words = {"attributes": list(ATTRIBUTES), "words": list(ATTRIBUTES.values()), "order": order}
    (folder / "words.json").write_text(json.dumps(words, indent=1))
    save_file({"embeddings": word_table()}, folder / "word_embeddings.safetensors")


def word_rows(labels: jax.Array) -> jax.Array:
    """Rows of word_table() for labels [B, 4]: i32 [B, 4]."""
    return labels + jnp.cumsum(jnp.array((0, *CLASSES[:-1])))


def caption(label) -> str:
    """The sentence for one label [4]."""
    shape, colour, texture, background = (words[i] for words, i in zip(ATTRIBUTES.values(), label, strict=True))
    return f"{colour} {texture} {shape} on {background}"


class _Scene(NamedTuple):
    """What is seen at one time, and how it moves."""

    label: jax.Array  # i32 [4]
    centre: jax.Array  # [2], x and y in -1..1
    angle: jax.Array
    scale: jax.Array
    light: jax.Array  # [3], where it comes from
    surface_key: jax.Array
    clouds_key: jax.Array
    velocity: jax.Array  # [2], of the centre until it bounces
    spin: jax.Array
    drift: jax.Array | float = 0.0  # [2], of the clouds so far


def _make_scene(key: jax.Array) -> _Scene:
    keys = jax.random.split(key, 12)
    light = jax.random.uniform(keys[9], (2,), minval=-1, maxval=1) + jnp.array([0.0, -1.2])
    return _Scene(
        label=jnp.stack([jax.random.randint(k, (), 0, n) for k, n in zip(keys[:4], CLASSES, strict=True)]),
        centre=-jax.random.uniform(keys[4], (2,), minval=-0.35, maxval=0.35),
        angle=jax.random.uniform(keys[6], (), maxval=6.28),
        scale=jax.random.uniform(keys[8], (), minval=0.38, maxval=0.62),
        light=_unit(jnp.append(light, 1.2)),
        surface_key=keys[10],
        clouds_key=keys[11],
        velocity=-jax.random.uniform(keys[5], (2,), minval=-0.7, maxval=0.7),
        spin=jax.random.uniform(keys[7], (), minval=-2.5, maxval=2.5),
    )


def _after(scene: _Scene, time: jax.Array) -> _Scene:
    """The scene so much later."""
    way = (scene.centre + scene.velocity * time - BORDER) % (4 * BORDER)  # there and back again
    centre = jnp.abs(way - 2 * BORDER) - BORDER
    drift = DRIFT * time * scene.velocity
    return scene._replace(centre=centre, angle=scene.angle + scene.spin * time, drift=drift)


def _draw(scene: _Scene, size: int) -> jax.Array:
    """The image [S, S, 3] of a scene."""
    shape, colour, texture, background = scene.label
    angle, scale = scene.angle, scene.scale
    rotation = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
    to_object = lambda points: ((points - scene.centre) / scale) @ rotation
    distance = lambda points: _signed_distance(shape, to_object(points)) * scale
    axis = (jnp.arange(size) + 0.5) / size * 2 - 1
    points = jnp.stack(jnp.meshgrid(axis, axis, indexing="xy"), -1)  # [S, S, 2] in -1..1
    inside = distance(points)  # negative inside

    facing = jnp.clip(_normals(distance, points, inside, scale, 2.0 / size) @ scene.light, 0, 1)
    surface = _surface(texture, to_object(points), scene.surface_key)
    body = jnp.asarray(COLOURS)[colour] * (surface * (0.25 + 0.8 * facing))[..., None] + 0.35 * (facing**24)[..., None]
    shadow = 0.45 * jax.nn.sigmoid(-distance(points - jnp.array([0.10, 0.14])) / 0.05)[..., None]
    behind = _backdrop(background, points, scene.drift, scene.clouds_key) * (1 - shadow)
    coverage = jax.nn.sigmoid(-inside * size * 0.9)[..., None]  # an antialiased edge
    return jnp.clip(behind * (1 - coverage) + body * coverage, 0, 1) * 2 - 1


def _signed_distance(shape: jax.Array, points: jax.Array) -> jax.Array:
    """Roughly the distance to the outline of a shape of unit size, negative inside, at points [.., 2] of its frame."""
    x, y = points[..., 0], points[..., 1]
    radius, angle = jnp.hypot(x, y), jnp.arctan2(y, x)
    polygon = lambda sides: radius * jnp.cos((angle % (TURN / sides)) - HALF_TURN / sides) - 0.8
    bar = lambda u, v: jnp.maximum(jnp.abs(u) - 0.28, jnp.abs(v) - 0.85)
    distances = {
        "disc": radius - 0.85,
        "square": jnp.maximum(jnp.abs(x), jnp.abs(y)) - 0.75,
        "triangle": polygon(3) + 0.2,
        "star": radius - (0.62 + 0.30 * jnp.cos(5 * angle)),
        "ring": jnp.abs(radius - 0.65) - 0.22,
        "cross": jnp.minimum(bar(x, y), bar(y, x)),
        "hexagon": polygon(6),
        "heart": jnp.hypot(x, (0.25 - 1.1 * y) - 0.75 * jnp.sqrt(jnp.abs(x) + 1e-6)) - 0.78,
    }
    return jnp.select([shape == i for i in range(len(distances))], [distances[w] for w in ATTRIBUTES["shape"]])


def _normals(distance, points, inside, scale, step) -> jax.Array:
    """Unit normals [S, S, 3] of a pillow over the shape: steep at its edge, flat in its middle."""
    slopes = [distance(points + step * direction) - inside for direction in jnp.eye(2)]
    height = jnp.clip(-inside / (0.5 * scale), 0, 1)
    across = jnp.stack(slopes, -1) / step * (1 - height)[..., None]
    return _unit(jnp.concatenate([across, (0.35 + height)[..., None]], -1))


def _surface(texture: jax.Array, points: jax.Array, key: jax.Array) -> jax.Array:
    """Brightness [S, S] of the texture at points of the shape's frame."""
    x, y = points[..., 0], points[..., 1]
    striped = 0.55 + 0.45 * jnp.tanh(6 * jnp.sin(9 * x))
    checkered = 0.55 + 0.45 * jnp.tanh(8 * jnp.sin(8 * x) * jnp.sin(8 * y))
    marbled = 0.65 + 0.35 * _smooth_noise(key, points, octaves=4)
    return jnp.select([texture == i for i in range(4)], [jnp.ones_like(x), striped, checkered, marbled])


def _backdrop(background: jax.Array, points: jax.Array, drift: jax.Array | float, key: jax.Array) -> jax.Array:
    """RGB [S, S, 3]: a gradient from top to bottom, blurred by clouds."""
    top, bottom = jnp.asarray(BACKGROUNDS)[background]
    clouds = _smooth_noise(key, points - drift, octaves=3)
    mix = jnp.clip((points[..., 1] + 1) / 2 + 0.25 * clouds, 0, 1)[..., None]
    return top * (1 - mix) + bottom * mix


def _smooth_noise(key: jax.Array, points: jax.Array, *, octaves: int, waves: int = 24) -> jax.Array:
    """Value noise from random Fourier features, about -1..1, at points [.., 2]."""
    frequency_key, phase_key = jax.random.split(key)
    octave = jnp.arange(waves) % octaves
    frequencies = 3.0 * 2.0 ** octave[:, None] * jax.random.normal(frequency_key, (waves, 2))
    phases = TURN * jax.random.uniform(phase_key, (waves,))
    weights = 0.7**octave
    total = (weights * jnp.sin(points @ frequencies.T + phases)).sum(-1)
    return 0.5 * total / jnp.sqrt((weights**2).sum() / 2)


def _unit(vectors: jax.Array) -> jax.Array:
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)

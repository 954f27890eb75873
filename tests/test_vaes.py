"""The VAEs of FLUX.1 and Wan2.1 against the PyTorch originals (golden/make_vae_golden.py), and what they keep by themselves."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from chipmunk_jax.cli.main import main
from chipmunk_jax.convert import convert, inspect, load, open_source, read
from chipmunk_jax.convert.rules import match
from chipmunk_jax.convert.safetensors import Tensor, Weights
from chipmunk_jax.convert.source import layout_of
from chipmunk_jax.errors import InputError
from chipmunk_jax.models import FluxVaeConfig, WanVaeConfig, blocks, causal_conv, flux_vae, wan_vae
from chipmunk_jax.models.leaves import abstract, leaves_of, with_arrays

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-4
CONFIGS = {"flux_vae": FluxVaeConfig(), "wan_vae": WanVaeConfig()}


def golden(name):
    """Inputs and outputs, channels last."""
    return {key: np.moveaxis(a, 1, -1) for key, a in load_file(GOLDEN / name / "io.safetensors").items()}


@pytest.fixture(scope="module")
def flux():
    return read(GOLDEN / "flux_vae/vae", "float32")


@pytest.fixture(scope="module")
def wan():
    return read(GOLDEN / "wan_vae/vae", "float32")


@pytest.fixture
def seen(monkeypatch):
    """What the middle and every level of both halves give, in order, of the module that it is called with."""
    found = []

    def watch(module):
        for part in (module.Mid, module.Level):
            call = part.__call__

            def keep(self, *args, call=call):
                found.append(call(self, *args))
                return found[-1]

            monkeypatch.setattr(part, "__call__", keep)
        return found

    return watch


def assert_equals(found, expected, atol=TOLERANCE):
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=atol, rtol=0)


def test_images_equal_the_original(flux, seen):
    """To 1e-6: latents, pixels, and every level between."""
    expected, found = golden("flux_vae"), seen(flux_vae)
    run = jax.jit(lambda model: (model.encode(expected["in.pixels"]), model.decode(expected["in.latents"]), [*found]))
    latents, pixels, parts = run(flux)
    names = ("encoder.0", "encoder.1", "encoder.2", "encoder.mid", "decoder.mid", "decoder.0", "decoder.1", "decoder.2")
    for name, part in zip(names, parts, strict=True):
        np.testing.assert_allclose(part[:, ::3, ::3], expected[name], atol=TOLERANCE, err_msg=name)
    assert_equals(latents, expected["latents"])
    assert_equals(pixels, expected["pixels"])
    assert np.abs(expected["pixels"]).max() > 1  # not clamped


def test_videos_equal_the_original(wan, seen):
    """To 1e-5: latents, pixels, and every level between, in one pass; diffusers goes through a latent frame at a time."""
    expected, found = golden("wan_vae"), seen(wan_vae)

    @jax.jit
    def run(model):
        return (
            model.encode(expected["in.video"], frames=None),
            model.decode(expected["in.latents"], frames=None),
            [*found],
        )

    latents, video, parts = run(wan)
    encoder, decoder = parts[:5], parts[5:]
    names = {"encoder": ("0", "1", "2", None, "mid"), "decoder": ("mid", "0", "1", "2", "3")}
    for half, parts in (("encoder", encoder), ("decoder", decoder)):
        for name, part in zip(names[half], parts, strict=True):
            if name:  # of the encoder's last level diffusers keeps nothing
                where = f"{half}.{name}"
                np.testing.assert_allclose(part[:, :, ::3, ::3], expected[where], atol=TOLERANCE, err_msg=where)
    assert_equals(latents, expected["latents.9"])
    assert_equals(video, expected["video.9"])
    assert np.abs(expected["video.9"]).max() == 1  # clamped


@pytest.mark.parametrize(("frames", "at_once"), [(1, 1), (5, 1), (9, 2)])
def test_chunks_of_any_number_of_frames_equal_the_original(wan, frames, at_once):
    expected = golden("wan_vae")
    video, latents = expected["in.video"][:, :frames], expected["in.latents"][:, : 1 + frames // 4]
    run = jax.jit(lambda model: (model.encode(video, frames=at_once), model.decode(latents, frames=at_once)))
    found = run(wan)
    assert_equals(found[0], expected[f"latents.{frames}"])
    assert_equals(found[1], expected[f"video.{frames}"])


@pytest.fixture(scope="module")
def small():
    """A Wan VAE of two levels, 2 frames of 2 x 2 pixels a latent pixel: quickly compiled."""
    sizes = dict(base_dim=4, dim_mult=(1, 2), num_res_blocks=1, z_dim=2, temperal_downsample=(True,))
    config = WanVaeConfig(**sizes, latents_mean=(0.5, -1.0), latents_std=(0.1, 0.3))
    shapes, draw = abstract("wan_vae", config, "float32"), np.random.default_rng(0).standard_normal
    fan = lambda shape: np.prod(shape[:-1]) if len(shape) > 1 else 100
    return with_arrays(
        shapes, {path: np.float32(draw(a.shape) / fan(a.shape) ** 0.5) for path, a in leaves_of(shapes).items()}
    )


class Stack(nnx.Module):
    """Each kind of layer that sees other frames, the number of frames as it was in the end."""

    def __init__(self):
        kw = dict(dtype=jnp.float32, rngs=nnx.Rngs(0))
        self.conv = causal_conv.CausalConv(2, 2, (3, 3, 3), **kw)
        self.down, self.up = wan_vae.Downsample(2, True, **kw), wan_vae.Upsample(2, True, **kw)

    def __call__(self, x, past):
        return self.up(self.conv(self.down(self.conv(x, past), past), past), past)


def test_chunks_of_every_size_equal_the_whole():
    """Two frames at a time, so many as divide the others, more than there are."""
    x, stack = jax.random.normal(jax.random.key(1), (2, 9, 4, 6, 2)), Stack()
    sizes = (9, 2, 4, 6, 8, 10)
    whole, *rest = jax.jit(lambda stack: [causal_conv.in_chunks(stack, x, frames) for frames in sizes])(stack)
    assert whole.shape == (2, 9, 4, 6, 1)
    for found in rest:
        np.testing.assert_allclose(found, whole, atol=1e-6)


def test_no_frame_depends_on_a_later_one(small):
    """Latents on frames up to theirs, frames on latents up to theirs; each on the one before, too."""
    run = jax.jit(lambda model, video, latents: (model.encode(video, frames=None), model.decode(latents, frames=None)))
    video, latents = (
        jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(1, 9, 6, 10, 3), (1, 5, 3, 5, 2)])
    )
    before = run(small, video, latents)
    after = run(small, video.at[:, 5:].add(1), latents.at[:, 3:].add(1))
    for old, new, first in zip(before, after, (3, 5), strict=True):
        np.testing.assert_array_equal(new[:, :first], old[:, :first])
        assert (np.abs(new - old)[0, first:].max(axis=(1, 2, 3)) > 1e-3).all()


def test_a_convolution_of_frames_side_by_side_is_that_of_a_volume():
    x, kernel = (
        jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(2, 7, 4, 5, 3), (3, 3, 3, 3, 2)])
    )
    for stride in (1, 2):
        padding, axes = ((0, 0), (1, 1), (1, 1)), ("NDHWC", "DHWIO", "NDHWC")
        expected = jax.lax.conv_general_dilated(x, kernel, (stride, 1, 1), padding, dimension_numbers=axes)
        np.testing.assert_allclose(causal_conv.convolve(x, kernel, stride), expected, atol=1e-5)
    assert causal_conv.convolve(x[:, :2], kernel).shape == (2, 0, 4, 5, 2)


def test_attention_in_portions_is_attention(monkeypatch):
    monkeypatch.setattr(blocks, "QUERIES", 4)
    q, k, v = (np.float32(jax.random.normal(jax.random.key(i), (2, 10, 6))) for i in range(3))
    weights = np.exp(q @ k.transpose(0, 2, 1) / 6**0.5)
    expected = weights / weights.sum(-1, keepdims=True) @ v
    np.testing.assert_allclose(blocks.attend_pixels(q, k, v), expected, atol=1e-6)


@pytest.mark.parametrize(("side", "tile", "overlap"), [(9, 4, 2), (9, 4, 0), (10, 4, 3), (4, 4, 1), (11, 9, 5)])
def test_shares_of_tiles_sum_to_one(side, tile, overlap):
    total = np.zeros(3 * side)
    tiles = causal_conv.ramps(side, tile, overlap, 3)
    for start, weights in tiles:
        assert weights.min() > 0 and len(weights) == 3 * tile
        total[3 * start : 3 * (start + tile)] += weights
    np.testing.assert_allclose(total, 1)
    assert tiles[-1][0] + tile == side


def test_two_tiles_share_their_overlap_in_linear_ramps():
    (first, left), (second, right) = causal_conv.ramps(6, 4, 2, 1)
    assert (first, second) == (0, 2)
    np.testing.assert_allclose([left, right], [[1, 1, 0.75, 0.25], [0.25, 0.75, 1, 1]])


def test_tiles_of_what_looks_at_no_neighbour_equal_the_whole():
    x = jax.random.normal(jax.random.key(0), (2, 3, 7, 9, 2))
    double = lambda x: x.repeat(2, axis=2).repeat(2, axis=3)
    found = jax.jit(lambda x: causal_conv.in_tiles(double, x, (4, 20), 2, 2))(x)
    np.testing.assert_allclose(found, double(x), atol=1e-6)


def test_blended_tiles_are_nearer_to_the_whole(small):
    """Of random weights, whose attention sees the borders of tiles everywhere: half the error of tiles side by side, or less."""
    latents, tiles = (
        jax.random.normal(jax.random.key(0), (1, 1, 16, 24, 2)),
        [((16, 16), 0), ((16, 16), 8), ((16, 24), 8)],
    )
    decode = lambda model: [model.decode(latents), *(model.decode(latents, tile=tile, overlap=n) for tile, n in tiles)]
    whole, *parts = jax.jit(decode)(small)
    apart, blended, one = (float(np.square(part - whole).mean()) for part in parts)
    assert one == 0 < blended < apart / 4


def test_half_precision_is_close(flux):
    """bf16 weights and activations; norms, softmax and what comes out are float32."""
    expected = golden("flux_vae")
    half = read(GOLDEN / "flux_vae/vae")
    kinds = {path: leaf.dtype for path, leaf in leaves_of(half).items()}
    assert {kind for path, kind in kinds.items() if "norm" in path} == {np.dtype(np.float32)}
    assert {kind for path, kind in kinds.items() if "norm" not in path} == {jnp.dtype(jnp.bfloat16)}
    found = jax.jit(lambda model: model.decode(expected["in.latents"]))(half)
    assert_equals(found, expected["pixels"], atol=0.1)
    assert np.abs(found - expected["pixels"]).mean() < 0.02


# (latent frames, rows, columns), frames at once, tile -> bytes of temporaries and video that XLA plans for an H100 (JAX 0.11.2).
PLANNED = {
    ((21, 90, 160), 1, None): 10_982_354_064, ((21, 90, 160), 2, None): 16_290_772_344, ((21, 60, 104), 1, None): 4_841_334_904,
    ((21, 60, 104), 4, None): 10_975_505_784, ((21, 32, 32), 1, None): 915_897_336, ((21, 32, 32), 4, None): 1_922_532_088,
    ((21, 90, 160), 1, (48, 48)): 2_789_977_464, ((21, 90, 160), 1, (49, 84)): 4_157_820_024,
}  # fmt: skip


@pytest.fixture(scope="module")
def published():
    """Wan2.1's VAE, shapes in place of weights."""
    return abstract("wan_vae", WanVaeConfig())


@pytest.mark.parametrize(("latents", "frames", "tile"), PLANNED)
def test_memory_is_known_to_ten_percent(latents, frames, tile, published):
    known = published.decoding_bytes((1, *latents, 16), frames=frames, tile=tile)
    assert 0.9 * known < PLANNED[latents, frames, tile] < known


def test_what_there_is_room_for_is_chosen(published):
    """Exact chunks before tiles; tiles as large as fit."""
    shape, areas = (1, 21, 90, 160, 16), []
    for room in (80e9, 30e9, 12e9, 8e9, 4e9, 2e9):
        chosen = published.portions(shape, room)
        assert published.decoding_bytes(shape, frames=chosen["frames"], tile=chosen["tile"]) <= room
        assert (chosen["tile"] is None) == (room >= 12e9)
        areas.append(np.prod(chosen["tile"] or shape[2:4]))
    assert areas == sorted(areas, reverse=True) and areas[-1] > 16 * 16
    assert published.portions((1, 21, 60, 104, 16), 30e9)["frames"] == 2  # a frame alone does not fill a GPU
    assert published.portions((1, 1, 60, 104, 16), 30e9)["frames"] == 1
    with pytest.raises(InputError, match=r"this needs 1.2 GB in the smallest tiles, where 1.0 GB are free"):
        published.portions(shape, 1e9)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_the_published_tensors_fill_every_leaf_once(name, layout):
    """Names and shapes of 244 and 194 tensors, as PyTorch has them."""
    rows = [row.split() for row in (GOLDEN / name / "tensors.txt").read_text().splitlines()]
    names, sizes = (0, 2) if layout == "original" else (1, 3)
    shapes = {row[names]: tuple(map(int, row[sizes].split("x"))) for row in rows}
    found = layout_of(shapes)
    assert (found.model, found.name) == (name, layout)
    config = found.configure(shapes, {})
    assert config == CONFIGS[name] == found.configure(shapes, PUBLISHED[name])
    tensors = {key: Tensor(key, Path(), shape, np.dtype(np.float32), 0) for key, shape in shapes.items()}
    leaves = leaves_of(abstract(name, config))
    matched = match(found.rules_of(config), Weights(Path(), tensors, ()), leaves)
    assert not matched.summary(), matched.summary()
    assert len(tensors) == COUNTS[name][0]
    assert (
        sum(leaf.size for leaf in leaves.values()) == sum(tensor.size for tensor in tensors.values()) == COUNTS[name][1]
    )


COUNTS = {"flux_vae": (244, 83_819_683), "wan_vae": (194, 126_892_531)}
# As published, by diffusers' layout.
PUBLISHED = {
    "flux_vae": {
        "_class_name": "AutoencoderKL", "_diffusers_version": "0.30.0.dev0", "_name_or_path": "../checkpoints/flux-dev",
        "act_fn": "silu", "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
        "force_upcast": True, "in_channels": 3, "latent_channels": 16, "latents_mean": None, "latents_std": None,
        "layers_per_block": 2, "mid_block_add_attention": True, "norm_num_groups": 32, "out_channels": 3, "sample_size": 1024,
        "scaling_factor": 0.3611, "shift_factor": 0.1159, "up_block_types": ["UpDecoderBlock2D"] * 4,
        "use_post_quant_conv": False, "use_quant_conv": False,
    },
    "wan_vae": {
        "_class_name": "AutoencoderKLWan", "_diffusers_version": "0.33.0.dev0", "attn_scales": [], "base_dim": 96,
        "dim_mult": [1, 2, 4, 4], "dropout": 0.0, "latents_mean": [*WanVaeConfig.latents_mean],
        "latents_std": [*WanVaeConfig.latents_std], "num_res_blocks": 2, "temperal_downsample": [False, True, True], "z_dim": 16,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_the_originals_file_gives_the_same_weights(name):
    ours, theirs = (read(GOLDEN / name / folder, "float32") for folder in ("vae", "original"))
    assert ours.config == theirs.config
    jax.tree.map(np.testing.assert_array_equal, leaves_of(theirs), leaves_of(ours))
    assert open_source(GOLDEN / name / "original").layout.name == "original"


@pytest.mark.parametrize("prefix", ["vae.", "first_stage_model."])
def test_a_vae_is_taken_from_beside_other_models(prefix, flux, tmp_path):
    """Alone it is known in spite of a prefix; beside a network it is asked for."""
    tensors = {f"{prefix}{key}": a for key, a in load_file(GOLDEN / "flux_vae/original/ae.safetensors").items()}
    shutil.copy(GOLDEN / "flux_vae/original/config.json", tmp_path)
    save_file(tensors, tmp_path / "alone.safetensors")
    assert open_source(tmp_path / "alone.safetensors").layout.model == "flux_vae"
    network = load_file(GOLDEN / "flux_schnell/original/flux1-schnell.safetensors")
    several = tensors | {f"model.diffusion_model.{key}": a for key, a in network.items()}
    save_file(several, tmp_path / "several.safetensors")
    found = read(tmp_path / "several.safetensors", "float32", model="flux_vae")
    jax.tree.map(np.testing.assert_array_equal, leaves_of(found), leaves_of(flux))
    shutil.copy(GOLDEN / "flux_schnell/original/config.json", tmp_path)
    assert open_source(tmp_path / "several.safetensors").layout.model == "flux"
    with pytest.raises(InputError, match=r"expected one of wan_vae \(original\), wan_vae \(diffusers\)"):
        open_source(tmp_path / "several.safetensors", model="wan_vae")


def test_a_converted_vae_loads_as_it_was(wan, tmp_path):
    convert(GOLDEN / "wan_vae/original", tmp_path / "vae", dtype="float32", progress=False)
    found = load(tmp_path / "vae")
    assert found.config == wan.config and inspect(tmp_path / "vae").whole
    jax.tree.map(np.testing.assert_array_equal, leaves_of(found), leaves_of(wan))


def test_inspect_describes_a_vae(capsys):
    assert main(["inspect", str(GOLDEN / "flux_vae/original")]) == 0
    said = capsys.readouterr().out
    assert "flux_vae (original)" in said and "block_out_channels  (4, 8, 8)" in said and "usual sample" not in said


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda flux, wan: flux.encode(np.zeros((1, 20, 21, 3))), "expected .B, H, W, 3., H and W multiples of 4"),
        (lambda flux, wan: flux.decode(np.zeros((1, 5, 3))), "expected .B, h, w, 3."),
        (lambda flux, wan: wan.encode(np.zeros((1, 8, 16, 16, 3))), "F a multiple of 4 and one"),
        (lambda flux, wan: wan.encode(np.zeros((1, 5, 16, 12, 3))), "H and W multiples of 8"),
        (lambda flux, wan: wan.decode(np.zeros((1, 2, 3, 4, 4))), "expected .B, T, h, w, 3."),
        (lambda flux, wan: wan.decode(np.zeros((1, 2, 3, 4, 3)), frames=0), "frames=0: expected at least 1"),
        (lambda flux, wan: wan.decode(np.zeros((1, 2, 3, 4, 3)), tile=(2, 8), overlap=2), "above the overlap"),
    ],
)
def test_what_does_not_fit_is_refused(call, message, flux, wan):
    with pytest.raises(InputError, match=message):
        call(flux, wan)

"""From words to videos, of a tiny random Wan; what images share with them is in test_pipeline.py and test_cli.py."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from chipmunk_jax import AttentionSparsity, MlpSparsity, Sparsity, UniPC, load_sparsity, sample, wan_timesteps
from chipmunk_jax.cli.main import main
from chipmunk_jax.errors import InputError
from chipmunk_jax.media import IMAGE_DESCRIPTION
from chipmunk_jax.pipelines import VARIANTS, Pipeline
from chipmunk_jax.pipelines.pixels import PixelPipeline
from chipmunk_jax.report.ways import level
from chipmunk_jax.sparsity import to_dict

PROMPTS = ("red striped heart on meadow", "a Blue, plain ring on night.", "yellow checkered disc on sky")
SIZE = dict(num_frames=5, height=20, width=12)  # a grid of 5 x 5 x 3 tokens, ragged in voxels and in groups
SMALL = [*("--frames", "5", "--height", "20", "--width", "12", "--steps", "3")]
SPARSITY = Sparsity(
    attention=AttentionSparsity(first_n_dense_layers=0, group=64),
    mlp=MlpSparsity(first_n_dense_layers=0, random_keys=0.2),
    patches=((4, 4, 2),),
)
WAN = VARIANTS["mini-wan"]
needs_av = pytest.mark.skipif(importlib.util.find_spec("av") is None, reason="needs PyAV")
SUFFIXES = [pytest.param(".mp4", marks=needs_av), ".webp", ".png"]


@pytest.fixture(scope="module")
def pipeline(video_checkpoint):
    return Pipeline.from_pretrained(video_checkpoint)


def unpacked(tokens, frames, rows, columns):
    """Videos of tokens [B, N, 48] in raster order, pixel by pixel."""
    clips = np.zeros((len(tokens), frames, 4 * rows, 4 * columns, 3), np.float32)
    for n, (t, row, column) in enumerate(np.ndindex(frames, rows, columns)):
        for y, x, c in np.ndindex(4, 4, 3):
            clips[:, t, 4 * row + y, 4 * column + x, c] = tokens[:, n, (4 * y + x) * 3 + c]
    return np.clip((clips + 1) / 2, 0, 1)


# From words to pixels.


def test_pixels_undo_patches():
    tokens = np.random.default_rng(0).normal(size=(2, 2 * 3 * 5, 48)).astype(np.float32)
    np.testing.assert_array_equal(PixelPipeline.to_pixels(tokens, (2, 3, 5), (1, 4, 4)), unpacked(tokens, 2, 3, 5))


def test_a_clip_is_a_sample_by_unipc_at_wans_times_with_guidance_against_no_words(pipeline):
    prompts, shape = list(PROMPTS[:2]), (75, 48)
    text = pipeline.words.encode(prompts)["text"]
    noise = jnp.stack([jax.random.normal(jax.random.key(7 + i), shape) for i in range(2)])
    times, solver = wan_timesteps(3, shift=3.0), UniPC()
    for guidance, expected in ((3.0, 3.0), (None, 3.0), (1.0, None)):
        tokens = sample(
            pipeline.model,
            noise,
            {"text": text},
            timesteps=times,
            grid=(5, 5, 3),
            solver=solver,
            guidance=expected,
            progress=True,
        )
        options = dict(num_inference_steps=3, seed=7, guidance_scale=guidance, sparsity=None, output_type="np")
        out = pipeline(prompts, **SIZE, **options)
        assert out.images is None
        np.testing.assert_array_equal(out.frames, unpacked(np.asarray(tokens), 5, 5, 3))


@pytest.mark.parametrize("sparsity", [None, SPARSITY], ids=["dense", "sparse"])
def test_a_clip_is_the_same_alone_and_in_any_batch(pipeline, sparsity):
    """Alone to 1e-5: a CPU sums some hundred float32 terms in another order for another batch (seen: 8e-7)."""
    settings = SIZE | dict(num_inference_steps=3, sparsity=sparsity, output_type="np")
    draw = lambda prompts, seed: pipeline(prompts, **settings, seed=seed).frames
    batch = draw(PROMPTS, 5)
    assert batch.shape == (3, 5, 20, 12, 3) and batch.dtype == np.float32
    assert batch.min() >= 0 and batch.max() <= 1 and batch.std() > 0.1
    np.testing.assert_array_equal(draw(PROMPTS, 5), batch)
    for i in (0, 2):
        np.testing.assert_allclose(draw(PROMPTS[i], 5 + i)[0], batch[i], rtol=0, atol=1e-5)


def test_what_is_not_given_is_the_models_usual():
    assert WAN.complete() == dict(frames=16, height=64, width=64, steps=30, guidance=3.0)
    assert WAN.complete(frames=4, steps=None) == WAN.complete() | {"frames": 4}
    flux = VARIANTS["mini-flux"]
    assert flux.complete(frames=None, width=32) == dict(height=64, width=32, steps=28, guidance=2.0)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (dict(prompt=[]), "no prompts"),
        (dict(num_frames=0), "num_frames=0: expected at least 1"),
        (dict(height=22), "height=22: expected a positive multiple of 4 pixels"),
        (dict(width=0), "width=0: expected a positive multiple of 4 pixels"),
        (dict(num_inference_steps=0), "num_inference_steps=0: expected at least 1"),
        (dict(guidance_scale=float("inf")), "guidance_scale=inf: expected a number"),
        (dict(seed=-1), "seed=-1: expected a whole number from 0 to"),
        (dict(sparsity=load_sparsity("wan-14b")), "local_voxels=5: expected at most 1, as the grid has"),
        (dict(sparsity=load_sparsity("wan-14b", {"patches": []})), "local_voxels=5 with tokens in rows"),
        (dict(sparsity=load_sparsity("flux", {"patches": [[8, 4]]})), r"patch \(8, 4\): expected 3 sides for the grid"),
        (dict(sparsity=load_sparsity("flux", {"schedule_steps": None, "mlp.full_step_schedule": [0, 30]})), "step 30"),
    ],
)
def test_a_bad_request_is_one_error_before_any_weights_are_read(video_checkpoint, monkeypatch, change, expected):
    monkeypatch.setattr("chipmunk_jax.pipelines.base.load", None)
    pipeline, request = Pipeline.from_pretrained(video_checkpoint), dict(prompt=PROMPTS) | SIZE | change
    with pytest.raises(InputError, match=expected):
        pipeline(request.pop("prompt"), **request)


# The commands.


def run(command, checkpoint, *flags):
    """Exit status of a small sample or verification."""
    given = list(map(str, flags))
    prompt = [] if "--prompt" in given else ["--prompt", PROMPTS[0]]
    return main([command, str(checkpoint), *prompt, *SMALL, *given])


@pytest.mark.parametrize("command", ["sample", "verify"])
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["-o", "clip.gif"], ["clip.gif", "ends in .mp4 or .webp or .png"]),
        (["-o", "none/clip.webp"], ["no folder none"]),
        (["--fps", 0], ["--fps 0", "above 0 and up to 1000"]),
        (["--fps", "nan"], ["--fps nan", "above 0"]),
        (["--fps", 1001], ["--fps 1001", "up to 1000"]),
        (["--frames", 0], ["--frames 0", "at least 1"]),
        (["--height", 22], ["--height 22", "multiple of 4"]),
        (["--sparsity", "wan-14b"], ["local_voxels=5", "at most 1"]),
    ],
)
def test_bad_input_is_one_sentence_before_a_model_is_loaded(
    command, flags, words, video_checkpoint, folder, monkeypatch, capsys
):
    monkeypatch.setattr("chipmunk_jax.pipelines.base.load", None)
    assert run(command, video_checkpoint, *flags) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("chipmunk: ") and captured.err.count("\n") == 1
    assert all(word in captured.err for word in words), captured.err
    assert not list(folder.iterdir())


@pytest.mark.parametrize("command", ["sample", "verify"])
def test_an_mp4_without_pyav_says_what_to_install(command, video_checkpoint, folder, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("chipmunk_jax.pipelines.base.load", None)
    assert run(command, video_checkpoint, "-o", "clip.mp4") == 2
    assert capsys.readouterr().err.startswith("chipmunk: clip.mp4: an .mp4 needs PyAV")


@pytest.mark.parametrize("command", ["sample", "verify"])
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["-o", "clip.webp"], ["clip.webp", "ends in .png"]),
        (["--frames", 4], ["--frames 4", "makes images"]),
        (["--fps", 8], ["--fps 8", "makes images"]),
    ],
)
def test_what_is_of_videos_is_refused_for_images(command, flags, words, checkpoint, folder, monkeypatch, capsys):
    monkeypatch.setattr("chipmunk_jax.pipelines.base.load", None)
    assert main([command, str(checkpoint), "--prompt", PROMPTS[0], *map(str, flags)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error


def test_sample_writes_a_clip_at_its_familys_rate_that_says_how_it_was_made(video_checkpoint, pipeline, folder, capsys):
    assert run("sample", video_checkpoint, "--batch", 2, "--seed", 3, "--dense") == 0
    assert sorted(file.name for file in folder.iterdir()) == ["out-1.webp", "out-2.webp"]
    assert "out-1.webp\n" in capsys.readouterr().out
    clips = pipeline(PROMPTS[0], **SIZE, num_inference_steps=3, seed=3, sparsity=None, num_images_per_prompt=2).frames
    for i, clip in enumerate(clips):
        with Image.open(f"out-{i + 1}.webp") as image:
            assert (image.n_frames, image.size) == (5, (12, 20))
            text = json.loads(image.getexif()[IMAGE_DESCRIPTION])
            image.seek(4)
            image.load()
            assert image.info["duration"] == 125
            np.testing.assert_array_equal(np.asarray(image.convert("RGB")), np.asarray(clip[4]))
        settings = dict(num_frames=5, height=20, width=12, num_inference_steps=3, guidance_scale=3.0)
        settings |= dict(seed=3 + i, sparsity=None)
        assert text == {"prompt": PROMPTS[0], "seed": 3 + i, "settings": pipeline.origin | settings}
        assert (pipeline.origin["model"], pipeline.origin["solver"]) == ("wan", "UniPC")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_sample_writes_what_the_suffix_says(suffix, video_checkpoint, folder):
    assert run("sample", video_checkpoint, "-o", f"clip{suffix}", "--fps", 12, "--dense") == 0
    assert [file.name for file in folder.iterdir()] == [f"clip{suffix}"]


def test_verify_compares_clips_and_their_frames(video_checkpoint, pipeline, folder, capsys):
    sparse = ["--sparsity.patches", "[[4,4,2]]", "--sparsity.attention.first-n-dense-layers", 0]
    prompts = ["--prompt", PROMPTS[0], "--prompt", PROMPTS[2]]
    outputs = ["-o", "a.webp", "-o", "a.png", "--json", "a.json"]
    assert run("verify", video_checkpoint, *prompts, *sparse, *outputs) == 0
    assert sorted(file.name for file in folder.iterdir()) == ["a.json", "a.png", "a.webp"]
    out = capsys.readouterr().out
    assert "a.webp\na.png\n" in out
    report = json.loads((folder / "a.json").read_text())
    sparsity = load_sparsity("mini-wan", {"patches": [[4, 4, 2]], "attention.first_n_dense_layers": 0})
    assert report["sparsity"] == to_dict(sparsity) and report["frames"] == 5
    # With a callback as verify has, so that it is the same program.
    settings = SIZE | dict(num_inference_steps=3, callback_on_step_end=lambda *_: None, output_type="np")
    draw = lambda sparsity: pipeline([PROMPTS[0], PROMPTS[2]], **settings, sparsity=sparsity).frames
    dense, sparse = draw(None), draw(sparsity)
    assert report["psnr"] == pytest.approx([level(a, b) for a, b in zip(sparse, dense, strict=True)])
    frames = [[level(sparse[b, t], dense[b, t]) for t in range(5)] for b in range(2)]
    np.testing.assert_allclose(report["psnr_of_frames"], frames)
    assert f"frames  {np.min(frames):7.1f} to {np.max(frames):.1f} dB\n" in out
    with Image.open("a.webp") as image:
        assert image.n_frames == 5 and image.width > 3 * 3 * 12 and image.height > 2 * 3 * 20
        assert json.loads(image.getexif()[IMAGE_DESCRIPTION])["settings"] == report
    with Image.open("a.png") as image:
        assert json.loads(image.text["settings"]) == report
        assert image.width > 5 * 3 * 12 and image.height > 2 * 3 * 3 * 20  # all of five frames, three rows a clip

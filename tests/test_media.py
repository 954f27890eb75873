"""Images and videos as files: every pixel and frame, the rate, and what is said of how they were made."""

import importlib.util
import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from chipmunk_jax.errors import InputError
from chipmunk_jax.media import IMAGE_DESCRIPTION, check_fps, check_output, check_writable, save_image, save_video
from chipmunk_jax.quality import psnr

needs_av = pytest.mark.skipif(importlib.util.find_spec("av") is None, reason="needs PyAV")
SUFFIXES = [pytest.param(".mp4", marks=needs_av), ".webp", ".png"]


@pytest.fixture(scope="module")
def clip():
    """7 smooth frames of 24 x 40 pixels, none like another, in 8 bits."""
    t, y, x = np.indices((7, 24, 40))
    waves = [np.sin(0.1 * x + 0.5 * t), np.cos(0.15 * y - 0.4 * t), np.sin(0.05 * (x + y) + 0.3 * t)]
    return np.round(255 * (np.stack(waves, -1) + 1) / 2) / 255


TEXT = {"prompt": "red – heart", "seed": 3, "settings": {"steps": 30, "sparsity": None}}


@pytest.mark.parametrize("fps", [8, 12.5, 30])
def test_a_webp_has_all_frames_unchanged_at_their_rate_and_says_how_it_was_made(tmp_path, clip, fps):
    save_video(tmp_path / "a.webp", clip, fps, TEXT)
    with Image.open(tmp_path / "a.webp") as image:
        assert (image.n_frames, image.size, image.info["loop"]) == (7, (40, 24), 0)
        assert json.loads(image.getexif()[IMAGE_DESCRIPTION]) == TEXT
        milliseconds = 0
        for i, frame in enumerate(clip):
            image.seek(i)
            image.load()
            milliseconds += image.info["duration"]
            np.testing.assert_array_equal(np.asarray(image.convert("RGB")), np.round(255 * frame))
    assert abs(milliseconds - 7000 / fps) <= 1


@needs_av
@pytest.mark.parametrize("fps", [8, 12.5, 30])
def test_an_mp4_has_all_frames_at_their_rate_and_says_how_it_was_made(tmp_path, clip, fps):
    import av

    save_video(tmp_path / "a.mp4", clip, fps, TEXT)
    with av.open(str(tmp_path / "a.mp4")) as container:
        (stream,) = container.streams
        assert (stream.codec_context.name, stream.average_rate, stream.frames) == ("h264", fps, 7)
        assert json.loads(container.metadata["comment"]) == TEXT
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert np.shape(frames) == clip.shape
    # H.264 loses a little, a quarter of the colours' resolution first; a swapped channel or frame would give below 15 dB.
    assert psnr(np.divide(frames, 255), clip) > 30


def test_a_png_is_a_contact_sheet(tmp_path):
    clip = np.arange(1, 11)[:, None, None, None] / 20 * np.ones((10, 4, 6, 3))
    save_video(tmp_path / "a.png", clip, 8, TEXT)
    with Image.open(tmp_path / "a.png") as image:
        sheet, text = np.asarray(image) / 255, image.text
    assert sheet.shape == (4 + 2 + 4, 8 * 6 + 7 * 2, 3)  # two rows of up to eight, two pixels apart
    for i in range(10):
        top, left = 6 * (i // 8), 8 * (i % 8)
        np.testing.assert_allclose(sheet[top : top + 4, left : left + 6], (i + 1) / 20, atol=1 / 255)
    assert np.all(sheet[6:, 2 * 8 :] == 1) and np.all(sheet[4:6] == 1) and np.all(sheet[:, 6:8] == 1)
    assert (text["prompt"], text["seed"], json.loads(text["settings"])) == (TEXT["prompt"], "3", TEXT["settings"])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_is_written_whole_or_not_at_all(tmp_path, clip, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_text("old")
    with pytest.raises(TypeError):
        save_video(path, clip, 8, {"prompt": object()})
    assert [file.name for file in tmp_path.iterdir()] == [path.name] and path.read_text() == "old"


def test_a_png_has_all_pixels_and_says_how_it_was_made(tmp_path, clip):
    save_image(tmp_path / "a.png", clip[0], TEXT)
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "RGB" and image.size == (40, 24)
        np.testing.assert_array_equal(np.asarray(image), np.round(255 * clip[0]))
        assert (image.text["prompt"], image.text["seed"]) == (TEXT["prompt"], "3")
        assert json.loads(image.text["settings"]) == TEXT["settings"]


def test_values_beyond_their_range_are_clipped(tmp_path):
    save_image(tmp_path / "a.png", jnp.linspace(-1, 2, 12).reshape(2, 2, 3))
    with Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(
            np.asarray(image), np.round(255 * np.linspace(-1, 2, 12).clip(0, 1)).reshape(2, 2, 3)
        )


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_pil_images_and_arrays_make_the_same_files(tmp_path, clip, suffix):
    images = [Image.fromarray(np.round(255 * frame).astype(np.uint8)) for frame in clip]
    files = [tmp_path / f"{name}{suffix}" for name in "ab"]
    save_video(files[0], clip, 8)
    save_video(str(files[1]), images, 8)
    assert files[0].read_bytes() == files[1].read_bytes()
    if suffix == ".png":
        save_image(files[0], clip[0])
        save_image(files[1], images[0].convert("RGBA"))
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nothing_need_be_said(tmp_path, clip, suffix):
    save_video(tmp_path / f"a{suffix}", clip, 8)
    if suffix == ".webp":
        with Image.open(tmp_path / "a.webp") as image:
            assert not image.getexif() and image.n_frames == 7


BYTES = np.zeros((4, 4, 3), np.uint8)


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (lambda: save_image("a.jpg", BYTES / 255), r"a.jpg: expected a name that ends in .png$"),
        (lambda: save_image("a.png", BYTES), r"pixels uint8 \(4, 4, 3\): expected \[H, W, 3\], floats in 0 to 1"),
        (lambda: save_image("a.png", np.zeros((4, 4))), r"pixels float64 \(4, 4\): expected \[H, W, 3\]"),
        (lambda: save_image("a.png", np.zeros((1, 4, 4, 3))), r"\(1, 4, 4, 3\): expected \[H, W, 3\]"),
        (lambda: save_video("a.webp", np.zeros((4, 4, 3)), 8), r"\(4, 4, 3\): expected \[T, H, W, 3\]"),
        (lambda: save_video("a.webp", np.zeros((0, 4, 4, 3)), 8), r"\(0, 4, 4, 3\): expected \[T, H, W, 3\]"),
        (lambda: save_video("a.webp", [], 8), "0 frames of 0 sizes: expected at least one"),
        (lambda: save_video("a.webp", [Image.new("RGB", (4, n)) for n in (4, 8)], 8), "2 frames of 2 sizes"),
        (lambda: save_video("a.webp", np.zeros((2, 4, 4, 3)), 0), "fps=0: expected a number above 0 and up to 1000"),
        (
            lambda: save_video("a.webp", np.zeros((1, 1, 20000, 3)), 8),
            "frames of 20000 x 1 pixels: expected at most 16383",
        ),
        pytest.param(
            lambda: save_video("a.mp4", np.zeros((2, 3, 4, 3)), 8),
            "a.mp4: frames of 4 x 3 pixels: expected even sides",
            marks=needs_av,
        ),
    ],
)
def test_what_no_file_can_hold_is_one_error(save, message, folder):
    with pytest.raises(InputError, match=message):
        save()
    assert not list(folder.iterdir())


def test_a_path_is_checked_before_long_work(folder, monkeypatch):
    for path, message in (
        ("none/a", "none/a: no folder none"),
        (".", "cannot be written"),
        ("/proc/a", "/proc/a: cannot"),
    ):
        with pytest.raises(InputError, match=message):
            check_writable(path)
    assert check_writable("a.json").name == "a.json" and check_output("a.webp", video=True).name == "a.webp"
    with pytest.raises(InputError, match=r"a.webp: expected a name that ends in .png$"):
        check_output("a.webp", video=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"a.mp4: an .mp4 needs PyAV"):
        check_output("a.mp4", video=True)
    assert not list(folder.iterdir())


def test_a_rate_is_that_asked_for_or_the_usual_one():
    assert (check_fps(None, 16), check_fps(12.5, 16), check_fps(None, None)) == (16, 12.5, None)
    with pytest.raises(InputError, match="fps=8: expected none, as this model makes images"):
        check_fps(8, None)
    for rate in (0, -1, float("nan"), 1001):
        with pytest.raises(InputError, match=f"fps={rate:g}: expected a number above 0 and up to 1000"):
            check_fps(rate, 16)

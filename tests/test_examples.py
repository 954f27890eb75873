"""The scripts of examples/ that make pictures of published models, with tiny ones."""

import sys
from pathlib import Path

import pytest
from golden_pipelines import assemble
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
SIZE = dict(height=32, width=48, num_inference_steps=2, max_sequence_length=40, sparsity=None, progress=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    names = ("flux_schnell_pipeline", "wan21_pipeline")
    return {name: assemble(name, tmp_path_factory.mktemp("examples") / name) for name in names}


def test_an_image_and_how_near_fewer_steps_come_to_it(folders, tmp_path, capsys):
    import dense_and_sparse
    import text_to_image

    folder = str(folders["flux_schnell_pipeline"])
    text_to_image.main(folder, "a chipmunk", str(tmp_path / "a.png"), **SIZE)
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (48, 32) and "100% of the keys" in capsys.readouterr().out
    size = {name: value for name, value in SIZE.items() if name not in ("sparsity", "progress")}
    found = dense_and_sparse.main(folder, "a chipmunk", presets=(), **size)
    assert list(found) == ["1 steps"] and 0 < found["1 steps"] < 60


def test_a_video(folders, tmp_path, capsys):
    import text_to_video

    text_to_video.main(str(folders["wan21_pipeline"]), "a fox", str(tmp_path / "a.webp"), num_frames=5, **SIZE)
    with Image.open(tmp_path / "a.webp") as video:
        assert video.n_frames == 5 and "decoder" in capsys.readouterr().out

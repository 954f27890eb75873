"""Whole pipelines give the pixels of diffusers, from prompts to pictures, with the same noise, in float32."""

import numpy as np
import pytest
from golden_pipelines import PIPELINES, assemble, cases

from chipmunk_jax.pipelines import Pipeline

CALLS = [(name, call) for name in PIPELINES for call in cases(name)]
CLOSE = dict(rtol=0, atol=1e-3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name -> the folder of a pipeline as diffusers saves it."""
    return {name: assemble(name, tmp_path_factory.mktemp("golden") / name) for name in PIPELINES}


@pytest.fixture(scope="module")
def pipelines(folders):
    """Name -> the pipeline of the folder, read as it is."""
    return {name: Pipeline.from_pretrained(folder) for name, folder in folders.items()}


def draw(pipeline, case, **changed):
    """What the pipeline gives for a stored call."""
    settings = case.settings | dict(latents=case.arrays["noise"], sparsity=None, output_type="np", progress=False)
    return pipeline(**settings | changed)


@pytest.mark.parametrize(("name", "call"), CALLS)
def test_pixels_are_those_of_diffusers(pipelines, name, call):
    case = cases(name)[call]
    out = draw(pipelines[name], case)
    pixels = out.images if out.frames is None else out.frames
    np.testing.assert_allclose(pixels, case.arrays["pixels"], **CLOSE)

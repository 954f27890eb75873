"""Shared by all tests: which bodies of a kernel run here, and how a GPU test says that it needs one."""

import contextlib

import jax
import pytest


def pytest_collection_modifyitems(items):
    if jax.default_backend() != "gpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(params=["reference", "interpret", pytest.param("pallas", marks=pytest.mark.gpu)])
def implementation(request) -> str:
    """Every body of a kernel in turn; the compiled one on a GPU only."""
    return request.param


@contextlib.contextmanager
def cuda_target():
    """Within, lowering for "cuda" works on a machine without a GPU, as for an H100."""
    if jax.__version_info__ < (0, 11):
        yield  # 0.10 assumes one by itself
        return
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    kind = dict(device_kind="NVIDIA H100", num_cores=None)
    try:
        device = AbstractDevice(**kind)
    except TypeError:  # 0.12 wants the platform too
        device = AbstractDevice(**kind, platform="gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        yield

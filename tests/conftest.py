"""Shared by all tests: which bodies of a kernel run here, and how a GPU test says that it needs one."""

import contextlib
import gc
import json
import os
import platform
import signal
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

# Most programs of tests run once, so on a CPU they are compiled in a hurry. XLA reads this when the first array is made.
if os.environ.get("JAX_PLATFORMS") == "cpu":
    hurry = ["--xla_backend_optimization_level=0"]
    if jax.__version_info__ < (0, 11):
        hurry.append("--xla_cpu_use_fusion_emitters=false")  # twice as quick; XLA no longer knows it
        hurry.append("--xla_cpu_parallel_codegen_split_count=1")  # much of a program in parts is compiled in each
    if platform.machine() in ("x86_64", "AMD64"):
        # In a hurry LLVM contracts a product and a sum here and there, which would cost two programs of one sample a last bit.
        hurry.append("--xla_cpu_max_isa=AVX")
    os.environ["XLA_FLAGS"] = " ".join([*hurry, os.environ.get("XLA_FLAGS", "")])

from chipmunk_jax.convert import save
from chipmunk_jax.models.flux import Flux, FluxConfig
from chipmunk_jax.models.wan import Wan, WanConfig

# Float32 means float32 on a GPU too, where JAX multiplies in TF32 unless told; in fixtures as in tests, which then share programs.
jax.config.update("jax_default_matmul_precision", "highest")

WORDS = {
    "shape": ["disc", "ring", "heart"],
    "colour": ["red", "yellow", "blue", "white"],
    "texture": ["plain", "striped", "checkered"],
    "background": ["sky", "night", "desert", "meadow"],
}


def pytest_collection_modifyitems(items):
    if jax.default_backend() != "gpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_collection_finish():
    """What lives until the end is not looked through for garbage again and again."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter):
    """Shows the figures that tests record."""
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{name}: {value}")


@pytest.fixture(autouse=True)
def precision_of_users(request):
    """Tests of compiled kernels run as users do."""
    with jax.default_matmul_precision(None) if request.node.get_closest_marker("gpu") else contextlib.nullcontext():
        yield


@pytest.fixture(params=["reference", "interpret", pytest.param("pallas", marks=pytest.mark.gpu)])
def implementation(request) -> str:
    """Every body of a kernel in turn; the compiled one on a GPU only."""
    return request.param


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def trained() -> Callable[[str], Path]:
    """Name, mini-flux or mini-wan -> the folder of its weights, 41 MB, which are not part of the repository; skips without."""

    def find(name: str) -> Path:
        root, variable = Path(__file__).parents[1], f"CHIPMUNK_{name.replace('-', '_').upper()}"
        named = os.environ.get(variable)
        places = [Path(named)] if named else [root / "data" / name, *root.parent.glob(f"*/data/{name}")]
        for place in places:
            if (place / "config.json").is_file():
                return place
        pytest.skip(f"the 41 MB of {name} are not here; name their folder in {variable}")

    return find


@pytest.fixture
def interruptible():
    """Ctrl-C interrupts this process, and those that it starts, even where the tests run under nohup, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def compiled_thoroughly(monkeypatch):
    """Samples that run for longer than they compile are not compiled in a hurry."""
    compile, options = jax.stages.Lowered.compile, {"xla_backend_optimization_level": 1}
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda lowered: compile(lowered, compiler_options=options))


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


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A converted checkpoint: a tiny random FLUX in pixel space and a table of 14 words. Not to be written to."""
    config = FluxConfig(
        in_channels=12,
        vec_in_dim=64,
        context_in_dim=64,
        hidden_size=32,
        num_heads=2,
        depth=1,
        depth_single_blocks=2,
        axes_dim=(4, 6, 6),
        guidance_embed=False,
    )
    return save_with_words(drawn(Flux, config), tmp_path_factory)


@pytest.fixture(scope="session")
def video_checkpoint(tmp_path_factory) -> Path:
    """A converted checkpoint: a tiny random Wan in pixel space and the same words. Not to be written to."""
    config = WanConfig(
        dim=32, ffn_dim=128, in_dim=3, out_dim=3, text_dim=64, num_heads=2, num_layers=3, patch_size=(1, 4, 4)
    )
    return save_with_words(drawn(Wan, config), tmp_path_factory)


def drawn(network: type[nnx.Module], config, dtype=jnp.float32) -> nnx.Module:
    """A network whose every parameter is drawn by NumPy: initialisers would compile a program for each shape."""
    graph, state = nnx.split(nnx.eval_shape(lambda: network(config, dtype=dtype, rngs=nnx.Rngs(0))))
    rng, deviation = np.random.default_rng(0), lambda shape: shape[-2] ** -0.5 if len(shape) > 1 else 0.3
    draw = lambda a: jnp.asarray(deviation(a.shape) * rng.standard_normal(a.shape), a.dtype)
    return nnx.merge(graph, jax.tree.map(draw, state))


def save_with_words(model: nnx.Module, tmp_path_factory) -> Path:
    """A folder with the model and a table of WORDS."""
    from test_safetensors import write_safetensors  # only then does pytest explain its asserts

    folder = tmp_path_factory.mktemp("converted")
    (folder / "words.json").write_text(json.dumps({"attributes": list(WORDS), "words": list(WORDS.values())}))
    embeddings = np.random.default_rng(0).standard_normal((sum(map(len, WORDS.values())), 64)).astype(np.float32)
    write_safetensors(folder / "word_embeddings.safetensors", {"embeddings": embeddings})
    save(model, folder / "tiny", (folder / "words.json", folder / "word_embeddings.safetensors"))
    return folder / "tiny"


@pytest.fixture
def compilations():
    """What XLA compiles, by its seconds."""
    found = []
    listen = lambda name, seconds, **_: found.append(seconds) if name.endswith("backend_compile_duration") else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.clear_event_listeners()

"""Who may import whom (CONTRIBUTING.md), read from the source; and what importing the package does."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("chipmunk_jax", "pallas_kernels")
# Each room sees itself and those before it.
ROOMS = ("pallas_kernels", "core", "models", "convert", "pipelines", "report", "bench", "cli")
# The modules of models/ that networks import, a later one those before it; no network imports another.
SHARED = ("blocks", "mmdit", "causal_conv")
OF_ALL = ("leaves", "weights", "checkpoint")  # those that import all networks
MAY_USE_PYTORCH = "torch_baselines.py"  # inside functions: the test in a new process has no PyTorch and imports it
PYTORCH = {"torch", "torchvision", "diffusers", "transformers", "accelerate"}


def sources():
    """Every source file, and the name under which it is installed."""
    for folder, package in (
        ("pallas_kernels", "pallas_kernels"),
        ("chipmunk_jax", "chipmunk_jax"),
        ("models", "chipmunk_jax.models"),
        ("convert", "chipmunk_jax.convert"),
    ):
        for file in sorted((ROOT / folder).rglob("*.py")):
            name = ".".join((package, *file.relative_to(ROOT / folder).with_suffix("").parts))
            yield file, name.removesuffix(".__init__")


FILES = dict(sources())


def room_of(module):
    """The room of a module of ours."""
    top, _, rest = module.partition(".")
    if top == "pallas_kernels":
        return top
    part = rest.partition(".")[0]
    return part if part in ROOMS else "core"


def imported(source):
    """Full names of all modules that a source imports, at any depth; of `from a import b` both a and a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(module, source):
    """Imports of ours that the module's room, or within models/ the module itself, may not see."""
    names = [name for name in imported(source) if name.split(".")[0] in OURS]
    # What the package itself names, users find in it, and it imports when they ask for it.
    room = ROOMS.index("pipelines" if module == "chipmunk_jax" else room_of(module))
    return [name for name in names if ROOMS.index(room_of(name)) > room or borrowed(module, name)]


def borrowed(module, name):
    """Whether a network or a module that networks share imports what is another network's, or the package with all of them."""
    package = "chipmunk_jax.models."
    own, other = (path.removeprefix(package).partition(".")[0] for path in (module, name))
    if not module.startswith(package) or not name.startswith(package) or own in OF_ALL:
        return False
    return other not in (SHARED[: SHARED.index(own)] if own in SHARED else SHARED)


def test_the_rooms_are_all_there():
    assert {room_of(module) for module in FILES.values()} == set(ROOMS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_room_imports_a_later_one(file):
    assert violations(FILES[file], file.read_text()) == []


@pytest.mark.parametrize(
    ("module", "source", "forbidden"),
    [
        ("pallas_kernels.topk", "from chipmunk_jax.cache import Columns", True),
        ("pallas_kernels.topk", "import chipmunk_jax", True),
        ("chipmunk_jax.sampling", "def f():\n  from chipmunk_jax.models.flux import Flux", True),
        ("chipmunk_jax.sampling", "from chipmunk_jax import pipelines", True),
        ("chipmunk_jax", "import chipmunk_jax.cli.main", True),
        ("chipmunk_jax.models.flux", "from chipmunk_jax import convert", True),
        ("chipmunk_jax.models.wan", "from chipmunk_jax.models.flux import Flux", True),
        ("chipmunk_jax.models.wan", "from chipmunk_jax.models import flux", True),
        ("chipmunk_jax.models.wan", "from chipmunk_jax.models import MODELS", True),
        ("chipmunk_jax.models.mmdit", "from chipmunk_jax.models.flux import FluxConfig", True),
        ("chipmunk_jax.models.blocks", "from chipmunk_jax.models import mmdit", True),
        ("chipmunk_jax.models.mmdit", "from chipmunk_jax.models.blocks import Network", False),
        ("chipmunk_jax.models.flux", "from chipmunk_jax.models.mmdit import MMDiT", False),
        ("chipmunk_jax.models.wan_vae", "from chipmunk_jax.models.causal_conv import CausalConv", False),
        ("chipmunk_jax.models", "from chipmunk_jax.models.flux import Flux", False),
        ("chipmunk_jax.models.checkpoint", "from chipmunk_jax.models import MODELS", False),
        ("chipmunk_jax.models.checkpoint", "from chipmunk_jax import convert", True),
        ("chipmunk_jax.models.leaves", "from chipmunk_jax.models import MODELS", False),
        ("chipmunk_jax.models.flux", "from chipmunk_jax.models.leaves import leaves_of", True),
        ("pallas_kernels.topk", "from chipmunk_jax.bench.timing import Chain", True),
        ("chipmunk_jax.sampling", "from chipmunk_jax.bench import record", True),
        ("chipmunk_jax.models.flux", "from chipmunk_jax import bench", True),
        ("chipmunk_jax.bench.inputs", "from chipmunk_jax.models.flux import Flux", False),
        ("chipmunk_jax.cli.bench", "from chipmunk_jax.bench import record", False),
        ("chipmunk_jax.convert.rules", "from chipmunk_jax.pipelines import Pipeline", True),
        ("chipmunk_jax.convert.rules", "from chipmunk_jax.models import Flux", False),
        ("chipmunk_jax.sampling", "import pallas_kernels.topk, numpy", False),
        ("chipmunk_jax.pipelines.base", "from chipmunk_jax.report import compare_images", True),
        ("chipmunk_jax.report.quality", "from chipmunk_jax.bench import record", True),
        ("chipmunk_jax.bench.record", "from chipmunk_jax.cli.main import main", True),
        ("chipmunk_jax.media", "from chipmunk_jax.pipelines import Variant", True),
        ("chipmunk_jax.report.sheets", "from chipmunk_jax.pipelines import Pipeline", False),
        ("chipmunk_jax.bench.record", "from chipmunk_jax.report.records import machine", False),
        ("chipmunk_jax.cli.main", "from chipmunk_jax.pipelines import Pipeline", False),
    ],
)
def test_a_forbidden_import_would_be_found(module, source, forbidden):
    assert bool(violations(module, source)) == forbidden


def circle(graph):
    """Some modules that import each other in a circle, or none."""
    done, path = set(), []

    def visit(module):
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        path.append(module)
        found = next((found for other in sorted(graph[module]) if (found := visit(other))), [])
        path.pop()
        done.add(module)
        return found

    return next((found for module in sorted(graph) if (found := visit(module))), [])


def neighbours(source):
    """Modules of ours that a source imports; of `from package import module` the module alone."""
    modules = set(FILES.values())
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ({alias.name for alias in node.names} & modules)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield from ({inner} if inner in modules else {node.module} & modules)


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: set(neighbours(file.read_text())) for file, name in FILES.items()}
    graph["chipmunk_jax"] = set()  # it imports names when they are asked for
    assert circle(graph) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


def test_nothing_imports_pytorch():
    files = [file for file in (*FILES, *(ROOT / "examples").glob("*.py")) if file.name != MAY_USE_PYTORCH]
    found = {file.name: {name.split(".")[0] for name in imported(file.read_text())} & PYTORCH for file in files}
    assert not any(found.values()), found


def test_all_imports_work_in_another_folder_without_pytorch(tmp_path):
    """In a new process, as this one has imported more."""
    modules = list(FILES.values())
    program = "\n".join(
        [
            "import importlib, sys",
            f"sys.modules.update(dict.fromkeys({sorted(PYTORCH)}))  # None: importing it fails",
            "import chipmunk_jax",
            "later = [name for name in sys.modules if name.startswith(('chipmunk_jax.models', 'chipmunk_jax.convert'))]",
            "assert not later, later",
            f"for name in {modules}: importlib.import_module(name)",
            "print(chipmunk_jax.sample.__name__)",
        ]
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (0, "sample\n"), done.stderr


def test_sparsity_and_its_flags_are_read_without_jax():
    """In a new process: a command line that is wrong says so at once."""
    program = """
import argparse, sys
from chipmunk_jax.cli.sparsity_flags import add_sparsity_flags, read_sparsity
from chipmunk_jax.sparsity import PRESETS, load_sparsity
parser = argparse.ArgumentParser()
add_sparsity_flags(parser)
read_sparsity(parser.parse_args(["--sparsity", "wan-14b"]), "flux")
assert all(PRESETS.values())
print(sorted({"jax", "jaxlib", "flax", "pallas_kernels"} & sys.modules.keys()))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr

"""The wheel that a user installs: its content, its use from another folder, and its types as a user's checker sees them.

`make wheel` installs it into an empty environment, too.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import chipmunk_jax

ROOT = Path(__file__).parents[1]
# Folder here -> folder in the wheel.
PLACES = {
    "chipmunk_jax": "chipmunk_jax",
    "models": "chipmunk_jax/models",
    "convert": "chipmunk_jax/convert",
    "pallas_kernels": "pallas_kernels",
}
DATA = {".yaml", ".json", ".typed"}  # what is not Python and belongs to the packages


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """The output of a command in another folder; fails with all that it said."""
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The unpacked wheel, built from a copy: a build/ folder left in the checkout would add files that are gone."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in PLACES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    run(*pip, "--wheel-dir", built, source, cwd=built)
    (file,) = built.glob("*.whl")
    shutil.unpack_archive(file, built / "unpacked", "zip")
    return built / "unpacked"


def test_it_holds_every_file_of_the_packages_and_no_other(wheel):
    expected = {
        str(place / file.relative_to(ROOT / folder))
        for folder, place in ((name, Path(place)) for name, place in PLACES.items())
        for file in (ROOT / folder).rglob("*")
        if file.suffix in {".py", *DATA}
    }
    found = {str(file.relative_to(wheel)) for file in wheel.rglob("*") if file.is_file()}
    extra = {name for name in found if ".dist-info" in name}
    assert found - extra == expected
    assert {"chipmunk_jax/py.typed", "pallas_kernels/py.typed", "chipmunk_jax/presets/flux.yaml"} <= expected
    assert {name.split("/", 1)[1] for name in extra} >= {"METADATA", "entry_points.txt", "licenses/LICENSE"}


def test_it_samples_from_another_folder(wheel, checkpoint, tmp_path):
    """In front of the editable install: all of ours that the process imports is the wheel's."""
    program = f"""
import sys
from chipmunk_jax import Pipeline
from chipmunk_jax.sparsity import PRESETS
assert all(PRESETS[name] for name in PRESETS) and "flux" in PRESETS
free = {{"preset": "mini-flux", "max_drift": None}}  # random weights drift
pipe = Pipeline.from_pretrained({str(checkpoint)!r})
out = pipe("red striped heart on meadow", num_inference_steps=28, sparsity=free, progress=False)
assert out.density["attention"] < 1, out.density
out.images[0].save("heart.png")
for name, module in sys.modules.items():
    if name.partition(".")[0] in ("chipmunk_jax", "pallas_kernels"):
        print(module.__file__)
"""
    files = run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(wheel)).splitlines()
    assert len(files) > 20 and all(Path(file).is_relative_to(wheel) for file in files), files
    assert (tmp_path / "heart.png").is_file()


def test_a_users_program_passes_a_strict_type_checker(wheel, tmp_path):
    """Settings: [tool.mypy] in pyproject.toml. From another folder, as mypy reads the packages of its own first."""
    options = ("--config-file", ROOT / "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache")
    program = ROOT / "tests/typing/public_surface.py"
    run(sys.executable, "-m", "mypy", *options, program, cwd=tmp_path, MYPYPATH=str(wheel))


def test_the_program_names_all_that_the_package_exports():
    tree = ast.parse((ROOT / "tests/typing/public_surface.py").read_text())
    modules = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "chipmunk_jax"]
    assert sorted(alias.name for node in modules for alias in node.names) == sorted(chipmunk_jax.__all__)


def test_the_oldest_python_and_jax_that_it_admits_are_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (jax,) = (name for name in project["dependencies"] if re.match(r"jax\b", name))
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    oldest = workflow["jobs"]["test"]["strategy"]["matrix"]["include"][0]
    assert (project["requires-python"], jax) == (f">={oldest['python']}", oldest["jax"].replace("==", ">="))

"""Files of records, one JSON object a line, each with the device and versions that it was measured with."""

import json
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jaxlib

from chipmunk_jax.errors import InputError
from chipmunk_jax.memory import device_bytes
from chipmunk_jax.sparsity import Sparsity, load_sparsity
from chipmunk_jax.whole import whole

Entry = dict[str, Any]  # a record as its file has it


def sparsity_of(entry: Entry) -> Sparsity:
    """The settings of a record with a configuration; what it does not name, was not there when it was measured.

    Raises:
        InputError: settings that there are not.
    """
    part, before = entry["sparsity"]["attention"], {"block_means": 0, "share_sides": False}
    return load_sparsity(entry["sparsity"] | {"attention": part and before | part})


def machine(commit: str | None = None) -> Entry:
    """Device, driver and versions; and the most memory the process has had in use so far, in bytes.

    Args:
        commit: what to record where git is not there.
    """
    peak = device_bytes("peak_bytes_in_use")
    return _versions() | ({"commit": commit} if commit else {}) | {"peak_bytes": peak}


@cache
def _versions() -> Entry:
    """What does not change in a process."""
    return {
        "device": jax.devices()[0].device_kind,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "runtime": " ".join(jax.devices()[0].client.platform_version.split()),  # its own words: CUDA's version, or cpu
        "commit": _output("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"),
    }


def _output(*command: str) -> str | None:
    """What a command prints, None where it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def append(path: str | Path, entries: Iterable[Entry]) -> None:
    """Adds a line a record to a file, all of them or, where the process is killed or the disk is full, none.

    Args:
        path: of JSON lines; made where there is none.
        entries: finite numbers, words and what JSON nests.

    Raises:
        InputError: the file cannot be written.
    """
    lines = "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in entries)
    with whole(path) as partial:
        old = Path(path).read_bytes() if Path(path).is_file() else b""
        partial.write_bytes(old + lines.encode())


def read(path: str | Path, *, timed: bool = True) -> list[Entry]:
    """The records of a file of JSON lines.

    Args:
        path: of the file.
        timed: whether records of quality, which have no time, are refused.

    Raises:
        InputError: no such file, or a line that is no record.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    entries = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not _has(entry, RECORD):
            raise InputError(f"{path}: line {number} is no record of chipmunk bench")
        if timed and not _has(entry, TIMED):
            raise InputError(
                f"{path}: line {number} is a record of {entry['benchmark']}, without a time; expected those of "
                "kernels, steps or samples"
            )
        entries.append(entry)
    if not entries:
        raise InputError(f"{path}: holds no record")
    return entries


# Keys that a record has, and what their values are.
RECORD = {"benchmark": str, "variant": str}
TIMED = {"shape": dict, "sparsity": object, "ms": (int, float, type(None))}


def _has(entry: Any, types: dict[str, Any]) -> bool:
    return isinstance(entry, dict) and all(key in entry and isinstance(entry[key], types[key]) for key in types)

"""Safetensors files as names, shapes and dtypes; data stay on disk until they are read, as views of the mapped file."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from chipmunk_jax.errors import InputError

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
INDEX = ".safetensors.index.json"
# Of several files or indices in one folder this one holds the network.
STEM = "diffusion_pytorch_model"


@dataclass(frozen=True)
class Tensor:
    """A tensor known from its file's header."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int  # of its first byte in the file

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.size * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """A read-only view of the file, of this shape and dtype. The mapping ends with the last view."""
        if self.size == 0:
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)


@dataclass(frozen=True)
class Weights:
    """The tensors of a file, or of all shards of an index."""

    path: Path
    tensors: dict[str, Tensor]
    doubled: tuple[str, ...] = ()  # names that stand in the headers more than once


def read_weights(path: str | Path) -> Weights:
    """Every tensor under `path`, from headers only.

    Args:
        path: a .safetensors file, a .safetensors.index.json, or a folder that holds one of either.

    Raises:
        FileNotFoundError: there is no such path.
        InputError: a folder without weights, a bad header, a truncated file, an index whose shards or tensors are not
            there.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    file = choose_file(path) if path.is_dir() else path
    if not file.name.endswith(INDEX):
        return gather(path, read_header(file))
    placed = read_index(file)
    shards = {name: read_header(file.parent / name) for name in sorted(set(placed.values()))}
    for name, shard in shards.items():
        absent = {key for key, place in placed.items() if place == name} - {tensor.name for tensor in shard}
        if absent:
            raise InputError(
                f"{file}: says that {min(absent)} is in {name}, which does not hold it ({len(absent)} such)"
            )
    return gather(path, [tensor for shard in shards.values() for tensor in shard])


def choose_file(folder: Path) -> Path:
    """The file in `folder` that holds a network's weights, or the index that names its shards."""
    for suffix in (INDEX, ".safetensors"):
        files = sorted(folder.glob(f"*{suffix}"))
        preferred = folder / f"{STEM}{suffix}"
        if preferred in files:
            return preferred
        if len(files) == 1:
            return files[0]
        if files:
            names = ", ".join(file.name for file in files)
            raise InputError(f"{folder}: holds {len(files)} files ending in {suffix} ({names}); name the one to read")
    raise InputError(f"{folder}: holds no .safetensors file")


def read_index(file: Path) -> dict[str, str]:
    """Tensor name -> name of its shard, every one of which exists."""
    try:
        placed = dict(json.loads(file.read_text())["weight_map"])
        absent = sorted(name for name in set(placed.values()) if not (file.parent / name).is_file())
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: expected JSON with a weight_map from tensor names to files") from error
    if absent:
        raise InputError(
            f"{file}: names {', '.join(absent)}, which {'is' if len(absent) == 1 else 'are'} not in its folder"
        )
    return placed


def read_header(file: Path) -> list[Tensor]:
    """The tensors of one file, in the order of its header; a name that stands twice is there twice."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        start = 8 + length
        if start > size:
            raise InputError(f"{file}: not a safetensors file, or truncated: {size:,} bytes end within its header")
        text = stream.read(length)
    try:
        # Pairs, not dicts: a dict would drop the first of two equal names.
        entries = json.loads(text, object_pairs_hook=list)
    except ValueError as error:
        raise InputError(f"{file}: bad safetensors header: it is no JSON") from error
    try:
        tensors = [parse_entry(file, start, name, dict(entry)) for name, entry in entries if name != "__metadata__"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: bad safetensors header: {error}") from error
    end = max((tensor.offset + tensor.nbytes for tensor in tensors), default=start)
    if size < end:
        raise InputError(f"{file}: truncated: its header describes {end:,} bytes and the file has {size:,}")
    return tensors


def parse_entry(file: Path, start: int, name: str, entry: dict) -> Tensor:
    """One tensor of a header whose data begin at byte `start`."""
    begin, end = entry["data_offsets"]
    if entry["dtype"] not in DTYPES:
        raise InputError(f"{name} has dtype {entry['dtype']}, expected one of {', '.join(DTYPES)}")
    tensor = Tensor(name, file, tuple(entry["shape"]), DTYPES[entry["dtype"]], start + begin)
    if begin < 0 or end - begin != tensor.nbytes:
        raise InputError(f"{name} spans bytes {begin} to {end}, expected {tensor.nbytes} bytes")
    return tensor


def gather(path: Path, tensors: list[Tensor]) -> Weights:
    """Tensors by name, and the names that came twice."""
    return Weights(
        path, {tensor.name: tensor for tensor in tensors}, tuple(repeated(tensor.name for tensor in tensors))
    )


def repeated(names: Iterator[str]) -> list[str]:
    """Names that occur more than once, each listed once, in order."""
    seen: dict[str, int] = {}
    for name in names:
        seen[name] = seen.get(name, 0) + 1
    return [name for name, count in seen.items() if count > 1]

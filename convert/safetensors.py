"""Tensors that stay on disk until they are read, as views of the mapped file; and the reader of safetensors files.

The `safetensors` package checks a file: it opens none whose header is damaged or does not cover the data exactly. Then the header
is read here, as the package copies what it reads, and is silent about a name that stands twice.
"""

import json
import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from chipmunk_jax.errors import InputError, quoted

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
NAME = 500  # characters
AXES = 32  # more have no meaning, and NumPy has a limit
LARGEST = 2**60  # bytes of an array, an empty axis counted as 1: NumPy counts in 64 bits
CHUNK = 2**26  # bytes between two moments at which Ctrl-C is heard


@dataclass(eq=False)
class Checksum:
    """A stretch of a file and the CRC-32 that it should have; compared once, when the first of its tensors is read.

    It costs little: 1.6 GB/s from memory, where a transposed copy moves 0.2 to 0.5.
    """

    file: Path
    offset: int
    nbytes: int
    expected: int
    compared: bool = False

    def compare(self) -> None:
        """Raises InputError where the bytes are not those that were written."""
        if self.compared or not self.nbytes:
            return
        found, stretch = 0, np.memmap(self.file, np.uint8, "r", self.offset, (self.nbytes,))
        for start in range(0, self.nbytes, CHUNK):
            found = zlib.crc32(stretch[start : start + CHUNK], found)
        if found != self.expected:
            raise InputError(
                f"{self.file}: damaged: bytes {self.offset:,} to {self.offset + self.nbytes:,} have the CRC-32 {found:08x}, "
                f"expected {self.expected:08x} (or saved without checksums): fetch or save it anew"
            )
        self.compared = True


@dataclass(frozen=True)
class Tensor:
    """A tensor known from its file's header."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype  # in the file
    offset: int  # of its first byte in the file
    checksum: Checksum | None = None  # of the bytes among which it lies
    scale: "Tensor | None" = None  # of float8: values are the stored ones times this, one number or one per row
    twin: "Tensor | None" = None  # of another name, which must hold the same
    axes: tuple[int, ...] | None = None  # as the file has them, the slowest first; None: in order

    def __post_init__(self) -> None:
        if not self.name.isprintable() or len(self.name) > NAME:
            raise InputError(
                f"a tensor is called {quoted(self.name)}, expected a name of {NAME} printable characters at most"
            )
        whole = all(type(size) is int and size >= 0 for size in self.shape)
        nonzero = math.prod(max(size, 1) for size in self.shape[:AXES]) if whole else 0
        if not whole or len(self.shape) > AXES or nonzero * self.dtype.itemsize > LARGEST:
            raise InputError(f"{self.name} has a shape that no array has")

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.size * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """A read-only view of the file, of this shape and dtype; with a scale, an array of float32 values.

        The file is mapped until the last view is gone.

        Raises:
            InputError: the bytes are not those that were written, as far as the file tells, or the twin has others.
        """
        if self.checksum:
            self.checksum.compare()
        if self.size == 0:
            return np.zeros(self.shape, self.dtype)
        axes = self.axes or range(len(self.shape))
        stored = np.memmap(self.file, self.dtype, "r", self.offset, tuple(self.shape[axis] for axis in axes))
        stored = stored.transpose(np.argsort(axes))
        if self.twin and not equal_bytes(stored, self.twin.read()):
            raise InputError(
                f"{self.file}: {self.name} and {self.twin.name} differ, expected one tensor under two names"
            )
        return stored if self.scale is None else scaled(stored, self.scale.read())


@dataclass(frozen=True)
class Weights:
    """The tensors of a file, or of all its shards."""

    path: Path
    tensors: dict[str, Tensor]
    doubled: tuple[str, ...] = ()  # names that stand in the headers more than once
    left_out: tuple[str, ...] = ()  # top-level names of what lies beside the network and is not read
    pickled: bool = field(default=False, kw_only=True)  # whether torch.save wrote them


def read_safetensors(file: Path) -> Weights:
    """Every tensor of one file, from its header only; a name that stands twice is doubled.

    Raises:
        InputError: the header is damaged, or does not describe exactly what the file holds.
    """
    try:
        with safe_open(file, "np"):
            pass
        with file.open("rb") as stream:
            header = stream.read(int.from_bytes(stream.read(8), "little"))
        # Pairs, not dicts: a dict would drop the first of two equal names.
        entries = json.loads(header, object_pairs_hook=list)
    except (SafetensorError, ValueError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise InputError(
            f"{file}: truncated or damaged, no safetensors file as it should be: {quoted(reason, 200)}"
        ) from error
    entries = [(name, entry) for name, entry in entries if name != "__metadata__"]
    start = 8 + len(header)
    try:
        tensors = {name: parse_entry(file, start, name, dict(entry)) for name, entry in dict(entries).items()}
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    return Weights(file, tensors, tuple(repeated(name for name, _ in entries)))


def parse_entry(file: Path, start: int, name: str, entry: dict) -> Tensor:
    """One tensor of a checked header; the data begin at byte `start`."""
    if entry["dtype"] not in DTYPES:
        raise InputError(f"{name} has dtype {entry['dtype']}, expected one of {', '.join(DTYPES)}")
    return Tensor(name, file, tuple(entry["shape"]), DTYPES[entry["dtype"]], start + entry["data_offsets"][0])


def equal_bytes(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays of one shape and dtype hold the same bytes, compared in stretches, as they may be gigabytes."""
    one, other = (array.reshape(-1).view(np.uint8) for array in (one, other))
    return all(np.array_equal(one[n : n + CHUNK], other[n : n + CHUNK]) for n in range(0, one.size, CHUNK))


def scaled(stored: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float8 numbers times one scale, or one per row, in float32."""
    # Looked up among all 256 numbers, in stretches that fit the cache: 3.3 ns an element, against 9 for ml_dtypes' cast.
    table = np.arange(256, dtype=np.uint8).view(stored.dtype).astype(np.float32)
    values, bits = np.empty(stored.size, np.float32), stored.view(np.uint8).reshape(-1)
    for start in range(0, stored.size, 2**16):
        np.take(table, bits[start : start + 2**16], out=values[start : start + 2**16], mode="clip")
    values = values.reshape(stored.shape)
    values *= (
        scale.astype(np.float32).reshape(-1, *(1,) * (stored.ndim - 1)) if scale.size > 1 else np.float32(scale.item())
    )
    return values


def gather(path: Path, parts: Iterable[Weights]) -> Weights:
    """The tensors of several files as one Weights; a name that is in two of them is doubled."""
    parts = list(parts)
    return Weights(
        path,
        {name: tensor for part in parts for name, tensor in part.tensors.items()},
        tuple(dict.fromkeys(n for p in parts for n in p.doubled))
        + tuple(repeated(name for part in parts for name in part.tensors)),
        tuple(dict.fromkeys(name for part in parts for name in part.left_out)),
        pickled=any(part.pickled for part in parts),
    )


def repeated(names: Iterable[str]) -> list[str]:
    """Names that occur more than once, each listed once, in order."""
    seen: dict[str, int] = {}
    for name in names:
        seen[name] = seen.get(name, 0) + 1
    return [name for name, count in seen.items() if count > 1]

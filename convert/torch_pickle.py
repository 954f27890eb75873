"""Checkpoints of torch.save (.pt, .pth, .bin, .ckpt) as names, shapes and dtypes; data stay on disk.

Such a file is a zip archive of one pickle and of the raw bytes of every storage; before PyTorch 1.6 it was five pickles, one after
the other, and then the storages.
"""

import io
import math
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from chipmunk_jax.convert.safetensors import Checksum, Tensor, Weights, repeated
from chipmunk_jax.convert.unpickle import Layout, Storage, brief, unpickle
from chipmunk_jax.errors import InputError, listed, quoted

# Keys under which training code puts the weights, and averages of them, in the order in which they are looked for.
WRAPPERS = ("module", "model", "state_dict", "model_state_dict", "model_state", "generator", "params", "weights")
AVERAGES = ("ema", "generator_ema", "model_ema", "ema_model", "state_dict_ema", "ema_state_dict", "params_ema")
DEPTH = 3  # of wrappers in wrappers: {"state_dict": {"module": ..}}
PICKLE = 2**26  # bytes of a pickle at most; FLUX.1's names and shapes are 150 kB
MAGIC = 0x1950A86A20F9469CFC6C  # first of the five pickles


class Run(NamedTuple):
    """The bytes of a storage in the file."""

    start: int
    size: int  # bytes
    checksum: Checksum | None = None


def read_zip(path: Path) -> Weights:
    """Every tensor of an archive of torch.save: of its top level, or of the dictionary under a key of WRAPPERS or AVERAGES.

    Raises:
        InputError: no archive of torch.save, a damaged one, no dictionary of tensors, or a pickle that does anything else.
    """
    try:
        records, small = read_archive(path)
        roots = [name.removesuffix("data.pkl") for name in records if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise InputError(f"{len(roots) or 'no'} data.pkl in the archive, expected one, as torch.save writes")
        (root,) = roots
        order = small.get(f"{root}byteorder", b"little")
        if order != b"little":
            raise InputError(f"byte order {order[:20].decode(errors='replace')}, expected little")
        content = unpickle(io.BytesIO(small[f"{root}data.pkl"])).content
        runs = {
            name.removeprefix(f"{root}data/"): run for name, run in records.items() if name.startswith(f"{root}data/")
        }
        return weights_of(path, content, runs)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def read_archive(path: Path) -> tuple[dict[str, Run], dict[str, bytes]]:
    """Where every record of a zip archive lies, and the content of those that describe it."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            for entry in entries:
                check_entry(entry)
                archive.open(entry).close()  # compares the two headers that every entry has
            records = {entry.filename: locate(path, archive, entry) for entry in entries}
            small = {n: archive.read(n) for n in records if n.endswith(("/data.pkl", "/byteorder"))}
    except InputError:
        raise
    # All that the library raises on archives that are none: encrypted, in parts, cut, offsets before the file's beginning.
    except (zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, OSError, EOFError, ValueError) as error:
        raise InputError(f"not a zip archive of torch.save, truncated or damaged ({quoted(str(error))})") from error
    doubled = repeated(entry.filename for entry in entries)
    if doubled:
        raise InputError(f"the archive holds {listed([quoted(name) for name in doubled])} twice")
    check_apart([(entry.header_offset, records[entry.filename]) for entry in entries], path.stat().st_size)
    return records, small


def check_entry(entry: zipfile.ZipInfo) -> None:
    """Raises InputError where an entry is not stored as it is, or is a pickle beyond measure."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise InputError(f"{quoted(entry.filename)} is compressed, expected stored bytes")
    if entry.filename.endswith(("/data.pkl", "/byteorder")) and entry.file_size > PICKLE:
        raise InputError(f"{quoted(entry.filename)} has {entry.file_size:,} bytes, expected {PICKLE:,} at most")


def locate(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Run:
    """Where an entry's bytes are in the file."""
    archive.fp.seek(entry.header_offset + 26)
    name, extra = struct.unpack("<HH", archive.fp.read(4))
    start = entry.header_offset + 30 + name + extra
    return Run(start, entry.file_size, Checksum(path, start, entry.file_size, entry.CRC))


def check_apart(places: list[tuple[int, Run]], size: int) -> None:
    """Raises InputError where two entries of an archive share bytes, or one goes beyond the file's end."""
    places = sorted(places, key=lambda place: place[0])
    ends = [run.start + run.size for _, run in places]
    starts = [*(header for header, _ in places[1:]), size]
    if any(end > start for end, start in zip(ends, starts, strict=False)):
        raise InputError("not a zip archive of torch.save, truncated or damaged (entries overlap)")


def read_legacy(path: Path) -> Weights:
    """Every tensor of a file as torch.save wrote it before PyTorch 1.6; otherwise as of `read_zip`."""
    try:
        with path.open("rb") as stream:
            head = io.BytesIO(stream.read(PICKLE))
            if unpickle(head).content != MAGIC:
                raise InputError("a pickle, but none of torch.save")
            _, machine = unpickle(head).content, unpickle(head).content
            if not isinstance(machine, dict) or machine.get("little_endian") is not True:
                raise InputError("byte order not said to be little")
            content, storages = unpickle(head)
            keys = unpickle(head).content
            runs = locate_storages(stream, head.tell(), keys, storages)
        return weights_of(path, content, runs)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def locate_storages(
    stream: io.BufferedReader, start: int, keys: Any, storages: Mapping[str, Storage]
) -> dict[str, Run]:
    """Where the storages of an old file lie: one after the other, each after its number of elements."""
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in storages for key in keys):
        raise InputError("its list of storages is none")
    runs: dict[str, Run] = {}
    for key in keys:
        stream.seek(start)
        if int.from_bytes(stream.read(8), "little") != storages[key].size:
            raise InputError(f"truncated or damaged: storage {quoted(key)} has not the size that was said")
        runs[key] = Run(start + 8, storages[key].size * storages[key].dtype.itemsize)
        start += 8 + runs[key].size
    if start != stream.seek(0, io.SEEK_END):
        raise InputError(f"truncated or damaged: its storages end at byte {start:,}, the file at {stream.tell():,}")
    return runs


def weights_of(path: Path, content: Any, runs: Mapping[str, Run]) -> Weights:
    """The tensors of what was unpickled, where they lie in the file."""
    layouts, left_out = find_tensors(content)
    tensors = {name: place(path, runs, name, layout) for name, layout in layouts.items()}
    return Weights(path, tensors, left_out=left_out, pickled=True)


def find_tensors(content: Any) -> tuple[dict[str, Layout], tuple[str, ...]]:
    """The dictionary that holds the network's tensors, and the names of the dictionaries beside it.

    Raises:
        InputError: there is none, or it has a name that is no string.
    """
    found = unwrap(content, DEPTH)
    if found is None:
        held = listed([brief(key) for key in content]) if isinstance(content, dict) else type(content).__name__
        known = ", ".join(WRAPPERS + AVERAGES)
        raise InputError(f"no dictionary of tensors, at the top or under {known}; it holds {held or 'nothing'}")
    odd = [name for name in found[0] if not isinstance(name, str)]
    if odd:
        raise InputError(f"a tensor's name is of type {brief(odd[0])}, expected a string")
    return found


def unwrap(content: Any, depth: int) -> tuple[dict[Any, Layout], tuple[str, ...]] | None:
    """As find_tensors; a wrapper goes before tensors beside it (a step, a loss), and an average before what it is of."""
    if not isinstance(content, dict) or depth == 0:
        return None
    inner = {key: found for key in AVERAGES + WRAPPERS if (found := unwrap(content.get(key), depth - 1))}
    plain = next((key for key in WRAPPERS if key in inner), None)
    # One that lacks names is an average of only what was trained.
    whole = (key for key in AVERAGES if key in inner and (not plain or inner[key][0].keys() >= inner[plain][0].keys()))
    chosen = next(whole, plain)
    beside = tuple(brief(key) for key, value in content.items() if isinstance(value, dict) and value and key != chosen)
    if chosen:
        tensors, below = inner[chosen]
        return tensors, beside + below
    tensors = {name: value for name, value in content.items() if isinstance(value, Layout)}
    return (tensors, beside) if tensors else None


def place(path: Path, runs: Mapping[str, Run], name: str, layout: Layout) -> Tensor:
    """The tensor where it lies in the file."""
    if layout.storage.key not in runs:
        raise InputError(f"{quoted(name)} lies in storage {quoted(layout.storage.key)}, which is not in the file")
    run = runs[layout.storage.key]
    if len(layout.strides) != len(layout.shape) or (axes := order_of(layout)) is None:
        strides = f"strides {layout.strides}, expected contiguous ones, in any order of the axes"
        raise InputError(f"{quoted(name)} {layout.shape} has {strides}")
    offset = layout.first * layout.dtype.itemsize
    tensor = Tensor(name, path, layout.shape, layout.dtype, run.start + offset, run.checksum, axes=axes)
    if layout.first < 0 or offset + tensor.nbytes > run.size:
        raise InputError(f"{quoted(name)} {layout.shape} goes beyond its storage of {run.size:,} bytes")
    return tensor


def order_of(layout: Layout) -> tuple[int, ...] | None:
    """The axes as their elements lie in the storage, the slowest first; None where there are gaps, or an element counts twice."""
    axes = tuple(sorted(range(len(layout.shape)), key=lambda axis: -layout.strides[axis]))
    sizes = [layout.shape[axis] for axis in axes]
    apart = (layout.strides[axis] == math.prod(sizes[place + 1 :]) for place, axis in enumerate(axes))
    return axes if all(size <= 1 or one for size, one in zip(sizes, apart, strict=True)) else None

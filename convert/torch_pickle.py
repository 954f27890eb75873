"""Checkpoints of torch.save (.pt, .pth) as names, shapes and dtypes. Nothing in the file is ever called.

Such a file is a zip archive of one pickle and of the raw bytes of every storage. A pickle is a program that may call anything;
this reader knows the few instructions that build dictionaries of tensors, and refuses the rest by name. Data stay on disk.
"""

import math
import pickletools
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from chipmunk_jax.convert.safetensors import Tensor, Weights
from chipmunk_jax.errors import InputError

SUFFIXES = (".pt", ".pth")
# Keys under which training code puts the weights, in the order in which they are looked for.
WRAPPERS = ("module", "model", "state_dict", "model_state")
DTYPES = {
    **dict.fromkeys(("FloatStorage", "float32"), np.dtype(np.float32)),
    **dict.fromkeys(("HalfStorage", "float16"), np.dtype(np.float16)),
    **dict.fromkeys(("BFloat16Storage", "bfloat16"), np.dtype(ml_dtypes.bfloat16)),
    **dict.fromkeys(("DoubleStorage", "float64"), np.dtype(np.float64)),
    **dict.fromkeys(("LongStorage", "int64"), np.dtype(np.int64)),
    **dict.fromkeys(("IntStorage", "int32"), np.dtype(np.int32)),
    **dict.fromkeys(("ShortStorage", "int16"), np.dtype(np.int16)),
    **dict.fromkeys(("CharStorage", "int8"), np.dtype(np.int8)),
    **dict.fromkeys(("ByteStorage", "UntypedStorage", "uint8"), np.dtype(np.uint8)),
    **dict.fromkeys(("BoolStorage", "bool"), np.dtype(np.bool_)),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}


class Global(NamedTuple):
    """A name that a pickle would import. It stays a name."""

    module: str
    name: str


class Storage(NamedTuple):
    """A run of equal numbers in the archive."""

    dtype: np.dtype
    key: str


class Layout(NamedTuple):
    """A tensor as a view of a storage."""

    storage: Storage
    dtype: np.dtype
    first: int  # element of the storage
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements


def read_torch_pickle(path: str | Path) -> Weights:
    """Every tensor of a .pt or .pth file: of its top level, or of the one dictionary under "module" or a key like it.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: no archive of torch.save, a truncated one, no dictionary of tensors, or a pickle that does anything else.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            root = next((name[: -len("data.pkl")] for name in archive.namelist() if name.endswith("/data.pkl")), None)
            if root is None:
                raise InputError(f"{path}: no data.pkl in the archive, expected one of torch.save")
            content = interpret(archive.read(f"{root}data.pkl"))
            runs = {
                name: (start, entry.file_size)
                for entry in archive.infolist()
                for name, start in [(entry.filename.removeprefix(f"{root}data/"), data_start(archive, entry))]
            }
            order = archive.read(f"{root}byteorder") if f"{root}byteorder" in archive.namelist() else b"little"
    except zipfile.BadZipFile as error:
        raise InputError(
            f"{path}: not a zip archive of torch.save, or truncated (PyTorch before 1.6 wrote none: save it anew)"
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error
    if order != b"little":
        raise InputError(f"{path}: byte order {order.decode(errors='replace')}, expected little")
    try:
        return Weights(path, {name: place(path, runs, name, layout) for name, layout in tensors_of(content)})
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def tensors_of(content: Any) -> Iterator[tuple[str, Layout]]:
    """Names and layouts of the dictionary that holds the tensors."""
    for candidate in [content, *(content.get(key) for key in WRAPPERS if isinstance(content, dict))]:
        found = candidate.items() if isinstance(candidate, dict) else ()
        tensors = [(name, value) for name, value in found if isinstance(value, Layout)]
        if tensors:
            return iter(tensors)
    held = ", ".join(map(str, list(content)[:5])) if isinstance(content, dict) else type(content).__name__
    raise InputError(
        f"no dictionary of tensors, at the top or under {', '.join(WRAPPERS)}; it holds {held or 'nothing'}"
    )


def place(path: Path, runs: dict[str, tuple[int, int]], name: str, layout: Layout) -> Tensor:
    """The tensor where it lies in the file."""
    if layout.storage.key not in runs:
        raise InputError(f"{name} lies in storage {layout.storage.key}, which is not in the archive")
    start, size = runs[layout.storage.key]
    contiguous = [math.prod(layout.shape[axis + 1 :]) for axis in range(len(layout.shape))]
    if any(n > 1 and a != b for n, a, b in zip(layout.shape, layout.strides, contiguous, strict=True)):
        raise InputError(f"{name} {layout.shape} has strides {layout.strides}, expected contiguous ones")
    offset = layout.first * layout.dtype.itemsize
    tensor = Tensor(name, path, layout.shape, layout.dtype, start + offset)
    if layout.first < 0 or min((0, *layout.shape)) < 0 or offset + tensor.nbytes > size:
        raise InputError(f"{name} {layout.shape} goes beyond its storage of {size:,} bytes")
    return tensor


def data_start(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin in the file."""
    if entry.compress_type != zipfile.ZIP_STORED:
        raise InputError(f"{entry.filename} is compressed, expected stored bytes")
    archive.fp.seek(entry.header_offset + 26)
    name, extra = struct.unpack("<HH", archive.fp.read(4))
    return entry.header_offset + 30 + name + extra


def interpret(data: bytes) -> Any:
    """What a pickle builds, out of dictionaries, lists, tuples, numbers, strings and tensors.

    Raises:
        InputError: an instruction or a call that builds none of these; a broken pickle.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    try:
        for op, arg, _ in pickletools.genops(data):
            match op.name:
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    return stack.pop()
                case "MARK":
                    marks.append(len(stack))
                case "BINPUT" | "LONG_BINPUT":
                    memo[arg] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[arg])
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[op.name])
                case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                    stack.append(arg)
                case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                    stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[op.name]())
                case "TUPLE":
                    stack.append(tuple(since_mark()))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    count = int(op.name[-1])
                    stack[-count:] = [tuple(stack[-count:])]
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    stack[-1][key] = value
                case "SETITEMS":
                    items = since_mark()
                    stack[-1].update(zip(items[::2], items[1::2], strict=True))
                case "APPEND":
                    value = stack.pop()
                    stack[-1].append(value)
                case "APPENDS":
                    items = since_mark()
                    stack[-1].extend(items)
                case "GLOBAL":
                    stack.append(Global(*arg.split(" ", 1)))
                case "STACK_GLOBAL":
                    name, module = stack.pop(), stack.pop()
                    stack.append(Global(module, name))
                case "BINPERSID":
                    stack.append(storage(stack.pop()))
                case "REDUCE":
                    args, callee = stack.pop(), stack.pop()
                    stack.append(build(callee, args))
                case "BUILD":
                    stack.pop()
                    if not isinstance(
                        stack[-1], dict
                    ):  # of a dictionary it only sets attributes, as PyTorch's _metadata
                        raise InputError(f"it sets the state of a {type(stack[-1]).__name__}")
                case _:
                    raise InputError(f"it has the instruction {op.name}")
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise InputError("a broken pickle") from error
    except ValueError as error:
        raise InputError(f"refused, its pickle is not one of tensors alone: {error}") from error
    raise InputError("a broken pickle")


def storage(reference: Any) -> Storage:
    """Of a persistent id: ("storage", type, key, device, elements)."""
    kind, (_, name), key, *_ = reference
    if kind != "storage" or name not in DTYPES:
        raise InputError(f"it refers to a {kind} of {name}")
    return Storage(DTYPES[name], key)


def build(callee: Any, args: Any) -> Any:
    """What a call would return, for the few that are known."""
    match callee:
        case Global("torch._utils", "_rebuild_tensor_v2"):
            held, first, shape, strides, *_ = args
            return Layout(held, held.dtype, first, tuple(shape), tuple(strides))
        case Global("torch._utils", "_rebuild_tensor_v3"):
            held, first, shape, strides, _, _, (_, dtype), *_ = args
            if dtype not in DTYPES:
                raise InputError(f"it holds a tensor of {dtype}")
            return Layout(held, DTYPES[dtype], first, tuple(shape), tuple(strides))
        case Global("torch._utils", "_rebuild_parameter"):
            return args[0]
        case Global("collections", "OrderedDict"):
            return dict(*args)
        case Global("torch", "Size"):
            return tuple(*args)
        case Global(module, name):
            raise InputError(f"it calls {module}.{name}")
    raise InputError(f"it calls a {type(callee).__name__}")

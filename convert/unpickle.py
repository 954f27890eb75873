"""Reads what a pickle of torch.save builds, and never calls anything in it.

A pickle is a program that may call anything; this reader knows the few instructions that build dictionaries of tensors, and
refuses the rest by name. Values are only moved: one that holds another twice, which does the same, forty times over, could not be
printed, compared or hashed to the end.
"""

import pickletools
import warnings
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from chipmunk_jax.convert.safetensors import AXES, LARGEST
from chipmunk_jax.errors import InputError, quoted

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
# What training code keeps beside the weights. It is not built either: a Kept takes its place.
HARMLESS = {
    ("argparse", "Namespace"),
    ("pathlib", "PosixPath"),
    ("builtins", "set"),
    ("__builtin__", "set"),
    ("_codecs", "encode"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    ("torch", "device"),
}
INSTRUCTIONS = 1_000_000  # FLUX.1 has 30,000; 4 us each
PUSHED = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
LITERALS |= {"BINBYTES", "SHORT_BINBYTES"}


class Global(NamedTuple):
    """A name that a pickle would import. It stays a name."""

    module: str
    name: str


class Kept(NamedTuple):
    """Something harmless that is not a tensor and is not built."""

    kind: Global


class Storage(NamedTuple):
    """A run of equal numbers in the file."""

    dtype: np.dtype
    key: str
    size: int  # elements


class Layout(NamedTuple):
    """A tensor as a view of a storage."""

    storage: Storage
    dtype: np.dtype
    first: int  # element of the storage
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements


class Unpickled(NamedTuple):
    """What a pickle builds, and the storages that it names."""

    content: Any
    storages: dict[str, Storage]


def unpickle(stream: BinaryIO) -> Unpickled:
    """What the pickle at the stream's position builds: dictionaries, lists, tuples, numbers, strings, tensors. Leaves the stream at
    the end of the pickle.

    Raises:
        InputError: an instruction or a call that builds none of these; a broken pickle.
    """
    machine = Machine()
    try:
        with warnings.catch_warnings(action="error", category=DeprecationWarning):  # Python's, of odd escapes in names
            for op, argument, _ in islice(pickletools.genops(stream), INSTRUCTIONS):
                if op.name == "STOP":
                    return Unpickled(machine.stack.pop(), machine.storages)
                machine.step(op.name, argument)
            raise InputError(f"it has more than {INSTRUCTIONS:,} instructions")
    except InputError as error:
        raise InputError(f"refused, its pickle is not one of tensors alone: {error}") from error
    except (IndexError, KeyError, TypeError, AttributeError, ValueError, DeprecationWarning) as error:
        raise InputError("a broken pickle") from error


class Machine:
    """The stack on which a pickle builds, and its memo."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def step(self, op: str, argument: Any) -> None:
        """One instruction."""
        stack = self.stack
        match op:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.marks.append(len(stack))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case _ if op in PUSHED:
                stack.append(PUSHED[op])
            case _ if op in LITERALS:
                stack.append(argument)
            case _ if op in EMPTY:
                stack.append(EMPTY[op]())
            case "TUPLE":
                stack.append(tuple(self.since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self.last(int(op[-1]))))
            case "SETITEM":
                self.put(self.last(2))
            case "SETITEMS":
                self.put(self.since_mark())
            case "APPEND":
                self.extend(self.last(1))
            case "APPENDS":
                self.extend(self.since_mark())
            case "GLOBAL":
                stack.append(Global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(Global(*map(text, self.last(2))))
            case "BINPERSID":
                stack.append(self.refer(*self.last(1)))
            case "REDUCE" | "NEWOBJ":
                stack.append(build(*self.last(2), new=op == "NEWOBJ"))
            case "BUILD":
                self.last(1)
                # On a dictionary BUILD only sets attributes, such as PyTorch's _metadata, which are dropped.
                if not isinstance(stack[-1], dict | Kept):
                    raise InputError(f"it sets the state of a {brief(stack[-1])}")
            case _:
                raise InputError(f"it has the instruction {op}")

    def since_mark(self) -> list[Any]:
        """Takes what was pushed since the last mark."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def last(self, count: int) -> list[Any]:
        """Takes the last values."""
        if len(self.stack) < count:
            raise IndexError("nothing to take")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def put(self, items: list[Any]) -> None:
        """Puts keys and values, which alternate, into the dictionary on top."""
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise TypeError("no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int | float | None):
                raise InputError(f"it has a key that is a {brief(key)}")
            if key in target:
                raise InputError(f"it has the key {brief(key)} twice")
            target[key] = value

    def extend(self, items: list[Any]) -> None:
        """Appends values to the list on top."""
        if not isinstance(self.stack[-1], list):
            raise TypeError("no list")
        self.stack[-1].extend(items)

    def refer(self, reference: Any) -> Storage:
        """The storage of a persistent id: ("storage", type, key, device, elements); old files add what it is a view of."""
        kind, held, key, _, size, *view = reference
        if kind != "storage" or not isinstance(held, Global) or held.name not in DTYPES:
            raise InputError(f"it refers to a {brief(kind)} of {brief(held)}")
        if not isinstance(key, str) or type(size) is not int or any(part is not None for part in view):
            raise InputError("it refers to a storage without a name and a size, or to a part of one")
        storage = Storage(DTYPES[held.name], key, size)
        if self.storages.setdefault(key, storage) != storage:
            raise InputError(f"it has two storages {brief(key)}")
        return storage


def build(callee: Any, args: Any, *, new: bool) -> Any:
    """What a call would return, for the few callables that are known."""
    if not isinstance(callee, Global):
        raise InputError(f"it calls a {brief(callee)}")
    if callee in HARMLESS:
        return Kept(callee)
    if new:
        raise InputError(f"it makes a {brief(callee)}")
    match callee:
        case Global("torch._utils", "_rebuild_tensor"):
            return layout(*args)
        case Global("torch._utils", "_rebuild_tensor_v2"):
            held, first, shape, strides, _, _, *bits = args
            if any(bits):  # a tensor that is to be read negated or conjugated
                raise InputError("it holds a tensor that is the negative or conjugate of what is stored")
            return layout(held, first, shape, strides)
        case Global("torch._utils", "_rebuild_tensor_v3"):
            held, first, shape, strides, _, _, kind, *bits = args
            if any(bits) or not isinstance(kind, Global) or kind.name not in DTYPES:
                raise InputError(f"it holds a tensor of {brief(kind)}")
            return layout(held, first, shape, strides)._replace(dtype=DTYPES[kind.name])
        case Global("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state"):
            return args[0]
        case Global("collections", "OrderedDict") if args == ():
            return {}
        case Global("collections", "defaultdict"):
            return {}
        case Global("torch", "Size"):
            return sizes(*args)
    raise InputError(f"it calls {brief(callee)}")


def layout(storage: Any, first: Any, shape: Any, strides: Any) -> Layout:
    """A tensor of these parts, checked."""
    if not isinstance(storage, Storage) or type(first) is not int:
        raise InputError("it holds a tensor without a storage")
    return Layout(storage, storage.dtype, first, sizes(shape), sizes(strides))


def sizes(numbers: Any) -> tuple[int, ...]:
    """A shape or strides, checked."""
    whole = isinstance(numbers, tuple | list) and len(numbers) <= AXES and all(type(n) is int for n in numbers)
    if not whole or any(abs(n) > LARGEST for n in numbers):
        raise InputError("it holds a tensor with a shape that is no shape")
    return tuple(numbers)


def text(value: Any) -> str:
    """The value, checked to be a string."""
    if not isinstance(value, str):
        raise TypeError("no string")
    return value


def brief(value: Any) -> str:
    """A value as a message says it: a global or string by name, anything else by its type."""
    if isinstance(value, Global):
        return quoted(f"{value.module}.{value.name}")
    return quoted(value) if isinstance(value, str) else type(value).__name__

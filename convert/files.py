"""Which files hold a checkpoint: one, shards with or without an index, or the best of several in a folder."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from chipmunk_jax.config_file import read_json
from chipmunk_jax.convert.file_kind import FileKind, file_kind
from chipmunk_jax.convert.safetensors import Weights, gather, read_safetensors
from chipmunk_jax.convert.torch_pickle import read_legacy, read_zip
from chipmunk_jax.errors import SHOWN, InputError, listed, quoted

# The file or index of this name, diffusers', holds the network where a folder has several.
STEM = "diffusion_pytorch_model"
VARIANT = r"\.(?:fp16|bf16|fp32|fp8|(?:non_)?ema)"
PATTERN = re.compile(
    rf"(?P<stem>.+?)(?P<early>{VARIANT})?(?:-(?P<part>\d{{1,9}})-of-(?P<parts>\d{{1,9}}))?(?P<late>{VARIANT})?"
    rf"(?P<suffix>\.(?:safetensors|sft|bin|pt|pth|ckpt|pth\.tar|gguf))(?P<index>\.index(?P<last>{VARIANT})?\.json)?"
)
READERS: dict[FileKind, Callable[[Path], Weights]] = {
    "safetensors": read_safetensors,
    "zip": read_zip,
    "pickle": read_legacy,
}


class Name(NamedTuple):
    """What the files of one checkpoint share."""

    stem: str
    variant: str
    suffix: str
    parts: int  # 0: a file of its own
    indexed: bool


def read_weights(path: str | Path) -> Weights:
    """Every tensor under `path`, from headers only; of several networks in a folder, the one that choose_file() chooses.

    Args:
        path: a file of weights, a shard, an index of shards, or a folder that holds one of these.

    Raises:
        FileNotFoundError: there is no such path.
        InputError: a folder without weights or with several, an index whose shards or tensors are not there, absent
            shards, a bad file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    file = choose_file(path) if path.is_dir() else path
    kind = file_kind(file)
    if kind == "json":
        return read_shards(path, file)
    return gather(path, [read_file(part) for part in parts_of(file)])


def read_file(file: Path) -> Weights:
    """The tensors of one file; errors as of read_weights()."""
    kind = file_kind(file)
    if kind not in READERS:
        raise InputError(f"{file}: JSON, expected .safetensors or a checkpoint of torch.save")
    return READERS[kind](file)


def choose_file(folder: Path) -> Path:
    """The file in `folder` that holds a network's weights, the index that names its shards, or the first of shards."""
    found = named(folder)
    plain = {name.stem for name in found if not name.variant}
    preferences: tuple[Callable[[Name], bool], ...] = (
        lambda name: name.suffix in (".safetensors", ".sft"),
        lambda name: name.stem == STEM,
        lambda name: name.indexed,
        lambda name: not (name.variant and name.stem in plain),
    )
    for preferred in preferences:
        found = {name: file for name, file in found.items() if preferred(name)} or found
    if not found:
        raise InputError(f"{folder}: holds no .safetensors file and no other file of weights")
    if len(found) > 1:
        names = listed(sorted(file.name for file in found.values()))
        raise InputError(f"{folder}: holds {len(found)} files of weights ({names}); name the one to read")
    return next(iter(found.values()))


def named(folder: Path) -> dict[Name, Path]:
    """What the files of weights of a folder are called, each with its file, or with the first of shards."""
    files = sorted(folder.iterdir(), reverse=True) if folder.is_dir() else []
    return {name: file for file in files if (name := parse(file)) and not file.is_dir()}


def groups_of(folder: Path) -> list[Path]:
    """A file for each set of weights beside one another in a folder: the index of shards, the first of them, or the only one."""
    order = sorted(named(folder).items(), key=lambda item: (item[0].indexed, not item[0].variant))
    return list({(name.stem, name.suffix): file for name, file in order}.values())


def parse(file: Path) -> Name | None:
    """What a file's name says; None for a name that no weights have."""
    if not (match := PATTERN.fullmatch(file.name)):
        return None
    variant = match["early"] or match["late"] or match["last"] or ""
    return Name(match["stem"], variant, match["suffix"], int(match["parts"] or 0), bool(match["index"]))


def parts_of(file: Path) -> list[Path]:
    """All shards of the checkpoint of which a file's name says it is one; else the file alone."""
    name = parse(file)
    if not name or not name.parts or name.indexed:
        return [file]
    numbers = {
        int(PATTERN.fullmatch(other.name)["part"]): other for other in file.parent.iterdir() if parse(other) == name
    }
    if len(numbers) < name.parts or min(numbers) < 1 or max(numbers) > name.parts:
        absent = [str(n) for n in range(1, min(name.parts, len(numbers) + SHOWN) + 1) if n not in numbers]
        raise InputError(
            f"{file.parent}: holds {len(numbers)} of the {name.parts} shards of {name.stem}; absent: {', '.join(absent)}"
        )
    return [numbers[n] for n in sorted(numbers)]


def read_shards(path: Path, index: Path) -> Weights:
    """The tensors of all shards that an index names."""
    placed = read_index(index)
    shards = {name: read_file(index.parent / name) for name in sorted(set(placed.values()))}
    for name, shard in shards.items():
        absent = {key for key, place in placed.items() if place == name} - shard.tensors.keys()
        if absent:
            raise InputError(
                f"{index}: says that {quoted(min(absent))} is in {name}, which does not hold it ({len(absent)} such)"
            )
    return gather(path, shards.values())


def read_index(file: Path) -> dict[str, str]:
    """Tensor name -> name of its shard, every one of which is in the same folder."""
    placed = read_json(file).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise InputError(f"{file}: expected JSON with a weight_map from tensor names to files")
    names = sorted(set(placed.values()))
    outside = [name for name in names if Path(name).name != name or "\\" in name or "\0" in name]
    if outside:
        raise InputError(
            f"{file}: names {listed([quoted(name) for name in outside])}, expected names of files in its own folder"
        )
    absent = [quoted(name) for name in names if not (file.parent / name).is_file()]
    if absent:
        verb = "is" if len(absent) == 1 else "are"
        raise InputError(f"{file}: names {listed(absent)}, which {verb} not in its folder")
    return placed

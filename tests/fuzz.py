"""Checkpoints with mistakes in them: each is read as what it is, or refused in one sentence, at once.

    python tests/fuzz.py --cases 1000 --seed 0

prints what became of how many. A mistake that no reader can tell, such as another value of a weight in a format without checksums,
counts apart.
"""

import argparse
import json
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from test_safetensors import write_safetensors
from test_torch_pickle import write_tensors

from chipmunk_jax.convert.rules import fill
from chipmunk_jax.convert.source import open_source
from chipmunk_jax.errors import InputError
from chipmunk_jax.models.leaves import abstract, leaves_of

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = [
    GOLDEN / name
    for name in (
        "flux_schnell/transformer", "hunyuan_video/transformer", "wan_t2v/transformer", "wan_i2v/transformer",
        "clip_text/text_encoder", "t5/text_encoder", "umt5/text_encoder",
        "flux_vae/vae", "wan_vae/vae",
    )
]  # fmt: skip
WEIGHTS = "diffusion_pytorch_model"
SECONDS = 5.0  # after which a case hangs
LONGEST = 1200  # characters of a message
VALUES = [
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    2.5,
    1e300,
    2**70,
    "2",
    "",
    [],
    [1],
    [3, 4],
    [16, 56, 56, 1],
    {},
    {"a": 1},
    [[1]],
    float("nan"),
]
JUNK = [
    b"\0" * 8,
    b"\xff" * 8,
    b"-1",
    b"null",
    b"[]",
    b'{"a":' * 50,
    b"NaN",
    b"\x80\x02",
    b"PK\x03\x04",
    b"PK\x01\x02",
    b".",
    b"(",
    b"R",
    b"Q",
    b"u",
]
# Fields that a network computes with and no tensor tells: another value is another model.
TOLD_BY_CONFIG_ALONE = {
    "axes_dims_rope", "rope_axes_dim", "rope_theta", "num_attention_heads", "attention_head_dim", "eos_token_id",
    "relative_attention_max_distance",
}  # fmt: skip
LAYER = re.compile(r"(.*?(?:blocks?|layers)\.)(\d+)\.")  # the first part of the name of a tensor that layers have

Random = random.Random


def config_field(folder: Path, rng: Random) -> str:
    """A field of config.json is another, gone or new."""
    file = folder / "config.json"
    content = json.loads(file.read_text())
    name = rng.choice([*content, "unheard_of"])
    if rng.random() < 0.2:
        content.pop(name, None)
    else:
        content[name] = rng.choice(VALUES)
    file.write_text(json.dumps(content))
    return name


def tensors(folder: Path, rng: Random) -> None:
    """A layer is gone, or a tensor is gone, new, renamed, of another shape, or of another kind of numbers."""
    file = folder / f"{WEIGHTS}.safetensors"
    arrays = dict(load_file(file))
    name = rng.choice(list(arrays))
    match rng.randrange(7):
        case 0:
            layers = [found.groups() for key in arrays if (found := LAYER.match(key))]
            stack = rng.choice(layers)[0]
            last = max(int(layer) for other, layer in layers if other == stack)
            arrays = {key: array for key, array in arrays.items() if not key.startswith(f"{stack}{last}.")}
        case 1:
            del arrays[name]
        case 2:
            arrays[f"{name}{rng.choice(['.extra', '2', '_'])}"] = arrays[name]
        case 3:
            arrays[name.replace(".0.", f".{rng.choice([7, 300, 10**9])}.")] = arrays.pop(name)
        case 4:
            arrays[name] = arrays[name][None] if rng.random() < 0.5 else arrays[name].reshape(-1)
        case 5:
            arrays[name] = np.concatenate([arrays[name], arrays[name]])
        case 6:
            arrays[name] = arrays[name].astype(rng.choice([np.int64, np.float16]))
    write_safetensors(file, arrays)


def header(folder: Path, rng: Random) -> None:
    """The header of a safetensors file says something else."""
    file = folder / f"{WEIGHTS}.safetensors"
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    content = json.loads(data[8:end])
    name = rng.choice(list(content))
    match rng.randrange(4):
        case 0:
            content[name] = rng.choice(VALUES)
        case 1:
            content[name][rng.choice(list(content[name]))] = rng.choice([*VALUES, "F16", "I64", [0, 48]])
        case 2:
            if "data_offsets" in content[name]:
                content[name]["data_offsets"][rng.randrange(2)] += rng.choice([-4, -1, 1, 4, 48])
        case 3:
            content[f"{name}2"] = content[name]
    text = json.dumps(content).encode()
    length = len(text) + rng.choice([0, 0, 0, -1, 1, 2**40])
    file.write_bytes(length.to_bytes(8, "little") + text + data[end:])


def some_bytes(data: bytes, rng: Random) -> bytes:
    """Bytes turned, written over, put in or left out, in some places; now and then all after one is gone."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        at, junk = rng.randrange(len(data) + 1), rng.choice(JUNK)
        match rng.randrange(4):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                data[at:at] = junk
            case 2:
                data[at : at + len(junk)] = junk
            case 3:
                del data[at : at + rng.randrange(1, 9)]
    return bytes(data[: rng.randrange(len(data) + 1)] if rng.random() < 0.1 else data)


def file_bytes(folder: Path, rng: Random) -> None:
    """Any bytes of the file of weights, or of its first thousand, where the header is."""
    file = folder / f"{WEIGHTS}.safetensors"
    data = file.read_bytes()
    cut = rng.choice([1000, len(data)])
    file.write_bytes(some_bytes(data[:cut], rng) + data[cut:])


def as_pickle(folder: Path) -> Path:
    """The weights as torch.save would write them, in place of the file."""
    file = folder / f"{WEIGHTS}.safetensors"
    write_tensors(folder / f"{WEIGHTS}.pt", load_file(file))
    file.unlink()
    return folder / f"{WEIGHTS}.pt"


def zip_bytes(folder: Path, rng: Random) -> None:
    """Any bytes of a file of torch.save, or of its directory."""
    file = as_pickle(folder)
    data = file.read_bytes()
    cut = rng.choice([0, len(data) - 1500])
    file.write_bytes(data[:cut] + some_bytes(data[cut:], rng))


def pickle_bytes(folder: Path, rng: Random) -> None:
    """Instructions of a pickle, in a sound archive."""
    file = as_pickle(folder)
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, some_bytes(content, rng) if name.endswith(".pkl") else content)


def suffix(folder: Path, rng: Random) -> None:
    """The file has another name, or is of another kind."""
    file = folder / f"{WEIGHTS}.safetensors"
    if rng.random() < 0.5:
        file.rename(
            folder / f"{WEIGHTS}{rng.choice(['.bin', '.pt', '.ckpt', '-00001-of-00002.safetensors', '.txt', '.sft'])}"
        )
    else:
        kinds = [
            b"",
            b"GGUF" + b"\0" * 99,
            b"version https://git-lfs.github.com/spec/v1\n",
            b"<!DOCTYPE html>",
            b"\x1f\x8b" + b"\0" * 99,
        ]
        file.write_bytes(rng.choice(kinds))


MISTAKES: tuple[Callable[[Path, Random], str | None], ...] = (
    config_field, tensors, header, file_bytes, zip_bytes, pickle_bytes, suffix,
)  # fmt: skip


class Hang(BaseException):
    """A case that takes too long."""


@contextmanager
def deadline():
    """Raises Hang after SECONDS."""

    def late(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def content(folder: Path) -> tuple[object, dict[str, bytes]]:
    """The config of a checkpoint, and the bytes of every leaf as the file's own dtype has them."""
    source = open_source(folder)
    found, model = source.check(), abstract(source.layout.model, source.config, "float32")
    return source.config, {path: array.tobytes() for path, array in fill(found, leaves_of(model), lambda _: None)}


def judge(folder: Path, right: tuple[object, dict[str, bytes]], field: str | None) -> str:
    """What becomes of a checkpoint with a mistake: refused, read as before, or what is wrong with how it is read."""
    try:
        with deadline():
            config, leaves = content(folder)
    except (InputError, FileNotFoundError) as error:
        text = str(error)
        return (
            "refused"
            if "\n" not in text and len(text) < LONGEST
            else f"WRONG: a message of {len(text)} characters: {text[:200]}"
        )
    except Hang:
        return f"WRONG: more than {SECONDS:g} s"
    except Exception:
        return f"WRONG: {traceback.format_exc(limit=-3)}"
    if config != right[0]:
        return f"another model, as {field} says" if field in TOLD_BY_CONFIG_ALONE else f"WRONG: accepted as {config}"
    same = leaves == right[1]
    return "read as before" if same else "other values, which nothing tells"


def fuzz(cases: int, seconds: float, seed: int, scratch: Path) -> tuple[Counter, list[str]]:
    """How often what became of a mistake, and every wrong one with its case.

    Args:
        cases: to try, each a folder with one kind of mistake, the same for a seed.
        seconds: after which no case begins.
        seed: of the mistakes.
        scratch: a folder to write to.
    """
    right = [content(folder) for folder in FOLDERS]
    end, outcomes, wrong = time.monotonic() + seconds, Counter(), []
    for case in range(cases):
        if time.monotonic() > end:
            break
        rng, folder = random.Random(f"{seed} {case}"), scratch / "case"
        which, mistake = rng.randrange(len(FOLDERS)), MISTAKES[case % len(MISTAKES)]
        shutil.copytree(FOLDERS[which], folder)
        for file in folder.glob("*.safetensors"):  # transformers calls it "model"
            file.rename(folder / f"{WEIGHTS}.safetensors")
        field = mistake(folder, rng)
        outcome = judge(folder, right[which], field)
        outcomes[outcome.partition(":")[0].partition(",")[0]] += 1
        if outcome.startswith("WRONG"):
            wrong.append(f"case {case}, {mistake.__name__} {field or ''} of {FOLDERS[which].parent.name}: {outcome}")
        shutil.rmtree(folder)
    return outcomes, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="how many to try (default: 1000)")
    parser.add_argument("--seconds", type=float, default=1e9, help="after which no case begins (default: no bound)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        outcomes, wrong = fuzz(args.cases, args.seconds, args.seed, Path(scratch))
    print(
        f"{outcomes.total()} cases: " + ", ".join(f"{number} {outcome}" for outcome, number in outcomes.most_common())
    )
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

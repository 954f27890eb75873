"""hf:owner/name: a repository of Hugging Face as a folder, by the package huggingface_hub and in its cache."""

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chipmunk_jax.config_file import read_json
from chipmunk_jax.convert.source import INDEX
from chipmunk_jax.errors import InputError
from chipmunk_jax.paths import as_path

PREFIX = "hf:"
SMALL = ("*.json", "*.txt", "*.model")  # configs, indices of shards and tokenizers, in all folders
WEIGHTS = ("*.safetensors", "*.pth", "*.pt")  # of a release without folders of components, in all folders
LEFT_OUT = (
    "*.fp16.*",
    "*.fp16-*",
    ".*",
)  # copies in half precision, which lie beside the weights themselves; hidden files
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)  # owner/name, which may also be a path
PIP = "pip install 'huggingface_hub>=1.0'"


def local_path(source: str | Path, components: Sequence[str]) -> Path:
    """The path of a checkpoint; of "hf:owner/name" or "hf:owner/name@revision" that of its files in Hugging Face's cache.

    Files that are not there yet are downloaded, unless HF_HUB_OFFLINE is set: those that conversion reads, and no others.

    Args:
        source: a path, or the name of a repository.
        components: names of the folders whose weights are wanted, of a repository in diffusers' layout.

    Raises:
        InputError: a bad name, a name without "hf:" in front, huggingface_hub is not installed, or it cannot give the files.
    """
    if not isinstance(source, str) or not source.startswith(PREFIX):
        path = as_path(source)
        if isinstance(source, str) and REPOSITORY.fullmatch(source) and not path.parent.exists():
            raise InputError(f"{source}: no such file or folder; on Hugging Face it is {PREFIX}{source}")
        return path
    name, at, revision = source.removeprefix(PREFIX).partition("@")
    if name.count("/") != 1 or not all(name.split("/")) or (at and not revision):
        raise InputError(f"{source}: expected hf:owner/name or hf:owner/name@revision")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise InputError(f"{source}: needs huggingface_hub, which is not installed ({PIP})")
    options: dict[str, Any] = dict(revision=revision or None, ignore_patterns=list(LEFT_OUT))
    folder = _download(source, name, allow_patterns=list(SMALL), **options)
    weights = WEIGHTS
    if (folder / INDEX).is_file():  # what its folders hold, FLUX.1's has beside them in single files once more
        named = read_json(folder / INDEX)
        weights = tuple(f"{part}/*.safetensors" for part in components if named.get(part) not in (None, [None, None]))
    return _download(source, name, allow_patterns=[*SMALL, *weights], **options)


def name_of(path: Path) -> str:
    """What a checkpoint is called: the name of its file or folder; of a download, owner/name."""
    path = path.resolve()
    repository = path.parent.parent.name
    if path.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/", 1)
    return path.name


def _download(source: str, name: str, **options: Any) -> Path:
    """The folder of a repository with the files of these patterns.

    Raises:
        InputError: the package cannot give them.
    """
    from huggingface_hub import constants, errors, snapshot_download

    try:
        return Path(snapshot_download(name, **options))
    except errors.GatedRepoError as error:
        what = f"its terms are to be accepted on https://huggingface.co/{name}, and then `hf auth login`"
        raise InputError(f"{source}: {what}") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(f"{source}: no such repository, or a private one that wants `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{source}: no revision {options['revision']}") from error
    except errors.LocalEntryNotFoundError as error:
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "Hugging Face cannot be reached"
        raise InputError(f"{source}: not whole in the cache {constants.HF_HUB_CACHE}, and {offline}") from error
    except errors.HFValidationError as error:
        raise InputError(f"{source}: expected hf:owner/name or hf:owner/name@revision") from error
    except Exception as error:  # of the network and the disk, in classes of several packages
        said = next(iter(str(error).splitlines()), "")
        raise InputError(f"{source}: cannot be downloaded: {said or type(error).__name__}") from error

"""A whole pipeline on disk: which of its files and folders is which component, in diffusers' names for them.

A release is one of
  diffusers'       a folder for each component, under model_index.json
  the original's   files beside one another, known by their tensors: flux1-dev.safetensors and ae.safetensors; Wan's shards,
                   Wan2.1_VAE.pth and models_t5_umt5-xxl-enc-bf16.pth; Wan2.2's high_noise_model/ and low_noise_model/
  one of ours      a folder for each component, under a config.json that lists them
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from chipmunk_jax.convert.files import groups_of
from chipmunk_jax.convert.source import FOLDERS, absent_of, boundary_of, check_pair, layout_of, open_source, read_named
from chipmunk_jax.errors import InputError, listed
from chipmunk_jax.models.checkpoint import describe, describe_pipeline, is_checkpoint, is_converted, is_pipeline
from chipmunk_jax.paths import as_path

# What a pipeline of a network consists of: components in the order of their use, each with its name in MODELS.
ROLES: dict[str, dict[str, str]] = {
    "flux": {"text_encoder": "clip_text", "text_encoder_2": "t5", "transformer": "flux", "vae": "flux_vae"},
    "wan": {"text_encoder": "t5", "transformer": "wan", "transformer_2": "wan", "vae": "wan_vae"},
}
COMPONENTS = tuple(dict.fromkeys(role for roles in ROLES.values() for role in roles))
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "vocab.json")
# Folders with another name than diffusers' in the releases of the original teams.
ALIASES = {
    "transformer": ("high_noise_model", *FOLDERS),
    "transformer_2": ("low_noise_model",),
    "tokenizer": ("google/umt5-xxl",),
}


@dataclass(frozen=True)
class Folder:
    """A checkpoint of one component or of several."""

    path: Path
    network: str  # of MODELS, that of the transformer; of a component alone, its own
    components: Mapping[str, Path]  # role -> what open_source() or describe() takes
    tokenizers: Mapping[str, Path] = field(default_factory=dict)  # name -> folder
    boundary: float | None = None  # time, 1 to 0, at which transformer_2 takes over

    @property
    def several(self) -> bool:
        """Whether it has components beside its transformer."""
        return len(self.components) > 1

    @property
    def missing(self) -> list[str]:
        """Components that the pipeline of such a network has and the folder lacks."""
        two = self.boundary is not None
        wanted = [role for role in ROLES.get(self.network, {}) if two or role != "transformer_2"]
        wanted += [name for role, name in TOKENIZERS.items() if role in wanted]
        return [role for role in wanted if role not in {**self.components, **self.tokenizers}]


def open_folder(path: str | Path) -> Folder:
    """What a checkpoint consists of, from names, headers and configs.

    Args:
        path: a file or folder as `open_source` takes it, a release of several components, or a folder written by `convert`.

    Raises:
        FileNotFoundError: there is no such path.
        InputError: bad files, an unknown layout, or components that do not belong together.
    """
    path = as_path(path)
    if is_pipeline(path):
        index = describe_pipeline(path)
        found = {role: path / role for role in index.components if is_checkpoint(path / role)}
        return Folder(path, index.network, found, find_tokenizers(path), index.boundary)
    if is_converted(path):
        return Folder(path, describe(path).model, {"transformer": path})
    found, absent = find_components(path), absent_of(path)
    if found.keys() <= {"transformer"} and not absent:  # all that can be wrong is then told of one network
        return Folder(path, open_source(path).layout.model, {"transformer": path}, find_tokenizers(path))
    if "transformer" not in found:
        check_pair(path)
        raise InputError(f"{path}: holds {listed(sorted(found))}, and no transformer that they belong to")
    network = open_source(found["transformer"])
    roles = ROLES.get(network.layout.model, {})
    for role, place in found.items():
        if (model := model_of(place)) != roles.get(role):
            raise InputError(f"{place}: {model or 'unknown tensors'}, expected {roles.get(role, 'none')} as the {role}")
    boundary = boundary_of(path, network.config) if absent or "transformer_2" in found else None
    return Folder(path, network.layout.model, found, find_tokenizers(path), boundary)


def find_components(path: Path) -> dict[str, Path]:
    """Role -> folder or file, of a release, in the order of ROLES; of a path without components that are known, nothing."""
    if not path.is_dir():
        return {}
    places = {role: [path / name for name in (role, *ALIASES.get(role, ()))] for role in COMPONENTS}
    found = {role: place for role, folders in places.items() if (place := next(filter(groups_of, folders), None))}
    files: dict[str, list[Path]] = {}
    for file in groups_of(path):
        if model := model_of(file):
            files.setdefault(model, []).append(file)
    holder = found.get("transformer") or next((files[model][0] for model in files if model in ROLES), None)
    roles = ROLES.get(holder and model_of(holder), {}) if holder else {}
    for role, model in roles.items():
        # A release may hold its network twice, as one file and as a folder of shards.
        if role not in found and role != "transformer_2" and model in files:
            if len(files[model]) > 1:
                names = listed(sorted(file.name for file in files[model]))
                raise InputError(f"{path}: holds {len(files[model])} files of weights ({names}); name the one to read")
            found[role] = files[model][0]
    return {role: found[role] for role in COMPONENTS if role in found}


def find_tokenizers(path: Path) -> dict[str, Path]:
    """Name -> folder, of the tokenizers of a release."""
    holds = lambda folder: any((folder / file).is_file() for file in TOKENIZER_FILES)
    places = {name: [path / one for one in (name, *ALIASES.get(name, ()))] for name in TOKENIZERS.values()}
    return {name: place for name, folders in places.items() if (place := next(filter(holds, folders), None))}


def model_of(path: Path) -> str | None:
    """The name in MODELS of what a file or folder of weights holds, by the names of its tensors; None: it is of none."""
    try:
        layout = layout_of(read_named(path).tensors)
    except InputError:
        return None
    return layout and layout.model

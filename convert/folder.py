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

from chipmunk_jax.config_file import read_json
from chipmunk_jax.convert.files import groups_of
from chipmunk_jax.convert.hub import local_path, name_of
from chipmunk_jax.convert.source import FOLDERS, absent_of, boundary_of, check_pair, layout_of, open_source, read_named
from chipmunk_jax.errors import InputError, listed
from chipmunk_jax.models.checkpoint import (
    WITH_SIZE,
    Shift,
    describe,
    describe_pipeline,
    is_checkpoint,
    is_converted,
    is_pipeline,
    is_shift,
)

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
# The scheduler of diffusers whose samples the pipeline of a network makes, and what acts on them in its config: name -> the only
# value that is followed. A config may leave any of them out.
EULER, UNIPC = "FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"
SCHEDULERS = {"flux": EULER, "hunyuan_video": EULER, "wan": UNIPC}
FOLLOWED = {
    "disable_corrector": [],
    "final_sigmas_type": "zero",
    "invert_sigmas": False,
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "predict_x0": True,
    "prediction_type": "flow_prediction",
    "shift_terminal": None,
    "solver_order": 2,
    "solver_p": None,
    "solver_type": "bh2",
    "stochastic_sampling": False,
    "thresholding": False,
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_flow_sigmas": True,
    "use_karras_sigmas": False,
}
BY_SIZE = {  # where use_dynamic_shifting is on
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "time_shift_type": "exponential",
}


@dataclass(frozen=True)
class Folder:
    """A checkpoint of one component or of several."""

    path: Path
    network: str  # of MODELS, that of the transformer; of a component alone, its own
    components: Mapping[str, Path]  # role -> what open_source() or describe() takes
    tokenizers: Mapping[str, Path] = field(default_factory=dict)  # name -> folder
    boundary: float | None = None  # time, 1 to 0, at which transformer_2 takes over
    shift: Shift | None = None  # of the times of a sample, where the release says it

    @property
    def name(self) -> str:
        """What a sample says that it was made with."""
        return name_of(self.path)

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
        path: a file or folder as `open_source` takes it, a release of several components, or a folder written by `convert`; or
            "hf:owner/name", a repository of Hugging Face, which is downloaded to its cache.

    Raises:
        FileNotFoundError: there is no such path.
        InputError: bad files, an unknown layout, or components that do not belong together; no such repository.
    """
    path = local_path(path, COMPONENTS)
    if is_pipeline(path):
        index = describe_pipeline(path)
        found = {role: path / role for role in index.components if is_checkpoint(path / role)}
        return Folder(path, index.network, found, find_tokenizers(path), index.boundary, index.shift)
    if is_converted(path):
        return Folder(path, describe(path).model, {"transformer": path})
    found, absent = find_components(path), absent_of(path)
    if found.keys() <= {"transformer"} and not absent:  # all that can be wrong is then told of one network
        network = open_source(path).layout.model
        return Folder(path, network, {"transformer": path}, find_tokenizers(path), shift=shift_of(path, network))
    if "transformer" not in found:
        check_pair(path)
        raise InputError(f"{path}: holds {listed(sorted(found))}, and no transformer that they belong to")
    network = open_source(found["transformer"])
    roles = ROLES.get(network.layout.model, {})
    for role, place in found.items():
        if (model := model_of(place)) != roles.get(role):
            raise InputError(f"{place}: {model or 'unknown tensors'}, expected {roles.get(role, 'none')} as the {role}")
    boundary = boundary_of(path, network.config) if absent or "transformer_2" in found else None
    return Folder(
        path, network.layout.model, found, find_tokenizers(path), boundary, shift_of(path, network.layout.model)
    )


def lack(path: Path, name: str) -> str:
    """How a sentence says that a component is missing."""
    what = "tokenizer" if name in TOKENIZERS.values() else "weights"
    return f"{name}/ holds no {what}" if (path / name).is_dir() else f"no {name}"


def find_components(path: Path) -> dict[str, Path]:
    """Role -> folder or file, of a release, in the order of ROLES; of a path without components that are known, nothing.

    Raises:
        InputError: two files of one component, or a damaged one where a component is missing.
    """
    if not path.is_dir():
        return {}
    places = {role: [path / name for name in (role, *ALIASES.get(role, ()))] for role in COMPONENTS}
    found = {role: place for role, folders in places.items() if (place := next(filter(groups_of, folders), None))}
    files: dict[str, list[Path]] = {}
    damaged: list[InputError] = []
    for file in groups_of(path):
        try:
            model = model_of(file)
        except InputError as error:
            damaged.append(error)
        else:
            files.setdefault(model or "", []).append(file)
    holder = found.get("transformer") or next((files[model][0] for model in files if model in ROLES), None)
    roles = ROLES.get(holder and model_of(holder), {}) if holder else {}
    for role, model in roles.items():
        # A release may hold its network twice, as one file and as a folder of shards.
        if role not in found and role != "transformer_2" and model in files:
            if len(files[model]) > 1:
                names = listed(sorted(file.name for file in files[model]))
                raise InputError(f"{path}: holds {len(files[model])} files of weights ({names}); name the one to read")
            found[role] = files[model][0]
    release = found.keys() - {"transformer"} or find_tokenizers(path)  # else it is a folder of one network
    wanted = [role for role in roles or COMPONENTS if role != "transformer_2"]
    if damaged and release and any(role not in found for role in wanted):  # this file may be the one that is missing
        raise damaged[0]
    return {role: found[role] for role in (*roles, *COMPONENTS) if role in found}


def find_tokenizers(path: Path) -> dict[str, Path]:
    """Name -> folder, of the tokenizers of a release."""
    holds = lambda folder: any((folder / file).is_file() for file in TOKENIZER_FILES)
    places = {name: [path / one for one in (name, *ALIASES.get(name, ()))] for name in TOKENIZERS.values()}
    return {name: place for name, folders in places.items() if (place := next(filter(holds, folders), None))}


def shift_of(path: Path, network: str) -> Shift | None:
    """The shift of times that the scheduler of a diffusers folder says; None where there is none.

    Raises:
        InputError: it is no number, or the scheduler would make other samples than the pipeline of the network does.
    """
    file = path / "scheduler/scheduler_config.json"
    if not file.is_file():
        return None
    stated = read_json(file)
    dynamic = stated.get("use_dynamic_shifting")
    followed = FOLLOWED | ((BY_SIZE if network == "flux" else {"use_dynamic_shifting": False}) if dynamic else {})
    if network in SCHEDULERS:
        followed = followed | {"_class_name": SCHEDULERS[network]}
    for name, value in followed.items():
        if name in stated and stated[name] != value and (stated[name] or value):
            raise InputError(
                f"{file}: {name}={stated[name]!r}: expected {value!r}, as another scheduler makes other samples; without this "
                "file the model's usual one is taken, and solver= and sigmas= of a call give another"
            )
    if dynamic:
        return WITH_SIZE
    shift = stated.get("flow_shift", stated.get("shift"))
    if shift is not None and not is_shift(shift):
        raise InputError(f"{file}: shift {shift!r}, expected a positive number")
    return shift


def model_of(path: Path) -> str | None:
    """The name in MODELS of what a file or folder of weights holds, by the names of its tensors; None: it is of none.

    Raises:
        InputError: it cannot be read.
    """
    layout = layout_of(read_named(path).tensors)
    return layout and layout.model

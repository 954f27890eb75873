"""Pipeline: a checkpoint, prompts in, pixels out, in the words of diffusers: check, encode, denoise, decode."""

import inspect
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Never, Self

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

from chipmunk_jax.arguments import check_implementation
from chipmunk_jax.convert import Folder, open_folder, open_source, read
from chipmunk_jax.convert.folder import ROLES
from chipmunk_jax.errors import InputError, naming
from chipmunk_jax.media import to_bytes
from chipmunk_jax.memory import device_bytes
from chipmunk_jax.model import Condition, Model
from chipmunk_jax.models import MODELS, Component, Network
from chipmunk_jax.models.checkpoint import WITH_SIZE, check_weights, describe, is_checkpoint, load
from chipmunk_jax.models.leaves import abstract, parse_dtype
from chipmunk_jax.pipelines.denoising import computed, plan_spans, run_spans, together
from chipmunk_jax.pipelines.elsewhere import COMPONENTS, ELSEWHERE, NotHereError, check_known
from chipmunk_jax.pipelines.request import Arguments, Auto, Prompts, Request, Side, read_request
from chipmunk_jax.pipelines.residents import Offload, Residents
from chipmunk_jax.pipelines.variant import Settings, Variant, variant_of
from chipmunk_jax.progress import Callback, Reporter, phase
from chipmunk_jax.schedule import Taken
from chipmunk_jax.solvers import Solver
from chipmunk_jax.sparsity import Sparsity
from chipmunk_jax.strictness import key_of, usual_modes
from pallas_kernels import Implementation

OUTPUT_TYPES = ("pil", "np", "latent")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a part of a sample took."""

    seconds: float  # weights read and compilation included
    peak_bytes: int | None  # the most that the device had in use; None where it does not tell


@dataclass(frozen=True, kw_only=True)
class PipelineOutput:
    """What a pipeline made, and how."""

    # Of an image model: B PIL images, [B, H, W, 3] in 0..1, or latents; None of a video model.
    images: Any = None
    # Of a video model: B lists of PIL images, [B, T, H, W, 3] in 0..1, or latents; None of an image model.
    frames: Any = None
    seconds: float  # of all of it, compilation included
    stages: dict[str, Stage] = field(default_factory=dict)  # "text", "transformer", "decoder"
    # Shares of keys and neurons computed over all steps, layers and samples: "attention", "mlp".
    density: dict[str, float]
    # Steps in which attention or the MLP computed everything for all sides of guidance, of every sample.
    full_steps: tuple[int, ...]
    skipped_steps: tuple[int, ...] = ()  # steps that ran no block, of every sample
    one_sided_steps: tuple[int, ...] = ()  # steps that ran the prompt's side of guidance alone, of every sample
    # The same of each sample: where something is decided while it samples, they differ.
    steps_by_sample: tuple[Taken, ...] = ()
    # What the sample was made with, by the names of a call: height, num_inference_steps, guidance_scale, seed, ..; and
    # "vae_tile", rows and columns of latents, where there was no room to decode whole frames.
    settings: dict[str, Any] = field(default_factory=dict)


class Pipeline:
    """A model with what stands around it. Subclasses add load_parts(), encode() and decode()."""

    # Arguments that only some pipelines take, of Arguments.
    takes: ClassVar[tuple[str, ...]] = ()
    # Settings of a sample -> the arguments of a call that give them.
    names: ClassVar[Mapping[str, str]] = {
        "frames": "num_frames",
        "steps": "num_inference_steps",
        "guidance": "guidance_scale",
        "guidance_2": "guidance_scale_2",
        "distilled": "guidance_scale",
    }
    # Configs of the text encoders and the VAE that the published models have, by role.
    published: ClassVar[Mapping[str, Any]] = {}

    def __init__(
        self,
        folder: Folder,
        variant: Variant,
        dtype: str | None,
        offload: Offload = "auto",
        configs: Mapping[str, Any] | None = None,
    ):
        self.folder, self.variant, self.dtype = folder, variant, dtype
        self.configs = {"transformer": variant.config} | dict(configs or {})
        shapes = {role: abstract(*self.kind(role)) for role in folder.components}
        self.residents = Residents(self.load, shapes, offload)
        self._told: set[str] = set()
        self.load_parts()

    def __repr__(self) -> str:
        parts = ", ".join((*self.folder.components, *self.folder.tokenizers))
        missing = f"; missing: {', '.join(self.missing)}" if self.missing else ""
        name = f"{self.variant.name}, {jnp.dtype(self.network.dtype).name}"
        return f"{type(self).__name__}({str(self.folder.path)!r}: {name}; {parts}{missing})"

    def __setattr__(self, name: str, value: Any) -> None:
        if name in COMPONENTS:
            raise NotHereError(f"{name}: {ELSEWHERE[name]}")
        super().__setattr__(name, value)

    if not TYPE_CHECKING:  # or a checker would take any name

        def __getattr__(self, name: str) -> Any:
            """Says what there is in the place of a method or an attribute of diffusers' pipelines."""
            if name in ELSEWHERE:
                raise NotHereError(f"{name}: {ELSEWHERE[name]}")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, dtype: str | None = None, offload: Offload = "auto", **other: Never
    ) -> Self:
        """The pipeline of a checkpoint; weights are placed on the device when a call needs them.

        Args:
            folder: written by `chipmunk convert`, or a PyTorch checkpoint as convert takes it, which is read as it is: a diffusers
                folder, the original team's, a file, or "hf:owner/name", a repository of Hugging Face.
            dtype: "bfloat16" or "float32"; None: float32 on a CPU, which is faster there, else as saved, bfloat16 from PyTorch.
            offload: when a component leaves the device: "auto", where another one needs its room; "model", once another one is
                used; "none", never.
            other: none; what diffusers takes besides is told, with what there is in its place.

        Raises:
            FileNotFoundError, InputError: no such checkpoint, half a one, or one of a model that has no pipeline yet.
        """
        check_known(other, ("folder", "dtype", "offload"), "Pipeline.from_pretrained")
        dtype = dtype if dtype is None else parse_dtype(dtype).name
        found = open_folder(folder)
        if networks := [name for name in found.missing if name.startswith("transformer")]:
            raise InputError(f"{folder}: no {networks[0]}, which samples are made with")
        configs = {role: _config_of(path) for role, path in found.components.items()}
        if not issubclass(MODELS[found.network], Network):
            raise InputError(f"{folder}: a {found.network} alone, expected a pipeline or its transformer")
        variant = variant_of(configs["transformer"], found.boundary)
        if found.shift is not None:
            variant = replace(variant, shift=None if found.shift == WITH_SIZE else found.shift, small_shift=None)
        if variant.pipeline is None:
            raise InputError(
                f"{folder}: a {variant.network} model, whose text encoders and VAE are not here yet; chipmunk_jax.sample takes "
                "what they would give"
            )
        if not issubclass(variant.pipeline, cls):
            raise InputError(f"{folder}: a {variant.network} model, expected one of a {cls.__name__}")
        return variant.pipeline(found, variant, dtype, offload, configs)

    def load_parts(self) -> None:
        """Reads what stands around the networks."""

    @property
    def missing(self) -> list[str]:
        """Components without which a prompt does not become pixels."""
        return []

    def tell(self, line: str) -> None:
        """Says a line on stderr, once."""
        if line not in self._told:
            self._told.add(line)
            tqdm.write(line, file=sys.stderr)

    def check_request(self, request: Request) -> None:
        """Raises InputError where prompts, embeddings or latents do not fit."""

    def encode(self, side: Side, request: Request) -> Condition:
        """The conditions of one side of guidance, each [B, ..]."""
        raise NotImplementedError

    def decode(self, tokens: np.ndarray, settings: Settings) -> np.ndarray:
        """Images [B, H, W, 3] or videos [B, T, H, W, 3], f32 in 0..1, of tokens [B, N, C] in raster order."""
        raise NotImplementedError

    def inexact(self, settings: Settings) -> dict[str, Any]:
        """How decode() would change pixels for want of room, for the settings of the result; it is told, too."""
        return {}

    def to_tokens(self, latents: np.ndarray, settings: Settings) -> np.ndarray:
        """Tokens [B, N, C] of latents as the pipeline takes and gives them."""
        return latents

    def to_latents(self, tokens: np.ndarray, settings: Settings) -> np.ndarray:
        """The inverse of to_tokens()."""
        return tokens

    def scales(self, given: Arguments) -> dict[str, Any]:
        """The scales of guidance as settings, by name."""
        return {"guidance": given.guidance_scale}

    def refuse_unused(self, given: Arguments) -> None:
        """Raises InputError for an argument that this pipeline does not take."""
        for name in OF_SOME:
            if getattr(given, name) is not None and name not in self.takes:
                raise InputError(f"{name}: expected none, as a {type(self).__name__} takes none")

    @property
    def network(self) -> Model:
        """The network, shapes in place of weights."""
        return self.residents.shapes["transformer"]

    @property
    def model(self) -> Model:
        """The network with its weights, on the default device."""
        return self.residents.place("transformer", beside=0)

    @property
    def origin(self) -> dict[str, str]:
        """What else a sample depends on than on its settings, by name, for the file that holds it."""
        return {
            "model": self.variant.name,
            "checkpoint": self.folder.name,
            "solver": type(self.variant.solver).__name__,
            "dtype": jnp.dtype(self.network.dtype).name,
            "version": version("chipmunk-jax"),
        }

    @usual_modes()
    def check(self, prompt: Prompts | None = None, **given: Any) -> Request:
        """What a call with these arguments samples, before any weights are read.

        Args:
            prompt, given: as a call takes them.

        Raises:
            InputError: a prompt, size or setting that does not fit.
        """
        check_known(given, [field.name for field in fields(Arguments)], "Pipeline.__call__")
        with naming(self.names):
            return read_request(self, Arguments(prompt=prompt, **given))

    @usual_modes()
    def __call__(
        self,
        prompt: Prompts | None = None,
        *,
        prompt_2: Prompts | None = None,
        negative_prompt: Prompts | None = None,
        negative_prompt_2: Prompts | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        solver: Solver | str | None = None,
        guidance_scale: float | None = None,
        guidance_scale_2: float | None = None,
        true_cfg_scale: float | None = None,
        num_images_per_prompt: int = 1,
        num_videos_per_prompt: int | None = None,
        seed: int = 0,
        latents: Any = None,
        prompt_embeds: Any = None,
        pooled_prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        negative_pooled_prompt_embeds: Any = None,
        max_sequence_length: int | None = None,
        image: Any = None,
        sparsity: Sparsity | Auto | str | Path | dict[str, Any] | None = "auto",
        callback_on_step_end: Callback | None = None,
        output_type: Literal["pil", "np", "latent"] = "pil",
        progress: bool = True,
        implementation: Implementation | None = None,
        **other: Never,
    ) -> PipelineOutput:
        """Images or videos of prompts.

        Args:
            prompt: a sentence or several.
            prompt_2: what the second text encoder reads, of FLUX (T5); None: the same.
            negative_prompt: what to guide away from, one for all prompts or one each; None: the model's usual one, or nothing.
            negative_prompt_2: of the second text encoder; None: the same.
            height, width: pixels.
            num_frames: of a video.
            num_inference_steps: of the model's solver.
            sigmas: in place of num_inference_steps, times from 1 down, shifted as the model's usual ones are; 0 is added.
            timesteps: in place of num_inference_steps, times as they are, from 1 or 1000 down; 0 is added.
            solver: "euler", "unipc" or one of chipmunk_jax.solvers; None: the model's.
            guidance_scale: of true guidance, against the negative prompt; up to 1 is none and takes half as long. FLUX.1-dev was
                trained with this scale, and takes it as a condition.
            guidance_scale_2: of the second network of Wan2.2; None: guidance_scale where that is given, else the usual one.
            true_cfg_scale: of true guidance of FLUX, above 1 and with a negative prompt; None: none.
            num_images_per_prompt: images or videos of each prompt.
            num_videos_per_prompt: the same.
            seed: of the noise, 0 to 2^32 - B; sample i draws from seed + i, so it comes out the same in any batch.
            latents: the noise, in place of that of the seed, f32: of FLUX packed [B, N, 64], of videos [B, C, T, h, w].
            prompt_embeds, pooled_prompt_embeds: in place of prompts, [B, T, D] of T5 or UMT5 and of FLUX [B, D] of CLIP.
            negative_prompt_embeds, negative_pooled_prompt_embeds: those of the negative prompt.
            max_sequence_length: tokens of a prompt that T5 or UMT5 reads; None: as many as the model takes.
            image: of a pipeline that takes one.
            sparsity: "auto" is the model's own preset; a preset's name, a file, or a Sparsity; None samples densely.
            callback_on_step_end: called as callback(step, t, latents, clean) after every step: the time that it led to, 1 to 0,
                the tokens [B, N, C], and the clean tokens that they point at, raster order. It returns None. Where a
                gate or max_drift decides what steps compute, samples, [1, N, C] here, are made one after another.
            output_type: "pil", "np" (f32 in 0..1), or "latent" (as `latents`).
            progress: draws a bar.
            implementation: of the kernels, see pallas_kernels.dispatch.choose.
            other: none; what diffusers takes besides is told, with what there is in its place.

        Where height, width, num_frames, num_inference_steps or guidance_scale is None, it is the model's usual one.

        Raises:
            InputError: a prompt, size or setting that does not fit, or no room; before anything is compiled.
            NotFiniteError: a sample is not finite; it says from which step on.
        """
        start = time.perf_counter()
        if other:
            given = inspect.signature(Pipeline.__call__).parameters.values()
            check_known(other, [one.name for one in given if one.kind is not one.VAR_KEYWORD], "Pipeline.__call__")
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise InputError(f"callback_on_step_end={callback_on_step_end!r}: expected a function, or None")
        if output_type not in OUTPUT_TYPES:
            raise InputError(f"output_type={output_type!r}: expected one of {', '.join(OUTPUT_TYPES)}")
        check_implementation(implementation)
        request = self.check(
            prompt, prompt_2=prompt_2, negative_prompt=negative_prompt, negative_prompt_2=negative_prompt_2, height=height,
            width=width, num_frames=num_frames, num_inference_steps=num_inference_steps, sigmas=sigmas, timesteps=timesteps,
            solver=solver, guidance_scale=guidance_scale, guidance_scale_2=guidance_scale_2, true_cfg_scale=true_cfg_scale,
            num_images_per_prompt=num_images_per_prompt, num_videos_per_prompt=num_videos_per_prompt, seed=seed, latents=latents,
            prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled_prompt_embeds, negative_prompt_embeds=negative_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds, max_sequence_length=max_sequence_length, image=image,
            sparsity=sparsity,
        )  # fmt: skip
        if output_type != "latent":
            self.check_decoder()
        self.residents.progress = progress
        stages: dict[str, Stage] = {}
        spans = plan_spans(request, self.variant, self.residents, *self.shapes(request)[1:], implementation)
        with self._timed(stages, "text"), phase("text", progress):
            noise, cond, uncond = self.inputs(request)
        with self._timed(stages, "transformer"):
            steps, dense = request.settings["steps"], request.dense
            if dense and request.sparsity and not request.sparsity.saves_nothing:
                self.tell(f"this sparsity saves nothing in {steps} steps, sampled densely")
            callback = callback_on_step_end and _without_result(callback_on_step_end)
            runs = request.batch // request.at_once
            with Reporter(steps * runs, "dense" if dense else "sparse", progress, callback) as reporter:
                given = self.residents, noise, cond, uncond, reporter
                tokens, done = run_spans(spans, *given, apart=request.apart)
            found = together([computed(spans, self.layers(request), request.at_once) for spans in done])
            if not dense and request.sparsity.max_drift and len(found["full_steps"]) == steps:
                self.tell(f"max_drift={request.sparsity.max_drift:g}: all steps drifted too far to leave anything out")
        with self._timed(stages, "decoder"), phase("decoding", progress and output_type != "latent"):
            settings, latent = request.settings, output_type == "latent"
            inexact = {} if latent else self.inexact(settings)
            made = self.to_latents(tokens, settings) if latent else self.decode(tokens, settings)
        return PipelineOutput(
            **{"frames" if self.variant.video else "images": to_pil(made) if output_type == "pil" else made},
            seconds=time.perf_counter() - start,
            stages=stages,
            settings={self.names.get(name, name): value for name, value in settings.items()}
            | {"seed": request.seed}
            | inexact,
            **found,
        )

    def layers(self, request: Request) -> int:
        """Layers of the network."""
        return sum(stack.layers for stack in self.variant.stacks(request.settings).values())

    def text_rows(self, request: Request) -> int | None:
        """Rows of text that the network gets; None: the usual number."""
        return None

    def shapes(self, request: Request) -> tuple[Model, jax.ShapeDtypeStruct, Condition]:
        """The network, noise [B, N, C] and conditions of one side, each [B, ..], shapes in place of arrays."""
        return self.variant.shapes(request.settings, request.batch, self.network.dtype, self.text_rows(request))

    def check_decoder(self) -> None:
        """Raises InputError where pixels cannot be made."""

    def inputs(self, request: Request) -> tuple[jax.Array, Condition, Condition | None]:
        """Noise [B, N, C], and the conditions of both sides, each [B, ..]."""
        settings, batch = request.settings, request.batch
        _, noise, _ = self.shapes(request)
        if request.latents is None:
            draw = lambda i: jax.random.normal(key_of(request.seed + i), noise.shape[1:])
            drawn = jnp.stack([draw(i) for i in range(batch)])
        else:
            drawn = self.to_tokens(request.latents, settings)
        sides = [request.wanted, self.unwanted(request) if request.guided else None]
        scale = {"guidance": jnp.full(batch, settings["distilled"], jnp.float32)} if "distilled" in settings else {}
        return drawn, *(None if side is None else self.encode(side, request) | scale for side in sides)

    def unwanted(self, request: Request) -> Side | None:
        """The other side of guidance; None: zeros for all that a prompt makes."""
        return request.unwanted

    def kind(self, role: str) -> tuple[str, Any, str]:
        """Name in MODELS, config and dtype of a component."""
        path = self.folder.components[role]
        found = describe(path) if is_checkpoint(path) else None
        name = found.model if found else ROLES.get(self.folder.network, {}).get(role, self.folder.network)
        usual = "float32" if jax.default_backend() == "cpu" else found.dtype if found else "bfloat16"
        return name, self.configs[role], self.dtype or usual

    def load(self, role: str) -> Component:
        """The component with its weights, on the default device."""
        path, dtype = self.folder.components[role], self.residents.shapes[role].dtype
        return load(path, dtype) if is_checkpoint(path) else read(path, dtype, progress=self.residents.progress)

    @contextmanager
    def _timed(self, stages: dict[str, Stage], name: str) -> Iterator[None]:
        """Adds what happens within as a stage."""
        ever = lambda: device_bytes("peak_bytes_in_use")
        start, before, self.residents.peak = time.perf_counter(), ever(), 0
        yield
        # A device tells the most that it had in use ever, which is the stage's where it grew.
        peak = ever() if ever() != before else self.residents.peak or None
        stages[name] = Stage(seconds=time.perf_counter() - start, peak_bytes=peak)


# Arguments that not every pipeline takes.
OF_SOME = (
    "prompt_2", "negative_prompt_2", "guidance_scale_2", "true_cfg_scale", "prompt_embeds", "pooled_prompt_embeds",
    "negative_prompt_embeds", "negative_pooled_prompt_embeds", "max_sequence_length", "image",
)  # fmt: skip


def _without_result(callback: Callback) -> Callback:
    """The callback, refused where it returns something."""

    def call(step: int, t: float, latents: np.ndarray, clean: np.ndarray) -> None:
        returned: object = callback(step, t, latents, clean)
        if returned is not None:
            kind = type(returned).__name__
            raise InputError(
                f"callback_on_step_end returned a {kind}: latents cannot be changed between steps, expected None"
            )

    return call


def to_pil(pixels: np.ndarray) -> list[Any]:
    """Images of [B, H, W, 3] in 0..1, lists of frames of [B, T, H, W, 3]."""
    return [to_pil(one) if one.ndim == 4 else Image.fromarray(to_bytes(one)) for one in pixels]


def _config_of(path: Path) -> Any:
    """The config of a component, whose files are all there as far as headers tell."""
    if is_checkpoint(path):
        check_weights(path)
        return describe(path).config
    source = open_source(path)
    source.check()
    return source.config

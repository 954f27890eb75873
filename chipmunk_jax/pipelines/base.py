"""Pipeline: a checkpoint, prompts in, pixels out, in the words of diffusers: check, encode, denoise, decode."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from chipmunk_jax import arguments, memory, sampling
from chipmunk_jax.arguments import check_guidance, check_implementation, check_seed
from chipmunk_jax.convert import open_source, read
from chipmunk_jax.errors import InputError
from chipmunk_jax.media import to_bytes
from chipmunk_jax.model import Condition, Model
from chipmunk_jax.models.checkpoint import check_weights, describe, is_checkpoint, is_converted, load
from chipmunk_jax.models.leaves import parse_dtype
from chipmunk_jax.paths import as_path
from chipmunk_jax.pipelines.variant import Settings, Variant, variant_of
from chipmunk_jax.progress import Callback, Reporter
from chipmunk_jax.schedule import density, full_steps
from chipmunk_jax.sparsity import Sparsity, load_sparsity
from chipmunk_jax.strictness import key_of, usual_modes
from pallas_kernels import Implementation

MOST_SAMPLES = 2**20  # of a call: a mistyped number must not be taken for work
OUTPUT_TYPES = ("pil", "np", "latent")
Auto = Literal["auto"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """A sample that fits its pipeline."""

    prompts: list[str]  # B, each as often as it is sampled
    negative_prompts: list[str] | None  # B; None: no prompt on the other side, or no guidance
    settings: Settings
    seed: int
    sparsity: Sparsity | None


@dataclass(frozen=True, kw_only=True)
class PipelineOutput:
    """What a pipeline made, and how."""

    images: Any = (
        None  # of an image model: B PIL images, [B, H, W, 3] in 0..1, or latents [B, N, C]; None of a video model
    )
    frames: Any = (
        None  # of a video model: B lists of PIL images, [B, T, H, W, 3] in 0..1, or latents; None of an image model
    )
    seconds: float  # of all of it, compilation included
    density: dict[str, float]  # shares of keys and neurons computed over all steps and layers: "attention", "mlp"
    full_steps: tuple[int, ...]  # steps in which attention or the MLP computed everything
    skipped_steps: tuple[int, ...] = ()  # steps that ran no block
    settings: dict[str, Any] = field(default_factory=dict)  # frames, height, width, steps, guidance, seed


class Pipeline:
    """A model with what stands around it. Subclasses add load_parts(), encode() and decode()."""

    def __init__(self, folder: str | Path, variant: Variant, dtype: str | None):
        self.folder, self.variant, self.dtype = Path(folder), variant, dtype
        self.load_parts()

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, dtype: str | None = None) -> Self:
        """The pipeline of a checkpoint; its weights are placed on the device by the first call.

        Args:
            folder: written by `chipmunk convert`, or a PyTorch checkpoint as convert takes it, which is read as it is.
            dtype: "bfloat16" or "float32"; None: float32 on a CPU, which is faster there, else as saved, bfloat16 from PyTorch.

        Raises:
            FileNotFoundError, InputError: no such checkpoint, half a one, or one of a model that has no pipeline yet.
        """
        folder = as_path(folder)
        dtype = dtype if dtype is None else parse_dtype(dtype).name
        converted = is_converted(folder)
        found = describe(folder) if converted else open_source(folder)
        variant = variant_of(found.config)
        network = variant.network
        if variant.pipeline is None:
            raise InputError(
                f"{folder}: a {network} model, whose text encoders and VAE are not here yet; chipmunk_jax.sample takes what "
                "they would give"
            )
        if not issubclass(variant.pipeline, cls):
            raise InputError(f"{folder}: a {network} model, expected one of a {cls.__name__}")
        if converted:
            check_weights(folder)
        else:
            found.check()
        return variant.pipeline(folder, variant, dtype)

    def load_parts(self) -> None:
        """Reads what stands around the network: text encoders, VAE."""

    def encode(self, prompts: Sequence[str]) -> Condition:
        """The conditions that prompts make, each [B, ..].

        Raises:
            InputError: a prompt that the text encoders do not take.
        """
        raise NotImplementedError

    def decode(self, tokens: np.ndarray, settings: Settings) -> np.ndarray:
        """Images [B, H, W, 3] or videos [B, T, H, W, 3], f32 in 0..1, of tokens [B, N, C] in raster order."""
        raise NotImplementedError

    @cached_property
    def network(self) -> Model:
        """The network, shapes in place of weights."""
        return self.variant.shapes(self.variant.complete(), 1, self.dtype or "float32")[0]

    @cached_property
    def model(self) -> Model:
        """The network with its weights, on the default device."""
        dtype = self.dtype or ("float32" if jax.default_backend() == "cpu" else None)
        return load(self.folder, dtype) if is_checkpoint(self.folder) else read(self.folder, dtype or "bfloat16")

    @property
    def origin(self) -> dict[str, str]:
        """What else a sample depends on than on its settings, by name, for the file that holds it."""
        return {
            "model": self.variant.name,
            "checkpoint": self.folder.resolve().name,
            "solver": type(self.variant.solver).__name__,
            "dtype": jnp.dtype(self.model.dtype).name,
            "version": version("chipmunk-jax"),
        }

    @usual_modes()
    def check(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int = 0,
        sparsity: Sparsity | Auto | str | Path | dict[str, Any] | None = "auto",
    ) -> Request:
        """What a call with these arguments samples, before any weights are read.

        Raises:
            InputError: a prompt, size or setting that does not fit.
        """
        given = _sentences(prompt)
        if not given:
            raise InputError("no prompts: expected at least one")
        count = num_images_per_prompt
        if not isinstance(count, (int, np.integer)) or isinstance(count, bool) or count < 1:
            raise InputError(f"num_images_per_prompt={count}: expected at least 1")
        if len(given) * count > MOST_SAMPLES:
            raise InputError(f"num_images_per_prompt={count}: expected at most {MOST_SAMPLES // len(given)}")
        negative_prompt = self.variant.negative_prompt or None if negative_prompt is None else negative_prompt
        against = None if negative_prompt is None else _sentences(negative_prompt)
        if isinstance(negative_prompt, str):
            against = [negative_prompt] * len(given)
        if against is not None and len(against) != len(given):
            raise InputError(f"{len(against)} negative prompts for {len(given)} prompts: expected one, or as many")
        for one in (*given, *(against or ())):
            if not isinstance(one, str):
                raise InputError(f"prompt {one!r}: expected a sentence")
        self.encode(list(dict.fromkeys([*given, *(against or ())])))  # together: all that is wrong is then told at once
        sizes = dict(frames=num_frames, height=height, width=width)
        settings = self.variant.complete(**sizes, steps=num_inference_steps, guidance=guidance_scale)
        check_guidance(settings["guidance"])
        check_seed(seed, len(given) * count)
        found = self.variant.preset if isinstance(sparsity, str) and sparsity == "auto" else sparsity
        found = None if found is None else load_sparsity(found)
        self.variant.check(settings, found)
        every = lambda prompts: [one for one in prompts for _ in range(count)]
        return Request(
            prompts=every(given),
            negative_prompts=None if against is None or settings["guidance"] in (None, 1) else every(against),
            settings=settings,
            seed=int(seed),
            sparsity=found,
        )

    @usual_modes()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int = 0,
        sparsity: Sparsity | Auto | str | Path | dict[str, Any] | None = "auto",
        callback_on_step_end: Callback | None = None,
        output_type: Literal["pil", "np", "latent"] = "pil",
        progress: bool = True,
        implementation: Implementation | None = None,
    ) -> PipelineOutput:
        """Images or videos of prompts.

        Args:
            prompt: a sentence or several.
            negative_prompt: what to guide away from, one for all prompts or one each; None: the model's usual one, or nothing.
            height, width: pixels.
            num_frames: of a video.
            num_inference_steps: of the model's solver.
            guidance_scale: of true guidance, against the negative prompt; 1 is none and takes half as long.
            num_images_per_prompt: images or videos of each prompt.
            seed: of the noise, 0 to 2^32 - B; sample i draws from seed + i, so it comes out the same in any batch.
            sparsity: "auto" is the model's own preset; a preset's name, a file, or a Sparsity; None samples densely.
            callback_on_step_end: called as callback(step, t, latents, clean) after every step: the time that it led to, 1 to 0,
                the tokens [B, N, C], and the clean tokens that they point at, raster order.
            output_type: "pil", "np" (f32 in 0..1), or "latent" (the tokens).
            progress: draws a bar.
            implementation: of the kernels, see pallas_kernels.dispatch.choose.

        Where height, width, num_frames, num_inference_steps or guidance_scale is None, it is the model's usual one.

        Raises:
            InputError: a prompt, size or setting that does not fit, or no room; before anything is compiled.
            NotFiniteError: a sample is not finite; it says from which step on.
        """
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise InputError(f"callback_on_step_end={callback_on_step_end!r}: expected a function, or None")
        start, variant = time.perf_counter(), self.variant
        if output_type not in OUTPUT_TYPES:
            raise InputError(f"output_type={output_type!r}: expected one of {', '.join(OUTPUT_TYPES)}")
        check_implementation(implementation)
        request = self.check(
            prompt, negative_prompt=negative_prompt, height=height, width=width, num_frames=num_frames,
            num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt, seed=seed, sparsity=sparsity,
        )  # fmt: skip
        settings, batch = request.settings, len(request.prompts)
        scale = None if settings["guidance"] in (None, 1) else settings["guidance"]
        fixed = dict(sparsity=request.sparsity, guidance=scale, solver=variant.solver, implementation=implementation)
        # Before the noise is drawn and prompts are encoded, which for an absurd size or batch have no room either.
        _, noise, cond = variant.shapes(settings, batch, self.model.dtype)
        memory.check_room(self.model, noise, cond, placed=True, steps=settings["steps"], **fixed)
        draw = lambda i: jax.random.normal(key_of(request.seed + i), noise.shape[1:])
        against = request.negative_prompts if scale is not None else None
        arrays = jnp.stack([draw(i) for i in range(batch)]), self.encode(request.prompts)
        uncond = None if against is None else self.encode(against)
        *arrays, uncond = arguments.placed(self.model, *arrays, uncond)
        # The seed is of the columns kept by chance, which must not depend on a sample's place in its batch.
        fixed |= dict(timesteps=variant.timesteps(settings), grid=variant.grid(settings), seed=0)
        arguments.check(self.model, *arrays, uncond=uncond, **fixed)
        table = sampling.plan(self.model, *arrays, **fixed)
        title = "sparse" if request.sparsity else "dense"
        with Reporter(settings["steps"], title, progress, callback_on_step_end) as reporter:
            state = sampling.run(self.model, *arrays, table, reporter, uncond=uncond, sparsity=request.sparsity)
        tokens = np.asarray(state.x)
        made = tokens if output_type == "latent" else self.decode(tokens, settings)
        layers = sum(stack.layers for stack in self.network.stacks(noise.shape[1], cond).values())
        return PipelineOutput(
            **{"frames" if variant.video else "images": to_pil(made) if output_type == "pil" else made},
            seconds=time.perf_counter() - start,
            density=density(table.step, layers),
            full_steps=tuple(np.flatnonzero(full_steps(table.step, settings["steps"])).tolist()),
            skipped_steps=() if table.step.skip is None else tuple(np.flatnonzero(table.step.skip).tolist()),
            settings=settings | {"seed": request.seed},
        )


def _sentences(prompt: str | Sequence[str]) -> list[str]:
    """One or several as a list, whatever else is given too, so that it is told by its value."""
    return list(prompt) if isinstance(prompt, Sequence) and not isinstance(prompt, str) else [prompt]


def to_pil(pixels: np.ndarray) -> list[Any]:
    """Images of [B, H, W, 3] in 0..1, lists of frames of [B, T, H, W, 3]."""
    return [to_pil(one) if one.ndim == 4 else Image.fromarray(to_bytes(one)) for one in pixels]

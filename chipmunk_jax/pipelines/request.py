"""The arguments of a call of a pipeline, in diffusers' words, and the request that they make, before any weights are read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from chipmunk_jax.arguments import check_guidance, check_seed, is_whole, parse_timesteps
from chipmunk_jax.errors import InputError
from chipmunk_jax.finite import finite
from chipmunk_jax.fit import Span, fit
from chipmunk_jax.pipelines.variant import Settings, Variant
from chipmunk_jax.solvers import Euler, Solver, UniPC
from chipmunk_jax.sparsity import Sparsity, load_sparsity
from chipmunk_jax.step_cache import with_constants

MOST_SAMPLES = 2**20  # of a call: a mistyped number must not be taken for work
MOST_TOKENS = 512  # of a prompt: no published model was trained with more
SOLVERS: dict[str, Solver] = {"euler": Euler(), "unipc": UniPC()}
EMBEDDINGS = {"text": "prompt_embeds", "pooled": "pooled_prompt_embeds"}  # conditions -> the arguments that give them
Auto = Literal["auto"]
Prompts = str | Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What a call of a pipeline is given; Pipeline.__call__ says what each is."""

    prompt: Prompts | None = None
    prompt_2: Prompts | None = None
    negative_prompt: Prompts | None = None
    negative_prompt_2: Prompts | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    num_inference_steps: int | None = None
    sigmas: Sequence[float] | None = None
    timesteps: Sequence[float] | None = None
    solver: Solver | str | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    true_cfg_scale: float | None = None
    num_images_per_prompt: int = 1
    num_videos_per_prompt: int | None = None
    seed: int = 0
    latents: Any = None
    prompt_embeds: Any = None
    pooled_prompt_embeds: Any = None
    negative_prompt_embeds: Any = None
    negative_pooled_prompt_embeds: Any = None
    max_sequence_length: int | None = None
    image: Any = None
    sparsity: Sparsity | Auto | str | Path | dict[str, Any] | None = "auto"


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of guidance: what samples are to show, or are not to."""

    prompts: tuple[str, ...] = ()  # B, or none where embeddings are given
    prompts_2: tuple[str, ...] = ()  # B, of the second text encoder
    given: Mapping[str, np.ndarray] = field(default_factory=dict)  # conditions [B, ..] by name, in place of prompts


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one network does of a sample."""

    role: str  # of the network
    span: Span  # its steps
    guidance: float | None  # scale of true guidance; None: it sees one side
    sparsity: Sparsity | None  # fitted to its steps and sides


@dataclass(frozen=True, kw_only=True)
class Request:
    """Samples that fit their pipeline."""

    batch: int  # B
    wanted: Side
    unwanted: Side | None  # the other side of true guidance; None: nothing is said of it
    settings: Settings
    timesteps: np.ndarray  # f32 [steps + 1], 1 to 0
    solver: Solver
    length: int | None  # rows of text that prompts are read into
    seed: int
    latents: np.ndarray | None  # the noise, as the pipeline gives latents; None: drawn from the seed
    sparsity: Sparsity | None
    boundary: float | None  # time at which a second network takes over; None: there is one

    @cached_property
    def turns(self) -> list[Turn]:
        """What the networks do, one after another: all steps, or those before and after the boundary."""
        steps, times = self.settings["steps"], self.solver.times(self.timesteps)
        switch = steps if self.boundary is None else int(np.sum(times >= np.float32(self.boundary)))
        spans = {("transformer", "guidance"): (0, switch), ("transformer_2", "guidance_2"): (switch, steps)}
        turns = []
        for (role, name), span in spans.items():
            if span[0] < span[1]:
                guidance = self.settings[name] if guides(self.settings[name]) else None
                sparsity = self.sparsity and fit(self.sparsity, steps, span, guided=guidance is not None)
                turns.append(Turn(role=role, span=span, guidance=guidance, sparsity=sparsity))
        return turns

    @property
    def dense(self) -> bool:
        """Whether every step computes everything."""
        return all(turn.sparsity is None or turn.sparsity.saves_nothing for turn in self.turns)

    @property
    def apart(self) -> bool:
        """Whether samples are made one after another, as a gate or the drift guard decides for each what its steps compute."""
        return any(turn.sparsity is not None and turn.sparsity.decides for turn in self.turns)

    @property
    def at_once(self) -> int:
        """Samples that a network sees at once."""
        return 1 if self.apart else self.batch

    @property
    def guided(self) -> bool:
        """Whether any network sees the other side of true guidance."""
        return _guided(self.settings)

    @property
    def prompts(self) -> tuple[str, ...]:
        """What each sample is to show; empty where embeddings are given."""
        return self.wanted.prompts


def _guided(settings: Settings) -> bool:
    return any(guides(settings.get(name)) for name in ("guidance", "guidance_2"))


def guides(scale: float | None) -> bool:
    """Whether a scale of true guidance needs the other side."""
    return scale is not None and scale > 1


class Reader(Protocol):
    """What a pipeline knows of its arguments."""

    variant: Variant
    names: ClassVar[Mapping[str, str]]

    def tell(self, line: str) -> None:
        """Says a line on stderr, once."""

    def refuse_unused(self, given: Arguments) -> None:
        """Raises InputError for an argument that it does not take."""

    def scales(self, given: Arguments) -> dict[str, Any]:
        """The scales of guidance as settings, by name."""

    def check_request(self, request: Request) -> None:
        """Raises InputError where prompts, embeddings or latents do not fit."""


def read_request(pipeline: Reader, given: Arguments) -> Request:
    """The request that arguments make.

    Raises:
        InputError: a prompt, size or setting that does not fit.
    """
    variant, (each, count) = pipeline.variant, _count(given)
    pipeline.refuse_unused(given)
    wanted = _side(given.prompt, given.prompt_2, {"text": given.prompt_embeds, "pooled": given.pooled_prompt_embeds})
    if wanted is None:
        raise InputError("no prompts: expected at least one")
    samples = _size(wanted)
    if samples * count > MOST_SAMPLES:
        raise InputError(f"{each}={count}: expected at most {MOST_SAMPLES // samples}")
    embeddings = {"text": given.negative_prompt_embeds, "pooled": given.negative_pooled_prompt_embeds}
    negative = given.negative_prompt
    if negative is None and given.negative_prompt_embeds is None:
        negative = variant.negative_prompt or None
    unwanted = _side(negative, given.negative_prompt_2, embeddings, samples, "negative_")
    if unwanted and _size(unwanted) != samples:
        raise InputError(f"{_size(unwanted)} negative prompts for {samples} prompts: expected one, or as many")
    settings, timesteps = _settings(variant, given, pipeline.scales(given))
    for name in ("guidance", "guidance_2", "distilled"):
        check_guidance(settings.get(name), name)
    if any(x is not None for x in (given.negative_prompt, given.negative_prompt_embeds)) and not _guided(settings):
        raise InputError(
            f"negative_prompt with {pipeline.names['guidance']}={settings['guidance']}: expected a scale above 1 with it"
        )
    length = given.max_sequence_length
    if length is not None and (not is_whole(length) or not 1 <= length <= MOST_TOKENS):
        raise InputError(f"max_sequence_length={length!r}: expected a whole number from 1 to {MOST_TOKENS}")
    check_seed(given.seed, samples * count)
    found = (
        None if given.sparsity is None else with_constants(_sparsity(pipeline, given.sparsity, settings), variant.name)
    )
    variant.check(settings, found)
    request = Request(
        batch=samples * count,
        wanted=_each(wanted, count),
        unwanted=unwanted and _each(unwanted, count),
        settings=settings,
        timesteps=variant.timesteps(settings) if timesteps is None else timesteps,
        solver=_solver(variant, given.solver),
        length=length,
        seed=int(given.seed),
        latents=None if given.latents is None else numbers("latents", given.latents),
        sparsity=found,
        boundary=variant.boundary,
    )
    pipeline.check_request(request)
    return request if request.guided else replace(request, unwanted=None)


def _count(given: Arguments) -> tuple[str, int]:
    """How many samples of each prompt, and the argument that says it."""
    images, videos = given.num_images_per_prompt, given.num_videos_per_prompt
    if videos is not None and images != 1:
        raise InputError("num_images_per_prompt and num_videos_per_prompt: expected one of them")
    name, count = ("num_images_per_prompt", images) if videos is None else ("num_videos_per_prompt", videos)
    if not is_whole(count) or count < 1:
        raise InputError(f"{name}={count!r}: expected at least 1")
    return name, count


def _sparsity(pipeline: Reader, given: Any, settings: Settings) -> Sparsity:
    """The sparsity that is given; of "auto" the model's own preset, whose neighbourhoods fit a small sample, too."""
    if not (isinstance(given, str) and given == "auto"):
        return load_sparsity(given)
    found, line = pipeline.variant.own_sparsity(settings)
    if line:
        pipeline.tell(line)
    return found


def _side(
    prompt: Prompts | None,
    prompt_2: Prompts | None,
    given: Mapping[str, Any],
    samples: int | None = None,
    said: str = "",
) -> Side | None:
    """One side of guidance, a prompt alone as often as there are samples; None where nothing is said of it."""
    given = {name: numbers(f"{said}{EMBEDDINGS[name]}", array) for name, array in given.items() if array is not None}
    if prompt is not None and given:
        raise InputError("prompts and embeddings of the same side: expected one of them")
    if given:
        return Side(given=given)
    if prompt is None:
        if prompt_2 is not None:
            raise InputError("a second prompt without the first: expected both")
        return None
    prompts = _sentences(prompt)
    if not prompts:
        return None
    prompts_2 = prompts if prompt_2 is None else _sentences(prompt_2)
    if len(prompts) == 1 and samples:
        prompts = prompts * samples
    if prompt_2 is None:
        prompts_2 = prompts
    elif len(prompts_2) == 1:
        prompts_2 = prompts_2 * len(prompts)
    if len(prompts_2) != len(prompts):
        raise InputError(f"{len(prompts_2)} second prompts for {len(prompts)} prompts: expected one, or as many")
    return Side(prompts=prompts, prompts_2=prompts_2)


def _sentences(prompt: Prompts) -> tuple[str, ...]:
    found = (prompt,) if isinstance(prompt, str) or not isinstance(prompt, Sequence) else tuple(prompt)
    for one in found:
        if not isinstance(one, str) or any("\ud800" <= letter <= "\udfff" for letter in one):  # halves of a character
            raise InputError(f"prompt {one!r}: expected a sentence")
    return found


def _size(side: Side) -> int:
    """Samples that it is of."""
    return len(side.prompts) or len(next(iter(side.given.values())))


def _each(side: Side, count: int) -> Side:
    """The side with every entry so often."""
    repeat = lambda prompts: tuple(one for one in prompts for _ in range(count))
    given = {name: np.repeat(array, count, axis=0) for name, array in side.given.items()}
    return Side(prompts=repeat(side.prompts), prompts_2=repeat(side.prompts_2), given=given)


def _settings(variant: Variant, given: Arguments, scales: Mapping[str, Any]) -> tuple[Settings, np.ndarray | None]:
    """Sizes, steps and scales of a sample; and its times, where they are given."""
    steps = given.num_inference_steps
    times = None
    if sum(x is not None for x in (given.sigmas, given.timesteps, steps)) > 1:
        raise InputError("num_inference_steps, sigmas and timesteps: expected one of them")
    sizes = dict(frames=given.num_frames, height=given.height, width=given.width)
    if given.timesteps is not None:
        times = parse_timesteps(_from_thousand(given.timesteps))
    elif given.sigmas is not None:
        spaced = parse_timesteps([*numbers("sigmas", given.sigmas).ravel().tolist(), 0.0])
        settings = variant.complete(**sizes, steps=len(spaced) - 1)
        times = variant.shifted(spaced, settings)
    settings = variant.complete(**sizes, steps=steps if times is None else len(times) - 1, **scales)
    return settings, times


def _from_thousand(timesteps: Sequence[float]) -> np.ndarray:
    """Times from 1 to 0, of such or of diffusers' from 1000, which leave out the 0 at the end."""
    times = numbers("timesteps", timesteps).ravel()
    times = times / 1000 if times.size and times.max() > 1 else times
    return times if times.size and times[-1] == 0 else np.append(times, 0)


def _solver(variant: Variant, given: Solver | str | None) -> Solver:
    if given is None:
        return variant.solver
    if isinstance(given, str) and given.lower() in SOLVERS:
        return SOLVERS[given.lower()]
    if isinstance(given, (str, type)) or not hasattr(given, "step"):
        raise InputError(f"solver={given!r}: expected {', '.join(SOLVERS)}, or one such as UniPC()")
    return given


def numbers(name: str, given: Any) -> np.ndarray:
    """An argument as an array of finite float32.

    Raises:
        InputError: it is none.
    """
    try:
        array = np.asarray(given)
        array = np.asarray(array, np.float32) if array.dtype.kind in "fiuV" else None
    # The last two are PyTorch's, of bfloat16 and of what requires a gradient.
    except (ValueError, TypeError, RuntimeError):
        array = None
    if array is None or not array.size or not array.ndim:
        torch = type(given).__module__.partition(".")[0] == "torch"
        hint = f", such as {name}.detach().float().cpu().numpy()" if torch else ""
        raise InputError(f"{name}: expected an array of numbers{hint}")
    if not finite(array):
        raise InputError(f"{name}: holds NaN or infinity, expected finite numbers")
    return array

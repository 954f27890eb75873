"""What a sample takes of a device's memory, before anything is compiled, and what would make it fit."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from chipmunk_jax import memory
from chipmunk_jax.convert.folder import ROLES, open_folder
from chipmunk_jax.convert.source import open_source
from chipmunk_jax.errors import InputError
from chipmunk_jax.fit import fit
from chipmunk_jax.models import MODELS, Network
from chipmunk_jax.models.checkpoint import describe, is_checkpoint
from chipmunk_jax.models.leaves import abstract
from chipmunk_jax.pipelines.stages import working_set
from chipmunk_jax.pipelines.variant import Settings, Variant, variant_of
from chipmunk_jax.sparsity import Sparsity
from chipmunk_jax.step_cache import with_constants

RESERVE = "reserve, a fortieth of these"  # what XLA or a GPU had in use was up to 2.3 % more (tests/test_memory.py)
MORE = 0.95  # of a device, the most that is safe to give JAX: the rest is the driver's and the libraries'


@dataclass(frozen=True, kw_only=True)
class PlannedSample:
    """One sample to plan."""

    variant: Variant
    settings: Settings
    batch: int  # images or videos at once
    dtype: str
    sparsity: Sparsity | None
    beside: Mapping[str, Any] = field(
        default_factory=dict
    )  # role -> config, of the text encoders and the VAE that are planned too

    @property
    def fitted(self) -> Sparsity | None:
        """The sparsity for these steps, and for the usual sides of guidance."""
        found = self.sparsity and with_constants(self.sparsity, self.variant.name)
        return found and fit(found, self.settings["steps"], guided=self.variant.guidance is not None)

    def stages(self) -> dict[str, memory.Parts]:
        """Role -> bytes by name, with a reserve, of each component while it works, in the order of their use."""
        network, found = self.parts(), {}
        for role, name in ROLES.get(self.variant.network, {"transformer": self.variant.network}).items():
            if role == "transformer" or (role == "transformer_2" and self.variant.boundary is not None):
                found[role] = network
            elif role in self.beside:
                model = abstract(name, self.beside[role], self.dtype)
                working = working_set(model, self.settings, self.variant.text_rows)
                found[role] = _reserved({"weights": memory.nbytes(model), f"working set of the {role}": working})
        return found

    def parts(self) -> memory.Parts:
        """Bytes by name, with a reserve, of the network."""
        shapes = self.variant.shapes(self.settings, self.batch, self.dtype)
        guidance, solver = self.variant.guidance, self.variant.solver
        fixed = dict(steps=self.settings["steps"], sparsity=self.fitted, guidance=guidance, solver=solver)
        try:
            parts = memory.plan(*shapes, **fixed, implementation="pallas")
        except NotImplementedError:  # the kernels cannot take it: a GPU, too, runs the reference
            parts = memory.plan(*shapes, **fixed, implementation="reference")
        return _reserved(parts)

    def size(self) -> int:
        """Bytes of the largest stage, which is all that the device must hold at once."""
        return max(sum(parts.values()) for parts in self.stages().values())

    def size_together(self) -> int:
        """Bytes where no component leaves the device: all weights, and the rest of the stage that has most beside them."""
        stages = self.stages().values()
        weights = [parts["weights"] for parts in stages]
        return sum(weights) + max(sum(parts.values()) - size for parts, size in zip(stages, weights, strict=True))

    def fits_its_model(self) -> bool:
        """Whether sizes, steps and sparsity fit."""
        try:
            self.variant.check(self.settings, self.sparsity)
        except InputError:
            return False
        return True

    def economical(self) -> Iterator[tuple[str, "PlannedSample"]]:
        """The same sample with settings that take less, one more each time, and the flags that make it."""
        for settings, sparsity in memory.economize(self.sparsity, self.parts()):
            flags = (f"--sparsity.{name.replace('_', '-')} {value}" for name, value in settings.items())
            yield " ".join(flags), replace(self, sparsity=sparsity)

    def smaller(self) -> Iterator[tuple[range, "Change"]]:
        """Ways to take less: numbers, from the least change on, and the flags and the sample of each number."""
        stride, frames = self.variant.patch[0], self.settings.get("frames", 1)
        changed = lambda settings: (_flags(settings), replace(self, settings=self.settings | settings))
        yield range(self.batch - 1, 0, -1), lambda batch: (f"--batch {batch}", replace(self, batch=batch))
        yield range(frames - stride, 0, -stride), lambda frames: changed({"frames": frames})
        yield range(7, 0, -1), lambda eighths: changed(self._sides(eighths))
        if self.sparsity:
            yield range(1), lambda _: ("--dense", replace(self, sparsity=None))

    def _sides(self, eighths: int) -> dict[str, int]:
        pixels = self.variant.patch[-1]
        return {name: self.settings[name] * eighths // 8 // pixels * pixels for name in ("height", "width")}


def _reserved(parts: memory.Parts) -> memory.Parts:
    return parts | {RESERVE: sum(parts.values()) // 40}


def _flags(settings: dict[str, int]) -> str:
    return " ".join(f"--{name} {value}" for name, value in settings.items())


Change = Callable[[int], tuple[str, PlannedSample]]  # a number to flags, and the sample that they make


@dataclass(frozen=True)
class Planned:
    """What of a checkpoint, or of a row of VARIANTS, a plan depends on."""

    variant: Variant
    beside: Mapping[str, Any]  # role -> config
    dtype: str


def published(variant: Variant) -> Planned:
    """A published model with all that stands around it."""
    return Planned(variant, variant.pipeline.published if variant.pipeline else {}, "bfloat16")


def planned(path: str | Path) -> Planned:
    """The components that are under a path, whatever is missing beside them; from configs and headers.

    Raises:
        FileNotFoundError, InputError: no such checkpoint, half a one, or one without a network.
    """
    found = open_folder(path)
    if networks := [name for name in found.missing if name.startswith("transformer")]:
        raise InputError(f"{path}: no {networks[0]}, which samples are made with")
    if not issubclass(MODELS[found.network], Network):
        raise InputError(f"{path}: a {found.network} alone, expected a pipeline or its transformer")
    ours = {role: describe(place) for role, place in found.components.items() if is_checkpoint(place)}
    configs = {
        role: ours[role].config if role in ours else open_source(place).config
        for role, place in found.components.items()
    }
    dtype = ours["transformer"].dtype if "transformer" in ours else "bfloat16"
    beside = {role: config for role, config in configs.items() if not role.startswith("transformer")}
    return Planned(variant_of(configs["transformer"], found.boundary), beside, dtype)


def remedies(sample: PlannedSample, room: int, total: int) -> list[str]:
    """What would make a sample fit, all of it tried: the least change of each kind, and another device.

    Args:
        sample: one that needs more than `room`.
        room: bytes that JAX takes of the device.
        total: bytes of the device.
    """
    need, most = sample.size(), max(room, int(MORE * total))
    share = f"XLA_PYTHON_CLIENT_MEM_FRACTION={MORE}"
    found = [share] if need <= most else []
    sizes = ((flags, economical.size()) for flags, economical in sample.economical())
    if setting := next((one for one in sizes if one[1] <= most), None):  # nothing is lost by a larger share
        found.append(setting[0] if setting[1] <= room else f"{setting[0]} and {share}")
    found += [flags for numbers, make in sample.smaller() if (flags := _least(numbers, make, room))]
    devices = memory.DEVICES.items()
    larger = [f"--device {name}" for name, size in devices if need <= memory.share() * size]
    larger += [f"--device {name} and {share}" for name, size in devices if total < size and need <= MORE * size]
    return [*found, *larger[:1]]


def _least(numbers: range, make: Change, room: int) -> str:
    """The flags of the first number whose sample fits `room` bytes and its model; "" where there is none."""

    def small(number: int) -> bool:
        sample = make(number)[1]
        return not sample.fits_its_model() or sample.size() <= room

    # By halves, as there may be millions: all after the first one that has room, or is too small for its model, are like it.
    at = bisect_left(numbers, True, key=small)
    flags, sample = make(numbers[at]) if at < len(numbers) else ("", None)
    return flags if sample and sample.fits_its_model() else ""

"""What a sample takes of a device's memory, before anything is compiled, and what would make it fit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from chipmunk_jax import memory
from chipmunk_jax.errors import InputError
from chipmunk_jax.pipelines.variant import Settings, Variant
from chipmunk_jax.sparsity import Sparsity

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

    def parts(self) -> memory.Parts:
        """Bytes by name, with a reserve."""
        shapes = self.variant.shapes(self.settings, self.batch, self.dtype)
        guidance, solver = self.variant.guidance, self.variant.solver
        fixed = dict(steps=self.settings["steps"], sparsity=self.sparsity, guidance=guidance, solver=solver)
        try:
            parts = memory.plan(*shapes, **fixed, implementation="pallas")
        except NotImplementedError:  # the kernels cannot take it: a GPU, too, runs the reference
            parts = memory.plan(*shapes, **fixed, implementation="reference")
        return parts | {RESERVE: sum(parts.values()) // 40}

    def size(self) -> int:
        """Bytes in all."""
        return sum(self.parts().values())

    def fits_its_model(self) -> bool:
        """Whether sizes, steps and sparsity fit."""
        try:
            self.variant.check(self.settings, self.sparsity)
        except InputError:
            return False
        return True

    def smaller(self) -> Iterator[tuple[str, "PlannedSample"]]:
        """Samples that take less, each with the flags that make it: settings first, then less of everything."""
        for settings, sparsity in memory.economize(self.sparsity, self.parts()):
            flags = (f"--sparsity.{name.replace('_', '-')} {value}" for name, value in settings.items())
            yield " ".join(flags), replace(self, sparsity=sparsity)
        for batch in range(self.batch - 1, 0, -1):
            yield f"--batch {batch}", replace(self, batch=batch)
        stride, *_, pixels = self.variant.patch
        for frames in range(self.settings.get("frames", 1) - stride, 0, -stride):
            changed = replace(self, settings=self.settings | {"frames": frames})
            if changed.fits_its_model():
                yield f"--frames {frames}", changed
        for eighths in range(7, 0, -1):
            sides = {name: self.settings[name] * eighths // 8 // pixels * pixels for name in ("height", "width")}
            changed = replace(self, settings=self.settings | sides)
            if changed.fits_its_model():
                yield " ".join(f"--{name} {size}" for name, size in sides.items()), changed
        if self.sparsity:
            yield "--dense", replace(self, sparsity=None)


def remedies(sample: PlannedSample, room: int, total: int) -> list[str]:
    """What would make a sample fit, all of it tried: the least change of each kind, and another device.

    Args:
        sample: one that needs more than `room`.
        room: bytes that JAX takes of the device.
        total: bytes of the device.
    """
    need, found, most = sample.size(), {}, max(room, int(MORE * total))
    share = f"XLA_PYTHON_CLIENT_MEM_FRACTION={MORE}"
    if need <= most:
        found["share"] = share
    for flags, smaller in sample.smaller():
        kind = flags.split()[0].partition(".")[0]
        size = smaller.size() if kind not in found else most + 1
        if size <= room:
            found[kind] = flags
        elif size <= most and kind == "--sparsity":  # nothing is lost by a larger share
            found[kind] = f"{flags} and {share}"
    larger = (f"--device {name}" for name, size in memory.DEVICES.items() if need <= memory.share() * size)
    shared = (
        f"--device {name} and {share}" for name, size in memory.DEVICES.items() if total < size and need <= MORE * size
    )
    if device := next(larger, None) or next(shared, None):
        found["device"] = device
    return list(found.values())

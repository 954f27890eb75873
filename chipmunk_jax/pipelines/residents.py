"""The components of a pipeline on the device: placed when one is needed, and released when another one needs the room."""

import gc
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax

from chipmunk_jax import memory
from chipmunk_jax.errors import InputError
from chipmunk_jax.models import Component
from chipmunk_jax.progress import compiled, executed

# What leaves the device: whatever another component needs the room of, all but the one in use, or nothing.
Offload = Literal["auto", "model", "none"]


_programs: dict[Any, jax.stages.Compiled] = {}  # of the components of all pipelines in this process


class Residents:
    """Components by role, of which some are on the device."""

    def __init__(self, load: Callable[[str], Component], shapes: Mapping[str, Component], offload: Offload):
        """Args:
        load: role -> the component with its weights, on the device.
        shapes: role -> the component, shapes in place of weights.
        offload: "auto", "model" or "none".

        Raises:
            InputError: another offload.
        """
        if offload not in get_args(Offload):
            raise InputError(f"offload={offload!r}: expected one of {', '.join(get_args(Offload))}")
        self.offload, self.shapes = offload, shapes
        self._load = load
        self.progress = False  # whether weights are read with a bar of bytes
        self.peak = 0  # most bytes that programs had in use here since it was set to 0, where the device tells
        self._placed: dict[str, Component] = {}  # the one used last at the end

    def __contains__(self, role: str) -> bool:
        return role in self._placed

    @property
    def releasable(self) -> int:
        """Bytes that components on the device could make room for."""
        return 0 if self.offload == "none" else sum(map(memory.nbytes, self._placed.values()))

    def room(self, role: str) -> float:
        """Bytes that there are for what a component computes, once all that can be released has given way to its weights."""
        free = memory.free_bytes()
        if free is None:
            return math.inf
        others = {name: model for name, model in self._placed.items() if name != role and self.offload != "none"}
        weights = 0 if role in self else memory.nbytes(self.shapes[role])
        return free + sum(map(memory.nbytes, others.values())) - weights

    def place(self, role: str, beside: int) -> Component:
        """The component on the device, with room for `beside` bytes where others can give way.

        Raises:
            InputError: its weights have no room.
        """
        model = self._placed.pop(role, None)
        weights = 0 if model is not None else memory.nbytes(self.shapes[role])
        self._make_room(weights + beside)
        if model is None:
            free = memory.free_bytes()
            if free is not None and weights > free:
                hint = '; offload="auto" releases others' if self.offload == "none" and self._placed else ""
                raise InputError(
                    f"no room on {jax.devices()[0]} for the {role}: its weights are {weights / 1e9:.1f} GB, JAX has "
                    f"{free / 1e9:.1f} GB free{hint}"
                )
            model = self._load(role)
        self._placed[role] = model
        return model

    def run(self, role: str, function: Callable[..., jax.Array], *args: jax.Array) -> jax.Array:
        """function(component, *args), compiled once for the shapes of its arguments, before the weights are read."""
        model = self.shapes[role]
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
        key = type(model), model.config, model.dtype, function, str(shapes)
        if key not in _programs:
            _programs[key] = compiled(jax.jit(function).lower(model, *shapes))
        program = _programs[key]
        model = self.place(role, beside=scratch(program))
        used = memory.device_bytes("bytes_in_use")
        self.peak = max(self.peak, used + scratch(program)) if used else self.peak
        return executed(program, model, *jax.device_put(args))

    def release(self) -> None:
        """Releases all components."""
        self._placed.clear()
        gc.collect()  # a network refers to itself

    def _make_room(self, need: int) -> None:
        """Releases components, the one unused for longest first, until there is room or none is left to release."""
        while self._placed and self.offload != "none":
            free = memory.free_bytes()
            if self.offload == "auto" and (free is None or need <= free):
                return
            del self._placed[next(iter(self._placed))]
            gc.collect()  # a network refers to itself


def scratch(program: jax.stages.Compiled) -> int:
    """Bytes that a compiled program needs beside its arguments."""
    found = program.memory_analysis()
    return 0 if found is None else found.temp_size_in_bytes + found.output_size_in_bytes

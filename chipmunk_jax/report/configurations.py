"""Ways to sample that are compared with each other, as a YAML file names them."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from chipmunk_jax.config_file import read_config
from chipmunk_jax.errors import InputError
from chipmunk_jax.sparsity import Sparsity, StepCache, load_sparsity

SETTINGS = ("steps", "guidance", "solver")  # of a configuration, beside its sparsity
EXAMPLE = "names, and for each of them settings such as {attention.top_keys: 0.1}"
WARM_UP = 0.1  # of the steps, run at the start of a sample that skips steps, as in MagCache and SeaCache


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One way to sample."""

    sparsity: Sparsity | None  # None: dense
    steps: int | None = None  # None: as many as the dense samples that it is compared with
    guidance: float | None = None  # of both; None: the usual one
    solver: str | None = None  # None: the usual one, which the dense samples have
    named: str | None = None  # the method, in words; None: see method()

    @property
    def given(self) -> dict[str, Any]:
        """Arguments of a call of the pipeline by name, beside `sparsity`: those that are not None."""
        given = dict(num_inference_steps=self.steps, guidance_scale=self.guidance, solver=self.solver)
        return {name: value for name, value in given.items() if value is not None}

    def method(self, steps: int) -> str:
        """What it saves by, in words: configurations of one method are points of one line.

        Args:
            steps: of the dense samples.
        """
        sparse = self.sparsity is not None and (self.sparsity.attention or self.sparsity.mlp)
        savings = {
            "sparse deltas": sparse,
            "skipped steps": self.sparsity and self.sparsity.step_cache,
            "one-sided steps": self.sparsity and self.sparsity.guidance_cache,
            "fewer steps": self.steps is not None and self.steps < steps,
            str(self.solver): self.solver,
        }
        return self.named or " + ".join(name for name, present in savings.items() if present) or "dense"


def rivals(share: float, steps: int) -> dict[str, Configuration]:
    """Dense attention and MLPs at a share of the cost of a dense sample, by name: fewer steps, and skipped ones alone.

    A step that runs costs a dense one, and a skipped one nothing: it takes the hidden tokens of the last one that ran or, where at
    least a third of the steps run, extrapolates those of the last two. The number of steps that comes nearest to the share runs, of
    two that are as near the larger one, which is the better rival. Empty where that is all of them.

    Args:
        share: of the dense sample's work, by count, above 0 and up to 1.
        steps: of the dense sample.
    """
    run = max(1, math.floor(share * steps + 0.5))
    if run >= steps:
        return {}
    # Extrapolated in place of kept, two prompts of mini-flux: 14 of 28 steps +8 and +10 dB, 10 of 28 -2 and +7, 6 of 28 -5 and -4;
    # one of mini-wan: 15 of 30 +1.7, 9 of 30 -1.9.
    skips = StepCache(skip_steps=_even_skips(run, steps), predict="hidden", order=int(3 * run >= steps))
    return {
        f"{run} of {steps} steps": Configuration(sparsity=None, steps=run),
        f"{steps - run} of {steps} skipped alone": Configuration(
            sparsity=Sparsity(attention=None, mlp=None, step_cache=skips, patches=())
        ),
    }


def _even_skips(run: int, steps: int) -> tuple[int, ...]:
    """The steps that are skipped where so many run: those of the warm-up, and the others evenly up to the last step."""
    warm = max(1, min(math.ceil(WARM_UP * steps), run - 1))
    later = np.linspace(warm - 1, steps - 1, run - warm + 1)[1:].round().astype(int)
    return tuple(step for step in range(warm, steps) if step not in later)


def read_configurations(path: str | Path) -> dict[str, Configuration]:
    """Configurations by name, of a YAML file such as

        mini-wan: {}
        fewer keys: {attention.top_keys: 0.1}
        no attention: {preset: flux, attention: null}
        stronger guidance, Euler: {guidance: 6, solver: euler}
        20 of 30 steps: {dense: true, steps: 20}

    Each changes the sparsity of the file's first sparse one by dotted names or, where it names one, of a preset; a dense one has
    none. `method` says in words what it saves by, where that does not follow from its settings.

    Raises:
        InputError: no such file, a key that is not known, or what load_sparsity() refuses.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file")
    tree = read_config(path, EXAMPLE)
    named = lambda x: isinstance(x, dict) and all(isinstance(name, str) for name in x)
    if not named(tree) or not all(map(named, tree.values())) or not tree:
        raise InputError(f"{path}: expected {EXAMPLE}")
    found: dict[str, Configuration] = {}
    for name, changes in tree.items():
        with telling(name):
            first = next((one.sparsity for one in found.values() if one.sparsity), None)
            found[name] = _configuration(name, dict(changes), first)
    return found


@contextlib.contextmanager
def telling(name: str) -> Iterator[None]:
    """Within, an error says of which configuration it is."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def _configuration(name: str, changes: dict[str, Any], first: Sparsity | None) -> Configuration:
    dense, preset, method = (changes.pop(key, None) for key in ("dense", "preset", "method"))
    settings = {key: changes.pop(key, None) for key in SETTINGS}
    known = [field.name for field in fields(Sparsity)]
    if unknown := [key for key in changes if key.partition(".")[0] not in known]:
        keys = ", ".join(("dense", *SETTINGS, "method", "preset", *known))
        raise InputError(f"unknown key {', '.join(unknown)}; known are {keys}")
    if method is not None and not isinstance(method, str):
        raise InputError(f"method={method!r}: expected words")
    if dense not in (True, False, None) or (dense and (changes or preset)):
        raise InputError(f"dense={dense}: expected true, and no setting of sparsity")
    sparsity = None if dense else load_sparsity(str(preset or "") or first or name, changes)
    return Configuration(sparsity=sparsity, named=method, **settings)

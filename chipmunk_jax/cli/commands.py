"""All commands under one, each imported once it is named, and their errors in one sentence."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from types import ModuleType

from chipmunk_jax.cli.parser import FLAGS, Menu
from chipmunk_jax.errors import InputError, NotFiniteError, renamed, sentence

DESCRIPTION = """\
Sample diffusion transformers in JAX, faster and without training, by recomputing at each step only the attention keys and
MLP neurons that matter (Chipmunk, arXiv 2506.03275)."""

EXAMPLES = """\
from published weights to pictures and videos:
  chipmunk inspect FLUX.1-dev/                              what is it, and is it whole?
  chipmunk convert FLUX.1-dev/ flux-dev                     read it without PyTorch
  chipmunk sample flux-dev --prompt "a chipmunk in a scarf, autumn leaves" -o chipmunk.png

the same with small models, whose weights are here:
  chipmunk convert examples/mini-flux mini
  chipmunk sample mini --prompt "red striped heart on meadow" -o heart.png
  chipmunk convert examples/mini-wan mini-wan
  chipmunk sample mini-wan --prompt "red striped heart on meadow" -o heart.webp
  chipmunk verify mini -o compare.png                       dense, sparse and rivals at the same cost, side by side

`chipmunk COMMAND --help` says more, with examples."""

COMMANDS = {  # each a module beside this one, with parse(words) and run(arguments)
    "convert": "write a PyTorch checkpoint as a folder of this library",
    "inspect": "say what a checkpoint holds",
    "sample": "sample images and videos from prompts",
    "verify": "compare sparse samples with dense ones",
    "tune": "find the settings for a cost or a quality by measurements",
    "bench": "time kernels, steps and samples",
}


def choose(argv: Sequence[str] | None) -> tuple[ModuleType, Sequence[str]]:
    """The module of the command that the words name, imported, which takes a second or two; and the words after it.

    Raises:
        SystemExit: after --help and --version, 0; after a bad command line or a setting that JAX does not take, 2.
    """
    menu = Menu("chipmunk", "commands", COMMANDS, description=DESCRIPTION, epilog=EXAMPLES)
    told = f"chipmunk-jax {version('chipmunk-jax')}"
    menu.add_argument("--version", action="version", version=told, help="print the version and exit")
    name, words = menu.choose(sys.argv[1:] if argv is None else argv)
    try:
        return import_module(f"chipmunk_jax.cli.{name}"), words
    except ValueError as error:  # JAX reads its variables when it is imported
        if "jax" not in str(error).lower():
            raise
        menu.exit(2, f"chipmunk: {sentence(str(error))}\n")


def run(command: ModuleType, words: Sequence[str]) -> int:
    """Exit status: 0; 1 where a check found a fault or a sample is not finite; 2 for bad input, told in one sentence.

    Raises:
        KeyboardInterrupt: files that were half written are gone; what the device does may go on.
        SystemExit: after --help, 0; after a bad command line, 2.
        Exception: any other is a bug of this library.
    """
    try:
        return command.run(command.parse(words))
    except (InputError, NotFiniteError, NotImplementedError, OSError) as error:
        print(f"chipmunk: {sentence(renamed(str(error), FLAGS))}", file=sys.stderr)
        return 1 if isinstance(error, NotFiniteError) else 2
    except (MemoryError, RuntimeError, AssertionError) as error:
        if not (fault := fault_of_device(error)):
            raise
        print(f"chipmunk: {fault}", file=sys.stderr)
        return 2


def fault_of_device(error: Exception) -> str:
    """What an error of JAX says of the device; empty for any other error, which is a bug."""
    import jax

    try:
        device = jax.devices()[0]
    except (RuntimeError, AssertionError):
        return (
            f"JAX_PLATFORMS={jax.config.jax_platforms}: expected a device of this machine, for which JAX is installed"
        )
    full = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)  # JAX's is a RuntimeError
    return f"out of memory on {device}: use a smaller size or batch" if full else ""

"""All commands under one, and their errors in one sentence."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

import jax

from chipmunk_jax.cli import bench, convert, inspect, sample, verify

DESCRIPTION = """\
Sample diffusion transformers in JAX, faster and without training, by recomputing at each step only the attention keys and
MLP neurons that matter (Chipmunk, arXiv 2506.03275)."""

EXAMPLES = """\
from a PyTorch checkpoint to pictures and videos:
  chipmunk inspect examples/mini-flux                       what is it?
  chipmunk convert examples/mini-flux mini                  read it without PyTorch
  chipmunk sample mini --prompt "red striped heart on meadow" --sparsity -o heart.png
  chipmunk convert examples/mini-wan mini-wan
  chipmunk sample mini-wan --prompt "red striped heart on meadow" --sparsity -o heart.webp
  chipmunk verify mini -o compare.png                       dense, sparse and their difference, side by side

`chipmunk COMMAND --help` says more, with examples."""


def run(argv: Sequence[str] | None) -> int:
    """Exit status: 0; 1 where a check found a fault; 2 for bad input, told in one sentence.

    Raises:
        KeyboardInterrupt: files that were half written are gone; what the device does may go on.
    """
    parser = argparse.ArgumentParser(
        prog="chipmunk", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"chipmunk-jax {version('chipmunk-jax')}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (convert, inspect, sample, verify, bench):
        command.add_parser(subparsers)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, NotImplementedError, OSError) as error:
        print(f"chipmunk: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"chipmunk: out of memory on {jax.devices()[0]}: use a smaller size or batch", file=sys.stderr)
        return 2

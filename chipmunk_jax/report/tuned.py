"""What tune() found, in words, as a table, and as a file that --sparsity reads."""

import shlex
from collections.abc import Sequence

import yaml

from chipmunk_jax.report.tables import table
from chipmunk_jax.report.tune import Found, Point
from chipmunk_jax.sparsity import Sparsity, to_dict

WIDTH = 110


def found_table(found: Found, least: int = 1) -> str:
    """A table of a line a way, the cheapest first: cost, mean PSNR, prompts, and its difference, dB, to the one decided for.

    Args:
        found: of a search.
        least: number of prompts that a way was measured on.
    """
    best = found.best
    points = [point for point in found.points if len(point.levels) >= least]

    def difference(point: Point) -> str:
        if best is None or point is best:
            return ""
        change, error = point.over(best)
        return f"{change:+.2f}" + (f" +- {error:.2f}" if len(point.levels) > 1 else "")

    columns = {
        "cost %": lambda point: f"{100 * point.cost:.1f}",
        "mean dB": lambda point: f"{point.mean(len(point.levels)):.2f}",
        "prompts": lambda point: f"{len(point.levels)}",
        "to the best": difference,
    }
    mark = lambda point: "  <- best" if point is best else "  (rival)" if point.candidate.rival else ""
    note = lambda point: point.candidate.name + mark(point)
    return table(sorted(points, key=lambda point: (point.cost, point.candidate.name)), columns, note)


def verdict(found: Found) -> str:
    """One sentence: what was decided for, and by how many dB it beats the best rival of its cost; of a search with a best point."""
    best = found.best
    level = f"{best.candidate.name}: {best.mean(found.prompts):.2f} dB at {100 * best.cost:.1f} % of the cost"
    if best.candidate.rival:
        kind = "fewer steps" if best.candidate.family.steps is None else "skipped steps"
        return f"{level}; {kind} alone, as no composition that was measured beats that by more than its standard error"
    rivals = [p for p in found.points if p.candidate.rival and len(p.levels) >= found.prompts and p.cost <= best.cost]
    if not rivals:
        return level
    rival = max(rivals, key=lambda point: point.mean(found.prompts))
    change, error = best.over(rival)
    return f"{level}, {change:+.2f} +- {error:.2f} dB to the best rival up to there, {rival.candidate.name}"


def sparsity_of(point: Point) -> Sparsity:
    """The settings that a file holds of a point: all but the number of steps."""
    return point.candidate.configuration.sparsity or Sparsity(attention=None, mlp=None, patches=())


def command_of(point: Point, checkpoint: str, file: str, flags: Sequence[str]) -> str:
    """The command line that samples so.

    Args:
        point: what was decided for.
        checkpoint, file: of the model, and of the sparsity.
        flags: of the samples that it was measured with.
    """
    steps = point.candidate.configuration.steps
    given = ["--steps", str(steps)] if steps else []
    return shlex.join(["chipmunk", "sample", checkpoint, "--prompt", "..", *flags, *given, "--sparsity", file])


def file_of(found: Found, told: Sequence[str]) -> str:
    """The YAML file, which load_sparsity() reads: what was measured as comments, then the settings.

    Args:
        found: with a best point.
        told: lines at its head.
    """
    lines = [*told, *found_table(found, found.prompts).splitlines()]
    head = "".join(f"# {line}\n" for line in lines)
    return head + yaml.safe_dump(
        to_dict(sparsity_of(found.best)), sort_keys=False, default_flow_style=None, width=WIDTH
    )

"""chipmunk tune: the settings for a cost or a quality, chosen by measurements on the user's own model."""

import argparse
import math
import time
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from chipmunk_jax.cli.parser import Parser
from chipmunk_jax.cli.prompts import some_prompts
from chipmunk_jax.cli.sample import add_checkpoint, add_sampling_flags, open_pipeline, read_settings
from chipmunk_jax.cli.verify import EVERYDAY
from chipmunk_jax.compilation import keep_compilations
from chipmunk_jax.config_file import SUFFIXES
from chipmunk_jax.errors import InputError
from chipmunk_jax.media import check_writable
from chipmunk_jax.pipelines import Pipeline
from chipmunk_jax.pipelines.pixels import PixelPipeline
from chipmunk_jax.progress import ticking
from chipmunk_jax.report.price import read_prices
from chipmunk_jax.report.space import Space
from chipmunk_jax.report.trials import Trials
from chipmunk_jax.report.tune import Found, Goal, Search
from chipmunk_jax.report.tuned import command_of, file_of, found_table, verdict
from chipmunk_jax.report.ways import SAME
from chipmunk_jax.sparsity import PRESETS
from chipmunk_jax.whole import whole

DESCRIPTION = """\
Search for the way to sample this model that comes nearest to its dense samples at a cost, or the cheapest one of a quality:
how many steps run, which are skipped, what these give, shares of keys and neurons, full steps, neighbourhoods, block
means, drift guard. What is compared was sampled here, with the same prompts and seeds. Fewer steps and skipped steps alone
are measured first; a composition is taken only where it beats them at its own cost by more than the standard error, and
else they are.

The cost is a share of the dense sample's: of its time on a GPU; on a CPU, which runs plain references of the kernels, of
its matrix products, by count; with --cost-of of its time on a published model, whose steps `chipmunk bench step` timed.

Writes a file that --sparsity takes, with all that was measured, and prints the command that samples so. The number of
steps is no part of the file. When the time is over, or at Ctrl-C, what was measured by then decides."""

EXAMPLES = """\
examples:
  chipmunk tune mini --budget 0.4                                  the best at 40 % of the cost, in tuned.yaml
  chipmunk tune mini --target-psnr 32 --minutes 30 -o 32.yaml      the cheapest of 32 dB
  chipmunk tune flux-dev --budget 0.5 --prompts prompts.txt        on prompts of your own
  chipmunk tune mini-wan --budget 0.4 --frames 8 --cost-of hunyuan-video-720x1280x129-h100.jsonl
  chipmunk sample mini --prompt "red striped heart on meadow" --steps 21 --sparsity tuned.yaml"""

SAMPLES = 20  # that the time should suffice for, for each prompt, as long as dense ones
FEWEST, MOST = 3, 16  # prompts where nobody says how many


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments of `chipmunk tune`."""
    usage = "CKPT (--budget SHARE | --target-psnr DB) [-o TUNED] [options]"
    parser = Parser("chipmunk tune", usage, description=DESCRIPTION, epilog=EXAMPLES)
    add_checkpoint(parser)
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument(
        "--budget", metavar="SHARE", type=float, help="most that it may cost, of the dense sample's cost: 0.4"
    )
    goal.add_argument("--target-psnr", metavar="DB", type=float, help="least mean PSNR to the dense samples")
    parser.add_argument(
        "--cost-of", metavar="RECORDS", help="file of `chipmunk bench step -o`, by whose times steps are priced"
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE|N",
        help="text file of prompts, one a line, or a number of them, drawn by chance for a small model (default: as many as "
        f"the time suffices for, {FEWEST} to {MOST}; for a model that reads any sentence {len(EVERYDAY)} of ours)",
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="that the search may take (default: 10)")
    parser.add_argument("-o", "--output", default="tuned.yaml", help="file to write (default: tuned.yaml)")
    add_sampling_flags(parser, shown=False)
    return parser.parse_args(words)


def run(args: argparse.Namespace) -> int:
    """Exit status of `chipmunk tune`."""
    start = time.monotonic()
    goal = Goal(budget=args.budget, target=args.target_psnr)
    _check(args)
    prices = args.cost_of and read_prices(args.cost_of)
    pipeline = open_pipeline(args)
    settings = read_settings(args)
    given = None if args.prompts is None else some_prompts(pipeline, args.prompts, args.seed)
    prompts = given or _usual_prompts(pipeline, args.seed)
    request = pipeline.check(prompts, **settings, sparsity=None)
    steps = request.settings["steps"]
    if steps < 2:
        raise InputError(f"--steps {steps}: expected at least 2, as there is nothing to save of one")
    if goal.budget is not None and goal.budget * steps < 1:
        raise InputError(f"--budget {goal.budget}: expected at least {1 / steps:.3g}, the cost of one of {steps} steps")
    keep_compilations()
    space = Space(pipeline.variant, request.settings, PRESETS[pipeline.variant.preset], prices)
    trials = Trials(pipeline, prompts, settings, space)
    search = None
    options = dict(total=round(60 * args.minutes), unit="s", leave=False)
    with tqdm(bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}{postfix}", **options) as bar, ticking(bar):

        def told(what: str) -> None:
            bar.n = min(bar.total, round(time.monotonic() - start))
            bar.set_postfix_str(what)

        try:
            count = len(prompts) if given else _count(trials, len(prompts), args.minutes, told)
            hear = lambda one, i: told(f"prompt {i + 1} of {count}: {one.name}")
            left = 60 * args.minutes - (time.monotonic() - start)
            search = Search(space, trials, prompts=count, seconds=left, told=hear)
            found = search.run(goal)
        except KeyboardInterrupt:  # what was measured is not lost
            bar.close()
            if search and (found := search.found(goal)).best:
                _write(args, found, trials, pipeline, time.monotonic() - start)
            raise
    return _write(args, found, trials, pipeline, time.monotonic() - start)


def _check(args: argparse.Namespace) -> None:
    """Raises InputError for what is wrong whatever the model."""
    if args.budget is not None and not 0 < args.budget < 1:
        raise InputError(f"--budget {args.budget}: expected a share above 0 and below 1")
    if args.target_psnr is not None and not 0 < args.target_psnr < SAME:
        raise InputError(f"--target-psnr {args.target_psnr}: expected dB above 0 and below {SAME:g}")
    if not 0 < args.minutes < math.inf:
        raise InputError(f"--minutes {args.minutes}: expected some, above 0")
    if check_writable(args.output).suffix not in SUFFIXES[:2]:
        raise InputError(f"{args.output}: expected the name of a file that ends in .yaml or .yml")


def _usual_prompts(pipeline: Pipeline, seed: int) -> list[str]:
    """As many as may be used."""
    return pipeline.random_prompts(MOST, seed) if isinstance(pipeline, PixelPipeline) else list(EVERYDAY)


def _count(trials: Trials, most: int, minutes: float, told: Any) -> int:
    """The prompts that the time suffices for, by the time of dense samples; the first one compiles."""
    told("dense samples")
    trials.draw_dense(0)
    start = time.monotonic()
    trials.draw_dense(1)
    return min(most, max(FEWEST, int(60 * minutes / SAMPLES / (time.monotonic() - start))))


def _write(args: argparse.Namespace, found: Found, trials: Trials, pipeline: Pipeline, seconds: float) -> int:
    """Writes the file and prints what was found; 0.

    Raises:
        InputError: nothing was measured in time, or nothing reached the target.
    """
    if not found.points:
        raise InputError(f"--minutes {args.minutes}: not even one way was measured, expected more")
    samples = sum(len(point.levels) for point in found.points)
    ended = "to its end" if found.finished else "until it was stopped"
    searched = (
        f"{len(found.points)} ways in {samples} samples of {found.prompts} prompts, {seconds / 60:.1f} minutes, {ended}"
    )
    if found.best is None:
        print(found_table(found))
        nearest = max(found.points, key=lambda point: (len(point.levels), point.mean(len(point.levels))))
        goal = f"--target-psnr {args.target_psnr}" if args.target_psnr is not None else f"--budget {args.budget}"
        raise InputError(
            f"{goal}: not reached by {searched}; the nearest is {nearest.mean(len(nearest.levels)):.2f} dB at "
            f"{100 * nearest.cost:.1f} % of the cost, {nearest.candidate.name}"
        )
    command = command_of(found.best, args.checkpoint, args.output, _flags(args))
    made = ", ".join(f"{name} {value}" for name, value in pipeline.origin.items())
    settings = ", ".join(f"{name} {value}" for name, value in trials.space.settings.items())
    one = found.best.candidate.configuration
    lines = [
        verdict(found),
        f"searched: {searched}",
        f"cost: of {trials.costs}",
        f"samples: {made}, {settings}, seed {args.seed}",
        *(["the number of steps is no part of this file, so it stands in the command"] if one.steps else []),
        command,
    ]
    with whole(args.output) as file:
        file.write_text(file_of(found, lines))
    print(found_table(found))
    print(*lines[:3], args.output, command, sep="\n")
    return 0


def _flags(args: argparse.Namespace) -> list[str]:
    """Those of the samples that `chipmunk sample` takes as well."""
    names = ("frames", "height", "width", "steps", "guidance")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return [word for name, value in given.items() for word in (f"--{name}", f"{value:g}")]

"""The kernels' cases, and the run over them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from tqdm import tqdm

from chipmunk_jax.bench import draw, torch_baselines
from chipmunk_jax.bench.attention_kernels import AttentionCase, column_attention_candidates, dense_colsum_candidates
from chipmunk_jax.bench.measure import Candidate, Ceilings, measure, sentence, to_records
from chipmunk_jax.bench.mlp_kernels import MlpCase, mlp_candidates
from chipmunk_jax.bench.record import Record
from chipmunk_jax.bench.timing import MOST_SETS, Chain, time_in_turn
from chipmunk_jax.bench.topk_kernels import TopkCase, topk_candidates
from pallas_kernels import Implementation
from pallas_kernels.dispatch import COMPILER_OPTIONS


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is run, and how much at once."""

    most_sets: int  # of inputs
    most_calls: int  # in one program
    matrix: int  # side of the matrices that measure the ceiling
    copy: int  # bytes that the other ceiling reads, and writes
    cases: dict[str, Sequence[Any]]


FLUX = dict(heads=24, tokens=4352, head_dim=128, group=128)  # FLUX.1 at 1280x768: 3,840 of the image, 512 of the text
VIDEO = dict(heads=24, tokens=119_040, head_dim=128, group=128)  # HunyuanVideo at 720x1280, 129 frames

FULL = {
    "column_attention": (
        # None left out, half, 69 %, the preset, 84.6 and 85.3 % (as published), 93 %.
        AttentionCase(**FLUX, plain=(4352, 2176, 1344, 704, 672, 640, 320), residual=(704,)),
        AttentionCase(**FLUX | {"head_dim": 64}, plain=(704,)),
        AttentionCase(**VIDEO, plain=(8320,)),
    ),
    "dense_colsum": (AttentionCase(**FLUX), AttentionCase(**VIDEO)),
    "topk": (
        TopkCase({"H": 24, "G": 34, "N": 4352, "K": 704}),
        TopkCase({"G": 34, "F": 12_288, "K": 4096}),
        TopkCase({"H": 24, "G": 930, "N": 119_040, "K": 5952}, baseline_share=16),
    ),
    "mlp": (MlpCase(rows=4352, width=3072, mlp_width=12_288, group=128, kept=(3584, 1792)),),
}
TOY = {
    "column_attention": (
        AttentionCase(heads=2, tokens=192, head_dim=32, group=64, plain=(192, 64), residual=(64,)),
        AttentionCase(heads=1, tokens=320, head_dim=16, group=128, plain=(40,)),
    ),
    "dense_colsum": (AttentionCase(heads=2, tokens=192, head_dim=32, group=64),),
    "topk": (
        TopkCase({"H": 2, "G": 3, "N": 192, "K": 64}),
        TopkCase({"G": 3, "F": 256, "K": 96}),
        TopkCase({"H": 2, "G": 4, "N": 320, "K": 40}, baseline_share=4),
    ),
    "mlp": (MlpCase(rows=160, width=64, mlp_width=256, group=64, kept=(128, 64)),),
}
SIZES = {
    "full": Size(most_sets=MOST_SETS, most_calls=16, matrix=8192, copy=2**30, cases=FULL),
    "toy": Size(most_sets=2, most_calls=2, matrix=256, copy=2**20, cases=TOY),
}

CANDIDATES: dict[str, Callable[[Any, int, Implementation | None], list[Candidate]]] = {
    "column_attention": column_attention_candidates,
    "dense_colsum": dense_colsum_candidates,
    "topk": topk_candidates,
    "mlp": mlp_candidates,
}


def bench_kernels(
    names: Sequence[str], size: Size, *, repeats: int, implementation: Implementation | None = None
) -> Iterator[list[Record]]:
    """The records of one case after another; what a case held is freed before the next.

    Args:
        names: of CANDIDATES.
        size: which cases.
        repeats: timed runs of each candidate.
        implementation: of our kernels and of dense attention, see pallas_kernels.dispatch.choose.
    """
    ceilings = measure_ceilings(size, repeats)
    print(f"ceilings: {ceilings.flops / 1e12:.3g} TFLOP/s bf16 product, {ceilings.bytes / 1e9:.4g} GB/s copy")
    if obstacle := torch_baselines.obstacle():
        print(f"no baselines of PyTorch: {obstacle}")
    for name in names:
        for case in size.cases[name]:
            yield _bench_case(name, case, size, ceilings, repeats, implementation)


def _bench_case(
    name: str, case: Any, size: Size, ceilings: Ceilings, repeats: int, implementation: Implementation | None
) -> list[Record]:
    with tqdm(desc=name, unit="run", leave=False) as bar:
        bar.set_postfix_str("drawing inputs")
        try:
            candidates = CANDIDATES[name](case, size.most_sets, implementation)
            bar.reset(total=len(candidates) * (1 + repeats))
            outcomes = measure(candidates, ceilings, repeats=repeats, most_calls=size.most_calls, bar=bar)
        except RuntimeError as error:  # of the device, such as too little memory: the other cases may do
            return [Record(benchmark=name, variant="all", shape=case.shape, error=sentence(error))]
    return to_records(name, outcomes, ceilings, implementation)


def measure_ceilings(size: Size, repeats: int) -> Ceilings:
    """The most that products and copies reach here, in bf16, by the fastest repeat."""
    n = size.matrix
    a, b = (draw.normal(key, (n, n)) for key in jax.random.split(jax.random.key(0)))
    x = draw.normal(jax.random.key(1), (size.copy // 2,))
    product, copy = lambda ab, state: (ab[0] @ ab[1], state), lambda x, state: (-x, state)
    chains = {
        "product": Chain(product, [(a, b)], calls=1, compiler_options=COMPILER_OPTIONS),
        "copy": Chain(copy, [x], calls=1),
    }
    with tqdm(desc="ceilings", total=len(chains) * (1 + repeats), unit="run", leave=False) as bar:
        for chain in chains.values():
            jax.block_until_ready(chain.dispatch())
            bar.update()
        seconds = time_in_turn(chains, repeats, report=lambda _: bar.update())
    return Ceilings(flops=2 * n**3 / min(seconds["product"]), bytes=2 * x.nbytes / min(seconds["copy"]))

"""What sparsity changes in your own model: `python examples/dense_and_sparse.py FLUX.1-dev/ "a chipmunk in a scarf"`.

Samples the same prompt and seed densely, in fewer steps, and by presets, and prints seconds and PSNR to the dense one.
"""

import sys
from typing import Any

from chipmunk_jax import Pipeline
from chipmunk_jax.quality import psnr


def main(folder: str, prompt: str, presets: tuple[str, ...] = ("auto",), **settings: Any) -> dict[str, float]:
    """PSNR, dB, of each way to the dense sample.

    Args:
        folder: of a pipeline of images.
        prompt: what to draw.
        presets: values of `sparsity` to compare.
        settings: as a call of the pipeline takes them.
    """
    pipe = Pipeline.from_pretrained(folder)
    steps = settings.pop("num_inference_steps", None) or pipe.variant.steps
    draw = lambda sparsity, count: pipe(
        prompt, **settings, sparsity=sparsity, num_inference_steps=count, output_type="np", progress=False
    )
    draw(None, steps)  # the first call compiles
    dense, found = draw(None, steps), {}
    fewer = max(1, steps * 2 // 3)
    ways = {f"{fewer} steps": (None, fewer)} | {name: (name, steps) for name in presets}
    for name, (sparsity, count) in ways.items():
        draw(sparsity, count)
        out = draw(sparsity, count)
        found[name] = psnr(out.images, dense.images)
        print(f"{name}: {out.seconds:.2f} s against {dense.seconds:.2f} s, {found[name]:.1f} dB")
    return found


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/dense_and_sparse.py FOLDER PROMPT")
    main(*sys.argv[1:], seed=0)

"""An image of FLUX.1 from a prompt: `python examples/text_to_image.py FLUX.1-dev/ "a chipmunk in a scarf" chipmunk.png`."""

import sys
from typing import Any

from chipmunk_jax import Pipeline


def main(folder: str, prompt: str, output: str, **settings: Any) -> None:
    """Writes the image, sparse by the model's own preset, and prints what it took.

    Args:
        folder: a diffusers folder, the original files, or what `chipmunk convert` wrote.
        prompt: what to draw.
        output: picture to write.
        settings: as a call of the pipeline takes them.
    """
    out = Pipeline.from_pretrained(folder)(prompt, **settings)
    out.images[0].save(output)
    print(f"{output}: {out.seconds:.1f} s, {out.density['attention']:.0%} of the keys computed")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python examples/text_to_image.py FOLDER PROMPT OUTPUT")
    main(*sys.argv[1:], seed=0)

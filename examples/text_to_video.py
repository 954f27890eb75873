"""A video of Wan2.1 or Wan2.2 from a prompt: `python examples/text_to_video.py Wan2.1-T2V-1.3B/ "a fox in snow" fox.webp`."""

import sys
from typing import Any

from chipmunk_jax import Pipeline, save_video


def main(folder: str, prompt: str, output: str, **settings: Any) -> None:
    """Writes the video and prints the seconds of each stage.

    Args:
        folder: a diffusers folder, the original files, or what `chipmunk convert` wrote.
        prompt: what to show.
        output: .webp, .mp4 (with PyAV) or .png of all frames.
        settings: as a call of the pipeline takes them.
    """
    pipe = Pipeline.from_pretrained(folder)
    out = pipe(prompt, **settings)
    save_video(output, out.frames[0], pipe.variant.fps)
    print(", ".join(f"{name} {stage.seconds:.1f} s" for name, stage in out.stages.items()))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python examples/text_to_video.py FOLDER PROMPT OUTPUT")
    main(*sys.argv[1:], seed=0)

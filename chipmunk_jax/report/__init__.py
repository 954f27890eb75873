"""What people look at to judge samples."""

from chipmunk_jax.report.sheets import compare_frames, compare_images, compare_videos

__all__ = ["compare_frames", "compare_images", "compare_videos"]

"""What people look at: sheets of samples, their numbers, records of measurements as tables and plots."""

from chipmunk_jax.report.sheets import compare_frames, compare_images, compare_videos

__all__ = ["compare_frames", "compare_images", "compare_videos"]

"""Measured speed: kernels against the best dense baseline, single steps, whole samples. The command is `chipmunk bench`."""

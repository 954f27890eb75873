"""Checkpoints: PyTorch's in two layouts read without PyTorch, this library's written and loaded."""

from chipmunk_jax.convert.checkpoint import load, save
from chipmunk_jax.convert.convert import convert, read
from chipmunk_jax.convert.inspection import Inspection, inspect

__all__ = ["Inspection", "convert", "inspect", "load", "read", "save"]

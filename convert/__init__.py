"""PyTorch's checkpoints in two layouts, read without PyTorch; load and save are chipmunk_jax.models.checkpoint's."""

from chipmunk_jax.convert.convert import convert, read
from chipmunk_jax.convert.folder import Folder, open_folder
from chipmunk_jax.convert.inspection import Inspection, PipelineInspection, inspect
from chipmunk_jax.convert.source import open_source
from chipmunk_jax.models.checkpoint import load, save

__all__ = [
    "Folder",
    "Inspection",
    "PipelineInspection",
    "convert",
    "inspect",
    "load",
    "open_folder",
    "open_source",
    "read",
    "save",
]

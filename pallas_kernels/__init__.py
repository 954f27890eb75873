"""Kernels for column-sparse deltas: arrays in, arrays out. A file is a public function, its jnp reference, its Pallas body."""

from pallas_kernels.block_means import BlockMeans, block_means
from pallas_kernels.column_attention import column_attention, store_attention_residual
from pallas_kernels.column_mlp import column_fc1, column_fc2, move_column_fc2, store_activations, store_fc2_residual
from pallas_kernels.column_sums import column_sums
from pallas_kernels.columns import Columns, PinnedKeys, Scaled, pack_lists
from pallas_kernels.dense_attention import dense_attention
from pallas_kernels.dispatch import Implementation
from pallas_kernels.group_mean import group_mean_change, store_group_mean
from pallas_kernels.rotary_qkv import rotary_qkv
from pallas_kernels.topk import topk_columns

__all__ = [
    "BlockMeans",
    "Columns",
    "Implementation",
    "PinnedKeys",
    "Scaled",
    "block_means",
    "column_attention",
    "column_fc1",
    "column_fc2",
    "column_sums",
    "dense_attention",
    "group_mean_change",
    "move_column_fc2",
    "pack_lists",
    "rotary_qkv",
    "store_activations",
    "store_attention_residual",
    "store_fc2_residual",
    "store_group_mean",
    "topk_columns",
]

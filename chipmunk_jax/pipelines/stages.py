"""What a text encoder or a VAE holds on its device beside its weights, in bytes, counted before anything is compiled.

A pipeline gives a component one prompt, image or video at a time. tests/test_stages.py compares these counts with what XLA assigns.
"""

from chipmunk_jax.memory import nbytes
from chipmunk_jax.models import Component
from chipmunk_jax.models.blocks import QUERIES
from chipmunk_jax.models.clip import ClipText
from chipmunk_jax.models.flux_vae import FluxVae
from chipmunk_jax.models.t5 import T5Encoder
from chipmunk_jax.models.wan_vae import WanVae
from chipmunk_jax.pipelines.variant import Settings

FLOAT32 = 4  # bytes


def working_set(model: Component, settings: Settings, rows: int) -> int:
    """Bytes that a component holds at once while it reads a prompt or decodes an image or a video; 0 of an unknown one.

    Args:
        model: shapes in place of weights.
        settings: of the sample: height and width in pixels, frames of a video.
        rows: tokens of a prompt; CLIP takes as many as it has positions.
    """
    pixels = settings["height"] * settings["width"]
    match model:
        case ClipText():
            return of_clip_text(model)
        case T5Encoder():
            return of_t5(model, rows)
        case FluxVae():
            return of_flux_vae(model, pixels)
        case WanVae():
            time, side = model.config.compression
            frames, rows, columns = settings["frames"], settings["height"] // side, settings["width"] // side
            return model.decoding_bytes((1, 1 + (frames - 1) // time, rows, columns, model.config.z_dim))
    return 0


def of_clip_text(model: ClipText) -> int:
    """A layer's weights, its scores or its neurons, and the tokens."""
    c, tokens = model.config, model.config.max_position_embeddings
    scores = FLOAT32 * c.num_attention_heads * tokens**2
    qkv = 3 * tokens * c.hidden_size * model.dtype.itemsize
    neurons = FLOAT32 * tokens * c.intermediate_size
    layer = nbytes(model.blocks) // c.num_hidden_layers
    return layer + max(scores + qkv, neurons) + FLOAT32 * tokens * c.hidden_size


def of_t5(model: T5Encoder, tokens: int) -> int:
    """A layer's weights, what positions add to its scores, its scores or its neurons, and the tokens."""
    c = model.config
    scores = FLOAT32 * c.num_heads * tokens**2
    qkv = 3 * tokens * c.num_heads * c.d_kv * model.dtype.itemsize
    neurons = 2 * FLOAT32 * tokens * c.d_ff
    layer = nbytes(model.blocks) // c.num_layers
    return layer + scores + max(scores + qkv, neurons) + FLOAT32 * tokens * c.d_model


def of_flux_vae(model: FluxVae, pixels: int) -> int:
    """The input of the widest residual block, its norm in float32 and what its convolution takes, or the attention; the image."""
    c, widths = model.config, model.config.block_out_channels
    # Levels from pixels to latents, each with a quarter of the pixels of the one before; the decoder comes from the wider one.
    inputs = zip(widths, (*widths[1:], widths[-1]), strict=True)
    widest = max(max(pair) * pixels // 4**level for level, pair in enumerate(inputs))
    block = widest * (2 * model.dtype.itemsize + FLOAT32)
    attention = of_attention(model, pixels // c.compression**2, widths[-1])
    return max(block, attention) + FLOAT32 * pixels * c.out_channels


def of_attention(model: Component, pixels: int, width: int) -> int:
    """Scores of some queries, the tokens, queries, keys, values and what they give, of all latent pixels of a frame."""
    return FLOAT32 * pixels * min(pixels, QUERIES) + 5 * pixels * width * model.dtype.itemsize

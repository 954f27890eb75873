"""Dense softmax attention with its log-sum-exp. On an NVIDIA GPU it is cuDNN's, the fastest there is from JAX."""

import inspect

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch


def dense_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    valid: jax.Array | None = None,
    implementation: dispatch.Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """softmax(scale q k^T) v, [B, N, H, d] in the dtype of q, and log sum exp of its logits, [B, H, N], f32 (natural).

    Args:
        q, k, v: [B, N, H, d], bf16 (any float for the reference).
        scale: of the logits, usually d ** -0.5.
        valid: [B], i32: rows of q, k and v from there on are padding. No query sees them; their own output is 0, their log sum
            exp +inf. None: there is none.
        implementation: see dispatch.choose; "interpret" runs the reference, as cuDNN has no interpreter.

    Raises:
        ValueError: shapes that do not fit.
        NotImplementedError: a named implementation cannot take these arguments.
    """
    if k.shape != v.shape or (k.shape[0], *k.shape[2:]) != (q.shape[0], *q.shape[2:]):
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape}: expected [B, N, H, d] with equal B, H and d")
    if valid is not None and (q.shape != k.shape or valid.shape != q.shape[:1]):
        raise ValueError(f"q {q.shape}, k {k.shape}, valid {valid.shape}: expected rows of equal number, and [B]")
    width = q.shape[-1]
    fits = width <= 128 and width % 8 == 0  # cuDNN, on every card; 256, on some
    if dispatch.choose(implementation, dtype=q.dtype, head_dim=128 if fits else width) == "pallas":
        out, lse = _cudnn(q, k, v, scale, valid)
        if valid is None:
            return out, lse
        there = jnp.arange(q.shape[1]) < valid[:, None]  # cuDNN does not say what it leaves in the other rows
        return jnp.where(there[..., None, None], out, 0), jnp.where(there[:, None], lse, jnp.inf)
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * scale
    if valid is None:
        lse = jax.nn.logsumexp(logits, axis=-1)
    else:
        there = jnp.arange(k.shape[1]) < valid[:, None]
        logits = jnp.where(there[:, None, None], logits, -jnp.inf)
        lse = jnp.where(there[:, None], jax.nn.logsumexp(logits, axis=-1), jnp.inf)
        v = jnp.where(there[..., None, None], v, 0)  # 0 times what may be no number
    weights = jnp.exp(logits - lse[..., None]).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v, preferred_element_type=jnp.float32).astype(q.dtype), lse


def _cudnn(q, k, v, scale, valid):
    """cuDNN's attention as JAX calls it, and its log-sum-exp, f32.

    The function is a private one: the public jax.nn.dot_product_attention rounds the log-sum-exp to the dtype of q, and in bf16 an
    error of 1/32, at values of 8 to 16, is one of 3 % in every column sum.

    Raises:
        NotImplementedError: this version of JAX does not have it, or not as it is known.
    """
    try:
        from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

        padding = {} if valid is None else dict(q_seqlen=valid, kv_seqlen=valid, mask_type=MaskType.PADDING)
        options = dict(scale=scale, qkv_layout="BTNH", return_residual=True, **padding)
        inspect.signature(dot_product_attention).bind(q, k, v, **options)
    except (ImportError, AttributeError, TypeError) as error:
        raise _unknown(error) from error
    out, lse = dot_product_attention(q, k, v, **options)
    if lse.dtype != jnp.float32:
        raise _unknown(f"its log-sum-exp is {lse.dtype.name}")
    return out, lse


def _unknown(reason) -> NotImplementedError:
    return NotImplementedError(
        f"JAX {jax.__version__} has another attention of cuDNN than the one that is known, which gives its log-sum-exp in float32 "
        f"({reason}); use JAX 0.10.2 to 0.12.0, or implementation='reference'"
    )

"""Which body of a kernel runs where. Nothing else in the project knows a backend."""

import functools
import warnings
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

Implementation = Literal["pallas", "interpret", "reference"]

# Pallas-Triton is the one route from JAX to column gathers that feed the matrix units of Hopper (Mosaic GPU gathers by TMA on
# Blackwell only); its deprecation notice is known, and shown once to us rather than at every lowering to every user.
warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning)

# For jax.jit of a network: with XLA's own Triton products off, cuBLASLt takes bias and GELU into its epilogue (FLUX's MLP in a
# loop: 1.075 ms a layer in place of 1.169, H100, JAX 0.11.2). Other backends ignore it.
COMPILER_OPTIONS = {"xla_gpu_enable_triton_gemm": False}

WITHOUT_FLOAT8 = ("7.0", "7.5", "8.0", "8.6", "8.7")  # compute capabilities


def choose(
    implementation: Implementation | None, *, dtype: jnp.dtype, head_dim: int = 128, float8: bool = False
) -> Implementation:
    """The body to run: what was asked for, or the fastest that can run here.

    Args:
        implementation: "pallas" (the kernel, on an NVIDIA GPU), "interpret" (the kernel's body, op by op, anywhere),
            "reference" (plain jnp, anywhere), or None: the kernel on a GPU where it takes these arguments, else the reference.
        dtype: of the arrays that go through the matrix units.
        head_dim: a tile's inner width; the kernels need a power of two from 16.
        float8: whether there are values of 8 bits, which Ada and Hopper were the first to convert.

    Raises:
        ValueError: an unknown name.
        NotImplementedError: "pallas" was asked for with a dtype or a width that the kernel or the card cannot take.
    """
    if implementation not in (None, "pallas", "interpret", "reference"):
        raise ValueError(f"implementation={implementation!r}: expected 'pallas', 'interpret', 'reference' or None")
    if implementation == "reference":
        return implementation
    if implementation == "interpret":  # which takes any dtype
        dtype, float8 = jnp.bfloat16, False
    obstacle = _obstacle(dtype, head_dim, float8)
    if implementation and obstacle:
        raise NotImplementedError(f"implementation={implementation!r}: {obstacle}; use implementation='reference'")
    if implementation == "interpret":
        return implementation
    on_gpu = implementation == "pallas" or jax.default_backend() == "gpu"
    return "pallas" if on_gpu and not obstacle else "reference"


def _obstacle(dtype, head_dim: int, float8: bool) -> str:
    # In float32 the matrix units would compute in TF32, three decimal digits: not what a caller who asks for float32 wants; the
    # weights of attention, shifted by an old log-sum-exp, need a range that float16 does not have.
    if jnp.dtype(dtype) != jnp.dtype(jnp.bfloat16):
        return f"dtype {jnp.dtype(dtype).name}, the kernels take bfloat16"
    if head_dim < 16 or head_dim & (head_dim - 1):
        return f"a width of {head_dim}, the kernels take powers of two from 16"
    if float8 and (capability := card().compute_capability) in WITHOUT_FLOAT8:
        return f"8 bits on a card of compute capability {capability}, the kernels need 8.9 or more"
    return ""


class Card(NamedTuple):
    """The properties of a GPU by which tiles are chosen."""

    compute_capability: str
    multiprocessors: int


@functools.cache
def card() -> Card:
    """The GPU that is there; where none is, an H100 or H200 SXM, which the kernels were measured on."""
    device = jax.devices()[0]
    return Card(device.compute_capability, device.core_count) if device.platform == "gpu" else Card("9.0", 132)


def compiler_params(num_warps: int, num_stages: int) -> plgpu.CompilerParams:
    """Parameters with which pallas_call lowers through Triton, on every JAX version."""
    return plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages)

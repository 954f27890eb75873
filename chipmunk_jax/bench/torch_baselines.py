"""PyTorch's dense attention and MLP beside ours, where it is installed and sees the GPU. It is no dependency."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from chipmunk_jax.bench.measure import Candidate
from chipmunk_jax.bench.timing import Inputs, Timed


def obstacle() -> str | None:
    """Why there are no baselines of PyTorch, None where there are."""
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed"
    import torch

    return None if torch.cuda.is_available() else "PyTorch sees no GPU"


def attention(dense: Candidate, scale: float) -> list[Candidate]:
    """scaled_dot_product_attention by cuDNN, on the arrays of the dense candidate; nothing where PyTorch is not there."""
    if obstacle():
        return []
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call(inputs):
        q, k, v = (x.transpose(1, 2) for x in inputs)  # [B, H, N, d], as PyTorch has it
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)

    return [_candidate(dense, "torch cuDNN", call)]


def mlp(dense: Candidate) -> list[Candidate]:
    """torch.compile of the dense MLP, on the arrays of the dense candidate; nothing where PyTorch is not there."""
    if obstacle():
        return []
    import torch

    @torch.compile
    def call(inputs):
        x, fc1, b1, fc2, b2 = inputs
        hidden = torch.nn.functional.gelu(torch.nn.functional.linear(x, fc1, b1), approximate="tanh")
        return torch.nn.functional.linear(hidden, fc2.T, b2)

    return [_candidate(dense, "torch compile", call)]


def _candidate(dense: Candidate, variant: str, call: Callable[[Any], Any]) -> Candidate:
    observed = lambda output, state: dense.observed(_to_jax(output), state)
    return replace(dense, variant=variant, call=call, chain=_TorchChain, observed=observed, compiler_options=None)


class _TorchChain:
    """Calls of a function of PyTorch in a row; its arrays are those of JAX, not copies."""

    def __init__(self, call, sets: Sequence[Inputs], state=(), *, calls: int, compiler_options=None):
        jax.block_until_ready(list(sets))
        self.call, self.calls, self.sets, self.turn = call, calls, sets, 0
        self.tensors = [jax.tree.map(_to_torch, inputs) for inputs in sets]
        self.last_inputs = sets[(calls - 1) % len(sets)]

    def dispatch(self):
        import torch

        with torch.no_grad():
            for _ in range(self.calls):
                output = self.call(self.tensors[self.turn % len(self.tensors)])
                self.turn += 1
        return [output], ()

    def timed(self) -> Timed:
        import torch

        return Timed(self.dispatch, self.calls, wait=lambda _: torch.cuda.synchronize())


def _to_torch(x: jax.Array):
    import torch

    return torch.from_dlpack(x)


def _to_jax(x) -> np.ndarray:
    import torch

    torch.cuda.synchronize()
    return jax.dlpack.from_dlpack(x.contiguous())

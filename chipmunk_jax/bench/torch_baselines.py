"""PyTorch's dense attention and MLP beside ours, where it is installed and sees the GPU. It is no dependency."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax

from chipmunk_jax.bench.measure import Candidate
from chipmunk_jax.bench.timing import Chain, Inputs, State


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
    import torch

    def check(inputs, output, *states):
        torch.cuda.synchronize()
        return dense.check(inputs, jax.dlpack.from_dlpack(output.contiguous()), *states)

    return replace(dense, variant=variant, call=call, check=check, chain=_TorchChain)


class _TorchChain(Chain):
    """The same calls by PyTorch, one by one; its arrays are those of JAX, not copies."""

    def __init__(self, call: Callable[[Any], Any], sets: Sequence[Inputs], state: State = (), *, calls: int, **_: Any):
        import torch

        super().__init__(call, sets, state, calls=calls)
        jax.block_until_ready(list(sets))
        self.call, self.tensors = call, jax.tree.map(torch.from_dlpack, self.portions)

    def dispatch(self):
        import torch

        with torch.no_grad():
            for inputs in self.tensors[self.turn % len(self.tensors)]:
                output = self.call(inputs)
        self.turn += 1
        return [output], ()

    def wait(self, _):
        import torch

        torch.cuda.synchronize()

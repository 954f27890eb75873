"""Dense samples of the trained mini-wan, by diffusers in float32 on a CPU.

usage: HF_HUB_OFFLINE=1 python make_mini_wan_golden.py    (Python 3.11, torch 2.13.0 CPU, diffusers 0.42.1)

Writes mini_wan_8x32.safetensors beside itself: noise and latents [1, 3, 8, 32, 32], text [1, 16, 64], sigmas; for UniPC and Euler.
"""

import json
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanTransformer3DModel
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
MODEL = HERE.parents[1] / "examples/mini-wan"
PROMPT, FRAMES, SIZE, STEPS, GUIDANCE, SHIFT = "red plain disc on sky", 8, 32, 16, 3.0, 3.0


def main():
    torch.set_grad_enabled(False)
    # The folder is one of shards in bf16.
    model = WanTransformer3DModel.from_pretrained(MODEL, torch_dtype=torch.float32).float().eval()
    noise = torch.randn(1, 3, FRAMES, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    tensors = {"noise": noise, "text": encode(PROMPT)}
    both = torch.cat([tensors["text"], torch.zeros_like(tensors["text"])])
    solvers = {
        "unipc": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT),
        "euler": FlowMatchEulerDiscreteScheduler(shift=SHIFT),
    }
    for name, solver in solvers.items():
        solver.set_timesteps(STEPS)
        x = noise
        for t in solver.timesteps:
            conditional, unconditional = model(torch.cat([x, x]), t.expand(2), both).sample.chunk(2)
            velocity = unconditional + GUIDANCE * (conditional - unconditional)
            x = solver.step(velocity, t, x, return_dict=False)[0]
        tensors |= {f"{name}.latents": x, f"{name}.sigmas": solver.sigmas.float()}
    metadata = {"prompt": PROMPT, "guidance": str(GUIDANCE), "shift": str(SHIFT)}
    save_file(
        {key: a.contiguous() for key, a in tensors.items()}, HERE / f"mini_wan_{FRAMES}x{SIZE}.safetensors", metadata
    )


def encode(prompt: str) -> torch.Tensor:
    """[1, 16, 64]: an embedding for each attribute, then zeros."""
    words = [word for group in json.loads((MODEL / "words.json").read_text())["words"] for word in group]
    table = load_file(MODEL / "word_embeddings.safetensors")["embeddings"]
    rows = table[[words.index(word) for word in prompt.split() if word in words]]
    return torch.nn.functional.pad(rows, (0, 0, 0, 16 - len(rows)))[None]


if __name__ == "__main__":
    main()

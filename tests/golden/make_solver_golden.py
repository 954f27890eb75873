"""Golden data of the video models' samplers, by diffusers in float32 on a CPU: video_schedules.safetensors.

usage: python make_solver_golden.py    (Python 3.11, torch 2.13.0 CPU, diffusers 0.42.1)

Paths are along random model outputs, numpy.random.default_rng(step).standard_normal(SHAPE), float32.
"""

from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from safetensors.torch import save_file

SHAPE = (2, 6, 3)


def main():
    tensors = {}
    for steps, shift in ((10, 3.0), (7, 5.0), (50, 5.0), (1, 5.0), (2, 5.0)):
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=shift
        )
        tensors |= path(scheduler, f"wan.{steps}.{shift:g}", num_inference_steps=steps)
    for steps, shift in ((10, 7.0), (50, 7.0)):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        tensors |= path(scheduler, f"hunyuan.{steps}.{shift:g}", sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1])
    save_file(tensors, Path(__file__).parent / "video_schedules.safetensors")


def path(scheduler, name: str, **times) -> dict[str, torch.Tensor]:
    """The scheduler's sigmas, and the samples it walks through."""
    scheduler.set_timesteps(**times)
    samples = [torch.from_numpy(np.random.default_rng(1000).standard_normal(SHAPE, np.float32))]
    for step, t in enumerate(scheduler.timesteps):
        velocity = torch.from_numpy(np.random.default_rng(step).standard_normal(SHAPE, np.float32))
        samples.append(scheduler.step(velocity, t, samples[-1]).prev_sample)
    return {f"{name}.sigmas": scheduler.sigmas.float().clone(), f"{name}.path": torch.stack(samples)}


if __name__ == "__main__":
    main()

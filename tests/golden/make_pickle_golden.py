"""tests/golden/tiny.pt, as torch.save writes a training checkpoint: python make_pickle_golden.py (torch 2.13.0)."""

from collections import OrderedDict
from pathlib import Path

import torch

KINDS = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "bool", "float8_e4m3fn", "float8_e5m2")

if __name__ == "__main__":
    values = torch.arange(12).reshape(3, 4)
    state = OrderedDict((kind, (values % 2 if kind == "bool" else values).to(getattr(torch, kind))) for kind in KINDS)
    state["part"] = values.float()[1:]  # of a storage that begins earlier
    state["parameter"] = torch.nn.Parameter(values.float())
    state["scalar"] = torch.tensor(7.0)
    state["empty"] = torch.zeros(0, 4)
    state._metadata = OrderedDict({"": {"version": 1}})
    torch.save({"step": 3, "lr": 0.5, "module": state}, Path(__file__).parent / "tiny.pt")

"""What several test files use."""

from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def reference():
    lines = (Path(__file__).parent / "data/sd-v1-state-dict.tsv").read_text().splitlines()
    rows = (line.split("\t") for line in lines if not line.startswith("#"))
    return {name: [int(n) for n in shape.split("x")] for name, shape in rows}


def randomised(model, seed=0):
    """Every weight random, the zero-initialised ones too, at a scale that keeps activations of order one."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        scale = 0.1 if p.ndim < 2 else (p[0].numel() or 1) ** -0.5
        p.data = noise * scale + (1.0 if p.ndim == 1 and name.endswith("weight") else 0.0)
    return model.eval().requires_grad_(False)

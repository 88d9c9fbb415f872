"""How far samples of `series` and `points` are from the formulas of their data.

    lit-diffusion fit --config series
    lit-diffusion sample --ckpt_path last --name series --num_samples 1024 --out series.npy
    python benchmarks/formulas.py oscillations series.npy

Prints the distance from the nearest curve of the formula and the distribution of its parameters,
for the samples, and for training and test examples.
"""

from __future__ import annotations

import sys

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from lit_diffusion.training.data.reading.sources import SHIPPED

COLUMN = {"oscillations": "signal", "ellipses": "points"}


def oscillations(x: Tensor) -> dict[str, Tensor]:
    """The nearest exp(−d t) (p sin 2πft + q cos 2πft) by least squares on a grid of f and d.

    Shapes:
        x (n, 1, 64); each result (n,).
    """
    x = x[:, 0].double()
    t = torch.arange(64, dtype=torch.float64) / 64
    f, d = torch.meshgrid(
        torch.linspace(1, 9, 321, dtype=torch.float64),
        torch.linspace(-1, 6, 141, dtype=torch.float64),
        indexing="ij",
    )
    f, d = f.flatten(), d.flatten()
    wave = torch.exp(-d[:, None] * t) * torch.exp(2j * torch.pi * f[:, None] * t)
    basis = torch.linalg.qr(torch.stack([wave.imag, wave.real], -1)).Q  # (grid, 64, 2)
    found = []
    for part in x.split(256):
        inside = torch.einsum("nt,gtk->ngk", part, basis).square().sum(-1)
        best = inside.max(1)
        rest = (part.square().sum(1) - best.values).clamp(min=0) / 64
        frame = torch.stack([wave.imag, wave.real], -1)[best.indices]
        p, q = torch.linalg.lstsq(frame, part[..., None]).solution[..., 0].T
        found.append(
            torch.stack([rest.sqrt(), f[best.indices], d[best.indices], torch.hypot(p, q)])
        )
    distance, f, d, amplitude = torch.cat(found, 1)
    return {"distance": distance, "frequency": f, "damping": d, "amplitude": amplitude}


def ellipses(x: Tensor) -> dict[str, Tensor]:
    """The nearest conic by least squares, and the half axes of those that are ellipses.

    Shapes:
        x (n, 2, N); each result (n,).
    """
    mean = x.double().mean(2, keepdim=True)
    u, v = (x.double() - mean).unbind(1)
    rows = torch.stack([u * u, u * v, v * v, u, v, torch.ones_like(u)], -1)
    conic = torch.linalg.svd(rows, full_matrices=False).Vh[:, -1]  # (n, 6)
    a, b, c, d, e, g = conic[..., None].unbind(1)
    value = (rows @ conic[..., None])[..., 0]
    slope = torch.hypot(2 * a * u + b * v + d, b * u + 2 * c * v + e)
    distance = (value / slope).square().mean(1).sqrt()
    a, b, c, d, e, g = conic.unbind(1)
    form = torch.stack([a, b / 2, b / 2, c], -1).view(-1, 2, 2)
    centre = torch.linalg.solve(form, -torch.stack([d, e], -1) / 2)
    level = (centre * torch.stack([d, e], -1)).sum(1) / 2 + g
    square = -level[:, None] / torch.linalg.eigvalsh(form)
    axes = square.clamp(min=0).sqrt()
    return {
        "distance": distance,
        "larger half axis": axes.amax(1),
        "smaller half axis": axes.amin(1),
        "centre": (centre + mean[..., 0]).norm(dim=1),
    }


def examples(name: str, split: str) -> Tensor:
    """The examples of a split, (n, C, *)."""
    column = pq.read_table(SHIPPED / name / f"{split}.parquet")[COLUMN[name]].to_pylist()
    x = torch.tensor(column)
    return x.mT if name == "ellipses" else x


def main(name: str, file: str) -> None:
    """Print the table."""
    fit = {"oscillations": oscillations, "ellipses": ellipses}[name]
    sets = {"samples": torch.from_numpy(np.load(file))}
    sets |= {split: examples(name, split) for split in ("train", "test")}
    for of, x in sets.items():
        for parameter, values in fit(x).items():
            q = torch.quantile(values, torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64))
            print(f"{of:8} {parameter:18} 5 %, median, 95 %: {q[0]:.4f} {q[1]:.4f} {q[2]:.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The variance of one sample of the bound under each schedule, and its mean.

    python benchmarks/schedules.py                          exact denoiser, Gaussian data
    python benchmarks/schedules.py CHECKPOINT --path DATA   a trained network, held-out data

All schedules have the same ends, those of the checkpoint or [−5, 13.3]. The cosine and the linear
betas are stretched to them, as in the table of Kingma et al. (2021). The variance is that of one
independent sample of (λ, ε) for a fixed example, averaged over examples, in bits per dimension
squared; the learned schedule is trained here, on other samples, with the denoiser fixed.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import lit_diffusion as ld
from lit_diffusion.training import DataModule, LitDiffusion

Examples = tuple[Tensor, dict[str, Tensor]]


class StretchedSchedule(ld.NoiseSchedule):
    """Another schedule with its range stretched to other ends, λ ↦ a λ + b."""

    def __init__(self, base: ld.NoiseSchedule, logsnr_min: float, logsnr_max: float) -> None:
        super().__init__(logsnr_min, logsnr_max, support=(logsnr_min, logsnr_max))
        self.base = base
        low, high = base.ends
        self.stretch = (logsnr_max - logsnr_min) / (high - low)

    def _logsnr(self, t: Tensor) -> Tensor:
        low, _ = self.base.ends
        return self.logsnr_min + (self.base.logsnr(t) - low) * self.stretch


def learn(
    denoiser: Any,
    data: Callable[[int], Examples],
    ends: tuple[float, float],
    steps: int,
    batch: int,
) -> ld.LearnedSchedule:
    """A schedule whose shape has followed the gradient of the variance."""
    schedule = ld.LearnedSchedule(*ends)
    loss = ld.DiffusionLoss(schedule, ld.ELBOWeighting())
    optimizer = torch.optim.Adam(schedule.parameters(), lr=0.05, betas=(0.9, 0.99))
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x, cond = data(batch)
        optimizer.zero_grad()
        # Independent times: the variance that is to fall is that of a single sample.
        loss(denoiser, x, t=torch.rand(batch), **cond).loss.mean().backward()
        optimizer.step()
        rate.step()
    return schedule.requires_grad_(False)


@torch.no_grad()
def moments(
    denoiser: Any, schedule: ld.NoiseSchedule, examples: Examples, samples: int, batch: int = 256
) -> dict[str, float]:
    """Mean and variance of one sample, in bits per dimension, with their standard errors."""
    loss = ld.DiffusionLoss(schedule.requires_grad_(False), ld.ELBOWeighting())
    means, variances, spread = [], [], []
    x, cond = examples
    for i in range(len(x)):
        found = []
        for n in [batch] * (samples // batch):
            one = x[i : i + 1].expand(n, *x.shape[1:])
            label = {name: value[i : i + 1].expand(n) for name, value in cond.items()}
            found.append(loss(denoiser, one, t=torch.rand(n), **label).loss.double())
        bits = torch.cat(found) / math.log(2)
        means.append(bits.mean())
        variances.append(bits.var())
        spread.append(bits.var() / len(bits))
    n = len(means)
    return {
        "mean": float(torch.stack(means).mean()),
        "± mean": float(torch.stack(spread).sum().sqrt() / n),
        "variance": float(torch.stack(variances).mean()),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--path", default="digits8x8", help="Data of the checkpoint.")
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=1000, help="Steps of the learned schedule.")
    parser.add_argument("--batch", type=int, default=128)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows: dict[str, ld.NoiseSchedule] = {}
    if args.checkpoint is None:
        ends, dims = (-5.0, 13.3), 192
        denoiser: Any = ld.GaussianDenoiser(0.5)
        x = torch.randn(args.examples, dims)
        x = 0.5 * x / x.square().mean(1, keepdim=True).sqrt()  # so that the mean is known exactly

        def data(n: int) -> Examples:
            return 0.5 * torch.randn(n, dims), {}

        examples: Examples = (x, {})
    else:
        model = LitDiffusion.load_from_checkpoint(args.checkpoint).requires_grad_(False)
        denoiser, ends = model.denoiser, model.loss.schedule.ends
        held = DataModule(args.path, shape=model.shape, batch_size=1000, val_examples=1000)
        held.setup("validate")
        batch = held.on_after_batch_transfer(next(iter(held.val_dataloader())), 0)
        x, cond = batch["image"], model.condition(batch)
        first = args.examples

        def data(n: int) -> Examples:
            chosen = torch.randint(first, len(x), (n,))
            return x[chosen], {name: value[chosen] for name, value in cond.items()}

        examples = (x[:first], {name: value[:first] for name, value in cond.items()})
        if isinstance(model.loss.schedule, ld.LearnedSchedule):
            rows["learned with the network"] = model.loss.schedule
    rows |= {
        "learned": learn(denoiser, data, ends, args.steps, args.batch),
        "linear in λ": ld.LinearSchedule(*ends),
        "cosine": StretchedSchedule(ld.CosineSchedule(), *ends),
        "cosine, cut": ld.CosineSchedule(*ends),
        "linear betas": StretchedSchedule(ld.BetaSchedule(), *ends),
    }
    result: dict[str, Any] = {
        name: moments(denoiser, schedule, examples, args.samples)
        for name, schedule in rows.items()
    }
    for row in result.values():
        row["variance over learned"] = row["variance"] / result["learned"]["variance"]
    exact = None
    if args.checkpoint is None:
        low, high = (torch.nn.functional.softplus(torch.tensor(e - 2 * math.log(2))) for e in ends)
        exact = float(high - low) / 2 / math.log(2)
    result["ends"], result["exact mean"] = ends, exact
    print(json.dumps(result, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()

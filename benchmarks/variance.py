"""The variance of loss and gradient of one sample, for each schedule under each weighting.

    python benchmarks/variance.py                          exact denoiser, Gaussian data, λ in ±20
    python benchmarks/variance.py CHECKPOINT --path DATA   a trained network, its own range

The first is std/mean of the loss of one sample of (λ, ε). For a network there is also the variance
of the gradient of all its weights, tr Var(g) = E‖g‖² − ‖E g‖², over samples of (x, λ, ε), and that
of the cosine divided by it. Learned and adaptive schedules are first fitted to the denoiser, on
other samples.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import lit_diffusion as ld
from lit_diffusion.training import DataModule, LitDiffusion

Data = Callable[[int], tuple[Tensor, dict[str, Tensor]]]
WEIGHTINGS = {
    "ELBO": ld.ELBOWeighting(),
    "sigmoid(2 − λ)": ld.SigmoidWeighting(2.0),
    "e^(−λ/2)": ld.ExponentialWeighting(),
    "EDM": ld.EDMWeighting(),
}


def fitted(
    denoiser: Any, weighting: ld.Weighting, data: Data, ends: tuple[float, float], batches: int
) -> dict[str, ld.NoiseSchedule]:
    """The schedules to compare, those that follow the loss having followed it."""
    adaptive = ld.AdaptiveSchedule(*ends, decay=0.99)
    with torch.no_grad():
        for _ in range(batches):
            x, cond = data(64)
            terms = ld.DiffusionLoss(adaptive, ld.ELBOWeighting())(denoiser, x, **cond)
            adaptive.update(terms.logsnr, weighting(terms.logsnr) * terms.eps_mse)
    learned = ld.LearnedSchedule(*ends)
    loss = ld.DiffusionLoss(learned, weighting)
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.05, betas=(0.9, 0.99))
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, batches)
    for _ in range(batches):
        x, cond = data(64)
        optimizer.zero_grad()
        loss(denoiser, x, t=torch.rand(64), **cond).loss.mean().backward()
        optimizer.step()
        rate.step()
    return {
        "cosine": ld.CosineSchedule(*ends),
        "uniform": ld.LinearSchedule(*ends),
        "flow": ld.FlowSchedule(*ends),
        "EDM": ld.NormalSchedule(logsnr_min=ends[0], logsnr_max=ends[1]),
        "learned": learned.requires_grad_(False),
        "adaptive": adaptive,
    }


@torch.no_grad()
def moments(loss: ld.DiffusionLoss, denoiser: Any, data: Data, samples: int) -> dict[str, float]:
    """Mean and std/mean of the loss of one sample."""
    found = []
    for _ in range(max(1, samples // 256)):
        x, cond = data(256)
        found.append(loss(denoiser, x, t=torch.rand(256), **cond).loss.double())
    every = torch.cat(found)
    return {"mean": float(every.mean()), "std/mean": float(every.std() / every.mean())}


def gradient_variance(
    loss: ld.DiffusionLoss, denoiser: torch.nn.Module, data: Data, samples: int
) -> float:
    """Trace of the covariance of the gradient of one sample."""
    weights = [p for p in denoiser.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in weights]
    square = 0.0
    for _ in range(samples):
        x, cond = data(1)
        value = loss(denoiser, x, t=torch.rand(1), **cond).loss.mean()
        gradient = torch.autograd.grad(value, weights)
        square += float(sum(g.double().square().sum() for g in gradient)) / samples
        torch._foreach_add_(total, list(gradient), alpha=1 / samples)
    mean = float(sum(g.double().square().sum() for g in total))
    return (square - mean) * samples / (samples - 1)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--path", default="digits8x8", help="Data of the checkpoint.")
    parser.add_argument("--samples", type=int, default=32_768, help="Samples of the loss.")
    parser.add_argument("--gradients", type=int, default=512, help="Samples of the gradient.")
    parser.add_argument("--batches", type=int, default=400, help="Of 64, to fit a schedule.")
    parser.add_argument("--weightings", nargs="*", default=list(WEIGHTINGS))
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.checkpoint is None:
        ends = (-20.0, 20.0)
        denoiser: Any = ld.GaussianDenoiser(0.5)

        def data(n: int) -> tuple[Tensor, dict[str, Tensor]]:
            return 0.5 * torch.randn(n, 192), {}
    else:
        model = LitDiffusion.load_from_checkpoint(args.checkpoint)
        model.loss.requires_grad_(False)
        denoiser, ends = model.denoiser, model.loss.schedule.ends
        held = DataModule(args.path, shape=model.shape, batch_size=2000, val_examples=2000)
        held.setup("validate")
        batch = held.on_after_batch_transfer(next(iter(held.val_dataloader())), 0)
        images, labels = batch["image"], model.condition(batch)

        def data(n: int) -> tuple[Tensor, dict[str, Tensor]]:
            chosen = torch.randint(len(images), (n,))
            return images[chosen], {name: value[chosen] for name, value in labels.items()}

    for name in args.weightings:
        weighting = WEIGHTINGS[name]
        rows: dict[str, Any] = {}
        for kind, schedule in fitted(denoiser, weighting, data, ends, args.batches).items():
            loss = ld.DiffusionLoss(schedule, weighting)
            rows[kind] = moments(loss, denoiser, data, args.samples)
            if args.checkpoint is not None:
                found = gradient_variance(loss, denoiser, data, args.gradients)
                rows[kind]["tr Var(gradient)"] = found
                rows[kind]["cosine's over it"] = rows["cosine"]["tr Var(gradient)"] / found
        print(json.dumps({name: rows}, indent=1, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()

"""A diffusion model in one page: the mathematics of lit_diffusion and a plain PyTorch loop.

The data are points in the plane, a mixture of two Gaussians, so the truth is known:
half of the points lie around x = −1 and half around x = +1, with standard deviation 0.1.
Run it with `python examples/minimal.py`: it takes seconds on a CPU.
"""

import torch
from torch import Tensor, nn

from lit_diffusion import (
    CosineSchedule,
    Denoiser,
    DiffusionLoss,
    HeunSampler,
    SigmoidWeighting,
    VPrediction,
)


def sample_data(n: int) -> Tensor:
    """Sample (n, 2) points from the mixture."""
    sign = torch.randint(0, 2, (n, 1)) * 2.0 - 1
    return torch.cat([sign, torch.zeros(n, 1)], dim=1) + 0.1 * torch.randn(n, 2)


class Network(nn.Module):
    """A network is any module that maps noisy data z and the log-SNR λ to the shape of z."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )

    def forward(self, z: Tensor, logsnr: Tensor) -> Tensor:
        """Z (B, 2), logsnr (B,) → (B, 2)."""
        level = torch.stack([logsnr / 10, torch.tanh(logsnr / 4)], dim=1).to(z.dtype)
        return self.layers(torch.cat([z, level], dim=1))


def main() -> None:
    """Train, sample and compare with the truth."""
    torch.manual_seed(0)

    # The schedule is the density of noise levels to train on: it decides how efficiently.
    schedule = CosineSchedule(logsnr_min=-10.0, logsnr_max=10.0)
    # The weighting is how much each noise level counts: it decides what is optimised.
    weighting = SigmoidWeighting(bias=2.0)
    loss = DiffusionLoss(schedule, weighting)
    # The denoiser maps (z, λ) to estimates of data and noise; the prediction is what the
    # network's output means.
    denoiser = Denoiser(Network(), VPrediction())

    optimizer = torch.optim.Adam(denoiser.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2000)
    for step in range(2000):
        terms = loss(denoiser, sample_data(256))
        optimizer.zero_grad()
        terms.loss.mean().backward()
        optimizer.step()
        decay.step()
        if step % 500 == 0:
            print(f"step {step:4d}  loss {terms.loss.mean():.4f}")

    sampler = HeunSampler(steps=30, schedule=schedule)
    with torch.no_grad():
        x = sampler(denoiser, torch.randn(4000, 2))
    right = x[:, 0] > 0
    print(f"share at +1     {right.float().mean():.3f}  (truth 0.500)")
    print(f"mean            {x[right, 0].mean():.3f}  (truth 1.000)")
    print(f"std along x     {x[right, 0].std():.3f}  (truth 0.100)")
    print(f"std along y     {x[:, 1].std():.3f}  (truth 0.100)")


if __name__ == "__main__":
    main()

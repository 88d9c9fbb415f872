"""A diffusion model on one page: lit_diffusion's mathematics in a plain PyTorch training loop.

The data are points in the plane from a mixture of two Gaussians, so the samples can be compared
with the truth: half of the points lie around x = −1 and half around x = +1, both at y = 0, with
standard deviation 0.1. Run `python examples/minimal.py`; it takes seconds on a CPU.
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
    """Sample n points from the mixture, (n, 2)."""
    sign = torch.randint(0, 2, (n, 1)) * 2.0 - 1
    return torch.cat([sign, torch.zeros(n, 1)], dim=1) + 0.1 * torch.randn(n, 2)


class Network(nn.Module):
    """A network: any module that maps noisy data z and the log-SNR λ to a tensor of z's shape."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )

    def forward(self, z: Tensor, logsnr: Tensor) -> Tensor:
        """Map z (B, 2) and logsnr (B,) to (B, 2)."""
        level = torch.stack([logsnr / 10, torch.tanh(logsnr / 4)], dim=1).to(z.dtype)
        return self.layers(torch.cat([z, level], dim=1))


def main() -> None:
    """Train the model, sample from it, and compare the samples with the truth."""
    torch.manual_seed(0)

    # The weighting is how much each noise level counts: it defines what is optimised.
    weighting = SigmoidWeighting(bias=2.0)
    # The schedule is the density from which noise levels are sampled in training. Within its
    # range it does not change what is optimised, only how noisy the estimate of the loss is.
    schedule = CosineSchedule(logsnr_min=-10.0, logsnr_max=10.0)
    loss = DiffusionLoss(schedule, weighting)
    # The prediction is what the network outputs, here v. The denoiser turns that into estimates
    # of the data and of the noise.
    denoiser = Denoiser(Network(), VPrediction())

    optimizer = torch.optim.Adam(denoiser.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2000)
    for step in range(2000):
        value = loss(denoiser, sample_data(256)).loss.mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        decay.step()
        if step % 500 == 0:
            print(f"step {step:4d}  loss {value:.4f}")

    # The sampler follows the noise levels of a schedule from noise to data; this one takes 30.
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

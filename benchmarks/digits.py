"""The quality of the demo's model: likelihood, correct labels, Fréchet distance.

    python benchmarks/digits.py CHECKPOINT

Samples are evaluated by a small classifier, trained here in seconds on the same 1,500 digits. The
output is the diffusion term of the bound on the 297 test digits (at λ up to 13.3 the 17 grey
levels are distinguishable and the other two terms are below 0.001 bits), the fraction of samples
whose class the classifier confirms, and the Fréchet distance between its features of 1,500 samples
and of the test digits, divided by that of the training digits.
"""

from __future__ import annotations

import argparse
import json
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_diffusion import DDIMSampler
from lit_diffusion.gaussian import noise_like
from lit_diffusion.times import fixed_times
from lit_diffusion.training import DataModule, LitDiffusion
from lit_diffusion.training.step.randomness import generators


class Classifier(nn.Module):
    """Three convolutions and 32 features."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(16 * size**2, 32)),
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the ten classes."""
        return self.head(F.relu(self.features(x)))


def digits(split: str) -> tuple[Tensor, Tensor]:
    """All images of a split, in [−1, 1], and their labels."""
    data = DataModule("digits8x8", val_split=split, batch_size=2000)
    data.setup("validate")
    batch = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    return batch["image"], batch["label"]


def train_classifier(x: Tensor, label: Tensor, steps: int = 1000) -> Classifier:
    """Train on noisy digits, so that small flaws of samples do not fool it."""
    torch.manual_seed(0)
    model = Classifier(x.shape[-1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for _ in range(steps):
        chosen = torch.randint(len(x), (64,))
        noise = 0.2 * torch.rand(64, 1, 1, 1) * torch.randn_like(x[chosen])
        loss = F.cross_entropy(model(x[chosen] + noise), label[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return model.eval()


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features."""
    a, b = a.double(), b.double()
    covariance_a, covariance_b = a.T.cov(), b.T.cov()
    roots = torch.linalg.eigvals(covariance_a @ covariance_b).real.clamp(min=0).sqrt()
    apart = (a.mean(0) - b.mean(0)).square().sum()
    return float(apart + covariance_a.trace() + covariance_b.trace() - 2 * roots.sum())


@torch.inference_mode()
def bits(model: LitDiffusion, x: Tensor, label: Tensor, samples: int = 24) -> float:
    """The diffusion term of the bound at w = 1, in bits per dimension, λ stratified."""
    index = torch.arange(len(x))
    total = 0.0
    for sample in range(samples):
        t = fixed_times(index, len(x), sample, samples)
        _, log_prob = model.loss.schedule.at(t)
        eps = noise_like(x, generators(sample, "bits", index.tolist()))
        terms = model.loss(model.denoiser, x, t=t, eps=eps, label=label)
        total += float((0.5 * terms.eps_mse / log_prob.exp()).mean()) / samples
    return total / math.log(2)


@torch.inference_mode()
def main() -> None:
    """Judge a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint")
    model = LitDiffusion.load_from_checkpoint(parser.parse_args().checkpoint)
    train, test = digits("train"), digits("test")
    with torch.inference_mode(False):
        judge = train_classifier(train[0].clone(), train[1].clone())
    accuracy = float((judge(test[0]).argmax(1) == test[1]).float().mean())
    baseline = frechet(judge.features(train[0]), judge.features(test[0]))
    result = {
        "classifier accuracy on test digits": accuracy,
        "bits per dimension, test": bits(model, *test),
        "Fréchet baseline, train against test": baseline,
    }
    for name, sampler in (("own sampler", model.sampler), ("DDIM 50", DDIMSampler(steps=50))):
        noise = generators(1, "sample", list(range(len(train[1]))))
        x = model.sample(len(noise), noise, label=train[1], sampler=sampler)
        right = float((judge(x).argmax(1) == train[1]).float().mean())
        ratio = frechet(judge.features(x), judge.features(test[0])) / baseline
        result[name] = {"labels correct": right, "Fréchet distance over baseline": ratio}
    print(json.dumps(result, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()

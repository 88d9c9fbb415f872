"""The cost of averaging the weights, and the accuracy of reconstructed averages.

    python benchmarks/ema.py [--steps 4000] [--tensors 300]

First the time of one update of an average, all tensors in one call compared with loops over them,
alternating; medians. Then a small network is trained on the digits, averages of many widths are
kept directly, and each is reconstructed from snapshots of two of them: by the criterion of the
library, and by least squares on the densities with and without the constraint on the sum; from
snapshots in float32, float16 and bfloat16. Errors are relative to the average's distance from the
weights.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from measuring import arguments, machine, ratio, report, take_turns
from torch import Tensor

import lit_diffusion as ld
from lit_diffusion.averaging import ConstantProfile, PowerProfile, RunningAverage, Snapshot
from lit_diffusion.nn import UNet
from lit_diffusion.training import DataModule, LitDiffusion, WarmupDecayLR
from lit_diffusion.training.run.snapshots import next_step

TRACKED = (0.05, 0.1)
WANTED = (0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.15, 0.2, 0.25, 0.28)


def times(tensors: int, numbers: int, seconds: float, device: str) -> dict[str, list[float]]:
    """Milliseconds of one update in each round, by the way it is done."""
    weights = [torch.randn(numbers, device=device) for _ in range(tensors)]
    average = RunningAverage(ConstantProfile(0.999), weights)

    def formula() -> None:  # as an averaging function of one tensor has it
        for value, w in zip(average.values, weights, strict=True):
            value.copy_(0.999 * value + 0.001 * w)

    def in_place() -> None:
        for value, w in zip(average.values, weights, strict=True):
            value.mul_(0.999).add_(w, alpha=0.001)

    def lerp() -> None:
        for value, w in zip(average.values, weights, strict=True):
            value.lerp_(w, 0.001)

    ways = {
        "one call": lambda: average.update(weights),
        "loop, d·θ̄ + (1 − d)·θ": formula,
        "loop, mul_ and add_": in_place,
        "loop, lerp_": lerp,
    }
    return take_turns(ways, seconds, device, warmup=20)


class Follow(L.Callback):
    """Follows all widths directly, and keeps snapshots of those that are tracked."""

    def __init__(self) -> None:
        self.due = next_step(0, 100)
        self.kept: list[tuple[Snapshot, Tensor]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin."""
        self.weights = [p.detach() for p in pl_module.parameters()]
        profiles = [PowerProfile(sigma_rel) for sigma_rel in sorted({*TRACKED, *WANTED})]
        self.averages = {p.sigma_rel: RunningAverage(p, self.weights) for p in profiles}

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        """Follow."""
        for average in self.averages.values():
            average.update(self.weights)
        step = trainer.global_step
        if step in (self.due, trainer.max_steps):
            self.due = next_step(step, 100)
            for sigma_rel in TRACKED:
                self.kept.append((Snapshot(PowerProfile(sigma_rel), step), self.flat(sigma_rel)))

    def flat(self, sigma_rel: float) -> Tensor:
        """The average of a width as one row."""
        return torch.cat([value.flatten() for value in self.averages[sigma_rel].values])


def train(steps: int) -> Follow:
    """Train a small network on the digits."""
    torch.manual_seed(0)
    model = LitDiffusion(
        network=UNet(shape=(1, 8, 8), channels=(8, 8), attention=(), num_classes=10),
        schedule=ld.LinearSchedule(-10.0, 13.3),
        weighting=ld.SigmoidWeighting(1.0),
        optimizer=functools.partial(torch.optim.AdamW, lr=2e-3),
        lr_scheduler=functools.partial(WarmupDecayLR, warmup=100, decay=0.5),
    )
    follow = Follow()
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_steps=steps,
            max_epochs=-1,
            callbacks=[follow],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            default_root_dir=folder,
        )
        trainer.fit(model, DataModule(batch_size=32, steps_per_epoch=500, streaming=False))
    return follow


def on_densities(target: Snapshot, of: list[Snapshot], constrained: bool) -> Tensor:
    """Weights by least squares on the densities dS/dn: ∫ = p·q/(p + q − 1)·(t/u)^q/t, t ≤ u."""
    every = [*of, target]
    p = torch.tensor([s.profile.power for s in every], dtype=torch.float64)
    t = torch.tensor([s.updates for s in every], dtype=torch.float64)
    first = torch.minimum(t[:, None], t)
    exponent = p[:, None] * (first / t[:, None]).log() + p * (first / t).log()
    whole = p[:, None] * p / (p[:, None] + p - 1) * exponent.exp() / first * target.updates
    n = len(of)
    system, right = whole[:n, :n], whole[:n, n:]
    if constrained:
        system = torch.ones(n + 1, n + 1, dtype=torch.float64)
        system[:n, :n] = whole[:n, :n]
        system[n, n] = 0
        right = torch.cat([right, torch.ones(1, 1, dtype=torch.float64)])
    return torch.linalg.lstsq(system, right, driver="gelsd").solution[:n, 0]


def errors(follow: Follow, sigma_rel: float) -> dict[str, float]:
    """How far off each way is, over the distance of the average from the weights."""
    of = [snapshot for snapshot, _ in follow.kept]
    rows = torch.stack([row for _, row in follow.kept])
    direct = follow.flat(sigma_rel).double()
    distance = (torch.cat([w.flatten() for w in follow.weights]).double() - direct).norm()
    target = Snapshot(PowerProfile(sigma_rel), of[-1].updates)
    whole = ld.overlaps(of[-2:])
    apart = float(whole[0, 0] + whole[1, 1] - 2 * whole[0, 1])
    step = float((rows[-1] - rows[-2]).double().square().sum()) / apart

    def ours(dtype: torch.dtype) -> Tensor:
        rounding = torch.finfo(dtype).eps ** 2 / 24 * float(rows[-1].double().square().sum())
        return ld.reconstruct(target, of, rounding / step).weights

    def off(weights: Tensor, dtype: torch.dtype = torch.float32) -> float:
        return float((weights @ rows.to(dtype).double() - direct).norm() / distance)

    return {
        "densities": off(on_densities(target, of, False)),
        "densities, Σ = 1": off(on_densities(target, of, True)),
        "ours, float32": off(ours(torch.float32)),
        "ours, float16": off(ours(torch.float16), torch.float16),
        "ours, bfloat16": off(ours(torch.bfloat16), torch.bfloat16),
        "ours, float16, of the weights": off(ours(torch.float16), torch.float16)
        * float(distance / direct.norm()),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and print; the times as JSON, too."""
    parser = arguments(__doc__, seconds=20)
    parser.add_argument("--steps", type=int, default=4000, help="of the training; 0 for none")
    parser.add_argument("--tensors", type=int, default=300)
    chosen = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    for numbers in (100, 1000, 10_000):
        found = times(chosen.tensors, numbers, chosen.seconds, chosen.device)
        rows += [
            {
                "tensors": chosen.tensors,
                "elements in each": numbers,
                "way": way,
                "ms": statistics.median(ms),
                "one call over it": ratio(found["one call"], ms),
            }
            for way, ms in found.items()
        ]
    result = report("One update of an average", machine(chosen.device), rows, chosen.json)
    if not chosen.steps:
        return result
    follow = train(chosen.steps)
    print(f"{chosen.steps} steps, {len(follow.kept) // len(TRACKED)} snapshots of {TRACKED}")
    for sigma_rel in WANTED:
        found = errors(follow, sigma_rel)
        print(
            f"sigma_rel {sigma_rel}: " + ", ".join(f"{k} {v:.1e}" for k, v in found.items()),
            flush=True,
        )
    return result


if __name__ == "__main__":
    main()

"""The overhead of sampling over the network: images per second, calls, milliseconds per call.

    python benchmarks/sampling.py [--batch_sizes 16 64] [--steps 10 50] [--compile] [--bf16]
        [--config configs/cifar10.yaml] [--device cuda] [--seconds 60] [--json FILE]

Every registered sampler runs in `model.sample`, alternating with the minimum that it can cost: the
network alone, called as often on a batch of that size. On a busy machine the difference is smaller
than the noise, so the sampler itself is also timed with a network that returns immediately. On a
GPU its time is hidden behind the network as long as it is the shorter of the two.

A hook on the network counts the calls first; if they differ from those stated by the sampler, that
is an error. The ancestral sampler runs once more with one generator per image, as in
`lit-diffusion sample` and `evaluate`, so that image i is the same in any batch.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import (
    Echo,
    arguments,
    count_calls,
    machine,
    network_of,
    ratio,
    report,
    take_turns,
    usual_config,
)
from torch import Tensor

from lit_diffusion import SAMPLERS
from lit_diffusion.samplers import AncestralSampler, Sampler
from lit_diffusion.training import LitDiffusion
from lit_diffusion.training.step.randomness import generators


def samplers(steps: Sequence[int]) -> Iterator[tuple[Sampler, str]]:
    """Every sampler at every number of steps, with one generator per batch or per image."""
    for n in steps:
        for cls in SAMPLERS.classes():
            yield cls(steps=n), "batch"
        yield AncestralSampler(steps=n), "image"


def sampling(model: LitDiffusion, n: int, sampler: Sampler, noise: str) -> Callable[[], Tensor]:
    """Sample n images of class 0 as a user does."""

    def sample() -> Tensor:
        each = generators(0, "sample", list(range(n))) if noise == "image" else None
        label = None if model.num_classes is None else 0
        return model.sample(n, each, label, sampler)

    return sample


def calling(model: LitDiffusion, n: int, calls: int) -> Callable[[], None]:
    """The network alone."""
    z = torch.randn(n, *model.shape, device=model.device)
    logsnr, cond = torch.zeros(n, device=model.device), {}
    if model.num_classes is not None:
        cond["label"] = torch.zeros(n, dtype=torch.int64, device=model.device)

    @torch.inference_mode()
    def bare() -> None:
        for _ in range(calls):
            model.denoiser.network(z, logsnr, **cond)

    return bare


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, and print a table."""
    parser = arguments(__doc__, seconds=30)
    parser.add_argument("--config", type=Path, default=None, help="whose network; of the device")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--compile", action="store_true", help="compile the network in place")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    chosen = parser.parse_args(argv)
    config = chosen.config or usual_config(chosen.device)
    kind, rows = torch.device(chosen.device).type, []
    with torch.autocast(kind, torch.bfloat16, enabled=chosen.bf16):
        for n in chosen.batch_sizes:
            network = network_of(config)
            model = LitDiffusion(network, shape=network.shape).to(chosen.device).eval()
            cases = list(samplers(chosen.steps))
            for sampler, noise in cases:
                made = count_calls(network, sampling(model, n, sampler, noise))
                if made != sampler.calls:
                    raise AssertionError(f"{sampler!r} states {sampler.calls} calls, made {made}.")
            echo = Echo(network.shape, network.num_classes)
            hollow = LitDiffusion(echo, shape=echo.shape).to(chosen.device).eval()
            if chosen.compile:
                torch._dynamo.reset()  # a second size would be compiled for any size
                network.compile()
            for sampler, noise in cases:
                calls = sampler.calls
                ways = {
                    "sample": sampling(model, n, sampler, noise),
                    "bare": calling(model, n, calls),
                    "itself": sampling(hollow, n, sampler, noise),
                }
                times = take_turns(ways, chosen.seconds, chosen.device, warmup=1)
                ours, bare = times["sample"], times["bare"]
                extra = statistics.median(a - b for a, b in zip(ours, bare, strict=True))
                rows.append(
                    {
                        "sampler": type(sampler).__name__,
                        "noise for": noise,
                        "batch": n,
                        "steps": sampler.steps,
                        "calls": calls,
                        "images/s": n / statistics.median(ours) * 1e3,
                        "bare images/s": n / statistics.median(bare) * 1e3,
                        "ratio": ratio(ours, bare),
                        "extra ms per call": extra / calls,
                        "sampler itself, ms per call": statistics.median(times["itself"]) / calls,
                        "rounds": len(ours),
                    }
                )
    size = sum(p.numel() for p in network.parameters())
    how = f"{'compiled' if chosen.compile else 'eager'}, {'bf16' if chosen.bf16 else 'float32'}"
    title = f"Sampling: the network of {config.name}, {size:,} parameters, {how}"
    return report(title, machine(chosen.device), rows, chosen.json)


if __name__ == "__main__":
    main()

"""The cost of bits per dimension: images per second, calls per image, milliseconds per call.

    python benchmarks/likelihood.py [--images 64] [--batch_size 32] [--steps 10] [--bf16]
        [--config configs/cifar10.yaml] [--device cuda] [--seconds 60] [--json FILE]

The bound in continuous time and of a chain of 1,000 steps, with one sample of λ each, with the
decoder that needs no network and the one that does; and the probability-flow ODE with one random
probe, with fixed and with adaptive steps. Each alternates with its minimal cost: the network
called as often on batches of that size, for the ODE with a backward pass to z. On a busy machine
the difference is smaller than the noise, so each estimator is also timed with a network that
returns immediately, except the adaptive one, which would take other steps.

A hook on the network counts the calls; except for the adaptive ODE their number is stated here,
and any other is an error. The images have random levels, and the network is untrained: this only
affects the number of adaptive steps.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
from torch import Tensor, nn

from lit_diffusion import (
    CosineSchedule,
    Denoiser,
    DiscretizedGaussianDecoder,
    SoftmaxDecoder,
    UniformDequantiser,
    log_likelihood,
    variational_bound,
)


class Estimator(NamedTuple):
    """How an image is coded: called as run(denoiser, x, label=…); None where calls are not known.

    `backward` says that each call is differentiated by z.
    """

    name: str
    run: Callable[..., Any]
    calls: int | None
    backward: bool


def estimators(steps: int, tolerance: float) -> list[Estimator]:
    """What there is to choose from."""
    schedule = CosineSchedule()
    bound = partial(variational_bound, schedule=schedule, decoder=SoftmaxDecoder(256))
    flow = partial(log_likelihood, dequantiser=UniformDequantiser(256))
    adaptive = partial(flow, steps=None, tolerance=tolerance)
    return [
        Estimator("bound", bound, 1, False),
        Estimator(
            "bound, DiscretizedGaussianDecoder",
            partial(bound, decoder=DiscretizedGaussianDecoder(256)),
            2,
            False,
        ),
        Estimator("bound, 1,000 steps", partial(bound, num_timesteps=1000), 1, False),
        Estimator(f"flow, {steps} steps", partial(flow, steps=steps), 4 * steps, True),
        Estimator(f"flow, adaptive, {tolerance:g}", adaptive, None, True),
    ]


def calling(
    network: nn.Module, batches: Sequence[Tensor], calls: Sequence[int], backward: bool
) -> Callable[[], None]:
    """The network alone, as often as said for each batch, and back to z if asked to."""

    def bare() -> None:
        for x, times in zip(batches, calls, strict=True):
            z = x.clone().requires_grad_(backward)
            logsnr, cond = torch.zeros(len(x), device=x.device), labels(network, x)
            for _ in range(times):
                with torch.set_grad_enabled(backward):
                    out = network(z, logsnr, **cond)
                    if backward:
                        torch.autograd.grad(out.sum(), z)

    return bare


def labels(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Class 0 for each, if there are classes."""
    if network.num_classes is None:
        return {}
    return {"label": torch.zeros(len(x), dtype=torch.int64, device=x.device)}


def coding(
    run: Callable[..., Any], network: nn.Module, batches: Sequence[Tensor]
) -> Callable[[], None]:
    """An estimator over all images, as an evaluation runs it; always with the same noise."""
    denoiser = Denoiser(network)

    @torch.no_grad()
    def code() -> None:
        for x in batches:
            noise = torch.Generator(x.device).manual_seed(0)
            run(denoiser, x, generator=noise, **labels(network, x))

    return code


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, and print a table."""
    parser = arguments(__doc__, seconds=30)
    parser.add_argument("--config", type=Path, default=None, help="whose network; of the device")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10, help="of the flow, four calls each")
    parser.add_argument("--tolerance", type=float, default=1e-2, help="of the adaptive flow")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    chosen = parser.parse_args(argv)
    config = chosen.config or usual_config(chosen.device)
    network = network_of(config).to(chosen.device).eval()
    levels = torch.randint(256, (chosen.images, *network.shape), device=chosen.device)
    batches = (levels / 127.5 - 1).split(chosen.batch_size)
    hollow = Echo(network.shape, network.num_classes).to(chosen.device)
    kind, rows = torch.device(chosen.device).type, []
    with torch.autocast(kind, torch.bfloat16, enabled=chosen.bf16):
        for name, run, calls, backward in estimators(chosen.steps, chosen.tolerance):
            made = [count_calls(network, coding(run, network, [x])) for x in batches]
            if calls is not None and made != [calls] * len(batches):
                raise AssertionError(
                    f"{name}: expected {calls} calls for each batch, made {made}."
                )
            code = coding(run, network, batches)
            bare = calling(network, batches, made, backward)
            ways = {"code": code, "bare": bare}
            if calls is not None:
                ways["itself"] = coding(run, hollow, batches)
            times = take_turns(ways, chosen.seconds, chosen.device, warmup=1)
            ours, alone = times["code"], times["bare"]
            extra = statistics.median(a - b for a, b in zip(ours, alone, strict=True))
            itself = None if calls is None else statistics.median(times["itself"]) / sum(made)
            rows.append(
                {
                    "estimator": name,
                    "calls per batch": statistics.mean(made),
                    "each": "and back" if backward else "forward",
                    "images/s": chosen.images / statistics.median(ours) * 1e3,
                    "bare images/s": chosen.images / statistics.median(alone) * 1e3,
                    "ratio": ratio(ours, alone),
                    "extra ms per call": extra / sum(made),
                    "itself, ms per call": itself,
                    "rounds": len(ours),
                }
            )
    size = sum(p.numel() for p in network.parameters())
    title = (
        f"Likelihood: {chosen.images} images in batches of {chosen.batch_size}, the network of "
        f"{config.name}, {size:,} parameters, {'bf16' if chosen.bf16 else 'float32'}"
    )
    return report(title, machine(chosen.device), rows, chosen.json)


if __name__ == "__main__":
    main()

"""The overhead of evaluation over sampling the images.

    python benchmarks/evaluation.py

Samples from a network of the demo's size in three alternating ways: the sampler alone with one
generator, `Generation`, which gives each image its own, and with the scores of `FID` computed from
the samples. The output is images per second, medians of the repeats, and ratios within a repeat.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from lit_diffusion import AncestralSampler, DDIMSampler
from lit_diffusion.denoisers import ClippedDenoiser
from lit_diffusion.nn import UNet
from lit_diffusion.samplers import Sampler
from lit_diffusion.training import ClassifierFeatures, DataModule, LitDiffusion
from lit_diffusion.training.evaluation.generation import Generation
from lit_diffusion.training.evaluation.reference import open_reference
from lit_diffusion.training.evaluation.scores import Scores


@torch.inference_mode()
def bare(model: LitDiffusion, sampler: Sampler, n: int, batch_size: int) -> None:
    """The sampler and nothing else."""
    generator = torch.Generator(model.device).manual_seed(0)
    for index in torch.arange(n).split(batch_size):
        z = torch.randn(len(index), *model.shape, generator=generator, device=model.device)
        label = torch.zeros(len(index), dtype=torch.int64, device=model.device)
        chosen = model.sampler_in_range(sampler)
        chosen(ClippedDenoiser(model.denoiser), z, generator, label=label)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--num_samples", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    torch.manual_seed(0)
    network = UNet(
        shape=(1, 8, 8), channels=[32, 64], blocks=1, attention=[4], num_classes=10,
        fourier=[3, 4],
    )  # fmt: skip
    model = LitDiffusion(network, shape=(1, 8, 8)).to(given.device).eval()
    features = ClassifierFeatures().to(given.device)
    reference = open_reference(DataModule(), "test", features, model.device)

    print("| sampler | bare, images/s | `Generation` | ratio | with FID | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    for sampler in (DDIMSampler(steps=20), AncestralSampler(steps=20)):
        generation = Generation(given.num_samples, sampler, batch_size=given.batch_size)

        def generate(generation: Generation = generation) -> None:
            for _ in generation.sample(model):
                pass

        def evaluate(generation: Generation = generation) -> None:
            scores = Scores(features, reference)
            for batch in generation.sample(model):
                scores.add(batch)
            scores.compute()

        def alone(sampler: Sampler = sampler) -> None:
            bare(model, sampler, given.num_samples, given.batch_size)

        ways: list[Callable[[], None]] = [alone, generate, evaluate]
        for way in ways:
            way()
        seconds = []
        for _ in range(given.repeats):
            row = []
            for way in ways:
                start = time.perf_counter()
                way()
                if model.device.type == "cuda":
                    torch.cuda.synchronize()
                row.append(time.perf_counter() - start)
            seconds.append(row)
        rate = [
            given.num_samples / statistics.median(column) for column in zip(*seconds, strict=True)
        ]
        ratios = [statistics.median(row[0] / row[k] for row in seconds) for k in (1, 2)]
        print(
            f"| {type(sampler).__name__} {sampler.steps} | {rate[0]:.0f} | {rate[1]:.0f} | "
            f"{ratios[0]:.2f} | {rate[2]:.0f} | {ratios[1]:.2f} |"
        )


if __name__ == "__main__":
    main()

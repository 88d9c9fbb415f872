"""Compare samples of a model with real images.

    data, split, feature network → Reference ┐
    model, Generation → samples → features   ┴→ scores, and the protocol that they depend on

The callback `FID` and the command `evaluate` both measure through a `Comparison`, so the numbers
of the two can be compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor, nn
from tqdm import tqdm

from lit_diffusion.training.data.module import DataModule
from lit_diffusion.training.evaluation.generation import Generation
from lit_diffusion.training.evaluation.reference import Reference, class_shares, open_reference
from lit_diffusion.training.evaluation.row_conditions import RowConditions
from lit_diffusion.training.evaluation.scores import Score, ScoreFunction, Scores, frechet_distance
from lit_diffusion.training.module import LitDiffusion
from lit_diffusion.training.run.measurements import Measurement, versions

__all__ = ["Comparison", "SamplerScores", "refuse_other_kinds"]


def refuse_other_kinds(data: Any) -> None:
    """Refuse to compare what is not an image.

    Args:
        data: The data.

    Raises:
        ValueError: If they are of another kind.
    """
    kind = getattr(data, "kind", "image")
    if kind != "image":
        remedy = "measure the bound instead, by Likelihood and `lit-diffusion validate`"
        if kind == "latents":
            remedy = "decode latents into images first"
        raise ValueError(
            f"expected images to compare with samples by FID and the scores beside it, got "
            f"data.kind {kind}: {remedy}, and leave FID out of their training."
        )


@dataclass(frozen=True)
class Comparison:
    """What samples are compared with, under which feature network, and by which scores.

    Args:
        network: The feature network, in eval mode and on the device of the model.
        reference: Statistics of the split that samples are compared with.
        shares: Relative frequency of each class in the samples; None for equal frequencies.
        others: Scores besides the Fréchet distance.
        baseline: Fréchet distance of the baseline split from the reference; None if there is none.
        data: The data, whose training split has the conditions of the samples, if there are any.
    """

    network: nn.Module
    reference: Reference
    shares: Tensor | None
    others: tuple[ScoreFunction, ...]
    baseline: float | None
    data: DataModule

    @classmethod
    def open(
        cls,
        model: LitDiffusion,
        data: DataModule,
        network: nn.Module,
        split: str,
        others: tuple[ScoreFunction, ...] = (),
        baseline_split: str | None = None,
        reference_hash: str | None = None,
    ) -> Comparison:
        """Read or compute everything that does not depend on samples; a collective.

        Args:
            model: The model whose samples will be compared.
            data: The data.
            network: The feature network; it is moved to the device of the model.
            split: The split that samples are compared with.
            others: Scores besides the Fréchet distance.
            baseline_split: A split of real images whose own distance is the baseline; None for
                none.
            reference_hash: A prefix of the expected hash of the reference; None accepts any.

        Raises:
            ValueError: If the hash differs, or a split does not exist.
        """
        refuse_other_kinds(data)
        device = next(model.parameters()).device
        network = network.to(device).eval()
        reference = open_reference(data, split, network, device, bool(others), reference_hash)
        shares = baseline = None
        if model.num_classes is not None:
            shares = class_shares(data, reference, network, device)
        if baseline_split is not None:
            other = open_reference(data, baseline_split, network, device)
            baseline = frechet_distance(other, reference)
        return cls(network, reference, shares, others, baseline, data)

    def scores(
        self,
        model: LitDiffusion,
        generation: Generation,
        rank: int = 0,
        world: int = 1,
        bar: tqdm[Any] | None = None,
    ) -> dict[str, Score]:
        """Generate samples and score them; a collective.

        Args:
            model: The model.
            generation: How many samples, and how they are generated.
            rank: This process, from 0.
            world: Number of processes.
            bar: A progress bar that counts samples.
        """
        found = Scores(self.network, self.reference, self.others)
        rows = None
        if model.conditions:
            rows = RowConditions(model, self.data, self.data.train_split, generation.batch_size)
        for batch in generation.sample(model, self.shares, rank, world, rows):
            found.add(batch)
            if bar is not None:
                bar.update(len(batch.index))
        return found.compute()

    def protocol(
        self, model: LitDiffusion, generation: Generation, weights: str
    ) -> dict[str, Any]:
        """Everything that the scores depend on besides the values of the weights, as plain data.

        Args:
            model: The model.
            generation: How its samples are generated.
            weights: The name of its weights.
        """
        return {
            "reference": self.reference.protocol,
            **generation.protocol(model),
            "weights": weights,
            "versions": versions(),
        }

    def repeat(
        self, model: LitDiffusion, generation: Generation, seeds: list[int], weights: str
    ) -> SamplerScores:
        """The scores of one way of sampling, for each of several seeds, with a progress bar.

        Args:
            model: The model.
            generation: How its samples are generated, except for the seed.
            seeds: The seed of each set of samples.
            weights: The name of the weights.
        """
        sampler = model.sampler_in_range(generation.sampler)
        found = []
        for seed in seeds:
            what = f"{type(sampler).__name__} {sampler.steps}, seed {seed}"
            total = generation.num_samples
            with tqdm(total=total, desc=what, leave=False, disable=None) as bar:
                found.append(self.scores(model, replace(generation, seed=seed), bar=bar))
        protocol = self.protocol(model, generation, weights)
        del protocol["seed"]  # one of several, which the scores have
        return SamplerScores(
            sampler=type(sampler).__name__,
            steps=sampler.steps,
            calls=protocol["network calls"],
            seeds=seeds,
            scores={name: [one[name] for one in found] for name in found[0]},
            protocol=protocol,
        )


class SamplerScores(NamedTuple):
    """The scores of one sampler at one number of steps.

    Args:
        sampler: The name of its class.
        steps: Its number of noise levels.
        calls: Network calls per image.
        seeds: The seed of each set of samples.
        scores: Each score by name, one for every seed.
        protocol: Everything they depend on.
    """

    sampler: str
    steps: int
    calls: int
    seeds: list[int]
    scores: dict[str, list[Score]]
    protocol: dict[str, Any]

    def mean(self, name: str) -> tuple[float, float | None]:
        """Mean and standard deviation over the seeds; for one seed, the score and its own error.

        Args:
            name: The name of the score.
        """
        found = self.scores[name]
        if len(found) == 1:
            return found[0].value, found[0].error
        values = [one.value for one in found]
        return statistics.fmean(values), statistics.stdev(values)

    def plain(self) -> dict[str, Any]:
        """The scores as plain data, an entry of `scores` in evaluation.json."""
        about = {"sampler": self.sampler, "steps": self.steps, "network calls": self.calls}
        found = {}
        for name, each in self.scores.items():
            mean, error = self.mean(name)
            found[name] = {
                "mean": mean,
                "error": error,
                "values": [one.value for one in each],
                "protocol": each[0].protocol,
            }
        return about | {"seeds": self.seeds, "scores": found, "protocol": self.protocol}

    def measurements(self, step: int) -> Iterator[Measurement]:
        """The scores as records of metrics.json, each the mean over the seeds.

        Args:
            step: Optimizer steps of the evaluated checkpoint.
        """
        for name, each in self.scores.items():
            mean, error = self.mean(name)
            protocol = self.protocol | each[0].protocol | {"seed": self.seeds[0]}
            if len(each) > 1:
                del protocol["seed"]
                protocol |= {"seeds": self.seeds, "error": "deviation over the seeds"}
            yield Measurement(name, mean, error, step, "evaluate", protocol)

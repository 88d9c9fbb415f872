"""Every registered plug-in obeys its contract, and a broken one is caught."""

import dataclasses

import pytest
import torch

from lit_diffusion import DECODERS, PREDICTIONS, SAMPLERS, SCHEDULES, WEIGHTINGS
from lit_diffusion.predictions import Prediction
from lit_diffusion.samplers import DDIMSampler, Sampler
from lit_diffusion.schedules import NoiseSchedule
from lit_diffusion.testing import (
    check_decoder,
    check_plugin,
    check_prediction,
    check_sampler,
    check_schedule,
    check_weighting,
)
from lit_diffusion.weightings import Weighting

CHECKS = [
    (SCHEDULES, check_schedule),
    (WEIGHTINGS, check_weighting),
    (PREDICTIONS, check_prediction),
    (SAMPLERS, check_sampler),
    (DECODERS, check_decoder),
]
OURS = [
    pytest.param(cls, check, id=cls.__name__)
    for registry, check in CHECKS
    for cls in registry.classes()
    if cls.__module__.startswith("lit_diffusion.")
]


@pytest.mark.parametrize(("cls", "check"), OURS)
def test_contract(cls, check):
    check_plugin(cls)
    check(cls())


def test_every_family_is_covered():
    assert len(OURS) >= 9 + 14 + 6 + 4 + 3


@pytest.mark.parametrize(
    "cls", [c for c in SCHEDULES.classes() if "lit_diffusion." in c.__module__]
)
def test_contract_of_truncated_schedules(cls):
    check_schedule(cls(logsnr_min=-6.0, logsnr_max=7.5))


# Deliberately broken plug-ins: local classes, which the registries do not list.


def broken_schedules():
    class ClipsInsteadOfTruncating(NoiseSchedule):
        def __init__(self, logsnr_min=-4.0, logsnr_max=4.0):
            super().__init__(logsnr_min, logsnr_max, support=(-4.0, 4.0))

        def _logsnr(self, t):
            return (10 - 20 * t).clamp(-4, 4)

    class Rises(NoiseSchedule):
        def __init__(self):
            super().__init__(0.0, 1.0, support=(0.0, 1.0))

        def _logsnr(self, t):
            return t

    class WrongInverse(NoiseSchedule):
        def __init__(self):
            super().__init__(0.0, 1.0, support=(0.0, 1.0))

        def _logsnr(self, t):
            return 1 - t**2

        def _time(self, logsnr):
            return 1 - logsnr

    class WrongDensity(NoiseSchedule):
        def __init__(self):
            super().__init__(-10.0, 10.0, support=(-10.0, 10.0))

        def _logsnr(self, t):
            return 10 - 20 * t

        def log_prob(self, logsnr):
            return super().log_prob(logsnr) + 0.1

    return [ClipsInsteadOfTruncating, Rises, WrongInverse, WrongDensity]


@pytest.mark.parametrize("cls", broken_schedules())
def test_broken_schedule_is_caught(cls):
    with pytest.raises(AssertionError, match=cls.__name__):
        check_schedule(cls())


def test_broken_weightings_are_caught():
    class Negative(Weighting):
        def forward(self, logsnr):
            return logsnr

    class Overflows(Weighting):
        def forward(self, logsnr):
            return torch.exp(10 * logsnr.abs())

    class MixesTheBatch(Weighting):
        def forward(self, logsnr):
            return torch.softmax(logsnr, 0) + torch.arange(len(logsnr), dtype=logsnr.dtype)

    for cls, law in [(Negative, "positive"), (Overflows, "finite"), (MixesTheBatch, "alone")]:
        with pytest.raises(AssertionError, match=law):
            check_weighting(cls())


def test_broken_predictions_are_caught():
    @dataclasses.dataclass(frozen=True)
    class Singular(Prediction):
        def coefficients(self, logsnr):
            return torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()

    @dataclasses.dataclass(frozen=True)
    class WrongScale(Prediction):
        def coefficients(self, logsnr):
            return torch.zeros_like(logsnr), torch.ones_like(logsnr)

        def eps_error_scale(self, logsnr):
            return torch.sigmoid(logsnr)

    with pytest.raises(AssertionError, match="det"):
        check_prediction(Singular())
    with pytest.raises(AssertionError, match="eps_error_scale"):
        check_prediction(WrongScale())


def test_broken_samplers_are_caught():
    @dataclasses.dataclass(frozen=True)
    class WrongCoefficient(Sampler):
        order = 1
        steps: int = 10
        schedule: NoiseSchedule | None = None

        def step(self, denoiser, z, step):
            z, memory = DDIMSampler().step(denoiser, z, step)
            return 1.01 * z, memory

    @dataclasses.dataclass(frozen=True)
    class PromisesTooMuch(Sampler):
        order = 2
        steps: int = 10
        schedule: NoiseSchedule | None = None

        def step(self, denoiser, z, step):
            return DDIMSampler().step(denoiser, z, step)

    @dataclasses.dataclass(frozen=True)
    class AsksMoreThanItSays(Sampler):
        order = 1
        steps: int = 10
        schedule: NoiseSchedule | None = None

        def step(self, denoiser, z, step):
            denoiser(z, step.logsnr)
            return DDIMSampler().step(denoiser, z, step)

    with pytest.raises(AssertionError, match="5 at 5 steps, got 9"):
        check_sampler(AsksMoreThanItSays())
    with pytest.raises(AssertionError, match=r"is correct|order"):
        check_sampler(WrongCoefficient())
    with pytest.raises(AssertionError, match="order 2"):
        check_sampler(PromisesTooMuch())


def test_a_check_on_the_wrong_thing_says_so():
    for check, wrong in [
        (check_schedule, SCHEDULES["CosineSchedule"]),
        (check_weighting, SCHEDULES["CosineSchedule"]()),
        (check_prediction, 3),
        (check_sampler, DDIMSampler),
    ]:
        with pytest.raises(AssertionError, match="expected an instance of"):
            check(wrong)


def test_undocumented_argument_is_caught():
    class Undocumented(Weighting):
        """A weighting."""

        def __init__(self, power: float = 1.0) -> None:
            super().__init__()
            self.power = power

        def forward(self, logsnr):
            return torch.ones_like(logsnr)

    with pytest.raises(AssertionError, match="Args"):
        check_plugin(Undocumented)

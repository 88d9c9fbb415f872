"""Every registered plug-in obeys its contract, and a broken one is caught."""

import dataclasses
import inspect
import math
import re

import pytest
import torch

from lit_diffusion import DECODERS, PREDICTIONS, SAMPLERS, SCHEDULES, WEIGHTINGS
from lit_diffusion.predictions import Prediction
from lit_diffusion.samplers import DDIMSampler, Sampler
from lit_diffusion.schedules import NoiseSchedule
from lit_diffusion.testing import (
    check_decoder,
    check_network,
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


# Outside the domain of an argument: what is not finite, and what its line under Args excludes.
INFINITE = {("HeunSampler", "s_max"): [math.inf]}  # allowed: no upper limit
OUTSIDE = {
    **{name: [0, -1] for name in ["std", "data_std", "scale", "rho", "sigma_min", "k", "s_noise"]},
    **{name: [0, -1, 2.5] for name in ["num_timesteps", "steps", "bins"]},
    **{name: [-0.1, 1, 2] for name in ["decay", "uniform_share"]},
    **{name: [-0.1, 1.1] for name in ["variance", "eta"]},
    **{name: [-0.1, 0, 1] for name in ["beta_min", "beta_max", "t_min"]},
    ("P2Weighting", "gamma"): [-0.1],
    "gamma": [0, -1],
    "num_levels": [1, -1, 2.5],
    "warmup": [-1, 0.5],
    "mode_scale": [-1, 1.76],
    "sigma_max": [0.001, 0],
    "s_churn": [-1],
    "s_max": [-1],
    "levels": [1, -1, 2.5],
    ("TableSchedule", "levels"): [],
    **{name: [] for name in ["mean", "shift", "bias", "s_min", "logsnr_min", "logsnr_max"]},
}


@pytest.mark.parametrize("cls", [pytest.param(p.values[0], id=p.id) for p in OURS])
def test_numbers_outside_their_domain_are_refused(cls):
    for name, parameter in inspect.signature(cls).parameters.items():
        if not re.search(r"\b(float|int|Levels)\b", str(parameter.annotation)):
            continue
        allowed = INFINITE.get((cls.__name__, name), [])
        given = [n for n in (math.nan, math.inf, -math.inf) if n not in allowed]
        given += OUTSIDE.get((cls.__name__, name), OUTSIDE[name])
        for value in given:
            of_each = (value, 0.0) if "tuple" in str(parameter.annotation) else value
            with pytest.raises(ValueError, match=cls.__name__):
                pytest.fail(f"{cls(**{name: of_each})!r} takes {name}={value}")


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


class Net(torch.nn.Module):
    """A network in which one line can be replaced."""

    shape, num_classes, conditions = (1, 2, 2), 3, {"angle": 2}

    def __init__(self, features=8):
        super().__init__()
        self.features = features
        self.first, self.last = torch.nn.Linear(4 + 1 + 2, features), torch.nn.Linear(features, 4)
        self.table = torch.nn.Embedding(4, features)

    def forward(self, z, logsnr, label=None, angle=None, dropped=None):
        label = torch.full((len(z),), -1) if label is None else label
        h = self.first(torch.cat([z.flatten(1), logsnr[:, None] / 10, angle], 1))
        return self.last(torch.tanh(h + self.table(label + 1))).view_as(z)


class TakesNoOther(Net):
    def check_shape(self, shape):
        """It says that it takes any."""


class RefusesItsOwn(Net):
    def check_shape(self, shape):
        raise ValueError("none")


def broken_networks():
    class MixesTheBatch(Net):
        def forward(self, z, *args, **kwargs):
            return super().forward(z + z.mean(0), *args, **kwargs)

    class IsRandom(Net):
        def forward(self, z, *args, **kwargs):
            return super().forward(z + torch.rand(()), *args, **kwargs)

    class IgnoresTheLevel(Net):
        def forward(self, z, logsnr, *args, **kwargs):
            return super().forward(z, 0 * logsnr, *args, **kwargs)

    class IgnoresTheLabel(Net):
        def forward(self, z, logsnr, label=None, **kwargs):
            return super().forward(z, logsnr, torch.zeros(len(z), dtype=torch.long), **kwargs)

    class IgnoresACondition(Net):
        def forward(self, z, logsnr, label=None, angle=None, dropped=None):
            return super().forward(z, logsnr, label, torch.zeros_like(angle))

    class NoLabelIsTheFirst(Net):
        def forward(self, z, logsnr, label=None, **kwargs):
            label = torch.zeros(len(z), dtype=torch.long) if label is None else label
            return super().forward(z, logsnr, label, **kwargs)

    class KnowsNoDropped(Net):
        def forward(self, z, logsnr, label=None, angle=None):
            return super().forward(z, logsnr, label, angle)

    class HasAnIdleParameter(Net):
        def __init__(self, features=8):
            super().__init__(features)
            self.idle = torch.nn.Parameter(torch.zeros(3))

    class KeepsAnotherNumber(Net):
        def __init__(self, features=8):
            super().__init__(features)
            self.features, self.scale = 8, features

        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs) * self.scale

    class Overflows(Net):
        def forward(self, z, logsnr, *args, **kwargs):
            return super().forward(z, torch.exp(6 * logsnr), *args, **kwargs) * torch.exp(
                6 * logsnr
            ).view(-1, 1, 1, 1)

    class StaysInFloat32(Net):
        def forward(self, z, *args, **kwargs):
            return super().forward(z, *args, **kwargs).float()

    class Flattens(Net):
        def forward(self, z, *args, **kwargs):
            return super().forward(z, *args, **kwargs).flatten(1)

    return [
        (MixesTheBatch(), "depend on the batch"),
        (IsRandom(), "deterministic"),
        (IgnoresTheLevel(), "depends on logsnr"),
        (IgnoresTheLabel(), "depends on label"),
        (IgnoresACondition(), "depends on angle"),
        (NoLabelIsTheFirst(), "no label is the label −1"),
        (KnowsNoDropped(), "takes `dropped`"),
        (HasAnIdleParameter(), "gradient reaches idle"),
        (KeepsAnotherNumber(features=9), "made from its arguments|size mismatch"),
        (Overflows(), "finite"),
        (StaysInFloat32(), "stays float64"),
        (Flattens(), "shape of z"),
        (TakesNoOther(), r"takes \(1, 1, 1\), which check_shape accepts"),
        (RefusesItsOwn(), r"own shape, \(1, 2, 2\)"),
    ]


@pytest.mark.parametrize(("network", "broken"), broken_networks())
def test_broken_networks_are_caught(network, broken):
    check_network(Net())
    before = network.state_dict()["first.weight"].clone()
    with pytest.raises(AssertionError, match=broken):
        check_network(network)
    assert torch.equal(network.first.weight, before)


def test_a_check_on_the_wrong_thing_says_so():
    for check, wrong in [
        (check_schedule, SCHEDULES["CosineSchedule"]),
        (check_weighting, SCHEDULES["CosineSchedule"]()),
        (check_prediction, 3),
        (check_sampler, DDIMSampler),
        (check_network, Net),
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

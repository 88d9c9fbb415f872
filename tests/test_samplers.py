"""Samplers against the published formulas, written out here in the papers' own coordinates."""

import dataclasses
import importlib
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lit_diffusion.samplers
import lit_diffusion.samplers.base
from lit_diffusion import SAMPLERS
from lit_diffusion.denoisers import ClippedDenoiser, Denoiser, GaussianDenoiser, GuidedDenoiser
from lit_diffusion.gaussian import alpha_sigma, broadcast_to_data, noise_like, posterior
from lit_diffusion.nn import DiT, UNet
from lit_diffusion.predictions import Denoised
from lit_diffusion.samplers import (
    AncestralSampler,
    DDIMSampler,
    DPMSolverSampler,
    HeunSampler,
    Sampler,
    SamplerStep,
)
from lit_diffusion.schedules import BetaSchedule, KarrasSchedule, LinearSchedule
from lit_diffusion.testing import check_sampler

F64 = torch.float64
GAUSS = GaussianDenoiser(std=0.5)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def mixture_mean(y, s):
    """E[x | x + s ε = y] for x around −1 or 1, with standard deviation 0.3: not linear in y."""
    variance = 0.3**2 + s**2
    side = torch.tanh(y / variance)
    return side + 0.3**2 / variance * (y - side)


def mixture(z, logsnr):
    """The same in the house's frame."""
    alpha, sigma = (broadcast_to_data(c, z) for c in alpha_sigma(logsnr))
    x = mixture_mean(z / alpha, sigma / alpha)
    return Denoised(x, (z - alpha * x) / sigma)


class Spy:
    """A denoiser that writes down the levels it is asked at."""

    def __init__(self, denoiser=GAUSS):
        self.denoiser = denoiser
        self.levels = []

    def __call__(self, z, logsnr, **cond):
        self.levels.append(logsnr)
        return self.denoiser(z, logsnr)


# What a sampler is ----------------------------------------------------------------------------


def test_the_base_lives_in_its_own_room():
    assert lit_diffusion.samplers.Sampler is lit_diffusion.samplers.base.Sampler
    assert lit_diffusion.samplers.base.__all__ == [
        "DenoiserCall",
        "Sampler",
        "SamplerStep",
    ]
    assert set(lit_diffusion.SAMPLERS) >= {"DPMSolverSampler", "HeunSampler"}
    assert importlib.import_module("lit_diffusion").Sampler is Sampler


@pytest.mark.parametrize("cls", [AncestralSampler, DDIMSampler, HeunSampler, DPMSolverSampler])
def test_number_of_calls(cls):
    for steps in (1, 2, 18):
        spy = Spy()
        cls(steps=steps, schedule=KarrasSchedule())(spy, torch.randn(3, 2))
        assert len(spy.levels) == (2 * steps - 1 if cls is HeunSampler else steps)
    with pytest.raises(ValueError, match="at least 1 step"):
        cls(steps=0)(GAUSS, torch.randn(3, 2))


# What costs nothing ---------------------------------------------------------------------------

EVERY = [cls() for cls in SAMPLERS.classes()] + [
    AncestralSampler(variance=0.5),
    DDIMSampler(eta=0.5),
    HeunSampler(s_churn=10.0, s_max=5.0),
]


class Network(torch.nn.Module):
    """One convolution that knows its label, on a device without an autocast, too."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(1, 1, 3, padding=1)
        self.embed = torch.nn.Embedding(4, 1)

    def forward(self, z, logsnr, label):
        return self.layer(z) + broadcast_to_data(self.embed(label + 1)[:, 0] * logsnr, z)


class Crossings(TorchDispatchMode):
    """Counts the operations on tensors of two devices, and those among them within a walk.

    On a GPU the host waits at each copy between the two. Looked at, a tensor without values raises
    by itself.
    """

    def __init__(self):
        super().__init__()
        self.all, self.within, self.walking = 0, [], False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, out))
        if len({leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor)}) > 1:
            self.all += 1
            self.within += [func] * self.walking
        return out


@pytest.mark.parametrize("sampler", EVERY, ids=repr)
def test_it_asks_as_often_as_it_says_and_the_host_never_waits(sampler):
    walk = dataclasses.replace(sampler, steps=6)
    guided = GuidedDenoiser(Denoiser(Network().to("meta")), 2.0, interval=(-3.0, 3.0))
    denoiser, calls = ClippedDenoiser(guided), []

    def ask(z, logsnr, **cond):
        calls.append(1)
        crossings.walking = True
        answer = denoiser(z, logsnr, **cond)
        crossings.walking = len(calls) < walk.calls
        return answer

    z, label = torch.empty(2, 1, 4, 4, device="meta"), torch.zeros(2, dtype=int, device="meta")
    with Crossings() as crossings:
        assert walk(ask, z, label=label).shape == z.shape
    assert len(calls) == walk.calls
    assert crossings.within == []
    assert crossings.all == 1  # all levels at once, before the first call


@pytest.mark.parametrize(
    "network",
    [
        UNet((3, 4, 4), channels=[8], attention=[4], num_classes=3, channels_last=True),
        DiT((3, 4, 4), depth=1, width=8, heads=1, num_classes=3),
    ],
    ids=["UNet", "DiT"],
)
def test_a_compiled_network_is_compiled_once(network):
    """At every step of every sampler it sees the same shapes, strides and types."""
    graphs = CompileCounter()
    network.compile(backend=graphs, fullgraph=True)
    for sampler in EVERY:
        walk = dataclasses.replace(sampler, steps=3)
        label = torch.tensor([0, 2])
        with torch.inference_mode():
            walk(ClippedDenoiser(Denoiser(network)), torch.randn(2, 3, 4, 4), label=label)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("sampler", [HeunSampler(), DPMSolverSampler(), DDIMSampler()])
def test_the_deterministic_ones_draw_no_noise(sampler):
    generator, z = seeded(), torch.randn(3, 2)
    before, before_global = generator.get_state(), torch.get_rng_state()
    first = sampler(GAUSS, z, generator)
    sampler(GAUSS, z)
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(torch.get_rng_state(), before_global)
    assert torch.equal(sampler(GAUSS, z, seeded(1)), first)


@pytest.mark.parametrize(
    "sampler",
    [AncestralSampler(variance=0.5), HeunSampler(s_churn=9.0, s_max=5.0), DPMSolverSampler()],
)
def test_every_example_has_its_own_level(sampler):
    """A step of a batch at three levels is three steps; and nothing waits for the device."""
    z, x = torch.randn(2, 3, 2, 4, 5, dtype=F64, generator=seeded()).unbind()
    now = torch.tensor([-4.0, 0.0, 5.0], dtype=F64)
    then, before = now + torch.tensor([1.0, 0.2, 3.0]), now - torch.tensor([0.5, 2.0, 1.0])
    memory = {DPMSolverSampler: (x, before), HeunSampler: before}.get(type(sampler))
    generators = [seeded(i) for i in range(3)]
    whole, _ = sampler.step(mixture, z, SamplerStep(now, then, memory, generators))
    for i in range(3):
        row = slice(i, i + 1)
        own = memory
        if memory is not None:
            own = (x[row], before[row]) if isinstance(memory, tuple) else before[row]
        step = SamplerStep(now[row], then[row], own, [seeded(i)])
        alone, _ = sampler.step(mixture, z[row], step)
        assert torch.allclose(whole[row], alone, atol=1e-12)
    # Tensors without contents: whoever looks at a value raises.
    z, x, now, then, before = (value.to("meta") for value in (z, x, now, then, before))
    memory = {DPMSolverSampler: (x, before), HeunSampler: before}.get(type(sampler))
    step = SamplerStep(now, then, memory)
    assert sampler.step(mixture, z, step)[0].shape == z.shape
    assert sampler.finish(mixture, z, step).shape == z.shape


@pytest.mark.parametrize(
    ("sampler", "order"), [(DDIMSampler(), 1), (HeunSampler(), 2), (DPMSolverSampler(), 2)]
)
def test_order_along_single_paths(sampler, order):
    """Also where the denoiser is not linear: each sample approaches its own limit."""
    z = torch.linspace(-2, 2, 9, dtype=F64)[:, None]
    schedule = LinearSchedule(-8.0, 8.0)

    def at(steps, of=sampler):
        return dataclasses.replace(of, steps=steps, schedule=schedule)(mixture, z)

    limit = at(3000, HeunSampler())
    errors = [float((at(steps) - limit).abs().max()) for steps in (65, 129, 257)]
    assert sampler.order == order
    assert math.log2(errors[0] / errors[2]) / 2 == pytest.approx(order, abs=0.25)


# Ancestral ------------------------------------------------------------------------------------


def ancestral_std(variance, now, then):
    """Standard deviation of one step at each of B levels."""

    def silent(z, logsnr):
        return Denoised(torch.zeros_like(z), torch.zeros_like(z))

    z = torch.zeros(len(now), 1, dtype=now.dtype)
    step = SamplerStep(now, then, generator=seeded())
    z_next, _ = AncestralSampler(variance=variance).step(silent, z, step)
    return (z_next / noise_like(z, seeded()))[:, 0]


def test_variances_of_ddpms_table():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=F64)
    abar = torch.cumprod(1 - betas, 0)
    beta, tilde = betas[1:], (1 - abar[:-1]) / (1 - abar[1:]) * betas[1:]
    levels = BetaSchedule().grid(999).flip(0)
    now, then = levels[1:], levels[:-1]
    for variance in (0.0, 0.3, 1.0):
        expected = torch.exp((1 - variance) * tilde.log() + variance * beta.log())
        ours = ancestral_std(variance, now, then) ** 2
        assert torch.allclose(ours, expected, rtol=1e-9, atol=0)
    assert torch.allclose(ancestral_std(1.0, now, then) ** 2, beta, rtol=0, atol=1e-9)


def test_ancestral_without_variance_is_the_posterior():
    z = torch.randn(5, 2, 3, dtype=F64)
    now = torch.linspace(-15, 10, 5, dtype=F64)
    then = now + torch.linspace(0.01, 8, 5, dtype=F64)
    mean, std = posterior(z, mixture(z, now).x, now, then)
    ours, _ = AncestralSampler().step(mixture, z, SamplerStep(now, then, generator=seeded()))
    assert torch.allclose(ours, mean + std * noise_like(z, seeded()), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("variance", [0.0, 0.5, 1.0])
def test_ancestral_variance_at_the_ends(variance):
    """The quotient σ_t/σ_s of the formula is infinite in float32 at the last of these."""
    now = torch.tensor([-60.0, -50.0, 50.0, 90.0])
    then = torch.tensor([-50.0, 50.0, 200.0, 250.0])
    std = ancestral_std(variance, now, then)
    assert bool(std.isfinite().all())
    if variance == 1:
        sigma, c = torch.sigmoid(-now.double()).sqrt(), -torch.expm1((now - then).double())
        assert torch.allclose(std.double(), sigma * c.sqrt(), rtol=1e-5, atol=0)


def test_larger_variance_is_right_for_normal_data():
    """With x ~ N(0, 1) every level is N(0, 1), and β is the exact variance."""
    schedule = LinearSchedule(-8.0, 8.0)
    z = torch.randn(100_000, 1, dtype=F64, generator=seeded(1))
    spread = [
        float(AncestralSampler(9, schedule, variance)(GaussianDenoiser(1.0), z, seeded(2)).std())
        for variance in (0.0, 1.0)
    ]
    assert spread[0] < 0.7
    assert spread[1] == pytest.approx(1.0, abs=0.01)


# Heun -----------------------------------------------------------------------------------------


def edm(y, levels, draws=None, churn=0.0, low=0.0, high=math.inf, noise=1.0, highest=math.inf):
    """EDM's two algorithms from their formulas: y = z/α, levels s = σ/α falling, then 0.

    `highest` is our own limit on a raised level; without it this is the published method.
    """
    n = len(levels)
    for i, s in enumerate(levels):
        target = levels[i + 1] if i + 1 < n else 0.0
        gamma = min(churn / n, math.sqrt(2) - 1) if low <= s <= high else 0.0
        raised = min(s * (1 + gamma), highest)
        if draws is not None:
            y = y + math.sqrt(raised**2 - s**2) * noise * draws[i]
        slope = (y - mixture_mean(y, raised)) / raised
        ahead = y + (target - raised) * slope
        if target > 0:
            slope_ahead = (ahead - mixture_mean(ahead, target)) / target
            ahead = y + (target - raised) * (slope + slope_ahead) / 2
        y = ahead
    return y


def karras_levels(n):
    i = torch.arange(n, dtype=F64)
    ends = 80.0 ** (1 / 7), 0.002 ** (1 / 7)
    return ((ends[0] + i / (n - 1) * (ends[1] - ends[0])) ** 7).tolist()


def in_edms_coordinates(z, levels):
    return z * math.sqrt(1 + levels[0] ** 2)


@pytest.mark.parametrize("steps", [2, 18, 40])
def test_heun_is_edms_deterministic_sampler(steps):
    z = torch.randn(6, 2, 3, dtype=F64, generator=seeded())
    levels = karras_levels(steps)
    expected = edm(in_edms_coordinates(z, levels), levels)
    ours = HeunSampler(steps, KarrasSchedule())(mixture, z)
    assert torch.allclose(ours, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("churn", "low", "high", "noise"),
    [
        (40.0, 0.05, 50.0, 1.003),  # EDM's for ImageNet; 50 · √2 is still below the first level
        (5.0, 0.0, 50.0, 1.0),  # down to the last level, which is churned, too
        (30.0, 0.01, 1.0, 1.007),
    ],
)
def test_heun_is_edms_stochastic_sampler(churn, low, high, noise):
    z = torch.randn(6, 2, 3, dtype=F64, generator=seeded())
    levels = karras_levels(18)
    generator = seeded(1)
    draws = [noise_like(z, generator) for _ in levels]
    expected = edm(in_edms_coordinates(z, levels), levels, draws, churn, low, high, noise)
    sampler = HeunSampler(18, KarrasSchedule(), churn, low, high, noise)
    ours = sampler(mixture, z, seeded(1))
    assert torch.allclose(ours, expected, rtol=1e-9, atol=1e-11)
    assert not torch.allclose(ours, HeunSampler(18, KarrasSchedule())(mixture, z), atol=1e-3)


def test_heun_never_asks_beyond_the_first_level():
    z = torch.randn(6, 2, 3, dtype=F64, generator=seeded())
    levels = karras_levels(18)
    generator = seeded(1)
    draws = [noise_like(z, generator) for _ in levels]
    expected = edm(in_edms_coordinates(z, levels), levels, draws, churn=60.0, highest=levels[0])
    spy = Spy(mixture)
    ours = HeunSampler(18, KarrasSchedule(), s_churn=60.0)(spy, z, seeded(1))
    assert torch.allclose(ours, expected, rtol=1e-9, atol=1e-11)
    lowest = min(float(level.min()) for level in spy.levels)
    assert lowest == float(KarrasSchedule().logsnr_min)
    # The last call is a churned one: EDM's last step starts above the last level.
    assert float(spy.levels[-1][0]) == pytest.approx(12.429 - math.log(2), abs=1e-3)


def test_heun_at_extreme_levels():
    sampler = HeunSampler(40, LinearSchedule(-40.0, 40.0), s_churn=10.0)
    assert bool(sampler(GAUSS, torch.randn(4, 2, 3), seeded()).isfinite().all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"s_churn": -1.0}, "s_churn must be 0"),
        ({"s_churn": math.nan}, "s_churn must be a finite"),
        ({"s_min": 2.0, "s_max": 1.0}, r"s_min=2.0 and s_max=1.0"),
        ({"s_noise": 0.0}, "set s_churn=0"),
    ],
)
def test_heun_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        HeunSampler(**arguments)


@pytest.mark.parametrize("variance", [-0.1, 1.1, math.nan])
def test_ancestral_errors(variance):
    with pytest.raises(ValueError, match=r"variance must be in \[0, 1\]"):
        AncestralSampler(variance=variance)


# DPM-Solver++ ---------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [KarrasSchedule(), LinearSchedule(-9.0, 9.0)])
def test_dpm_solver_is_the_published_one(schedule):
    """In the paper's words: λ is log α/σ, half of ours, and data prediction is x̂."""
    z = torch.randn(6, 2, 3, dtype=F64, generator=seeded())
    half = schedule.grid(19) / 2
    scale = 1 / torch.sqrt(1 + torch.exp(-2 * half))
    sigma = scale * torch.exp(-half)

    def answer(state, i):
        return mixture_mean(state / scale[i], sigma[i] / scale[i])

    state, last = z, None
    for i in range(19):
        now, h = answer(state, i), half[i + 1] - half[i]
        direction = now
        if last is not None:
            r = (half[i] - half[i - 1]) / h
            direction = (1 + 1 / (2 * r)) * now - last / (2 * r)
        state = sigma[i + 1] / sigma[i] * state - scale[i + 1] * torch.expm1(-h) * direction
        last = now
    ours = DPMSolverSampler(20, schedule)(mixture, z)
    assert torch.allclose(ours, answer(state, 19), rtol=1e-9, atol=1e-11)


def test_the_first_step_of_dpm_solver_is_ddims():
    z = torch.randn(4, 3, dtype=F64)
    two = [
        cls(2, LinearSchedule(-2.0, 2.0))(mixture, z) for cls in (DPMSolverSampler, DDIMSampler)
    ]
    assert torch.equal(*two)


# The laws, at other arguments -----------------------------------------------------------------


@pytest.mark.parametrize(
    "sampler",
    [
        AncestralSampler(variance=1.0),
        AncestralSampler(variance=0.5),
        HeunSampler(s_churn=10.0),
        HeunSampler(s_churn=10.0, s_min=0.05, s_max=5.0),
    ],
)
def test_laws_hold_for_stochastic_ones(sampler):
    check_sampler(sampler)


@pytest.mark.parametrize("schedule", [KarrasSchedule(), LinearSchedule(-8.0, 8.0)])
def test_strong_churn(schedule):
    """Mean and spread come out right; no order is measured, for there is none to see.

    `check_sampler` compares 17, 33 and 65 steps. At s_churn = 40 all three are at the limit
    γ = √2 − 1, so the stride back up does not shrink with the steps, and s_noise other than 1
    leaves an error that no number of steps removes.
    """
    sampler = HeunSampler(400, schedule, s_churn=40.0, s_min=0.05, s_max=50.0, s_noise=1.003)
    z = torch.randn(20_000, 1, dtype=F64, generator=seeded(3))
    x = sampler(GaussianDenoiser(std=0.5, mean=0.3), z, seeded(4))
    assert float(x.mean()) == pytest.approx(0.3, abs=0.015)
    assert float(x.std()) == pytest.approx(0.5, abs=0.02)

"""The laws every plug-in obeys, for ours and for yours.

    from lit_diffusion.testing import check_schedule
    def test_mine():
        check_schedule(MySchedule())

Each function states its family's contract as code and raises `AssertionError` with a sentence
that names the law and the numbers. The house runs them over every registered plug-in.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from lit_diffusion.decoders import Decoder
from lit_diffusion.denoisers import GaussianDenoiser
from lit_diffusion.gaussian import alpha_sigma, broadcast_to_data, diffuse
from lit_diffusion.grey_levels import level_values
from lit_diffusion.predictions import Prediction
from lit_diffusion.registry import arguments
from lit_diffusion.samplers import Sampler
from lit_diffusion.schedules import LinearSchedule, NoiseSchedule
from lit_diffusion.weightings import Weighting

__all__ = [
    "check_decoder",
    "check_plugin",
    "check_prediction",
    "check_sampler",
    "check_schedule",
    "check_weighting",
]

_FAR = 20.0  # laws on weightings and predictions hold for |λ| up to this


def _law(holds: bool, who: object, law: str) -> None:
    if not holds:
        raise AssertionError(f"{who!r}: {law}")


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool(torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance))


def check_plugin(cls: type) -> None:
    """What holds for a plug-in of any family: it can be made, shown and described.

    It constructs without arguments; every argument is typed, has a default, an Args line and an
    attribute of its name; `repr` shows them; it lives in a public module.

    Args:
        cls: The class.

    Raises:
        AssertionError: Naming the law that is broken.

    Example:
        >>> check_plugin(CosineSchedule)
    """
    public = not any(part.startswith("_") for part in cls.__module__.split("."))
    _law(public, cls, "a plug-in lives in a public module.")
    documentation = inspect.getdoc(cls) or ""
    _law(bool(documentation), cls, "a plug-in has a docstring.")
    for name, parameter in inspect.signature(cls).parameters.items():
        typed = parameter.annotation is not parameter.empty
        _law(typed, cls, f"argument {name!r} has no type.")
        _law(parameter.default is not parameter.empty, cls, f"argument {name!r} has no default.")
        _law(f"\n    {name}: " in documentation, cls, f"argument {name!r} has no line under Args.")
    instance = cls()
    try:
        values = arguments(instance)
    except TypeError as error:
        raise AssertionError(str(error)) from error
    shown = repr(instance)
    if isinstance(instance, nn.Module) and type(instance).extra_repr is nn.Module.extra_repr:
        return  # a network: its repr is torch's
    _law(cls.__name__ in shown, cls, "repr shows the name of the class.")
    for name, value in values.items():
        if not isinstance(value, nn.Module):
            _law(f"{name}={value!r}" in shown, cls, f"repr shows the argument {name!r}.")
    _law(repr(cls(**values)) == shown, cls, "an equal object can be made from its arguments.")


def check_schedule(schedule: NoiseSchedule) -> None:
    """A noise schedule is a density, told consistently in all its ways.

    λ(0) and λ(1) are the ends exactly; λ falls strictly; time inverts it; the density is
    |dt/dλ| and integrates to 1; draws follow it; E_p[f/p] = ∫f; float32 times give the float64
    answer; it works in inference mode, and survives a state_dict and a copy.

    Args:
        schedule: The schedule, of any arguments.

    Raises:
        AssertionError: Naming the law that is broken, with numbers.

    Example:
        >>> check_schedule(CosineSchedule(logsnr_min=-10.0, logsnr_max=10.0))
    """
    _law(isinstance(schedule, NoiseSchedule), schedule, "expected an instance of NoiseSchedule.")
    low, high = schedule.ends
    ends = schedule.logsnr(torch.tensor([0.0, 1.0])).tolist()
    _law(ends == [high, low], schedule, f"λ(0), λ(1) are {[high, low]} exactly, got {ends}.")

    edge = torch.logspace(-12, -3, 50, dtype=torch.float64)
    inner = torch.linspace(0, 1, 1003, dtype=torch.float64)
    t = torch.cat([edge, inner, 1 - edge]).unique()
    logsnr = schedule.logsnr(t).detach()
    _law(logsnr.dtype == torch.float64, schedule, f"λ is float64, got {logsnr.dtype}.")
    falls = logsnr[1:-1].diff()
    _law(bool((falls < 0).all()), schedule, f"λ(t) falls, got a step of {float(falls.max()):.3g}.")
    error = float((schedule.time(logsnr) - t).abs().max())
    _law(error < 1e-9, schedule, f"time(logsnr(t)) = t, off by {error:.3g}.")
    beyond = schedule.time(torch.tensor([high + 1, low - 1])).tolist()
    _law(beyond == [0.0, 1.0], schedule, f"time beyond the range is 0 and 1, got {beyond}.")
    outside = schedule.log_prob(torch.tensor([high + 1, low - 1]))
    _law(bool((outside == -math.inf).all()), schedule, "log p is −∞ outside the range.")

    cells = 50_000
    width = (high - low) / cells
    borders = torch.linspace(low, high, cells + 1, dtype=torch.float64)
    mass = schedule.log_prob(borders[:-1] + width / 2).exp() * width
    below = torch.cat([mass.new_zeros(1), mass.cumsum(0)])
    error = float((below - (1 - schedule.time(borders))).abs().max())
    _law(
        error < 1e-4, schedule, f"the density is |dt/dλ| and integrates to 1, off by {error:.3g}."
    )

    at_logsnr, at_log_prob = schedule.at(t)
    _law(_close(at_logsnr, logsnr, 1e-12), schedule, "at(t) and logsnr(t) agree.")
    told = schedule.log_prob(logsnr)
    positive = (at_log_prob > -100) & (told > -100)  # a density may vanish at an end
    error = float((at_log_prob - told)[positive].abs().quantile(0.99).detach())
    _law(error < 1e-4, schedule, f"at(t) and log_prob(λ) agree, off by {error:.3g}.")
    learns = any(p.requires_grad for p in schedule.parameters())
    _law(
        at_log_prob.requires_grad == at_logsnr.requires_grad == learns,
        schedule,
        "at(t) carries gradients if and only if the schedule has parameters that learn.",
    )

    n = 20_000
    draws = schedule.sample(n, torch.Generator().manual_seed(0)).detach().sort().values
    steps = torch.arange(1, n + 1, dtype=torch.float64) / n
    distance = float((1 - schedule.time(draws) - steps).abs().max())
    _law(distance < 2 / n, schedule, f"draws follow the density (KS {distance:.2g}).")

    quartiles = schedule.logsnr(torch.tensor([0.25, 0.5, 0.75])).detach()
    middle, spread = quartiles[1], (quartiles[0] - quartiles[2]) / 2

    def bump(value: Tensor) -> Tensor:
        return torch.exp(-0.5 * ((value - middle) / spread) ** 2)

    logsnr, log_prob = schedule.at((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    estimate = float((bump(logsnr) / log_prob.exp()).mean().detach())
    integral = float(bump(borders[:-1] + width / 2).sum() * width)
    error = abs(estimate / integral - 1)
    _law(error < 2e-3, schedule, f"E[f/p] = ∫f, off by a factor of 1 + {error:.2g}.")

    t32 = torch.rand(100, generator=torch.Generator().manual_seed(0))
    same = torch.equal(schedule.logsnr(t32), schedule.logsnr(t32.double()))
    _law(same, schedule, "float32 times give the float64 answer.")
    with torch.inference_mode():
        same = _close(schedule.at(t32)[1], schedule.at(t32.double())[1], 1e-12)
    _law(same, schedule, "at(t) works in inference mode.")
    twin = copy.deepcopy(schedule)
    twin.load_state_dict(schedule.state_dict())
    same = torch.equal(twin.logsnr(t32), schedule.logsnr(t32))
    _law(same, schedule, "a copy with its state_dict is the same schedule.")


def check_weighting(weighting: Weighting) -> None:
    """A weighting is a positive finite function of λ, one example at a time.

    Args:
        weighting: The weighting, of any arguments.

    Raises:
        AssertionError: Naming the law that is broken, with numbers.

    Example:
        >>> check_weighting(SigmoidWeighting(bias=-1.0))
    """
    _law(isinstance(weighting, Weighting), weighting, "expected an instance of Weighting.")
    for dtype in (torch.float32, torch.float64):
        logsnr = torch.linspace(-_FAR, _FAR, 801, dtype=dtype)
        weight = weighting(logsnr)
        _law(weight.dtype == dtype, weighting, f"w has λ's dtype {dtype}, got {weight.dtype}.")
        _law(weight.shape == logsnr.shape, weighting, "w has one value for each λ.")
        _law(bool(weight.isfinite().all()), weighting, f"w is finite on [−{_FAR}, {_FAR}].")
        smallest = float(weight.min())
        _law(smallest > 0, weighting, f"w is positive, got {smallest:.3g}.")
        backwards = weighting(logsnr.flip(0)).flip(0)
        _law(_close(backwards, weight, 1e-6), weighting, "w(λ) depends on that λ alone.")


def check_prediction(prediction: Prediction) -> None:
    """A prediction is an invertible row: what it asks for can be turned back into x and ε.

    Args:
        prediction: The prediction, of any arguments.

    Raises:
        AssertionError: Naming the law that is broken, with numbers.

    Example:
        >>> check_prediction(EDMPrediction(data_std=0.3))
    """
    _law(isinstance(prediction, Prediction), prediction, "expected an instance of Prediction.")
    _law(_is_frozen(prediction), prediction, "a prediction is a frozen dataclass.")
    generator = torch.Generator().manual_seed(0)
    for level in (-_FAR, -9.0, -2.0, 0.0, 2.0, 9.0, _FAR):
        # Four different sizes: a coefficient that lands on the wrong axis cannot go unseen.
        logsnr = level + torch.linspace(-0.1, 0.1, 2, dtype=torch.float64)
        x, eps, out_error = torch.randn(
            3, 2, 3, 4, 5, generator=generator, dtype=torch.float64
        ).unbind()
        a, b = prediction.coefficients(logsnr)
        alpha, sigma = alpha_sigma(logsnr)
        det = (a * sigma - b * alpha).abs()
        _law(bool((det > 1e-6).all()), prediction, f"det ≠ 0 at λ = {level}, got {det.tolist()}.")

        z, target = diffuse(x, eps, logsnr), prediction.target(x, eps, logsnr)
        expected = broadcast_to_data(a, x) * x + broadcast_to_data(b, x) * eps
        _law(_close(target, expected, 1e-12), prediction, "target = a x + b ε.")
        decoded = prediction.decode(target, z, logsnr)
        same = _close(decoded.x, x, 1e-6) and _close(decoded.eps, eps, 1e-6)
        _law(same, prediction, f"decode(target) gives x and ε back at λ = {level}.")

        wrong = prediction.decode(target + out_error, z, logsnr)
        ratio = (wrong.eps - eps).square().sum((1, 2, 3)) / out_error.square().sum((1, 2, 3))
        scale = prediction.eps_error_scale(logsnr)
        _law(_close(ratio / scale, torch.ones(2), 1e-4), prediction, "eps_error_scale is true.")
        back = broadcast_to_data(alpha, z) * wrong.x + broadcast_to_data(sigma, z) * wrong.eps
        _law(_close(back, z, 1e-6), prediction, f"α x̂ + σ ε̂ = z at λ = {level}.")
        positive = bool((prediction.input_scale(logsnr) > 0).all())
        _law(positive, prediction, "input_scale is positive.")


def check_decoder(decoder: Decoder) -> None:
    """A decoder is a distribution of each number, given z: it adds up to one, and z decides.

    Over its levels, or as a density; at every λ; finite wherever z is; better the higher λ;
    differentiable in λ, which a learned schedule needs.

    Args:
        decoder: The decoder, of any arguments.

    Raises:
        AssertionError: Naming the law that is broken, with numbers.

    Example:
        >>> check_decoder(SoftmaxDecoder(levels=17))
    """
    _law(isinstance(decoder, Decoder), decoder, "expected an instance of Decoder.")
    _law(_is_frozen(decoder), decoder, "a decoder is a frozen dataclass.")
    levels = getattr(decoder, "levels", None)
    discrete = levels is not None
    denoiser = GaussianDenoiser(std=0.5)
    for level in (-5.0, 0.0, 5.0, 10.0):
        # A row for each z; along the row every value that x can take.
        z = torch.tensor([-1.5, -0.2, 0.0, 0.9], dtype=torch.float64)
        logsnr = torch.full((len(z),), level, dtype=torch.float64)
        reach = 12 * math.exp(-level / 2)
        values = torch.linspace(-6 - reach, 6 + reach, 100_001, dtype=torch.float64)
        if discrete:
            values = level_values(levels)
        x = values.expand(len(z), -1)
        log_prob = decoder.log_prob(x, z[:, None].expand_as(x), logsnr, denoiser)
        _law(bool(log_prob.isfinite().all()), decoder, f"log p is finite at λ = {level}.")
        total = log_prob.exp().sum(1) if discrete else torch.trapezoid(log_prob.exp(), values)
        worst = float((total - 1).abs().max())
        _law(worst < 1e-6, decoder, f"p(x|z) adds up to 1 at λ = {level}, off by {worst:.3g}.")

    # Four different sizes: a coefficient that lands on the wrong axis cannot go unseen.
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(2, 3, 4, 5, generator=generator)
    x = 0.5 * torch.randn(2, 3, 4, 5, generator=generator)
    if discrete:
        values = level_values(levels).float()
        x = values[torch.randint(len(values), (2, 3, 4, 5), generator=generator)]
    decoder.check(x)
    logsnr = torch.tensor([2.0, 12.0], dtype=torch.float64, requires_grad=True)
    cost = decoder.reconstruction(denoiser, x, logsnr, eps)
    _law(cost.shape == (2,), decoder, f"one cost for each example, got {tuple(cost.shape)}.")
    _law(bool(cost[1] < cost[0]), decoder, f"a higher λ costs less, got {cost.tolist()}.")
    (slope,) = torch.autograd.grad(cost.sum(), logsnr)
    _law(bool(slope.isfinite().all()), decoder, "the cost has finite gradients in λ.")
    alone = decoder.reconstruction(denoiser, x[:1], logsnr[:1], eps[:1])
    _law(_close(alone, cost[:1], 1e-5), decoder, "an example does not depend on the batch.")


def check_sampler(sampler: Sampler) -> None:
    """A sampler turns noise into the data's distribution, as fast as its order promises.

    On Gaussian data with the exact denoiser the answer is known: mean and standard deviation
    come out right, and their error falls as steps^(−order). Seeds reproduce, per batch and per
    example; float32 stays finite; the denoiser is asked `calls` times.

    Args:
        sampler: The sampler, of any arguments; its steps and schedule are replaced.

    Raises:
        AssertionError: Naming the law that is broken, with numbers.

    Example:
        >>> check_sampler(DDIMSampler())
    """
    _law(isinstance(sampler, Sampler), sampler, "expected an instance of Sampler.")
    _law(_is_frozen(sampler), sampler, "a sampler is a frozen dataclass.")
    schedule = LinearSchedule(-8.0, 8.0)
    denoiser = GaussianDenoiser(std=0.5, mean=0.3)
    ends = torch.tensor([schedule.logsnr_min, schedule.logsnr_max], dtype=torch.float64)
    alpha, sigma = alpha_sigma(ends)
    std = torch.sqrt((alpha * denoiser.std) ** 2 + sigma**2)
    # The last answer is x̂ at the last level, which is a little narrower than the data.
    expected = float(alpha[1] * denoiser.std**2 / std[1])

    def draw(steps: int, n: int) -> Tensor:
        generator = torch.Generator().manual_seed(steps)
        start = torch.randn(n, 1, generator=generator, dtype=torch.float64)
        start = (start - start.mean()) / start.std(correction=0)  # no sampling error of its own
        walk = dataclasses.replace(sampler, steps=steps, schedule=schedule)  # type: ignore[type-var]
        return walk(denoiser, float(alpha[0]) * denoiser.mean + std[0] * start, generator)

    n = 100_000
    errors = []
    for steps in (17, 33, 65):
        x = draw(steps, n)
        errors.append(abs(float(x.std(correction=0)) / expected - 1))
        off = abs(float(x.mean()) - denoiser.mean)
        _law(off < 0.02, sampler, f"the mean comes out right: off by {off:.3g} at {steps} steps.")
    noise = 3 / math.sqrt(2 * n)  # of a standard deviation measured on n draws
    if errors[-1] > noise:
        slope = math.log2((errors[0] + 1e-15) / errors[-1]) / 2
        _law(
            slope >= sampler.order - 0.2,
            sampler,
            f"the error of the standard deviation falls with order {sampler.order}: "
            f"{errors} at 17, 33, 65 steps is order {slope:.2f}.",
        )
    _law(errors[-1] < 0.2, sampler, f"the spread comes out right, off by {errors[-1]:.3g}.")

    short = dataclasses.replace(sampler, steps=5, schedule=schedule)  # type: ignore[type-var]
    z = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0))

    def seeded(first: int, last: int) -> Tensor:
        generators = [torch.Generator().manual_seed(i) for i in range(first, last)]
        return short(denoiser, z[first:last], generators)

    whole = seeded(0, 4)
    _law(bool(whole.isfinite().all()), sampler, "float32 stays finite.")
    _law(whole.dtype == torch.float32, sampler, f"float32 stays float32, got {whole.dtype}.")
    _law(torch.equal(seeded(0, 4), whole), sampler, "the same seeds give the same samples.")
    halves = torch.cat([seeded(0, 2), seeded(2, 4)])
    _law(_close(halves, whole, 1e-6), sampler, "a sample depends on its own seed only.")
    for steps in (1, 5):
        walk = dataclasses.replace(short, steps=steps)  # type: ignore[type-var]
        calls = _count_calls(walk, z)
        _law(
            calls == walk.calls,
            sampler,
            f"it asks as often as it says: calls={walk.calls} at {steps} steps, got {calls}.",
        )


def _is_frozen(instance: object) -> bool:
    parameters: Any = getattr(instance, "__dataclass_params__", None)
    return parameters is not None and parameters.frozen


def _count_calls(sampler: Sampler, z: Tensor) -> int:
    calls = 0
    exact = GaussianDenoiser()

    def counted(z: Tensor, logsnr: Tensor) -> Any:
        nonlocal calls
        calls += 1
        return exact(z, logsnr)

    sampler(counted, z)
    return calls

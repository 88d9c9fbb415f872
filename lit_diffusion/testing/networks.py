"""The laws of networks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lit_diffusion.denoisers import drop_condition
from lit_diffusion.nn import takes_shape
from lit_diffusion.registry import arguments
from lit_diffusion.testing.laws import FAR, close, law

__all__ = ["check_network"]

BATCH = 5
MATTERS = 1e-5  # change of the output, relative to its standard deviation
ROUNDING = 0.25  # error of bfloat16, relative to the standard deviation of the output


def check_network(
    network: nn.Module,
    shape: tuple[int, ...] | None = None,
    conditions: Mapping[str, int | tuple[int, ...]] | None = None,
) -> None:
    """Check that a network is a function of each example, its noise level and its conditions.

    The output has the shape and dtype of z and is finite for |λ| ≤ 20; in evaluation mode an
    example does not depend on the rest of the batch; z, λ, the label and each condition matter;
    no label is the label −1; it takes `dropped` if it has conditions; no augmentation is zeros, if
    it has an attribute `augment`; the gradient reaches every parameter; float64 gives the result
    of float32, and bfloat16 autocast about the same; a network made from its arguments, with its
    weights, is the same; it takes every shape that its method `check_shape` accepts, if it has
    one, its own among them.

    The network that is checked is a copy with random numbers added to all parameters, since a part
    that is zero at first would hide others.

    Args:
        network: The network, preferably a small one: it is called about thirty times.
        shape: (C, H, W), or (C, L) and so on; None means the network's attribute.
        conditions: The size of each further condition, a number or a shape, by name; None means
            the network's attribute, if that is a mapping to sizes.

    Raises:
        AssertionError: If a law is violated, with its name and the numbers.

    Example:
        >>> from lit_diffusion.nn import UNet
        >>> check_network(UNet(channels=(8,), attention=(), num_classes=4))
    """
    law(isinstance(network, nn.Module), network, "expected an instance of torch.nn.Module.")
    shape = getattr(network, "shape", None) if shape is None else shape
    known = shape is not None
    law(known, network, "it has no attribute shape: give check_network(…, shape=…).")
    sizes = getattr(network, "conditions", None) if conditions is None else conditions
    given = _inputs(network, tuple(shape or ()), sizes if isinstance(sizes, Mapping) else {})
    moved = _moved(network)
    with torch.no_grad():
        _check_function(moved, given)
        _check_inputs_matter(moved, given)
        _check_copies(network, moved, given)
        _check_sizes(moved, given)
    _check_gradients(moved, given)
    _check_precision(moved, given)


def _inputs(
    network: nn.Module, shape: tuple[int, ...], sizes: Mapping[str, int | tuple[int, ...]]
) -> dict[str, Tensor]:
    """What the network is called with, by name."""
    generator = torch.Generator().manual_seed(2)
    given = {
        "z": torch.randn(BATCH, *shape, generator=generator),
        "logsnr": torch.linspace(-FAR, FAR, BATCH),
    }
    classes = getattr(network, "num_classes", None)
    if classes is not None:
        given["label"] = torch.arange(BATCH) % (classes + 1) - 1
    for name, size in sizes.items():
        each = (size,) if isinstance(size, int) else tuple(size)
        given[name] = torch.randn(BATCH, *each, generator=generator)
    if (numbers := getattr(network, "augment", None)) is not None:
        given["augment"] = torch.randn(BATCH, numbers, generator=generator)
    return given


def _moved(network: nn.Module) -> nn.Module:
    """A copy in evaluation mode, each of whose parameters has changed."""
    moved, generator = copy.deepcopy(network).float().cpu(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return moved.eval()


def _check_function(network: nn.Module, given: dict[str, Tensor]) -> None:
    """The shape, and each example for itself."""
    z, out = given["z"], network(**given)
    kept = out.shape == z.shape
    law(kept, network, f"the output has the shape of z, {tuple(z.shape)}, got {tuple(out.shape)}.")
    law(out.dtype == z.dtype, network, f"the output has z's dtype {z.dtype}, got {out.dtype}.")
    law(bool(out.isfinite().all()), network, f"the output is finite for λ in [−{FAR}, {FAR}].")
    law(torch.equal(network(**given), out), network, "in evaluation mode it is deterministic.")
    scale = float(out.std())
    for i in range(BATCH):
        alone = network(**{name: value[i : i + 1] for name, value in given.items()})
        same = close((alone - out[i : i + 1]) / scale, torch.zeros_like(alone), 1e-3)
        law(same, network, "in evaluation mode an example does not depend on the batch.")


def _check_inputs_matter(network: nn.Module, given: dict[str, Tensor]) -> None:
    """Each input changes the output; an absent label is −1."""
    out = network(**given)

    def matters(name: str, value: Tensor) -> None:
        change = float((network(**given | {name: value}) - out).abs().max() / out.std())
        law(
            change > MATTERS, network, f"the output depends on {name}, it changes by {change:.2g}."
        )

    for name, value in given.items():
        if name != "label":
            matters(name, value + 0.5)
    if "label" in given:
        none = torch.full_like(given["label"], -1)
        matters("label", none)
        absent = network(**{name: value for name, value in given.items() if name != "label"})
        same = close(absent, network(**given | {"label": none}), 1e-4)
        law(same, network, "no label is the label −1.")
    if "augment" in given:
        absent = network(**{name: value for name, value in given.items() if name != "augment"})
        same = close(absent, network(**given | {"augment": 0 * given["augment"]}), 1e-4)
        law(same, network, "no augmentation is that of zeros.")
    others = ("z", "logsnr", "augment")
    conditions = {name: value for name, value in given.items() if name not in others}
    if conditions.keys() - {"label"}:
        dropped = drop_condition(conditions, torch.arange(BATCH) % 2 == 0)
        try:
            out = network(given["z"], given["logsnr"], **dropped)
        except TypeError as error:
            raise AssertionError(f"{network!r}: it takes `dropped`: {error}") from error
        law(bool(out.isfinite().all()), network, "the output is finite without conditions.")


def _check_copies(network: nn.Module, moved: nn.Module, given: dict[str, Tensor]) -> None:
    """A network made from the arguments, as a checkpoint does it, with the weights."""
    try:
        values = copy.deepcopy(arguments(network))
    except TypeError as error:
        raise AssertionError(str(error)) from error
    sentence = "one made from its arguments, with its state_dict, is the same"
    twin = type(network)(**values)
    try:
        twin.load_state_dict(moved.state_dict())
    except RuntimeError as error:
        raise AssertionError(f"{network!r}: {sentence}: {error}") from error
    law(torch.equal(twin.eval()(**given), moved(**given)), network, f"{sentence}.")


def _check_sizes(network: nn.Module, given: dict[str, Tensor]) -> None:
    """What `check_shape` accepts passes; it accepts the network's own shape."""
    z = given["z"]
    own = tuple(z.shape[1:])
    if getattr(network, "check_shape", None) is not None:
        accepted = takes_shape(network, own)
        law(accepted, network, f"check_shape accepts the network's own shape, {own}.")
    channels, *sides = own
    others = {
        (channels, *(2 * side for side in sides)),
        (channels, *(side + 4 * (axis == 0) for axis, side in enumerate(sides))),
        (channels, *(max(1, side // 2) for side in sides)),
    } - {own}
    for shape in sorted(others):
        if not takes_shape(network, shape):
            continue
        longer = z.new_ones(len(z), *shape)
        try:
            out = network(**given | {"z": longer})
        except Exception as error:
            raise AssertionError(
                f"{network!r}: it takes {shape}, which check_shape accepts: {error}"
            ) from error
        law(out.shape == longer.shape, network, f"the output has the shape of z, {shape}.")
        law(bool(out.isfinite().all()), network, f"the output is finite for the shape {shape}.")


def _check_gradients(network: nn.Module, given: dict[str, Tensor]) -> None:
    """In training every parameter learns."""
    learning = copy.deepcopy(network).train()
    learning(**given).square().mean().backward()
    for name, parameter in learning.named_parameters():
        found = parameter.grad is not None and bool(parameter.grad.any())
        law(found or not parameter.requires_grad, network, f"the gradient reaches {name}.")


def _check_precision(network: nn.Module, given: dict[str, Tensor]) -> None:
    """The result in float32 is that of float64, and about that of bfloat16."""

    def off(out: Tensor) -> float:
        return float((out.detach().float() - single).square().mean().sqrt() / single.std())

    single = network(**given).detach()
    wide: dict[str, Any] = {
        name: value.double() if value.is_floating_point() else value
        for name, value in given.items()
    }
    double = copy.deepcopy(network).double()(**wide)
    law(double.dtype == torch.float64, network, f"float64 stays float64, got {double.dtype}.")
    law(off(double) < 1e-3, network, f"float64 is float32's result, off by {off(double):.2g}.")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = copy.deepcopy(network).train()(**given)
    law(off(out) < ROUNDING, network, f"bfloat16 autocast is off by {off(out):.2g} of the std.")
    out.float().mean().backward()

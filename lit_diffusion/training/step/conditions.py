"""Further conditions: inputs of the network beside z, λ and a label.

    batch["attributes"]  →  network(z, logsnr, label=…, attributes=…, dropped=…)

A condition is a tensor with one row per example. Its name is its key in the batch and an argument
of the network. Where guidance drops it, its rows are zero and `dropped` is true: see
`lit_diffusion.drop_condition`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lit_diffusion.decoders import Decoder
from lit_diffusion.denoisers import Denoiser
from lit_diffusion.likelihood import variational_bound
from lit_diffusion.loss import DiffusionLoss, weighted_error
from lit_diffusion.models.base import SamplingModel, declared_conditions
from lit_diffusion.nn.text import TextEncoder, text_bytes
from lit_diffusion.probability_flow import log_likelihood
from lit_diffusion.samplers import Sampler
from lit_diffusion.training.data.reading.columns import BATCH, TEXT

__all__ = [
    "RESERVED",
    "augmentation",
    "check_labels",
    "check_network",
    "from_batch",
    "named_conditions",
    "prompt_bytes",
]

# Conditions are passed as keyword arguments through all of these, whose own names are reserved.
_ON_THE_WAY = (
    Decoder.reconstruction,
    Denoiser.forward,
    DiffusionLoss.forward,
    Sampler.__call__,
    log_likelihood,
    variational_bound,
    weighted_error,
)
RESERVED = {"dropped", *BATCH}.union(*(inspect.signature(f).parameters for f in _ON_THE_WAY))


def named_conditions(network: nn.Module, given: Sequence[str] | None) -> tuple[str, ...]:
    """The names of a model's conditions, which its network takes.

    Args:
        network: The network.
        given: The names; None means those that the network declares.

    Raises:
        ValueError: If a name is reserved, or the network does not take it.
    """
    names = declared_conditions(network) if given is None else tuple(given)
    check_network(network, names)
    return names


def check_network(network: nn.Module, names: Sequence[str]) -> None:
    """Refuse reserved names, and a network that does not take all of the names.

    Args:
        network: The network.
        names: Names of the conditions.

    Raises:
        ValueError: If a name is refused; the message names the first.
    """
    for name in names:
        if name in RESERVED:
            raise ValueError(
                f"A condition cannot be called {name!r}, which means something else on the way to "
                "the network; rename it."
            )
    if not names:
        return
    inner, takes = _innermost(network)
    for name in (*names, "dropped"):
        if takes is not None and name not in takes:
            raise ValueError(
                f"{type(inner).__name__} takes no argument {name!r}, but the model is conditioned "
                f"on {', '.join(names)}: its forward needs them, and `dropped`, by name; see the "
                "guide on conditioning."
            )


def _innermost(network: nn.Module) -> tuple[nn.Module, set[str] | None]:
    """The network within all wrappers that pass on what they do not take, and what it takes."""
    inner: Any = network
    while (takes := _arguments(inner)) is None and isinstance(
        getattr(inner, "network", None), nn.Module
    ):
        inner = inner.network
    return inner, takes


def augmentation(network: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the network is told of the augmentation of a batch; nothing if there is none.

    It is never dropped with the conditions: a network that is not told would take the images as
    they are. Only training batches have the entry; wherever it is missing, the network is told
    that the images are not augmented, by zeros, which add nothing to its embedding.

    Args:
        network: The network.
        batch: A batch of the data.

    Raises:
        ValueError: If the network does not take it.
    """
    if "augment" not in batch:
        return {}
    inner, takes = _innermost(network)
    if takes is not None and "augment" not in takes:
        raise ValueError(
            f"The data are augmented (data.augment), but {type(inner).__name__} takes no argument "
            "'augment', without which its samples would be augmented as well: let its forward "
            "take augment=None, (B, 9), or set data.augment to null."
        )
    return {"augment": batch["augment"]}


def _arguments(network: nn.Module) -> set[str] | None:
    """Names of what a network takes; None if it takes any."""
    parameters = inspect.signature(network.forward).parameters.values()
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        return None
    return {one.name for one in parameters}


def prompt_bytes(model: SamplingModel, prompts: Sequence[str]) -> Tensor:
    """The bytes of prompts, for a model that reads texts of this length.

    Args:
        model: The model.
        prompts: The texts, at least one.

    Shapes:
        result (number of prompts, T), int64.

    Raises:
        ValueError: If the model reads no texts, or a prompt is blank or too long for it.
    """
    if TEXT not in model.conditions:
        named = ", ".join(model.conditions) or "none"
        raise ValueError(
            f"Prompts are for a model with the condition {TEXT!r}, and this one's conditions are: "
            f"{named}. Train one with data.text_key and an encoder as the network's argument text."
        )
    encoder = getattr(model.denoiser.network, "text", None)
    try:
        rows = text_bytes(prompts, getattr(encoder, "length", None))
        if isinstance(encoder, TextEncoder):
            encoder.check(prompts)
        return rows
    except ValueError as error:
        raise ValueError(f"Expected as a prompt {error}.") from error


def from_batch(names: Sequence[str], batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The conditions of a batch.

    Args:
        names: Their names.
        batch: A batch of the data.

    Raises:
        ValueError: If one is not in it.
    """
    for name in names:
        if name not in batch:
            raise ValueError(
                f"Expected {name!r} in the batch, for the model is conditioned on it, got "
                f"{', '.join(batch)}; name its column in data.condition_keys, or that of a text "
                "in data.text_key."
            )
    return {name: batch[name] for name in names}


def check_labels(label: Tensor, num_classes: int) -> None:
    """Refuse labels that are not classes, their range on the CPU only.

    On a GPU reading the labels would wait for the device, which refuses them by itself.

    Args:
        label: Labels from 0 to num_classes − 1, or −1 for none.
        num_classes: Classes that the network knows.

    Shapes:
        label (B,), integer.

    Raises:
        ValueError: If a label is out of range, or labels are no integers.
    """
    if label.is_floating_point():
        raise ValueError(
            f"Expected integer labels, got {label.dtype}: convert them, or pass them as a further "
            "condition."
        )
    if label.device.type == "cpu" and (int(label.max()) >= num_classes or label.min() < -1):
        raise ValueError(
            f"Expected labels from 0 to {num_classes - 1} (−1 for none), got "
            f"{int(label.min())} to {int(label.max())}; set num_classes of the network."
        )

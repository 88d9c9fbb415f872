"""Initial weights from another run: fine-tuning on other data, or with another optimizer or head.

Only the weights of the network are taken, by name and shape. What else training has, such as the
moments of the optimizer, averages and the noise schedule, begins anew, as the config says.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from lit_diffusion.models.pretrained import CONFIG, load_pretrained
from lit_diffusion.training.run.checkpoints import load_checkpoint
from lit_diffusion.training.run.messages import inform
from lit_diffusion.training.run.weights import weights_name

__all__ = ["Initialization", "initialize", "start_from", "weights_of"]

NETWORK = "denoiser."


class Initialization(NamedTuple):
    """What a model has taken from the weights of another.

    Args:
        taken: Names of weights, or of modules of which all are taken.
        left_out: The same of what the other has and this model does not, or in another shape.
        new: The same of what this model has and the other does not, or in another shape.
    """

    taken: list[str]
    left_out: list[str]
    new: list[str]

    def lines(self) -> Iterator[str]:
        """What happened, a line for each kind."""
        for kind, names in zip(("Taken", "Left out", "New"), self, strict=True):
            if names:
                yield f"{kind}: {', '.join(names)}"


def start_from(model: nn.Module, path: str | Path) -> None:
    """Initialize a model with the weights in a file, and report what was taken.

    Args:
        model: A `LitDiffusion`.
        path: A checkpoint, or a folder that `lit-diffusion export` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is neither, or damaged, or its weights do not fit.
    """
    state, named = weights_of(path)
    inform(f"Initial weights: {named}, from {path}.")
    for line in initialize(model, state).lines():
        inform(line)


def weights_of(path: str | Path) -> tuple[dict[str, Tensor], str]:
    """The weights in a checkpoint or an exported folder, and what they are called.

    They are the average if the run maintained one, as for sampling.

    Args:
        path: A checkpoint, or a folder that `lit-diffusion export` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is neither, or damaged.
    """
    path = Path(path)
    if (path / CONFIG).is_file():
        about: dict[str, Any] = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        named, state = about.get("weights"), load_pretrained(path).state_dict()
        return state, f"{named} at step {about.get('step')}"
    checkpoint = load_checkpoint(path)
    named = f"{weights_name(checkpoint)} at step {checkpoint['global_step']}"
    return checkpoint["state_dict"], named


def initialize(model: nn.Module, state: Mapping[str, Tensor]) -> Initialization:
    """Give the network of a model the weights of another that have the same name and shape.

    Args:
        model: A `LitDiffusion`.
        state: The `state_dict` of another, with any network and schedule.

    Raises:
        ValueError: If no weight has the same name and shape.
    """
    own = model.state_dict()
    same = {
        name
        for name, value in state.items()
        if name.startswith(NETWORK) and name in own and own[name].shape == value.shape
    }
    if not same:
        raise ValueError(
            "No weight has the name and shape of one of this network: expected those of a network "
            f"of the same class, got {', '.join(sorted(state)[:3]) or 'none'}, …"
        )
    model.load_state_dict({name: state[name] for name in same}, strict=False)
    ours = {name: value for name, value in own.items() if name.startswith(NETWORK)}
    return Initialization(
        _whole(same, ours),
        _whole(state.keys() - same, state),
        _whole(ours.keys() - same, ours),
    )


def _whole(names: Collection[str], state: Mapping[str, Tensor], prefix: str = "") -> list[str]:
    """Names of a state, with a module in place of all of its weights; weights have their shape.

    Args:
        names: The names.
        state: The state.
        prefix: Of the module that is looked at.
    """
    found = []
    parts = dict.fromkeys(
        name[len(prefix) :].partition(".")[0] for name in state if name.startswith(prefix)
    )
    for part in parts:
        inside = prefix + part + "."
        below = [name for name in state if name.startswith(inside)]
        if prefix + part in names:
            found.append(f"{prefix}{part} {tuple(state[prefix + part].shape)}")
        elif len(below) > 1 and all(name in names for name in below):
            found.append(prefix + part)
        elif any(name in names for name in below):
            found += _whole(names, state, inside)
    return found

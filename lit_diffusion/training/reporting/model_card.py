"""The model card: a description of a model, its measurements with protocols, and example code.

The text is in `templates/model_card.md`; this file computes the values that it names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

import lit_diffusion
from lit_diffusion.models import Pretrained
from lit_diffusion.objective import Objective
from lit_diffusion.training.evaluation.measurement_table import measurement_table
from lit_diffusion.training.reporting.objective import paragraphs
from lit_diffusion.training.reporting.page import render
from lit_diffusion.training.run.measurements import Measurement
from lit_diffusion.training.run.weights import AS_PUBLISHED

__all__ = ["SAMPLES", "model_card"]

SAMPLES = "samples.png"
_UNKNOWN = "The model was trained elsewhere; its training objective is not known."


def model_card(
    model: Pretrained,
    described: dict[str, Any],
    title: str,
    license: str,
    weights: str,
    measured: list[Measurement],
    picture: bool,
) -> str:
    """The text of README.md, as the Hub expects it.

    Args:
        model: The model.
        described: Its description as plain data.
        title: Its name.
        license: The license of the weights, by its identifier on the Hub.
        weights: The name of the weights, `AS_PUBLISHED` if they were trained elsewhere.
        measured: Measurements of exactly these weights.
        picture: Whether there is a picture of samples.
    """
    front = {
        "library_name": "lit-diffusion",
        "license": license,
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusion", "lit-diffusion"],
    }
    classes = set(_classes(described))
    card = render(
        "model_card.md",  # Markdown, not HTML: only the bars in a table are escaped
        front=yaml.safe_dump(front, sort_keys=False, allow_unicode=True),
        title=title,
        version=lit_diffusion.__version__,
        picture=SAMPLES if picture else None,
        facts=_facts(model, weights),
        objective=[_UNKNOWN] if weights.startswith(AS_PUBLISHED) else _objective(model),
        measured=measurement_table(measured) if measured else None,
        extra="[diffusers]" if "lit_diffusion.DiffusersNetwork" in classes else "",
        modules=sorted({path.rpartition(".")[0] for path in classes if not _ours(path)}),
        conditions=model.conditions,
        arguments=_arguments(model),
        shape=", ".join(map(str, model.image_shape)),
        table=_table,
        plain=_plain,
    )
    return card + "\n"


def _facts(model: Pretrained, weights: str) -> list[tuple[str, str]]:
    size = sum(parameter.numel() for parameter in model.denoiser.parameters())
    facts = [
        ("network", f"{type(model.network).__name__}, {size:,} parameters"),
        ("shape", " × ".join(map(str, model.image_shape))),
        ("classes", "none" if model.num_classes is None else str(model.num_classes)),
        ("weights", weights),
        ("sampler", f"`{model.sampler!r}`"),
    ]
    if model.conditions:
        facts.insert(3, ("conditions", ", ".join(model.conditions)))
    return facts


def _objective(model: Pretrained) -> list[str]:
    """The training objective in words."""
    loss = model.loss
    found = Objective(loss.schedule, loss.weighting, model.prediction, loss.num_timesteps)
    headline, meaning, *_, nearest = paragraphs(found, loss.decoder)
    shown = (headline.removeprefix("Objective: "), meaning, nearest)
    return [text.replace("\N{NO-BREAK SPACE}", " ") for text in shown]


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value.replace("\n", " ")
    return json.dumps(value, ensure_ascii=False)


def _arguments(model: Pretrained) -> Iterator[str]:
    """The arguments of the example call of `sample`."""
    yield "4"
    yield "torch.Generator().manual_seed(0)"
    if model.num_classes is not None:
        yield "label=0"
    if model.conditions:
        pairs = ", ".join(f'"{name}": {name}' for name in model.conditions)
        yield f"cond={{{pairs}}}"


def _classes(described: Any) -> Iterator[str]:
    """The class paths in a description."""
    if isinstance(described, dict):
        if "class_path" in described:
            yield described["class_path"]
        for value in described.values():
            yield from _classes(value)
    elif isinstance(described, list):
        for value in described:
            yield from _classes(value)


def _ours(path: str) -> bool:
    return path.partition(".")[0] in ("lit_diffusion", "torch")


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown."""
    lines = []
    for row in [head, ["---"] * len(head), *rows]:
        cells = [str(cell).replace("|", "\\|") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)

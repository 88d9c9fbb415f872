"""The model card: a description of a model, its measurements with protocols, and example code.

The text is in `templates/model_card.md`; this file computes the values that it names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

import lit_diffusion
from lit_diffusion.models import Pretrained
from lit_diffusion.nn.text import TextEncoder
from lit_diffusion.objective import Objective
from lit_diffusion.training.evaluation.measurement_table import (
    MeasurementTable,
    measurement_table,
)
from lit_diffusion.training.reporting.objective import paragraphs
from lit_diffusion.training.reporting.page import render
from lit_diffusion.training.run.measurements import Measurement
from lit_diffusion.training.run.weights import AS_PUBLISHED

__all__ = ["SAMPLES", "model_card"]

SAMPLES = "samples.png"
_EXTRAS = {"DiffusersNetwork": "diffusers", "TransformersText": "text"}  # what needs which
_UNKNOWN = "The model was trained elsewhere; its training objective is not known."


def _named_classes(model: Pretrained) -> str:
    """The number of the classes, and their names if there are few."""
    if model.num_classes is None:
        return "none"
    names = model.class_names or []
    return str(model.num_classes) + (f": {', '.join(names)}" if 0 < len(names) <= 20 else "")


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
        "tags": ["diffusion", "lit-diffusion"],
    }
    if model.kind == "image":
        front["pipeline_tag"] = "unconditional-image-generation"
    classes = set(_classes(described))
    extras = [extra for cls, extra in _EXTRAS.items() if f"lit_diffusion.{cls}" in classes]
    card = render(
        "model_card.md",  # Markdown: a template of this kind escapes nothing by itself
        front=yaml.safe_dump(front, sort_keys=False, allow_unicode=True),
        title=_text(title),
        version=lit_diffusion.__version__,
        picture=SAMPLES if picture else None,
        facts=_facts(model, weights),
        objective=[_UNKNOWN]
        if weights.startswith(AS_PUBLISHED)
        else map(_text, _objective(model)),
        measured=_numbers(measured) if measured else None,
        extra=f"[{','.join(extras)}]" if extras else "",
        modules=sorted({path.rpartition(".")[0] for path in classes if not _ours(path)}),
        conditions=model.conditions,
        range="in [−1, 1]" if model.kind == "image" else "as the network has them",
        normalized=model.normalization is not None,
        arguments=_arguments(model),
        shape=", ".join(map(str, model.shape)),
        table=_table,
        plain=_plain,
        text=_text,
    )
    return card + "\n"


def _numbers(measured: list[Measurement]) -> MeasurementTable:
    """The measurements, with every cell as Markdown."""
    heads, rows, protocols = measurement_table(measured)
    cells = [[_text(cell) for cell in row] for row in rows]
    return MeasurementTable([_text(head) for head in heads], cells, protocols)


def _facts(model: Pretrained, weights: str) -> list[tuple[str, str]]:
    size = sum(parameter.numel() for parameter in model.denoiser.parameters())
    facts = [
        ("network", _text(f"{type(model.network).__name__}, {size:,} parameters")),
        ("shape", " × ".join(map(str, model.shape))),
        ("classes", _named_classes(model)),
        ("weights", _text(weights)),
        ("sampler", _code(repr(model.sampler)).replace("|", "\\|")),
    ]
    if model.conditions:
        facts.insert(3, ("conditions", _text(", ".join(model.conditions))))
    return facts


def _objective(model: Pretrained) -> list[str]:
    """The training objective in words."""
    loss = model.loss
    found = Objective(loss.schedule, loss.weighting, model.prediction, loss.num_timesteps)
    headline, meaning, *_, nearest = paragraphs(found, loss.decoder)
    shown = (headline.removeprefix("Objective: "), meaning, nearest)
    return [text.replace("\N{NO-BREAK SPACE}", " ") for text in shown]


def _text(value: Any) -> str:
    """A value as one line of Markdown that shows it as it is: no HTML, link, picture or heading.

    Example:
        >>> _text("<b> https://c")
        '&lt;b> https:&#47;/c'
    """
    line = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`\[|]|://)", _escaped, line)


def _escaped(found: re.Match[str]) -> str:
    return ":&#47;/" if found[0] == "://" else f"\\{found[0]}"  # a bare address is a link, too


def _code(value: Any) -> str:
    """A value as code within a line, where nothing else has a meaning."""
    line = " ".join(str(value).split()).replace("`", "'")
    return f"`{line}`"


def _plain(value: Any) -> str:
    return _text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _arguments(model: Pretrained) -> Iterator[str]:
    """The arguments of the example call of `sample`."""
    yield "4"
    yield "torch.Generator().manual_seed(0)"
    if model.num_classes is not None:
        yield "label=0"
    if model.conditions:
        names = {name: re.sub(r"\W", "_", name) for name in model.conditions}
        if isinstance(getattr(model.network, "text", None), TextEncoder):
            names["text"] = '["a prompt"] * 4'
        pairs = ", ".join(f"{json.dumps(name)}: {known}" for name, known in names.items())
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
    """A table in Markdown, of cells that are Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])

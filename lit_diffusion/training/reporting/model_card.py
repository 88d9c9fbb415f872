"""The model card: what one must know of a model before using it, and its numbers with protocols.

---
front matter that the Hub reads
---
what it is · samples · objective · numbers · use
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import yaml

import lit_diffusion
from lit_diffusion.models import Pretrained
from lit_diffusion.objective import Objective
from lit_diffusion.training.evaluation.overview import overview
from lit_diffusion.training.reporting.objective import paragraphs
from lit_diffusion.training.run.measurements import Measurement
from lit_diffusion.training.run.weights import PUBLISHED

__all__ = ["SAMPLES", "model_card"]

SAMPLES = "samples.png"
_UNKNOWN = "The model was trained elsewhere, and what for is not known here."


def model_card(
    model: Pretrained,
    described: dict[str, Any],
    title: str,
    license: str,
    weights: str,
    measured: list[Measurement],
    picture: bool,
) -> str:
    """The text of README.md.

    Args:
        model: The model.
        described: Its description.
        title: Its name.
        license: Of the weights, as the Hub names it.
        weights: Which weights they are, `PUBLISHED` if they were trained elsewhere.
        measured: Numbers of just these weights.
        picture: Whether there is a picture of samples.
    """
    front = {
        "library_name": "lit-diffusion",
        "license": license,
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusion", "lit-diffusion"],
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {title}",
        f"A diffusion model, exported by lit_diffusion {lit_diffusion.__version__}.",
    ]
    if picture:
        parts.append(f"![Samples]({SAMPLES})")
    parts += [
        _table(["", ""], _facts(model, weights)),
        "## Objective",
        *([_UNKNOWN] if weights.startswith(PUBLISHED) else _objective(model)),
        "## Numbers",
        *_numbers(measured),
        "## Use",
        *_use(model, described),
    ]
    return "\n\n".join(parts) + "\n"


def _facts(model: Pretrained, weights: str) -> list[tuple[str, str]]:
    size = sum(parameter.numel() for parameter in model.denoiser.parameters())
    facts = [
        ("network", f"{type(model.network).__name__}, {size:,} parameters"),
        ("shape", " × ".join(map(str, model.image_shape))),
        ("classes", "none" if model.num_classes is None else str(model.num_classes)),
        ("weights", weights),
        ("sampler", f"`{model.walk()!r}`"),
    ]
    if model.conditions:
        facts.insert(3, ("conditions", ", ".join(model.conditions)))
    return facts


def _objective(model: Pretrained) -> list[str]:
    """What it was trained for, in words."""
    loss = model.loss
    found = Objective(loss.schedule, loss.weighting, model.prediction, loss.num_timesteps)
    said = paragraphs(found, loss.decoder)
    said[0] = said[0].removeprefix("Objective: ")
    return [text.replace("\N{NO-BREAK SPACE}", " ") for text in (said[0], said[1], said[-1])]


def _numbers(measured: list[Measurement]) -> Iterator[str]:
    """The numbers, and under a letter for each what they depend on."""
    if not measured:
        yield "Nothing was measured of these weights."
        return
    found = overview(measured)
    yield _table(found.heads, found.rows)
    yield "Each row was measured under the protocol of that number:"
    for i, protocol in enumerate(found.protocols, 1):
        told = "\n".join(f"   - {name}: {_plain(value)}" for name, value in protocol.items())
        yield f"{i}. Protocol\n\n{told}"


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value.replace("\n", " ")
    return json.dumps(value, ensure_ascii=False)


def _use(model: Pretrained, described: dict[str, Any]) -> Iterator[str]:
    """How it is loaded."""
    classes = set(_classes(described))
    extra = "[diffusers]" if "lit_diffusion.DiffusersNetwork" in classes else ""
    others = sorted({path.rpartition(".")[0] for path in classes if not _ours(path)})
    yield f"Needs `pip install 'lit-diffusion{extra}'`; this folder is where the program runs."
    shape = ", ".join(map(str, model.image_shape))
    lines = [
        "import torch",
        *(f"import {module}  # has classes of this model" for module in others),
        "from lit_diffusion import load_pretrained",
        "",
        'model = load_pretrained(".")',
    ]
    arguments = ["4", "torch.Generator().manual_seed(0)"]
    if model.num_classes is not None:
        arguments.append("label=0")
    if model.conditions:
        told = ", ".join(f'"{name}": {name}' for name in model.conditions)
        arguments.append(f"cond={{{told}}}")
        lines.append("# Each condition is a tensor of 4 rows.")
    lines.append(f"x = model.sample({', '.join(arguments)})  # (4, {shape}), in [−1, 1]")
    yield "```python\n" + "\n".join(lines) + "\n```"


def _classes(described: Any) -> Iterator[str]:
    """The paths of all classes in a description."""
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


def _table(head: list[str], rows: list[Any]) -> str:
    lines = []
    for row in [head, ["---"] * len(head), *rows]:
        cells = [str(cell).replace("|", "\\|") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)

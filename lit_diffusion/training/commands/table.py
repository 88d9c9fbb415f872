"""The table of commands: what each does, the function behind it, and its positional argument.

`lit-diffusion --help`, the command line and the public names of `training` are made from it. It
imports nothing expensive.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["COMMANDS", "Command"]


class Command(NamedTuple):
    """A command and how its arguments are given on the command line.

    Args:
        summary: What it does, in a few words.
        example: Its arguments in a typical call.
        function: The function of `commands/`, which is also the name of its module; None for
            those of Lightning's Trainer.
        word: The positional argument, if there is one.
        several: Whether the positional argument takes several values.
        group: The argument whose own arguments are flags, as in `--data.path`.
    """

    summary: str
    example: str
    function: str | None = None
    word: str | None = None
    several: bool = False
    group: str | None = None


_RESUME = "--ckpt_path X --config C"

COMMANDS = {
    "new": Command("look at images, write a config", "FOLDER --out my.yaml", "new", "path"),
    "fit": Command("train", "--config digits"),
    "validate": Command("validation loss", _RESUME),
    "test": Command("test loss", _RESUME),
    "predict": Command("one sample per validation example", _RESUME),
    "sample": Command("sample images", "--ckpt_path X --out grid.png", "sample"),
    "evaluate": Command(
        "FID and bits/dim", "--ckpt_path X --seeds [0,1,2]", "evaluate", group="data"
    ),
    "report": Command("HTML report of a run", "RUN", "report", "run"),
    "compare": Command(
        "runs side by side", "RUN1 RUN2 --out compare.html", "compare", "runs", several=True
    ),
    "objective": Command("analyse an objective", "--config C --out objective.png", "objective"),
    "ema": Command("post-hoc EMA", "RUN --sigma_rel 0.08", "ema", "run"),
    "replay": Command("locate a NaN", "RUN/non_finite/step-N.json", "replay", "file"),
    "export": Command("export a model folder", "RUN --out FOLDER", "export", "run"),
    "import": Command(
        "import from diffusers", "FOLDER --out model.ckpt", "import_diffusers", "folder"
    ),
    "encode": Command(
        "encode images", "--vae FOLDER --data.path D --out LATENTS", "encode", group="data"
    ),
    "decode": Command(
        "decode latents", "LATENTS.npy --vae FOLDER --out grid.png", "decode", "latents"
    ),
    "plugins": Command("list all plug-ins", "", "plugins"),
}

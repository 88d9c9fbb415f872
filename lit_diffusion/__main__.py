"""The command `lit-diffusion`, also `python -m lit_diffusion`.

This file imports nothing expensive: `--version` and `--help` are immediate, `plugins` imports
torch, and only commands that train or sample import Lightning.
"""

from __future__ import annotations

import difflib
import os
import signal
import sys

COMMANDS = (
    "fit", "validate", "test", "predict", "sample", "evaluate", "report", "compare", "objective",
    "ema", "replay", "export", "import", "encode", "decode", "plugins",
)  # fmt: skip

HELP = """usage: lit-diffusion COMMAND [arguments]

Train diffusion models, and know what the objective does.

commands:
  fit       train                   lit-diffusion fit --config configs/digits.yaml
  validate  validation loss         lit-diffusion validate --ckpt_path X --config C
  test      test loss               lit-diffusion test --ckpt_path X --config C
  predict   one sample per          lit-diffusion predict --ckpt_path X --config C
            validation example
  sample    sample images           lit-diffusion sample --ckpt_path X --out grid.png
  evaluate  FID and bits/dim        lit-diffusion evaluate --ckpt_path X --seeds [0,1,2]
  report    HTML report of a run    lit-diffusion report RUN
  compare   losses over λ of runs   lit-diffusion compare RUN1 RUN2 --out compare.png
  objective analyse an objective    lit-diffusion objective --config C --out objective.png
  ema       post-hoc EMA            lit-diffusion ema --run RUN --sigma_rel 0.08
  replay    locate a NaN            lit-diffusion replay RUN/non_finite/step-N.json
  export    model as a folder       lit-diffusion export RUN --out FOLDER
  import    model from diffusers    lit-diffusion import FOLDER --out model.ckpt
  encode    images to latents       lit-diffusion encode --vae FOLDER --data.path D --out LATENTS
  decode    latents to images       lit-diffusion decode LATENTS.npy --vae FOLDER --out grid.png
  plugins   list all schedules,     lit-diffusion plugins
            weightings, predictions, samplers and decoders

  lit-diffusion COMMAND --help              arguments of a command
  lit-diffusion fit --model.weighting.help SigmoidWeighting    arguments of a class
  lit-diffusion --version                   version
"""


def main() -> None:
    """Run the command line."""
    # OpenMP threads wait for each other in a busy loop. On a machine with other busy processes
    # the awaited thread may not be running, and steps of 50 ms took up to 9 s. Sleeping after a
    # few microseconds of spinning avoids this, at no cost on an idle machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    # Unlike `python -m`, a console script does not have the working directory on its path, where
    # a local my_plugins.py is.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command == "--version":
        from lit_diffusion import __version__

        print(f"lit_diffusion {__version__}")
    elif command in ("-h", "--help"):
        print(HELP, end="")
    elif command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Expected one of {', '.join(COMMANDS)}."
        sys.stderr.write(f"lit-diffusion: error: there is no command {command!r}. {hint}\n")
        raise SystemExit(2)
    else:
        if command == "plugins" and hasattr(signal, "SIGPIPE"):
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `lit-diffusion plugins | head` ends
        from lit_diffusion.training.cli import main as run

        run()


if __name__ == "__main__":
    main()

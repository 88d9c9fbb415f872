"""The command `lit-diffusion`, also `python -m lit_diffusion`.

This file imports nothing heavy: `--version` and `--help` answer at once, `plugins` costs torch,
and only a command that trains or samples waits for Lightning.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
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
  fit       train              lit-diffusion fit --config configs/digits.yaml
  validate  validation loss    lit-diffusion validate --ckpt_path X --config C
  test      test loss          lit-diffusion test --ckpt_path X --config C
  predict   an image like each lit-diffusion predict --ckpt_path X --config C
  sample    draw images        lit-diffusion sample --ckpt_path X --num_samples 16 --out grid.png
  evaluate  FID, bits and all  lit-diffusion evaluate --ckpt_path X --seeds [0,1,2]
  report    a run as one page  lit-diffusion report RUN
  compare   runs over λ        lit-diffusion compare RUN1 RUN2 --out compare.png
  objective what it does       lit-diffusion objective --config C --out objective.png
  ema       another average    lit-diffusion ema --run RUN --sigma_rel 0.08
  replay    where a NaN began  lit-diffusion replay RUN/non_finite/step-N.json
  export    a model alone      lit-diffusion export RUN --out folder
  import    a diffusers model  lit-diffusion import FOLDER --out model.ckpt
  encode    images as latents  lit-diffusion encode --vae FOLDER --data.path D --out LATENTS
  decode    latents as images  lit-diffusion decode LATENTS.npy --vae FOLDER --out grid.png
  plugins   list every schedule, weighting, prediction, sampler and decoder there is

  lit-diffusion COMMAND --help              all arguments of a command
  lit-diffusion fit --model.weighting.help SigmoidWeighting    the arguments of a plug-in
  --version                                 the version
"""


def main() -> None:
    """Run the command line."""
    # OpenMP's threads wait for one another by spinning. Beside another busy process the one that
    # is waited for may be off its core, and steps of 50 ms were seen to take 9 s; spinning for a
    # few microseconds and sleeping then bounds that, at no cost on a quiet machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    # A console script does not have the working directory on its path, and `python -m` does: with
    # it a local my_plugins.py is found either way.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command == "--version":
        from lit_diffusion import __version__

        print(f"lit_diffusion {__version__}")
    elif command in ("-h", "--help"):
        print(HELP, end="")
    elif command == "plugins":
        _print_plugins(sys.argv[2:])
    elif command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Expected one of {', '.join(COMMANDS)}."
        sys.stderr.write(f"lit-diffusion: error: there is no command {command!r}. {hint}\n")
        raise SystemExit(2)
    else:
        from lit_diffusion.training.cli import main as run

        run()


def _print_plugins(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="lit-diffusion plugins",
        description="List every schedule, weighting, prediction, sampler and decoder there is.",
    )
    parser.add_argument("--plugins", nargs="*", default=[], help="modules of your own to import")
    for module in parser.parse_args(argv).plugins:
        try:
            importlib.import_module(module)
        except ImportError as error:
            sys.stderr.write(f"lit-diffusion: error: {module} cannot be imported: {error}\n")
            raise SystemExit(2) from error
    from lit_diffusion import DECODERS, PREDICTIONS, SAMPLERS, SCHEDULES, WEIGHTINGS

    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `lit-diffusion plugins | head` just ends
    families = (SCHEDULES, WEIGHTINGS, PREDICTIONS, SAMPLERS, DECODERS)
    packages = {cls: cls.__module__.partition(".")[0] for f in families for cls in f.classes()}
    wide = max(map(len, packages.values()))
    for family in families:
        print(f"{family.base.__name__}")
        for cls in family.classes():
            summary = (cls.__doc__ or "").strip().partition("\n")[0]
            print(f"  {cls.__name__:22} {packages[cls]:{wide}} {summary}")
        print()


if __name__ == "__main__":
    main()

"""The command `lit-diffusion`, also `python -m lit_diffusion`.

This file imports nothing expensive: `--version` and `--help` are immediate, `plugins` imports
torch, and only commands that train or sample import Lightning.
"""

from __future__ import annotations

import os
import sys

try:
    HERE: str | None = os.getcwd()
except FileNotFoundError:  # it was removed
    HERE = None
# `python -m` imports from the working directory first, where a stranger's yaml.py may lie beside
# the data. Like the console script, it imports from there what --plugins names, and nothing else.
if __name__ == "__main__" and sys.path[:1] in ([""], [HERE]):
    del sys.path[0]

import difflib
import signal
import textwrap

from lit_diffusion.training.commands.table import COMMANDS

HELP = """usage: lit-diffusion COMMAND [arguments]

Train diffusion models, and know what the objective does.

commands:
{commands}

  lit-diffusion COMMAND --help              arguments of a command
  lit-diffusion fit --model.weighting.help SigmoidWeighting    arguments of a class
  lit-diffusion --version                   version
"""


def overview() -> str:
    """The help of the command line, with a line for each command."""
    lines = []
    for name, command in COMMANDS.items():
        first, *more = textwrap.wrap(command.summary, 22)
        lines.append(f"  {name:<10}{first:<24}lit-diffusion {name} {command.example}".rstrip())
        lines += [" " * 12 + line for line in more]
    return HELP.format(commands="\n".join(lines))


def main() -> None:
    """Run the command line."""
    # OpenMP threads wait for each other in a busy loop. On a machine with other busy processes
    # the awaited thread may not be running, and steps of 50 ms took up to 9 s. Sleeping after a
    # few microseconds of spinning avoids this, at no cost on an idle machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command == "--version":
        from lit_diffusion import __version__

        print(f"lit_diffusion {__version__}")
    elif command in ("-h", "--help"):
        print(overview(), end="")
    elif HERE is None:  # torch itself would fail, and take the process with it
        sys.stderr.write(
            "lit-diffusion: error: the working directory no longer exists: change to one that "
            "does, with cd.\n"
        )
        raise SystemExit(2)
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

"""All measurements of speed, one after the other, in one command.

    python benchmarks/speed.py --out speed [--device cuda] [--toy] [--only throughput sampling]

Each script runs in its own process and with a time limit, about half an hour in total; if a script
fails, it is named, and the rest continues. --out receives the results of each as JSON, its output
as text, and the traces. --toy takes seconds for each, to check that everything works on this
machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

HERE = Path(__file__).parent
PEERS = HERE.parent / ".venv-peers" / "bin" / "python"  # see peers.txt

# What each takes beside --json and --device, and what makes it small.
SCRIPTS: dict[str, tuple[str, str]] = {
    "throughput": ("--traces {out}/traces", "--toy --cases U-Net --peak_tflops 1"),
    "training_step": (
        "--compile",
        "--seconds 0 --block 0 --batch 2 --channels 8 8 --blocks 1 --contestants lit-diffusion",
    ),
    "overhead": ("", "--seconds 1 --block 2"),
    "sampling": ("", "--seconds 0 --batch_sizes 2 --steps 3"),
    "likelihood": ("", "--seconds 0 --images 2 --batch_size 2 --steps 1 --tolerance 1"),
    "ema": ("--steps 0", "--seconds 1 --tensors 20"),
    "memory": ("", "--steps 8 --every 2"),
    "startup": ("", "--seconds 0 --rounds 1 --only pass"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run them; return how many failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", default=list(SCRIPTS), choices=list(SCRIPTS))
    parser.add_argument("--toy", action="store_true", help="as small as can be")
    chosen = parser.parse_args(argv)
    chosen.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in chosen.only:
        usual, toy = SCRIPTS[name]
        words = [sys.executable, str(HERE / f"{name}.py"), "--json", f"{chosen.out / name}.json"]
        words += [word.format(out=chosen.out) for word in usual.split()]
        words += toy.split() if chosen.toy else []
        if name == "training_step" and PEERS.exists():
            words += ["--peers", str(PEERS)]
        if name != "startup":
            words += ["--device", chosen.device]
        since = time.perf_counter()
        done = subprocess.run(words, capture_output=True, text=True)
        (chosen.out / f"{name}.txt").write_text(done.stdout)
        seconds = time.perf_counter() - since
        print(done.stdout if done.returncode == 0 else f"{name} failed:\n{done.stderr[-2000:]}")
        print(f"({name}: {seconds:.0f} s)", flush=True)
        failed += done.returncode != 0
    return failed


if __name__ == "__main__":
    raise SystemExit(main())

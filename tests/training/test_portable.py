"""The training package imports where POSIX's modules and signals do not exist, as on Windows."""

import subprocess
import sys

import pytest

ELSEWHERE = """
import signal, sys
import datasets, lightning.pytorch, torchmetrics, wandb  # whose own portability is theirs
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None
for name in ("SIGUSR1", "SIGUSR2", "SIGPIPE", "SIGHUP", "SIGKILL", "SIGALRM"):
    delattr(signal, name)
import os
del os.fork
import lit_diffusion.__main__, lit_diffusion.training, lit_diffusion.training.cli
"""


@pytest.mark.slow
def test_training_imports_without_posix():
    done = subprocess.run([sys.executable, "-c", ELSEWHERE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

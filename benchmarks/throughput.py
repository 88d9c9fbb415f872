"""The speed of real runs: images per second, use of the device's peak, waits, and a trace.

    python benchmarks/throughput.py [--device cuda] [--cases DiT-XL/2 U-Net] [--traces traces]

Each case is `lit-diffusion fit` of an experiment in configs/, in its own process, compiled by
default and in bfloat16 on a GPU, with images of noise that are kept in memory. The result is what
the run logs itself (`Throughput`), the median over its log steps after the first; then ten steps
are traced. The trace shows what no log can: for what fraction of these ten steps the device was
idle, and the longest such gap.

MFU is FLOPs relative to the peak of the data sheet, with a multiply-add as two; with --peak_tflops
relative to that number, which is required on a CPU.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import yaml
from measuring import CONFIGS, arguments, machine, report
from torch.profiler import ProfilerActivity, profile

STEPS = 10  # that are traced
RESULT = "THROUGHPUT_RESULT"

TOY_DIT = [
    *("--data.batch_size=2", "--model.network.depth=2"),
    *("--model.network.width=32", "--model.network.heads=2"),
]
CASES: dict[str, dict[str, Any]] = {
    "DiT-XL/2": {
        "config": "imagenet256-latent.yaml",
        "set": ["--model.network.qk_norm=false", "--data.batch_size=128"],
        "toy": TOY_DIT,
        "target": "40 % MFU",
    },
    "DiT-B/2": {
        "config": "imagenet256-latent.yaml",
        "set": [
            "--model.network.size=B",
            "--model.network.qk_norm=false",
            "--data.batch_size=256",
        ],
        "toy": TOY_DIT,
        "target": "35 % MFU",
    },
    "U-Net": {
        "config": "cifar10.yaml",
        "set": ["--model.network.channels_last=true"],
        "toy": ["--data.batch_size=2", "--model.network.channels=[8,8]"],
        "target": "3,000 images/s",
    },
}


class Watch(L.Callback):
    """Lets a run go on for some seconds after its second log step, traces ten steps, ends it.

    Args:
        seconds: How long.
        trace: File for the trace, ending in .json.gz; None for none.
    """

    def __init__(self, seconds: float = 60.0, trace: str | None = None) -> None:
        self.seconds = seconds
        self.trace = trace
        self.since: float | None = None
        self.profile: Any = None
        self.until = 0  # the last step that was not traced

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Look at the clock, then trace, then end."""
        step = trainer.global_step
        if step < 2 * trainer.log_every_n_steps:
            return
        now = time.perf_counter()
        self.since = now if self.since is None else self.since
        if self.profile is None and now - self.since > self.seconds:
            self.until = step
            on_gpu = pl_module.device.type == "cuda"
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
            self.profile = profile(activities=activities)
            self.profile.__enter__()
        elif self.profile is not None and step >= self.until + STEPS:
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize()
            self.profile.__exit__(None, None, None)
            trainer.should_stop = True

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say what cannot be read from the log."""
        found: dict[str, Any] = {
            "until": self.until,
            "folder": trainer.log_dir,
            "parameters": sum(p.numel() for p in pl_module.parameters()),
            "batch": trainer.datamodule.batch_size,
            "most": self._most_expensive(pl_module.device.type),
        }
        if self.trace is not None:
            self.profile.export_chrome_trace(self.trace)
            with gzip.open(self.trace) as file:
                found |= idle(json.load(file)["traceEvents"])
        print(RESULT, json.dumps(found), flush=True)

    def _most_expensive(self, device: str) -> list[list[Any]]:
        name = f"self_{'device' if device == 'cuda' else 'cpu'}_time_total"
        events = self.profile.key_averages()
        total = sum(getattr(e, name) for e in events) or 1
        first = sorted(events, key=lambda e: -getattr(e, name))[:8]
        return [[e.key[:60], round(getattr(e, name) / total, 3)] for e in first]


def idle(events: Sequence[dict[str, Any]]) -> dict[str, float]:
    """For how much of its time line a GPU had nothing to do; nothing if it has none.

    Args:
        events: Of a trace in Chrome's format, times in microseconds.
    """
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in kinds)
    if not spans:
        return {}
    gaps, end = [0.0], spans[0][1]
    for start, stop in spans:
        gaps.append(max(0.0, start - end))
        end = max(end, stop)
    return {"idle": sum(gaps) / (end - spans[0][0]), "gap_ms": max(gaps) / 1e3}


def write_data(folder: Path, config: Path, n: int) -> list[str]:
    """Examples of noise in the layout that a config expects; return the arguments for them."""
    import datasets
    from PIL import Image

    data = yaml.safe_load(config.read_text())["data"]
    channels, height, width = data["shape"]
    key = data.get("image_key", "image")
    rng = np.random.default_rng(0)
    labels: dict[str, Any] = {"label": [int(k) for k in rng.integers(0, 10, n)]}
    if key == "latent":
        rows = [_npy(rng.standard_normal((channels, height, width), np.float32)) for _ in range(n)]
        features = datasets.Features(
            {key: datasets.Value("binary"), "label": datasets.Value("int64")}
        )
    else:
        rows = [
            Image.fromarray(rng.integers(0, 256, (height, width, channels), np.uint8))
            for _ in range(n)
        ]
        features = datasets.Features({key: datasets.Image(), "label": datasets.Value("int64")})
    folder.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_dict({key: rows, **labels}, features=features)
    table.to_parquet(folder / "train.parquet")
    return [
        *(f"--data.path={folder}", "--data.val_split=null", "--data.streaming=false"),
        *(f"--data.cache_dir={folder / 'decoded'}", "--data.num_workers=0"),
    ]


def _npy(numbers: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, numbers)
    return file.getvalue()


def measure(name: str, chosen: Any, folder: Path) -> dict[str, Any]:
    """Run one case; a row of the table."""
    case = CASES[name]
    config = CONFIGS / case["config"]
    trace = chosen.traces / f"{name.replace('/', '-')}.json.gz"
    ours = {
        "trainer": {
            "callbacks": [
                *({"class_path": "Compile"} for _ in range(chosen.compile)),
                {"class_path": "EMA", "init_args": {"decay": 0.9999}},
                {"class_path": "Throughput", "init_args": {"peak_tflops": chosen.peak_tflops}},
                {
                    "class_path": "throughput.Watch",
                    "init_args": {"seconds": chosen.seconds, "trace": str(trace)},
                },
            ]
        }
    }
    overlay = folder / "overlay.yaml"
    overlay.write_text(yaml.safe_dump(ours))
    words = [
        *(sys.executable, "-m", "lit_diffusion", "fit", "--plugins=throughput"),
        *("--config", str(config), "--config", str(overlay)),
        *(f"--trainer.accelerator={'gpu' if chosen.device == 'cuda' else 'cpu'}",),
        *("--trainer.devices=1", f"--trainer.precision={chosen.precision}"),
        *("--trainer.max_steps=10000000", "--data.steps_per_epoch=10000000"),
        *("--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"),
        *("--trainer.num_sanity_val_steps=0", f"--trainer.log_every_n_steps={chosen.log_every}"),
        *write_data(folder / "data", config, chosen.examples),
        *case["set"],
        *(case["toy"] if chosen.toy else []),
        *shlex.split(chosen.set),
    ]
    environment = {
        **os.environ,
        "WANDB_MODE": "disabled",
        "PYTHONPATH": str(Path(__file__).parent),
        "HF_HOME": str(folder / "hf"),
    }
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if RESULT in line]
    if done.returncode or not lines:
        raise SystemExit(f"{name} failed:\n{done.stdout[-1000:]}\n{done.stderr[-4000:]}")
    found = json.loads(lines[0].partition(RESULT)[2])
    print(f"{name}, most of the device's time: {found['most']}", flush=True)
    logged = _logged(folder / found["folder"] / "metrics.csv", found["until"])
    return {
        "network": name,
        "parameters": found["parameters"],
        "batch": found["batch"],
        "precision": chosen.precision,
        "compiled": "yes" if chosen.compile else "no",
        "step ms": logged["step_ms"],
        "images/s": logged["images_per_s"],
        "MFU": logged.get("mfu"),
        "target": case["target"],
        "data wait": logged["data_wait"],
        "peak GiB": logged.get("peak_memory_gib"),
        "idle": found.get("idle"),
        "longest gap ms": found.get("gap_ms"),
        "steps": found["until"],
    }


def _logged(path: Path, until: int) -> dict[str, float]:
    """Medians of what the run logged, without its first log step and the traced ones."""
    values: dict[str, list[float]] = {}
    with path.open() as file:
        rows = list(csv.DictReader(file))
    for row in rows[1:]:
        if int(row["step"]) > until:
            continue
        for key, value in row.items():
            if key.startswith("throughput/") and value:
                values.setdefault(key.removeprefix("throughput/"), []).append(float(value))
    return {key: statistics.median(found) for key, found in values.items()}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and print a table, and the same as JSON."""
    parser = arguments(__doc__, seconds=45)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--precision", default=None, help="bf16-mixed on a GPU, else 32-true")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--peak_tflops", type=float, default=None, help="instead of the table's")
    parser.add_argument("--examples", type=int, default=2048, help="of noise, in memory")
    parser.add_argument("--log_every", type=int, default=10, help="steps between two readings")
    parser.add_argument("--traces", type=Path, default=Path("traces"), help="folder for traces")
    parser.add_argument("--set", default="", help="further arguments of fit, as one word")
    parser.add_argument("--toy", action="store_true", help="tiny networks, for a second")
    chosen = parser.parse_args(argv)
    if chosen.toy:
        chosen.seconds, chosen.examples, chosen.log_every, chosen.compile = 1.0, 32, 1, False
    if chosen.precision is None:
        chosen.precision = "bf16-mixed" if chosen.device == "cuda" else "32-true"
    chosen.traces = chosen.traces.absolute()
    chosen.traces.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in chosen.cases:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(name, chosen, Path(folder)))
    return report("Training throughput", machine(chosen.device, ["triton"]), rows, chosen.json)


if __name__ == "__main__":
    main()

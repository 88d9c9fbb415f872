"""The benchmarks of speed, at toy size: every table is whole and sane. No time is judged here."""

import gzip
import importlib
import json
import math
from pathlib import Path

import pytest

from lit_diffusion import SAMPLERS
from lit_diffusion.samplers import HeunSampler

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """Import a benchmark by its name, as they import one another."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def run(script, tmp_path, capsys):
    """Run a benchmark; returns its JSON, whose rows are the printed table's."""

    def run(name, *words):
        path = tmp_path / "found.json"
        result = script(name).main(["--json", str(path), *map(str, words)])
        found = json.loads(path.read_text())
        assert found == json.loads(json.dumps(result))
        out = capsys.readouterr().out
        table = [line for line in out.splitlines() if line.startswith("| ")]
        assert table[0] == f"| {' | '.join(found['rows'][0])} |"
        assert len(table) >= 2 + len(found["rows"])
        assert found["title"] in out
        assert {"device", "python", "torch", "lightning"} <= set(found["machine"])
        for row in found["rows"]:
            assert list(row) == list(found["rows"][0])
            assert all(math.isfinite(n) for n in row.values() if isinstance(n, int | float)), row
        return found

    return run


def positive(row, *names):
    return all(row[name] > 0 for name in names)


TOY = ("--device", "cpu", "--seconds", 0)


def test_sampling(run):
    rows = run("sampling", *TOY, "--batch_sizes", 2, "--steps", 1, 3)["rows"]
    each = [*sorted(SAMPLERS), "AncestralSampler"]
    assert [row["sampler"] for row in rows] == 2 * each
    assert [row["steps"] for row in rows] == [1] * len(each) + [3] * len(each)
    for row in rows:
        twice = row["sampler"] == "HeunSampler"
        assert row["calls"] == (2 * row["steps"] - 1 if twice else row["steps"])
        assert positive(row, "images/s", "bare images/s", "ratio", "sampler itself, ms per call")
        assert row["rounds"] == 3
    assert [row["noise for"] for row in rows[: len(each)]] == ["batch"] * len(SAMPLERS) + ["image"]


@pytest.mark.soak
def test_sampling_compiled_in_bfloat16(run):
    words = ("--batch_sizes", 2, 3, "--steps", 2, "--compile", "--bf16")
    found = run("sampling", *TOY, *words)
    assert "compiled, bf16" in found["title"]
    assert {row["batch"] for row in found["rows"]} == {2, 3}


def test_a_sampler_that_calls_more_often_than_it_says_is_an_error(run, monkeypatch):
    monkeypatch.setattr(HeunSampler, "calls_per_step", 1)
    with pytest.raises(AssertionError, match=r"HeunSampler.* states 3 calls, made 5"):
        run("sampling", *TOY, "--batch_sizes", 2, "--steps", 3)


@pytest.mark.slow
def test_likelihood(run):
    words = ("--images", 3, "--batch_size", 2, "--steps", 2, "--tolerance", 1)
    rows = run("likelihood", *TOY, *words)["rows"]
    assert [row["calls per batch"] for row in rows[:-1]] == [1, 2, 1, 8]
    assert [row["each"] for row in rows] == ["forward"] * 3 + ["and back"] * 2
    assert rows[-1]["calls per batch"] >= 7  # the first, and six for a step
    assert all(positive(row, "images/s", "bare images/s", "ratio", "rounds") for row in rows)
    assert all(positive(row, "itself, ms per call") for row in rows[:-1])
    assert rows[-1]["itself, ms per call"] is None


def test_an_estimator_that_calls_more_often_than_is_said_is_an_error(run, script, monkeypatch):
    likelihood = script("likelihood")
    estimators = [e._replace(calls=1) for e in likelihood.estimators(2, 1.0)]
    monkeypatch.setattr(likelihood, "estimators", lambda *_: estimators)
    with pytest.raises(
        AssertionError, match=r"DiscretizedGaussianDecoder: expected 1 calls .* made \[2, 2\]"
    ):
        run("likelihood", *TOY, "--images", 2, "--batch_size", 1)


@pytest.mark.slow
def test_startup(run):
    words = ("--rounds", 1, "--seconds", 0, "--only", "pass", "lit-diffusion --help")
    found = run("startup", *words)
    assert [row["command"] for row in found["rows"]] == ["pass", "lit-diffusion --help"]
    for row in found["rows"]:
        assert row["seconds"] > 0
        assert row["user"] + row["system"] > 0  # how the two share so little is the kernel's guess
        assert row["min"] <= row["seconds"] <= row["max"]
        assert row["rounds"] == 1
    imports = {row["package"]: row for row in found["imports"]}
    assert all(row["ms"] >= row["own ms"] - 0.5 for row in found["imports"])
    assert [row["ms"] for row in found["imports"]] == sorted(
        (row["ms"] for row in found["imports"]), reverse=True
    )
    assert imports["lit_diffusion"]["by"] == "–"
    assert imports["lightning"]["by"].startswith("lit_diffusion.training.")
    # What only some commands need is imported by them, and nothing large by us.
    assert not {"datasets", "wandb", "diffusers"} & set(imports)
    ours = {name for name, row in imports.items() if row["by"].startswith("lit_diffusion")}
    assert not {"torch_fidelity", "torchmetrics", "torchvision", "matplotlib", "PIL"} & ours


def test_every_command_that_is_timed_is_one(script):
    """None of them ends with an error, and the names say what is run."""
    from lit_diffusion.training.commands.table import COMMANDS

    for name, words in script("startup").commands("demo.py").items():
        if name.startswith("lit-diffusion"):
            said, done = name.split()[1:], words[2:]
            assert words[:2] == ["-m", "lit_diffusion"]
            assert done[: len(said)] == said
            assert said[0].startswith("--") or said[0] in COMMANDS


def test_imports_are_told_apart(script, tmp_path, monkeypatch):
    """A module's time is its package's; what it imports counts once, and names who asked."""
    for name, text in {
        "outer/__init__": "import outer.part",
        "outer/part": "import inner_a, inner_b",
        "inner_a": "",
        "inner_b": "import inner_a",
    }.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    rows = {row["package"]: row for row in script("startup").imports("import outer")}
    assert rows["outer"]["by"] == "–"
    assert rows["inner_a"]["by"] == rows["inner_b"]["by"] == "outer.part"
    parts = sum(rows[name]["own ms"] for name in ("outer", "inner_a", "inner_b"))
    assert rows["outer"]["ms"] == pytest.approx(parts, abs=0.05)


@pytest.mark.soak  # three processes
def test_memory(run):
    small = ("--model.network.channels=[8,8]", "--model.network.attention=[]")
    words = ("--device", "cpu", "--steps", 16, "--every", 2)
    found = run("memory", *words, "--", "--trainer.callbacks=[]", *small)
    assert [row["run"] for row in found["rows"]] == ["bare loop", "fit", "fit, 4 validations"]
    for row, told in zip(found["rows"], found["runs"].values(), strict=True):
        assert row["memory"] == "resident"
        assert told["steps"] == list(range(2, 17, 2))
        seen = told["seen"]["resident"]
        assert len(seen) == 8
        assert row["peak"] >= max(seen) - 1 >= row["before"] / 2 > 20  # torch alone is more
        assert positive(row, "growth", "peak relative to bare", "growth relative to bare")
    assert found["rows"][0]["peak relative to bare"] == 1


def test_the_slope_of_a_memory_that_grows(script):
    """Of 8 MiB for each 1,000 steps from a quarter on, and of nothing before."""
    steps = list(range(100, 2100, 100))
    seen = [500.0 if step <= 500 else 500 + (step - 500) * 0.008 for step in steps]
    told = {"before": {"resident": 400.0}, "most": {"resident": 520.0}, "steps": steps}
    base = {"before": {"resident": 400.0}, "most": {"resident": 500.0}}
    row = script("memory").summary("fit", "resident", {**told, "seen": {"resident": seen}}, base)
    assert row["per 1,000 steps"] == pytest.approx(8.0)
    assert row["last minus first quarter"] == pytest.approx((1800 - 500) * 0.008)
    assert (row["growth"], row["growth relative to bare"]) == (120.0, 1.2)
    assert row["peak relative to bare"] == pytest.approx(1.04)


@pytest.mark.slow
def test_throughput(run, tmp_path):
    words = ("--device", "cpu", "--toy", "--cases", "U-Net", "--peak_tflops", 0.5)
    found = run("throughput", *words, "--traces", tmp_path / "traces")
    (row,) = found["rows"]
    assert row["network"] == "U-Net"
    assert positive(row, "parameters", "step ms", "images/s", "MFU", "peak GiB", "steps")
    assert row["images/s"] == pytest.approx(row["batch"] / row["step ms"] * 1e3, rel=0.2)
    assert 0 <= row["data wait"] < 1
    assert row["idle"] is None  # of a GPU
    with gzip.open(tmp_path / "traces" / "U-Net.json.gz") as file:
        names = {event.get("name", "") for event in json.load(file)["traceEvents"]}
    assert any("convolution" in name for name in names)


def test_idle_is_what_no_kernel_covers(script):
    """Two streams overlap; what the host does is not the device's."""

    def event(kind, start, stop):
        return {"cat": kind, "ts": start, "dur": stop - start}

    events = [
        event("kernel", 0, 1000),
        event("gpu_memcpy", 500, 2000),  # beside the kernel
        event("cpu_op", 0, 9000),
        event("kernel", 600, 700),  # within
        event("kernel", 5000, 6000),
        event("kernel", 6500, 10_000),
        {"name": "no span"},
    ]
    found = script("throughput").idle(events)
    assert found == {"idle": pytest.approx(0.35), "gap_ms": pytest.approx(3.0)}
    assert script("throughput").idle([event("cpu_op", 0, 1)]) == {}


def test_averages(run):
    rows = run("ema", "--device", "cpu", "--seconds", 0, "--steps", 0, "--tensors", 3)["rows"]
    assert [row["elements in each"] for row in rows] == [
        n for n in (100, 1000, 10_000) for _ in "1234"
    ]
    assert all(positive(row, "ms", "one call over it") for row in rows)


@pytest.mark.slow
def test_one_command_runs_them_all_and_names_what_failed(script, tmp_path, monkeypatch, capsys):
    speed = script("speed")
    assert all((BENCHMARKS / f"{name}.py").is_file() for name in speed.SCRIPTS)
    words = ["--out", str(tmp_path), "--device", "cpu", "--toy", "--only"]
    assert speed.main([*words, "ema"]) == 0
    assert json.loads((tmp_path / "ema.json").read_text())["rows"]
    assert "One update of an average" in (tmp_path / "ema.txt").read_text()
    monkeypatch.setitem(speed.SCRIPTS, "ema", ("--unheard-of", ""))
    assert speed.main([*words, "ema"]) == 1
    assert "ema failed" in capsys.readouterr().out


def test_the_words_of_the_one_command_are_understood(script):
    """What is too long to be run here is at least what its script takes."""
    speed = script("speed")
    for name, (usual, toy) in speed.SCRIPTS.items():
        known = (BENCHMARKS / f"{name}.py").read_text() + (BENCHMARKS / "measuring.py").read_text()
        for word in (usual + " " + toy).split():
            if word.startswith("--"):
                assert f'"{word}"' in known, (name, word)

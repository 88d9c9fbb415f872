"""The contest of training steps, at toy size: whole and sane. No time is judged here."""

import importlib
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TOY = (
    *("--device", "cpu", "--seconds", "0", "--block", "0.01", "--image", "3", "8", "8"),
    *("--channels", "8", "16", "--blocks", "1", "--attention", "4", "--batch", "2"),
)


@pytest.fixture
def script(monkeypatch):
    """Import a benchmark by its name, as they import one another."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return importlib.import_module


@pytest.fixture
def task(script):
    return script("peers.task").Task((3, 8, 8), (8, 16), 1, (4,), 2, "cpu", "32", False, False)


@pytest.mark.slow
def test_ours_against_diffusers_beside_one_that_is_missing_and_one_that_is_broken(
    script, tmp_path, capsys, monkeypatch
):
    contest = script("training_step")
    # Neither is a contestant: the one imports what is not there, the other cannot train.
    monkeypatch.setitem(contest.CONTESTANTS, "k-diffusion", "no_such_module")
    monkeypatch.setitem(contest.CONTESTANTS, "denoising-diffusion-pytorch", "task")
    path = tmp_path / "found.json"
    assert contest.main([*TOY, "--json", str(path)]) == 1  # since one is broken
    found, out = json.loads(path.read_text()), capsys.readouterr().out

    rows = {row["contestant"]: row for row in found["rows"]}
    assert list(rows) == ["bare loop", "lit-diffusion", "diffusers"] == list(found["contestants"])
    assert found["notes"] == [
        "denoising-diffusion-pytorch failed: AttributeError: module 'peers.task' has no "
        "attribute 'train'",
        "k-diffusion: not installed (no module peers.no_such_module)",
    ]
    assert all(note in out for note in found["notes"])
    assert found["title"] in out
    assert [line for line in out.splitlines() if line.startswith("| contestant |")]
    for name, row in rows.items():
        assert f"\n| {name} |" in out
        for key, value in row.items():
            if key not in ("contestant", "library"):
                assert math.isfinite(value), (name, key)
                assert value > 0 or key == "peak MiB", (name, key)
        assert row["rounds"] == contest.LEAST_ROUNDS
        assert row["images/s"] == pytest.approx(2e3 / row["ms/step"])
        assert found["contestants"][name]["torch"] == torch.__version__
    assert rows["lit-diffusion"]["fit is × as fast"] == 1
    assert rows["bare loop"]["bare is × as fast"] == 1
    # The same network for all three: ours twice, and diffusers' layer for layer, but for the
    # embedding of the noise level and what our enlarging saves.
    ours = rows["bare loop"]
    for name, near, more in (("lit-diffusion", 0, 1), ("diffusers", 0.05, 1.1)):
        assert rows[name]["parameters"] == pytest.approx(ours["parameters"], rel=near)
        assert 1 <= rows[name]["GFLOP/image"] / ours["GFLOP/image"] <= more
    assert rows["diffusers"]["library"].startswith("diffusers ")


def test_a_worker_that_dies_in_the_middle_is_a_sentence(script, task):
    contest = script("training_step")
    worker = contest.Worker("ours", "bare_loop", task, sys.executable)
    assert worker.train(2) > 0
    worker.process.kill()
    worker.process.wait()
    with pytest.raises(contest.ContestantError, match=r"^ours failed: .+$"):
        worker.train(2)


def test_an_interpreter_that_is_not_there(script, capsys):
    with pytest.raises(SystemExit) as stopped:
        script("training_step").main([*TOY, "--peers", "no/such/python"])
    assert stopped.value.code == 2
    assert "--peers: expected the interpreter" in capsys.readouterr().err


def test_the_nearest_network_has_our_parameters_and_then_our_operations(script, task):
    sizes = script("peers.task")

    def build(width, stride):
        return torch.nn.Conv2d(3, width, 3, stride=stride, bias=False)  # 27 parameters a feature

    def forward(network, z):
        return network(z)

    like = sizes.measure(build(100, 1), forward, task)
    assert like.parameters == 2700
    assert like.flops == 2 * 2 * 2700 * 36  # forward, and by the weights; 6×6 places
    wanted = sizes.Task(**{**asdict(task), **like._asdict()})
    # 400 features at every second place are our operations exactly, with too many parameters.
    near = [{"width": w, "stride": s} for w in (50, 99, 101, 400) for s in (2, 1)]
    chosen, size = sizes.nearest(wanted, near, build, forward)
    assert chosen["stride"] == 1  # of the four within two per cent
    assert abs(chosen["width"] - 100) == 1
    assert size == sizes.measure(build(**chosen), forward, task)
    far = [{"width": w, "stride": s} for w in (50, 120) for s in (1, 2)]
    assert sizes.nearest(wanted, far, build, forward)[0]["width"] == 120


def test_a_turn_lasts_until_the_next_number_is_asked_for(script, tmp_path, monkeypatch):
    worker = script("peers.worker")
    clock = iter([10.0, 13.0, 20.0, 21.0])
    monkeypatch.setattr(worker.Turns, "_now", lambda self: next(clock))
    asked, answers = tmp_path / "asked", tmp_path / "answers"
    asked.write_text("4\n1\n")
    with asked.open() as a, answers.open("w") as b:
        assert list(worker.Turns("cpu", a, b)) == [4, 1]
    said = [json.loads(line) for line in answers.read_text().splitlines()]
    assert said == [{"seconds": 3.0}, {"seconds": 1.0}]

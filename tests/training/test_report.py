"""The run folder as a page: what is on it, what is not, and how a real browser shows it."""

import csv
import json
import os
import platform
import re
import shutil
import signal
import socket
from html.parser import HTMLParser
from importlib import resources
from itertools import pairwise
from pathlib import Path

import browser
import pytest
import torch
from PIL import Image
from test_cli import CONFIGS, FAST, fit, run_folder

from lit_diffusion.training import cli as command_line
from lit_diffusion.training.commands import fit as fit_command
from lit_diffusion.training.reporting import parts
from lit_diffusion.training.reporting.parts import LARGE
from lit_diffusion.training.reporting.write import write_report
from lit_diffusion.training.run.environment import begin_session, end_session, read_sessions
from lit_diffusion.training.run.measurements import Measurement, add_measurements

VOID = {"meta", "link", "img", "br", "line", "circle", "polyline", "rect", "image"}
NASTY = "<script>document.title = 1</script>"
EVALUATION = {
    "version": 1,
    "checkpoint": {"file": f"digits/{NASTY}/last.ckpt", "sha256": "ab", "step": 4},
    "weights": "EMA",
    "reference": {
        "examples": 1500, "data": "digits8x8", "split": "train", "hash": "1234",
        "features": "Classifier", "features hash": "5678", "resize": "none",
    },
    "baseline": 2.0,
    "scores": [
        {
            "sampler": "DDIMSampler", "steps": 5, "network calls": 10, "seeds": [0],
            "scores": {"fid": {"mean": 31.75, "error": None, "values": [31.75], "protocol": {}}},
            "protocol": {"samples": 9},
        }
    ],
    "bound": [],
}  # fmt: skip


class Page(HTMLParser):
    """A page as a parser sees it, with what it would fetch; refuses tags that do not match."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.sources, self.words = [], [], [], []
        text = path.read_text(encoding="ascii")
        self.feed(text)
        assert not self.open, self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.sources += [v for k, v in attributes if k in ("src", "href", "srcset", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def heads(self):
        return re.findall(r"#[\w-]+", " ".join(self.sources))


def overlay(folder):
    """Callbacks that cost little: a FID would draw fifteen hundred images."""
    path = folder / "callbacks.yaml"
    path.write_text(
        "trainer:\n  callbacks:\n    - class_path: EMA\n    - class_path: LastCheckpoint\n"
        "    - class_path: SampleGrid\n    - class_path: Likelihood\n"
        "    - {class_path: NoiseLevelLoss, init_args: {bins: 5, probe_every_n_steps: 2}}\n"
    )
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A real run, made once: two validations, the bound, noise levels, samples."""
    folder = tmp_path_factory.mktemp("trained")
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    words = ["fit", "--config", CONFIGS / "digits.yaml", "--config", overlay(folder), *FAST]
    words += ["--trainer.max_steps=4"]
    patch.setattr("sys.argv", ["lit-diffusion", *map(str, words)])
    command_line.main()
    (run,) = folder.glob("runs/digits/*")
    yield run
    patch.undo()


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the real run, to spoil."""
    copy = tmp_path / "runs" / "digits" / trained.name
    shutil.copytree(trained, copy)
    return copy


def noise(path, side=64):
    """A picture that does not compress."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.randint(0, 256, (side, side, 3), dtype=torch.uint8).numpy()
    Image.fromarray(pixels).save(path)


def fill(run):
    """Give a run all that a run may have."""
    for step in range(10, 300, 10):
        noise(run / "samples" / f"step-{step:07d}.png")
    protocol = {"reference": {"split": "test", "features": "F"}, "samples": 9, "who": NASTY}
    new = [Measurement("fid", 12.5, 0.25, 4, "val", protocol)]
    add_measurements(run, [*new, Measurement("fid", 31.75, None, 4, "evaluate", protocol)])
    with (run / "bad_examples.csv").open("w", newline="") as file:
        rows = [["split", "file", "row"], ["train", f"/home/ann/{NASTY}.parquet", 3]]
        csv.writer(file).writerows(rows)
    (run / "non_finite").mkdir()
    (run / "non_finite" / "step-0000007.json").write_text('{"step": 7, "not_finite": "loss"}')
    (run / "evaluation").mkdir()
    (run / "evaluation" / "evaluation.json").write_text(json.dumps(EVALUATION))
    noise(run / "evaluation" / "evaluation.png", 400)
    noise(run / "objective.png", 1200)
    lines = (run / "metrics.csv").read_text().splitlines()
    added = ["throughput/images_per_s,lr-AdamW", *["123456.0,0.001"] * (len(lines) - 1)]
    both = [f"{line},{more}" for line, more in zip(lines, added, strict=True)]
    (run / "metrics.csv").write_text("\n".join(both) + "\n")


ALL = [
    *("Samples over time", "Loss", "Loss by noise level", "Objective", "Bound", "Evaluation"),
    *("Throughput", "Other numbers", "Problems", "Config", "Environment"),
]


# In a real browser ----------------------------------------------------------------------------


def test_a_browser_shows_all_of_it(run, tmp_path):
    fill(run)
    page = write_report(run)
    alone = shutil.copy(page, tmp_path / "alone.html")  # nothing beside it is needed
    (phone, desk), complaints = browser.look(alone, (360, 1280))
    assert not complaints
    for shown in (phone, desk):
        assert shown["sections"] == ALL
        assert len(shown["images"]) == 12 + 1  # samples, evaluation
        assert all(alt and natural > 0 and width > 0 for alt, natural, width in shown["images"])
        assert shown["charts"] >= 10
        assert shown["width"] <= shown["room"]  # the page itself never scrolls sideways
        assert shown["smallest"] >= 10  # pixels, of any text
        assert not [name for name in shown["fetched"] if not name.startswith("data:")]
        assert shown["mode"] == "CSS1Compat"
    assert phone["room"] <= 360
    assert page.stat().st_size < 3e6


def test_the_browser_test_can_fail(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        '<!DOCTYPE html><p style="width:700px;font-size:6px">wide</p>'
        '<img src="data:image/png;base64,AAAA" alt="broken"><script>console.error("so")</script>'
    )
    (phone,), complaints = browser.look(page, (360,))
    assert phone["width"] > phone["room"]
    assert phone["images"][0][1] == 0
    assert phone["smallest"] == 6
    assert any("so" in line for line in complaints)


# What is on the page --------------------------------------------------------------------------


def test_fit_ends_with_a_report(trained):
    page = Page(trained / "report.html")
    loss = list(csv.DictReader((trained / "metrics.csv").read_text().splitlines()))[-1]["val/loss"]
    bits = json.loads((trained / "metrics.json").read_text())
    bits = [one["value"] for one in bits if one["name"] == "bpd"][-1]
    assert f"{float(loss):.4g}" in page.text
    assert f"{bits:.4g}" in page.text
    assert "diffusion" in page.text
    assert "Training on this objective maximises the ELBO of the data themselves." in page.text
    (session,) = read_sessions(trained)
    assert session["outcome"] == "finished"
    assert session["steps"] == 4
    assert session["torch"] == torch.__version__.partition("+")[0]
    assert session["device"] == "cpu"
    for told in (session["started"][:10], session["python"], session["lightning"], "finished"):
        assert told in page.text
    assert "could not be rendered" not in page.text
    assert trained.name in page.text


def test_it_needs_nothing_else(run):
    fill(run)
    page = Page(write_report(run))
    assert {s.partition(",")[0] for s in page.sources if not s.startswith("#")} <= {
        "data:image/png;base64", "data:image/jpeg;base64", "data:",
    }  # fmt: skip
    text = (run / "report.html").read_text()
    assert "script" not in {tag for tag, _ in page.tags}
    assert "@import" not in text
    assert "url(" not in text
    ids = [given["id"] for _, given in page.tags if "id" in given]
    assert len(set(ids)) == len(ids)
    assert {head[1:] for head in page.heads} <= set(ids)
    linked = [given["href"][1:] for tag, given in page.tags if tag == "a"]
    assert set(linked) <= set(ids)


def test_what_files_say_is_escaped_and_names_nobody(run, monkeypatch):
    fill(run)
    home = "/srv/people/dora"
    monkeypatch.setenv("HOME", home)
    config = (run / "config.yaml").read_text().replace("path: digits8x8", f"path: {home}/data")
    assert f"{home}/data" in config
    config += f"\n# {NASTY} /home/ann/x /Users/ben/y 'C:\\Users\\cleo\\z' /root/x\n"
    (run / "config.yaml").write_text(config)
    text = write_report(run).read_text()
    page = Page(run / "report.html")
    assert NASTY not in text
    assert page.text.count(NASTY) >= 3  # shown, as text: the protocol, the bad file, the config
    assert page.text.count("~/data") >= 1
    hosts = {socket.gethostname(), platform.node()}
    for secret in ("dora", "/home/", "/Users/", "cleo", "ann/", "/root/", *filter(None, hosts)):
        assert secret not in page.text, secret


def test_samples_are_few_the_first_and_the_last_among_them(run):
    fill(run)
    page = Page(write_report(run))
    alts = [given["alt"] for tag, given in page.tags if tag == "img"]
    steps = [int(alt.split()[2]) for alt in alts if alt.startswith("Samples after")]
    assert len(steps) == 12
    assert steps == sorted(set(steps), reverse=True)  # the newest first
    grids = sorted(int(p.stem[5:]) for p in (run / "samples").glob("step-*.png"))
    assert (steps[0], steps[-1]) == (grids[-1], grids[0])
    assert max(a - b for a, b in pairwise(steps)) <= 30
    assert f"Shown are 12 of {len(grids)}" in page.text


def test_large_pictures_are_made_smaller(run):
    grid = run / "samples" / "step-0000009.png"
    noise(grid, 1200)
    assert grid.stat().st_size > 10 * LARGE
    page = Page(write_report(run))
    (given,) = [g for tag, g in page.tags if tag == "img" and g["src"].startswith("data:image/j")]
    assert int(given["width"]) == 1000
    assert (run / "report.html").stat().st_size < 3e6


def test_the_headline_is_the_last_of_the_runs_own_validation(run):
    fill(run)
    add_measurements(run, [Measurement("fid", 98.765, None, 2, "val", {"samples": 3})])
    for split, shown in (("another", ""), ("test", " baseline 1.25")):
        about = {"reference": {"split": split, "features": "F"}}
        add_measurements(run, [Measurement("fid_baseline", 1.25, None, 4, "val", about)])
        page = Page(write_report(run))
        head = page.text.partition("Samples over time")[0]
        said = "Fréchet distance 12.5 ± 0.25, val at step 4 9 samples, F, against split test"
        assert f"{said}{shown} protocol" in head
    assert "98.7" not in head
    assert "31.7" not in head
    assert "Fréchet distance, measured in validation" in page.text


def test_a_run_that_has_hardly_anything(tmp_path):
    for name, text in (
        ("config.yaml", "name: bare\n"),
        ("metrics.csv", "epoch,step,train/loss\n0,0,1.5\n0,"),
        ("environment.json", "[]"),
    ):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text(text)
        page = Page(write_report(folder))
        assert "could not be rendered" not in page.text, page.text
        assert "Not recorded." in page.text
        shown = "#loss" in page.heads
        assert shown == (name == "metrics.csv")


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("noise_levels.csv", "Loss by noise level"),
        ("metrics.json", "Evaluation"),
        ("samples/step-0000002.png", "Samples over time"),
        ("non_finite/step-0000007.json", "Problems"),
    ],
)
def test_a_damaged_file_costs_its_section_only(run, name, section):
    fill(run)
    path = run / name
    path.write_bytes(path.read_bytes()[:7] + b"\xff\xfe, cut")
    page = Page(write_report(run))
    assert page.text.count("could not be rendered") == (2 if name == "metrics.json" else 1)
    after = page.text.rpartition(section)[2]
    assert "could not be rendered" in after
    assert "Environment" in after


def test_a_run_in_progress_can_be_reported(run):
    sessions = read_sessions(run)
    sessions[0] |= {"ended": None, "outcome": None, "steps": None}
    sessions[0]["started"] = "2020-01-01T00:00:00+00:00"
    (run / "environment.json").write_text(json.dumps(sessions))
    with (run / "metrics.csv").open("a") as file:
        file.write("3,41,0.5")  # a row that is being written
    os.utime(run / "metrics.csv", (1577836800 + 3720,) * 2)  # 2020-01-01, 1 h 2 min later
    page = Page(write_report(run))
    assert "running, or killed" in page.text
    assert "wall time at least 1 h 2 min" in page.text
    assert "could not be rendered" not in page.text
    assert re.search(r"\bsteps 4\b", page.text)


def test_the_evaluation_is_read_from_its_json(run):
    fill(run)
    (run / "evaluation" / "evaluation.md").write_text("# Not read back\n")
    page = Page(write_report(run))
    assert "9 samples for each of 1 seed(s), weights: EMA, against the 1500 examples" in page.text
    assert "DDIMSampler 5 10 31.75" in page.text
    assert "the samples are at 15.88 times that distance" in page.text
    assert "Not read back" not in page.text
    later = EVALUATION | {"version": 2}
    (run / "evaluation" / "evaluation.json").write_text(json.dumps(later))
    assert "in version 1 at most, got 2: update" in Page(write_report(run)).text


def test_templates_and_style_are_part_of_the_package():
    """They are found as package data, which is how an installed wheel has them."""
    folder = resources.files("lit_diffusion.training.reporting") / "templates"
    names = {file.name for file in folder.iterdir()}
    kinds = {kind.__name__.lower() for kind in parts.Part.__subclasses__()}
    assert {"page.html", "style.css", *(f"{kind}.html" for kind in kinds)} <= names
    for name in names:
        file = folder.joinpath(name)
        assert "|safe" not in file.read_text(encoding="utf-8").replace(" ", "").replace(
            "part.source|safe", ""
        ).replace("figure|safe", ""), name


# The machine that trained ---------------------------------------------------------------------


def test_sessions_add_up(tmp_path):
    run = tmp_path / "run"
    for steps in (5, 9):
        begin_session(run, torch.device("cpu"), 1, "32-true")
        end_session(run, "finished", steps)
    sessions = read_sessions(run)
    for i, session in enumerate(sessions):
        session["started"] = f"2020-01-0{i + 1}T00:00:00+00:00"
        session["ended"] = f"2020-01-0{i + 1}T02:30:05+00:00"
    sessions[0]["device"] = "another machine"
    (run / "environment.json").write_text(json.dumps(sessions))
    page = Page(write_report(run))
    assert "wall time 5 h 0 min" in page.text
    assert "resumed 1 ×" in page.text
    assert re.search(r"device another machine cpu\b", page.text)
    assert re.search(r"\bsteps 9\b", page.text)
    assert not {socket.gethostname()} & set(re.split(r"[\s\"]+", json.dumps(sessions)))


def test_a_resumed_run_has_two_sessions_and_a_new_report(cli, run, monkeypatch):
    first = (run / "report.html").read_text()
    words = ["--trainer.max_steps=6", "--ckpt_path=last"]
    code, out, err = fit(cli, CONFIGS / "digits.yaml", overlay(Path()), extra=words)
    assert code == 0, err
    assert run_folder(out).resolve() == run
    assert [one["steps"] for one in read_sessions(run)] == [4, 6]
    assert (run / "report.html").read_text() != first
    assert re.search(r"\bsteps 6\b", Page(run / "report.html").text)


@pytest.mark.slow
def test_the_report_is_named_before_the_run_folder(cli):
    code, out, err = fit(cli, CONFIGS / "digits.yaml", overlay(Path()))
    assert code == 0, err
    folder = run_folder(out)
    assert out.splitlines()[-2] == f"Report: {folder / 'report.html'}"
    words = ["--config", CONFIGS / "digits.yaml", "--config", "callbacks.yaml", *FAST]
    code, out, _ = cli("validate", *words, "--ckpt_path=last")
    assert code == 0
    assert "Report:" not in out
    assert len(list(Path("runs").glob("*/*/report.html"))) == 1


@pytest.mark.filterwarnings("ignore:the environment of", "ignore:the report of")
def test_a_failing_report_fails_no_run(cli, monkeypatch):
    def broken(*args):
        raise OSError("no room")

    monkeypatch.setattr(fit_command, "write_report", broken)
    monkeypatch.setattr(fit_command, "begin_session", broken)
    code, out, err = fit(cli, CONFIGS / "digits.yaml", overlay(Path()))
    assert code == 0, err
    folder = run_folder(out)
    assert "Report:" not in out
    warnings = [line for line in err.splitlines() if line.startswith("Warning: ")]
    assert len(warnings) == 2
    assert all("no room" in line for line in warnings)
    assert not (folder / "report.html").exists()


@pytest.mark.filterwarnings("ignore:SIGINT. step . is saved")
def test_a_run_that_is_stopped_leaves_a_report(cli, tmp_path, monkeypatch):
    (tmp_path / "stops.py").write_text(
        "import os, signal\nimport lightning as L\n"
        "class Stops(L.Callback):\n"
        "    def on_validation_end(self, trainer, pl_module):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "stops.yaml").write_text(
        "plugins: [stops]\ntrainer:\n  callbacks+:\n    - class_path: stops.Stops\n"
    )
    # In the background of a shell the tests would inherit that it is ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        configs = (CONFIGS / "digits.yaml", overlay(tmp_path), tmp_path / "stops.yaml")
        code, _, _ = fit(cli, *configs, extra=["--trainer.max_steps=6"])
    finally:
        signal.signal(signal.SIGINT, handler)
    assert code == 130
    (page,) = Path("runs").glob("digits/*/report.html")
    assert "state stopped by Ctrl-C" in Page(page).text
    assert read_sessions(page.parent)[0]["ended"]


# The command ----------------------------------------------------------------------------------


def test_the_command_writes_where_it_is_told(cli, run, tmp_path):
    code, out, err = cli("report", run, "--out", tmp_path / "new" / "page.html")
    assert code == 0, err
    assert out.strip() == str(tmp_path / "new" / "page.html")
    assert Page(tmp_path / "new" / "page.html").text
    (run / "report.html").unlink()
    older = run.parent.parent / "other" / "2000-01-01_00-00-00"
    shutil.copytree(run, older)
    os.utime(older / "metrics.csv", (1, 1))
    code, out, err = cli("report", "last")
    assert code == 0, err
    assert Path(out.strip()).resolve() == run / "report.html"
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "required: run"),
        (["RUN", "RUN"], "one argument too many"),
        (["."], "is not a run folder"),
        (["nowhere"], "is not a run folder"),
        (["last"], "there is no checkpoint below runs"),
        (["RUN", "--out", "page.png"], "--out must be an .html file, got page.png"),
        (["RUN", "--out", "folder.html"], "--out must be an .html file"),
    ],
)
def test_mistakes_are_one_line(cli, trained, tmp_path, words, said):
    (tmp_path / "folder.html").mkdir()
    before = (trained / "report.html").stat().st_mtime_ns
    code, out, err = cli("report", *(trained if word == "RUN" else word for word in words))
    assert code == 2
    assert not out
    assert len(err.splitlines()) == 1
    assert said in err
    assert [p.name for p in tmp_path.rglob("*")] == ["folder.html"]
    assert (trained / "report.html").stat().st_mtime_ns == before


def test_it_is_written_whole_or_not_at_all(run, monkeypatch):
    before = (run / "report.html").read_text()

    def half(path, contents):
        Path.write_text(path, contents.decode()[:100])
        raise OSError("no room")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="no room"):
        write_report(run)
    assert (run / "report.html").read_text() == before
    assert not list(run.rglob("*.tmp"))


def test_a_run_of_many_starts_shows_the_first_and_the_newest(cli, run, tmp_path):
    folder = tmp_path / "many"
    shutil.copytree(run, folder)
    (first,) = json.loads((folder / "environment.json").read_text())
    sessions = [first | {"device": f"device {i}"} for i in range(7)]
    (folder / "environment.json").write_text(json.dumps(sessions))
    assert cli("report", folder)[0] == 0
    text = Page(folder / "report.html").text
    assert [i for i in range(7) if f"device {i}" in text] == [0, 4, 5, 6]
    assert "3 more sessions are in environment.json" in text

"""The command line, as a user types it: every config, every mistake, the run folder."""

import csv
import io
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import warm
import yaml

from lit_diffusion import SCHEDULES
from lit_diffusion.training import LitDiffusion
from lit_diffusion.training.run.checkpoints import load_checkpoint

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
OBJECTIVES = sorted((CONFIGS / "objective").glob("*.yaml"))
FAST = [
    "--trainer.max_steps=2",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.log_every_n_steps=1",
    "--data.steps_per_epoch=2",
    "--data.batch_size=4",
    "--data.val_examples=6",
    "--data.num_workers=0",
    "--model.sampler.steps=2",
    "--model.network.channels=[8,8]",
    "--model.network.attention=[]",
    "--model.network.blocks=1",
]


def fit(cli, *configs, extra=()):
    words = [word for config in configs for word in ("--config", config)]
    return cli("fit", *words, *FAST, *extra)


def run_folder(out):
    line = out.strip().splitlines()[-1]
    assert line.startswith("Run folder: runs/")
    return Path(line.removeprefix("Run folder: "))


# Every config ---------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["digits", "mnist", "cifar10", "imagenet64"])
def test_base_config_runs(cli, base, rgb, rgb64, grey):
    data = {"digits": "digits8x8", "mnist": grey, "cifar10": rgb, "imagenet64": rgb64}[base]
    extra = [f"--data.path={data}", "--data.val_split=test"]
    code, out, err = fit(cli, CONFIGS / f"{base}.yaml", extra=extra)
    assert code == 0, err
    folder = run_folder(out)
    assert folder.parts[:2] == ("runs", base)
    model = LitDiffusion.load_from_checkpoint(folder / "checkpoints" / "last.ckpt")
    assert model.denoiser.network.shape == model.shape  # the one link


def test_every_overlay_is_a_published_objective():
    assert {path.stem for path in OBJECTIVES} == {
        "ddpm", "iddpm", "vdm", "edm", "v-cosine", "flow-matching", "indi", "p2", "min-snr",
        "sigmoid", "edm-monotonic", "sd3", "jit",
    }  # fmt: skip


RANGES = {"ddpm": (-10.1177, 9.21024), "p2": (-10.1177, 9.21024), "vdm": (-5.0, 13.3)}


@pytest.mark.parametrize("overlay", OBJECTIVES, ids=lambda path: path.stem)
def test_objective_runs_and_is_itself(cli, overlay):
    code, out, err = fit(cli, CONFIGS / "digits.yaml", overlay)
    assert code == 0, err
    folder = run_folder(out)
    model = LitDiffusion.load_from_checkpoint(folder / "checkpoints" / "last.ckpt")
    schedule = model.loss.schedule
    expected = RANGES.get(overlay.stem, (-20.0, 20.0))
    # The ends of VDM's schedule have been learning for two steps.
    assert schedule.ends == pytest.approx(expected, abs=0.05 if schedule.learns_ends else 1e-3)
    named = yaml.safe_load(overlay.read_text())["model"]

    def name(value):
        return value if isinstance(value, str) else value["class_path"]

    assert type(schedule).__name__ == name(named["schedule"])
    assert type(model.loss.weighting).__name__ == name(named["weighting"])
    assert type(model.denoiser.prediction).__name__ == name(named["prediction"])
    assert type(model.sampler).__name__ == name(named["sampler"])
    config = yaml.safe_load((folder / "config.yaml").read_text())
    callbacks = [c["class_path"].rpartition(".")[2] for c in config["trainer"]["callbacks"]]
    assert callbacks == ["EMA", "Likelihood", "FID", "SampleGrid", "LastCheckpoint"]


@pytest.mark.parametrize("base", ["mnist", "cifar10", "imagenet64", "imagenet256-latent"])
@pytest.mark.parametrize("overlay", OBJECTIVES, ids=lambda path: path.stem)
def test_every_composition_has_its_range(cli, base, overlay):
    code, out, err = cli(
        "fit", "--config", CONFIGS / f"{base}.yaml", "--config", overlay, "--print_config"
    )
    assert code == 0, err
    config = yaml.safe_load(out)
    schedule = config["model"]["schedule"]
    cls = SCHEDULES[schedule["class_path"].rpartition(".")[2]]
    made = cls(**schedule["init_args"])
    expected = RANGES.get(overlay.stem, (-20.0, 20.0))
    assert made.ends == pytest.approx(expected, abs=1e-3)
    assert len(config["trainer"]["callbacks"]) == 3


WEIGHTINGS_ALONE = sorted((CONFIGS / "weighting").glob("*.yaml"))


@pytest.mark.parametrize("overlay", WEIGHTINGS_ALONE, ids=lambda path: path.stem)
def test_a_weighting_alone_replaces_another_whole(cli, overlay):
    """After P2, whose arguments others have as well, and on top of any schedule and prediction."""
    words = [CONFIGS / "digits.yaml", CONFIGS / "objective" / "p2.yaml", overlay]
    words = [word for config in words for word in ("--config", config)]
    code, out, err = cli("fit", *words, "--print_config")
    assert code == 0, err
    model = yaml.safe_load(out)["model"]
    alone = yaml.safe_load(overlay.read_text())["model"]["weighting"]
    before = yaml.safe_load((CONFIGS / "objective" / "p2.yaml").read_text())["model"]
    assert model["schedule"]["class_path"].endswith(before["schedule"]["class_path"])
    assert model["prediction"]["class_path"].endswith(before["prediction"])

    def of(value):
        """A config without defaults and with short names."""
        if isinstance(value, dict):
            inner = value.get("init_args") or {}
            name = value["class_path"].rpartition(".")[2]
            return name, {key: of(each) for key, each in inner.items()}
        known = isinstance(value, str) and value[:1].isupper()
        return (value, {}) if known else value

    name, arguments = of(model["weighting"])
    expected, given = of(alone)
    assert name == expected
    assert {key: arguments[key] for key in given} == given
    assert set(arguments) == set(given)


def test_bf16_overlay_runs_with_fused_optimizer_and_clipping(cli):
    code, _, err = fit(cli, CONFIGS / "digits.yaml", CONFIGS / "with" / "bf16.yaml")
    assert code == 0, err


def test_ddp_overlay_parses(cli):
    code, out, _ = cli(
        "fit", "--config", CONFIGS / "digits.yaml", "--config", CONFIGS / "with" / "ddp.yaml",
        "--print_config",
    )  # fmt: skip
    assert code == 0
    assert yaml.safe_load(out)["trainer"]["strategy"] == "ddp"


def test_callbacks_are_appended_by_an_overlay(cli, tmp_path):
    overlay = tmp_path / "more.yaml"
    overlay.write_text("trainer:\n  callbacks+:\n    - class_path: LearningRateMonitor\n")
    code, out, err = fit(cli, CONFIGS / "digits.yaml", overlay)
    assert code == 0, err
    config = yaml.safe_load((run_folder(out) / "config.yaml").read_text())
    assert len(config["trainer"]["callbacks"]) == 6


# The run folder and what one does with it -----------------------------------------------------


def test_a_run_leaves_what_it_promises_and_can_be_repeated(cli):
    code, out, err = fit(cli, CONFIGS / "digits.yaml")
    assert code == 0, err
    folder = run_folder(out)
    assert (folder / "config.yaml").is_file()
    assert (folder / "checkpoints" / "last.ckpt").is_file()
    assert len(list((folder / "samples").glob("step-*.png"))) == 1
    rows = read(folder)
    assert {"train/loss", "val/loss", "step"} <= set(rows[0])
    assert "val/loss at step 2: " in out
    assert "Samples: " in out
    code, out, _ = fit(cli, CONFIGS / "digits.yaml")
    assert code == 0
    assert run_folder(out) != folder

    # The written config is itself a config.
    code, out, err = cli("fit", "--config", folder / "config.yaml")
    assert code == 0, err


def test_config_and_checkpoint_have_the_shortest_path_of_each_class(cli, monkeypatch):
    """Whatever path was written, so that files may move; and a run by long paths goes on."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    paths = {
        "--model.network": "lit_diffusion.nn.unet.UNet",
        "--model.weighting": "lit_diffusion.weightings.continuous.SigmoidWeighting",
        "--model.optimizer": "torch.optim.adamw.AdamW",
    }
    written = [f"{flag}={path}" for flag, path in paths.items()]
    written.append("--trainer.callbacks+=lit_diffusion.training.callbacks.guard.Guard")
    code, out, err = fit(cli, CONFIGS / "digits.yaml", extra=written)
    assert code == 0, err
    folder = run_folder(out)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["trainer"]["callbacks"][-1]["class_path"] == "lit_diffusion.training.Guard"
    hparams = load_checkpoint(folder / "checkpoints/last.ckpt")["hyper_parameters"]
    for saved in (config["model"], hparams):
        assert saved["network"]["class_path"] == "lit_diffusion.UNet"
        assert saved["weighting"]["class_path"] == "lit_diffusion.SigmoidWeighting"
        assert saved["optimizer"]["class_path"] == "torch.optim.AdamW"
    again = (folder / "config.yaml").read_text().replace(".UNet", ".nn.unet.UNet")
    Path("long.yaml").write_text(again)
    code, out, err = cli("fit", "--config=long.yaml", "--ckpt_path=last", "--trainer.max_steps=3")
    assert code == 0, err
    assert "another network" not in err
    assert run_folder(out) == folder


def test_the_other_commands(cli, tmp_path):
    _, out, _ = fit(cli, CONFIGS / "digits.yaml")
    ckpt = run_folder(out) / "checkpoints" / "last.ckpt"
    for command, *more in (["validate"], ["test"], ["predict"], ["predict", "--out=there"]):
        code, out, err = cli(
            command, "--config", CONFIGS / "digits.yaml", f"--ckpt_path={ckpt}", *more,
            "--data.val_examples=5", "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
        )  # fmt: skip
        assert code == 0, err
        if command == "predict":
            assert list(run_folder(out).glob("samples/predict-*.png"))
            assert (run_folder(out) / "predicted").exists() == (not more)
            images = sorted(
                Path("there").iterdir() if more else run_folder(out).glob("predicted/*")
            )
            assert [image.name for image in images] == [f"{i:06d}.png" for i in range(5)]
        else:
            assert "/loss at step 2: " in out

    from PIL import Image

    code, out, err = cli("sample", "--ckpt_path", ckpt, "--num_samples", 5, "--out", "grid.png")
    assert code == 0, err
    assert out.strip() == "grid.png"
    with Image.open("grid.png") as grid:
        assert grid.size[0] > 100
    code, _, err = cli(
        "sample", "--ckpt_path", ckpt, "--num_samples", 3, "--out", "folder", "--sampler",
        "AncestralSampler", "--sampler.steps", 2, "--seed", 3, "--label", 4, "--batch_size", 2,
    )  # fmt: skip
    assert code == 0, err
    assert len(list(Path("folder").glob("*.png"))) == 3
    with Image.open("folder/000000.png") as image:
        assert image.size == (8, 8)
    first = Path("folder/000002.png").read_bytes()
    cli(
        "sample", "--ckpt_path", ckpt, "--num_samples", 3, "--out", "again", "--sampler",
        "AncestralSampler", "--sampler.steps", 2, "--seed", 3, "--label", 4, "--batch_size", 3,
    )  # fmt: skip
    assert Path("again/000002.png").read_bytes() == first  # whatever the batch


def read(folder):
    return list(csv.DictReader(io.StringIO((folder / "metrics.csv").read_text())))


def test_last_goes_on_in_the_same_folder(cli):
    code, _, err = fit(cli, CONFIGS / "digits.yaml", extra=["--ckpt_path=last"])
    assert code == 0
    assert "starting a new run" in err
    first = Path(next(Path("runs/digits").iterdir()))
    code, out, err = fit(
        cli, CONFIGS / "digits.yaml", extra=["--ckpt_path=last", "--trainer.max_steps=4"]
    )
    assert code == 0, err
    assert run_folder(out) == first
    steps = [int(row["step"]) for row in read(first) if row["train/loss"]]
    assert steps == [0, 1, 2, 3]
    # A broken last.ckpt in a newer folder is passed over.
    broken = Path("runs/digits/9999/checkpoints/last.ckpt")
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"half")
    with pytest.warns(UserWarning, match="Skipped a checkpoint"):
        code, out, err = fit(
            cli, CONFIGS / "digits.yaml", extra=["--ckpt_path=last", "--trainer.max_steps=6"]
        )
    assert code == 0
    assert run_folder(out) == first


PLUGIN = '''
"""Mine."""
import torch
from lit_diffusion import Weighting
from lit_diffusion.training import LitDiffusion


class BumpWeighting(Weighting):
    """A bump: w(λ) = exp(−(λ − centre)²/8).

    Args:
        centre: Log-SNR of the bump.
    """

    def __init__(self, centre: float = 0.0) -> None:
        super().__init__()
        self.centre = centre

    def forward(self, logsnr):
        return torch.exp(-((logsnr - self.centre) ** 2) / 8)
'''


@pytest.mark.slow
def test_a_local_plugin_by_bare_name_from_the_console_script(tmp_path):
    (tmp_path / "my_plugins.py").write_text(PLUGIN)
    script = Path(sys.executable).with_name("lit-diffusion")
    words = [
        script,
        "fit",
        "--plugins",
        "my_plugins.py",
        "--config",
        CONFIGS / "digits.yaml",
        *FAST,
    ]
    words += ["--model.weighting", "BumpWeighting", "--model.weighting.centre", "1.5"]
    done = subprocess.run(list(map(str, words)), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    folder = tmp_path / run_folder(done.stdout)
    ckpt = folder / "checkpoints" / "last.ckpt"
    with pytest.raises(ValueError, match="--plugins my_plugins"):
        LitDiffusion.load_from_checkpoint(ckpt)
    words = [sys.executable, "-m", "lit_diffusion", "sample", "--ckpt_path", ckpt]
    words += ["--plugins", "my_plugins", "--num_samples", "1"]
    done = warm.run(words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "samples.png").is_file()


def test_a_config_can_name_the_plugins(cli, tmp_path):
    (tmp_path / "named_plugins.py").write_text(PLUGIN.replace("Bump", "Hump"))
    config = tmp_path / "mine.yaml"
    config.write_text("plugins: [named_plugins]\nmodel:\n  weighting: HumpWeighting\n")
    sys.path.insert(0, str(tmp_path))
    try:
        code, _, err = fit(cli, CONFIGS / "digits.yaml", config)
    finally:
        sys.path.remove(str(tmp_path))
    assert code == 0, err


def test_quick_answers():
    def words(*argv):
        code = "import sys; from lit_diffusion.__main__ import main; main()"
        code += "; print(sorted(sys.modules))"
        done = subprocess.run(
            [sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True
        )
        return done.stdout

    version, plugins, help_text = words("--version"), words("plugins"), words("--help")
    assert version.startswith("lit_diffusion 0.")
    assert "'torch'" not in version
    assert "'torch'" not in help_text
    assert "sample" in help_text
    assert "'lightning'" not in plugins
    named = ("CosineSchedule", "EDMWeighting", "VPrediction", "DDIMSampler", "UNet", "EMA")
    for name in (*named, "objective/edm"):
        assert any(line.startswith(f"  {name} ") for line in plugins.splitlines())


def test_help_shows_the_docstrings(cli):
    code, out, _ = cli("fit", "--model.weighting.help", "SigmoidWeighting")
    assert code == 0
    assert "λ at which the weight is one half" in out


@pytest.mark.slow
def test_wandb_offline_file_is_in_the_run_folder(tmp_path):
    script = Path(sys.executable).with_name("lit-diffusion")
    words = list(map(str, [script, "fit", "--config", CONFIGS / "digits.yaml", *FAST]))
    env = {**os.environ, "WANDB_MODE": "offline"}
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    folder = tmp_path / run_folder(done.stdout)
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))


# Mistakes ------------------------------------------------------------------------------------


MISTAKES = {
    "unknown class": (["--model.weighting=SigmodWeighting"], "Did you mean SigmoidWeighting"),
    "unknown callback": (["--trainer.callbacks+=EMAA"], "Did you mean EMA"),
    "unknown nested class": (
        ["--model.schedule=ShiftedSchedule", "--model.schedule.base=CosinSchedule"],
        "Did you mean CosineSchedule",
    ),
    "far-off class": (["--model.weighting=Xyzzy"], "lit-diffusion plugins"),
    "unknown argument": (["--trainer.max_stepss=3"], "max_stepss"),
    "unknown plug-in argument": (
        ["--model.weighting=SigmoidWeighting", "--model.weighting.bia=3"],
        "takes no argument 'bia'",
    ),
    "wrong type": (["--data.batch_size=abc"], "expected int, got abc"),
    "wrong nested type": (["--model.schedule.logsnr_min=abc"], "expected float, got abc"),
    "empty range": (
        ["--model.schedule.logsnr_min=15"],
        "logsnr_min must be below logsnr_max, got 15.0 and 13.3",
    ),
    "missing data": (["--data.path=./nowhere/data"], "./nowhere/data"),
    "wrong column": (["--data.image_key=picture"], "picture"),
    "wrong size": (["--data.shape=[1,16,8]"], "16 × 8"),
    "wrong channels": (["--data.shape=[3,8,8]"], "3 × 8 × 8"),
    "not a checkpoint": (["--ckpt_path=junk.ckpt"], "not a checkpoint"),
    "no checkpoint": (["--ckpt_path=none.ckpt"], "No checkpoint at none.ckpt"),
    "two data_std": (
        [
            "--model.prediction=EDMPrediction",
            "--model.weighting=EDMWeighting",
            "--model.weighting.data_std=0.3",
        ],
        "data_std",
    ),
    "sampler out of range": (
        ["--model.sampler.schedule=CosineSchedule"],
        "trained on [-10, 13.3]",
    ),
    "no plug-in": (["--plugins=not_there"], "not_there"),
    "label out of range": (["--model.network.num_classes=3"], "set num_classes of the network"),
    "listed twice": (["--trainer.callbacks+=EMA"], "listed twice"),
    "several checkpoints": (["--ckpt_path=junk.ckpt", "other.ckpt"], "expected one checkpoint"),
    "forbidden import": (["--model.weighting=subprocess.Popen"], "subprocess"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(cli, mistake, tmp_path):
    words, telling = MISTAKES[mistake]
    Path("junk.ckpt").write_text("junk")
    code, _, err = fit(cli, CONFIGS / "digits.yaml", extra=words)
    assert code == 2
    errors = [line for line in err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert telling in errors[0], errors[0]
    assert "Traceback" not in err
    assert not list(tmp_path.glob("runs/**/*"))
    assert not Path("runs").exists()


def test_another_objective_on_resume_is_said_and_recorded(cli):
    _, out, err = fit(cli, CONFIGS / "digits.yaml")
    assert "Objective: ELBOWeighting(), sampled from LinearSchedule" in err
    folder = run_folder(out)
    before = (folder / "config.yaml").read_text()
    code, _, err = fit(
        cli,
        CONFIGS / "digits.yaml",
        extra=[
            "--ckpt_path=last",
            "--trainer.max_steps=4",
            "--model.weighting=SigmoidWeighting",
        ],
    )
    assert code == 0
    assert "another weighting" in err
    assert "ELBOWeighting" in err
    assert (folder / "config.yaml").read_text() == before
    (second,) = folder.glob("config-*.yaml")
    assert "SigmoidWeighting" in second.read_text()


def test_last_needs_a_checkpoint_unless_one_trains(cli):
    for words in (
        ["validate", "--config", CONFIGS / "digits.yaml", "--ckpt_path=last"],
        ["sample", "--ckpt_path=last"],
    ):
        code, _, err = cli(*words)
        assert code == 2
        assert "there is no checkpoint" in err
        assert not Path("runs").exists()
    fit(cli, CONFIGS / "digits.yaml")
    code, _, err = cli("sample", "--ckpt_path=last", "--num_samples=1")
    assert code == 0, err


def test_an_empty_data_set_is_refused(cli, tmp_path):
    import datasets

    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    empty = datasets.Dataset.from_dict({"image": [], "label": []}, features=features)
    for split in ("train", "test"):
        empty.to_parquet(tmp_path / f"{split}.parquet")
    code, _, err = fit(cli, CONFIGS / "digits.yaml", extra=[f"--data.path={tmp_path}"])
    assert code == 2
    assert "error:" in err
    assert "Traceback" not in err
    assert not Path("runs").exists()


def test_a_checkpoint_of_another_network_is_refused_in_one_line(cli):
    _, out, _ = fit(cli, CONFIGS / "digits.yaml")
    ckpt = run_folder(out) / "checkpoints" / "last.ckpt"
    code, _, err = fit(
        cli,
        CONFIGS / "digits.yaml",
        extra=[f"--ckpt_path={ckpt}", "--model.network.channels=[16,8]"],
    )
    assert code == 2
    assert "do not fit" in err
    assert ckpt.is_file()


# A real kill ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_kill_and_resume_is_exact(tmp_path):
    words = [sys.executable, "-m", "lit_diffusion", "fit", "--config", CONFIGS / "digits.yaml"]
    words += [*FAST, "--trainer.max_steps=60", "--data.steps_per_epoch=7", "--name=killed"]
    words = [str(word) for word in words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(folder, *more):
        folder.mkdir(exist_ok=True)
        with (folder / "log.txt").open("a") as log:
            return warm.Popen([*words, *more], cwd=folder, env=environment, stdout=log, stderr=log)

    assert start(tmp_path / "whole").wait(300) == 0
    part = tmp_path / "part"
    killed = start(part)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and killed.poll() is None:
        if list(part.glob("runs/killed/*/checkpoints/last.ckpt")):
            break
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    (ckpt,) = part.glob("runs/killed/*/checkpoints/last.ckpt")
    assert 0 < torch.load(ckpt, weights_only=True)["global_step"] < 60
    assert start(part, "--ckpt_path=last").wait(300) == 0
    assert len(list(part.glob("runs/killed/*"))) == 1

    ends = []
    for folder in (tmp_path / "whole", part):
        (run,) = folder.glob("runs/killed/*")
        ends.append((torch.load(run / "checkpoints" / "last.ckpt", weights_only=True), read(run)))
    (whole, whole_rows), (resumed, resumed_rows) = ends
    for key in ("state_dict", "current_model_state"):
        for name, value in whole[key].items():
            assert torch.equal(value, resumed[key][name]), (key, name)
    losses = [
        [(row["step"], row["train/loss"]) for row in rows if row["train/loss"]]
        for rows in (whole_rows, resumed_rows)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 60
    validations = [
        [(row["step"], row["val/loss"]) for row in rows if row["val/loss"]]
        for rows in (whole_rows, resumed_rows)
    ]
    assert validations[0] == validations[1]


def test_our_warnings_are_lines_for_the_user():
    from lit_diffusion.training import cli as command_line

    ours = command_line._one_line("a\nb", UserWarning, command_line.__file__, 3)
    assert ours == "Warning: a b\n"
    assert "elsewhere.py:3" in command_line._one_line("a", UserWarning, "/elsewhere.py", 3)


def test_a_bare_name_is_ours_where_another_library_has_it_too(cli, monkeypatch):
    library = types.ModuleType("another_library")
    library.UNet = type("UNet", (torch.nn.Module,), {"__module__": "another_library"})
    monkeypatch.setitem(sys.modules, "another_library", library)
    code, out, err = cli("fit", "--config", CONFIGS / "digits.yaml", "--print_config")
    assert code == 0, err
    assert yaml.safe_load(out)["model"]["network"]["class_path"] == "lit_diffusion.UNet"
    # By its own path it is refused, as ever.
    code, _, err = cli("fit", "--model.network=another_library.UNet", "--print_config")
    assert code == 2
    assert "another_library.UNet may not be imported" in err

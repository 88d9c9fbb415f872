"""Resuming, evaluating and being refused on the command line: what is printed and what is left."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from lit_diffusion.training.run.checkpoints import load_checkpoint

TINY = {
    "data": {
        "path": "digits8x8", "batch_size": 16, "steps_per_epoch": 10, "val_examples": 64,
        "streaming": False,
    },
    "model": {
        "network": {"class_path": "UNet", "init_args": {"channels": [8], "attention": []}},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 2e-3}},
    },
    "trainer": {
        "accelerator": "cpu", "max_steps": 3, "log_every_n_steps": 1, "num_sanity_val_steps": 0,
        "enable_progress_bar": False, "enable_model_summary": False,
        "callbacks": [{"class_path": "EMA", "init_args": {"decay": 0.9}}, "LastCheckpoint"],
    },
}  # fmt: skip


ONE_CYCLE = "--model.lr_scheduler=torch.optim.lr_scheduler.OneCycleLR"
ONE_CYCLE_STEPS = (
    '--model.lr_scheduler.init_args={"max_lr": 0.1, "total_steps": 2, "cycle_momentum": false}'
)


@pytest.fixture
def tiny(cli):
    """Run a command with a tiny config in an empty folder; returns (exit code, stdout, stderr)."""
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY))

    def run(command, *words):
        return cli(command, "--config", "tiny.yaml", *words)

    return run


def only_run(name="run"):
    (folder,) = Path("runs", name).iterdir()
    return folder


def rows(folder):
    with (folder / "metrics.csv").open() as lines:
        return list(csv.DictReader(lines))


def test_a_changed_setting_is_said_logged_and_in_force(tiny):
    tiny("fit")
    of_optimizer = "--model.optimizer.init_args."
    code, _, err = tiny("fit", "--ckpt_path", "last", "--trainer.max_steps", 6, of_optimizer +
                        "lr", 1e-5, of_optimizer + "betas", "[0.5,0.5]")  # fmt: skip
    assert code == 0, err
    assert "Note: lr was 0.002 in the checkpoint and is now 1e-05" in err
    assert "Note: betas was" in err
    folder = only_run()
    rates = [float(row["train/lr"]) for row in rows(folder) if row["train/lr"]]
    assert rates == [pytest.approx(2e-3)] * 3 + [pytest.approx(1e-5)] * 3
    group = load_checkpoint(folder / "checkpoints" / "last.ckpt")["optimizer_states"][0]
    assert tuple(group["param_groups"][0]["betas"]) == (0.5, 0.5)


def test_the_saved_config_of_a_resumed_run_is_that_of_a_new_one(tiny, cli):
    tiny("fit")
    folder = only_run()
    tiny("fit", "--ckpt_path", "last")  # nothing is changed, so nothing is added
    assert sorted(path.name for path in folder.glob("*.yaml")) == ["config.yaml"]
    tiny("fit", "--ckpt_path", "last", "--trainer.max_steps", 5)
    (resumed,) = folder.glob("config-*.yaml")
    saved = (folder / "checkpoints" / "last.ckpt").read_bytes()
    code, out, err = cli("fit", "--config", resumed, "--name", "other")
    assert code == 0, err
    assert "Steps: 5\n" in out
    assert only_run("other").is_dir()
    assert (folder / "checkpoints" / "last.ckpt").read_bytes() == saved


def test_a_run_without_a_step_says_so(tiny):
    tiny("fit")
    code, out, _ = tiny("fit", "--ckpt_path", "last")
    assert code == 0
    assert "Steps: 3 before and none now: trainer.max_steps is 3" in out


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model.network.init_args.channels=[4]"], "do not fit"),
        (["--trainer.callbacks=LastCheckpoint"], "add EMA"),  # or the average would be lost
        (["--model.optimizer=torch.optim.Adadelta"], "Adadelta needs acc_delta, square_avg"),
        ([ONE_CYCLE, ONE_CYCLE_STEPS], "OneCycleLR ends before step 3"),
    ],
)
def test_a_refused_resume_leaves_the_run_as_it_was(tiny, words, said):
    tiny("fit")
    folder = only_run()
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    code, _, err = tiny("fit", "--ckpt_path", "last", "--trainer.max_steps", 5, *words)
    assert code == 2
    assert said in err.strip().splitlines()[-1]
    after = {path: path.read_bytes() for path in folder.rglob("*.*")}
    changed = {path.name for path in after if after[path] != before.get(path)}
    assert changed <= {"report.html", "environment.json"}  # that it was tried


def test_last_finds_what_model_checkpoint_has_saved(tiny):
    config = yaml.safe_load(Path("tiny.yaml").read_text())
    keep = {"every_n_train_steps": 2, "save_top_k": -1, "filename": "{step}"}
    config["trainer"]["callbacks"][1] = {"class_path": "ModelCheckpoint", "init_args": keep}
    Path("tiny.yaml").write_text(yaml.safe_dump(config))
    tiny("fit", "--trainer.max_steps", 5)
    code, out, err = tiny("fit", "--ckpt_path", "last", "--trainer.max_steps", 7)
    assert code == 0, err
    assert "step=4.ckpt" in err
    assert "Steps: 7\n" in out
    folder = only_run()
    assert [int(row["step"]) for row in rows(folder) if row["train/loss"]] == list(range(7))


def test_an_evaluation_is_logged_at_the_step_of_the_weights(tiny):
    tiny("fit", "--data.steps_per_epoch", 3)
    trained = only_run()
    likelihood = "--trainer.callbacks+=Likelihood"
    for command in ("validate", "test"):
        tiny(command, "--ckpt_path", trained / "checkpoints" / "last.ckpt", "--name", command,
             likelihood, "--trainer.callbacks.samples_per_example=1")  # fmt: skip
        (measured,) = {one["step"] for one in json.loads(
            (only_run(command) / "metrics.json").read_text())}  # fmt: skip
        assert measured == 3
        (row,) = rows(only_run(command))
        assert row["step"] == next(row["step"] for row in rows(trained) if row["val/loss"])


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--trainer.gradient_clip_val=-1", "gradient_clip_val must be at least 0"),
        ("--trainer.gradient_clip_val=.nan", "gradient_clip_val must be at least 0"),
        ("--trainer.accumulate_grad_batches=0", "accumulate_grad_batches"),
        ("--trainer.log_every_n_steps=0", "log_every_n_steps must be at least 1"),
        ("--model.optimizer.init_args.lr=-1", "learning rate"),
        ("--model.optimizer.init_args.lr=.inf", "lr must be finite"),
        ("--model.label_dropout=.nan", "label_dropout must be in"),
        ("--trainer.callbacks.init_args.decay=.nan", "decay"),
    ],
)
def test_a_number_that_would_train_wrongly_is_refused(tiny, flag, said):
    words = ["--trainer.callbacks=EMA", flag] if "callbacks" in flag else [flag]
    code, out, err = tiny("fit", *words)
    assert code == 2, (out, err)
    assert said in err.strip().splitlines()[-1]
    assert not Path("runs").exists()

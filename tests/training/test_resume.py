"""A resumed run does what it says: its config's settings, and nothing left out or done twice."""

import functools

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from test_module import Record, fit, tiny_data, tiny_model, trainer

from lit_diffusion.training import EMA, LastCheckpoint, LitDiffusion, WholeCheckpointIO
from lit_diffusion.training.run.checkpoints import load_checkpoint


def run(folder, steps, callbacks, ckpt_path=None, model=None, data=None, **arguments):
    """A run of a tiny model; returns what was recorded, the model and the trainer."""
    record, model = Record(), model or tiny_model()
    arguments = {"enable_checkpointing": True, "plugins": [WholeCheckpointIO()], **arguments}
    made = trainer(folder, max_steps=steps, callbacks=[record, EMA(0.9), *callbacks], **arguments)
    made.fit(model, data or tiny_data(), ckpt_path=ckpt_path)
    return record, model, made


class Rates(L.Callback):
    """Keeps the learning rate of every step."""

    def __init__(self):
        self.used = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.used.append(trainer.optimizers[0].param_groups[0]["lr"])


def cosine(steps, **settings):
    return tiny_model(
        optimizer=functools.partial(torch.optim.AdamW, **{"lr": 1e-3, **settings}),
        lr_scheduler=functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps),
    )


def test_settings_are_the_configs_from_the_first_step_on(tmp_path, caplog):
    last = tmp_path / "checkpoints" / "last.ckpt"
    fresh, resumed = Rates(), Rates()
    run(tmp_path / "fresh", 9, [fresh], model=cosine(40, lr=2e-3))
    run(tmp_path, 6, [LastCheckpoint()], model=cosine(20))
    new = {"lr": 2e-3, "weight_decay": 0.5, "betas": (0.5, 0.5)}
    with caplog.at_level("INFO", "lit_diffusion"):
        _, _, made = run(tmp_path, 9, [LastCheckpoint(), resumed], last, cosine(40, **new))
    group = made.optimizers[0].param_groups[0]
    assert (group["weight_decay"], group["betas"]) == (0.5, (0.5, 0.5))
    assert resumed.used == fresh.used[6:]
    assert "Note: lr was 0.001 in the checkpoint and is now 0.002" in caplog.messages
    assert "Note: T_max of CosineAnnealingLR was 20 in the checkpoint and is now 40" in (
        caplog.messages
    )
    caplog.clear()
    with caplog.at_level("INFO", "lit_diffusion"):
        run(tmp_path, 12, [LastCheckpoint()], last, cosine(40, **new))
    assert not [message for message in caplog.messages if "Note" in message]


def test_a_longer_run_follows_its_own_decay(tmp_path):
    """The end of the decay is the trainer's max_steps, of the resumed run from its start on."""
    fresh, resumed = Rates(), Rates()
    run(tmp_path / "fresh", 14, [fresh])
    run(tmp_path, 8, [LastCheckpoint()])
    run(tmp_path, 14, [LastCheckpoint(), resumed], tmp_path / "checkpoints" / "last.ckpt")
    assert resumed.used == fresh.used[8:]


def test_early_stopping_resumes_where_it_was_and_takes_its_patience(tmp_path, caplog):
    """Also from a checkpoint between a validation and the end of its epoch, as this one is."""

    def stopper(patience):
        return EarlyStopping("val/loss", patience=patience, min_delta=10.0)

    _, _, whole = run(tmp_path / "whole", 40, [LastCheckpoint(), stopper(3)])
    assert whole.global_step == 20  # three validations without an improvement by 10
    for ckpt_path, steps in (
        (None, 5),
        (tmp_path / "part" / "checkpoints" / "last.ckpt", 10),
        (tmp_path / "part" / "checkpoints" / "last.ckpt", 40),
    ):
        _, _, part = run(tmp_path / "part", steps, [LastCheckpoint(), stopper(3)], ckpt_path)
    assert part.global_step == 20
    with caplog.at_level("INFO", "lit_diffusion"):
        _, _, part = run(tmp_path / "part", 60, [LastCheckpoint(), stopper(5)], ckpt_path)
    assert part.global_step == 30
    assert any("patience of EarlyStopping was 3" in message for message in caplog.messages)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize(
    ("every", "arguments"),
    [(10, {}), (5, {"val_check_interval": 5}), (5, {}), (8, {"accumulate_grad_batches": 2})],
)
def test_a_validation_that_was_due_is_not_left_out(tmp_path, every, arguments):
    """`ModelCheckpoint` saves at the last batch, before the validation of its step."""

    def keep(folder):
        name = "step={step}"
        return ModelCheckpoint(folder, name, every_n_train_steps=every, save_top_k=-1,
                               auto_insert_metric_name=False)  # fmt: skip

    steps, data = 2 * every + 3, 16 if arguments.get("accumulate_grad_batches") else 10
    whole, model, once = run(
        tmp_path / "whole", steps, [keep(tmp_path)], data=tiny_data(steps_per_epoch=data),
        **arguments,
    )  # fmt: skip
    path = tmp_path / f"step={every}.ckpt"
    rest, resumed, made = run(
        tmp_path / "rest", steps, [keep(tmp_path)], path,
        data=tiny_data(steps_per_epoch=data), **arguments,
    )  # fmt: skip
    assert rest.losses == whole.losses[-len(rest.losses) :]
    due = len(whole.val) - (every * arguments.get("accumulate_grad_batches", 1) - 1) // (
        arguments.get("val_check_interval", data)
    )
    assert rest.val == whole.val[-due:]
    ours, theirs = resumed.state_dict(), model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (made.current_epoch, made.global_step) == (once.current_epoch, once.global_step)


def test_the_time_limit_is_that_of_each_job(tmp_path):
    last = tmp_path / "checkpoints" / "last.ckpt"
    run(tmp_path, 3, [LastCheckpoint(), Timer("00:01:00:00")])
    checkpoint = load_checkpoint(last)
    checkpoint["callbacks"]["Timer"]["time_elapsed"]["train"] = 7200.0
    torch.save(checkpoint, last)
    _, _, made = run(tmp_path, 6, [LastCheckpoint(), Timer("00:01:00:00")], last)
    assert made.global_step == 6


def test_a_checkpoint_that_is_saved_after_training_is_as_good_as_the_last(tmp_path):
    _, _, made = fit(tmp_path, 7)
    last, after = tmp_path / "checkpoints" / "last.ckpt", tmp_path / "after.ckpt"
    made.save_checkpoint(after)
    one, other = load_checkpoint(last), load_checkpoint(after)
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(one[key][name], other[key][name]) for name in one[key]), key
    runs = [fit(tmp_path / path.stem, 14, ckpt_path=path)[:2] for path in (last, after)]
    assert runs[0][0].losses == runs[1][0].losses
    ours, theirs = (model.state_dict() for _, model in runs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_plateau_is_watched_on_val_loss_and_resumes_exactly(tmp_path):
    plateau = functools.partial(
        torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, threshold=10.0, factor=0.5,
        threshold_mode="abs",
    )  # fmt: skip

    def model():
        return tiny_model(lr_scheduler=plateau)

    rates = [Rates(), Rates(), Rates()]
    run(tmp_path / "whole", 18, [rates[0]], model=model())
    for number, (steps, ckpt_path) in enumerate([(10, None), (18, "last.ckpt")], 1):
        path = ckpt_path and tmp_path / "part" / "checkpoints" / ckpt_path
        run(tmp_path / "part", steps, [LastCheckpoint(), rates[number]], path, model=model())
    assert rates[0].used[::5] == [1e-3, 1e-3, 5e-4, 2.5e-4]  # after each validation but the first
    assert rates[1].used + rates[2].used == rates[0].used


def test_a_model_that_was_loaded_trains_with_its_dropout(tmp_path):
    fit(tmp_path, 2)
    path = tmp_path / "checkpoints" / "last.ckpt"
    modes = []

    class Modes(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            modes.append({part.training for part in pl_module.modules()})

    model = LitDiffusion.load_from_checkpoint(path)
    assert not model.training
    assert model.trained_steps == 2
    trainer(tmp_path, max_steps=1, callbacks=[Modes()]).fit(model, tiny_data())
    assert modes.pop() == {True}
    frozen = LitDiffusion.load_from_checkpoint(path)
    frozen.denoiser.network.conv_out.requires_grad_(False)
    with pytest.warns(UserWarning, match="in eval mode"):
        trainer(tmp_path, max_steps=1, callbacks=[Modes()]).fit(frozen, tiny_data())
    assert modes.pop() == {True, False}
    assert not frozen.denoiser.network.conv_out.training

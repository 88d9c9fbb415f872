"""What the flags of Lightning's Trainer promise: overfitting, limits, the learning-rate finder."""

import functools

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.tuner import Tuner
from test_module import StopAt, tiny_data, tiny_model, trainer

from lit_diffusion.training import LastCheckpoint


class Examples(L.Callback):
    """Keeps the numbers of the examples of each batch."""

    def __init__(self):
        self.train, self.val = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.train.append(batch["index"].tolist())

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, *args):
        self.val.append(batch["index"].tolist())


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(("overfit", "batches"), [(1, 1), (3, 3), (0.4, 2)])
def test_overfitting_repeats_the_first_batches(tmp_path, streaming, overfit, batches):
    seen, plain = Examples(), Examples()
    run = trainer(tmp_path, max_epochs=3, overfit_batches=overfit, callbacks=[seen])
    data = {"streaming": streaming, "batch_size": 4}
    run.fit(tiny_model(lr_scheduler=None), tiny_data(**data))
    trainer(tmp_path, max_epochs=1, callbacks=[plain]).fit(
        tiny_model(lr_scheduler=None), tiny_data(**data)
    )
    assert run.global_step == 3 * batches
    assert seen.train == 3 * plain.train[:batches]
    assert seen.val == 3 * plain.val[:batches]


@pytest.mark.parametrize("stop", [4, 6])  # within an epoch, and at its end
def test_overfitting_resumes_exactly(tmp_path, stop):
    def go(folder, *callbacks, path=None):
        seen, model = Examples(), tiny_model(lr_scheduler=None)
        run = trainer(
            folder, max_steps=9, overfit_batches=3, limit_val_batches=0,
            callbacks=[seen, LastCheckpoint(every_n_steps=1), *callbacks],
        )  # fmt: skip
        run.fit(model, tiny_data(), ckpt_path=path)
        return seen.train, model, run

    whole, model, _ = go(tmp_path / "whole")
    first, _, run = go(tmp_path / "part", StopAt(stop))
    second, resumed, _ = go(tmp_path / "part", path=run.checkpoint_callback._path)
    assert first + second == whole
    assert all(map(torch.equal, model.state_dict().values(), resumed.state_dict().values()))


@pytest.mark.parametrize(("word", "value"), [("1", 1), ("1.0", 1.0), ("3", 3), ("0.5", 0.5)])
def test_one_batch_is_not_all_of_them_on_the_command_line(cli, tmp_path, word, value):
    names = [f"limit_{stage}_batches" for stage in ("train", "val", "test", "predict")]
    names += ["overfit_batches", "val_check_interval"]
    config = tmp_path / "limits.yaml"
    config.write_text("trainer:\n" + "".join(f"  {name}: {word}\n" for name in names))
    flags = [f"--trainer.{name}={word}" for name in names]
    for words in (flags, ["--config", config]):
        code, out, err = cli("fit", *words, "--print_config")
        assert code == 0, err
        found = [yaml.safe_load(out)["trainer"][name] for name in names]
        assert found == [value] * len(names)
        assert {type(one) for one in found} == {type(value)}


def test_the_learning_rate_finder_sets_the_rate_of_the_optimizer(tmp_path):
    model = tiny_model(lr_scheduler=None)
    assert model.lr == 1e-3
    run = trainer(tmp_path, max_steps=2, limit_val_batches=0)
    found = Tuner(run).lr_find(model, tiny_data(), num_training=15, min_lr=1e-5, max_lr=1e-2)
    assert model.lr == pytest.approx(found.suggestion())
    run.fit(model, tiny_data())
    assert run.optimizers[0].param_groups[0]["lr"] == model.lr
    assert model.hparams["optimizer"]["init_args"]["lr"] == model.lr  # checkpoints have it


def test_the_rate_of_a_learned_schedule_is_left_alone(tmp_path):
    import lit_diffusion as ld

    optimizer = functools.partial(torch.optim.SGD, lr=0.5, momentum=0.1)
    model = tiny_model(
        schedule=ld.LearnedSchedule(-10.0, 10.0), schedule_lr=1e-4, optimizer=optimizer
    )
    model.lr = 0.25
    groups = model.optimizer([torch.nn.Parameter(torch.zeros(1))]).param_groups
    assert (groups[0]["lr"], groups[0]["momentum"]) == (0.25, 0.1)

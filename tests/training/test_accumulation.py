"""A step of several micro-batches is one of all their examples: gradient, times and logs."""

import csv
import functools

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from test_module import tiny_model, trainer
from torch.utils.data import DataLoader, IterableDataset

from lit_diffusion.training import DataModule
from lit_diffusion.training.run.metrics_csv import RunLogger

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*no `val_dataloader`"
)
EXAMPLES = 22  # in batches of four: 4, 4, 4, 4, 4, 2


def examples(n=EXAMPLES):
    generator = torch.Generator().manual_seed(0)
    images = 2 * torch.rand(n, 1, 8, 8, generator=generator) - 1
    return [{"image": image, "label": torch.tensor(i % 10)} for i, image in enumerate(images)]


def metrics(folder):
    return list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))


class Endless(IterableDataset):
    """A stream of unknown length: Lightning has no number of batches."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


LOADERS = {
    "equal": lambda: DataLoader(examples(24), 4),
    "short last batch": lambda: DataLoader(examples(), 4),
    "unknown length": lambda: DataLoader(Endless(examples()), 4),
}


class Steps(L.Callback):
    """Compares each optimizer step with one batch of all its examples."""

    def __init__(self):
        self.calls, self.steps = [], []

    def on_fit_start(self, trainer, pl_module):
        def keep(module, args, kwargs):
            if torch.is_grad_enabled() and module.training:
                tensors = {k: v for k, v in kwargs.items() if isinstance(v, torch.Tensor)}
                self.calls.append((args[1], tensors))

        self.hook = pl_module.loss.register_forward_pre_hook(keep, with_kwargs=True)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.hook.remove()
        x = torch.cat([x for x, _ in self.calls])
        whole = {name: torch.cat([c[name] for _, c in self.calls]) for name in self.calls[0][1]}
        weights = [p for p in pl_module.parameters() if p.requires_grad]
        terms = pl_module.loss(pl_module.denoiser, x, **whole)
        found = torch.autograd.grad(terms.loss.mean(), weights, allow_unused=True)
        for weight, gradient in zip(weights, found, strict=True):
            if gradient is not None:
                assert torch.allclose(weight.grad, gradient, rtol=1e-4, atol=1e-6)
        self.steps.append((len(self.calls), whole["t"], float(terms.loss.detach().mean())))
        self.calls = []
        self.on_fit_start(trainer, pl_module)

    def on_train_end(self, trainer, pl_module):
        self.hook.remove()


@pytest.mark.parametrize("loader", LOADERS)
def test_a_step_has_the_gradient_times_and_loss_of_all_its_examples(tmp_path, loader):
    steps = Steps()
    run = trainer(
        tmp_path, max_epochs=2, limit_val_batches=0, accumulate_grad_batches=4,
        logger=RunLogger(tmp_path), callbacks=[steps, LearningRateMonitor("step")],
    )  # fmt: skip
    run.fit(tiny_model(lr_scheduler=None), LOADERS[loader]())
    assert [count for count, _, _ in steps.steps] == [4, 2, 4, 2]
    sizes = {"equal": [16, 8]}.get(loader, [16, 6])
    assert [len(t) for _, t, _ in steps.steps] == 2 * sizes
    rows = metrics(tmp_path)
    logged = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert logged == pytest.approx([loss for _, _, loss in steps.steps], rel=1e-5)
    assert sum(bool(row["lr-AdamW"]) for row in rows) == 4  # one for each step
    known = [t for _, t, _ in steps.steps if loader == "equal" or len(t) == 16]
    for t in known:
        gaps = t.sort().values.diff()
        assert torch.allclose(gaps, torch.full_like(gaps, 1 / len(t)))


def test_a_step_that_is_cut_short_still_covers_all_noise_levels(tmp_path):
    steps = Steps()
    run = trainer(
        tmp_path, max_epochs=1, limit_val_batches=0, accumulate_grad_batches=8, callbacks=[steps]
    )
    run.fit(tiny_model(lr_scheduler=None), LOADERS["unknown length"]())
    ((count, t, _),) = steps.steps
    assert count == 6
    assert float(t.sort().values.diff().max()) < 0.25 + 1e-6  # as one batch of four


def test_the_logged_loss_of_an_accumulated_run_is_that_of_its_steps(tmp_path):
    found = {}
    for size, parts in ((32, 1), (4, 8)):
        folder = tmp_path / str(parts)
        data = DataModule(
            batch_size=size, steps_per_epoch=6 * parts, streaming=False, val_examples=4
        )
        run = trainer(
            folder,
            max_steps=6,
            limit_val_batches=0,
            accumulate_grad_batches=parts,
            logger=RunLogger(folder),
        )
        run.fit(tiny_model(optimizer=functools.partial(torch.optim.SGD, lr=0.0)), data)
        found[parts] = torch.tensor([float(row["train/loss"]) for row in metrics(folder)])
    # The same examples in another noise: equal but for its variance.
    assert torch.allclose(found[1], found[8], rtol=0.2)

"""The losses of three short runs, as numbers: what moves code must not move them.

Each run is the real one (data, trainer, EMA aside) in float64, so that the numbers hold to nine
digits on any machine. After a change that is meant to move them, print the new ones by

    python tests/training/test_golden_losses.py

and say in the commit why they moved.
"""

import functools

import lightning as L
import pytest
import torch

import lit_diffusion as ld
from lit_diffusion.nn import UNet
from lit_diffusion.training import ImageDataModule, LitDiffusion

OBJECTIVES = {
    "vdm": lambda: {
        "schedule": ld.LinearSchedule(-10.0, 13.3, learn=False),
        "weighting": ld.ELBOWeighting(),
        "prediction": ld.EpsPrediction(),
    },
    "edm": lambda: {
        "schedule": ld.NormalSchedule(2.4, 2.4),
        "weighting": ld.EDMWeighting(),
        "prediction": ld.EDMPrediction(),
    },
    "sigmoid-v": lambda: {
        "schedule": ld.CosineSchedule(),
        "weighting": ld.SigmoidWeighting(2.0),
        "prediction": ld.VPrediction(),
    },
}

#: The loss of every fifth of 50 steps, from the first on, and of the last.
GOLDEN = {
    "vdm": [
        12.3535767358,
        10.795188394,
        9.98736083925,
        8.66944063295,
        8.72696494757,
        8.5879668964,
        7.5830086218,
        7.84330773087,
        6.64336701303,
        7.07798275097,
        6.08604033039,
    ],
    "edm": [
        0.21625733217,
        0.183922483516,
        0.165482992158,
        0.147729555142,
        0.151715445594,
        0.151538580485,
        0.142238914125,
        0.148169127356,
        0.128552740148,
        0.139277461383,
        0.129370449804,
    ],
    "sigmoid-v": [
        1.10601378593,
        0.883555325725,
        0.923091531559,
        0.806365061211,
        0.821472560486,
        0.827972273721,
        0.785149871332,
        0.768550284143,
        0.624688950863,
        0.679716500487,
        0.64259895133,
    ],
}


class _DoubleData(ImageDataModule):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        return batch | {"image": batch["image"].double()}


class _Losses(L.Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


def losses(objective):
    """Train for 50 steps of float64; return the loss of each."""
    torch.manual_seed(0)
    network = UNet(image_shape=(1, 8, 8), channels=(8, 8), attention=(), num_classes=10)
    model = LitDiffusion(
        network=network,
        optimizer=functools.partial(torch.optim.AdamW, lr=2e-3),
        seed=1,
        **OBJECTIVES[objective](),
    )
    record = _Losses()
    trainer = L.Trainer(
        accelerator="cpu",
        precision="64-true",
        max_steps=50,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        callbacks=[record],
    )
    data = _DoubleData(batch_size=16, steps_per_epoch=50, val_examples=8, streaming=False)
    trainer.fit(model, data)
    assert next(model.parameters()).dtype == torch.float64
    return record.losses


def thinned(losses):
    """Every fifth loss, and the last."""
    return [*losses[::5], losses[-1]]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_fifty_steps_have_the_losses_they_had(objective):
    assert thinned(losses(objective)) == pytest.approx(GOLDEN[objective], rel=1e-9)


if __name__ == "__main__":
    for name in OBJECTIVES:
        numbers = ", ".join(f"{loss:.12g}" for loss in thinned(losses(name)))
        print(f'    "{name}": [{numbers}],')

"""The losses of three short runs, as numbers: what moves code must not move them.

Each run is a real one (except for EMA) in float64, so that the numbers hold to nine
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
from lit_diffusion.training import DataModule, LitDiffusion

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
        11.5865552542,
        10.6658412509,
        9.8583947726,
        9.36836479687,
        8.04693390252,
        8.08121817607,
        7.15540394521,
        6.93731213983,
        6.59137398982,
        7.1185016788,
        6.29925956022,
    ],
    "edm": [
        0.211303360692,
        0.193486281639,
        0.165731335271,
        0.160999842833,
        0.150160062231,
        0.145386110984,
        0.132699661594,
        0.13646274975,
        0.131479699043,
        0.137716530088,
        0.135766011421,
    ],
    "sigmoid-v": [
        1.05249097959,
        0.994305300248,
        0.881349755176,
        0.900595335751,
        0.741075236003,
        0.763960970417,
        0.666577222255,
        0.706016459215,
        0.681940686195,
        0.708254041433,
        0.639691637921,
    ],
}


class _Losses(L.Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


def losses(objective):
    """Train for 50 steps of float64; return the loss of each."""
    torch.manual_seed(0)
    network = UNet(shape=(1, 8, 8), channels=(8, 8), attention=(), num_classes=10)
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
        limit_val_batches=0,
        callbacks=[record],
    )
    data = DataModule(batch_size=16, steps_per_epoch=50, val_examples=8, streaming=False)
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

"""The objective of `minimal.py` on images, with a U-Net and PyTorch Lightning's Trainer.

The data are 1,500 handwritten digits of 8×8 pixels, which are part of the package. Run
`python examples/with_lightning.py`.
"""

from functools import partial

import lightning as L
import torch

from lit_diffusion import CosineSchedule, SigmoidWeighting, UNet, VPrediction
from lit_diffusion.training import EMA, DataModule, LitDiffusion


def main(max_steps: int = 200) -> None:
    """Train the model, sample from it, and compare the pixels of samples and data."""
    L.seed_everything(0)
    data = DataModule(path="digits8x8", shape=(1, 8, 8))
    model = LitDiffusion(
        network=UNet(shape=(1, 8, 8), channels=(16, 32), num_classes=10),
        schedule=CosineSchedule(logsnr_min=-10.0, logsnr_max=10.0),
        weighting=SigmoidWeighting(bias=2.0),
        prediction=VPrediction(),
        optimizer=partial(torch.optim.AdamW, lr=2e-3),
    )
    trainer = L.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        callbacks=[EMA(0.98)],
        logger=False,
    )
    trainer.fit(model, data)

    # A checkpoint is enough to make the model again, with the averaged weights.
    trainer.save_checkpoint("digits.ckpt")
    model = LitDiffusion.load_from_checkpoint("digits.ckpt")
    images = model.sample(100, torch.Generator().manual_seed(0))
    truth = next(iter(data.val_dataloader()))["image"] / 127.5 - 1  # stored as uint8
    print(f"mean of samples {images.mean():.3f}, of data {truth.mean():.3f}")
    print(f"std of samples  {images.std():.3f}, of data {truth.std():.3f}")


if __name__ == "__main__":
    main()

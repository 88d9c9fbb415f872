"""Train the small classifier whose features are used to compare samples with data.

    python benchmarks/train_features.py --path digits8x8 --out features.safetensors

Any labelled data set of ImageDataModule can be used. The file is for
`ClassifierFeatures(weights=FILE)`; it contains the weights in half precision, and what they were
trained on. For the included digits it takes half a minute on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from lit_diffusion.training import ImageDataModule
from lit_diffusion.training.evaluation.features import Classifier


def load(data: ImageDataModule, split: str) -> tuple[Tensor, Tensor]:
    """All images of a split, in [−1, 1], and their labels."""
    batches = list(data.examples(split, 1024))
    images = torch.cat([batch["image"] for batch in batches])
    return images.float() / 127.5 - 1, torch.cat([batch["label"] for batch in batches])


def train(x: Tensor, label: Tensor, steps: int, batch_size: int = 64) -> Classifier:
    """Train on noisy images, so that small flaws of samples do not fool it."""
    torch.manual_seed(0)
    model = Classifier(tuple(x.shape[1:]), int(label.max()) + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for _ in range(steps):
        chosen = torch.randint(len(x), (batch_size,))
        noise = 0.2 * torch.rand(batch_size, 1, 1, 1) * torch.randn_like(x[chosen])
        logits = model(x[chosen] + noise).logits
        loss = F.cross_entropy(logits, label[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: Classifier, x: Tensor, label: Tensor) -> float:
    """Share of right labels."""
    found = torch.cat([model(part).logits.argmax(1) for part in x.split(1000)])
    return float((found == label).float().mean())


def main() -> None:
    """Train, test, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--path", default="digits8x8")
    parser.add_argument("--image_shape", type=int, nargs=3, default=(1, 8, 8))
    parser.add_argument("--image_key", default="image")
    parser.add_argument("--label_key", default="label")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", default="features.safetensors")
    given = parser.parse_args()
    data = ImageDataModule(
        given.path,
        image_shape=tuple(given.image_shape),
        image_key=given.image_key,
        label_key=given.label_key,
    )
    model = train(*load(data, "train"), given.steps)
    # Half precision halves the file, and what was measured is what is written.
    state = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    model.load_state_dict({key: value.float() for key, value in state.items()})
    right = accuracy(model, *load(data, "test"))
    made: dict[str, Any] = {
        "data": given.path,
        "image_shape": list(given.image_shape),
        "num_classes": model.head.out_features,
        "steps": given.steps,
        "test_accuracy": round(right, 4),
    }
    save_file(state, given.out, metadata={"made": json.dumps(made)})
    print(f"{given.out}: {json.dumps(made)}")


if __name__ == "__main__":
    main()

"""Data of any kind: signals, volumes, sets of points, vectors, from storage to samples."""

import io

import numpy as np
import pytest
import torch

from lit_diffusion.training import DataModule

KINDS = {
    "signal": (2, 5),
    "volume": (2, 3, 4, 5),
    "points": (3, 7),
    "vector": (4,),
    "latents": (2, 3),
}


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def write(folder, rows, split="train"):
    """A parquet file with a column `image` of lists or of bytes."""
    import pyarrow as pa
    from pyarrow import parquet

    folder.mkdir(exist_ok=True)
    parquet.write_table(pa.table({"image": rows}), folder / f"{split}.parquet", row_group_size=4)
    return folder


def examples(kind, n=12, seed=0):
    """Numbers in a unit of their own, each channel with another mean and scale."""
    shape = KINDS[kind]
    rng = np.random.default_rng(seed)
    unit = np.arange(1, shape[0] + 1).reshape(-1, *[1] * (len(shape) - 1))
    return (rng.standard_normal((n, *shape)) * unit + 10 * unit).astype(np.float32)


def stored(kind, arrays):
    """Points are lists of points."""
    return [(a.T if kind == "points" else a).tolist() for a in arrays]


def module(folder, kind, **arguments):
    settings = {"kind": kind, "shape": KINDS.get(kind), "label_key": None, "batch_size": 3}
    data = DataModule(str(folder), **(settings | {"val_split": None} | arguments))
    data.setup("fit")
    return data


def one_epoch(data, n):
    """What reaches the model, by the indices."""
    found = {}
    for batch in data.train_dataloader():
        moved = data.on_after_batch_transfer(batch, 0)
        found |= dict(zip(batch["index"].tolist(), moved["image"], strict=True))
    return torch.stack([found[i] for i in range(n)])


def over_examples(x):
    return [0, *range(2, x.ndim)]


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_arrive_and_can_be_restored(tmp_path, alone, kind, streaming):
    arrays = examples(kind)
    data = module(write(tmp_path / "d", stored(kind, arrays)), kind, streaming=streaming)
    x = one_epoch(data, 12)
    if kind == "latents":
        assert data.normalization is None
        assert torch.equal(x, torch.from_numpy(arrays))
        return
    axes = over_examples(x)
    torch.testing.assert_close(x.mean(axes), torch.zeros(x.shape[1]), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(axes, correction=0), torch.ones(x.shape[1]))
    torch.testing.assert_close(data.normalization.restore(x), torch.from_numpy(arrays))
    expected = arrays.astype(np.float64).mean(tuple(over_examples(arrays)))
    assert data.normalization.shift.numpy() == pytest.approx(expected, rel=1e-13)

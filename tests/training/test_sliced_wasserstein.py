"""The sliced Wasserstein distance, and the callback that measures it."""

import json
import math
from functools import partial

import lightning as L
import pytest
import torch

import lit_diffusion as ld
from lit_diffusion.nn import ResidualMLP
from lit_diffusion.training import DataModule, LitDiffusion, SlicedWasserstein
from lit_diffusion.training.evaluation.sliced_wasserstein import features_of, sliced_wasserstein


def test_a_shift_in_one_of_d_directions_is_its_length_over_the_root_of_d():
    x = torch.randn(400, 4)
    shifted = x + torch.tensor([2.0, 0, 0, 0])
    assert sliced_wasserstein(x, shifted, 4000) == pytest.approx(2 / math.sqrt(4), rel=0.05)
    assert sliced_wasserstein(x, x[torch.randperm(400)]) == pytest.approx(0, abs=1e-6)


def test_sets_of_other_sizes_are_compared_by_quantiles():
    x = torch.randn(100, 3)
    assert sliced_wasserstein(x, x.repeat(3, 1)) == pytest.approx(0, abs=1e-6)
    assert sliced_wasserstein(x.repeat(3, 1), x) == pytest.approx(0, abs=1e-6)


def test_a_set_of_points_has_no_order_and_a_signal_has():
    x = torch.randn(5, 2, 8)
    again = x[:, :, torch.randperm(8)]
    torch.testing.assert_close(features_of(x, "points"), features_of(again, "points"))
    assert not torch.allclose(features_of(x, "signal"), features_of(again, "signal"))
    # A shift of all points by v is ‖v‖²/2 on average over the directions of the plane.
    v = torch.tensor([3.0, 4.0])[:, None]
    moved = features_of(x + v, "points") - features_of(x, "points")
    length = moved.square().sum(1) / 8
    torch.testing.assert_close(length, length[:1].expand(5))
    assert 0.2 * 25 < float(length[0]) < 0.8 * 25


def trainer(folder, callback, **settings):
    return L.Trainer(
        default_root_dir=folder, accelerator="cpu", callbacks=[callback], logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        num_sanity_val_steps=0, **settings,
    )  # fmt: skip


def swirl(**settings):
    given = {"batch_size": 64, "steps_per_epoch": 30, "val_examples": 64}
    return DataModule("swirl", shape=(2, 1, 1), label_key=None, **given | settings)


def small_model():
    return LitDiffusion(
        ResidualMLP((2, 1, 1), features=16),
        shape=(2, 1, 1),
        sampler=ld.DDIMSampler(steps=5),
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
    )


def test_a_fit_measures_its_samples_beside_the_baseline(tmp_path, monkeypatch):
    monkeypatch.setattr(L.Trainer, "log_dir", str(tmp_path), raising=False)
    callback = SlicedWasserstein(num_samples=200, projections=32)
    run = trainer(tmp_path, callback, max_steps=30)
    run.fit(small_model(), swirl())
    value, baseline = (
        float(run.callback_metrics[f"val/sliced_wasserstein{end}"]) for end in ("", "_baseline")
    )
    # The first 200 training and test examples of swirl are the same points.
    assert baseline == pytest.approx(0, abs=1e-6)
    assert 0.05 < value < 2
    records = json.loads((tmp_path / "metrics.json").read_text())
    assert [r["name"] for r in records] == ["sliced_wasserstein", "sliced_wasserstein_baseline"]
    assert records[0]["value"] == pytest.approx(value, rel=1e-5)
    assert records[0]["protocol"]["samples"] == 200
    assert records[0]["protocol"]["reference"] == {"split": "test", "examples": 200}
    assert "200 examples of split test" in callback.summary


def test_what_cannot_be_compared_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="num_samples must be at least 2"):
        SlicedWasserstein(num_samples=1)
    loader = torch.utils.data.DataLoader(torch.zeros(4, 2, 1, 1), batch_size=2)
    with pytest.raises(ValueError, match="expected a DataModule to compare samples with"):
        trainer(tmp_path, SlicedWasserstein(), max_steps=1).fit(small_model(), loader, loader)

"""The adaptive schedule along a run: fed, shared by the ranks, resumed, switched on later."""

import json
import sys
from pathlib import Path

import pytest
import torch
import warm
import yaml
from test_bound import tiny_data, tiny_model, trainer

import lit_diffusion as ld
from lit_diffusion.training import EMA, AdaptiveScheduleUpdate, LastCheckpoint, LitDiffusion

CONFIGS = Path(__file__).parents[2] / "configs"


def adaptive_model(**arguments):
    schedule = ld.AdaptiveSchedule(-10.0, 13.3, bins=20, decay=0.9)
    return tiny_model(schedule=schedule, weighting=ld.SigmoidWeighting(), **arguments)


def fit(folder, steps, ckpt_path=None, stop=None, model=None, update=None, ema=True, **arguments):
    last = LastCheckpoint(**({} if stop is None else {"every_n_steps": stop}))
    model = adaptive_model() if model is None else model
    update = AdaptiveScheduleUpdate(every_n_steps=3) if update is None else update
    run = trainer(folder, [*([EMA(0.9)] if ema else []), *([update] if update else []), last],
                  max_steps=stop or steps, **arguments)  # fmt: skip
    run.fit(model, tiny_data(steps_per_epoch=6), ckpt_path=ckpt_path)
    return model, last._path


def test_it_follows_the_weighted_loss(tmp_path):
    model, _ = fit(tmp_path, 30)
    schedule = model.loss.schedule
    assert int(schedule.updates) == 10
    # A fresh network says nothing, so its error of ε is about σ² + …: w makes it fall with λ.
    density = schedule.log_prob(torch.tensor([-5.0, 10.0])).exp()
    assert float(density[0]) > 1.5 * float(density[1])


def test_without_the_weight_it_follows_the_error(tmp_path):
    weighted, _ = fit(tmp_path / "a", 12)
    plain, _ = fit(tmp_path / "b", 12, update=AdaptiveScheduleUpdate(3, weighted=False))
    high = [float(m.loss.schedule.log_prob(torch.tensor([10.0])).exp()) for m in (weighted, plain)]
    assert high[1] > high[0]


@pytest.mark.parametrize("stop", [4, 6])
def test_a_resumed_run_is_the_same_run(tmp_path, stop):
    # 4 is between two updates: what was added up until then must come along.
    whole, _ = fit(tmp_path / "whole", 9)
    _, half = fit(tmp_path / "half", 9, stop=stop)
    again, _ = fit(tmp_path / "half", 9, ckpt_path=half)
    ours, theirs = again.state_dict(), whole.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_saving_does_not_change_it(tmp_path):
    often, _ = fit(tmp_path / "often", 6, stop=None)
    seldom = adaptive_model()
    run = trainer(tmp_path / "seldom", [EMA(0.9), AdaptiveScheduleUpdate(3),
                                        LastCheckpoint(every_n_steps=1)], max_steps=6)  # fmt: skip
    run.fit(seldom, tiny_data(steps_per_epoch=6))
    assert torch.equal(often.loss.schedule.beyond, seldom.loss.schedule.beyond)


@pytest.mark.parametrize("ema", [True, False])
def test_it_can_be_switched_on_and_off_in_the_middle(tmp_path, ema):
    plain = tiny_model(schedule=ld.CosineSchedule(-10.0, 13.3), weighting=ld.SigmoidWeighting())
    _, path = fit(tmp_path, 4, model=plain, update=False, ema=ema)
    model, path = fit(tmp_path, 10, ckpt_path=path, ema=ema)
    assert int(model.loss.schedule.updates) == 2
    loaded = LitDiffusion.load_from_checkpoint(path)
    assert torch.equal(loaded.loss.schedule.beyond, model.loss.schedule.beyond)
    back = tiny_model(schedule=ld.CosineSchedule(-10.0, 13.3), weighting=ld.SigmoidWeighting())
    fit(tmp_path, 12, ckpt_path=path, model=back, update=False, ema=ema)


def test_accumulated_steps_count_once(tmp_path):
    model, _ = fit(tmp_path, 6, accumulate_grad_batches=2)
    assert int(model.loss.schedule.updates) == 2
    # 12 micro-batches of 8: what the bins weigh says how many examples they saw.
    seen = torch.log1p(-model.loss.schedule.weight) / torch.log(
        torch.tensor(0.9, dtype=torch.float64)
    )
    assert float(seen.sum()) == pytest.approx(96, abs=1e-6)


TWO_RANKS = """
import sys, json
sys.path.insert(0, {tests!r})
from test_adaptive import *
if __name__ == "__main__":
    run = trainer({folder!r}, [EMA(0.9), AdaptiveScheduleUpdate(2), LastCheckpoint()], devices=2,
                  strategy="ddp", max_steps=5)
    model = adaptive_model()
    seen, fed = [], []
    absorb, tally = model.loss.schedule.absorb, model.loss.schedule.tally
    model.loss.schedule.absorb = lambda sums: (seen.append(sums.tolist()), absorb(sums))
    model.loss.schedule.tally = lambda *pair: (
        fed.append([values.tolist() for values in pair]), tally(*pair)
    )[1]
    run.fit(model, tiny_data(batch_size=4))
    state = model.loss.schedule.beyond.tolist()
    Path({folder!r}, f"rank{{run.global_rank}}.json").write_text(
        json.dumps([run.global_rank, state, seen, fed])
    )
"""


@pytest.mark.slow
def test_two_ranks_share_one_schedule(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_RANKS.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    done = warm.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("rank*.json"))]
    (_, one, sums, fed), (_, other, other_sums, other_fed) = told
    assert one == other
    assert sums == other_sums
    # Every example of both ranks was counted, and one schedule fed with the sums is that schedule.
    assert [sum(update[0]) for update in sums] == [16, 16]
    alone = adaptive_model().loss.schedule
    for update in sums:
        alone.absorb(torch.tensor(update, dtype=torch.float64))
    assert alone.beyond.tolist() == pytest.approx(one, abs=1e-12)
    # And one rank that sees what both saw, two steps at a time, comes to the same schedule.
    single = adaptive_model().loss.schedule
    for first in (0, 2):
        pairs = [*fed[first : first + 2], *other_fed[first : first + 2]]
        both = zip(*pairs, strict=True)
        single.update(*(torch.cat([torch.tensor(v) for v in values]) for values in both))
    assert single.beyond.tolist() == pytest.approx(one, abs=1e-6)
    assert single.beyond.tolist() != adaptive_model().loss.schedule.beyond.tolist()
    kept = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    waiting = kept["adaptive_schedule_sums"]
    assert waiting.shape == (2, 4, 20)
    assert waiting[:, 0].sum(1).tolist() == [4, 4]  # the fifth step, of both ranks


def test_it_needs_its_schedule(tmp_path):
    with pytest.raises(ValueError, match=r"expected an AdaptiveSchedule as model\.schedule"):
        fit(tmp_path, 2, model=tiny_model())
    with pytest.raises(ValueError, match="at least 1"):
        AdaptiveScheduleUpdate(every_n_steps=0)


def test_not_finite_losses_are_reported(tmp_path):
    class Breaks(ld.ELBOWeighting):
        def forward(self, logsnr):
            return torch.where(logsnr > 12, torch.inf, 1.0)

    model = adaptive_model()
    update = AdaptiveScheduleUpdate(1)
    run = trainer(tmp_path, [update], max_steps=1)
    batch = {"logsnr": torch.tensor([0.0, 13.0]), "eps_mse": torch.ones(2)}
    model.loss.weighting = Breaks()
    run.strategy.connect(model)
    update.on_fit_start(run, model)
    run.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.completed = 1
    update._last_step = -1
    update.on_train_batch_end(run, model, batch, None, 0)
    model.loss.schedule.absorb(update._sums)
    assert int(model.loss.schedule.rejected) == 1
    with pytest.warns(UserWarning, match="1 non-finite losses were left out"):
        update.on_train_end(run, model)


# Latents must be made first: test_latents does.
BASES = sorted(path.stem for path in CONFIGS.glob("*.yaml") if "latent" not in path.stem)
OVERLAYS = sorted(path.stem for path in CONFIGS.glob("objective/*.yaml"))


@pytest.mark.parametrize(
    ("base", "overlay"),
    [*((base, None) for base in BASES), *(("digits", name) for name in OVERLAYS)],
)
def test_the_overlay_works_on_top(cli, base, overlay, grey, rgb, rgb64):
    files = [f"{base}.yaml", *([f"objective/{overlay}.yaml"] if overlay else [])]
    words = [word for file in files for word in ("--config", CONFIGS / file)]
    known = {"cifar10": rgb, "imagenet64": rgb64, "mnist": grey, "vdm-mnist": grey}
    data = known.get(base)
    small = ["--model.network.channels=[8,8]", "--model.network.attention=[]"]
    words += [
        "--trainer.max_steps=2", "--trainer.enable_progress_bar=false",
        "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1", "--data.steps_per_epoch=2",
        "--data.batch_size=4", "--data.val_examples=4", "--data.num_workers=0",
        "--model.sampler.steps=2",
        *([] if data is None else [f"--data.path={data}", "--data.val_split=test"]),
        *(small if base in ("digits", "cifar10", "imagenet64", "mnist") else []),
    ]  # fmt: skip
    adaptive = ["--config", CONFIGS / "with" / "adaptive.yaml"]
    code, out, err = cli("fit", *words, *adaptive, "--trainer.callbacks.every_n_steps=1")
    assert code == 0, err
    assert "sampled from AdaptiveSchedule" in err
    folder = Path(out.strip().splitlines()[-1].removeprefix("Run folder: "))
    model = LitDiffusion.load_from_checkpoint(folder / "checkpoints" / "last.ckpt")
    schedule = model.loss.schedule
    assert int(schedule.updates) == 2
    assert not torch.equal(schedule.beyond, torch.linspace(0, 1, 101, dtype=torch.float64))
    if overlay is None:  # the range of the config below
        below = yaml.safe_load((CONFIGS / files[0]).read_text())["model"]["schedule"]["init_args"]
        assert schedule.ends == (below["logsnr_min"], below["logsnr_max"])


def test_another_number_of_bins_is_refused(tmp_path):
    _, path = fit(tmp_path, 4)
    model = tiny_model(schedule=ld.AdaptiveSchedule(-10.0, 13.3, bins=30))
    with pytest.raises(ValueError, match="has 20 bins, not 30: set bins=20"):
        fit(tmp_path, 6, model=model, ckpt_path=path)

"""The averages of a run: what they are, that a kill does not change them, others made of them."""

import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from test_module import tiny_data, tiny_model, trainer

from lit_diffusion import PowerProfile, RunningAverage
from lit_diffusion.averaging import ConstantProfile
from lit_diffusion.training import EMA, Averages, LastCheckpoint, LitDiffusion
from lit_diffusion.training.callbacks.ema import trained_weights
from lit_diffusion.training.commands.ema import ema
from lit_diffusion.training.run.checkpoints import load_checkpoint
from lit_diffusion.training.run.snapshots import mix, next_step, read_snapshots


class Follow(L.Callback):
    """Follows the raw weights by averages of its own, each by itself, tensor by tensor."""

    def __init__(self, *profiles):
        self.profiles, self.step, self.losses = profiles, 0, []

    def on_fit_start(self, trainer, pl_module):
        named = pl_module.named_parameters()
        self.first = {name: p.detach().clone() for name, p in named}
        self.averages = [{n: w.clone() for n, w in self.first.items()} for _ in self.profiles]

    def on_train_batch_end(self, trainer, pl_module, outputs, *args):
        self.losses.append(float(outputs["loss"]))
        if trainer.global_step > self.step:
            self.step = trainer.global_step
            self.raw = {n: p.detach().clone() for n, p in pl_module.named_parameters()}
            for profile, average in zip(self.profiles, self.averages, strict=True):
                for name, value in average.items():
                    value.lerp_(self.raw[name], profile.step(self.step))


def run(folder, callbacks, steps, ckpt_path=None, data=None, model=None, **arguments):
    """Train a small model; returns it."""
    model = tiny_model() if model is None else model
    callbacks = [*callbacks, LastCheckpoint(every_n_steps=5)]
    data = data or tiny_data(streaming=False, steps_per_epoch=10)
    fitted = trainer(folder, max_steps=steps, callbacks=callbacks, **arguments)
    fitted.fit(model, data, ckpt_path=ckpt_path)
    return model


def die(folder, callbacks, steps, at, **arguments):
    """Train until the step, and end as a kill does: nothing is put away."""

    class Dies(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == at:
                raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        run(folder, [*callbacks, Dies()], steps, **arguments)
    step = load_checkpoint(last(folder))["global_step"]
    assert 0 < step < at
    return step


def last(folder):
    return folder / "checkpoints" / "last.ckpt"


def further(folder):
    """The averages that the callback Averages has in the checkpoint, by name."""
    kept = load_checkpoint(last(folder))["callbacks"]["Averages"]["averages"]
    return {one["name"]: one for one in kept}


def same(ours, theirs, names=None):
    names = list(theirs if names is None else names)
    return bool(names) and all(torch.equal(ours[n], theirs[n]) for n in names)


def distance(a, b, names):
    return sum(float((a[n].double() - b[n].double()).square().sum()) for n in names) ** 0.5


# What is followed -----------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_several_at_once_are_each_as_if_alone(tmp_path, accumulate):
    profiles = PowerProfile(0.05), PowerProfile(0.1), ConstantProfile(0.5), ConstantProfile(0.99)
    follow = Follow(*profiles)
    callbacks = [follow, Averages([0.05, 0.1], [0.5, 0.99], 0), EMA(sigma_rel=0.2)]
    run(tmp_path, callbacks, 8, accumulate_grad_batches=accumulate, val_check_interval=4)
    found = further(tmp_path)
    assert list(found) == [str(profile) for profile in profiles]
    for profile, expected in zip(profiles, follow.averages, strict=True):
        kept = found[str(profile)]
        assert kept["updates"] == 8
        assert same(kept["weights"], expected), profile
        # Neither the first weights nor the last.
        assert not any(torch.equal(kept["weights"][n], follow.raw[n]) for n in expected)
        moved = [n for n in expected if not torch.equal(follow.first[n], follow.raw[n])]
        assert moved
        assert not any(torch.equal(kept["weights"][n], follow.first[n]) for n in moved)
    assert not (tmp_path / "averages").exists()


def test_the_power_average_is_what_is_validated_and_saved(tmp_path):
    follow, average = Follow(PowerProfile(0.1)), EMA(sigma_rel=0.1)
    seen = {}

    class Watch(L.Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            seen["average"] = {n: p.detach().clone() for n, p in pl_module.named_parameters()}
            seen["profile"] = average.profile

    model = run(tmp_path, [average, follow, Watch()], 6, val_check_interval=6)
    assert seen["profile"] == average.profile == "EMA(sigma_rel=0.1)"
    assert same(seen["average"], follow.averages[0])
    checkpoint = load_checkpoint(last(tmp_path))
    assert checkpoint["average"] == "EMA(sigma_rel=0.1)"
    assert same(checkpoint["state_dict"], follow.averages[0])
    assert same(checkpoint["current_model_state"], follow.raw)
    assert same(dict(model.named_parameters()), follow.averages[0])


def test_averages_and_snapshots_leave_training_alone(tmp_path):
    plain, watched = Follow(), Follow()
    run(tmp_path / "plain", [plain, EMA(0.9)], 6)
    run(tmp_path / "watched", [watched, EMA(0.9), Averages(snapshot_every_n_steps=2)], 6)
    assert plain.losses == watched.losses
    ours, theirs = (load_checkpoint(last(tmp_path / name)) for name in ("watched", "plain"))
    for key in ("state_dict", "current_model_state"):
        assert same(ours[key], theirs[key])


def test_only_what_is_trained_is_averaged_under_all_its_names(tmp_path):
    class Tied(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(2, 2)
            self.b = self.a
            self.frozen = torch.nn.Linear(2, 2).requires_grad_(False)
            self.register_buffer("count", torch.zeros(1))

    names = {"a.weight", "a.bias", "b.weight", "b.bias"}
    assert set(trained_weights(Tied())) == names


def test_a_bfloat16_model_has_a_float32_average():
    model = tiny_model().to(torch.bfloat16)
    average, clock = EMA(0.999), SimpleNamespace(global_step=0)
    average.on_fit_start(clock, model)
    average.on_train_start(clock, model)
    weights = dict(model.named_parameters())
    name = next(iter(weights))
    start = weights[name].detach().float().clone()
    with torch.no_grad():
        weights[name].add_(1.0)
    moved = weights[name].detach().clone()
    for step in range(1, 51):
        clock.global_step = step
        average.on_train_batch_end(clock, model)
    checkpoint = {"state_dict": {n: w.detach().clone() for n, w in weights.items()}}
    average.on_save_checkpoint(clock, model, checkpoint)
    kept = checkpoint["state_dict"][name]
    expected = RunningAverage(ConstantProfile(0.999), [start])
    for _ in range(50):
        expected.update([moved.float()])
    assert kept.dtype == torch.float32
    assert torch.equal(kept, expected.values[0])
    average.on_validation_start(clock, model)
    assert torch.equal(weights[name], kept.to(torch.bfloat16))
    average.on_validation_end(clock, model)
    assert torch.equal(weights[name], moved)


# Going on -------------------------------------------------------------------------------------


def cast():
    return [EMA(sigma_rel=0.1), Averages([0.05, 0.1], [0.9], snapshot_every_n_steps=2)]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_that_was_stopped_leaves_the_same_averages_and_files(tmp_path, accumulate):
    whole, part = tmp_path / "whole", tmp_path / "part"
    arguments = {"accumulate_grad_batches": accumulate, "val_check_interval": 5}
    run(whole, cast(), 14, **arguments)
    step = die(part, cast(), 14, at=11, **arguments)
    folder = part / "averages"
    assert sorted(path.stem for path in folder.iterdir()) == [
        f"step-{n:07d}" for n in (2, 4, 6, 8, 10)
    ]
    # What is later than the checkpoint, and half of a file, is of a future that is not to be.
    for n in (10, 11, 13):
        if n > step:
            (folder / f"step-{n:07d}.safetensors").write_bytes(b"of another future")
    (folder / ".step-0000013.safetensors.tmp").write_bytes(b"half")
    run(part, cast(), 14, ckpt_path=last(part), **arguments)
    ours, theirs = load_checkpoint(last(part)), load_checkpoint(last(whole))
    assert ours["average"] == theirs["average"] == "EMA(sigma_rel=0.1)"
    for key in ("state_dict", "current_model_state"):
        assert same(ours[key], theirs[key])
    for name, one in further(whole).items():
        assert further(part)[name]["updates"] == one["updates"] == 14
        assert same(further(part)[name]["weights"], one["weights"])
    files = [{p.name: p.read_bytes() for p in (f / "averages").iterdir()} for f in (whole, part)]
    assert sorted(files[0]) == [f"step-{n:07d}.safetensors" for n in (2, 4, 6, 8, 10, 12, 14)]
    assert files[0] == files[1]


def test_an_older_checkpoint_goes_on(tmp_path):
    """One that names no average and has no others: as they were before there were several."""
    run(tmp_path / "whole", [EMA(0.9)], 10)
    die(tmp_path / "part", [EMA(0.9)], 10, at=7)
    checkpoint = load_checkpoint(last(tmp_path / "part"))
    del checkpoint["average"], checkpoint["callbacks"]["EMA"]["profile"]
    assert checkpoint["callbacks"]["EMA"] == {"updates": 5}
    torch.save(checkpoint, last(tmp_path / "part"))
    average = EMA(decay=0.9)
    run(tmp_path / "part", [average], 10, ckpt_path=last(tmp_path / "part"))
    ours, theirs = (load_checkpoint(last(tmp_path / name)) for name in ("part", "whole"))
    assert average.profile == ours["average"] == "EMA(decay=0.9)"
    for key in ("state_dict", "current_model_state"):
        assert same(ours[key], theirs[key])


def test_another_profile_in_the_middle_says_so(tmp_path):
    run(tmp_path, [EMA(0.9)], 5)
    kept = load_checkpoint(last(tmp_path))
    # A constant decay goes on from the average that there is.
    follow = Follow()
    run(tmp_path / "decay", [EMA(0.99), follow], 6, ckpt_path=last(tmp_path))
    changed = load_checkpoint(last(tmp_path / "decay"))
    assert changed["average"] == "EMA(decay=0.99)"
    for name, w in follow.raw.items():
        expected = kept["state_dict"][name].lerp(w, 1 - min(0.99, 7 / 16))
        assert torch.equal(changed["state_dict"][name], expected)
    # A power function cannot: it begins with the weights that are there.
    average, others, follow = EMA(sigma_rel=0.1), Averages([0.05], [0.9], 0), Follow()
    with (
        pytest.warns(
            UserWarning, match=r"the average EMA\(sigma_rel=0\.1\) .*, got EMA\(decay=0\.9\)"
        ),
        pytest.warns(
            UserWarning, match=r"does not contain EMA\(sigma_rel=0\.05\), EMA\(decay=0\.9\);"
        ),
    ):
        run(tmp_path / "sigma_rel", [average, others, follow], 6, ckpt_path=last(tmp_path))
    changed = load_checkpoint(last(tmp_path / "sigma_rel"))
    assert average.profile == changed["average"] == "EMA(sigma_rel=0.1, from step 5)"
    assert same(changed["state_dict"], follow.raw)  # after one step
    late = further(tmp_path / "sigma_rel")
    assert list(late) == ["EMA(sigma_rel=0.05, from step 5)", "EMA(decay=0.9, from step 5)"]
    # And these two names are kept when it goes on once more.
    run(
        tmp_path / "sigma_rel",
        [EMA(sigma_rel=0.1), Averages([0.05], [0.9], 0)],
        7,
        last(tmp_path / "sigma_rel"),
    )
    assert list(further(tmp_path / "sigma_rel")) == list(late)
    assert {one["updates"] for one in further(tmp_path / "sigma_rel").values()} == {2}


def test_the_name_of_what_a_checkpoint_has(tmp_path):
    model = run(tmp_path, [EMA(sigma_rel=0.1)], 2)
    average = EMA(0.9)  # as the config may say by now
    trainer(tmp_path, callbacks=[average, LastCheckpoint()]).validate(
        model, tiny_data(), ckpt_path=last(tmp_path), verbose=False
    )
    assert average.profile == "EMA(sigma_rel=0.1)"


# Snapshots ------------------------------------------------------------------------------------


def test_snapshots_are_as_dense_as_the_window_is_wide():
    step, steps = 0, []
    while step < 10**6:
        step = next_step(step, 100)
        steps.append(step)
    assert steps[:10] == [100 * n for n in range(1, 11)]
    assert all(b - a <= max(100, 0.1 * a + 100) for a, b in pairwise(steps))
    assert all(step % 100 == 0 for step in steps)
    assert len(steps) < 110
    # The same from wherever one asks, which is what a resumed run relies on.
    for asked in (0, 99, 100, 101, 1234, 500_000):
        assert next_step(asked, 100) == next(s for s in steps if s > asked)


def test_a_snapshot_is_the_average_in_half_precision(tmp_path):
    follow = Follow(PowerProfile(0.05), PowerProfile(0.1))
    model = tiny_model()
    with torch.no_grad():
        next(model.parameters()).mul_(1e7)
    run(tmp_path, [follow, Averages([0.1, 0.05], snapshot_every_n_steps=3)], 4, model=model)
    stored = read_snapshots(tmp_path)
    widths = [(one.step, one.snapshot.profile.sigma_rel, one.snapshot.updates) for one in stored]
    assert widths == [(3, 0.05, 3), (3, 0.1, 3), (4, 0.05, 4), (4, 0.1, 4)]
    for one, average in zip(stored[2:], follow.averages, strict=True):
        found = mix([one], [1.0])
        assert found.keys() == average.keys()
        for name, value in average.items():
            wide = bool(value.abs().max() > 65504)
            assert torch.equal(found[name], value if wide else value.half().float()), name
        assert any(value.abs().max() > 65504 for value in average.values())
    numbers = sum(value.numel() for value in follow.raw.values())
    assert stored[0].path.stat().st_size < 1.3 * 2 * 2 * numbers + 20_000
    plain = tmp_path / "plain"
    plain.touch()
    assert stored[0].path.stat().st_mode == plain.stat().st_mode  # for whoever may read the rest


def test_what_cannot_be_written_does_not_end_the_run(tmp_path):
    (tmp_path / "averages").write_text("a file where the folder should be")
    with pytest.warns(
        UserWarning, match=r"The snapshot .* cannot be written.* Training continues"
    ):
        run(tmp_path, [EMA(0.9), Averages(snapshot_every_n_steps=2)], 2)
    assert load_checkpoint(last(tmp_path))["global_step"] == 2


def test_weights_that_are_no_numbers_leave_no_snapshot(tmp_path):
    class Breaks(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, *args):
            if trainer.global_step == 3:
                with torch.no_grad():
                    next(pl_module.parameters()).fill_(float("nan"))

    with pytest.warns(UserWarning, match="no snapshot at step 4, since a weight is not finite"):
        run(tmp_path, [Breaks(), Averages(snapshot_every_n_steps=2)], 4)
    assert {one.step for one in read_snapshots(tmp_path)} == {2}


def test_arguments():
    with pytest.raises(ValueError, match=r"expected either decay or sigma_rel, got 0\.9 and 0\.1"):
        EMA(0.9, sigma_rel=0.1)
    assert EMA().profile == "EMA(decay=0.999)"
    with pytest.raises(ValueError, match="EMA: sigma_rel must be"):
        EMA(sigma_rel=0.5)
    with pytest.raises(ValueError, match="at least one std or decay, none repeated"):
        Averages([0.1, 0.1])
    with pytest.raises(ValueError, match="at least one std or decay, none repeated"):
        Averages([])
    with pytest.raises(ValueError, match="at least 0"):
        Averages(snapshot_every_n_steps=-1)


# Afterwards -----------------------------------------------------------------------------------

WANTED = (0.06, 0.08, 0.13, 0.2, 0.25)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with snapshots of two widths, and six others that were followed directly."""
    folder = tmp_path_factory.mktemp("trained")
    follow = Follow(*map(PowerProfile, WANTED))
    callbacks = [EMA(0.9), follow, Averages(decays=[0.99], snapshot_every_n_steps=10)]
    run(folder, callbacks, 150, limit_val_batches=0)
    return folder, follow


@pytest.mark.parametrize("sigma_rel", WANTED)
def test_a_reconstruction_is_the_average_that_was_followed(trained, tmp_path, sigma_rel):
    folder, follow = trained
    out = tmp_path / "made.ckpt"
    told = str(ema(folder, sigma_rel=sigma_rel, out=out))
    direct = follow.averages[WANTED.index(sigma_rel)]
    made = load_checkpoint(out)
    files = len(list((folder / "averages").glob("step-*")))
    assert made["average"] == f"EMA(sigma_rel={sigma_rel}, post hoc, {files} snapshots)"
    assert made["global_step"] == 150
    foretold = float(re.search(r"relative error about (\S+) \(", told)[1])
    off = distance(made["state_dict"], direct, direct)
    nothing = {name: torch.zeros_like(w) for name, w in direct.items()}
    real = off / distance(direct, nothing, direct)
    assert 0.5 < real / foretold < 2, told
    assert real < 4e-4
    # It is that average and no other one: neither the weights nor the next ones.
    others = [follow.raw, *(other for other in follow.averages if other is not direct)]
    assert off < min(distance(other, direct, direct) for other in others) / 6
    assert LitDiffusion.load_from_checkpoint(out).sample(1).shape == (1, 1, 8, 8)


def test_what_was_followed_comes_out_as_it_is(trained, tmp_path):
    folder, _ = trained
    kept = further(folder)
    out = tmp_path / "x.ckpt"
    for words, name in (
        ({"sigma_rel": 0.05}, "EMA(sigma_rel=0.05)"),
        ({"decay": 0.99}, None),
    ):
        told = str(ema(folder, out=out, **words))
        made, name = load_checkpoint(out), name or "EMA(decay=0.99)"
        assert told.splitlines() == [f"{name} at step 150, as kept during training", str(out)]
        assert made["average"] == name
        assert same(made["state_dict"], kept[name]["weights"])
    ema(folder, decay=0.9, out=out)
    assert same(load_checkpoint(out)["state_dict"], load_checkpoint(last(folder))["state_dict"])
    # At an earlier step it comes from that snapshot, to the rounding of many.
    told = str(ema(folder, sigma_rel=0.1, step=99))
    path = folder / "checkpoints" / "sigma_rel-0.1-step-0000090.ckpt"
    assert told.splitlines()[1] == str(path)
    made = load_checkpoint(path)
    assert (made["global_step"], made["average"]) == (
        90,
        "EMA(sigma_rel=0.1, post hoc, 9 snapshots)",
    )
    (stored,) = [s for s in read_snapshots(folder) if s[1] == 90 and s[2].profile.sigma_rel == 0.1]
    expected = mix([stored], [1.0])
    size = distance(expected, {n: torch.zeros_like(w) for n, w in expected.items()}, expected)
    assert distance(made["state_dict"], expected, expected) < 5e-4 * size
    path.unlink()


def test_a_reconstruction_is_validated_but_not_trained(trained, tmp_path):
    folder, _ = trained
    out = tmp_path / "made.ckpt"
    assert ema(folder, sigma_rel=0.08, out=out).path == out
    average = EMA(0.9)
    run = trainer(tmp_path, callbacks=[average])
    found = run.validate(tiny_model(), tiny_data(), ckpt_path=out, verbose=False)
    model = LitDiffusion.load_from_checkpoint(out)
    again = trainer(tmp_path).validate(model, tiny_data(), verbose=False)
    assert found == again
    assert average.profile == load_checkpoint(out)["average"]
    with pytest.raises(
        ValueError, match=r"weights alone \(EMA\(sigma_rel=0\.08, post hoc, .*last\.ckpt"
    ):
        trainer(tmp_path, max_steps=200, callbacks=[EMA(0.9)]).fit(
            tiny_model(), tiny_data(), ckpt_path=out
        )


def test_a_late_average_is_on_its_own_clock(tmp_path):
    """Averages that were added in the middle count from there, and do not mix with others."""
    run(tmp_path, [EMA(0.9), Averages([0.1], snapshot_every_n_steps=2)], 10)
    follow = Follow()
    with pytest.warns(UserWarning, match="averaging starts at step 10"):
        run(tmp_path, [EMA(0.9), follow, Averages([0.2], snapshot_every_n_steps=2)], 20,
            ckpt_path=last(tmp_path))  # fmt: skip
    out = tmp_path / "late.ckpt"
    told = str(ema(tmp_path, sigma_rel=0.2, step=20, out=out))
    assert "EMA(sigma_rel=0.2, post hoc, 5 snapshots, from step 10) at step 20" in told
    told = str(ema(tmp_path, sigma_rel=0.1, step=10, out=out))
    assert "EMA(sigma_rel=0.1, post hoc, 5 snapshots) at step 10" in told


MISTAKES = {
    "sigma_rel too wide": (["--sigma_rel", "0.3"], "at most 0.2887"),
    "sigma_rel of nothing": (["--sigma_rel", "0"], "above 0"),
    "out of reach": (
        ["--sigma_rel", "0.005"],
        r"cannot be reconstructed .* Possible is 0\.0\d+ to 0\.2886",
    ),
    "before the first": (
        ["--sigma_rel", "0.08", "--step", "9"],
        "no snapshot up to step 9: the first",
    ),
    "never followed": (["--decay", "0.5"], r"It has EMA\(decay=0\.9\), EMA\(sigma_rel=0\.05\)"),
    "decay at a step": (["--decay", "0.9", "--step", "50"], "without --step"),
    "both": (["--decay", "0.9", "--sigma_rel", "0.1"], "one of --sigma_rel and --decay"),
    "no checkpoint": (["--sigma_rel", "0.1", "--out", "made.pt"], r"--out must end in \.ckpt"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(trained, cli, mistake):
    words, expected = MISTAKES[mistake]
    before = sorted(trained[0].rglob("*"))
    code, out, err = cli("ema", trained[0], *words)
    assert (code, out) == (2, "")
    assert len([line for line in err.splitlines() if "error:" in line]) == 1
    assert re.search(expected, err), err
    assert sorted(trained[0].rglob("*")) == before
    assert not list(Path().iterdir())


def test_runs_that_have_nothing_to_make_it_from(trained, cli, tmp_path):
    def error(folder, *words):
        code, out, err = cli("ema", folder, *(words or ["--sigma_rel", "0.08"]))
        assert (code, out) == (2, "")
        assert len([line for line in err.splitlines() if "error:" in line]) == 1
        return err

    assert "No checkpoint at nowhere" in error("nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "last.ckpt" in error(empty)
    last(empty).parent.mkdir()
    last(empty).write_bytes(last(trained[0]).read_bytes())
    assert "no snapshots" in error(empty)
    (empty / "averages").mkdir()
    path = next((trained[0] / "averages").glob("step-*"))
    (empty / "averages" / path.name).write_bytes(path.read_bytes()[:1000])
    assert f"{path.name} is damaged, or another kind of file" in error(empty)
    other = tmp_path / "other"
    run(other, [EMA(0.9), Averages(snapshot_every_n_steps=2)], 2)
    last(other).write_bytes(last(trained[0]).read_bytes())
    # Another network: its names are the same, its shapes are not.
    checkpoint = load_checkpoint(last(other))
    name = next(iter(trained_weights(tiny_model())))
    checkpoint["state_dict"][name] = torch.zeros(3)
    torch.save(checkpoint, last(other))
    assert "do not belong to the model" in error(other, "--sigma_rel", "0.1", "--step", "2")


def test_what_there_is_is_listed(trained, cli):
    code, out, _ = cli("ema", trained[0])
    assert code == 0
    first, *snapshots, reach = out.splitlines()
    followed = "EMA(decay=0.9), EMA(sigma_rel=0.05), EMA(sigma_rel=0.1), EMA(decay=0.99)"
    assert first == f"In the checkpoint, of step 150: {followed}"
    assert [line.partition(" at ")[0] for line in snapshots] == [
        "Snapshots of EMA(sigma_rel=0.05)", "Snapshots of EMA(sigma_rel=0.1)",
    ]  # fmt: skip
    assert snapshots[0].startswith("Snapshots of EMA(sigma_rel=0.05) at step 10, 20, 30,")
    assert snapshots[0].endswith(" 150")
    assert re.fullmatch(r"Possible at step 150: sigma_rel 0\.0\d+ to 0\.2886", reach)


@pytest.mark.filterwarnings("ignore:Likelihood. this fit has no validation data")
def test_the_overlay(cli, configs):
    words = ["--trainer.max_steps=4", "--data.steps_per_epoch=4", "--data.val_examples=10",
             "--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false",
             "--model.network.channels=[8,8]", "--model.network.attention=[]",
             "--data.batch_size=8", "--trainer.log_every_n_steps=1",
             "--trainer.callbacks.snapshot_every_n_steps=1"]  # fmt: skip
    overlay = configs / "with" / "ema.yaml"
    code, out, err = cli("fit", "--config", configs / "digits.yaml", "--config", overlay, *words)
    assert code == 0, err
    folder = Path(out.splitlines()[-1].removeprefix("Run folder: "))
    code, out, err = cli("ema", folder, "--sigma_rel", "0.15", "--out", "made.ckpt")
    assert code == 0, err
    assert out.splitlines()[-1] == "made.ckpt"
    code, out, err = cli("sample", "--ckpt_path", "made.ckpt", "--num_samples", 1, "--sampler",
                         "DDIMSampler", "--sampler.steps", 2)  # fmt: skip
    assert code == 0, err

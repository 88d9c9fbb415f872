"""A loss or gradient that is not finite: the run stops or skips, and the step can be replayed."""

import functools
import json
import math
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import warm
from test_module import Record, StopAt, tiny_data, tiny_model, trainer
from torch import nn

from lit_diffusion.nn import UNet
from lit_diffusion.training import EMA, AdaptiveScheduleUpdate, Guard, LastCheckpoint
from lit_diffusion.training.run.checkpoints import load_checkpoint

ROOT = Path(__file__).parents[2]
ABOVE = 12.8  # λ at which the networks here break: a tenth of the steps have one
SEED = 4  # with which the first of these steps comes after the first epoch

# Ways to break -----------------------------------------------------------------------------------


class Burst(torch.autograd.Function):
    """Finite forwards; backwards infinite where told."""

    @staticmethod
    def forward(ctx, x, bad):
        ctx.save_for_backward(bad)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        (bad,) = ctx.saved_tensors
        return gradient.masked_fill(bad[:, None, None, None], torch.inf), None


class Exponential(nn.Module):
    """A layer that overflows."""

    def forward(self, x, bad):
        return x * torch.exp(1000.0 * bad)[:, None, None, None]


class Breaking(UNet):
    """A network that breaks at the clean end, in its output or in its gradient alone."""

    def __init__(self, shape=(1, 8, 8), above: float = ABOVE, backwards: bool = False):
        super().__init__(shape=shape, channels=(8, 8), attention=(), num_classes=10)
        self.layer = Exponential()
        self.above, self.backwards = above, backwards

    def forward(self, z, logsnr, label=None):
        out, bad = super().forward(z, logsnr, label), logsnr > self.above
        return Burst.apply(out, bad) if self.backwards else self.layer(out, bad)


def breaking(**arguments):
    torch.manual_seed(0)
    return tiny_model(network=Breaking(**arguments), seed=SEED)


def fit(folder, steps, callbacks, model=None, ckpt_path=None, data=None, **arguments):
    """Train in a process of our own; returns the record, the model and what stopped it."""
    record, error = Record(), None
    model = breaking() if model is None else model
    run = trainer(folder, max_steps=steps, callbacks=[record, EMA(0.9), *callbacks], **arguments)
    try:
        run.fit(model, data or tiny_data(), ckpt_path=ckpt_path)
    except ValueError as stop:
        error = str(stop)
    return record, model, error


def bad_steps(steps):
    """The steps that a run of `breaking()` must find, from the λ's of a run that cannot break."""
    record, _, _ = fit(Path("unused"), steps, [], model=breaking(above=math.inf))
    return [i for i, logsnr in enumerate(record.logsnr) if bool((logsnr > ABOVE).any())]


@pytest.fixture(scope="module")
def first():
    """The first step that is bad, a few after the beginning."""
    found = bad_steps(40)
    assert found[0] >= 2
    return found[0]


def told(folder):
    return [json.loads(p.read_text()) for p in sorted(folder.glob("**/non_finite/*.json"))]


# Stop --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backwards", "what"), [(False, "loss and gradient"), (True, "gradient")])
def test_stop_writes_down_the_first_bad_step(tmp_path, first, backwards, what):
    model, data = breaking(backwards=backwards), tiny_data(steps_per_epoch=40)
    record, _, error = fit(tmp_path, 40, [Guard()], model, data=data, log_every_n_steps=20)
    assert len(record.losses) == (first // 20 + 1) * 20  # seen at the log step, not before
    assert f"The {what} of step {first} w" in error
    (event,) = told(tmp_path)
    assert str(tmp_path / "non_finite" / f"step-{first:07d}.json") in error
    assert (event["step"], event["not_finite"], event["seed"]) == (first, what, SEED)
    (batch,) = event["batches"]
    assert batch["logsnr"] == record.logsnr[first].tolist()  # in all their digits
    assert event["checkpoint"] is None
    bad = [loss in ("nan", "inf") for loss in batch["losses"]]
    assert bad == [x > ABOVE and not backwards for x in batch["logsnr"]]
    if not backwards:
        assert f"λ = {max(batch['logsnr']):.4g}" in error


class NaNImage(L.Callback):
    """An image that is broken in one step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            batch["image"][3, 0, 2, 2] = math.nan


def test_a_broken_image_is_named(tmp_path):
    _, _, error = fit(tmp_path, 9, [NaNImage(4), Guard()], model=tiny_model(), log_every_n_steps=3)
    (event,) = told(tmp_path)
    (batch,) = event["batches"]
    assert event["step"] == 4
    assert [type(loss) for loss in batch["losses"]] == [float] * 3 + [str] + [float] * 4
    assert "(1 of 8 examples)" in error
    if batch["examples"] is not None:
        assert f"of example {batch['examples'][3]} " in error


def test_a_poisoned_checkpoint_never_replaces_a_good_one(tmp_path, first):
    """A checkpoint after every step, a log step never: the guard looks before each is written."""
    keep = LastCheckpoint(every_n_steps=1)
    guard = Guard()
    run = trainer(tmp_path, max_steps=40, callbacks=[EMA(0.9), guard, keep], log_every_n_steps=999)
    with pytest.raises(ValueError, match=f"step {first} were"):
        run.fit(breaking(), tiny_data())
    path = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint = load_checkpoint(path)
    assert checkpoint["global_step"] == first
    for state in (checkpoint["state_dict"], checkpoint["current_model_state"]):
        assert all(value.isfinite().all() for value in state.values() if value.is_floating_point())
    # Whoever saves afterwards, a signal handler for example, is refused, too.
    with pytest.raises(ValueError, match=f"step {first} were"):
        run.save_checkpoint(tmp_path / "late.ckpt")
    assert not (tmp_path / "late.ckpt").exists()
    # The file keeps the checkpoint it starts from, whatever becomes of the other.
    (event,) = told(tmp_path)
    start = tmp_path / "non_finite" / event["checkpoint"]
    path.unlink()
    assert load_checkpoint(start)["global_step"] == first


def test_the_end_and_a_validation_are_looked_at(tmp_path, first):
    *_, error = fit(tmp_path / "end", first + 2, [Guard()], log_every_n_steps=999)
    assert f"step {first}" in error
    record, _, error = fit(
        tmp_path / "val", 40, [Guard()], log_every_n_steps=999, val_check_interval=5
    )
    assert f"step {first}" in error
    assert len(record.val) == first // 5  # none of weights that are NaN
    *_, error = fit(tmp_path / "clean", 4, [Guard()], model=tiny_model())
    assert error is None
    assert not told(tmp_path / "clean")


def test_a_run_that_never_logs_does_not_remember_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr("lit_diffusion.training.callbacks.guard.MAX_STEPS", 5)
    guard = Guard()
    lengths = []
    note = L.pytorch.callbacks.LambdaCallback(
        on_train_batch_end=lambda *a: lengths.append(len(guard._steps))
    )
    fit(tmp_path, 12, [guard, note], model=tiny_model(), log_every_n_steps=999)
    assert max(lengths) == 4


def test_training_is_the_same_with_a_guard(tmp_path):
    plain, model, _ = fit(tmp_path, 6, [], model=tiny_model(), gradient_clip_val=0.1)
    guarded, other, _ = fit(tmp_path, 6, [Guard()], model=tiny_model(), gradient_clip_val=0.1)
    assert plain.losses == guarded.losses
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())


def test_between_log_steps_nothing_looks_at_the_device(tmp_path, monkeypatch):
    looks = []
    guard = Guard()

    def watched(inner):
        def hook(trainer, *args):
            with monkeypatch.context() as patch:
                for name in ("item", "cpu", "tolist", "numpy", "__bool__", "__float__", "__int__"):
                    original = getattr(torch.Tensor, name)
                    patch.setattr(
                        torch.Tensor,
                        name,
                        lambda self, *a, f=original, **k: (
                            looks.append(trainer.global_step),
                            f(self, *a, **k),
                        )[1],
                    )
                inner(trainer, *args)

        return hook

    for name in ("on_before_backward", "on_before_optimizer_step", "on_train_batch_end"):
        setattr(guard, name, watched(getattr(guard, name)))
    fit(tmp_path, 9, [guard], model=tiny_model(), log_every_n_steps=4)
    assert sorted(set(looks)) == [4, 8]  # so the patch sees a look, and there are no others


# Skip --------------------------------------------------------------------------------------------


class Moments(L.Callback):
    """Weights and moments after every optimizer step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        state = trainer.optimizers[0].state_dict()["state"]
        flat = [v.flatten() for s in state.values() for v in s.values()]
        weights = [p.detach().flatten() for p in pl_module.parameters()]
        self.seen.append((torch.cat(weights), torch.cat(flat) if flat else None))


@pytest.mark.filterwarnings("ignore:The loss and gradient of step")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_skip_changes_nothing_and_goes_on(tmp_path, accumulate):
    moments, guard = Moments(), Guard("skip", max_skips=99)
    record, model, error = fit(
        tmp_path, 30, [guard, moments], data=tiny_data(steps_per_epoch=10),
        gradient_clip_val=1.0, accumulate_grad_batches=accumulate,
    )  # fmt: skip
    assert error is None
    steps = [
        torch.cat(record.logsnr[accumulate * i : accumulate * (i + 1)])
        for i in range(len(record.logsnr) // accumulate)
    ]
    bad = [i for i, logsnr in enumerate(steps) if bool((logsnr > ABOVE).any())]
    assert 0 < len(bad) < 30
    after = moments.seen[accumulate - 1 :: accumulate]
    for i in range(1, 30):
        same = torch.equal(after[i][0], after[i - 1][0]) and torch.equal(
            after[i][1], after[i - 1][1]
        )
        assert same == (i in bad), i
    events = told(tmp_path)
    assert [event["step"] for event in events] == bad
    assert {len(event["batches"]) for event in events} == {accumulate}
    assert guard.skips == len(bad)
    assert all(p.isfinite().all() for p in model.parameters())  # the average, by now


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The loss and gradient of step")
def test_skips_have_an_end(tmp_path):
    bad = bad_steps(200)
    keep = LastCheckpoint(every_n_steps=1)
    record, _, error = fit(tmp_path, 200, [Guard("skip", max_skips=2), keep])
    assert f"step {bad[2]} were not finite" in error
    assert "2 steps were skipped before it" in error
    assert len(record.losses) == bad[2] + 1
    assert len(told(tmp_path)) == 3
    assert load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == bad[2]


@pytest.mark.filterwarnings("ignore:The loss and gradient of step")
def test_a_run_resumed_after_a_skip_is_the_run(tmp_path, first):
    """Stopped right after a skip, where only the checkpoint knows of it."""

    def callbacks():
        return [Guard("skip", max_skips=99), LastCheckpoint(every_n_steps=1)]

    whole, _, _ = fit(tmp_path / "whole", 30, callbacks())
    part, _, _ = fit(tmp_path / "part", 30, [*callbacks(), StopAt(first + 1)], min_steps=1)
    path = tmp_path / "part" / "checkpoints" / "last.ckpt"
    assert load_checkpoint(path)["global_step"] == first + 1
    again = callbacks()
    rest, _, _ = fit(tmp_path / "part", 30, again, ckpt_path=path)
    both = torch.tensor(part.losses + rest.losses)
    assert torch.equal(both.nan_to_num(-1.0), torch.tensor(whole.losses).nan_to_num(-1.0))
    ends = [load_checkpoint(tmp_path / n / "checkpoints" / "last.ckpt") for n in ("whole", "part")]
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(ends[0][key][n], ends[1][key][n]) for n in ends[0][key])
    moments = [end["optimizer_states"][0]["state"] for end in ends]
    for name, state in moments[0].items():
        assert all(torch.equal(state[k], moments[1][name][k]) for k in state)
    assert again[0].skips == len(told(tmp_path / "whole"))
    assert [e["step"] for e in told(tmp_path / "whole")] == [
        e["step"] for e in told(tmp_path / "part")
    ]


def test_a_resumed_run_is_replayed_from_where_it_resumed(tmp_path, first):
    """It has written no checkpoint of its own; one of another run lies in its folder."""
    fit(tmp_path / "before", 2, [LastCheckpoint()])
    path = tmp_path / "before" / "checkpoints" / "last.ckpt"
    fit(tmp_path / "after", 3, [LastCheckpoint()])
    callbacks = [Guard(), LastCheckpoint(every_n_steps=999)]
    *_, error = fit(tmp_path / "after", 40, callbacks, ckpt_path=path, limit_val_batches=0)
    assert f"step {first}" in error
    (event,) = told(tmp_path)
    assert event["checkpoint"] == "start-0000002.ckpt"


@pytest.mark.filterwarnings("ignore:The loss and gradient of step", "ignore:AdaptiveSchedule")
def test_a_skipped_step_poisons_neither_average_nor_schedule(tmp_path):
    import lit_diffusion as ld

    torch.manual_seed(0)
    schedule = ld.AdaptiveSchedule(-10.0, 13.3)
    model = tiny_model(network=Breaking(above=10.0), schedule=schedule)
    average = EMA(0.9)
    run = trainer(
        tmp_path,
        max_steps=20,
        callbacks=[average, Guard("skip", max_skips=99), AdaptiveScheduleUpdate(2)],
    )
    run.fit(model, tiny_data())
    assert told(tmp_path)
    assert average.updates == 20
    state = model.state_dict()
    assert all(v.isfinite().all() for v in state.values() if v.is_floating_point())


def test_arguments():
    with pytest.raises(ValueError, match="stop or skip, got 'ignore'"):
        Guard("ignore")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Guard("skip", 0)


# Two ranks ---------------------------------------------------------------------------------------

TWO_RANKS = """
import sys
sys.path.insert(0, {tests!r})
from test_guard import *
if __name__ == "__main__":
    policy, folder = sys.argv[1:3]
    run = trainer(folder, max_steps=12, devices=2, strategy="ddp", log_every_n_steps=4,
                  callbacks=[EMA(0.9), Guard(policy, 99), LastCheckpoint(every_n_steps=3)])
    model, error = breaking(), None
    try:
        run.fit(model, tiny_data())
    except ValueError as stop:
        error = str(stop)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    out = {{"error": error, "step": run.global_step, "sum": weights.double().sum().item()}}
    Path(folder, f"rank{{run.global_rank}}.json").write_text(json.dumps(out))
"""


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_two_ranks_do_the_same(tmp_path, policy):
    """The largest λ of a step belongs to one rank; both must know of it."""
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS.format(tests=str(Path(__file__).parent)))
    done = warm.run(
        [sys.executable, script, policy, tmp_path],
        capture_output=True, text=True, timeout=200, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    events = told(tmp_path)
    for event in events:
        assert event["world_size"] == 2
        assert [batch["rank"] for batch in event["batches"]] == [0, 1]
        bad = [any(isinstance(x, str) for x in batch["losses"]) for batch in event["batches"]]
        assert sum(bad) == 1  # one rank only
    assert one == two
    if policy == "stop":
        (event,) = events
        assert f"step {event['step']} were not finite" in one["error"]
        assert one["step"] <= (event["step"] // 4 + 1) * 4
    else:
        assert one["error"] is None
        assert one["step"] == 12
        assert math.isfinite(one["sum"])
        assert events


# The command line, and replay --------------------------------------------------------------------

PLUGIN = """
import sys
sys.path.insert(0, {tests!r})
import test_guard


class Breaking(test_guard.Breaking):
    def __init__(self, shape: tuple[int, int, int] = (1, 8, 8), above: float = 0.0):
        super().__init__(shape, above)
"""
FAST = [
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.log_every_n_steps=5",
    "--trainer.gradient_clip_val=1.0",
    "--data.steps_per_epoch=20",
    "--data.batch_size=8",
    "--data.val_examples=6",
    "--data.num_workers=0",
    "--model.sampler.steps=2",
]
BREAK = [
    "--plugins=breaking_plugin",
    "--model.network=breaking_plugin.Breaking",
    f"--model.network.above={ABOVE}",
]


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    text = PLUGIN.format(tests=str(Path(__file__).parent))
    (tmp_path / "breaking_plugin.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("breaking_plugin", None)


def start(cli, *extra, steps=60):
    return cli(
        "fit", "--config", ROOT / "configs" / "digits.yaml", *FAST, *BREAK,
        f"--trainer.max_steps={steps}", *extra,
    )  # fmt: skip


def listing(folder):
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}


@pytest.mark.filterwarnings("ignore:Likelihood. this fit has no validation data")
@pytest.mark.parametrize("extra", [[], ["--trainer.accumulate_grad_batches=2"]])
def test_every_run_is_guarded_and_replayed(cli, plugin, extra):
    code, _, err = start(cli, *extra)
    assert code == 2
    (file,) = Path("runs").glob("digits/*/non_finite/*.json")
    assert f"lit-diffusion replay {file} --plugins breaking_plugin" in err
    assert "Traceback" not in err
    before = listing(Path())
    code, out, err = cli("replay", file)
    assert code == 0, out + err
    assert "Reproduced" in out
    assert "not finite" in out
    assert "denoiser.network.layer (Exponential), with finite inputs" in out
    assert "Non-finite gradients: " in out
    assert listing(Path()) == before


@pytest.mark.slow
def test_replay_starts_from_the_checkpoint_before(cli, plugin):
    """Also of a run that skipped, and went on to write other checkpoints."""
    skip = [
        "--trainer.callbacks=[]",
        "--trainer.callbacks+=LastCheckpoint", "--trainer.callbacks.every_n_steps=2",
        "--trainer.callbacks+=EMA",
        "--trainer.callbacks+=Guard", "--trainer.callbacks.on_non_finite=skip",
        "--trainer.callbacks.max_skips=99",
    ]  # fmt: skip
    with pytest.warns(UserWarning, match="Step skipped"):
        code, _, err = start(cli, *skip, steps=40)
    assert code == 0, err
    files = sorted(Path("runs").glob("digits/*/non_finite/*.json"))
    assert len(files) > 1
    last = files[-1]
    event = json.loads(last.read_text())
    kept = load_checkpoint(last.parent / event["checkpoint"])
    assert 0 <= event["step"] - kept["global_step"] < 2
    code, out, err = cli("replay", last)
    assert code == 0, out + err
    assert f"from {event['checkpoint']}" in out
    assert "Reproduced" in out

    # Another λ, and it is not that step any more.
    event["batches"][0]["logsnr"][0] += 1e-12
    last.write_text(json.dumps(event))
    code, out, _ = cli("replay", last)
    assert code == 1
    assert "Not reproduced: λ's differ." in out
    # On one rank a step of two would be another one, with other noise.
    last.write_text(json.dumps(event | {"world_size": 2}))
    code, _, err = cli("replay", last)
    assert code == 2
    assert "torchrun --nproc-per-node 2" in err
    (last.parent / event["checkpoint"]).unlink()
    code, _, err = cli("replay", last)
    assert code == 2
    assert "expected" in err


def test_replay_says_what_it_wants(cli, tmp_path):
    code, _, err = cli("replay", "nowhere.json")
    assert code == 2
    assert "no file nowhere.json" in err
    (tmp_path / "other.json").write_text('{"step": 3}')
    code, _, err = cli("replay", "other.json")
    assert code == 2
    assert "lacks" in err


def test_no_callbacks_means_no_more_than_that(cli, plugin):
    code, _, err = start(cli, "--trainer.callbacks=null")
    assert code == 2
    assert "lit-diffusion replay" in err


def test_a_trial_run_leaves_nothing(cli, plugin):
    code, _, err = start(cli, "--trainer.fast_dev_run=30", "--trainer.callbacks=null")
    assert code == 2
    assert "not finite" in err
    assert "replay" not in err
    assert not list(Path().glob("**/non_finite"))


@pytest.mark.soak
def test_replay_of_two_ranks(tmp_path, plugin):
    command = functools.partial(
        warm.run, cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    words = [sys.executable, "-m", "lit_diffusion"]
    fit_words = ["fit", "--config", ROOT / "configs" / "digits.yaml", *FAST, *BREAK]
    ddp = ["--trainer.strategy=ddp", "--trainer.devices=2", "--trainer.max_steps=60"]
    done = command([*words, *fit_words, *ddp])
    assert done.returncode == 2, done.stderr[-3000:]
    (file,) = tmp_path.glob("runs/digits/*/non_finite/*.json")
    done = command([*words, "replay", file])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Reproduced" in done.stdout
    assert done.stdout.count("Reproduced") == 1
    assert "on rank 1" in done.stdout

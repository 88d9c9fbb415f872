"""Settings on resumption: the state is the checkpoint's, everything else the config's."""

import functools
import inspect

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules

from lit_diffusion.training import WarmupDecayLR
from lit_diffusion.training.restore.settings import (
    changes,
    continue_schedule,
    merged,
    refuse_bad_numbers,
    refuse_other_state,
    settings_of,
    with_own_settings,
)

N, TOTAL = 7, 20


def chained(optimizer, gamma=0.9):
    return schedules.ChainedScheduler(
        [schedules.ConstantLR(optimizer, 0.1, 3), schedules.ExponentialLR(optimizer, gamma)],
        optimizer=optimizer,
    )


def in_sequence(optimizer, milestone=5):
    return schedules.SequentialLR(
        optimizer,
        [schedules.LinearLR(optimizer, 0.1, 1.0, 5), schedules.CosineAnnealingLR(optimizer, 15)],
        [milestone],
    )


# A schedule by its name: as it was, and with another argument.
SCHEDULES = {
    "LambdaLR": ({"lr_lambda": lambda n: 0.9**n}, {"lr_lambda": lambda n: 0.5**n}),
    "MultiplicativeLR": ({"lr_lambda": lambda n: 0.9}, {"lr_lambda": lambda n: 0.8}),
    "StepLR": ({"step_size": 3}, {"step_size": 5}),
    "MultiStepLR": ({"milestones": [2, 9]}, {"milestones": [4, 9]}),
    "ConstantLR": ({"factor": 0.1, "total_iters": 9}, {"factor": 0.3, "total_iters": 9}),
    "LinearLR": ({"total_iters": 10}, {"total_iters": 20}),
    "ExponentialLR": ({"gamma": 0.9}, {"gamma": 0.8}),
    "PolynomialLR": ({"total_iters": 10}, {"total_iters": 20}),
    "CosineAnnealingLR": ({"T_max": 10}, {"T_max": 20}),
    "CosineAnnealingWarmRestarts": ({"T_0": 4}, {"T_0": 6}),
    "CyclicLR": (
        {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 4},
        {"base_lr": 0.02, "max_lr": 0.1, "step_size_up": 6},
    ),
    "OneCycleLR": (
        {"max_lr": 0.1, "total_steps": TOTAL},
        {"max_lr": 0.1, "total_steps": 2 * TOTAL},
    ),
    "SequentialLR": ({"milestone": 5}, {"milestone": 8}),
    "ChainedScheduler": ({"gamma": 0.9}, {"gamma": 0.7}),
    "WarmupDecayLR": (
        {"warmup": 4, "decay": 0.5, "total_steps": TOTAL},
        {"warmup": 9, "decay": 0.5, "total_steps": 2 * TOTAL},
    ),
}
MAKE = {"SequentialLR": in_sequence, "ChainedScheduler": chained, "WarmupDecayLR": WarmupDecayLR}


def test_every_schedule_of_torch_is_here():
    """ReduceLROnPlateau, which is not a function of the step, has a test of its own."""
    found = {
        name
        for name, cls in inspect.getmembers(schedules, inspect.isclass)
        if issubclass(cls, schedules.LRScheduler) and not name.startswith("_")
    }
    assert found - {"LRScheduler", "ReduceLROnPlateau"} == SCHEDULES.keys() - {"WarmupDecayLR"}


class Training:
    """An optimizer, its schedule, and what they were at the start."""

    def __init__(self, name, arguments, make=torch.optim.SGD, **settings):
        torch.manual_seed(0)
        self.weights = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2))]
        groups = [{"params": self.weights[:1]}, {"params": self.weights[1:], "lr": 0.03}]
        rest = {"momentum": 0.9} if make is torch.optim.SGD else {}
        self.optimizer = make(groups, **{"lr": 0.1, **rest, **settings})
        maker = MAKE.get(name) or getattr(schedules, name)
        self.schedule = maker(self.optimizer, **arguments)
        self.begun = settings_of(self.optimizer, self.schedule)

    def step(self, *metric):
        """One step; returns what it was taken with."""
        for weight in self.weights:
            weight.grad = weight.detach().clone()
        used = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        self.optimizer.step()
        self.schedule.step(*metric)
        return used

    def saved(self):
        """What a checkpoint has."""
        states = {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "weights": [w.detach().clone() for w in self.weights],
        }
        torch.save(states, "checkpoint")
        return torch.load("checkpoint", weights_only=True) | {"begun": self.begun}

    def resume(self, saved, steps=N):
        """Continue from it, as `Resume` does."""
        for weight, value in zip(self.weights, saved["weights"], strict=True):
            weight.data.copy_(value)
        state, begun = saved["optimizer"], saved["begun"]
        self.optimizer.load_state_dict(with_own_settings(state, begun, self.begun))
        known = begun or self.begun
        late = known._replace(groups=state["param_groups"], values=saved["schedule"])
        continue_schedule(self.schedule, late, begun, self.begun, steps)
        return self


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("known", [True, False], ids=["recorded", "early checkpoint"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_same_schedule_continues_exactly(name, known):
    arguments = SCHEDULES[name][0]
    whole = Training(name, arguments)
    used = [whole.step() for _ in range(TOTAL - 1)]
    first = Training(name, arguments)
    assert [first.step() for _ in range(N)] == used[:N]
    saved = first.saved() if known else {**first.saved(), "begun": None}
    second = Training(name, arguments).resume(saved)
    assert [second.step() for _ in range(N, TOTAL - 1)] == used[N:]
    assert all(map(torch.equal, second.weights, whole.weights))


@pytest.mark.parametrize("change", ["schedule", "lr", "both"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_changed_schedule_is_the_new_one_from_the_first_step_on(name, change):
    old, new = SCHEDULES[name]
    first = Training(name, old)
    for _ in range(N):
        first.step()
    arguments = old if change == "lr" else new
    other = {} if change == "schedule" else {"lr": 0.02}
    fresh = Training(name, arguments, **other)
    used = [fresh.step() for _ in range(TOTAL - 1)]
    second = Training(name, arguments, **other).resume(first.saved())
    assert [second.step() for _ in range(N, TOTAL - 1)] == used[N:]


def test_a_plateau_keeps_what_it_has_seen_and_takes_the_new_settings():
    first = Training("ReduceLROnPlateau", {"patience": 1, "factor": 0.5})
    for metric in (1.0, 2.0, 2.0, 2.0):  # reduced after the third, and one more bad one
        first.step(metric)
    again = Training("ReduceLROnPlateau", {"patience": 1, "factor": 0.5}).resume(first.saved())
    assert again.schedule.state_dict() == first.schedule.state_dict()
    assert [group["lr"] for group in again.optimizer.param_groups] == [0.05, 0.015]
    second = Training("ReduceLROnPlateau", {"patience": 3, "factor": 0.1}, lr=0.2)
    second.resume(first.saved())
    assert (second.schedule.best, second.schedule.num_bad_epochs) == (1.0, 1)
    assert (second.schedule.patience, second.schedule.factor) == (3, 0.1)
    rates = [group["lr"] for group in second.optimizer.param_groups]
    assert rates == pytest.approx([0.1, 0.015])  # half of what the config says, as before
    second.step(2.0)
    second.step(2.0)
    assert [g["lr"] for g in second.optimizer.param_groups] == rates  # patience was 1
    second.step(2.0)
    assert second.optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_another_schedule_begins_at_the_position():
    first = Training("ExponentialLR", {"gamma": 0.9})
    for _ in range(N):
        first.step()
    fresh = Training("CosineAnnealingLR", {"T_max": 20})
    used = [fresh.step() for _ in range(TOTAL)]
    second = Training("CosineAnnealingLR", {"T_max": 20}).resume(first.saved())
    assert [second.step() for _ in range(N, TOTAL)] == used[N:]


def test_a_schedule_that_is_over_is_refused():
    first = Training("OneCycleLR", {"max_lr": 0.1, "total_steps": TOTAL})
    for _ in range(N):
        first.step()
    short = Training("OneCycleLR", {"max_lr": 0.1, "total_steps": 5})
    with pytest.raises(ValueError, match="OneCycleLR ends before step 7"):
        short.resume(first.saved())


OPTIMIZERS = {
    name: cls
    for name, cls in inspect.getmembers(torch.optim, inspect.isclass)
    if issubclass(cls, torch.optim.Optimizer)
    and name not in ("Optimizer", "LBFGS", "SparseAdam", "Muon")
}


@pytest.mark.parametrize("known", [True, False], ids=["recorded", "early checkpoint"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_keeps_its_moments_and_takes_the_new_settings(name, known):
    """As if the settings had been changed in the middle of a run."""

    def make(**settings):
        parameter = nn.Parameter(torch.ones(3))
        return parameter, OPTIMIZERS[name]([parameter], **settings)

    def step(parameter, optimizer, steps):
        for _ in range(steps):
            parameter.grad = parameter.detach() + 0.1
            optimizer.step()

    new = {"lr": 0.02, "weight_decay": 0.3}
    if "betas" in inspect.signature(OPTIMIZERS[name]).parameters:
        new["betas"] = (0.5, 0.6)
    if "weight_decay" not in inspect.signature(OPTIMIZERS[name]).parameters:
        del new["weight_decay"]
    whole, part = make(lr=0.1), make(lr=0.1)
    step(*whole, 3)
    step(*part, 3)
    whole[1].param_groups[0].update(new)
    step(*whole, 3)
    parameter, optimizer = make(**new)
    parameter.data.copy_(part[0].data)
    before = settings_of(make(lr=0.1)[1]) if known else None
    optimizer.load_state_dict(
        with_own_settings(part[1].state_dict(), before, settings_of(optimizer))
    )
    step(parameter, optimizer, 3)
    assert torch.equal(parameter, whole[0])


def test_what_training_has_changed_in_a_group_is_kept():
    """Some optimizers keep state there, and a callback may have lowered the rate."""
    before = {"lr": 0.1, "d": 1e-6, "betas": (0.9, 0.99)}
    saved = {"lr": 0.05, "d": 0.3, "betas": (0.9, 0.99), "extra": 1}
    assert merged(saved, before, before) == saved
    now = {"lr": 0.1, "d": 1e-6, "betas": [0.5, 0.5]}
    assert merged(saved, before, now) == {**saved, "betas": [0.5, 0.5]}
    assert merged(saved, before, {**now, "lr": 0.2})["lr"] == 0.2


def test_changes_are_named():
    old, new = SCHEDULES["CosineAnnealingLR"]
    before = Training("CosineAnnealingLR", old).begun
    assert list(changes(before, Training("CosineAnnealingLR", old).begun)) == []
    now = Training("CosineAnnealingLR", new, lr=0.2, weight_decay=0.5).begun
    assert list(changes(before, now)) == [
        "lr was 0.1 in the checkpoint and is now 0.2",
        "weight_decay was 0 in the checkpoint and is now 0.5",
        "weight_decay of parameter group 1 was 0 in the checkpoint and is now 0.5",
        "T_max of CosineAnnealingLR was 10 in the checkpoint and is now 20",
    ]
    other = Training("ExponentialLR", {"gamma": 0.9}, torch.optim.AdamW).begun
    assert [change.partition(" in ")[0] for change in changes(before, other)][::-1][:1] == [
        "the learning-rate schedule was CosineAnnealingLR"
    ]
    assert "the optimizer was SGD in the checkpoint and is now AdamW" in changes(before, other)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (functools.partial(torch.optim.SGD, lr=float("nan")), "lr must be finite, got nan"),
        (functools.partial(torch.optim.AdamW, lr=float("inf")), "lr must be finite, got inf"),
        (
            functools.partial(torch.optim.SGD, lr=0.1, weight_decay=float("nan")),
            "SGD: weight_decay must be finite",
        ),
        (
            functools.partial(torch.optim.SGD, lr=0.1, momentum=float("nan")),
            "momentum must be finite",
        ),
    ],
)
def test_numbers_that_torch_accepts_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        refuse_bad_numbers(make([nn.Parameter(torch.ones(1))]))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_another_optimizer_is_refused(name):
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))]

    def stepped(make):
        optimizer = make(parameters)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return optimizer.state_dict()

    own = OPTIMIZERS[name](parameters)
    own.load_state_dict(stepped(OPTIMIZERS[name]))
    refuse_other_state(own)
    adam = torch.optim.Adam(parameters, amsgrad=True)
    state = stepped(OPTIMIZERS[name])
    adam.load_state_dict({**state, "param_groups": adam.state_dict()["param_groups"]})
    if any(state["state"].values()):
        with pytest.raises(ValueError, match=r"Adam needs .*max_exp_avg_sq"):
            refuse_other_state(adam)


def test_momentum_may_be_turned_on():
    """SGD then starts it in its next step, as it does in the first."""
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    plain = torch.optim.SGD([parameter], lr=0.1)
    plain.step()
    with_momentum = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    state = {**plain.state_dict(), "param_groups": with_momentum.state_dict()["param_groups"]}
    with_momentum.load_state_dict(state)
    refuse_other_state(with_momentum)
    with_momentum.step()

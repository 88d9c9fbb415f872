"""Activation checkpointing: the same numbers, bit for bit, from less memory."""

import os
import socket

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lit_diffusion.description import build, describe
from lit_diffusion.nn import DiT, UNet

B, C, H, W = 5, 3, 16, 12
NETWORKS = {
    "unet": (
        UNet,
        {"channels": (8, 16), "blocks": 2, "attention": (8,), "head_channels": 8, "dropout": 0.4},
    ),
    "dit": (DiT, {"depth": 3, "width": 32, "heads": 2, "rope": True, "qk_norm": True}),
}


@pytest.fixture(params=NETWORKS)
def make(request):
    """Make the network, with checkpointing or without: in training, and no parameter zero."""
    return maker(request.param)


def maker(name):
    kind, arguments = NETWORKS[name]

    def made(checkpointing, shape=(C, H, W)):
        torch.manual_seed(0)
        net = kind(
            shape=shape,
            num_classes=10,
            activation_checkpointing=checkpointing,
            **arguments,
        )
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return net.train()

    return made


def batch():
    torch.manual_seed(2)
    return {
        "z": torch.randn(B, C, H, W),
        "logsnr": torch.linspace(-9, 9, B),
        "label": torch.tensor([0, -1, 3, 2, 1]),
    }


def step(net, autocast=False):
    """Output, gradients, and the bytes that were kept for the backward pass."""
    kept, alive = {}, []
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # so that no other gets its address
        return tensor

    given = batch()
    torch.manual_seed(3)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = net(**given)
    gradients = torch.autograd.grad(out.square().mean(), list(net.parameters()))
    return out, gradients, sum(kept.values())


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_the_same_numbers_from_at_most_half_the_memory(make, autocast):
    plain, forgetful = make(False), make(True)
    out, gradients, kept = step(plain, autocast)
    same, as_well, less = step(forgetful, autocast)
    assert torch.equal(out, same)
    for (name, _), ours, theirs in zip(plain.named_parameters(), gradients, as_well, strict=True):
        assert torch.equal(ours, theirs), name
        assert ours.abs().sum() > 0, name
    assert less <= kept / 2
    assert list(plain.state_dict()) == list(forgetful.state_dict())


def test_random_numbers_go_on_as_without(make):
    """What is drawn after the step is what would have been drawn."""
    after = []
    for checkpointing in (False, True):
        step(make(checkpointing))
        after.append(torch.rand(3))
    assert torch.equal(*after)


def test_nothing_is_computed_twice_where_nothing_is_learned(make):
    net, calls = make(True), []
    block = net.middle[0] if isinstance(net, UNet) else net.blocks[0]
    first = block.residual.norm_in if isinstance(net, UNet) else block.norm
    first.register_forward_hook(lambda *given: calls.append(None))
    before = len(calls)
    step(net)
    twice = len(calls) - before
    assert twice == (2 if isinstance(net, UNet) else 4)  # a block of the DiT calls it twice
    with torch.no_grad():
        net(**batch())
    net.eval()
    net(**batch()).square().mean().backward()
    assert len(calls) == 2 * twice


def test_it_is_an_argument_like_any_other(make):
    net = make(True)
    twin = build(describe(net))
    assert twin.activation_checkpointing
    assert "activation_checkpointing=True" in net.extra_repr()
    assert "activation_checkpointing=False" in make(False).extra_repr()


@pytest.mark.slow
def test_it_compiles_into_one_graph(make):
    torch.compiler.reset()
    net = make(True)
    out, gradients, _ = step(net)
    net.compile(fullgraph=True, backend="aot_eager")
    same, as_well, less = step(net)
    torch.testing.assert_close(same, out)
    for ours, theirs in zip(gradients, as_well, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert less <= step(make(False))[2] / 2


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
def test_inductor_drops_the_same_features_again(make):
    """The gradient is that of the loss, whose dropout is the same in both passes."""
    torch.compiler.reset()
    net = make(True)
    net.compile(fullgraph=True)
    _, gradients, _ = step(net)
    way = [torch.randn_like(p) for p in net.parameters()]
    losses = []
    for sign in (1, -2):
        with torch.no_grad():
            for parameter, off in zip(net.parameters(), way, strict=True):
                parameter.add_(off, alpha=sign * 1e-3)
        losses.append(step(net)[0].double().square().mean().item())
    slope = sum((g * off).sum().item() for g, off in zip(gradients, way, strict=True))
    assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(slope, rel=0.02)


# Among ranks -----------------------------------------------------------------------------------


def _rank(rank, port):
    """DDP of two ranks has the gradients of the plain network on both their parts."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    for name in NETWORKS:
        given = {key: torch.cat([value[:4]] * 2) for key, value in batch().items()}
        given["z"] = given["z"] + torch.linspace(-1, 1, 8)[:, None, None, None]
        plain, ddp = maker(name)(False), nn.parallel.DistributedDataParallel(maker(name)(True))
        for net in (plain, ddp):
            for module in net.modules():
                module.dropout = 0.0  # each rank drops by its own dice
        plain(**given).square().mean().backward()
        mine = {key: value[4 * rank : 4 * rank + 4] for key, value in given.items()}
        for _ in range(2):  # the second forward fails if a parameter took no part in the first
            ddp.zero_grad()
            ddp(**mine).square().mean().backward()
        for ours, theirs in zip(ddp.module.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_ranks_are_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port,), nprocs=2)


# In training -----------------------------------------------------------------------------------


def test_throughput_counts_what_is_computed_again(make):
    from lit_diffusion.training import LitDiffusion
    from lit_diffusion.training.callbacks.throughput import count_flops

    counts = []
    for checkpointing in (False, True):
        model = LitDiffusion(network=make(checkpointing), shape=(C, H, W))
        images = {"image": torch.randn(B, C, H, W), "label": torch.zeros(B, dtype=torch.long)}
        modes = [module.training for module in model.modules()]
        counts.append(count_flops(model, images))
        assert modes == [module.training for module in model.modules()]
        with FlopCounterMode(display=False) as really:
            model.loss(model.denoiser, images["image"]).loss.mean().backward()
        assert counts[-1] == really.get_total_flops() / B
    assert 1.1 * counts[0] < counts[1] <= 4 / 3 * counts[0]


def test_a_run_with_it_is_the_run_without(make, tmp_path):
    import lightning as L

    from lit_diffusion.training import EMA, DataModule, Guard, LitDiffusion

    states = []
    for checkpointing in (False, True):
        model = LitDiffusion(network=make(checkpointing, (1, 8, 8)), shape=(1, 8, 8))
        data = DataModule("digits8x8", batch_size=4, steps_per_epoch=3, val_examples=4)
        run = L.Trainer(
            max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
            callbacks=[EMA(0.9), Guard()], log_every_n_steps=1, num_sanity_val_steps=0,
        )  # fmt: skip
        run.fit(model, data)
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    assert list(states[0]) == list(states[1])
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name

"""The laws of the transformer. B, C, H, W, rows and columns of tokens all differ."""

import inspect
import math
import os
import socket

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lit_diffusion.nn import DiT, FourierFeatures
from lit_diffusion.nn.dit import SIZES, DiTBlock, SelfAttention
from lit_diffusion.nn.patches import patchify, phases, rotate, unpatchify
from lit_diffusion.testing import check_network

B, C, H, W, P = 5, 3, 12, 8, 2
ROWS, COLUMNS = H // P, W // P
SMALL = {"shape": (C, H, W), "patch": P, "depth": 2, "width": 32, "heads": 2}
KINDS = {
    "plain": {},
    "classes": {"num_classes": 4},
    "rope": {"num_classes": 4, "rope": True},
    "qk_norm": {"num_classes": 4, "qk_norm": True},
    "all": {
        "num_classes": 4,
        "rope": True,
        "qk_norm": True,
        "fourier": (3, 4),
        "conditions": {"angle": 2, "age": 1},
    },
    "patch 4": {"patch": 4, "num_classes": 4},
}
ARGUMENTS = tuple(inspect.signature(DiT).parameters)
PLACES = [torch.arange(ROWS), torch.arange(COLUMNS)]


def awake(net):
    """Move all parameters, for what starts at zero would hide the rest."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net.eval()


def inputs(net, dtype=torch.float32):
    """What the network is called with, by name."""
    torch.manual_seed(2)
    z = torch.randn(B, C, H, W, dtype=dtype)
    given = {"z": z, "logsnr": torch.linspace(-20, 20, B, dtype=dtype)}
    if net.num_classes is not None:
        given["label"] = torch.tensor([0, 3, -1, 1, 2])
    for name, size in net.conditions.items():
        given[name] = torch.randn(B, size, dtype=dtype)
    return given


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def net(request):
    torch.manual_seed(0)
    return awake(DiT(**SMALL | request.param))


# The published model ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "millions", "gflops"),
    [("S", 33, 6.06), ("B", 130, 23.01), ("L", 458, 80.71), ("XL", 675, 118.64)],
)
def test_the_sizes_are_the_published_ones(size, millions, gflops):
    """Parameters and multiply-adds of Table 1, at 32×32×4, patches of 2 and 1000 classes."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        net = DiT((4, 32, 32), patch=2, size=size, num_classes=1000)
        assert round(sum(p.numel() for p in net.parameters()) / 1e6) == millions
        net(torch.empty(1, 4, 32, 32), torch.empty(1), torch.zeros(1, dtype=torch.long))
    assert counter.get_total_flops() / 2e9 == pytest.approx(gflops, rel=2e-3)


def test_a_size_is_what_is_not_said():
    with torch.device("meta"):
        net = DiT(size="B", depth=3)
    assert (net.depth, net.width, net.heads) == (3, SIZES["B"].width, SIZES["B"].heads)
    assert len(net.blocks) == 3
    assert net.blocks[0].attend.heads == 12


# Patches and places ----------------------------------------------------------------------------


def test_patches_are_what_stands_in_them_row_by_row():
    z = torch.randn(B, C, H, W)
    tokens = patchify(z, P)
    assert tokens.shape == (B, ROWS * COLUMNS, C * P * P)
    row, column = 4, 1
    here = z[:, :, row * P : (row + 1) * P, column * P : (column + 1) * P]
    assert torch.equal(tokens[:, row * COLUMNS + column], here.flatten(1))
    assert torch.equal(unpatchify(tokens, P, (H, W)), z)


def test_places_are_the_published_waves():
    """The row's sines and the column's, of ω_k = 10000^(−k/K); see Vaswani et al. (2017)."""
    place = phases(PLACES, 8, 10_000, 16)
    for token, row, column in [(0, 0, 0), (COLUMNS * 5 + 2, 5, 2), (COLUMNS - 1, 0, COLUMNS - 1)]:
        expected = [at / 10_000 ** (k / 8) for at in (row, column) for k in range(8)]
        torch.testing.assert_close(place[token], torch.tensor(expected))


@pytest.mark.parametrize("rope", [False, True])
def test_the_places_are_added_to_the_tokens(rope):
    net = DiT(**SMALL, num_classes=4, rope=rope)
    seen = []
    net.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    net(**inputs(net))
    place = phases(PLACES, 8, 10_000, 16)
    table = seen[0] - net.layer_in(patchify(inputs(net)["z"], P))
    torch.testing.assert_close(table, torch.cat([place.sin(), place.cos()], 1).expand(B, -1, -1))


def test_waves_are_shown_beside_the_image():
    net, seen = DiT(**SMALL, fourier=(3, 4)), []
    net.layer_in.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    z = inputs(net)["z"]
    net(z, torch.zeros(B))
    waves = [8 * torch.pi * z, 16 * torch.pi * z]
    shown = torch.cat([z, *(w.sin() for w in waves), *(w.cos() for w in waves)], dim=1)
    torch.testing.assert_close(unpatchify(seen[0], P, (H, W)), shown, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rope", [False, True])
def test_queries_and_keys_are_turned_if_asked(rope):
    net, seen = awake(DiT(**SMALL, rope=rope)), []
    for block in net.blocks:
        block.attend.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    net(**inputs(net))
    angle = phases(PLACES, 4, 100, 8)
    assert seen == [None, None] if not rope else all(torch.equal(one, angle) for one in seen)
    assert len(seen) == 2


def test_turned_by_their_places_products_depend_on_differences_only():
    query, key = torch.randn(16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    angle = phases([torch.arange(9)] * 2, 4, 100, 8).double().view(9, 9, 8)
    turned_query = rotate(query.expand(9, 9, -1), angle)
    turned_key = rotate(key.expand(9, 9, -1), angle)

    def product(a, b):
        return turned_query[a] @ turned_key[b]

    torch.testing.assert_close(
        product((1, 2), (4, 3)), product((4, 7), (7, 8)), rtol=1e-5, atol=1e-5
    )
    assert (product((1, 2), (4, 3)) - product((1, 2), (3, 4))).abs() > 1e-3  # row is not column
    torch.testing.assert_close(turned_query.norm(dim=-1), query.norm().expand(9, 9))
    torch.testing.assert_close(turned_query[0, 0], query)


def test_attention_between_turned_tokens_is_a_matter_of_distance():
    attend, h = SelfAttention(32, heads=2), torch.randn(B, ROWS * COLUMNS, 32)
    angle = phases(PLACES, 4, 100, 8)
    moved = angle + angle[2 * COLUMNS + 3]  # all of it two rows down, three columns to the right
    torch.testing.assert_close(attend(h, moved), attend(h, angle), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(attend(h), attend(h, angle), atol=1e-3)
    assert not torch.allclose(
        attend(h, angle.flip(0)[:, [4, 5, 6, 7, 0, 1, 2, 3]]), attend(h, angle), atol=1e-3
    )


def test_where_a_patch_stands_matters(net):
    """Without places, exchanging patches would exchange answers and nothing else."""
    given = inputs(net)
    out = net(**given)
    flipped = net(**given | {"z": given["z"].roll(net.patch, 2)}).roll(-net.patch, 2)
    assert not torch.allclose(flipped, out, atol=1e-3)


# The network -----------------------------------------------------------------------------------


def test_the_laws_of_a_network(net):
    check_network(net)
    assert all(f"{name}={getattr(net, name)!r}" in net.extra_repr() for name in ARGUMENTS)


def test_constructs_without_arguments():
    net = DiT()
    assert torch.equal(net(torch.randn(2, 1, 8, 8), torch.zeros(2)), torch.zeros(2, 1, 8, 8))


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_network_says_nothing_and_its_blocks_are_identities(kind):
    net = DiT(**SMALL | KINDS[kind])
    assert torch.equal(net(**inputs(net)), torch.zeros(B, C, H, W))
    h, embedding = torch.randn(B, 7, 32), torch.randn(B, 32)
    assert torch.equal(net.blocks[1](h, embedding), h)


@pytest.mark.parametrize("size", [(H, W), (8, 16), (20, 4)])
def test_any_size_that_can_be_cut(net, size):
    out = net(**inputs(net) | {"z": torch.randn(B, C, *size)})
    assert out.shape == (B, C, *size)
    assert out.isfinite().all()


def test_every_patch_sees_every_other(net):
    given = inputs(net)
    out = net(**given)
    given["z"][:, :, :P, :P] += 1.0
    assert ((net(**given) - out).abs().amax(1) > 1e-6).all()


def test_hidden_conditions_are_no_conditions():
    net = awake(DiT(**SMALL | KINDS["all"]))
    given = inputs(net) | {"angle": torch.zeros(B, 2), "age": torch.zeros(B, 1)}
    none = {name: given[name] for name in ("z", "logsnr", "label")}
    dropped = torch.ones(B, dtype=torch.bool)
    torch.testing.assert_close(net(**none), net(**given, dropped=dropped))
    assert not torch.allclose(net(**none), net(**given), atol=1e-4)


def test_gradient_reaches_the_noise_level(net):
    given = inputs(net)
    given["logsnr"].requires_grad_()
    net(**given).square().mean().backward()
    assert (given["logsnr"].grad != 0).all()


def test_the_norm_bounds_the_logits(monkeypatch):
    """|q·k|/√D ≤ √D · max|g_q| · max|g_k|, however large the weights have become."""
    seen = []

    def attention(query, key, value):
        seen.append((query @ key.mT / math.sqrt(query.shape[-1])).abs().max().item())
        return value

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    h, angle = torch.randn(B, 24, 32), phases([torch.arange(6), torch.arange(4)], 4, 100, 8)
    for qk_norm in (False, True):
        attend = SelfAttention(32, heads=2, qk_norm=qk_norm)
        nn.init.normal_(attend.query_key_value.weight, std=100.0)
        attend(h, angle)
    free, bound = seen
    assert free > 1e4
    assert 1 < bound <= 4 * (1 + 1e-5)
    nn.init.constant_(attend.norm_key.weight, 3.0)
    attend(h, angle)
    assert 4 < seen[-1] <= 12 * (1 + 1e-5)


def test_attention_is_attention():
    attend, h = SelfAttention(32, heads=2), torch.randn(B, 7, 32)
    query, key, value = attend.query_key_value(h).chunk(3, dim=2)
    heads = []
    for head in (slice(0, 16), slice(16, 32)):
        weights = (query[..., head] @ key[..., head].mT / 4).softmax(dim=-1)
        heads.append(weights @ value[..., head])
    torch.testing.assert_close(attend(h), attend.project(torch.cat(heads, dim=2)))


def test_a_block_is_two_branches_shifted_scaled_and_gated():
    block = awake(DiTBlock(32, heads=2)).double()
    h, e = torch.randn(B, 7, 32).double(), torch.randn(B, 32).double()
    first, second = block.modulation.layer(e)[:, None].chunk(2, dim=2)
    expected = h
    for (shift, scale, gate), branch in (
        (first.chunk(3, dim=2), block.attend),
        (second.chunk(3, dim=2), block.perceptron),
    ):
        normal = (expected - expected.mean(2, keepdim=True)) / expected.std(
            2, correction=0, keepdim=True
        )
        expected = expected + gate * branch(normal * (1 + scale) + shift)
    torch.testing.assert_close(block(h, e), expected, rtol=1e-4, atol=1e-4)


# Precision -------------------------------------------------------------------------------------


def test_float64_noise_levels_for_a_float32_network(net):
    given = inputs(net)
    out = net(**given | {"logsnr": given["logsnr"].double()})
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, net(**given))


def test_bfloat16_autocast(net):
    single = net(**inputs(net))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net.train()(**inputs(net))
    out.mean().backward()
    assert out.dtype == torch.float32
    assert (out - single).square().mean().sqrt() < 0.02 * single.std()


def test_bfloat16_weights(net):
    out = net.bfloat16()(**{n: v.bfloat16() if n == "z" else v for n, v in inputs(net).items()})
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


def test_modulation_keeps_the_noise_level_under_autocast():
    """Of 1000 noise levels bfloat16 would keep 190, and round what is said of them."""
    net = awake(DiT(**SMALL))
    seen = []
    net.blocks[0].modulation.register_forward_hook(lambda *given: seen.append(given[2]))
    z, logsnr = torch.zeros(1000, C, P, P), torch.linspace(-20, 20, 1000)
    with torch.no_grad():
        net(z, logsnr)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            net(z, logsnr)
    for plain, modulated in zip(*seen, strict=True):
        assert torch.equal(modulated, plain)
        assert len(modulated.unique(dim=0)) == 1000


# Compiled, described, shared among ranks -------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_into_one_graph(dtype):
    torch.compiler.reset()
    net = awake(DiT(**SMALL | KINDS["all"])).train()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    given, weights = inputs(net), list(net.parameters())
    with torch.autocast("cpu", dtype=dtype, enabled=dtype == torch.bfloat16):
        expected, out = net(**given), compiled(**given)
    torch.testing.assert_close(out, expected)
    wanted = torch.autograd.grad(expected.square().mean(), weights)
    for ours, theirs in zip(
        torch.autograd.grad(out.square().mean(), weights), wanted, strict=True
    ):
        assert (ours - theirs).norm() <= 2 * torch.finfo(dtype).eps * theirs.norm()


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
def test_compiles_into_one_graph_by_inductor():
    torch.compiler.reset()
    net = awake(DiT(**SMALL | KINDS["all"]))
    compiled = torch.compile(net, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(**inputs(net)), net(**inputs(net)), rtol=1e-3, atol=1e-3
        )


def test_lists_become_tuples():
    net = DiT([1, 4, 4], depth=1, width=8, heads=1, fourier=[4])
    assert (net.shape, net.fourier) == ((1, 4, 4), (4,))


def test_same_seed_same_network():
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(DiT(**SMALL, num_classes=4).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_waves_before_it():
    inner = awake(DiT((C * 5, H, W), depth=1, width=32, heads=2, conditions={"age": 1}))
    net = FourierFeatures(inner, exponents=(1, 6), shape=(C, H, W))
    z, logsnr, age = torch.randn(B, C, H, W), torch.zeros(B), torch.randn(B, 1)
    out = net(z, logsnr, age=age)
    assert out.shape == z.shape
    assert not torch.allclose(net(z, logsnr, age=age + 1), out, atol=1e-4)


def _rank(rank, port):
    """Compare DDP and FSDP2 of two ranks with the plain network on the whole batch."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(3)
    batch = {"z": torch.randn(6, C, H, W), "logsnr": torch.linspace(-19.7, 19.7, 6)}
    batch["label"] = torch.tensor([0, -1, 2, 3, 1, 2])
    mine = {name: value[3 * rank : 3 * rank + 3] for name, value in batch.items()}

    def fresh():
        torch.manual_seed(0)
        return awake(DiT(**SMALL, num_classes=4, rope=True, qk_norm=True))

    plain = fresh()
    whole = plain(**batch)
    whole.square().mean().backward()
    expected = whole[3 * rank : 3 * rank + 3].detach()

    ddp = nn.parallel.DistributedDataParallel(fresh())
    for _ in range(2):  # the second forward fails if a parameter took no part in the first
        ddp.zero_grad()
        out = ddp(**mine)
        out.square().mean().backward()
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(ddp.module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    ddp.zero_grad()
    unlabelled = {name: mine[name] for name in ("z", "logsnr")}
    for _ in range(2):
        ddp(**unlabelled).square().mean().backward()

    mesh = init_device_mesh("cpu", (2,))
    for policy, tolerance in ((None, 1e-6), (torch.bfloat16, 0.02)):
        sharded = fresh()
        for block in sharded.blocks:
            fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=policy))
        fully_shard(sharded, mesh=mesh)  # the root stays in float32, or λ would be rounded
        assert sharded.layer_in.weight.to_local().shape[0] == 16  # half of it
        out = sharded(**mine)
        out.square().mean().backward()
        assert out.dtype == torch.float32
        assert (out - expected).std() < tolerance * whole.std()
        for ours, theirs in zip(sharded.parameters(), plain.parameters(), strict=True):
            off = (ours.grad.full_tensor() - theirs.grad).norm()
            assert off <= 5 * tolerance * theirs.grad.norm() + 1e-7
    torch.optim.AdamW(sharded.parameters()).step()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_ranks_are_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port,), nprocs=2)


# Mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(C, H, 9), (C, 11, W), (C + 1, H, W)])
def test_images_that_cannot_be_cut_are_refused(shape):
    net = DiT(**SMALL)
    with pytest.raises(ValueError, match=r"multiples of 2, got \(C, H, W\)") as error:
        net(torch.zeros(1, *shape), torch.zeros(1))
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


def test_a_label_or_condition_without_a_place_is_refused():
    net = DiT(**SMALL)
    z, logsnr = torch.zeros(1, C, H, W), torch.zeros(1)
    with pytest.raises(ValueError, match="without classes"):
        net(z, logsnr, torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match="without conditions but got age"):
        net(z, logsnr, age=torch.zeros(1, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (8,)}, "positive integers"),
        ({"shape": (1, 9, 8)}, "multiples of 2"),
        ({"patch": 0}, "at least 1"),
        ({"patch": 3}, "multiples of 3"),
        ({"depth": 0}, "at least 1"),
        ({"heads": 0}, "at least 1"),
        ({"width": 36, "heads": 2}, "multiple of 4·heads = 8, got 36"),
        ({"width": 0}, "multiple of 4·heads"),
        ({"size": "M"}, "one of S, B, L, XL, got 'M'"),
        ({"num_classes": 0, "depth": 1}, "num_classes"),
        ({"fourier": (-1,), "depth": 1}, "at least 0"),
        ({"conditions": {"age": 0}, "depth": 1}, "at least one number"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DiT(**arguments)


# In training -----------------------------------------------------------------------------------


def test_it_learns():
    """Two pictures by their labels: the error falls to a tenth of what saying nothing costs."""
    torch.manual_seed(0)
    net = DiT((1, 4, 4), depth=2, width=32, heads=2, num_classes=2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    pictures = torch.randn(2, 1, 4, 4)
    for _ in range(150):
        label = torch.randint(0, 2, (32,))
        out = net(torch.randn(32, 1, 4, 4), 4 * torch.randn(32), label)
        loss = (out - pictures[label]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1 * pictures.square().mean()


def test_a_checkpoint_remembers_it(tmp_path):
    import lightning as L

    from lit_diffusion.training import DataModule, LitDiffusion

    net = DiT((1, 8, 8), depth=1, width=32, heads=2, num_classes=10, qk_norm=True, rope=True)
    model = LitDiffusion(network=net, shape=(1, 8, 8))
    data = DataModule("digits8x8", batch_size=4, steps_per_epoch=2, val_examples=4)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"num_sanity_val_steps": 0, "enable_checkpointing": False}
    run = L.Trainer(max_steps=2, accelerator="cpu", **quiet)
    run.fit(model, data)
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = LitDiffusion.load_from_checkpoint(tmp_path / "last.ckpt").denoiser.network
    assert again.layer_out.weight.abs().max() > 0  # it has been trained
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), net.parameters(), strict=True)
    )
    assert repr(again) == repr(net)

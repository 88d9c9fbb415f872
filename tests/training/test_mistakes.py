"""Mistakes in configs and arguments: the exact sentences, which name the file and the line."""

import sys
from pathlib import Path

import pytest
import warm
from test_cli import FAST

from lit_diffusion.training.commands.fit_setup.differences import another_model
from lit_diffusion.training.commands.shell.config_places import located

FILES = {
    "good.yaml": "model:\n  network: {class_path: UNet, init_args: {channels: [8, 8]}}\n",
    "beside.yaml": "model:\n  network:\n    class_path: UNet\n    channels: [8, 8]\n",
    "in-list.yaml": "trainer:\n  callbacks:\n    - class_path: EMA\n      decay: 0.9\n",
    "unknown.yaml": "seed_everything: 1\nmodel:\n  newtork: UNet\n",
    "indented.yaml": "trainer:\n  max_steps: 4\n  data:\n    batch_size: 3\n",
    "broken.yaml": "data:\n  batch_size: 4\n   num_workers: 3\n",
    "five.yaml": "plugins: 5\n",
    "kind.yaml": "data:\n  batch_size: four\n",
    "callback.yaml": "trainer:\n  callbacks:\n    - class_path: EMA\n"
    "      init_args: {deca: 0.9}\n",
    "optimizer.yaml": "model:\n  optimizer:\n    class_path: torch.optim.SGD\n    init_args:\n"
    "      momentun: 0.9\n",
}
SGD = "dampening, differentiable, foreach, fused, lr, maximize, momentum, nesterov, weight_decay"

SENTENCES = [
    (
        ["beside.yaml"],
        "model.network: channels stands beside class_path, expected it below init_args "
        "(beside.yaml, line 4).",
    ),
    (
        ["in-list.yaml", "good.yaml"],
        "trainer.callbacks: decay stands beside class_path, expected it below init_args "
        "(in-list.yaml, line 4).",
    ),
    (
        ["good.yaml", "unknown.yaml"],
        "no argument is called model.newtork. Did you mean model.network? (unknown.yaml, line 3).",
    ),
    (
        ["indented.yaml", "good.yaml"],
        "no argument is called trainer.data.batch_size. Did you mean data.batch_size? "
        "(indented.yaml, line 4).",
    ),
    (
        ["good.yaml", "broken.yaml"],
        "broken.yaml, line 3 is not YAML: mapping values are not allowed here; check the "
        "indentation and the colons.",
    ),
    (
        ["good.yaml", "kind.yaml"],
        "data.batch_size: expected int, got four (kind.yaml, line 2).",
    ),
    (
        ["callback.yaml", "good.yaml"],
        "trainer.callbacks: EMA takes no argument 'deca'. Did you mean decay? It takes decay, "
        "sigma_rel (callback.yaml, line 4).",
    ),
    (
        ["optimizer.yaml"],
        "model.optimizer: SGD takes no argument 'momentun'. Did you mean momentum? It takes "
        f"{SGD} (optimizer.yaml, line 5).",
    ),
    (
        ["good.yaml", "--data.batchsize=3"],
        "no argument is called --data.batchsize. Did you mean --data.batch_size?",
    ),
    (
        ["--model.weighting=SigmoidWeighting", "--model.weighting.bais=1"],
        "model.weighting: SigmoidWeighting takes no argument 'bais'. Did you mean bias? It takes "
        "bias.",
    ),
    (
        ["--model.optimizer.lr", "-1e-3"],
        "Invalid learning rate: -0.001 (LIT_DIFFUSION_TRACEBACK=1 shows where.)",
    ),
    (["--out=there"], "--out is an argument of predict, not of fit."),
    (["--model.optimizer.lr=1e-3x"], "model.optimizer: lr: expected float, got 1e-3x."),
    (
        ["five.yaml"],
        "plugins: expected a list of modules, got 5 (five.yaml, line 1).",
    ),
    (
        ["--trainer.precision=half"],
        "trainer.precision: expected one of 64, 32, 16, transformer-engine, "
        "transformer-engine-float16, 16-true, 16-mixed, bf16-true, bf16-mixed, 32-true, 64-true, "
        "bf16, got half.",
    ),
    (
        ["--trainer.accumulate_grad_batches=0"],
        "trainer.accumulate_grad_batches must be at least 1, got 0. (LIT_DIFFUSION_TRACEBACK=1 "
        "shows where.)",
    ),
    (
        ["--trainer.log_every_n_steps=0"],
        "trainer.log_every_n_steps must be at least 1, got 0. (LIT_DIFFUSION_TRACEBACK=1 shows "
        "where.)",
    ),
    (
        ["--trainer.callbacks+=EMA", "--trainer.callbacks.deca=0.9"],
        "trainer.callbacks: name the class first, as class_path and init_args.",
    ),
]


@pytest.mark.parametrize(("words", "sentence"), SENTENCES)
def test_a_mistake_is_named_with_its_place(cli, words, sentence):
    for name, text in FILES.items():
        Path(name).write_text(text)
    code, _, err = cli("fit", *(f"--config={w}" if w in FILES else w for w in words))
    assert code == 2
    assert err.splitlines()[-1] == f"lit-diffusion: error: {sentence}"


def test_other_commands_name_it_as_well(cli):
    Path("unknown.yaml").write_text(FILES["unknown.yaml"])
    _, _, err = cli("objective", "--config", "unknown.yaml")
    assert err == (
        "lit-diffusion: error: no argument is called model.newtork. Did you mean model.network? "
        "(unknown.yaml, line 3).\n"
    )
    _, _, err = cli("sample", "--num_sampels=3")
    assert err.startswith(
        "lit-diffusion: error: no argument is called --num_sampels. Did you mean --num_samples?"
    )


def test_what_comes_from_the_command_line_has_no_place(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("data:\n  batch_size: 3\n")
    words = ["fit", f"--config={path}", "--data.batch_size=four"]
    message = "data.batch_size: expected int, got four."
    assert located(message, words) == message
    assert located(message, words[:2]) == f"{message[:-1]} ({path}, line 2)."
    assert located("something else.", words) == "something else."


def test_a_checkpoint_of_another_network_says_what_differs(cli):
    words = ["fit", "--model.network=UNet", "--model.sampler=DDIMSampler", *FAST]
    code, _, err = cli(*words)
    assert code == 0, err
    code, _, err = cli(*words, "--ckpt_path=last", "--model.network.channels=[16,8]")
    assert code == 2
    assert err.splitlines()[-1] == (
        "lit-diffusion: error: the weights of the checkpoint do not fit the model: "
        "network.channels: [8, 8] in the checkpoint, [16, 8] now. Give the model of the "
        "checkpoint, or leave --ckpt_path out to train the new one."
    )


def test_models_of_other_classes_differ_by_their_class():
    one = {"network": {"class_path": "lit_diffusion.UNet", "init_args": {"blocks": 1}}}
    other = {"network": {"class_path": "lit_diffusion.DiT", "init_args": {}}}
    assert (
        "model: network: lit_diffusion.UNet in the checkpoint, lit_diffusion.DiT now. Give"
        in another_model(one, other)
    )
    assert "so the class has changed" in another_model(one, one)


def test_the_help_lists_our_classes_and_those_of_plug_ins_alone(tmp_path):
    # In a process of its own: other tests define classes, which this one has as plug-ins.
    words = [sys.executable, "-m", "lit_diffusion", "fit", "--help"]
    out = warm.run(words, cwd=tmp_path, check=True).stdout
    words = set(out.replace(",", " ").split())
    ours = {"lit_diffusion.UNet", "lit_diffusion.DiT", "lit_diffusion.SigmoidWeighting"}
    assert ours < words
    named = {"torchvision.transforms.v2"}  # in the description of an argument
    libraries = ("torch.nn.", "torchvision.")
    assert not {word for word in words - named if word.startswith(libraries)}
    assert "torch.optim.SGD" in words  # we have no optimizer of our own
    assert not {word for word in words if word.startswith("lit_diffusion.nn.")}  # parts of them
    assert len(out.splitlines()) < 900  # twice as many with torch's and torchvision's

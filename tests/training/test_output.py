"""What cannot end a run, and what must not pass in silence: output, configs, errors, numbers."""

import io
import sys

import pytest

from lit_diffusion import SAMPLERS
from lit_diffusion.training.commands.shell.config_check import check_config
from lit_diffusion.training.commands.shell.errors import UsageError
from lit_diffusion.training.commands.shell.output import lasting_output


class Broken(io.StringIO):
    def write(self, text):
        raise BrokenPipeError

    def flush(self):
        raise OSError(28, "No space left on device")


def test_output_that_nobody_can_take_is_lost(monkeypatch):
    for stream in (Broken(), None):
        monkeypatch.setattr(sys, "stdout", stream)
        with lasting_output():
            print("λ = 1", flush=True)
        assert sys.stdout is stream


def test_a_terminal_without_greek_letters_shows_their_numbers(monkeypatch):
    seen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(seen, encoding="ascii"))
    with lasting_output():
        print("λ = 1 ± 2")
    assert seen.getvalue() == b"\\u03bb = 1 \\xb1 2\n"


def test_a_key_that_occurs_twice_is_named_with_its_lines(cli, tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("model:\n  label_dropout: 0.2\ntrainer: {max_steps: 1}\nmodel:\n  seed: 1\n")
    code, _, err = cli("fit", f"--config={path}", "--print_config")
    assert code == 2
    assert "line 4: expected each key once, got 'model' again (first in line 1)" in err
    path.write_text("a: {b: 1, c: 2}\nd: {b: 1, c: 2}\n")  # equal keys of different mappings
    check_config(path)


@pytest.mark.parametrize("depth", [20, 200])
def test_aliases_that_unfold_to_a_huge_config_are_refused(tmp_path, depth):
    path = tmp_path / "bomb.yaml"
    lines = ["a0: &a0 [1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, depth)]
    path.write_text("\n".join(lines))
    with pytest.raises(UsageError, match="at most 100000 values"):
        check_config(path)
    path.write_text("a: &a {b: 1}\nc: *a\nd: *a\n")
    check_config(path)


@pytest.mark.parametrize("cls", SAMPLERS.classes())
@pytest.mark.parametrize("steps", [0, -3, 2.5])
def test_a_sampler_takes_at_least_one_step(cls, steps):
    with pytest.raises(ValueError, match=f"at least 1 step, got steps={steps}"):
        cls(steps=steps)
    assert cls(steps=1).steps == 1


def test_an_unexpected_error_states_its_type_and_place(cli, monkeypatch):
    def fails(*args, **kwargs):
        return {}["step"]

    monkeypatch.setattr("lit_diffusion.training.cli._run", fails)
    code, _, err = cli("fit")
    assert code == 2
    assert "KeyError 'step', raised in fails (" in err
    assert "test_output.py:" in err

"""Keyed randomness: distinct where it must be, equal where it must be."""

import torch

from lit_diffusion.training.step.randomness import fraction, generators, mix, reseed


def test_keys_do_not_collide():
    keys = [
        (seed, word, step, rank)
        for seed in range(4)
        for word in ("step", "valid", "sample")
        for step in range(40)
        for rank in range(130)
    ]
    assert len({mix(*key) for key in keys}) == len(keys)
    assert mix(1, 2) != mix(2, 1)
    assert mix(0) != mix(0, 0)


def test_fractions_are_uniform():
    u = torch.tensor([fraction(0, "offset", step) for step in range(10_000)])
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    assert float((u.sort().values - torch.linspace(0, 1, 10_000)).abs().max()) < 0.02
    assert abs(float(torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1])) < 0.03


def test_reseeding_repeats_all_that_follows():
    draws = []
    for _ in range(2):
        reseed(torch.device("cpu"), 3, "step", 5)
        draws.append((torch.randn(4), torch.nn.functional.dropout(torch.ones(64))))
    assert torch.equal(draws[0][0], draws[1][0])
    assert torch.equal(draws[0][1], draws[1][1])


def test_an_example_has_its_generator_whatever_its_batch():
    whole = [torch.randn(3, generator=g) for g in generators(0, "sample", list(range(5)))]
    part = [torch.randn(3, generator=g) for g in generators(0, "sample", [3, 4])]
    assert torch.equal(torch.stack(whole[3:]), torch.stack(part))


def test_the_whole_word_counts():
    assert mix(0, "bound 10", 3) != mix(0, "bound 100", 3)
    words = [f"{word} {i}" for word in ("bound", "long purposes") for i in range(1000)]
    assert len({mix(word) for word in words}) == len(words)
    assert mix("12345678" + "9") != mix("12345678", "9")

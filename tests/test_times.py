"""Times: uniform one by one, even together, the same for an example in every evaluation."""

import pytest
import torch

import lit_diffusion as ld


def test_the_parts_of_a_step_are_one_stratified_set():
    offset = torch.tensor(0.37, dtype=torch.float64)
    whole = ld.stratified_times(24, offset)
    parts = [ld.stratified_times(4, offset, part, 6) for part in range(6)]
    assert torch.allclose(torch.cat(parts).sort().values, whole.sort().values)
    assert torch.allclose(whole.sort().values.diff(), torch.full((23,), 1 / 24).double())
    for part in parts:  # and each of them covers all times by itself
        assert torch.allclose(part.sort().values.diff(), torch.full((3,), 1 / 4).double())


def test_each_time_alone_is_uniform():
    generator = torch.Generator().manual_seed(0)
    first = torch.stack([ld.sample_times(torch.zeros(7, 1), generator)[0] for _ in range(5000)])
    expected = (torch.arange(5000) + 0.5).double() / 5000
    assert float((first.sort().values - expected).abs().max()) < 0.03


def test_generators_per_example_share_no_offset():
    with pytest.raises(ValueError, match="one per example: pass t"):
        ld.sample_times(torch.zeros(2, 1), [torch.Generator(), torch.Generator()])


@pytest.mark.parametrize("total", [1, 2, 3, 4, 10, 297, 1000])
def test_fixed_times_hold_one_example_in_each_stratum(total):
    t = ld.fixed_times(torch.arange(total), total).sort().values
    assert torch.allclose(t, (torch.arange(total) + 0.5).double() / total)


def test_fixed_times_do_not_follow_the_order_of_the_data():
    t = ld.fixed_times(torch.arange(1000), 1000)
    assert abs(float(torch.corrcoef(torch.stack([t, torch.arange(1000).double()]))[0, 1])) < 0.1
    by_class = t.reshape(10, 100)  # a set sorted by class: every class sees every noise level
    assert float((by_class.mean(1) - 0.5).abs().max()) < 0.05


def test_the_draws_of_a_data_set_are_even_together():
    t = torch.cat([ld.fixed_times(torch.arange(10), 10, sample, 4) for sample in range(4)])
    assert torch.allclose(t.sort().values.diff(), torch.full((39,), 1 / 40).double())

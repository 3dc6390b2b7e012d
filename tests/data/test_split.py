import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchref.data import stratified_split

RATIOS = [(0.7, 0.15, 0.15), (0.8, 0.1, 0.1), (0.5, 0.5), (0.4, 0.3, 0.2, 0.1)]


@settings(deadline=None, max_examples=50)
@given(
    sizes=st.lists(st.integers(20, 60), min_size=2, max_size=5),
    ratios=st.sampled_from(RATIOS),
    seed=st.integers(0, 2**32 - 1),
)
def test_parts_hold_every_index_once_in_the_proportions_of_the_classes(sizes, ratios, seed):
    y = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    parts = stratified_split(y, ratios, seed)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(y)))
    for part, ratio in zip(parts[1:], ratios[1:], strict=True):
        assert len(part) == round(len(y) * ratio)
    for part in parts:
        share = torch.bincount(y[part], minlength=len(sizes)) / len(part)
        whole = torch.tensor(sizes) / len(y)
        assert (share - whole).abs().max() <= 3 / len(part)  # a sample of rounding in each cut
    for part, again in zip(parts, stratified_split(y, ratios, seed), strict=True):
        assert torch.equal(part, again)


def test_another_seed_gives_another_split():
    y = torch.arange(100) % 2
    assert not torch.equal(stratified_split(y, seed=0)[0], stratified_split(y, seed=1)[0])


@pytest.mark.parametrize("ratios", [(1.0,), (0.7, 0.2), (1.2, -0.2), (0.5, 0.5, 0.0)])
def test_ratios_that_are_no_shares_raise(ratios):
    with pytest.raises(ValueError, match="expected positive `ratios` with sum 1"):
        stratified_split(torch.arange(100) % 2, ratios)


def test_a_class_too_small_to_share_out_raises():
    with pytest.raises(ValueError, match="4 samples do not share out"):
        stratified_split(torch.tensor([0, 0, 0, 1]))

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchref.data import stratified_split
from torchref.data.split import chronological_split, grouped_split, random_split, ratios_for

RATIOS = [(0.7, 0.15, 0.15), (0.8, 0.1, 0.1), (0.5, 0.5), (0.4, 0.3, 0.2, 0.1), (0.1, 0.2, 0.7)]
SEEDS = st.integers(0, 2**32 - 1)
SPLITTERS = {
    "random_split": lambda ratios: random_split(100, ratios),
    "stratified_split": lambda ratios: stratified_split(torch.arange(100) % 2, ratios),
    "chronological_split": lambda ratios: chronological_split(100, ratios),
    "grouped_split": lambda ratios: grouped_split(torch.arange(100), ratios),
}


def assert_each_once(parts, count):
    assert all(part.dtype == torch.int64 for part in parts)
    assert sorted(torch.cat(parts).tolist()) == list(range(count))


def assert_sizes(parts, count, ratios):
    last = [round(count * ratio) for ratio in ratios[1:]]
    assert [len(part) for part in parts] == [count - sum(last), *last]


def class_counts(y, parts):
    """(classes, parts) of classes 0, 1 and so on."""
    classes = int(y.max()) + 1
    return torch.stack([torch.bincount(y[part], minlength=classes) for part in parts], 1)


# Ratios.


def test_ratios_for_a_size_are_those_of_the_course():
    assert ratios_for(1) == ratios_for(100_000) == (0.7, 0.15, 0.15)
    assert ratios_for(100_001) == (0.9, 0.05, 0.05)


@pytest.mark.parametrize(
    ("count", "sizes"), [(100_000, [70_000, 15_000, 15_000]), (100_001, [90_001, 5000, 5000])]
)
def test_auto_is_the_default_of_every_split(count, sizes):
    y = torch.arange(count) % 2
    for parts in (random_split(count), stratified_split(y), chronological_split(count)):
        assert [len(part) for part in parts] == sizes
    parts = grouped_split(torch.arange(count) // 50)
    assert [len(part) for part in parts] == pytest.approx(sizes, abs=50)


@pytest.mark.parametrize("name", SPLITTERS)
@pytest.mark.parametrize(
    "ratios", [(1.0,), (0.7, 0.2), (1.2, -0.2), (0.5, 0.5, 0.0), (float("nan"), 0.5), "half"]
)
def test_ratios_that_are_no_shares_raise(name, ratios):
    with pytest.raises(ValueError, match=f"{name}: expected positive `ratios` with sum 1"):
        SPLITTERS[name](ratios)


@pytest.mark.parametrize("seed", [None, "1", 1.5])
def test_a_seed_that_is_no_integer_raises(seed):
    with pytest.raises(TypeError, match=f"random_split: expected an integer `seed`, got {seed!r}"):
        random_split(100, seed=seed)


@pytest.mark.parametrize("name", ["random_split", "stratified_split", "chronological_split"])
def test_a_part_of_no_sample_raises(name):
    with pytest.raises(ValueError, match=rf"{name}: expected at least one .*\[100, 0\] from 100"):
        SPLITTERS[name]((0.999, 0.001))


# At random.


@settings(deadline=None, max_examples=50)
@given(st.integers(20, 300), st.sampled_from(RATIOS), SEEDS)
def test_random_parts_hold_every_index_once(count, ratios, seed):
    parts = random_split(count, ratios, seed)
    assert_each_once(parts, count)
    assert_sizes(parts, count, ratios)
    for part, again in zip(parts, random_split(count, ratios, seed), strict=True):
        assert torch.equal(part, again)


def test_a_seed_is_the_same_split_on_every_machine():
    """What was written down on one machine; a change breaks the resuming of runs."""
    y = torch.tensor([0] * 6 + [1] * 3 + [2] * 3)
    groups = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3, 4, 5])
    found = {
        "random": random_split(10, (0.5, 0.3, 0.2), 3),
        "stratified": stratified_split(y, (0.5, 0.25, 0.25), 3),
        "grouped": grouped_split(groups, (0.5, 0.3, 0.2), 3),
    }
    assert {name: [part.tolist() for part in parts] for name, parts in found.items()} == {
        "random": [[5, 4, 1, 2, 9], [6, 7, 0], [3, 8]],
        "stratified": [[1, 2, 4, 7, 5, 10], [11, 0, 6], [3, 9, 8]],
        "grouped": [[1, 6, 2, 5, 0], [4, 3, 8], [7, 9]],
    }


@pytest.mark.parametrize(
    "split",
    [
        lambda seed: random_split(100, seed=seed),
        lambda seed: stratified_split(torch.arange(100) % 2, seed=seed),
        lambda seed: grouped_split(torch.arange(100) // 5, seed=seed),
    ],
    ids=["random", "stratified", "grouped"],
)
def test_another_seed_gives_another_split_and_no_global_state_counts(split):
    first = split(0)
    np.random.rand()
    torch.rand(1)
    assert torch.equal(first[0], split(0)[0])
    assert first[0].sort().values.tolist() != split(1)[0].sort().values.tolist()


# Stratified.


@settings(deadline=None, max_examples=50)
@given(
    sizes=st.lists(st.integers(20, 60), min_size=2, max_size=5),
    ratios=st.sampled_from(RATIOS),
    seed=SEEDS,
)
def test_parts_hold_every_index_once_in_the_proportions_of_the_classes(sizes, ratios, seed):
    y = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    parts = stratified_split(y, ratios, seed)
    assert_each_once(parts, len(y))
    assert_sizes(parts, len(y), ratios)
    exact = torch.tensor([[size * len(part) / len(y) for part in parts] for size in sizes])
    assert (class_counts(y, parts) - exact).abs().max() < 2
    for part, again in zip(parts, stratified_split(y, ratios, seed), strict=True):
        assert torch.equal(part, again)


@settings(deadline=None, max_examples=100)
@given(
    rare=st.lists(st.integers(4, 6), min_size=1, max_size=5),
    common=st.lists(st.integers(60, 90), min_size=1, max_size=2),
    ratios=st.sampled_from(RATIOS),
    seed=SEEDS,
)
def test_a_rare_class_is_in_every_part(rare, common, ratios, seed):
    """With as many samples as parts; a class of 4 has 0.4 samples in a tenth."""
    sizes = torch.tensor(rare + common)
    y = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    parts = stratified_split(y, ratios, seed)
    counts = class_counts(y, parts)
    assert_each_once(parts, len(y))
    assert_sizes(parts, len(y), ratios)
    assert counts.min() >= 1
    # a rare class may take what it is short of from the others, and no more than that
    exact = sizes[:, None] * counts.sum(0) / len(y)
    forced = (1 - exact).clamp_min(0).sum().item()
    assert (counts - exact).abs().max() < 2 + forced


def test_a_class_with_one_sample_for_each_part_has_it():
    y = torch.tensor([0] * 997 + [1] * 3)
    for seed in range(20):
        assert class_counts(y, stratified_split(y, seed=seed))[1].tolist() == [1, 1, 1]


def test_equal_remainders_do_not_fall_to_the_same_classes_for_every_seed():
    y = torch.arange(40) % 4
    tables = {
        tuple(class_counts(y, stratified_split(y, (0.85, 0.15), seed))[:, 1].tolist())
        for seed in range(20)
    }
    assert all(sorted(table) == [1, 1, 2, 2] for table in tables)
    assert len(tables) > 1


def test_the_parts_are_shuffled():
    y = torch.repeat_interleave(torch.arange(2), 50)
    for part in stratified_split(y):
        assert part.tolist() != sorted(part.tolist())
        assert y[part].tolist() != sorted(y[part].tolist())


def test_labels_of_any_type():
    expected = stratified_split(torch.arange(40) % 2, seed=5)
    for y in ((torch.arange(40) % 2).bool(), (torch.arange(40) % 2).bfloat16() - 7):
        assert all(map(torch.equal, stratified_split(y, seed=5), expected))


def test_a_class_too_small_to_share_out_raises():
    with pytest.raises(ValueError, match="at least 3 samples of each class.* class 9 has 1; add"):
        stratified_split(torch.tensor([0, 0, 0, 9]))
    with pytest.raises(ValueError, match="stratified_split: .* class 9 has 2; .* leave it out"):
        stratified_split(torch.tensor([0] * 50 + [9, 9]))


def test_a_part_too_small_for_the_classes_raises():
    y = torch.arange(40) % 4
    message = r"at least 4 samples in each part.*sizes \[37, 3\].*class 0 has 10.*raise the ratio"
    with pytest.raises(ValueError, match=message):
        stratified_split(y, (0.93, 0.07))


# In the order of time.


@settings(deadline=None, max_examples=50)
@given(st.integers(40, 200), st.sampled_from(RATIOS), st.integers(0, 4))
def test_the_past_comes_before_the_future_with_a_gap_between(count, ratios, gap):
    parts = chronological_split(count, ratios, gap)
    kept = count - gap * (len(ratios) - 1)
    assert_sizes(parts, kept, ratios)
    assert parts[0][0] == 0
    assert parts[-1][-1] == count - 1
    for part in parts:
        assert part.dtype == torch.int64
        assert (part.diff() == 1).all()
    for before, after in pairwise(parts):
        assert after[0] - before[-1] == gap + 1


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 9), min_size=20, max_size=60), st.integers(0, 3))
def test_times_decide_and_rows_of_one_time_keep_their_order(times, gap):
    order = sorted(range(len(times)), key=lambda i: (times[i], i))
    parts = chronological_split(torch.tensor(times), (0.5, 0.25, 0.25), gap)
    rows = chronological_split(len(times), (0.5, 0.25, 0.25), gap)
    for part, places in zip(parts, rows, strict=True):
        assert part.tolist() == [order[place] for place in places]


def test_what_leaves_no_chronological_part_raises():
    with pytest.raises(ValueError, match=r"got sizes \[2, 0, 0\] from 10 samples and `gap` 4"):
        chronological_split(10, gap=4)
    with pytest.raises(ValueError, match=r"got sizes \[0, 0, 0\] from 10 samples and `gap` 50"):
        chronological_split(10, gap=50)
    with pytest.raises(ValueError, match="expected `gap` >= 0, got -1"):
        chronological_split(10, gap=-1)
    with pytest.raises(ValueError, match="expected `count_or_times` without NaN, got 1"):
        chronological_split(torch.tensor([0.0, 1.0, float("nan"), 2.0]))


# Groups.


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 12), min_size=4, max_size=40), st.sampled_from(RATIOS), SEEDS)
def test_no_group_is_in_two_parts_and_sizes_are_near(sizes, ratios, seed):
    groups = torch.repeat_interleave(torch.arange(len(sizes)) * 3 - 7, torch.tensor(sizes))
    groups = groups[torch.randperm(len(groups))]
    parts = grouped_split(groups, ratios, seed)
    assert_each_once(parts, len(groups))
    held = [set(groups[part].tolist()) for part in parts]
    assert sum(map(len, held)) == len(sizes)
    assert all(held)
    for part, ratio in zip(parts, ratios, strict=True):
        assert len(part) - ratio * len(groups) <= max(sizes) + 1e-6
    for part, again in zip(parts, grouped_split(groups, ratios, seed), strict=True):
        assert torch.equal(part, again)


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(RATIOS), SEEDS)
def test_small_groups_after_large_ones_level_the_sizes(ratios, seed):
    """The smallest first would end with a group of 20 somewhere."""
    sizes = torch.tensor([1] * 60 + [20] * 3)
    parts = grouped_split(torch.repeat_interleave(torch.arange(63), sizes), ratios, seed)
    for part, ratio in zip(parts, ratios, strict=True):
        assert abs(len(part) - ratio * 120) <= 8  # of 20 in a tenth, 12


@settings(deadline=None, max_examples=50)
@given(SEEDS, st.sampled_from(RATIOS[:3]))
def test_classes_are_balanced_over_groups(seed, ratios):
    """Groups of one class each, of which one is ten times as rare."""
    label = torch.tensor([0] * 100 + [1] * 10)
    y, groups = label.repeat_interleave(4), torch.arange(110).repeat_interleave(4)
    parts = grouped_split(groups, ratios, seed, y)
    assert_each_once(parts, 440)
    shares = class_counts(y, parts) / torch.tensor([[400], [40]])
    assert (shares[0] - torch.tensor(ratios)).abs().max() <= 0.021
    assert (shares[1] - torch.tensor(ratios)).abs().max() <= 0.101


@settings(deadline=None, max_examples=50)
@given(SEEDS)
def test_the_last_groups_of_a_class_go_to_the_parts_without_it(seed):
    """By its share alone the training part would get two of the three groups of class 1."""
    groups = torch.arange(60).repeat_interleave(2)
    y = (groups < 3).long()
    parts = grouped_split(groups, (0.8, 0.1, 0.1), seed, y)
    assert class_counts(y, parts)[1].tolist() == [2, 2, 2]


def test_as_many_groups_as_parts_have_one_each():
    parts = grouped_split(torch.tensor([5, 5, 5, 8, 9]), (0.9, 0.05, 0.05))
    assert sorted(len(part) for part in parts) == [1, 1, 3]
    assert len(parts[0]) == 3


def test_fewer_groups_than_parts_raise():
    with pytest.raises(ValueError, match="grouped_split: expected at least 3 groups, .* got 2"):
        grouped_split(torch.tensor([0, 0, 1, 1]))


def test_a_class_in_fewer_groups_than_parts_raises():
    groups, y = torch.arange(20) // 2, torch.tensor([8] * 16 + [4] * 4)
    message = "no sample of class 4 in part .; its 4 samples are in 2 groups"
    with pytest.raises(ValueError, match=message):
        grouped_split(groups, y=y)
    assert len(grouped_split(groups)) == 3  # without classes it is fine


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (lambda x: stratified_split(x), r"stratified_split: expected `y` of shape \(samples,\)"),
        (lambda x: chronological_split(x), r"expected `count_or_times` of shape \(samples,\)"),
        (lambda x: grouped_split(x), r"grouped_split: expected `groups` of shape \(samples,\)"),
        (
            lambda x: grouped_split(torch.arange(9), y=x),
            r"grouped_split: expected `y` of shape \(9,\), got \(3, 3\)",
        ),
        (
            lambda x: grouped_split(torch.arange(9), y=x[0]),
            r"grouped_split: expected `y` of shape \(9,\), got \(3,\)",
        ),
    ],
)
def test_another_shape_raises(split, message):
    with pytest.raises(ValueError, match=message):
        split(torch.zeros(3, 3))

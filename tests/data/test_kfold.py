import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import GroupKFold, KFold, StratifiedKFold, TimeSeriesSplit

from torchref.data.kfold import Estimate, folds, mean_and_interval

KS = st.integers(2, 6)
SEEDS = st.integers(0, 2**31)
LABELS = st.lists(st.integers(6, 20), min_size=1, max_size=4).flatmap(
    lambda sizes: st.permutations([c for c, size in enumerate(sizes) for _ in range(size)])
)


def assert_equal_to_sklearn(found, expected):
    for (train, val), (their_train, their_val) in zip(found, expected, strict=True):
        assert train.dtype == val.dtype == torch.int64
        assert train.tolist() == their_train.tolist()
        assert val.tolist() == their_val.tolist()


def assert_each_once_in_val(found, count, k):
    for start in range(0, len(found), k):
        vals = torch.cat([val for _, val in found[start : start + k]])
        assert sorted(vals.tolist()) == list(range(count))
    for train, val in found:
        assert sorted(train.tolist() + val.tolist()) == list(range(count))


@settings(deadline=None, max_examples=50)
@given(st.integers(6, 80), KS, SEEDS, st.integers(1, 3))
def test_plain_folds(count, k, seed, repeats):
    found = folds(count, k, method="plain", repeats=repeats, seed=seed)
    assert_each_once_in_val(found, count, k)
    x = np.zeros((count, 1))
    expected = [
        pair
        for i in range(repeats)
        for pair in KFold(k, shuffle=True, random_state=seed + i).split(x)
    ]
    assert_equal_to_sklearn(found, expected)
    by_y = folds(torch.randn(count), k, method="plain", repeats=repeats, seed=seed)
    assert_equal_to_sklearn(by_y, expected)


@settings(deadline=None, max_examples=50)
@given(LABELS, KS, SEEDS, st.integers(1, 3))
def test_stratified_folds(labels, k, seed, repeats):
    y = torch.tensor(labels) * 3 - 4
    found = folds(y, k, repeats=repeats, seed=seed)
    assert_each_once_in_val(found, len(y), k)
    counts = torch.stack([torch.bincount(y[val] + 4, minlength=9) for _, val in found])
    assert (counts.amax(0) - counts.amin(0)).max() <= 1
    expected = [
        pair
        for i in range(repeats)
        for pair in StratifiedKFold(k, shuffle=True, random_state=seed + i).split(y, y.numpy())
    ]
    assert_equal_to_sklearn(found, expected)


@settings(deadline=None, max_examples=50)
@given(st.integers(20, 80), KS, st.integers(0, 3))
def test_folds_in_time_train_on_the_past(count, k, gap):
    found = folds(count, k, method="time", gap=gap)
    assert_equal_to_sklearn(found, TimeSeriesSplit(k, gap=gap).split(np.zeros((count, 1))))
    for train, val in found:
        assert train[0] == 0
        assert val[0] - train[-1] == gap + 1
    assert torch.cat([val for _, val in found]).diff().eq(1).all()
    assert found[-1][1][-1] == count - 1


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 8), min_size=30, max_size=60), KS)
def test_grouped_folds(numbers, k):
    groups = torch.tensor([*range(9), *numbers]) * 5
    found = folds(len(groups), k, method="grouped", groups=groups)
    assert_each_once_in_val(found, len(groups), k)
    for train, val in found:
        assert not set(groups[train].tolist()) & set(groups[val].tolist())
    expected = GroupKFold(k).split(np.zeros((len(groups), 1)), groups=groups.numpy())
    assert_equal_to_sklearn(found, expected)


def test_the_defaults_are_five_stratified_folds_of_seed_0():
    y = torch.arange(30) % 3
    expected = StratifiedKFold(5, shuffle=True, random_state=0).split(y, y.numpy())
    assert_equal_to_sklearn(folds(y), expected)


def test_repeats_are_different_folds():
    found = folds(20, 2, method="plain", repeats=2)
    assert len(found) == 4
    assert found[0][1].tolist() != found[2][1].tolist()


def test_as_many_folds_as_samples_leave_one_out():
    assert all(len(val) == 1 for _, val in folds(7, 7, method="plain"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 5, {}), "for method 'stratified', got a number of samples"),
        ((torch.zeros(10, 2), 5, {}), r"for method 'stratified', got shape \(10, 2\)"),
        ((torch.tensor([7] * 9 + [3] * 4), 5, {}), "at least 5 samples .* class 3 has 4; use a"),
        ((10, 1, {"method": "plain"}), "`k` from 2 to the 10 samples, got 1"),
        ((10, 11, {"method": "plain"}), "`k` from 2 to the 10 samples, got 11"),
        ((10, 5, {"method": "fair"}), "`method` of plain, .*, got 'fair'"),
        ((10, 5, {"method": "plain", "repeats": 0}), r"`repeats` in \[1, 4294967296\], got 0"),
        (
            (10, 5, {"method": "plain", "repeats": 99999999999999, "seed": 6}),
            r"`repeats` in \[1, 4294967290\], got 99999999999999",
        ),
        ((10, 5, {"method": "plain", "seed": -1}), r"`seed` in \[0, 4294967295\], got -1"),
        ((10, 5, {"method": "time", "repeats": 2}), "`repeats` 1 for method 'time'.*got 2"),
        (
            (10, 5, {"method": "grouped", "repeats": 2, "groups": torch.arange(10)}),
            "`repeats` 1 for method 'grouped'.*got 2",
        ),
        ((10, 5, {"method": "plain", "gap": 1}), "0 but for method 'time', got 1 for 'plain'"),
        ((10, 5, {"method": "time", "gap": -1}), "`gap` >= 0.*got -1"),
        ((10, 5, {"method": "time", "gap": 5}), "to train on .* 5 validation .* 10 .* `gap` 5"),
        ((5, 5, {"method": "time"}), "to train on .* 5 validation parts, got 5 samples"),
        ((10, 5, {"method": "grouped"}), "`groups` with method 'grouped'.*without them"),
        (
            (10, 5, {"method": "plain", "groups": torch.arange(10)}),
            "with no other, got method 'plain' with them",
        ),
        ((10, 5, {"method": "grouped", "groups": torch.arange(9)}), r"shape \(10,\), got \(9,\)"),
        ((10, 5, {"method": "grouped", "groups": torch.arange(10) % 4}), "at least 5 .* got 4"),
    ],
)
def test_folds_that_cannot_be_raise(arguments, message):
    y, k, options = arguments
    with pytest.raises(ValueError, match=f"folds: .*{message}"):
        folds(y, k, **options)


def test_the_largest_gap_that_leaves_a_sample_is_allowed():
    assert len(folds(10, 5, method="time", gap=4)[0][0]) == 1


# Scores.


def test_interval_by_hand():
    """Scores 1, 2, 3, 4, 5: mean 3, variance 10 / 4; t of 4 degrees at 0.975 is 2.776445."""
    found = mean_and_interval([1.0, 2.0, 3.0, 4.0, 5.0], test_to_train=1 / 4)
    half = 2.7764451 * math.sqrt(2.5 * (1 / 5 + 1 / 4))
    assert found.mean == 3.0
    assert found.std == pytest.approx(math.sqrt(2.5), rel=1e-12)
    assert found.low == pytest.approx(3 - half, rel=1e-7)
    assert found.high == pytest.approx(3 + half, rel=1e-7)


def test_confidence_widens_the_interval():
    """t of 1 degree is the Cauchy distribution: tan(pi / 2 * confidence)."""
    for confidence in (0.5, 0.9):
        found = mean_and_interval(torch.tensor([0.0, 2.0]), 1.0, confidence)
        half = math.tan(math.pi / 2 * confidence) * math.sqrt(2 * (1 / 2 + 1))
        assert found.high == pytest.approx(1 + half, rel=1e-9)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-10, 10), min_size=2, max_size=20), st.floats(0.01, 2))
def test_the_interval_is_around_the_mean_and_wider_than_of_independent_scores(scores, share):
    found = mean_and_interval(scores, share)
    assert found.low <= found.mean <= found.high
    assert found.mean == pytest.approx(np.mean(scores), abs=1e-9)
    assert found.std == pytest.approx(np.std(scores, ddof=1), abs=1e-9)
    n = len(scores)
    independent = mean_and_interval(scores, 1e-12)
    ratio = math.sqrt((1 / n + share) * n)
    assert found.high - found.low == pytest.approx((independent.high - independent.low) * ratio)


def test_equal_scores_have_an_interval_of_length_0():
    assert mean_and_interval([0.5] * 4, 1 / 3) == Estimate(0.5, 0.0, 0.5, 0.5)


def test_one_score_has_no_deviation():
    found = mean_and_interval([0.75], 0.25)
    assert found.mean == 0.75
    assert all(map(math.isnan, (found.std, found.low, found.high)))


def test_an_estimate_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Estimate(0.0, 0.0, 0.0, 0.0).mean = 1.0  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 0.25), "at least one of `scores`"),
        ((torch.zeros(2, 2), 0.25), r"at least one of `scores`, got shape \(2, 2\)"),
        (([1.0, 2.0], 0.0), "`test_to_train` > 0, got 0.0"),
        (([1.0, 2.0], 0.25, 0.0), r"`confidence` in \(0, 1\), got 0.0"),
        (([1.0, 2.0], 0.25, 95), r"`confidence` in \(0, 1\), got 95"),
    ],
)
def test_scores_that_make_no_sense_raise(arguments, message):
    with pytest.raises(ValueError, match=f"mean_and_interval: expected {message}"):
        mean_and_interval(*arguments)


def test_neither_scikit_learn_nor_scipy_is_imported_before_use():
    code = (
        "import sys; before = set(sys.modules);"
        "import torchref.data.kfold, torchref.data.split, torchref.data.augment.tabular;"
        "assert not {'sklearn', 'scipy', 'imblearn'} & (set(sys.modules) - before)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("sklearn.model_selection", lambda: folds(10, 5, method="plain")),
        ("scipy.stats", lambda: mean_and_interval([1.0, 2.0], 0.25)),
    ],
)
def test_a_missing_package_says_how_to_install_it(monkeypatch, package, call):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package} .* 'torchref-triton\[train\]'"):
        call()

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from imblearn.over_sampling import SMOTE

from torchref.data.augment.tabular import OPTIONS, TabularAugment, smote

DTYPES = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])


@st.composite
def batches(draw):
    """Rows, of which each value is told from all others, and labels with gaps between them."""
    rows, columns = draw(st.integers(1, 24)), draw(st.integers(1, 5))
    labels = draw(st.lists(st.sampled_from([-3, 0, 7]), min_size=rows, max_size=rows))
    x = torch.arange(rows * columns).reshape(rows, columns)[torch.randperm(rows)]
    return x.to(draw(DTYPES)), torch.tensor(labels)


@st.composite
def augments(draw):
    return TabularAugment(
        noise=draw(st.sampled_from([0.0, 0.1])),
        shuffle=draw(st.sampled_from([0.0, 0.5, 1.0])),
        interpolate=draw(st.sampled_from([0.0, 0.2, 1.0, 5.0])),
        categories=draw(st.sampled_from([(), (0,)])),
    )


@settings(deadline=None, max_examples=100)
@given(batches(), augments(), st.integers(0, 2**32))
def test_invariants_of_every_combination(batch, augment, seed):
    x, y = batch
    before = x.clone(), y.clone()
    augment.fit(x)
    torch.manual_seed(seed)
    new, labels = augment(x, y)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    assert torch.equal(labels, y)
    assert (new.shape, new.dtype, new.device) == (x.shape, x.dtype, x.device)
    assert new.isfinite().all()
    torch.manual_seed(seed)
    assert torch.equal(augment(x, y)[0], new)


@settings(deadline=None, max_examples=50)
@given(batches(), st.floats(0.1, 1))
def test_shuffled_values_are_of_the_same_column_and_class(batch, shuffle):
    x, y = batch
    new, _ = TabularAugment(shuffle=shuffle)(x, y)
    for label in y.unique():
        for theirs, ours in zip(x[y == label].T, new[y == label].T, strict=True):
            assert set(ours.tolist()) <= set(theirs.tolist())


@settings(deadline=None, max_examples=50)
@given(batches())
def test_shuffle_1_replaces_every_value_that_another_row_can_replace(batch):
    x, y = batch
    new, _ = TabularAugment(shuffle=1.0)(x.double(), y)
    alone = (y[:, None] == y).sum(1) == 1
    assert torch.equal((new == x).all(1), alone)
    assert torch.equal((new == x).any(1), alone)


def test_shuffle_is_a_probability_of_each_value():
    x = torch.arange(40_000.0).reshape(2000, 20)
    new, _ = TabularAugment(shuffle=0.3)(x, torch.arange(2000) % 2)
    changed = new != x
    assert changed.float().mean().item() == pytest.approx(0.3, abs=0.01)  # 4 deviations: 0.009
    assert 0 < changed.float().mean(1).max() < 1  # not row by row
    assert changed.float().mean(0).min() > 0.2


def test_every_other_row_of_the_class_is_drawn_alike():
    x, y = torch.arange(6.0)[:, None].expand(6, 6000).clone(), torch.tensor([1, 0, 1, 1, 1, 1])
    new, _ = TabularAugment(shuffle=1.0)(x, y)
    drawn = new[2].long().bincount(minlength=6) / 6000
    torch.testing.assert_close(
        drawn, torch.tensor([0.25, 0, 0, 0.25, 0.25, 0.25]), rtol=0, atol=0.03
    )


def test_categories_are_shuffled_together():
    """Columns 1 to 3 are one-hot; column 0 is a number that says which row it is from."""
    code = torch.eye(3)[torch.arange(60) % 3]
    x = torch.cat([torch.arange(60.0)[:, None], code], 1)
    new, _ = TabularAugment(shuffle=0.5, categories=[1, 2, 3])(x, torch.zeros(60).long())
    assert (new[:, 1:].sum(1) == 1).all()
    assert (new[:, 1:] != code).any()
    number = new[:, 0] != x[:, 0]
    assert ((new[:, 1:] != code).any(1) & ~number).any()  # a draw of its own


@settings(deadline=None, max_examples=50)
@given(batches(), st.sampled_from([0.01, 0.4, 1.0, 30.0]))
def test_interpolated_rows_are_within_their_class(batch, alpha):
    x, y = batch
    new, _ = TabularAugment(interpolate=alpha, categories=[0])(x, y)
    assert torch.equal(new[:, 0], x[:, 0])
    for label in y.unique():
        theirs, ours = x[y == label], new[y == label]
        assert (ours >= theirs.amin(0)).all()
        assert (ours <= theirs.amax(0)).all()


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 20), st.sampled_from([0.2, 1.0]))
def test_an_interpolated_row_lies_between_two_rows(rows, alpha):
    """On the curve of (t, t^2), between t and s a mix w has second coordinate
    w_1 (s + t) - s t: one share for the whole row solves it, shares by column do not."""
    t = torch.arange(rows, dtype=torch.float64)
    new, _ = TabularAugment(interpolate=alpha)(torch.stack([t, t**2], 1), torch.zeros(rows).long())
    lines = new[:, :1] * (t[:, None] + t) - t[:, None] * t  # (rows, others)
    own = torch.eye(rows, dtype=torch.bool)
    distance = (lines - new[:, 1:]).abs().masked_fill(own, torch.inf)
    assert (distance.amin(1) < 1e-9).all()


def test_the_share_of_a_row_follows_the_beta_distribution():
    x, y = torch.tensor([[0.0], [1.0]]).repeat(20_000, 1), torch.arange(20_000).repeat_interleave(2)
    for alpha in (0.2, 2.0):
        share = 1 - (TabularAugment(interpolate=alpha)(x, y)[0] - x).abs()
        assert share.mean().item() == pytest.approx(0.5, abs=0.01)
        assert share.var().item() == pytest.approx(1 / (8 * alpha + 4), abs=0.005)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 20), st.sampled_from([(), (1,), (3, 2)]))
def test_float_targets_are_mixed_as_the_rows_are(rows, shape):
    y = torch.randn(rows, *shape, dtype=torch.float64)
    x = torch.cat([y.reshape(rows, -1), torch.randn(rows, 1, dtype=torch.float64)], 1)
    new, targets = TabularAugment(interpolate=1.0)(x, y)
    assert targets.shape == y.shape
    torch.testing.assert_close(targets.reshape(rows, -1), new[:, :-1])
    if rows > 1:
        assert (targets != y).any()


def test_noise_has_the_deviation_of_the_training_split():
    train = torch.tensor([[0.0, 5.0, 0.0], [8.0, 5.0, 1.0]])  # deviations 4, 0 and 1 / 2
    augment = TabularAugment(noise=0.5, categories=[2]).fit(train)
    x = torch.full((10_000, 3), 0.1)
    new, _ = augment(x, torch.zeros(10_000))
    assert (new[:, 0] - 0.1).std().item() == pytest.approx(2.0, rel=0.03)
    assert (new[:, 0] - 0.1).mean().item() == pytest.approx(0.0, abs=0.08)
    assert torch.equal(new[:, 1:], x[:, 1:])


@pytest.mark.parametrize("value", [0.1, 1e8 + 0.1, -3.7e-9])
def test_a_constant_column_stays_constant(value):
    x = torch.full((7, 1), value)
    augment = TabularAugment(noise=1e6, shuffle=0.5, interpolate=0.3).fit(x)
    assert torch.equal(augment(x, torch.zeros(7).long())[0], x)


def test_the_deviation_is_computed_in_float64():
    x = torch.tensor([[1e8], [1e8 + 8]])
    assert TabularAugment(noise=1.0).fit(x.repeat(1000, 1)).std == 4.0


@settings(deadline=None, max_examples=50)
@given(batches())
def test_without_options_nothing_changes(batch):
    x, y = batch
    x[0, 0] = -0.0
    state = torch.get_rng_state()
    new, labels = TabularAugment()(x, y)
    assert torch.equal(new.view(torch.uint8), x.view(torch.uint8))  # -0.0 == 0.0, but not in bits
    assert torch.equal(labels, y)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_row_alone_in_its_class_is_unchanged():
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 0, 0, 2])
    new, _ = TabularAugment(shuffle=1.0, interpolate=1.0)(x, y)
    assert torch.equal(new[[1, 4]], x[[1, 4]])
    assert (new[[0, 2, 3]] != x[[0, 2, 3]]).any()


def test_an_empty_batch_stays_empty():
    new, y = TabularAugment(shuffle=1.0, interpolate=1.0)(torch.zeros(0, 3), torch.zeros(0).long())
    assert (new.shape, y.shape) == ((0, 3), (0,))


def test_labels_may_be_bool_or_small_integers():
    x, y = torch.arange(8.0)[:, None], torch.arange(8) % 2
    for labels in (y.bool(), y.to(torch.uint8)):
        new, same = TabularAugment(shuffle=1.0)(x, labels)
        assert same.dtype == labels.dtype
        assert ((new[:, 0] % 2 == 1) == y.bool()).all()


def test_options_are_the_three_steps():
    assert list(OPTIONS) == ["noise", "shuffle", "interpolate"]
    assert all(getattr(TabularAugment(), name) == 0 for name in OPTIONS)


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": -0.1}, "finite `noise` >= 0, got -0.1"),
        ({"noise": float("inf")}, "finite `noise` >= 0, got inf"),
        ({"interpolate": float("nan")}, "finite `interpolate` >= 0, got nan"),
        ({"shuffle": 1.5}, r"`shuffle` in \[0, 1\], got 1.5"),
        ({"shuffle": float("nan")}, r"`shuffle` in \[0, 1\], got nan"),
        ({"categories": [0, -1]}, r"columns >= 0 in `categories`, got \[0, -1\]"),
    ],
)
def test_options_out_of_range_raise(options, message):
    with pytest.raises(ValueError, match=f"TabularAugment: expected {message}"):
        TabularAugment(**options)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(3), torch.zeros(3), r"`x` of shape \(N, features\), got \(3,\)"),
        (torch.zeros(3, 2).long(), torch.zeros(3), "floating point `x`, got torch.int64"),
        (torch.zeros(3, 2), torch.zeros(2), r"`y` of shape \(3,\), got torch.float32 .*\(2,\)"),
        (torch.zeros(3, 2), torch.zeros(()), r"`y` of shape \(3,\)"),
        (torch.zeros(3, 2), torch.zeros(3, 1).long(), r"`y` of shape \(3,\), got torch.int64"),
        (torch.zeros(3, 2), torch.zeros(3), "integer labels `y` with `shuffle`, got torch.float"),
        (torch.zeros(3, 1), torch.zeros(3).long(), r"`categories` among 1 columns, got \[1\]"),
    ],
)
def test_batches_that_cannot_be_changed_raise(x, y, message):
    with pytest.raises(ValueError, match=f"TabularAugment: expected {message}"):
        TabularAugment(shuffle=0.5, categories=[1])(x, y)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3), "expected `x` of shape"),
        (torch.zeros(0, 2), "expected at least one sample"),
        (torch.tensor([[1.0, 2.0], [3.0, float("nan")]]), "column 1 has a NaN or an infinity"),
        (torch.zeros(3, 1), "expected `categories` among 1 columns"),
    ],
)
def test_what_has_no_deviation_raises(x, message):
    augment = TabularAugment(noise=0.1, categories=[1])
    with pytest.raises(ValueError, match=f"TabularAugment: {message}"):
        augment.fit(x)
    assert augment.std is None


def test_fit_is_once_and_before_noise():
    augment = TabularAugment(noise=0.1)
    with pytest.raises(RuntimeError, match="TabularAugment: not fitted; call `fit`"):
        augment(torch.zeros(2, 2), torch.zeros(2))
    augment.fit(torch.randn(5, 2))
    with pytest.raises(RuntimeError, match="TabularAugment: fitted already"):
        augment.fit(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"expected 2 features, got shape \(4, 3\)"):
        augment(torch.zeros(4, 3), torch.zeros(4))


# SMOTE.


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(4, 20), min_size=2, max_size=4),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 2**31),
)
def test_smote_equals_imbalanced_learn_and_begins_with_what_it_got(sizes, dtype, seed):
    y = torch.repeat_interleave(torch.arange(len(sizes)) * 2 - 1, torch.tensor(sizes))
    y = y[torch.randperm(len(y))].to(torch.int32)
    x = torch.randn(len(y), 3, dtype=dtype)
    rows, labels = smote(x, y, neighbors=3, seed=seed)
    assert (rows.dtype, labels.dtype) == (dtype, torch.int32)
    assert torch.equal(rows[: len(x)], x)
    assert torch.equal(labels[: len(x)], y)
    assert (labels.unique(return_counts=True)[1] == max(sizes)).all()
    theirs, their_labels = SMOTE(k_neighbors=3, random_state=seed).fit_resample(
        x.numpy(), y.numpy()
    )[:2]
    assert np.array_equal(rows.numpy(), theirs)
    assert np.array_equal(labels.numpy(), their_labels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_smote_keeps_half_precision_and_constant_columns(dtype):
    x = torch.stack([torch.randn(12), torch.full((12,), 0.1)], 1).to(dtype)
    rows, labels = smote(x, torch.arange(12) // 8, neighbors=2)
    assert rows.dtype == dtype
    assert torch.equal(rows[:12], x)
    assert (rows[:, 1] == x[0, 1]).all()
    assert labels.bincount().tolist() == [8, 8]


def test_smote_of_equal_classes_adds_nothing():
    x, y = torch.randn(6, 2), torch.arange(6) % 2
    rows, labels = smote(x, y)  # three samples each, and five neighbors asked for
    assert torch.equal(rows, x)
    assert torch.equal(labels, y)


@pytest.mark.parametrize(
    ("x", "y", "neighbors", "message"),
    [
        (torch.zeros(9), torch.zeros(9), 5, r"`x` of shape \(samples, features\), got .*\(9,\)"),
        (torch.zeros(9, 2).long(), torch.zeros(9), 5, "floating point `x` .*got torch.int64"),
        (torch.zeros(9, 2), torch.zeros(8).long(), 5, r"`y` of shape \(9,\), got .*\(8,\)"),
        (torch.zeros(9, 2), torch.zeros(9), 5, "integer `y` .*got torch.float32"),
        (torch.zeros(9, 2), torch.arange(9) % 2, 0, "`neighbors` >= 1, got 0"),
        (torch.zeros(9, 2), torch.full((9,), 4), 5, r"two classes or more, got \[4\]"),
        (
            torch.zeros(9, 2),
            torch.tensor([7] * 3 + [0] * 6),
            3,
            "more than 3 samples .* class 7 has 3; pass `neighbors` up to 2",
        ),
        (
            torch.zeros(9, 2),
            torch.tensor([7] + [0] * 8),
            1,
            "more than 1 samples .* class 7 has 1; leave it out",
        ),
    ],
)
def test_smote_of_what_cannot_be_filled_up_raises(x, y, neighbors, message):
    with pytest.raises(ValueError, match=f"smote: expected .*{message}"):
        smote(x, y, neighbors=neighbors)


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "imblearn.over_sampling", None)
    with pytest.raises(ImportError, match=r"imblearn.* 'torchref-triton\[train\]'"):
        smote(torch.zeros(9, 2), torch.arange(9) % 2)

import math
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn import metrics
from torchmetrics.functional.classification import multiclass_calibration_error

from torchref.diagnostics.predictions import (
    ConfusedPair,
    class_scores,
    confused_pairs,
    confusion_matrix,
    highest_loss,
    most_confused,
    plot_confusion,
    plot_reliability,
    plot_worst_images,
    r2,
    reliability,
    residuals,
    worst_values,
)

CLASSES = 4
LABELS = st.integers(1, 40).flatmap(
    lambda n: st.tuples(*[hnp.arrays("int64", n, elements=st.integers(0, CLASSES - 1))] * 2)
)
VALUES = st.integers(2, 30).flatmap(
    lambda n: st.tuples(*[hnp.arrays("float64", n, elements=st.integers(-9, 9))] * 2)
)


def predictions(samples, seed, classes=CLASSES):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(samples, classes, generator=generator, dtype=torch.float64)
    return logits.softmax(-1), torch.randint(0, classes, (samples,), generator=generator)


@settings(deadline=None, max_examples=50)
@given(LABELS)
def test_confusion_and_scores_equal_scikit_learn(pair):
    predicted, y = pair
    matrix = confusion_matrix(torch.from_numpy(predicted), torch.from_numpy(y), CLASSES)
    assert matrix.tolist() == metrics.confusion_matrix(y, predicted, labels=range(4)).tolist()
    theirs = metrics.precision_recall_fscore_support(
        y, predicted, labels=range(CLASSES), zero_division=0
    )
    ours = class_scores(matrix)
    for mine, other in zip(
        (ours.precision, ours.recall, ours.f1, ours.support), theirs, strict=True
    ):
        assert mine.tolist() == pytest.approx(other.tolist())


@settings(deadline=None, max_examples=50)
@given(LABELS, st.integers(1, 20))
def test_confused_pairs_are_the_largest_cells(pair, count):
    predicted, y = map(torch.from_numpy, pair)
    matrix = confusion_matrix(predicted, y, CLASSES)
    pairs = confused_pairs(matrix, count)
    counts = [p.count for p in pairs]
    cells = sorted((int(matrix[i, j]) for i in range(4) for j in range(4) if i != j), reverse=True)
    assert counts == [cell for cell in cells if cell][:count]
    for p in pairs:
        assert p.true != p.predicted
        assert p.count == ((y == p.true) & (predicted == p.predicted)).sum()
        assert p.share == pytest.approx(p.count / (y == p.true).sum().item())


def test_rows_are_the_true_classes():
    matrix = confusion_matrix(torch.tensor([1, 1, 1]), torch.tensor([0, 0, 1]), 2)
    assert matrix.tolist() == [[0, 2], [0, 1]]
    assert confused_pairs(matrix) == [ConfusedPair(true=0, predicted=1, count=2, share=1.0)]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 200), st.integers(0, 10**6), st.integers(1, 30))
def test_calibration_error_equals_torchmetrics(samples, seed, bins):
    p, y = predictions(samples, seed)
    found = reliability(p, y, bins)
    theirs = multiclass_calibration_error(p, y, CLASSES, n_bins=bins, norm="l1").item()
    assert found.ece == pytest.approx(theirs, abs=1e-5)
    assert found.count.sum() == samples
    share = found.count.double() / samples
    gap = (found.accuracy - found.confidence).abs()
    assert (gap * share).nansum().item() == pytest.approx(found.ece)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 200), st.integers(0, 10**6))
def test_bins_equal_scikit_learns_curve(samples, seed):
    """Of two classes, whether the prediction is right against its confidence."""
    from sklearn.calibration import calibration_curve

    p, y = predictions(samples, seed, classes=2)
    confidence, predicted = p.max(-1)
    found = reliability(p, y)
    filled = found.count > 0
    right = (predicted == y).long()
    accuracy, mean = calibration_curve(right.numpy(), confidence.numpy(), n_bins=10)
    assert found.accuracy[filled].tolist() == pytest.approx(accuracy.tolist())
    assert found.confidence[filled].tolist() == pytest.approx(mean.tolist())
    assert found.accuracy[~filled].isnan().all()


def test_certainty_is_in_the_last_bin():
    """torchmetrics gives 1.0 a bin of its own, beyond the last."""
    p = torch.tensor([[1.0, 0.0], [0.95, 0.05], [0.5, 0.5]])
    found = reliability(p, torch.tensor([1, 0, 0]))
    assert found.count.tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 2]
    assert found.ece == pytest.approx((abs(1 - 1.95) + abs(1 - 0.5)) / 3)


def test_the_highest_losses():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.4, 0.6], [0.2, 0.3, 0.5], [0.1, 0.8, 0.1]])
    worst = highest_loss(p, torch.tensor([0, 0, 1, 2]), count=3)
    assert [s.index for s in worst] == [1, 3, 2]
    assert [(s.true, s.predicted) for s in worst] == [(0, 2), (2, 1), (1, 2)]
    assert [s.probability for s in worst] == pytest.approx([0.6, 0.8, 0.5])
    losses = [-math.log(torch.finfo(torch.float32).eps), -math.log(0.1), -math.log(0.3)]
    assert [s.loss for s in worst] == pytest.approx(losses)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 30), st.integers(0, 10**6), st.integers(1, 40))
def test_losses_are_those_of_the_log_loss(samples, seed, count):
    p, y = predictions(samples, seed)
    worst = highest_loss(p, y, count)
    losses = [s.loss for s in worst]
    assert len(worst) == min(samples, count)
    assert losses == sorted(losses, reverse=True)
    every = highest_loss(p, y, samples)
    mean = sum(s.loss for s in every) / samples
    assert mean == pytest.approx(metrics.log_loss(y, p, labels=range(CLASSES)))
    assert all(s.true == y[s.index] and s.predicted == p[s.index].argmax() for s in every)


def test_the_most_confused_have_two_classes_close():
    p = torch.tensor([[0.9, 0.05, 0.05], [0.4, 0.41, 0.19], [0.5, 0.3, 0.2]])
    assert [s.index for s in most_confused(p, torch.zeros(3).long(), count=2)] == [1, 2]


@settings(deadline=None, max_examples=50)
@given(VALUES)
def test_r2_equals_scikit_learn(pair):
    predicted, y = pair
    if len(set(y)) == 1:
        with pytest.raises(ValueError, match="r2: expected different values in `y`"):
            r2(*map(torch.from_numpy, pair))
        return
    ours = r2(torch.from_numpy(predicted), torch.from_numpy(y))
    assert ours == pytest.approx(metrics.r2_score(y, predicted), abs=1e-12)


def test_worst_values_are_far_either_way():
    predicted, y = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 5.0, -1.0, 4.5])
    assert residuals(predicted, y).tolist() == [0.0, 3.0, -4.0, 0.5]
    worst = worst_values(predicted, y, count=2)
    assert [(s.index, s.true, s.predicted, s.residual) for s in worst] == [
        (2, -1.0, 3.0, -4.0),
        (1, 5.0, 2.0, 3.0),
    ]


# Pictures.


def test_pictures(tmp_path):
    p, y = predictions(50, 0)
    matrix = confusion_matrix(p.argmax(-1), y, CLASSES)
    plot_confusion(matrix, tmp_path / "confusion.png", ["a", "b", "c", "long name"])
    many = torch.randint(0, 9, (30, 30))
    plot_confusion(many, tmp_path / "many.png")
    plot_reliability(reliability(p, y), tmp_path / "reliability.png")
    worst = highest_loss(p, y, 5)  # one place of the grid is empty
    plot_worst_images(255 * torch.rand(50, 3, 4, 4), worst, tmp_path / "rgb.png", high=255)
    plot_worst_images(
        torch.rand(50, 1, 4, 4), worst[:1], tmp_path / "gray.svg", ["a", "b", "c", "d"]
    )
    text = (tmp_path / "gray.svg").read_text()
    assert f"predicted {'abcd'[worst[0].predicted]} ({worst[0].probability:.2f})" in text
    assert f"true {'abcd'[worst[0].true]}" in text
    assert all(path.stat().st_size > 4000 for path in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 5


def test_plotting_leaves_no_figure_open(tmp_path):
    plot_confusion(torch.eye(2).long(), tmp_path / "confusion.png")
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []


def test_an_empty_bin_and_an_empty_class_warn_of_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p = torch.tensor([[1.0, 0.0]])
        plot_reliability(reliability(p, torch.tensor([0])), tmp_path / "reliability.png")
        scores = class_scores(confusion_matrix(torch.tensor([0]), torch.tensor([0]), 2))
        assert scores.f1.tolist() == [1.0, 0.0]


# Errors.

P, Y = torch.full((2, 3), 1 / 3), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: confusion_matrix(Y, Y, 1), "confusion_matrix: expected `classes` >= 2, got 1"),
        (lambda: confusion_matrix(Y, Y + 1, 2), r"expected `y` in \[0, 2\), got 2"),
        (lambda: confusion_matrix(Y - 1, Y, 2), r"expected `predicted` in \[0, 2\), got -1"),
        (lambda: confusion_matrix(P, Y, 2), r"`predicted` \(samples,\) of classes, got torch.fl"),
        (lambda: confusion_matrix(Y[:1], Y, 2), "expected 1 classes in `y`, got 2"),
        (lambda: class_scores(torch.zeros(2, 3)), r"expected `matrix` of shape .*got \(2, 3\)"),
        (lambda: confused_pairs(torch.eye(2), 0), "confused_pairs: expected `count` > 0, got 0"),
        (lambda: reliability(P * 9, Y), r"expected `probabilities` in \[0, 1\]"),
        (lambda: reliability(P * math.nan, Y), r"expected `probabilities` in \[0, 1\]"),
        (lambda: reliability(P[:0], Y[:0]), r"got shape \(0, 3\)"),
        (lambda: reliability(P, Y, 0), "reliability: expected `bins` > 0, got 0"),
        (lambda: highest_loss(P, Y[:1]), "highest_loss: expected 2 classes in `y`, got 1"),
        (lambda: highest_loss(P, Y + 2), r"highest_loss: expected `y` in \[0, 3\), got 3"),
        (lambda: most_confused(P, Y, 0), "most_confused: expected `count` > 0, got 0"),
        (lambda: residuals(torch.zeros(2, 1), torch.zeros(2)), r"shape \(2,\), got \(2, 1\)"),
        (lambda: residuals(torch.zeros(0), torch.zeros(0)), r"expected `y` \(samples,\), got"),
        (lambda: worst_values(torch.zeros(2), torch.zeros(2), 0), "`count` > 0, got 0"),
        (lambda: plot_confusion(torch.eye(2), "", ["a"]), "expected 2 `classes`, got 1"),
        (lambda: plot_worst_images(P, [], ""), r"expected `images` of shape .*got \(2, 3\)"),
        (lambda: plot_worst_images(torch.zeros(1, 1, 2, 2), [], ""), "a sample or more"),
    ],
)
def test_what_makes_no_sense_raises(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional", None)
    with pytest.raises(ImportError, match=r"pip install 'torchref-triton\[train\]'"):
        confusion_matrix(Y, Y, 2)


def test_names_are_written_as_they_are_and_short(tmp_path):
    """Dollar signs are no mathematics, and a long name leaves room for the picture."""
    names = [r"$0-$50K", r"$\frac$", "a_b^c", "x" * 300]
    plot_confusion(torch.eye(4, dtype=torch.int64), tmp_path / "a.svg", names)
    plot_confusion(torch.eye(4, dtype=torch.int64), tmp_path / "a.png", names)
    samples = highest_loss(torch.full((4, 4), 0.25), torch.arange(4))
    plot_worst_images(torch.rand(4, 1, 3, 3), samples, tmp_path / "b.png", names)
    text = (tmp_path / "a.svg").read_text()
    assert "x" * 23 + "\u2026" in text
    assert "x" * 25 not in text

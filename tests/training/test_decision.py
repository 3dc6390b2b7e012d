import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import log_loss as sklearn_log_loss

from torchref.training import coverage_curve, decide, log_loss

SCORES = hnp.arrays(
    "float64",
    st.tuples(st.integers(1, 20), st.integers(2, 5)),
    elements=st.integers(-40, 40).map(lambda i: i / 4),
)


@settings(deadline=None, max_examples=50)
@given(SCORES, st.floats(0, 1))
def test_who_decides_is_confident_and_right_in_order(scores, threshold):
    """argmax of scores and of their softmax agree, as the course says, and -1 is for the unsure."""
    z = torch.from_numpy(scores)
    p = torch.softmax(z, -1)
    labels = decide(p, threshold)
    largest = p.amax(-1)
    assert ((labels == -1) == (largest < threshold)).all()
    decided = labels >= 0
    # the most probable class has the highest score, whichever of equals it is
    assert (z[decided].gather(1, labels[decided, None])[:, 0] == z[decided].amax(-1)).all()


def test_a_class_may_need_more_confidence():
    p = torch.tensor([[0.15, 0.85], [0.05, 0.95], [0.6, 0.4]])
    assert decide(p, torch.tensor([0.5, 0.9])).tolist() == [-1, 1, 0]
    assert decide(p, 0.85).tolist() == [1, 1, -1]


def test_nan_never_decides():
    assert decide(torch.tensor([[float("nan"), float("nan")]]), 0.0).tolist() == [-1]


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan"), torch.tensor([0.5, 2.0])])
def test_a_threshold_out_of_range_raises(threshold):
    with pytest.raises(ValueError, match=r"threshold: expected in \[0, 1\]"):
        decide(torch.tensor([[0.5, 0.5]]), threshold)


def test_thresholds_for_another_number_of_classes_raise():
    with pytest.raises(ValueError, match="threshold: expected one, or 2"):
        decide(torch.tensor([[0.5, 0.5]]), torch.tensor([0.5, 0.5, 0.5]))


@settings(deadline=None, max_examples=50)
@given(SCORES)
def test_log_loss_is_scikit_learns(scores):
    p = torch.softmax(torch.from_numpy(scores), -1)
    y = torch.arange(len(p)) % p.shape[1]
    expected = sklearn_log_loss(y.numpy(), p.numpy(), labels=range(p.shape[1]))
    assert log_loss(p, y) == pytest.approx(expected, rel=1e-9)


def test_log_loss_of_an_impossible_class_is_finite():
    p, y = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([1])
    assert log_loss(p, y) == pytest.approx(-torch.log(torch.tensor(2.220446049250313e-16)).item())


def test_coverage_falls_and_counts_what_is_right():
    p = torch.tensor([[0.9, 0.1], [0.3, 0.7], [0.6, 0.4], [0.2, 0.8]])
    rows = coverage_curve(p, torch.tensor([0, 1, 1, 0]), [0.0, 0.65, 0.85, 0.95])
    assert [row.coverage for row in rows] == [1.0, 0.75, 0.25, 0.0]
    assert [row.accuracy for row in rows[:3]] == [0.5, pytest.approx(2 / 3), 1.0]
    assert rows[3].accuracy != rows[3].accuracy  # NaN: nothing was decided


def curve(p):
    return coverage_curve(p, torch.zeros(len(p), dtype=torch.long))


def loss(p):
    return log_loss(p, torch.zeros(len(p), dtype=torch.long))


@pytest.mark.parametrize("call", [lambda p: decide(p, 0.5), curve, loss])
@pytest.mark.parametrize("wrong", [2.0, -1.9, float("inf"), 1.001])
def test_logits_are_no_probabilities(call, wrong):
    with pytest.raises(ValueError, match=rf"`probabilities` in \[0, 1\], got {wrong:g}"):
        call(torch.tensor([[0.5, 0.5], [wrong, 0.1]]))


@pytest.mark.parametrize("call", [lambda p: decide(p, 0.5), curve, loss])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_rounding_beyond_one_is_a_probability(call, dtype):
    over = 1 + torch.finfo(dtype).eps
    call(torch.tensor([[over, 1 - over]], dtype=dtype))


def test_nan_has_no_log_loss_and_is_not_covered():
    p = torch.tensor([[float("nan"), float("nan")]])
    assert curve(p)[0].coverage == 0
    with pytest.raises(ValueError, match=r"`probabilities` in \[0, 1\], got nan"):
        loss(p)

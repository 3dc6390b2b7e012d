import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.preprocessing import StandardScaler

from torchref.data import Standard


@settings(deadline=None, max_examples=50)
@given(
    hnp.arrays(
        "float64",
        st.tuples(st.integers(2, 40), st.integers(1, 6)),
        elements=st.integers(-1000, 1000).map(lambda i: i / 8),
    )
)
def test_equals_scikit_learn_in_float64(x):
    ours = Standard().fit(torch.from_numpy(x))
    theirs = StandardScaler().fit(x)
    y = ours(torch.from_numpy(x))
    torch.testing.assert_close(y, torch.from_numpy(theirs.transform(x)), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.inverse(y), torch.from_numpy(x), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e8 + 0.1, -3.7e-9])
def test_a_constant_column_is_exactly_0(value):
    x = torch.full((7, 1), value)
    assert (Standard().fit(x)(x) == 0).all()


def test_statistics_come_from_the_training_split_alone():
    scale = Standard().fit(torch.tensor([[0.0], [2.0]]))
    assert scale(torch.tensor([[9.0]])).item() == 8.0


def test_statistics_are_state_and_load_into_a_fresh_module():
    x = torch.randn(9, 3, dtype=torch.float64)
    fitted, fresh = Standard().fit(x), Standard()
    assert list(fitted.state_dict()) == ["mean", "std"]
    fresh.load_state_dict(fitted.state_dict())
    assert torch.equal(fresh(x), fitted(x))


def test_integers_become_floating_point():
    scale = Standard().fit(torch.tensor([[0], [2]]))
    assert torch.equal(scale(torch.tensor([[2]])), torch.tensor([[1.0]]))


def test_any_leading_shape():
    scale = Standard().fit(torch.randn(9, 3))
    assert scale(torch.randn(2, 5, 3)).shape == (2, 5, 3)


def test_unfitted_raises():
    with pytest.raises(RuntimeError, match="not fitted"):
        Standard()(torch.zeros(1, 2))


def test_a_second_fit_raises():
    with pytest.raises(RuntimeError, match="fitted already"):
        Standard().fit(torch.zeros(2, 2)).fit(torch.zeros(2, 2))


@pytest.mark.parametrize("shape", [(2, 4), (2, 2), ()])
def test_a_wrong_number_of_features_raises(shape):
    with pytest.raises(ValueError, match="expected 3 features"):
        Standard().fit(torch.randn(5, 3))(torch.zeros(shape))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3), "of shape"),
        (torch.zeros(0, 3), "of shape"),
        (torch.tensor([[1.0], [float("nan")]]), "a NaN or an infinity"),
        (torch.tensor([[1.0], [float("inf")]]), "a NaN or an infinity"),
    ],
)
def test_what_has_no_statistics_raises(x, message):
    with pytest.raises(ValueError, match=message):
        Standard().fit(x)

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.preprocessing import MinMaxScaler, RobustScaler, StandardScaler
from torch.utils.data import DataLoader, TensorDataset

from torchref.data import ImageNormalize, MinMax, Robust, Standard, normalize

SCALERS = [(Standard, StandardScaler), (MinMax, MinMaxScaler), (Robust, RobustScaler)]
OURS = [cls for cls, _ in SCALERS]
TABLES = hnp.arrays(
    "float64",
    st.tuples(st.integers(2, 40), st.integers(1, 6)),
    elements=st.integers(-1000, 1000).map(lambda i: i / 8),
)


@settings(deadline=None, max_examples=50)
@given(TABLES, st.sampled_from(SCALERS))
def test_equals_scikit_learn_in_float64(x, pair):
    ours, theirs = pair[0]().fit(torch.from_numpy(x)), pair[1]().fit(x)
    y = ours(torch.from_numpy(x))
    torch.testing.assert_close(y, torch.from_numpy(theirs.transform(x)), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.inverse(y), torch.from_numpy(x), rtol=1e-12, atol=1e-10)


@settings(deadline=None, max_examples=50)
@given(TABLES, st.sampled_from(OURS), st.integers(1, 41))
def test_batches_give_what_the_whole_gives(x, cls, size):
    x = torch.from_numpy(x)
    whole, parts = cls().fit(x), cls().fit(DataLoader(TensorDataset(x, x), size))
    torch.testing.assert_close(parts.state_dict(), whole.state_dict(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kept", [1, 8])
@pytest.mark.parametrize(
    "x",
    [
        torch.randn(1000, 2, dtype=torch.float64),
        torch.randn(1000, 2, dtype=torch.float64).exp() ** 9,
        torch.arange(1000)[:, None] // 400,
        torch.tensor([[-1.7e308], [1.7e308]], dtype=torch.float64).repeat(9, 1),
        torch.full((99, 1), 0.1),
    ],
    ids=["normal", "skewed", "ties", "wide", "constant"],
)
def test_quantiles_in_many_passes_are_exact(x, kept, monkeypatch):
    monkeypatch.setattr(normalize, "KEPT", kept)
    monkeypatch.setattr(normalize, "BINS", 4)
    found = normalize._quantiles(normalize._Batches("", x.split(7), lambda x: x), (0.25, 0.5, 0.75))
    expected = x.double().quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), 0)
    # of -1.7e308 and 1.7e308 the halfway overflows in torch; here a quantile is one of the two
    if expected.isfinite().all():
        torch.testing.assert_close(torch.stack(found), expected, rtol=1e-15, atol=0)


def test_few_values_are_kept_at_once(monkeypatch):
    """A pass over 100,000 values narrows each interval to a few before it sorts."""
    monkeypatch.setattr(normalize, "KEPT", 100)
    sizes = []
    real = torch.cat
    monkeypatch.setattr(torch, "cat", lambda xs: sizes.append(sum(map(len, xs))) or real(xs))
    Robust().fit(torch.randn(100_000, 1).split(1000))
    assert sizes
    assert max(sizes) <= 100


@pytest.mark.parametrize("cls", OURS)
@pytest.mark.parametrize("value", [0.0, 0.1, 1e8 + 0.1, -3.7e-9])
def test_a_constant_column_is_exactly_0(cls, value):
    x = torch.full((7, 1), value)
    assert (cls().fit(x)(x) == 0).all()
    assert (cls().fit(x.split(2))(x) == 0).all()


def test_statistics_come_from_the_training_split_alone():
    scale = Standard().fit(torch.tensor([[0.0], [2.0]]))
    assert scale(torch.tensor([[9.0]])).item() == 8.0


def test_an_outlier_moves_robust_statistics_little():
    x = torch.arange(101.0)[:, None]
    with_outlier = torch.cat([x, torch.tensor([[1e9]])])
    assert (Robust().fit(with_outlier).median - Robust().fit(x).median).abs() <= 0.5
    assert Standard().fit(with_outlier).mean > 1e6


@pytest.mark.parametrize("cls", OURS)
def test_statistics_are_state_and_load_into_a_fresh_module(cls):
    x = torch.randn(9, 3, dtype=torch.float64)
    fitted, fresh = cls().fit(x), cls()
    assert list(fitted.state_dict()) == list(cls.names)
    fresh.load_state_dict(fitted.state_dict())
    assert torch.equal(fresh(x), fitted(x))
    assert repr(fresh) == f"{cls.__name__}(3)"
    assert repr(cls()) == f"{cls.__name__}(unfitted)"


def test_integers_become_floating_point():
    scale = Standard().fit(torch.tensor([[0], [2]]))
    assert torch.equal(scale(torch.tensor([[2]])), torch.tensor([[1.0]]))


def test_any_leading_shape():
    scale = Standard().fit(torch.randn(9, 3))
    assert scale(torch.randn(2, 5, 3)).shape == (2, 5, 3)


# Images.


def test_pixels_of_each_channel_have_mean_0_and_deviation_1():
    x = torch.randint(0, 256, (20, 3, 8, 6), dtype=torch.uint8)
    x[:, 1] //= 4
    scale = ImageNormalize().fit(x.split(7))
    y = scale(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(y.std((0, 2, 3), correction=0), torch.ones(3), rtol=1e-5, atol=0)
    torch.testing.assert_close(scale.inverse(y), x.float(), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(scale(x[0]), y[0])
    torch.testing.assert_close(scale.mean, (x / 255).mean((0, 2, 3)), rtol=1e-6, atol=0)


def test_known_statistics_need_no_fit():
    scale = ImageNormalize([0.5, 0.25], [0.5, 0.5], divisor=1)
    y = scale(torch.ones(2, 3, 3))
    assert torch.equal(y, torch.tensor([1.0, 1.5])[:, None, None].expand(2, 3, 3))
    with pytest.raises(RuntimeError, match="ImageNormalize: fitted already"):
        scale.fit(torch.zeros(1, 2, 3, 3))
    fresh = ImageNormalize(divisor=1)
    fresh.load_state_dict(scale.state_dict())
    assert torch.equal(fresh(torch.ones(2, 3, 3)), y)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.5], None), "expected both `mean` and `std`"),
        (([0.5], [0.5, 0.5]), "a `mean` and a positive `std` for each channel"),
        (([0.5], [0.0]), "a `mean` and a positive `std` for each channel, got .*0.0"),
    ],
)
def test_statistics_that_make_no_sense_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageNormalize(*arguments)


def test_images_of_another_shape_raise():
    scale = ImageNormalize().fit(torch.rand(5, 3, 4, 4))
    with pytest.raises(ValueError, match="expected 3 features, got shape"):
        scale(torch.rand(5, 1, 4, 4))
    with pytest.raises(ValueError, match=r"expected `x` of shape \(..., C, H, W\), got \(4, 4\)"):
        scale(torch.rand(4, 4))
    with pytest.raises(ValueError, match=r"expected `x` of shape \(N, C, H, W\), got \(3, 4, 4\)"):
        ImageNormalize().fit(torch.rand(3, 4, 4))


# Errors.


@pytest.mark.parametrize("cls", OURS)
def test_unfitted_raises(cls):
    with pytest.raises(RuntimeError, match=f"{cls.__name__}: not fitted"):
        cls()(torch.zeros(1, 2))
    with pytest.raises(RuntimeError, match=f"{cls.__name__}: not fitted"):
        cls().inverse(torch.zeros(1, 2))


@pytest.mark.parametrize("cls", OURS)
def test_a_second_fit_raises(cls):
    with pytest.raises(RuntimeError, match=f"{cls.__name__}: fitted already"):
        cls().fit(torch.zeros(2, 2)).fit(torch.zeros(2, 2))


@pytest.mark.parametrize("shape", [(2, 4), (2, 2), ()])
def test_a_wrong_number_of_features_raises(shape):
    with pytest.raises(ValueError, match="expected 3 features"):
        Standard().fit(torch.randn(5, 3))(torch.zeros(shape))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3), "of shape"),
        (torch.zeros(0, 3), "at least one sample"),
        ([], "at least one sample"),
        (torch.tensor([[1.0, 2.0], [3.0, float("nan")]]), "column 1 of `x` has a NaN or an inf"),
        (torch.tensor([[1.0], [float("inf")]]), "column 0 of `x` has a NaN or an infinity"),
        ([torch.zeros(2, 3), torch.zeros(2, 2)], "expected 3 features in every batch, got 2"),
        (["text"], "expected tensors in `data`, got <class 'str'>"),
    ],
)
@pytest.mark.parametrize("cls", OURS)
def test_what_has_no_statistics_raises(cls, x, message):
    scale = cls()
    with pytest.raises(ValueError, match=f"{cls.__name__}: .*{message}"):
        scale.fit(x)
    assert not scale.is_fitted


def test_data_that_can_be_read_only_once_raise():
    with pytest.raises(ValueError, match="Robust: read 4 samples, then 0: expected `data` that"):
        Robust().fit(iter([torch.zeros(4, 2)]))
    assert Standard().fit(iter([torch.zeros(4, 2)])).is_fitted  # once is enough

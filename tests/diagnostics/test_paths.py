from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import torchref.optim
from torchref.diagnostics.paths import (
    OPTIMIZERS,
    optimizer_paths,
    plot_paths,
    plot_smoothing,
    ravine,
    smooth,
)

TWINS = {
    "SGD": partial(torch.optim.SGD, lr=0.45),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.8),
    "RMSProp": partial(torch.optim.RMSprop, lr=0.3, alpha=0.9),
    "Adam": partial(torch.optim.Adam, lr=0.8),
}


def test_the_ravine_is_40_times_as_curved_across():
    curvature = torch.autograd.functional.hessian(ravine, torch.randn(2, dtype=torch.float64))
    assert curvature.diagonal().tolist() == pytest.approx([0.1, 4.0])
    assert torch.linalg.cond(curvature).item() == pytest.approx(40)
    assert ravine(torch.zeros(5, 3, 2)).shape == (5, 3)


def test_paths_are_those_of_torch():
    paths, twins = optimizer_paths(), optimizer_paths(TWINS)
    assert list(paths) == list(TWINS)
    for name, path in paths.items():
        assert path.shape == (41, 2)
        assert path[0].tolist() == [-9.0, 1.8]
        torch.testing.assert_close(path, twins[name], rtol=1e-9, atol=1e-9)
    assert all(make.func.__module__.startswith("torchref") for make in OPTIMIZERS.values())


def test_the_path_of_sgd_is_a_product():
    x, y = optimizer_paths(steps=30)["SGD"].T
    steps = torch.arange(31, dtype=torch.float64)
    torch.testing.assert_close(x, -9 * 0.955**steps)
    torch.testing.assert_close(y, 1.8 * (-0.8) ** steps)


def test_each_comes_nearer_than_plain_descent():
    ends = {name: ravine(path[-1]).item() for name, path in optimizer_paths().items()}
    assert all(end < ends["SGD"] for name, end in ends.items() if name != "SGD")
    assert ends["SGD"] < ravine(torch.tensor([-9.0, 1.8])) / 50


def test_sgd_leaves_the_ravine_beyond_its_largest_rate():
    far = optimizer_paths({"SGD": partial(torchref.optim.SGD, lr=0.51)}, steps=60)["SGD"]
    assert far[-1, 1].abs() > 1.8 * 2


def test_a_function_of_ones_own():
    paths = optimizer_paths(
        {"a": partial(torchref.optim.SGD, lr=0.5)}, lambda p: p.square().sum() / 2, start=(4, 8)
    )
    assert paths["a"][:3].tolist() == [[4.0, 8.0], [2.0, 4.0], [1.0, 2.0]]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-100, 100), min_size=1, max_size=30), st.floats(0, 0.99))
def test_smoothing_is_the_courses_sum_of_weights(values, decay):
    x = torch.tensor(values, dtype=torch.float64)
    raw, corrected = smooth(x, decay, bias_correction=False), smooth(x, decay)
    for t in range(1, len(x) + 1):
        weights = torch.tensor([(1 - decay) * decay ** (t - k) for k in range(1, t + 1)])
        expected = (weights * x[:t]).sum().item()
        assert raw[t - 1].item() == pytest.approx(expected, rel=1e-4, abs=1e-3)
        total = 1 - decay**t
        assert corrected[t - 1].item() == pytest.approx(raw[t - 1].item() / total, abs=1e-8)


def test_a_constant_stays_itself_only_when_corrected():
    x = torch.full((20,), 3.0)
    torch.testing.assert_close(smooth(x, 0.9), x)
    assert smooth(x, 0.9, bias_correction=False)[0].item() == pytest.approx(0.3)


def test_the_series_is_not_changed_and_may_be_of_vectors():
    x = torch.randn(5, 3, requires_grad=True)
    before = x.detach().clone()
    y = smooth(x, 0.5)
    assert y.shape == (5, 3)
    assert not y.requires_grad
    assert torch.equal(x.detach(), before)


def test_pictures(tmp_path):
    plot_paths(optimizer_paths(steps=5), tmp_path / "paths.png")
    plot_paths({"alone": torch.zeros(3, 2)}, tmp_path / "alone.png")
    plot_smoothing(torch.randn(30), tmp_path / "smoothing.png", decays=[0.1 * i for i in range(6)])
    for path in tmp_path.iterdir():
        assert path.stat().st_size > 5000
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: optimizer_paths(steps=0), ValueError, "expected `steps` > 0, got 0"),
        (lambda: optimizer_paths(start=(1,)), ValueError, "`start` of two numbers, got"),
        (lambda: smooth(torch.zeros(0), 0.9), ValueError, "expected `series` of values"),
        (lambda: smooth(torch.tensor(1.0), 0.9), ValueError, "expected `series` of values"),
        (lambda: smooth(torch.zeros(3), 1.0), ValueError, r"expected `decay` in \[0, 1\), got 1"),
        (lambda: smooth(torch.zeros(3).long(), 0.9), TypeError, "floating point"),
        (lambda: plot_smoothing(torch.zeros(3, 2), ""), ValueError, r"`series` \(steps,\), got"),
    ],
)
def test_what_makes_no_sense_raises(call, error, message):
    with pytest.raises(error, match=message):
        call()

import pickle

import pytest
import torch

from torchref.optim import ExponentialMovingAverage


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
def test_weights_in_closed_form(decay):
    values = torch.randn(20, 3, dtype=torch.float64)
    x = torch.zeros(3, dtype=torch.float64)
    ema = ExponentialMovingAverage([x], decay)
    for t, value in enumerate(values, start=1):
        x.copy_(value)
        ema.update()
        weights = (1 - decay) * decay ** torch.arange(t - 1, -1, -1, dtype=torch.float64)
        expected = (weights[:, None] * values[:t]).sum(0)
        (plain,) = ema.average(bias_correction=False)
        (corrected,) = ema.average()
        torch.testing.assert_close(plain, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(corrected, expected / weights.sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("decay", "window"), [(0.5, 2), (0.9, 10), (0.99, 100), (0.999, 1000)])
def test_the_courses_effective_windows(decay, window):
    assert ExponentialMovingAverage([torch.zeros(1)], decay).effective_window == pytest.approx(
        window
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64])
def test_a_constant_is_its_own_average(dtype):
    x = torch.full((4,), 3.0).to(dtype)
    ema = ExponentialMovingAverage([x], 0.999)
    for _ in range(10):
        ema.update()
    (average,) = ema.average()
    assert average.dtype == dtype
    tolerance = max(torch.finfo(dtype).eps, 1e-4)  # 1 - 0.999 ** 10 in float32
    torch.testing.assert_close(average, x, rtol=tolerance, atol=0)


def test_averages_are_new_and_parameters_stay():
    model = torch.nn.Linear(2, 3)
    before = [p.detach().clone() for p in model.parameters()]
    ema = ExponentialMovingAverage(model.parameters(), 0.9)
    ema.update()
    for average in ema.average():
        assert not average.requires_grad
        average.zero_()
    assert all(a.any() for a in ema.average())
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_state_dict_continues(tmp_path):
    x = torch.ones(2)
    ema = ExponentialMovingAverage([x], 0.9)
    ema.update()
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    again = ExponentialMovingAverage([x], 0.5)
    again.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
    copied = pickle.loads(pickle.dumps(ema))
    x.fill_(3.0)
    copied.params[0].fill_(3.0)
    for each in (ema, again, copied):
        each.update()
    expected = (0.9 * 0.1 + 0.1 * 3) / (1 - 0.81)
    for each in (ema, again, copied):
        assert each.average()[0].tolist() == pytest.approx([expected] * 2)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0, float("nan")])
def test_decay_out_of_range(decay):
    with pytest.raises(ValueError, match=r"expected `decay` in \[0, 1\), got"):
        ExponentialMovingAverage([torch.zeros(1)], decay)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ([], ValueError, "expected tensors in `params`, got none"),
        (torch.zeros(2), TypeError, "`params` to be an iterable of tensors, got a Tensor"),
        ([torch.zeros(2, dtype=torch.int64)], TypeError, "got torch.int64"),
        ([1.0], TypeError, "got float"),
    ],
)
def test_wrong_params(params, error, message):
    with pytest.raises(error, match=message):
        ExponentialMovingAverage(params, 0.9)


def test_no_average_before_an_update():
    with pytest.raises(RuntimeError, match="call `update` first"):
        ExponentialMovingAverage([torch.zeros(1)], 0.9).average()


def test_a_state_of_other_shapes():
    ema = ExponentialMovingAverage([torch.zeros(2)], 0.9)
    with pytest.raises(ValueError, match="expected `averages` of shapes"):
        ema.load_state_dict(ExponentialMovingAverage([torch.zeros(3)], 0.9).state_dict())

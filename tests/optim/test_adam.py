import math

import pytest
import torch
from optim_parity import (
    UPDATES,
    assert_as_good,
    assert_parity,
    ours,
    tensors,
    theirs,
    traced,
    train,
)

from torchref.optim import Adam, AdamW, adam


@pytest.mark.parametrize("foreach", [False, True])
def test_the_courses_first_steps(foreach):
    w = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    optimizer = Adam([w], foreach=foreach)  # the course's defaults are torch's
    theta, m, v = 1.0, 0.0, 0.0
    for t, grad in enumerate((2.0, -1.0, 0.25), start=1):
        w.grad = torch.full_like(w, grad)
        optimizer.step()
        m = 0.9 * m + 0.1 * grad
        v = 0.999 * v + 0.001 * grad**2
        m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.999**t)
        theta -= 0.001 * m_hat / (math.sqrt(v_hat) + 1e-8)
        assert w.item() == pytest.approx(theta, rel=1e-14)


def test_decoupled_decay_is_not_scaled_by_the_gradient():
    for grad in (0.0, 1.0, 100.0):
        w = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
        w.grad = torch.full_like(w, grad)
        AdamW([w], lr=0.1, weight_decay=0.5).step()
        step = 0.1 if grad else 0.0
        assert w.item() == pytest.approx(1.0 * (1 - 0.1 * 0.5) - step, rel=1e-8)


@pytest.mark.parametrize("decoupled", [False, True])
def test_the_flag_makes_an_adamw(decoupled):
    options = {"weight_decay": 0.1, "decoupled_weight_decay": decoupled}
    adams = tensors(*train(ours("Adam"), options, steps=5))
    adamw = tensors(*train(ours("AdamW"), {"weight_decay": 0.1}, steps=5))
    assert torch.equal(adams["param 4"], adamw["param 4"]) == decoupled


def _beta_power_off_by_one(step, group):
    return adam_corrections(step - 1 if step > 1 else step, group)


def _first_correction_missing(step, group):
    _, correction = adam_corrections(step, group)
    return group["lr"], correction


adam_corrections = adam._corrections


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("mistake", [_beta_power_off_by_one, _first_correction_missing])
def test_wrong_corrections_are_caught(mistake, foreach, monkeypatch):
    monkeypatch.setattr(adam, "_corrections", mistake)
    with pytest.raises(AssertionError):
        assert_parity("Adam", {"foreach": foreach}, steps=3)


def test_amsgrad_on_the_corrected_moment_is_caught(monkeypatch):
    """FlagGems keeps the largest v / (1 - beta2 ** t), which never recovers from the first."""
    module, name = UPDATES["Adam"]
    update = getattr(module, name)

    def wrong(param, grad, m, v, v_max, grad_scale, found_inf, step_size, correction, *rest):
        v_max.mul_(correction**2)
        update(param, grad, m, v, v_max, grad_scale, found_inf, step_size, correction, *rest)
        v_max.div_(correction**2)

    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(AssertionError):
        assert_parity("Adam", {"amsgrad": True}, steps=3)


def _scaled_step(cls):
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = cls([w], lr=0.1, fused=True, eps=1.0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    w.grad = torch.tensor([8.0, 16.0, -4.0])
    optimizer.step()
    return w.detach()


def test_the_scale_divides():
    torch.testing.assert_close(_scaled_step(Adam), _scaled_step(torch.optim.Adam))


def test_a_scale_that_multiplies_is_caught(monkeypatch):
    traced(monkeypatch)
    unscaled = adam.unscaled
    monkeypatch.setattr(adam, "unscaled", lambda g, scale, *rest: unscaled(g, 1 / scale, *rest))
    with pytest.raises(AssertionError):
        test_the_scale_divides()


@pytest.mark.parametrize("mistake", [_beta_power_off_by_one, _first_correction_missing])
def test_wrong_corrections_break_the_error_bound(mistake, monkeypatch):
    truth = tensors(*train(theirs("Adam"), {}, steps=5, truth_of=torch.float32))
    torchs = tensors(*train(theirs("Adam"), {}, steps=5, dtype=torch.float32))
    monkeypatch.setattr(adam, "_corrections", mistake)
    actual = tensors(*train(ours("Adam"), {}, steps=5, dtype=torch.float32))
    with pytest.raises(AssertionError, match="bound"):
        assert_as_good(actual, torchs, truth)

import math

import pytest
import torch
from optim_parity import UPDATES, assert_parity

from torchref.optim import RMSprop


@pytest.mark.parametrize("foreach", [False, True])
def test_the_courses_rmsprop(foreach):
    w = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    optimizer = RMSprop([w], lr=0.01, alpha=0.9, eps=1e-8, foreach=foreach)
    theta, v = 1.0, 0.0
    for grad in (1.0, -2.0, 0.5):
        w.grad = torch.full_like(w, grad)
        optimizer.step()
        v = 0.9 * v + 0.1 * grad**2
        theta -= 0.01 / (math.sqrt(v) + 1e-8) * grad
        assert w.item() == pytest.approx(theta, rel=1e-14)


def _alpha_the_other_way_round(update):
    def wrong(*args):
        return update(*args[:6], 1 - args[6], *args[7:])

    return wrong


def _eps_twice(update):
    def wrong(*args):
        return update(*args[:7], 2 * args[7], *args[8:])

    return wrong


@pytest.mark.parametrize("mistake", [_alpha_the_other_way_round, _eps_twice])
def test_planted_mistakes_are_caught(mistake, monkeypatch):
    module, name = UPDATES["RMSprop"]
    monkeypatch.setattr(module, name, mistake(getattr(module, name)))
    with pytest.raises(AssertionError):
        assert_parity("RMSprop", {"eps": 1e-3}, steps=3)

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from torchref.training import DataModule, MLPClassifier, MLPRegressor
from torchref.training.probes import learning_rate_range, overfit_one_batch


def classifier(**options):
    torch.manual_seed(0)
    options = {"width": 32, "normalize": "none", "lr": 0.01, **options}
    return MLPClassifier(4, ["a", "b", "c"], **options)


def batch(count=24):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 4, generator=generator), torch.arange(count) % 3


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_one_batch_is_learned_whatever_dropout_and_penalties_would_prevent():
    model = classifier(dropout=0.9, l2=100.0)
    before = state(model)
    check = overfit_one_batch(model, batch())
    assert check.passed
    assert check.accuracy == 1.0
    assert check.last_loss <= 0.1 * check.first_loss
    assert check.steps < 300
    assert unchanged(model, before)
    assert (model.l2, model.net[3].p) == (100.0, 0.9)
    assert all(p.grad is None for p in model.parameters())
    assert str(check).startswith("passed: one batch, ")


def cut_off(model):
    """The gradient never arrives at the hidden layers."""
    model.net.insert(3, Detached())


class Detached(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x) + x.mean().detach()


@pytest.mark.parametrize(
    "model",
    [classifier(init="zeros"), classifier(lr=1e-9), classifier(depth=0, lr=1e-4)],
    ids=["symmetric", "slow", "linear"],
)
def test_what_cannot_learn_fails(model):
    check = overfit_one_batch(model, batch())
    assert not check.passed
    assert check.steps == 300
    assert str(check).startswith("FAILED: one batch, 300 steps: loss ")


def test_a_wiring_mistake_fails():
    model = classifier()
    cut_off(model)
    assert not overfit_one_batch(model, batch()).passed


def test_equal_samples_with_different_targets_fail():
    x, y = batch()
    assert not overfit_one_batch(classifier(), (x * 0, y)).passed


def test_values_are_learned():
    torch.manual_seed(0)
    model = MLPRegressor(4, normalize="none", lr=0.01)
    x, _ = batch()
    y = 100 + 20 * x[:, 0]
    model.scale.fit(y[:, None])
    check = overfit_one_batch(model, (x, y))
    assert check.passed
    assert check.accuracy is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((batch(), 0), "steps: expected > 0, got 0"), ((batch(0),), "batch: expected a sample or mo")],
)
def test_arguments_out_of_range_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        overfit_one_batch(classifier(), *arguments)


def test_rates_grow_and_the_steepest_fall_is_suggested(tmp_path):
    x, _ = batch(600)
    data = DataModule(x, (x[:, 0] > 0).long(), batch_size=32)
    torch.manual_seed(0)
    model = MLPClassifier(4, ["no", "yes"], normalize="none", optimizer="sgd")
    before = state(model)
    rates, losses, suggestion = learning_rate_range(model, data, tmp_path / "a.png", high=10.0)
    assert rates[0] == pytest.approx(1e-6)
    ratios = [b / a for a, b in pairwise(rates)]
    assert max(ratios) == pytest.approx(min(ratios))
    assert len(rates) == len(losses)
    assert 1e-3 < suggestion < 3
    assert unchanged(model, before)
    assert model.hparams["optimizer"] == "sgd"
    whole = model.cost(data.train.x, data.train.y)[0].item()
    assert losses[0] == pytest.approx(whole, rel=0.5)  # of a batch, so not quite
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_a_loss_that_never_falls_has_no_suggestion():
    x, y = batch(60)
    data = DataModule(x * 0, y, batch_size="full")
    _, _, suggestion = learning_rate_range(classifier(init="zeros", depth=0), data)
    assert suggestion is None


def test_it_ends_when_the_loss_explodes():
    x, y = batch(600)
    data = DataModule(x, y, batch_size=32)
    model = classifier(optimizer="sgd", batch_norm=False, dropout=0.0)
    rates, losses, _ = learning_rate_range(model, data, high=1e6)
    assert len(rates) < 100
    assert all(math.isfinite(loss) for loss in losses)


def test_a_first_loss_that_is_nan_gives_no_rates_and_an_empty_picture(tmp_path):
    x, y = batch(60)
    model = classifier(depth=0)
    with torch.no_grad():
        next(model.net.parameters()).fill_(torch.nan)
    data = DataModule(x, y, batch_size=32)
    assert learning_rate_range(model, data, tmp_path / "a.png") == ([], [], None)
    assert (tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [({"steps": 5}, "steps: expected >= 20"), ({"low": 0.0}, "low: expected > 0 and below 1.0")],
)
def test_ranges_that_are_none_raise(options, message):
    x, y = batch(60)
    with pytest.raises(ValueError, match=message):
        learning_rate_range(classifier(), DataModule(x, y), **options)

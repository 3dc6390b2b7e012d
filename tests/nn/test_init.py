import math

import pytest
import torch

import torchref.nn as nn
from torchref.nn import init

RANDOM = [
    ("normal_", {}),
    ("normal_", {"mean": 1.0, "std": 0.3}),
    ("uniform_", {}),
    ("uniform_", {"a": -2.0, "b": 3.0}),
    ("xavier_uniform_", {}),
    ("xavier_uniform_", {"gain": 2.0}),
    ("xavier_normal_", {}),
    ("kaiming_uniform_", {}),
    ("kaiming_uniform_", {"a": 0.2}),
    ("kaiming_uniform_", {"mode": "fan_out", "nonlinearity": "relu"}),
    ("kaiming_normal_", {}),
    ("kaiming_normal_", {"nonlinearity": "tanh"}),
    ("kaiming_normal_", {"nonlinearity": "selu"}),
]


@pytest.mark.parametrize("generated", [True, False])
@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 5, 5), (4, 3, 3)], ids=str)
@pytest.mark.parametrize(("name", "kwargs"), RANDOM, ids=str)
def test_torchs_values_under_the_same_seed(name, kwargs, shape, generated):
    drawn = []
    for library in (init, torch.nn.init):
        torch.manual_seed(7)
        generator = torch.Generator().manual_seed(9) if generated else None
        tensor = torch.empty(shape, requires_grad=True)
        result = getattr(library, name)(tensor, **kwargs, generator=generator)
        assert result is tensor
        drawn.append(tensor.detach())
    assert torch.equal(*drawn)


def test_constants():
    assert torch.equal(init.zeros_(torch.empty(3)), torch.zeros(3))
    assert torch.equal(init.constant_(torch.empty(3), 2.5), torch.full((3,), 2.5))


@pytest.mark.parametrize(
    ("name", "variance"),
    [
        ("xavier_normal_", 2 / (400 + 300)),
        ("xavier_uniform_", 2 / (400 + 300)),
        ("lecun_normal_", 1 / 300),
        ("lecun_uniform_", 1 / 300),
    ],
)
def test_moments(name, variance):
    w = getattr(init, name)(torch.empty(400, 300, dtype=torch.float64))
    # 5 standard deviations of the sample moments of 120,000 draws: var(w) sqrt(2 / n) at most
    n = w.numel()
    assert abs(w.mean()) < 5 * math.sqrt(variance / n)
    assert w.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / n))


def test_he_moments_before_a_relu():
    w = init.kaiming_normal_(torch.empty(400, 300), nonlinearity="relu")
    assert w.var().item() == pytest.approx(2 / 300, rel=0.03)


def test_gains():
    for name in ("linear", "conv2d", "conv_transpose3d", "sigmoid", "tanh", "relu", "selu"):
        assert init.calculate_gain(name) == torch.nn.init.calculate_gain(name)
    for param in (None, 0, 0.3, 1):
        torchs = torch.nn.init.calculate_gain("leaky_relu", param)
        assert init.calculate_gain("leaky_relu", param) == torchs


def test_errors():
    for name in ("xavier_normal_", "kaiming_uniform_", "lecun_normal_"):
        with pytest.raises(ValueError, match=rf"{name}: .*`tensor`.*2 dimensions.*\(3,\)"):
            getattr(init, name)(torch.empty(3))
    with pytest.raises(ValueError, match="`mode`.*'fan'"):
        init.kaiming_normal_(torch.empty(2, 2), mode="fan")
    with pytest.raises(ValueError, match="`nonlinearity` 'swish'"):
        init.calculate_gain("swish")
    with pytest.raises(ValueError, match="`param`.*'a'"):
        init.calculate_gain("leaky_relu", "a")
    with pytest.raises(ValueError, match="`method`.*'he'"):
        init.initialize(torch.nn.Linear(2, 2), "he")


def test_initialize_matches_the_activation_that_follows():
    model = torch.nn.Sequential(
        nn.Linear(64, 400),
        nn.BatchNorm1d(400),
        torch.nn.LeakyReLU(0.5),
        torch.nn.Sequential(torch.nn.Linear(400, 400), torch.nn.Dropout(), nn.SELU()),
        nn.Linear(400, 400),
        nn.Tanh(),
        torch.nn.Linear(400, 300),
        torch.nn.ReLU(),
        torch.nn.Linear(300, 10),
    )
    expected = {
        "0": ("kaiming_normal", 2 / 1.25 / 64),
        "3.0": ("lecun_normal", 1 / 400),
        "4": ("xavier_normal", 2 / 800),
        "6": ("kaiming_normal", 2 / 400),
        "8": ("xavier_normal", 2 / 310),
    }
    assert init.initialize(model) == {name: method for name, (method, _) in expected.items()}
    for name, (_, variance) in expected.items():
        layer = model.get_submodule(name)
        assert layer.weight.var().item() == pytest.approx(variance, rel=0.12)
        assert not layer.bias.any()
    assert torch.equal(model[1].weight, torch.ones(400))


def test_xavier_bounds_are_torchs_to_the_last_bit():
    """gain * sqrt(6 / n) and sqrt(3) * gain * sqrt(2 / n) are not the same number."""
    for size in range(1, 40):
        filled = []
        for library in (init, torch.nn.init):
            torch.manual_seed(0)
            filled.append(library.xavier_uniform_(torch.empty(1, size, dtype=torch.float64)))
        assert torch.equal(*filled)


def test_initialize_sees_through_parametrizations():
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(300, 200))
    init.initialize(torch.nn.Sequential(layer, torch.nn.ReLU()))
    assert layer.weight.var().item() == pytest.approx(2 / 300, rel=0.05)
    attention = torch.nn.MultiheadAttention(8, 2)
    before = attention.out_proj.weight.clone()
    assert init.initialize(attention) == {}
    assert torch.equal(attention.out_proj.weight, before)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_initialize_refuses_the_old_weight_norm():
    model = torch.nn.Sequential(torch.nn.utils.weight_norm(torch.nn.Linear(3, 2)))
    with pytest.raises(ValueError, match="initialize: 0 has torch.nn.utils.weight_norm"):
        init.initialize(model)


@pytest.mark.parametrize("method", sorted(init.METHODS))
def test_initialize_by_one_method(method):
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.ConvTranspose1d(8, 4, 3)
    )
    before = [p.clone() for p in model.parameters()]
    assert set(init.initialize(model, method).values()) == {method}
    assert not model[1].bias.any()
    assert model[0].weight.any() == (method != "zeros")
    assert all(not torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))

import pytest
import torch

import torchref
from torchref.training.mlp import ACTIVATIONS, INITIALIZERS, OPTIMIZERS, build_mlp, build_optimizer


def test_layers_are_torchrefs_or_torchs():
    ours, twin = build_mlp(4, 3), build_mlp(4, 3, library=torch.nn)
    names = ["Linear", "BatchNorm1d", "ReLU", "Dropout"] * 2 + ["Linear"]
    assert [type(layer) for layer in ours] == [getattr(torchref.nn, name) for name in names]
    assert [type(layer) for layer in twin] == [getattr(torch.nn, name) for name in names]


def test_the_same_seed_gives_the_twin_the_same_weights():
    torch.manual_seed(3)
    ours = build_mlp(4, 3)
    torch.manual_seed(3)
    twin = build_mlp(4, 3, library=torch.nn)
    for a, b in zip(ours.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_depth_0_is_softmax_regression():
    (layer,) = build_mlp(4, 3, depth=0)
    assert (layer.in_features, layer.out_features) == (4, 3)


def test_he_by_default_with_relu():
    torch.manual_seed(0)
    weight = build_mlp(1000, 3, width=500)[0].weight
    assert weight.std().item() == pytest.approx((2 / 1000) ** 0.5, rel=0.02)


@pytest.mark.parametrize("init", INITIALIZERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_with_every_initializer_runs(activation, init):
    net = build_mlp(4, 3, activation=activation, init=init, width=5)
    assert net(torch.randn(6, 4)).shape == (6, 3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_is_torchrefs_and_steps_as_torchs(name):
    weights = [torch.nn.Parameter(torch.linspace(-1, 1, 5)) for _ in range(2)]
    ours = build_optimizer(name, [weights[0]], 0.1)
    theirs = build_optimizer(name, [weights[1]], 0.1, torch.optim)
    assert type(ours).__module__.startswith("torchref.optim")
    for _ in range(3):
        for weight, optimizer in zip(weights, (ours, theirs), strict=True):
            optimizer.zero_grad()
            (weight**3).sum().backward()
            optimizer.step()
    torch.testing.assert_close(weights[0], weights[1])


@pytest.mark.parametrize(
    "wrong",
    [
        {"depth": -1},
        {"width": 0},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"dropout": float("nan")},
        {"activation": "step"},
        {"init": "glorot"},
    ],
)
def test_a_wrong_argument_is_named(wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: expected .*, got "):
        build_mlp(4, 3, **wrong)


@pytest.mark.parametrize("lr", [0.0, -1.0, 1e38, float("inf"), float("nan")])
def test_a_wrong_rate_raises(lr):
    with pytest.raises(ValueError, match=r"lr: expected in \(0, 1e30\], got"):
        build_optimizer("sgd", [torch.nn.Parameter(torch.zeros(1))], lr)

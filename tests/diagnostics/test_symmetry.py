import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import torchref
from torchref.diagnostics.symmetry import Copies, check_symmetry
from torchref.nn.init import METHODS, initialize


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Layers are small: threads would wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


X = torch.randn(64, 5, generator=torch.Generator().manual_seed(1))
Y = torch.randint(3, (64,), generator=torch.Generator().manual_seed(2))


def net_of(activation, layers=torch.nn):
    return nn.Sequential(
        layers.Linear(5, 8), activation(), layers.Linear(8, 6), activation(), layers.Linear(6, 3)
    )


def constant(net, value=0.3):
    for p in net.parameters():
        nn.init.constant_(p, value if p.ndim > 1 else 0.0)
    return net


def found(net):
    return check_symmetry(net, lambda: F.cross_entropy(net(X), Y))


def train(net, steps=50, optimizer=torch.optim.SGD):
    optimizer = optimizer(net.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(X), Y).backward()
        optimizer.step()


def spread(net):
    """The largest difference between units of a hidden layer."""
    weights = [net[0].weight, net[2].weight]
    return max((w - w[0]).abs().max().item() for w in weights)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.Sigmoid, torchref.nn.ReLU])
@pytest.mark.parametrize("layers", [torch.nn, torchref.nn])
def test_zeros_are_found_and_no_training_helps(activation, layers):
    net = net_of(activation, layers)
    initialize(net, "zeros")
    symmetry = found(net)
    assert symmetry.copies[0] == Copies("0", tuple(range(8)), True)
    assert symmetry.copies[1].units == tuple(range(6))
    train(net)
    assert spread(net) < 1e-8  # a sigmoid's units move, all alike
    if activation is not nn.Sigmoid:
        assert not any(p.any() for p in net.parameters() if p.ndim > 1)
    assert found(net).copies[0].units == tuple(range(8))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.Sigmoid])
def test_a_constant_is_found_and_training_keeps_the_copies(activation, optimizer):
    net = constant(net_of(activation))
    symmetry = found(net)
    assert symmetry.found
    assert [copies.units for copies in symmetry.copies] == [tuple(range(8)), tuple(range(6))]
    assert not symmetry.copies[0].still
    before = net[0].weight.detach().clone()
    train(net, optimizer=optimizer)
    assert (net[0].weight - before).abs().max() > 1e-4  # they move, together
    assert spread(net) < 1e-5
    assert [copies.units for copies in found(net).copies] == [tuple(range(8)), tuple(range(6))]


@pytest.mark.parametrize("method", ["auto", *(name for name in METHODS if name != "zeros")])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_random_weights_have_no_copies(method, activation):
    for seed in range(5):
        torch.manual_seed(seed)
        net = net_of(activation)
        initialize(net, method)
        assert not found(net).found
    assert str(found(net)) == "no two units of a hidden layer are copies of each other"
    train(net)
    assert spread(net) > 1e-2


def duplicate(net, first, second):
    with torch.no_grad():
        for p in (net[0].weight, net[0].bias, net[2].weight.T):
            p[second] = p[first]


@settings(deadline=None, max_examples=50)
@given(st.permutations(range(8)), st.sampled_from([nn.ReLU, nn.Tanh, nn.SELU]))
def test_a_pair_is_named(order, activation):
    torch.manual_seed(1)
    net = net_of(activation)
    initialize(net, "normal")
    nn.init.constant_(net[0].bias, 0.1)
    first, second = sorted(order[:2])
    duplicate(net, first, second)
    (copies,) = found(net).copies
    assert copies == Copies("0", (first, second), False)
    assert str(copies).startswith(f"0: units {first} and {second} are copies of each other, with")
    train(net, 10)
    assert found(net).copies == (copies,)


@pytest.mark.parametrize("apart", [0, 1, 2], ids=["weight", "bias", "outgoing weight"])
def test_what_differs_in_one_number_is_no_copy(apart):
    net = net_of(nn.Tanh)
    duplicate(net, 2, 5)
    assert found(net).found
    with torch.no_grad():
        (net[0].weight[5, 0:1], net[0].bias[5:6], net[2].weight[0, 5:6])[apart].add_(0.05)
    assert not found(net).found


def test_equal_weights_with_other_gradients_are_parted_by_training():
    net = net_of(nn.Tanh)
    nn.init.constant_(net[0].weight, 0.2)
    nn.init.zeros_(net[0].bias)
    assert not found(net).found
    train(net)
    assert (net[0].weight - net[0].weight[0]).abs().max() > 1e-3


def test_an_output_of_zeros_is_no_fault():
    net = net_of(nn.ReLU)
    nn.init.zeros_(net[4].weight)
    assert not found(net).found


def test_outputs_with_the_same_target_may_be_the_same():
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))
    nn.init.constant_(net[2].weight, 0.3)
    nn.init.zeros_(net[2].bias)
    assert not check_symmetry(net, lambda: (net(X) - 1).square().mean()).found


def test_two_groups_in_one_layer():
    net = net_of(nn.Tanh)
    duplicate(net, 0, 3)
    duplicate(net, 1, 2)
    duplicate(net, 1, 7)
    assert [copies.units for copies in found(net).copies] == [(0, 3), (1, 2, 7)]


@pytest.mark.parametrize("units", [(0, 1), (0, 1, 2), (0, 2, 4), tuple(range(0, 40, 2))])
def test_units_are_listed_shortly(units):
    text = str(Copies("hidden", units, False))
    words = {
        2: "0 and 1",
        3: "0 to 2" if units[1] == 1 else "0, 2 and 4",
        20: "0, 2, 4, 6, 8 and 15 more",
    }
    assert f"hidden: units {words[len(units)]} are copies" in text
    assert text.endswith(f"{len(units)} units do the work of one")


def test_the_words_say_why_and_what_to_do():
    net = net_of(nn.Tanh)
    initialize(net, "zeros")
    text = str(found(net))
    assert (
        "0: units 0 to 7 are copies of each other, and the gradient of their weights is 0" in text
    )
    assert "no training parts them" in text
    for name in ("initialize", "xavier_normal_", "kaiming_normal_", "lecun_normal_"):
        assert name in text
        assert hasattr(torchref.nn.init, name)


@pytest.mark.parametrize(
    "conv",
    [
        lambda: nn.Conv2d(2, 6, 3),
        lambda: nn.Conv2d(2, 6, 3, groups=2),
        lambda: nn.ConvTranspose2d(2, 6, 3),
        lambda: nn.ConvTranspose2d(2, 6, 3, groups=2),
    ],
    ids=["conv", "grouped", "transposed", "transposed and grouped"],
)
def test_channels_of_a_convolution(conv):
    conv = conv()
    net = nn.Sequential(conv, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    images = torch.randn(64, 2, 6, 6)

    def loss():
        return F.cross_entropy(net(images), Y)

    assert not check_symmetry(net, loss).found
    units = slice(0, 3) if conv.groups > 1 else slice(0, 6)
    with torch.no_grad():
        weight = conv.weight
        if isinstance(conv, nn.ConvTranspose2d):  # (in, out / groups, ...)
            weight = weight.unflatten(0, (conv.groups, -1)).transpose(1, 2).flatten(0, 1)
            assert weight.shape[0] == 6
        nn.init.constant_(conv.bias, 0.1)
        if conv.groups == 1 or isinstance(conv, nn.Conv2d):
            weight[units] = 0.2
        else:
            conv.weight[:1] = 0.2
        net[4].weight[:, units] = 0.3
    (copies,) = check_symmetry(net, loss).copies
    assert copies.units == tuple(range(6))[units]


def test_batch_norm_in_between_may_part_them():
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    nn.init.constant_(net[0].weight, 0.2)
    nn.init.constant_(net[3].weight, 0.2)
    nn.init.zeros_(net[0].bias)
    statistics = net[1].running_mean.clone()
    with torch.no_grad():
        net[3].weight[0] = 0.5  # equal outputs for equal logits would have no gradient
    assert found(net).copies[0].units == tuple(range(8))
    assert torch.equal(net[1].running_mean, statistics)
    nn.init.uniform_(net[1].weight, 0.5, 1.5)
    assert not found(net).found


def test_dropout_parts_copies_while_it_drops():
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))
    constant(net)
    with torch.no_grad():
        net[3].weight[0] = 0.5
    assert not found(net).found
    net.eval()
    assert found(net).copies[0].units == tuple(range(8))


def test_gradients_stay_and_errors_name_the_function():
    net = net_of(nn.ReLU)
    found(net)
    assert all(p.grad is None for p in net.parameters())
    with pytest.raises(ValueError, match="check_symmetry: expected `loss` to return a scalar"):
        check_symmetry(net, lambda: net(X))
    with pytest.raises(ValueError, match="check_symmetry: expected a `model` with weights"):
        found(net.requires_grad_(False))


def test_frozen_shared_and_parametrized_layers_are_passed_over():
    net = constant(net_of(nn.Tanh))
    net[0].requires_grad_(False)
    nn.utils.parametrizations.weight_norm(net[2])
    assert not found(net).found

import pytest
import torch
from torch import nn

import torchref
from torchref.nn import weight_penalty


def network():
    net = nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(9, 2))
    for i, p in enumerate(net.parameters()):
        nn.init.uniform_(p, -2, 1 + i)
    return net.double()


def test_closed_form_without_biases_and_gains():
    net = network()
    weights = torch.cat([net[0].weight.flatten(), net[3].weight.flatten()]).detach()
    expected = 0.3 * weights.abs().sum() + 0.02 * (weights**2).sum()
    torch.testing.assert_close(weight_penalty(net, l1=0.3, l2=0.02).detach(), expected)
    weight_penalty(net, l1=0.3, l2=0.02).backward()
    for name, p in net.named_parameters():
        if p.ndim == 1:
            assert p.grad is None, name
        else:
            torch.testing.assert_close(p.grad, 0.3 * p.detach().sign() + 0.04 * p.detach())


def test_gradcheck():
    net = network()
    weights = [p for p in net.parameters() if p.ndim > 1]

    def penalty(*values):
        names = [name for name, p in net.named_parameters() if p.ndim > 1]
        wrapped = Penalty(net)
        state = {f"net.{n}": v for n, v in zip(names, values, strict=True)}
        return torch.func.functional_call(wrapped, state)

    torch.autograd.gradcheck(penalty, weights)
    torch.autograd.gradgradcheck(penalty, weights)


class Penalty(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self):
        return weight_penalty(self.net, 0.3, 0.02)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torchref.optim.SGD])
def test_weight_decay_is_twice_lambda(optimizer):
    """Ten steps of SGD: lambda * w^2 in the cost is weight_decay = 2 * lambda."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    start = torch.randn(3, 4, dtype=torch.float64)
    ends = {}
    for factor in (None, 1, 2):
        layer = nn.Linear(4, 3, bias=False).double()
        layer.weight.data.copy_(start)
        decay = {} if factor is None else {"weight_decay": factor * 0.05}
        steps = optimizer(layer.parameters(), lr=0.1, **decay)
        for _ in range(10):
            loss = (layer(x) - y).square().mean()
            loss = loss + weight_penalty(layer, l2=0.05) if factor is None else loss
            steps.zero_grad()
            loss.backward()
            steps.step()
        ends[factor] = layer.weight.detach()
    torch.testing.assert_close(ends[None], ends[2], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(ends[None], ends[1], rtol=1e-3)


def test_l1_drives_useless_weights_to_0_and_l2_does_not():
    """The course: L1 selects features, L2 makes all weights small."""
    torch.manual_seed(0)
    x = torch.randn(200, 6)
    y = x[:, :1] * 2
    shares = {}
    for name in ("l1", "l2"):
        layer = nn.Linear(6, 1)
        steps = torchref.optim.SGD(layer.parameters(), lr=0.05)
        for _ in range(400):
            steps.zero_grad()
            loss = (layer(x) - y).square().mean() + weight_penalty(layer, **{name: 0.2})
            loss.backward()
            steps.step()
        shares[name] = layer.weight.detach().abs()
    assert shares["l1"][0, 0] > 1.5
    assert shares["l1"][0, 1:].max() < 0.02  # within a step of 0: lr * lambda
    assert (shares["l2"][0, 1:] > 1e-3).any()


def test_a_shared_weight_counts_once():
    layer = nn.Linear(2, 2)
    assert weight_penalty(nn.Sequential(layer, layer), l1=1.0) == weight_penalty(layer, l1=1.0)


def test_nothing_to_penalize():
    assert weight_penalty(nn.BatchNorm1d(3), l1=1.0, l2=1.0) == 0
    assert weight_penalty(nn.Linear(2, 2)) == 0


@pytest.mark.parametrize("name", ["l1", "l2"])
@pytest.mark.parametrize("value", [-1e-3, float("nan"), float("inf")])
def test_a_coefficient_out_of_range_raises(name, value):
    with pytest.raises(ValueError, match=f"weight_penalty: expected `{name}` finite and >= 0"):
        weight_penalty(nn.Linear(2, 2), **{name: value})


class Gate(nn.Module):
    """A user's module with parameters of its own."""

    def __init__(self):
        super().__init__()
        self.mixing = nn.Parameter(torch.full((2, 2), 3.0))
        self.position_bias = nn.Parameter(torch.full((2, 2), 3.0))
        self.gain = nn.Parameter(torch.full((2,), 3.0))


@pytest.mark.parametrize(
    ("module", "weights"),
    [
        (nn.LayerNorm([2, 3]), ()),
        (nn.RMSNorm([2, 3]), ()),
        (nn.GroupNorm(1, 2), ()),
        (nn.Bilinear(2, 3, 2), ("weight",)),
        (nn.ConvTranspose2d(1, 2, 2), ("weight",)),
        (nn.Embedding(3, 2), ("weight",)),
        (nn.LSTM(2, 3), ("weight_ih_l0", "weight_hh_l0")),
        (nn.MultiheadAttention(2, 1, add_bias_kv=True), ("in_proj_weight", "out_proj.weight")),
        (
            nn.MultiheadAttention(2, 1, kdim=3, vdim=4),
            ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"),
        ),
        (Gate(), ("mixing",)),
        (nn.Sequential(nn.LayerNorm([2, 3]), nn.Linear(3, 1)), ("1.weight",)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_what_a_weight_is(module, weights):
    for p in module.parameters():
        nn.init.constant_(p, 2.0)
    count = sum(module.get_parameter(name).numel() for name in weights)
    assert weight_penalty(module, l1=1.0, l2=1.0) == 6 * count


def test_a_tied_weight_counts_once():
    net = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 3, bias=False))
    net[1].weight = net[0].weight
    assert weight_penalty(net, l2=1.0) == weight_penalty(net[0], l2=1.0)

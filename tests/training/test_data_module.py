from functools import partial

import pytest
import torch
from torch import nn

import torchref
from torchref.training import ClassificationData, Classifier

pytestmark = [
    # `self.log` outside a Trainer, where these tests call the steps by hand
    pytest.mark.filterwarnings("ignore:You are trying to `self.log"),
]


def samples(count=100):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 3, dtype=torch.float64, generator=generator)
    return x, torch.arange(count) % 2


@pytest.mark.parametrize(
    ("batch_size", "sizes"),
    [
        ("full", [70]),
        (1, [1] * 70),
        (32, [32, 32, 6]),
        (23, [23, 23, 23]),  # the 70th sample alone is left out
        (100, [70]),
    ],
)
def test_batch_stochastic_and_mini_batch_by_one_argument(batch_size, sizes):
    data = ClassificationData(*samples(), batch_size=batch_size)
    assert [len(y) for _, y in data.train_dataloader()] == sizes


@pytest.mark.parametrize("batch_size", ["full", 1, 32])
def test_one_step_equals_the_formula(batch_size):
    """theta := theta - eta / m * sum of each sample's gradient."""
    net = nn.Linear(3, 2).double()
    model = Classifier(net, 2, optimizer=partial(torchref.optim.SGD, lr=0.1))
    data = ClassificationData(*samples(), batch_size=batch_size)
    x, y = next(iter(data.train_dataloader()))
    theta, bias = net.weight.detach().clone(), net.bias.detach().clone()

    residual = torch.softmax(x @ theta.T + bias, -1) - nn.functional.one_hot(y, 2)
    expected = theta - 0.1 / len(x) * sum(
        torch.outer(r, s) for r, s in zip(residual, x, strict=True)
    )

    optimizer = model.configure_optimizers()
    model.training_step((x, y)).backward()
    optimizer.step()
    torch.testing.assert_close(net.weight.detach(), expected)


def test_parts_share_out_the_samples():
    x, y = samples()
    data = ClassificationData(x, y)
    parts = [torch.cat([x for x, _ in loader]) for loader in loaders(data)]
    assert [len(part) for part in parts] == [70, 15, 15]
    assert len(torch.cat(parts).unique(dim=0)) == 100


def loaders(data):
    return data.train_dataloader(), data.val_dataloader(), data.test_dataloader()


def test_order_follows_from_seed_and_epoch():
    def order(seed, epoch):
        loader = ClassificationData(*samples(), batch_size=8, seed=seed).train_dataloader()
        loader.sampler.set_epoch(epoch)
        return torch.cat([x for x, _ in loader])

    assert torch.equal(order(0, 3), order(0, 3))
    assert not torch.equal(order(0, 3), order(0, 4))


@pytest.mark.parametrize("batch_size", [0, -3])
def test_a_wrong_batch_size_raises(batch_size):
    with pytest.raises(ValueError, match="batch_size: expected >= 1 or 'full'"):
        ClassificationData(*samples(), batch_size=batch_size)

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import torchref
from torchref.data import Standard
from torchref.training import Classifier, DataModule

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
    data = DataModule(*samples(), batch_size=batch_size)
    assert [len(y) for _, y in data.train_dataloader()] == sizes


@pytest.mark.parametrize("batch_size", ["full", 1, 32])
def test_one_step_equals_the_formula(batch_size):
    """theta := theta - eta / m * sum of each sample's gradient."""
    net = nn.Linear(3, 2).double()
    model = Classifier(net, 2, optimizer=partial(torchref.optim.SGD, lr=0.1))
    data = DataModule(*samples(), batch_size=batch_size)
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
    data = DataModule(x, y)
    parts = [torch.cat([x for x, _ in loader]) for loader in loaders(data)]
    assert [len(part) for part in parts] == [70, 15, 15]
    assert len(torch.cat(parts).unique(dim=0)) == 100


def loaders(data):
    return data.train_dataloader(), data.val_dataloader(), data.test_dataloader()


def test_order_follows_from_seed_and_epoch():
    def order(seed, epoch):
        loader = DataModule(*samples(), batch_size=8, seed=seed).train_dataloader()
        loader.sampler.set_epoch(epoch)
        return torch.cat([x for x, _ in loader])

    assert torch.equal(order(0, 3), order(0, 3))
    assert not torch.equal(order(0, 3), order(0, 4))


@pytest.mark.parametrize("batch_size", [0, -3])
def test_a_wrong_batch_size_raises(batch_size):
    with pytest.raises(ValueError, match="batch_size: expected >= 1 or 'full'"):
        DataModule(*samples(), batch_size=batch_size)


def test_numbers_of_numpy_are_numbers():
    of_numpy = {"batch_size": np.int64(16), "seed": np.int64(1), "ratios": np.full(3, 1 / 3)}
    data = DataModule(*samples(), **of_numpy)
    same = DataModule(*samples(), batch_size=16, seed=1, ratios=[1 / 3] * 3)
    for found, expected in zip(data.train_dataloader(), same.train_dataloader(), strict=True):
        assert torch.equal(found[0], expected[0])


# Which samples are in which part.


def holds(data):
    """The rows of each part, as the numbers that the samples are."""
    return [part.x.flatten().tolist() for part in (data.train, data.val, data.test)]


COUNT = torch.arange(100.0)[:, None]


def test_a_chronological_split_keeps_the_order_and_leaves_gaps():
    y = torch.arange(100) % 2
    train, val, test = holds(DataModule(COUNT, y, split="chronological", gap=2))
    assert train + val + test == sorted(train + val + test)
    assert val[0] - train[-1] == test[0] - val[-1] == 3
    backwards = DataModule(COUNT, y, split="chronological", times=-torch.arange(100))
    assert min(holds(backwards)[0]) > max(holds(backwards)[1]) > max(holds(backwards)[2])


def test_a_grouped_split_shares_no_group():
    groups = torch.arange(100) // 5
    data = DataModule(COUNT, torch.arange(100) % 2, split="grouped", groups=groups)
    parts = [{int(i) // 5 for i in part} for part in holds(data)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 20


def test_values_are_split_at_random_and_labels_by_class():
    values = DataModule(COUNT, torch.arange(100.0))
    assert [len(part) for part in holds(values)] == [70, 15, 15]
    y = torch.tensor([0] * 80 + [1] * 20)
    assert DataModule(COUNT, y).test.y.bincount().tolist() == [12, 3]


def test_a_given_test_part_stays_and_the_rest_is_shared_out():
    held = torch.arange(90, 100)
    train, val, test = holds(DataModule(COUNT, torch.arange(100) % 2, test=held))
    assert test == held.tolist()
    assert (len(train), len(val)) == (74, 16)  # 0.15 / 0.85 of 90
    assert sorted(train + val) == list(range(90))


def test_parts_by_index():
    parts = [torch.tensor([3, 1]), torch.tensor([0]), torch.tensor([2])]
    assert holds(DataModule(COUNT, torch.arange(100) % 2, parts=parts)) == [[3, 1], [0], [2]]


def test_ratios_follow_from_the_size():
    many = torch.zeros(100_001, 1)
    data = DataModule(many, torch.arange(100_001) % 2)
    assert [len(part) for part in holds(data)] == [90_001, 5000, 5000]


def test_texts_come_in_batches():
    texts = [f"text {i}" for i in range(20)]
    data = DataModule(texts, torch.arange(20) % 2, batch_size=7, ratios=(0.5, 0.25, 0.25))
    x, y = next(iter(data.train_dataloader()))
    assert len(x) == len(y) == 7
    assert all(int(text[5:]) % 2 == label for text, label in zip(x, y.tolist(), strict=True))


def test_the_test_part_opens_once():
    data = DataModule(*samples())
    data.test_dataloader()
    with pytest.raises(RuntimeError, match="test: the test part was opened before, .*reopen_test"):
        data.test_dataloader()
    data = DataModule(*samples(), reopen_test=True)
    data.test_dataloader()
    data.test_dataloader()
    assert data.test_opened == 2


def test_statistics_are_of_the_training_part():
    data = DataModule(*samples())
    scale = data.fit(Standard())
    assert torch.equal(scale.mean, Standard().fit(data.train.x).mean)
    with pytest.raises(RuntimeError, match="fitted already"):
        data.fit(scale)


def test_only_training_batches_are_changed():
    data = DataModule(*samples(), augment=lambda x, y: (x * 0, y))
    data.trainer = SimpleNamespace(training=True)
    batch = next(iter(DataModule(*samples()).train_dataloader()))
    assert (data.on_after_batch_transfer(batch, 0)[0] == 0).all()
    data.trainer = SimpleNamespace(training=False)
    assert data.on_after_batch_transfer(batch, 0) is batch


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": torch.zeros(3)}, "`groups` of as many samples as `x`, 100, got 3"),
        ({"times": torch.zeros(3)}, "`times` of as many samples as `x`, 100, got 3"),
        ({"parts": [torch.arange(3)] * 3}, "parts: expected each sample in one part at most"),
        ({"parts": [torch.arange(3), torch.arange(0), torch.arange(3, 5)]}, "one of the others"),
        ({"parts": [torch.tensor([0]), torch.tensor([1]), torch.tensor([2])]}, "two training samp"),
        ({"parts": [torch.arange(3)] * 2}, "three parts"),
        ({"test": torch.arange(9), "ratios": (0, 0, 1)}, "ratios: expected positive numbers"),
        ({"test": torch.arange(9), "ratios": (0.7, 0.1, 9)}, "ratios: expected positive numbers"),
    ],
)
def test_what_does_not_fit_raises(options, message):
    with pytest.raises(ValueError, match=message):
        DataModule(COUNT, torch.arange(100) % 2, **options)


def test_targets_that_are_too_few_raise():
    with pytest.raises(ValueError, match="`y` of as many samples as `x`, 100, got 3"):
        DataModule(COUNT, torch.zeros(3))

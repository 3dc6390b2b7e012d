"""Modules in a row that `convert(model, fuse=True)` makes one, and what it must leave."""

import copy
import pickle

import pytest
import torch
from torch import nn

import torchref
from torchref.nn import BatchNormAct1d, BatchNormAct2d, LinearActDropout
from torchref.testing import assert_parity


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(0.2, inplace=True)),
        nn.Flatten(),
        nn.Sequential(nn.Linear(64, 8, bias=False), nn.BatchNorm1d(8), nn.SiLU()),
        nn.Sequential(nn.Linear(8, 8), nn.GELU(approximate="tanh"), nn.Dropout(0.3)),
        nn.Sequential(nn.Linear(8, 8), nn.ELU(0.7)),
        nn.Linear(8, 3),
    )


def images():
    return torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def fused():
    net = network()
    report = torchref.convert(net, fuse=True)
    return net, report


@pytest.mark.parametrize("training", [True, False])
def test_numbers_masks_and_running_statistics_stay(training):
    net, _ = fused()
    assert_parity(net.train(training), network().train(training), images())


def test_what_becomes_one():
    net, report = fused()
    became = {name: piece for name, piece in report.swapped.items() if "Act" in piece}
    assert became == {
        "0.1": "BatchNormAct2d",
        "2.1": "BatchNormAct1d",
        "3.0": "LinearActDropout",
        "4.0": "LinearActDropout",
    }
    assert type(net[0][1]) is BatchNormAct2d
    assert net[0][1].param == 0.2
    assert type(net[2][1]) is BatchNormAct1d
    assert type(net[3][0]) is LinearActDropout
    assert (net[3][0].activation, net[3][0].p) == ("gelu_tanh", 0.3)
    assert (net[4][0].activation, net[4][0].param, net[4][0].p) == ("elu", 0.7, 0.0)
    assert type(net[5]) is torchref.nn.Linear
    assert "ReLU, done by the module before" in repr(net)
    assert "BatchNormAct2d" in str(report)


def test_state_dict_and_parameters_stay():
    net = network()
    before = {key: id(value) for key, value in net.state_dict(keep_vars=True).items()}
    torchref.convert(net, fuse=True)
    assert {k: id(v) for k, v in net.state_dict(keep_vars=True).items()} == before
    network().load_state_dict(net.state_dict())
    net.load_state_dict(network().state_dict())


def test_copies():
    net, _ = fused()
    net.eval()
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(other(images()), net(images()))
        torchref.revert(other)
        assert repr(other) == repr(network().eval())


def test_revert_gives_every_class_and_attribute_back():
    net, _ = fused()
    torchref.revert(net)
    for module, original in zip(net.modules(), network().modules(), strict=True):
        assert type(module) is type(original)
        assert vars(module).keys() == vars(original).keys()
    assert repr(net) == repr(network())


def test_converting_again_changes_nothing():
    net, _ = fused()
    before = repr(net)
    report = torchref.convert(net, fuse=True)
    assert repr(net) == before
    assert not report.swapped
    assert "Fused" not in str(report)


def test_it_is_not_done_unless_asked_for():
    net = network()
    torchref.convert(net)
    assert type(net[0][1]) is torchref.nn.BatchNorm2d


def hooked(net):
    net[0][1].register_forward_hook(lambda *_: None)


def activation_hooked(net):
    net[0][2].register_forward_pre_hook(lambda *_: None)


def shared(net):
    net.append(net[0][2])


def excluded_by_subclass(net):
    class Mine(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x))

    net[0].__class__ = Mine


def another_class(net):
    class Mine(nn.LeakyReLU):
        pass

    net[0][2].__class__ = Mine


@pytest.mark.parametrize(
    "change", [hooked, activation_hooked, shared, excluded_by_subclass, another_class]
)
def test_what_is_not_safe_is_left(change):
    net = network()
    change(net)
    torchref.convert(net, fuse=True)
    assert type(net[0][1]) is torchref.nn.BatchNorm2d
    assert isinstance(net[0][2], nn.LeakyReLU)
    assert type(net[3][0]) is LinearActDropout


def test_classic_dropout_is_left():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), torchref.nn.Dropout(scale_at="inference"))
    torchref.convert(net, fuse=True)
    assert type(net[0]) is LinearActDropout
    assert net[0].p == 0
    assert type(net[2]) is torchref.nn.Dropout


def test_excluded_modules_are_left():
    net = network()
    torchref.convert(net, exclude=["0.2"], fuse=True)
    assert type(net[0][1]) is torchref.nn.BatchNorm2d
    assert type(net[0][2]) is nn.LeakyReLU


def test_what_became_synchronized_reverts_to_that():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3))
    torchref.convert(net, fuse=True)
    torchref.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert type(net[0]) is torchref.nn.SyncBatchNormAct
    torchref.revert(net)
    assert [type(module) for module in net] == [nn.SyncBatchNorm, nn.ReLU, nn.Linear]
    assert not {"activation", "param"} & vars(net[0]).keys()

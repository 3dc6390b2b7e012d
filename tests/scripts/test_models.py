"""The networks of the benchmark, and the section that times their steps."""

import ast
import copy
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from benchmarks import models, networks, parameter_lists
from benchmarks.models import Case, Contestant, Step, WithLoss
from benchmarks.options import Options
from torch import nn

import torchref
from torchref.testing import Comparison

TINY = Case("mlp", partial(networks.mlp, 6, 8, 1, 3), (16, 6), 3)


def shapes(network):
    return [tuple(p.shape) for p in network.parameters()]


def test_they_are_made_of_torch_alone():
    tree = ast.parse(Path(networks.__file__).read_text())
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or node.names[0].name for node in imported}
    assert {name.split(".")[0] for name in names} == {"torch"}


def test_resnet50_has_its_shapes():
    with torch.device("meta"):
        network = networks.resnet50()
    assert shapes(network) == parameter_lists.resnet50()
    assert sum(p.numel() for p in network.parameters()) == 25_557_032


def test_resnet18_has_its_size_and_torchvisions_names():
    with torch.device("meta"):
        network = networks.resnet18()
    assert len(shapes(network)) == 62
    assert sum(p.numel() for p in network.parameters()) == 11_689_512
    keys = network.state_dict().keys()
    assert {"conv1.weight", "bn1.running_var", "layer4.1.bn2.bias", "fc.bias"} <= keys
    assert {"layer2.0.downsample.0.weight", "layer2.0.downsample.1.running_mean"} <= keys
    assert not any(key.startswith("layer1.0.downsample") for key in keys)


def test_gpt_has_the_shapes_of_gpt2():
    with torch.device("meta"):
        network = networks.GPT()
    network.head.weight = network.tokens.weight  # the meta device makes new ones
    # GPT-2 stores its matrices the other way round
    assert [tuple(sorted(shape)) for shape in shapes(network)] == [
        tuple(sorted(shape)) for shape in parameter_lists.gpt2()
    ]


def test_gpt_looks_at_no_later_token():
    network = networks.GPT(11, 8, layers=2, heads=2, width=8)
    assert network.head.weight is network.tokens.weight
    tokens = torch.randint(11, (2, 8))
    scores = network(tokens)
    assert scores.shape == (2, 8, 11)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 11
    same = (network(changed) - scores).abs().amax((0, 2)) < 1e-6
    assert same.tolist() == [True] * 5 + [False] * 3


SMALL = [
    Case("resnet18", partial(networks.resnet18, 5), (4, 3, 32, 32), 5),
    Case("resnet50", partial(networks.resnet50, 5), (4, 3, 32, 32), 5),
    TINY,
    Case("gpt", partial(networks.GPT, 11, 8, 2, 2, 8), (3, 8), 11, tokens=True),
]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_converted_networks_compute_what_they_did(case):
    """In float64, where no ReLU's input is rounded to the other side of 0.

    The bounds are its roundings, grown by 53 batch norms of as few as four values.
    """
    results = []
    model = WithLoss(case.network()).double()
    x, classes = case.batch("cpu")
    x = x.double() if x.is_floating_point() else x
    for net in (model, copy.deepcopy(model)):
        if results:
            torchref.convert(net)
        torch.manual_seed(1)
        loss = net(x, classes)
        loss.backward()
        results.append([loss, *(p.grad for p in net.parameters()), *net.buffers()])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("case", models.ON_THE_CPU, ids=lambda case: case.name)
def test_every_converted_case_passes_its_check(case):
    figures = models.verdict(case, Contestant(converted=True), "cpu")
    assert figures["note"] is None
    assert 0 < figures["error"] <= figures["bound"]


@pytest.fixture
def uncompiled(monkeypatch):
    """Our optimizer compiles its fused step on the CPU, which takes its time."""
    step = torchref.optim.AdamW
    monkeypatch.setattr(
        torchref.optim, "AdamW", lambda params, lr, fused, capturable: step(params, lr)
    )


@pytest.fixture
def tiny(monkeypatch, uncompiled):
    monkeypatch.setattr(models, "ON_THE_CPU", [TINY])
    monkeypatch.setattr(models, "SECONDS", 0.0)


def test_a_row_for_each_contestant(tiny, capsys):
    rows = models.run(Options(quick=True))
    assert capsys.readouterr().out.startswith("mlp")
    names = ["torch", "torch again", "converted", "converted, compiled"]
    assert [row["implementation"] for row in rows] == names
    assert {row["section"] for row in rows} == {"models"}
    for row in rows:
        assert row["ms"] > 0
        assert row["note"] is None
        assert row["saved_bytes"] > 0
    assert rows[2]["error"] <= rows[2]["bound"]


def test_a_wrong_model_is_not_timed(tiny, monkeypatch):
    def convert(model):
        model.register_forward_hook(lambda module, args, loss: loss * 1.001)

    monkeypatch.setattr(torchref, "convert", convert)
    rows = {row["implementation"]: row for row in models.run(Options(quick=True))}
    assert rows["converted"]["note"].startswith("wrong: ")
    assert rows["converted"]["ms"] is None
    assert rows["torch"]["ms"] > 0


def test_a_model_that_cannot_run_says_why(tiny, monkeypatch):
    def fail(self):
        raise RuntimeError("out of memory\nin detail")

    monkeypatch.setattr(Step, "__call__", fail)
    rows = models.run(Options(quick=True))
    assert {row["note"] for row in rows} == {"failed: out of memory"}


def test_nothing_is_begun_after_the_deadline(tiny):
    rows = models.run(Options(deadline=-math.inf))
    assert [(row["implementation"], row["note"]) for row in rows] == [("all", "skipped: no time")]


def test_only_chooses(tiny):
    assert models.run(Options(only=frozenset({"relu"}))) == []


def test_contestants():
    compiled = {"torch.compile", "converted, torch.compile"}
    found = models.contestants(TINY, Options())
    assert set(found) - set(models.contestants(TINY, Options(quick=True))) == compiled
    graphs = {"torch, CUDA graph", "converted, CUDA graph"}
    assert graphs <= set(models.contestants(TINY, Options(device="cuda")))


def test_steps_of_both_learn_the_same(uncompiled):
    losses = []
    for converted in (False, True):
        step = Step(Contestant(converted=converted), TINY, "cpu")
        torch.manual_seed(1)
        for _ in range(5):
            step()
        losses.append(step.model(*step.batch).item())
        assert all(p.grad is None for p in step.model.parameters())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # float32, grown by Adam's division


def test_saved_bytes_counts_each_memory_once():
    step = Step(Contestant(), Case("one", partial(nn.Linear, 6, 3), (16, 6), 3), "cpu")
    step.loss = lambda x, classes: (step.model.network(x).exp() * x[:, :3].sum()).sum()
    # the linear layer's input, the output of exp, and the scalar factor
    assert step.saved_bytes() == 4 * (16 * 6 + 16 * 3 + 1)


@pytest.mark.parametrize(
    ("errors", "is_wrong"),
    [((1.0, 1.0), False), ((2.5, 0.0), False), ((2.0, 2.5), True), ((math.inf, 1.0), True)],
)
def test_gradients_are_held_to_the_rule_together(errors, is_wrong):
    gradients = [
        Comparison(f"gradient of {i}", torch.float32, error, 1.0, 2.0, "x" * (error > 2))
        for i, error in enumerate(errors)
    ]
    loss = Comparison("output", torch.float32, 0.0, 0.0, 1.0, "")
    assert any(c.problem for c in models.together([loss, *gradients])) is is_wrong

"""Graphs that torch.fx makes of converted models."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils import parametrizations

import torchref
from torchref.convert import REPLACED


class Net(nn.Module):
    """Modules of ours and torch's, functions in attributes and in forward."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
        )
        self.hidden = nn.Linear(16, 8)
        self.act = F.relu
        self.gate = torch.sigmoid
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(8, 5)
        self.squash = F.softmax

    def forward(self, x):
        x = (
            self.drop(self.act(self.hidden(self.features(x))))
            + torch.tanh(x.mean((1, 2, 3)))[:, None]
        )
        return self.squash(self.head(x) * self.gate(x.sum(1, keepdim=True)), dim=1)


def pair(training=False):
    original = Net().double().train(training)
    converted = copy.deepcopy(original)
    torchref.convert(converted)
    return original, converted


def traced(model):
    return fx.GraphModule(model, torchref.Tracer().trace(model))


def images():
    return torch.randn(3, 1, 6, 6, dtype=torch.float64)


def close(mine, torchs):
    torch.testing.assert_close(mine, torchs, rtol=1e-10, atol=1e-12)  # float64's roundings


def test_the_graph_is_that_of_the_original():
    original, converted = pair()
    ours, theirs = torchref.Tracer().trace(converted), fx.Tracer().trace(original)
    assert [(n.op, n.name) for n in ours.nodes] == [(n.op, n.name) for n in theirs.nodes]
    for mine, torchs in zip(ours.nodes, theirs.nodes, strict=True):
        if torchs.target in (F.relu, torch.sigmoid, F.softmax):
            assert mine.target is getattr(torchref.nn.functional, torchs.target.__name__)
        else:
            assert mine.target == torchs.target
        assert str(mine.args) == str(torchs.args)
        assert str(mine.kwargs.get("dim")) == str(torchs.kwargs.get("dim"))


@pytest.mark.parametrize("training", [False, True])
def test_numbers_and_gradients(training):
    original, converted = pair(training)
    graph = traced(copy.deepcopy(converted))
    assert isinstance(graph.features.get_submodule("1"), torchref.nn.BatchNorm2d)
    results = []
    x = images()
    for model in (graph, original):
        torch.manual_seed(0)
        y = model(x)
        y.square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        results.append((y, gradients, dict(model.named_buffers())))
    close(*results)


def test_attributes_are_put_back():
    _, converted = pair()
    before = vars(converted).copy()
    assert set(before[REPLACED]) == {"act", "gate", "squash"}
    torchref.Tracer().trace(converted)
    assert vars(converted) == before

    class Failing(Net):
        def forward(self, x):
            return self.act(x) if x.sum() > 0 else x

    failing = Failing()
    torchref.convert(failing)
    before = vars(failing).copy()
    with pytest.raises(fx.proxy.TraceError):
        torchref.Tracer().trace(failing)
    assert vars(failing) == before


def test_a_function_of_plain_values_is_computed():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = F.relu

        def forward(self, x):
            return x * self.act(torch.tensor([-1.0, 2.0]))

    model = Scaled()
    torchref.convert(model)
    graph = traced(model)
    assert torchref.nn.functional.relu not in [node.target for node in graph.graph.nodes]
    assert torch.equal(graph(torch.ones(2)), torch.tensor([0.0, 2.0]))


def test_plain_symbolic_trace_takes_no_converted_model():
    """To fx.Tracer our modules are not leaves, and it cannot follow the checks inside."""
    _, converted = pair()
    with pytest.raises(fx.proxy.TraceError):
        fx.symbolic_trace(converted)
    torchref.revert(converted)
    graph = fx.symbolic_trace(converted)
    assert [n.name for n in graph.graph.nodes] == [
        n.name for n in fx.symbolic_trace(pair()[0]).graph.nodes
    ]


def test_dropout_traced_in_evaluation_stays_in_the_graph():
    """Where torch's tracer goes into ours, what the mode does at the time is what remains."""
    model = nn.Sequential(nn.Dropout(0.5)).eval()
    torchref.convert(model)
    names = [node.name for node in fx.symbolic_trace(model).graph.nodes]
    assert names == ["input_1", "output"]
    graph = traced(model).train()
    x = torch.ones(100)
    assert not torch.equal(graph(x), x)


def test_interpreter_and_shapes():
    original, converted = pair()
    x = images()
    graph = traced(converted)
    close(fx.Interpreter(graph).run(x), original(x))
    shapes = []
    for model in (graph, fx.symbolic_trace(original)):
        ShapeProp(model).propagate(x)
        shapes.append({n.name: n.meta["tensor_meta"][:2] for n in model.graph.nodes})
    assert shapes[0] == shapes[1]
    assert shapes[0]["head"] == ((3, 5), torch.float64)


def test_graphs_are_copied_and_compiled():
    original, converted = pair()
    x = images()
    graph = traced(converted)
    close(copy.deepcopy(graph)(x), original(x))
    close(torch.compile(graph, fullgraph=True, backend="aot_eager")(x), original(x))
    assert "torchref" in graph.code


def test_a_pass_finds_our_modules_by_torchs_class():
    """As passes that fuse or replace do, by isinstance."""
    original, converted = pair()
    graph = traced(converted)
    modules = dict(graph.named_modules())
    found = [n.target for n in graph.graph.nodes if isinstance(modules.get(n.target), nn.ReLU)]
    assert found == ["features.2"]
    for node in list(graph.graph.nodes):
        if node.target == "features.2":
            with graph.graph.inserting_after(node):
                tanh = graph.graph.call_function(torch.tanh, node.args)
            node.replace_all_uses_with(tanh)
            graph.graph.erase_node(node)
    graph.recompile()
    original.features[2] = nn.Tanh()
    x = images()
    close(graph(x), original(x))


def test_parametrized():
    """A class derived for one module alone."""
    original = Net().double().eval()
    parametrizations.weight_norm(original.head)
    converted = copy.deepcopy(original)
    torchref.convert(converted)
    x = images()
    close(traced(converted)(x), original(x))


class Calls(nn.Module):
    def forward(self, x):
        x = F.gelu(torch.relu(x) + 1) + F.dropout(torch.tanh(x), 0.5, training=False)
        return torch.softmax(x.sigmoid(), dim=1)


def test_functional_records_our_functions():
    model = Calls()
    torchref.convert(model, functional=True)
    graph = traced(model)
    ours = [
        node.target.__name__
        for node in graph.graph.nodes
        if node.op == "call_function" and node.target.__module__.startswith("torchref.")
    ]
    assert ours == ["relu", "gelu", "tanh", "dropout", "_softmax"]  # sigmoid is a method here
    names = [node.name for node in fx.symbolic_trace(Calls()).graph.nodes]
    assert [node.name for node in graph.graph.nodes] == names
    x = torch.randn(3, 4, dtype=torch.float64)
    close(graph(x), Calls()(x))


def test_pickled_graphs():
    """Pickle keeps a graph as code, and traces it when it is loaded."""
    original, converted = pair()
    for model, theirs, x in (
        (converted, original, images()),
        (Calls(), Calls(), torch.randn(3, 4)),
    ):
        torchref.convert(model, functional=True)
        graph = traced(model)
        loaded = pickle.loads(pickle.dumps(graph))
        targets = [[str(node.target) for node in g.graph.nodes] for g in (loaded, graph)]
        assert targets[0] == targets[1]
        assert torch.equal(loaded(x), graph(x))
        torch.testing.assert_close(loaded(x), theirs(x))  # the dtype's roundings


def test_fused():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Dropout(0.2), nn.BatchNorm1d(4), nn.ReLU())
    original = copy.deepcopy(model.double()).eval()
    torchref.convert(model.eval(), fuse=True)
    graph = traced(model)
    x = torch.randn(5, 3, dtype=torch.float64)
    close(graph(x), original(x))
    assert [n.name for n in graph.graph.nodes] == [
        n.name for n in fx.symbolic_trace(original).graph.nodes
    ]


def test_a_function_is_traced_as_by_torch():
    graph = torchref.Tracer().trace(lambda x: torch.relu(x) + 1)
    assert [n.name for n in graph.nodes] == ["x", "relu", "add", "output"]


def test_an_attribute_set_anew_is_traced_as_it_is():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = torch.nn.functional.relu

        def forward(self, x):
            return self.act(x)

    for act, target in ((nn.Tanh(), "act"), (lambda x: x + 1, "add")):
        net = Net()
        torchref.convert(net)
        del net.act
        net.act = act
        nodes = [node.name for node in torchref.Tracer().trace(net).nodes]
        assert nodes == ["x", target, "output"]

import copy
import random
import shutil
import subprocess
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchref
import torchref.nn.functional as F
from torchref.diagnostics.graph import Large, _rendered, graph
from torchref.nn.functional import softmax

NEURON = ["W", "x", "b", "y", "Wx", "z", "yhat", "e"]
needs_dot = pytest.mark.skipif(not shutil.which("dot"), reason="waits for Graphviz's `dot`")


def randn(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


def variable(*shape, dtype=torch.float64):
    return randn(*shape, dtype=dtype).requires_grad_()


def neuron(W, x, b, y):
    yhat = F.sigmoid(W * x + b)
    return 0.5 * (y - yhat) ** 2


def single_neuron(dtype=torch.float64):
    W, x, b, y = torch.tensor([0.5, 2.0, -0.5, 1.0], dtype=dtype).unbind()
    return graph(neuron, W.clone().requires_grad_(), x, b.clone().requires_grad_(), y, names=NEURON)


def assert_equals_autograd(function, *inputs, loss=None, y=None):
    """Value, gradients and terms, with the same random numbers drawn; returns the graph."""
    modules = [f for f in (function, loss) if isinstance(f, nn.Module)]
    g = graph(function, *inputs, loss=loss, y=y)
    tensors = [t for t in inputs if t.requires_grad] + [p for m in modules for p in m.parameters()]
    expected = function(*inputs)
    if loss is not None:
        expected = loss(expected) if y is None else loss(expected, y)
    torch.testing.assert_close(g.loss.value, expected.detach())
    gradients = torch.autograd.grad(expected, tensors, allow_unused=True)
    leaves = [n for n in g.nodes if n.kind in ("input", "parameter") and n.output.requires_grad]
    found = {id_of(tensors, leaf): leaf.gradient for leaf in leaves}
    for i, gradient in enumerate(gradients):
        torch.testing.assert_close(found.get(i), gradient) if gradient is not None else None
        assert (found.get(i) is None) == (gradient is None)
    assert_chain_rule(g)
    return g


def id_of(tensors, leaf):
    """The place of the tensor that a leaf's value is a copy of."""
    (place,) = [i for i, t in enumerate(tensors) if torch.equal(t.detach(), leaf.value)]
    return place


def assert_chain_rule(g):
    """Each term is the upstream gradient times the derivative; each gradient the terms' sum."""
    sums = {g.loss: torch.ones_like(g.loss.value)}
    for node in reversed(g.nodes):
        for edge in node.edges:
            if edge.term is None:
                assert edge.derivative is None
                continue
            sums[edge.parent] = sums.get(edge.parent, 0) + edge.term
            if isinstance(edge.derivative, torch.Tensor):
                if edge.is_elementwise:
                    expected = node.gradient * edge.derivative
                else:
                    flat = edge.derivative.reshape(node.value.numel(), -1)
                    expected = (node.gradient.reshape(-1) @ flat).reshape(edge.parent.value.shape)
                torch.testing.assert_close(edge.term, expected)
    for node in g.nodes:
        torch.testing.assert_close(node.gradient, sums[node]) if node in sums else None
        assert (node.gradient is None) == (node not in sums)


def operations(g):
    return [node.operation for node in g.nodes if node.kind == "operation"]


# The course's examples.


def test_single_neuron_is_the_courses_formulas():
    g = single_neuron()
    W, x, b, y = (g[name].value for name in "Wxby")
    yhat = torch.sigmoid(W * x + b)
    slope = yhat * (1 - yhat)
    torch.testing.assert_close(g["yhat"].value, yhat)
    torch.testing.assert_close(g["yhat"].gradient, yhat - y)
    torch.testing.assert_close(g["yhat"].edges[0].derivative, slope)
    torch.testing.assert_close(g["W"].gradient, (yhat - y) * slope * x)
    torch.testing.assert_close(g["b"].gradient, (yhat - y) * slope)
    torch.testing.assert_close(g["Wx"].edges[0].derivative, x)
    assert g["x"].gradient is None
    assert g["Wx"].edges[1].derivative is None
    assert g.loss is g["L"]
    assert operations(g) == ["mul", "add", "sigmoid", "sub", "pow", "mul"]


STEPS = """\
forward
  W = 0.5
  x = 2
  b = -0.5
  y = 1
  Wx = W * x = 1
  z = Wx + b = 0.5
  yhat = sigmoid(z) = 0.6225
  e = y - yhat = 0.3775
  v5 = e ** 2 = 0.1425
  L = v5 * 0.5 = 0.07127
backward
  dL/dL = 1
  dL/dv5 = dL/dL * dL/dv5 = 1 * 0.5 = 0.5
  dL/de = dL/dv5 * dv5/de = 0.5 * 0.7551 = 0.3775
  dL/dyhat = dL/de * de/dyhat = 0.3775 * -1 = -0.3775
  dL/dz = dL/dyhat * dyhat/dz = -0.3775 * 0.235 = -0.08872
  dL/db = dL/dz * dz/db = -0.08872 * 1 = -0.08872
  dL/dWx = dL/dz * dz/dWx = -0.08872 * 1 = -0.08872
  dL/dW = dL/dWx * dWx/dW = -0.08872 * 2 = -0.1774
"""


def test_steps_of_the_single_neuron(capsys):
    single_neuron().steps()
    assert capsys.readouterr().out == STEPS


@pytest.mark.parametrize(("answers", "steps"), [(["", "q"], 2), ([], 1), ([" Q "], 1)])
def test_interactive_steps_wait_and_stop(answers, steps, capsys, monkeypatch):
    def answer():
        if not answers:
            raise EOFError
        return answers.pop(0)

    monkeypatch.setattr("builtins.input", answer)
    single_neuron().steps(interactive=True)
    assert capsys.readouterr().out == "".join(STEPS.splitlines(keepends=True)[: steps + 1])


def test_interactive_steps_go_to_the_end(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda: asked.append(1) or "")
    single_neuron().steps(interactive=True)
    assert capsys.readouterr().out == STEPS
    assert len(asked) == len(STEPS.splitlines()) - 2  # the two headings are no steps


def test_every_path_of_a_value_used_twice_shows(capsys):
    x = variable(3)
    g = assert_equals_autograd(lambda x: (torch.tanh(x) + x).sum(), x)
    through_tanh, direct = (e for n in g.nodes for e in n.edges if e.parent is g["x"])
    torch.testing.assert_close(through_tanh.term, 1 - torch.tanh(x.detach()) ** 2)
    torch.testing.assert_close(direct.term, torch.ones(3, dtype=torch.float64))
    g.steps()
    text = capsys.readouterr().out
    assert "  path 1 of dL/dx = dL/dv2 * dv2/dx" in text
    assert "  path 2 of dL/dx = dL/dv1 * dv1/dx" in text
    assert text.splitlines()[-1].startswith("  dL/dx = [1, 1, 1] + [")


def test_both_sides_of_a_square_are_paths():
    x = torch.tensor(3.0, requires_grad=True)
    g = graph(lambda x: x * x, x)
    assert [edge.derivative.item() for edge in g.loss.edges] == [3.0, 3.0]
    assert g["x"].gradient == 6.0


def test_table():
    weight = torch.zeros(4, 3, requires_grad=True)
    g = graph(lambda x: nn.functional.linear(x, weight).exp().sum(), torch.ones(2, 3))
    assert (
        f"{g}\n"
        == """\
name    operation          value                               gradient
x       input              [[1, 1, 1], [1, 1, 1]]
weight  parameter          (4, 3) mean 0, std 0, min 0, max 0  (4, 3) mean 2, std 0, min 2, max 2
v1      linear(x, weight)  (2, 4) mean 0, std 0, min 0, max 0  (2, 4) mean 1, std 0, min 1, max 1
v2      exp(v1)            (2, 4) mean 1, std 0, min 1, max 1  (2, 4) mean 1, std 0, min 1, max 1
L       sum(v2)            8                                   1
"""
    )


# Equality with autograd.


def mlp(pieces, dtype):
    torch.manual_seed(0)
    layers = pieces.Linear(3, 4), pieces.Tanh(), pieces.Linear(4, 2)
    return nn.Sequential(*layers).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pieces", [nn, torchref.nn], ids=["torch", "torchref"])
def test_two_layers(pieces, dtype):
    x, y = variable(5, 3, dtype=dtype), randn(5, 2, dtype=dtype)
    g = assert_equals_autograd(mlp(pieces, dtype), x, loss=pieces.MSELoss(), y=y)
    assert operations(g) == ["linear", "tanh", "linear", "mse_loss"]
    leaves = [node.name for node in g.nodes if node.kind != "operation"]
    assert leaves == ["x", "y", "0.weight", "0.bias", "2.weight", "2.bias"]
    assert g["0.weight"].gradient.dtype == dtype


def test_gradients_between_the_layers():
    net, x = mlp(nn, torch.float64), randn(5, 3)
    g = graph(net, x, loss=lambda y: y.square().mean())
    values = [x]
    for layer in net:
        values.append(layer(values[-1]))
        values[-1].retain_grad()
    values[-1].square().mean().backward()
    for name, value in zip(("v1", "v2", "v3"), values[1:], strict=True):
        torch.testing.assert_close(g[name].gradient, value.grad)


@pytest.mark.parametrize("pieces", [torch.nn.functional, F], ids=["torch", "torchref"])
@pytest.mark.parametrize("shape", [(4,), (3, 4)], ids=["vector", "rows"])
def test_softmax_and_cross_entropy(pieces, shape):
    x = variable(*shape)
    y = torch.tensor(1) if len(shape) == 1 else torch.tensor([1, 0, 3])
    g = assert_equals_autograd(
        lambda x: pieces.softmax(x, -1), x, loss=lambda p, y: pieces.cross_entropy(p * 2, y), y=y
    )
    assert operations(g) == ["softmax", "mul", "cross_entropy"]
    jacobian = g["v1"].edges[0].derivative
    torch.testing.assert_close(jacobian, torch.func.jacrev(lambda x: x.softmax(-1))(x.detach()))


def test_a_loss_that_runs_backward_once():
    loss = torchref.nn.CrossEntropyLoss(gradient_in_forward=True)
    x, y = variable(3, 4), torch.tensor([1, 0, 3])
    assert_equals_autograd(lambda x: x * 2, x, loss=loss, y=y)


@pytest.mark.parametrize("pieces", [nn, torchref.nn], ids=["torch", "torchref"])
def test_batch_norm_in_training(pieces):
    net = nn.Sequential(nn.Linear(3, 4), pieces.BatchNorm1d(4), pieces.ReLU()).double()
    nn.init.uniform_(net[1].weight)
    kept = copy.deepcopy(net)
    g = graph(net, variable(6, 3), loss=lambda y: y.square().sum())
    assert operations(g) == ["linear", "batch_norm", "relu", "square", "sum"]
    assert net.training
    for (name, now), before in zip(
        net.state_dict().items(), kept.state_dict().values(), strict=True
    ):
        assert torch.equal(now, before), name
    assert_equals_autograd(net, variable(6, 3), loss=lambda y: y.square().sum())


def test_evaluation_stays_evaluation():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), torchref.nn.Dropout(0.5)).double()
    net.eval()
    g = assert_equals_autograd(net, variable(4, 3), loss=lambda y: y.square().sum())
    assert g["0.running_var"].kind == "constant"
    assert not net.training


def test_convolutions():
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)
    ).double()
    x, y = randn(2, 1, 6, 6), torch.tensor([0, 2])
    g = assert_equals_autograd(net, x, loss=torchref.nn.CrossEntropyLoss(), y=y)
    assert operations(g) == ["conv2d", "relu", "max_pool2d", "flatten", "linear", "cross_entropy"]
    derivative = g["v1"].edges[1].derivative
    assert derivative.shape == (2, 2, 4, 4, 2, 1, 3, 3)
    jacobian = torch.func.jacrev(lambda w: nn.functional.conv2d(x, w))(net[0].weight.detach())
    assert derivative.norm == pytest.approx(jacobian.norm().item())


@pytest.mark.parametrize("pieces", [nn, torchref.nn], ids=["torch", "torchref"])
def test_dropout_shows_the_next_mask_and_draws_nothing(pieces):
    net = nn.Sequential(pieces.Linear(4, 50), pieces.Dropout(0.5), pieces.Linear(50, 1)).double()
    state = torch.get_rng_state()
    graph(net, randn(3, 4).zero_(), loss=torch.sum)  # randn draws, graph may not
    torch.set_rng_state(state)
    x = randn(3, 4)
    state, numbers = torch.get_rng_state(), random.getstate()
    g = graph(net, x, loss=torch.sum)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == numbers
    expected = net[1](net[0](x))
    assert torch.equal(g["v2"].value, expected.detach())
    torch.set_rng_state(state)
    assert_equals_autograd(net, x, loss=torch.sum)
    assert set(g["v2"].edges[0].derivative.unique().tolist()) == {0.0, 2.0}


def test_shared_parameters_have_one_node():
    shared = nn.Linear(3, 3).double()
    net = nn.Sequential(shared, nn.Tanh(), shared)
    g = assert_equals_autograd(net, randn(2, 3), loss=torch.sum)
    assert [node.name for node in g.nodes if node.kind == "parameter"] == ["0.weight", "0.bias"]
    first, second = (e for n in g.nodes for e in n.edges if e.parent is g["0.weight"])
    torch.testing.assert_close(g["0.weight"].gradient, first.term + second.term)


def test_an_input_given_twice_has_one_node():
    x = variable(3)
    g = graph(lambda a, b: (a * b).sum(), x, x)
    torch.testing.assert_close(g["a"].gradient, 2 * x.detach())


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (torch.sigmoid, (3,)),
        (torch.exp, (2, 3)),
        (lambda x: 2 - x, (3,)),
        (lambda x: 1 / x, (3,)),
        (lambda x: 2**x, (3,)),
        (lambda x: x[1:], (3,)),
        (lambda x: x.T, (2, 3)),
        (lambda x: x.sum(0), (2, 3)),
        (lambda x: x.cumsum(0), (3,)),
        (lambda x: x.softmax(0), (3,)),
        (F.gelu, (3,)),
        (lambda x: F.linear(x, torch.ones(2, 3, dtype=torch.float64)), (2, 3)),
        (lambda x: nn.functional.layer_norm(x, (3,)), (2, 3)),
        (lambda x: x + torch.ones(2, 3, dtype=torch.float64), (3,)),
    ],
)
def test_local_derivatives(function, shape):
    x = variable(*shape)
    g = graph(function, x, loss=torch.sum)
    (edge,) = (e for n in g.nodes for e in n.edges if e.parent.kind == "input")
    expected = torch.func.jacrev(function)(x.detach())
    if edge.is_elementwise:
        flat = expected.reshape(x.numel(), x.numel())
        assert flat.count_nonzero() == x.numel()
        expected = flat.diagonal().reshape(shape)
    torch.testing.assert_close(edge.derivative, expected)
    assert_chain_rule(g)


def test_large_jacobians_are_shape_and_norm():
    x = variable(40, 30)
    g = graph(lambda x: x.cumsum(0), x, loss=torch.sum)
    assert g["v1"].edges[0].derivative == Large((40, 30, 40, 30), None)  # 1200 outputs
    x = variable(40, 2)
    derivative = graph(lambda x: x.cumsum(0), x, loss=torch.sum)["v1"].edges[0].derivative
    assert derivative.shape == (40, 2, 40, 2)
    assert derivative.norm == pytest.approx((2 * 40 * 41 / 2) ** 0.5)


# Random graphs.

UNARY = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "exp": lambda x: (x.tanh() / 4).exp()}
BINARY = {"add": torch.add, "mul": lambda a, b: a * b, "matmul": lambda a, b: a @ b}
CALLS = st.tuples(st.sampled_from([*UNARY, *BINARY]), st.integers(0, 99), st.integers(0, 99))


@settings(deadline=None, max_examples=50)
@given(st.lists(CALLS, min_size=1, max_size=12), st.integers(0, 2**31), st.booleans())
def test_random_expressions(calls, seed, is_float32):
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float32 if is_float32 else torch.float64
    inputs = [torch.rand(2, 2, dtype=dtype, generator=generator) - 0.5 for _ in range(3)]
    inputs = [x.requires_grad_(i > 0) for i, x in enumerate(inputs)]
    made = []

    def expression(*inputs):
        pool = list(inputs)
        for name, i, j in calls:
            a, b = pool[i % len(pool)], pool[j % len(pool)]
            pool.append(UNARY[name](a) if name in UNARY else BINARY[name](a, b))
        made[:] = pool[len(inputs) :]
        return (pool[-1] + pool[1]).sum()

    g = graph(expression, *inputs)
    expression(*inputs).backward()
    for name, x in zip(("x", "x2", "x3"), inputs, strict=True):
        found = next((node.gradient for node in g.nodes if node.name == name), None)
        assert (found is None) == (x.grad is None)
        if found is not None:
            torch.testing.assert_close(found, x.grad)
    assert_chain_rule(g)
    values = [node.value for node in g.nodes if node.kind == "operation"]
    assert any(torch.equal(made[-1].detach(), value) for value in values)


# What becomes a node.


def test_a_piece_is_one_node_however_it_is_called():
    x = variable(3)
    held = {"silu": F.silu}  # where no module's names lead

    def function(x):
        x = F.relu(softmax(x, dim=0))
        x = torchref.nn.LogSoftmax(-1)(x)
        return F.mse_loss(input=held["silu"](x), target=torch.zeros_like(x))

    g = assert_equals_autograd(function, x)
    found = operations(g)
    assert found == ["softmax", "relu", "log_softmax", "zeros_like", "SiLU", "mse_loss"]
    assert F.relu is torchref.nn.activation.relu  # and not what asks the modes
    assert not hasattr(F.relu, "__wrapped__")


def test_other_threads_are_not_recorded():
    seen = []

    def function(x):
        thread = threading.Thread(target=lambda: seen.append(F.relu(torch.ones(1))))
        thread.start()
        thread.join()
        return x.exp()

    assert operations(graph(function, variable())) == ["exp"]
    assert seen == [torch.ones(1)]


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w + x * w

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        return 2 * w * dy, 2 * x * dy


def test_a_custom_function_is_one_node():
    x, w = variable(3), variable(3)
    g = assert_equals_autograd(lambda x, w: Doubled.apply(x.sin(), w).sum(), x, w)
    assert operations(g) == ["sin", "Doubled", "sum"]
    torch.testing.assert_close(g["v2"].edges[0].derivative, torch.diag(2 * w.detach()))


def test_rows_of_an_iteration_are_nodes():
    g = assert_equals_autograd(lambda x: sum(row.prod() for row in x), variable(2, 3))
    assert g["v1"].operation.startswith("unbind")


class Box:
    def __init__(self, value):
        self.value = value


@torch.overrides.wrap_torch_function(lambda x: (x,))
def boxed(x):
    return Box(x * 2)


def test_a_result_in_an_unknown_container_is_not_lost():
    g = assert_equals_autograd(lambda x: boxed(x.exp()).value.sum(), variable(3))
    assert operations(g) == ["exp", "Mul", "sum"]


def test_several_outputs_are_several_nodes():
    g = assert_equals_autograd(lambda x: x.split(1)[0].sum() * x.max(1)[0].sum(), variable(2, 3))
    assert operations(g) == ["split[0]", "sum", "max[0]", "sum", "mul"]


def test_converted_functions_are_pieces():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3).double()
            self.activation = nn.functional.gelu

        def forward(self, x):
            return self.activation(nn.functional.relu(self.linear(x), inplace=True)).sum()

    net = Net()
    torchref.convert(net, functional=True)
    g = assert_equals_autograd(net, variable(2, 3))
    assert operations(g) == ["linear", "relu", "gelu", "sum"]
    assert net.activation is F.gelu


def test_only_what_the_loss_depends_on():
    def function(x, w, unused):
        w.exp()
        return (x * w).sum()

    g = graph(function, randn(3), variable(3), variable(3))
    assert [node.name for node in g.nodes] == ["x", "w", "v1", "L"]


def test_what_autograd_does_not_follow():
    def function(x):
        with torch.no_grad():
            mean = x.mean()
        return ((x - mean) * (x > 0) * x.detach()).sum()

    g = assert_equals_autograd(function, variable(2, 3))
    assert g["v1"].operation == "mean"
    assert g["v1"].gradient is None


def test_in_place_operations_are_nodes():
    def function(x):
        x = x * 2
        y = x
        x += 1
        row = x[1].clone()
        x[0] = row * row
        x.mul_(2)
        return nn.functional.relu(y.clone(), inplace=True).sum() + y.sum()

    g = assert_equals_autograd(function, variable(2, 3))
    assert operations(g) == [
        *("mul", "add", "getitem", "clone", "mul", "setitem", "mul"),
        *("clone", "relu", "sum", "sum", "add"),
    ]


def test_what_is_changed_in_place_looks_so():
    def function(x):
        y = torch.zeros(2, dtype=x.dtype)
        y[0] = x.sum()
        assert y.requires_grad
        y.unsqueeze_(0)
        return y.exp().sum() / y.shape[0]

    assert_equals_autograd(function, variable(3))


def test_a_view_may_be_changed_if_the_rest_is_not_used():
    assert_equals_autograd(lambda x: (x * 2).view(-1).mul_(3).sum(), variable(2, 3))

    def function(x):
        x = x * 2
        x.view(-1).mul_(3)
        return x.sum()

    with pytest.raises(RuntimeError, match="graph: `mul`, in place, changed memory that the resul"):
        graph(function, variable(2, 3))


@pytest.mark.parametrize(
    ("function", "expression"),
    [
        (lambda x, y: x - y, "x - y"),
        (lambda x, y: 2 - x, "2 - x"),
        (lambda x, y: 0.3333333 / x, "0.3333 / x"),
        (lambda x, y: 2**x, "2 ** x"),
        (lambda x, y: x @ y, "x @ y"),
        (lambda x, y: torch.add(x, y, alpha=2), "add(x, y)"),
        (lambda x, y: torch.where(x > 0, x, y), "where(v1, x, y)"),
        (lambda x, y: x.T, "T(x)"),
        (lambda x, y: x.clone().mul_(y), "v1 * y"),
    ],
)
def test_expressions(function, expression):
    g = graph(function, variable(3, 3), variable(3, 3), loss=torch.sum)
    assert g.nodes[-2].expression == expression


# Nothing of the model changes.


class Counting(nn.Module):
    """Writes to itself in every way."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(randn(3))
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(0))
        self.calls = 0
        self.last = None

    def forward(self, x):
        self.calls += 1
        self.count += 1
        self.last = x
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        with torch.no_grad():
            self.weight.clamp_(-0.1, 0.1)
        return (nn.functional.dropout(x) * self.weight + self.mean).sum()


@pytest.mark.parametrize("wrapped", [False, True])
def test_nothing_of_the_model_changes(wrapped):
    net = Counting()
    tensors = dict(net.named_parameters()) | dict(net.named_buffers())
    values = {name: tensor.clone() for name, tensor in tensors.items()}
    net.weight.grad = torch.ones_like(net.weight)
    x = variable(2, 3)
    before, state = x.detach().clone(), torch.get_rng_state()
    g = graph((lambda x: net(x)) if wrapped else net, x)
    assert g["net.weight" if wrapped else "weight"].kind == "parameter"
    assert dict(net.named_parameters()) | dict(net.named_buffers()) == tensors  # the same ones
    assert all(torch.equal(tensors[name], value) for name, value in values.items())
    assert torch.equal(net.weight.grad, torch.ones_like(net.weight))
    assert (net.calls, net.last) == (0, None)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x.detach(), before)
    assert x.grad is None


def test_an_error_leaves_no_trace_either():
    net = Counting()
    with pytest.raises(RuntimeError, match="size of tensor"):
        graph(net, randn(2, 5))
    assert net.calls == 0
    assert not hasattr(F.relu, "__wrapped__")
    assert isinstance(net.mean, torch.Tensor)
    assert net.mean.equal(torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_grad_mode_of_the_caller_does_not_matter(mode):
    with mode():
        assert single_neuron()["W"].gradient is not None


# Names.


def test_names_of_what_lies_around_a_function():
    w, net, others = variable(3), nn.Linear(3, 1).double(), [variable()]
    g = graph(lambda x: net(x * w).sum() + others[0], randn(2, 3))
    leaves = [node.name for node in g.nodes if node.kind != "operation"]
    assert leaves == ["x", "w", "net.weight", "net.bias", "p4"]


def test_names_are_made_different():
    x = variable(3)
    g = graph(lambda v1, L: (v1 * L).exp().sum(), x, variable(3))
    assert [node.name for node in g.nodes] == ["v1", "L", "v1'", "v2", "L'"]
    assert g["L'"] is g.loss
    with pytest.raises(KeyError, match="expected one of v1, L, v1', v2, L', got z"):
        g["z"]


def test_names_of_the_target_come_after_the_inputs():
    net, names = nn.Linear(2, 1), ["features", "label", "score", "cost"]
    g = graph(net, torch.ones(1, 2), loss=F.mse_loss, y=torch.ones(1, 1), names=names)
    assert [node.name for node in g.nodes] == [*names[:2], "weight", "bias", *names[2:]]


# Pictures.


@needs_dot
def test_pictures(tmp_path):
    g = single_neuron()
    for ending, start in ((".svg", b"<?xml"), (".png", b"\x89PNG"), (".pdf", b"%PDF")):
        g.save(tmp_path / f"g{ending}")
        assert (tmp_path / f"g{ending}").read_bytes().startswith(start)


@needs_dot
def test_any_name_can_be_drawn():
    names = ['a"b', "c\nd\\", "<B>&amp;", "", "\x00\x1b\ud800", "µ ∂L"]
    dot = graph(neuron, *(variable() for _ in range(4)), names=names).to_dot()
    svg = _rendered(dot, "svg").decode()
    for text in ("a&quot;b", "c\\nd\\", "&lt;B&gt;&amp;amp;", "\\x00\\x1b\\ud800", "µ ∂L"):
        assert f">{text}<" in svg.replace("&#45;", "-"), text


def test_dot_text(tmp_path):
    g = single_neuron()
    g.save(tmp_path / "g.dot")
    dot = (tmp_path / "g.dot").read_text()
    assert dot == g.to_dot()
    assert "n4 -> n5 [label=<dz/dWx = 1>];" in dot
    assert "n5 -> n6 [label=<dyhat/dz = 0.235>];" in dot
    assert 'n1 -> n4 [style=dashed, color="#999999"];' in dot
    assert '<FONT COLOR="#b2182b">dL/dW = -0.1774</FONT>' in dot
    assert dot.count(" -> ") == 9


def test_without_graphviz(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda program: None)
    with pytest.raises(RuntimeError, match=r"Graph.save: .*`dot` is missing; apt install graphviz"):
        single_neuron().save(tmp_path / "g.png")
    with pytest.raises(ValueError, match=r"expected `path` to end in .dot, .*, got 'g.jpg'"):
        single_neuron().save(tmp_path / "g.jpg")


def test_graphviz_that_fails(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda program: "dot")
    failed = subprocess.CompletedProcess([], 1, b"", b"syntax error")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(RuntimeError, match="Graph.save: `dot` failed: syntax error"):
        _rendered("", "svg")

    def hang(*args, timeout, **kwargs):
        raise subprocess.TimeoutExpired(args, timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(RuntimeError, match="`dot` took more than 60 s"):
        _rendered("", "svg")


# Errors.


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((lambda x: x * 2, variable(3)), {}, ValueError, r"scalar, got shape \(3,\); .*`loss`"),
        (
            (lambda x: x * 2, variable(3)),
            {"loss": torch.exp},
            ValueError,
            r"`loss` to return a scalar, got shape \(3,\)$",
        ),
        ((lambda x: (x, x), variable()), {}, TypeError, "return a tensor, got <class 'tuple'>"),
        ((torch.sum, randn(3)), {}, ValueError, "nothing requires a gradient"),
        ((lambda x: x.argmax(), variable(3)), {}, ValueError, "nothing requires a gradient"),
        ((torch.sum, variable(3)), {"y": randn(3)}, ValueError, "`loss` with `y`, got None"),
        ((torch.sum, variable(3)), {"names": "xL"}, TypeError, "sequence of names, got 'xL'"),
        ((torch.sum, variable(3)), {"names": ["a", "a"]}, ValueError, "all different"),
        ((torch.sum, variable(3)), {"names": ["a", "b", "c"]}, ValueError, "1 inputs and 1 r"),
        ((lambda x: x.sum().backward(), variable(3)), {}, RuntimeError, "got `backward` in the fu"),
        (
            (lambda x: torch.autograd.grad(x.sum(), x), variable(3)),
            {},
            RuntimeError,
            "got `grad` in the function",
        ),
        ((lambda x: x.requires_grad_().sum(), randn(3)), {}, RuntimeError, "got `requires_grad` i"),
    ],
)
def test_errors(arguments, options, error, message):
    with pytest.raises(error, match=f"^graph: .*{message}"):
        graph(*arguments, **options)


def test_a_custom_function_of_what_is_changed_later_raises():
    def function(x, w):
        x = x * 1
        y = Doubled.apply(x, w)
        x.mul_(2)
        return y.sum()

    with pytest.raises(RuntimeError, match=r"graph: expected no change in place of .*\(Doubled\)"):
        graph(function, variable(3), variable(3))

"""Kernels under torch.compile: one opaque operation each, where the triton backend is forced."""

import os
import subprocess
import sys

import pytest
import torch
from functorch.compile import make_boxed_func
from pieces import PIECES
from torch._dynamo.backends.common import aot_autograd

import torchref
from torchref import dispatch

forced = pytest.mark.skipif(
    torchref.get_backend() != "triton", reason="needs TORCHREF_BACKEND=triton (test_interpreted.py)"
)


@pytest.fixture(autouse=True)
def afresh():
    torch._dynamo.reset()  # its limit of recompilations counts for all tests together


def keeping(graphs):
    """A compiler that keeps the graphs of forward and backward, and runs them as they are."""

    def compiler(graph, example_inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=compiler)


def graphs_of(function, *inputs):
    """The output and gradients under torch.compile, and the graphs that went to the compiler."""
    graphs = []
    y = torch.compile(function, fullgraph=True, backend=keeping(graphs))(*inputs)
    xs = [x for x in inputs if x.requires_grad]
    return y, torch.autograd.grad(y.sum(), xs), graphs


def operations(graphs):
    # one that writes to its arguments is an argument itself, of auto_functionalized
    calls = [(node.target, *node.args[:1]) for graph in graphs for node in graph.graph.nodes]
    return [str(op) for call in calls for op in call if str(op).startswith("torchref.")]


@forced
@pytest.mark.parametrize("piece", PIECES, ids=lambda p: p.name)
def test_forward_and_backward_are_operations_of_ours(piece):
    inputs = piece.inputs(torch.float32)
    xs = [x for x in inputs if x.requires_grad]
    y, gradients, graphs = graphs_of(piece.ours, *inputs)
    found = operations(graphs)
    assert any("_bwd" in name for name in found)
    assert any("_fwd" in name for name in found) or piece.name == "linear"
    if piece.random:  # compiled code draws its seed elsewhere
        assert torch.equal(y != 0, gradients[0] != 0)
        return
    expected = piece.ours(*inputs)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), xs))


@forced
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x,
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3),
        lambda x: x[..., ::2],
    ],
    ids=["contiguous", "channels_last", "transposed", "strided"],
)
def test_traced_layouts_are_those_that_kernels_give(layout, dynamic):
    """Inductor builds on the strides that the traced launcher promised."""
    net = torch.nn.Sequential(
        torchref.nn.BatchNorm2d(4), torchref.nn.GELU(), torchref.nn.Softmax(1), torchref.nn.ReLU()
    )
    compiled = torch.compile(net, fullgraph=True, dynamic=dynamic)
    for size in (6, 8):
        x = layout(torch.randn(3, 4, size, 6))
        torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-5)


SIZED = {
    "gelu": lambda f, x, target: f.gelu(x),
    "softmax": lambda f, x, target: f.softmax(x, 1),
    "softmax, strided": lambda f, x, target: f.softmax(x, 0),
    "cross_entropy": lambda f, x, target: f.cross_entropy(x, target, label_smoothing=0.1),
    "probabilities": lambda f, x, target: f.cross_entropy(x, x.detach()),
    "nll_loss": lambda f, x, target: f.nll_loss(x, target),
    "mse_loss": lambda f, x, target: f.mse_loss(x, x.detach() + 1),
    "batch_norm": lambda f, x, target: f.batch_norm(x, None, None, training=True),
    "dropout": lambda f, x, target: f.dropout(x, 0.4),
    "linear": lambda f, x, target: f.linear(x, x * 2, x[:, 0] + 1),
}


@forced
@pytest.mark.parametrize("name", SIZED)
def test_one_graph_serves_every_size(name):
    """Nothing that a launcher works out for its launch may fix a traced size."""
    graphs = []

    def function(x, target):
        return SIZED[name](torchref.nn.functional, x, target)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=keeping(graphs))
    for shape in ((6, 8), (7, 9), (12, 33), (40, 50)):  # below what changes the kernel's path
        x = torch.randn(shape, requires_grad=True)
        compiled(x, torch.randint(0, shape[1], shape[:1])).sum().backward()
    assert len(graphs) == 2


@forced
@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_move_inside_a_graph(momentum):
    pair = [library.BatchNorm1d(3, momentum=momentum) for library in (torchref.nn, torch.nn)]
    compiled = torch.compile(pair[0], fullgraph=True)
    for _ in range(3):
        x = torch.randn(8, 3)
        torch.testing.assert_close(compiled(x), pair[1](x))
    for mine, torchs in zip(pair[0].buffers(), pair[1].buffers(), strict=True):
        torch.testing.assert_close(mine, torchs)


@forced
def test_dropout_in_a_graph_keeps_mask_and_layout():
    def f(x):
        return torchref.nn.functional.dropout(x * 2, 0.5)

    compiled = torch.compile(f, fullgraph=True)
    x = torch.rand(4, 6, 5).add(1).transpose(0, 2).requires_grad_()
    y = compiled(x)
    y.backward(torch.rand(4, 6, 5).add(1).permute(2, 1, 0).contiguous())
    assert torch.equal(y != 0, x.grad != 0)
    assert not torch.equal(y != 0, compiled(x) != 0)


@forced
def test_two_dropouts_of_one_tensor_in_a_graph_draw_two_masks():
    """Common subexpressions are merged, and two calls must not be one."""

    def f(x):
        return torchref.nn.functional.dropout(x), torchref.nn.functional.dropout(x)

    for backend in ("aot_eager_decomp_partition", "inductor"):
        torch._dynamo.reset()
        a, b = torch.compile(f, fullgraph=True, backend=backend)(torch.ones(256).requires_grad_())
        assert not torch.equal(a, b)


def test_schemas_say_what_is_written():
    schema = torch.ops.torchref.batch_norm_fwd.default._schema
    assert [a.name for a in schema.arguments if a.is_write] == ["running_mean", "running_var"]
    assert not any(a.is_write for a in torch.ops.torchref.relu_fwd.default._schema.arguments)


def test_an_operation_says_why_it_cannot_run(monkeypatch):
    monkeypatch.setattr(dispatch, "interprets", lambda: False)
    with pytest.raises(RuntimeError, match="relu_fwd: the triton backend cannot run it: "):
        torch.ops.torchref.relu_fwd(torch.ones(2), False)


def test_auto_compiles_the_formula():
    """For Inductor to fuse: no operation of ours is in its way."""
    code = (
        "import torch, torchref\n"
        "graphs = []\n"
        "def backend(graph, inputs):\n"
        "    graphs.append(graph)\n"
        "    return graph.forward\n"
        "torch.compile(torchref.nn.functional.silu, backend=backend)(torch.ones(3))\n"
        "print('torchref.' in graphs[0].code)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TORCHREF_BACKEND"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert result.stdout.strip() == "False", result.stderr

"""What PyTorch users do to a function, done to every piece, with and without a kernel.

``kernel`` runs a stand-in for each piece's kernel that, like a real one, needs the address of its
inputs and gives autograd nothing to record. Where a kernel may not run, it shows.
"""

import importlib

import pytest
import torch
from pieces import PIECES
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from torchref import dispatch

pytestmark = pytest.mark.parametrize("piece", PIECES, ids=lambda p: p.name)
ran = []


@pytest.fixture(params=["reference", "kernel"], autouse=True)
def implementation(request, piece, monkeypatch):
    if request.param == "kernel" and piece.random:
        pytest.skip("a kernel's mask is its own: test_dropout_kernel.py")
    monkeypatch.setattr(dispatch, "find_kernel", stand_in)
    monkeypatch.setattr(dispatch, "interprets", lambda: True)  # tensors on the CPU
    monkeypatch.setattr(dispatch, "kernel_takes", lambda args: True)  # float64
    choice = "triton" if request.param == "kernel" else "reference"
    monkeypatch.setattr(dispatch._process, "choice", choice)
    ran.clear()
    return request.param


def stand_in(module, name):
    formula = getattr(importlib.import_module(f"torchref.nn.{module}"), name).__wrapped__

    def kernel(*args):
        if any(isinstance(arg, FakeTensor) for arg in args):  # the operation's output is asked for
            return formula(*args)
        for arg in args:
            if isinstance(arg, torch.Tensor):
                arg.data_ptr()  # raises on tensors without storage
        with torch.no_grad():
            output = formula(*[a.detach() if isinstance(a, torch.Tensor) else a for a in args])
        ran.append(name)
        return output

    return kernel


def leaves(piece):
    return [x for x in piece.inputs(torch.float64) if x.requires_grad]


def of_leaves(piece, f):
    """``f`` as a function of the inputs that have a gradient, with the same random numbers."""
    inputs = piece.inputs(torch.float64)

    def call(*xs):
        given = iter(xs)
        torch.manual_seed(0)
        return f(*[next(given) if x.requires_grad else x for x in inputs])

    return call


def loss(f):
    return lambda *xs: f(*xs).sin().sum()


def both(piece):
    return of_leaves(piece, piece.ours), of_leaves(piece, piece.theirs)


def close(mine, torchs):
    torch.testing.assert_close(mine, torchs, rtol=1e-10, atol=1e-12)


def test_the_kernel_runs_where_it_may(piece, implementation):
    ours, theirs = both(piece)
    xs = leaves(piece)
    close(ours(*xs), theirs(*xs))
    with torch.no_grad():
        close(ours(*xs), theirs(*xs))
    gradients = [torch.autograd.grad(loss(f)(*xs), xs) for f in (ours, theirs)]
    close(*gradients)
    assert bool(ran) == (implementation == "kernel")


def test_inputs_are_left_alone(piece):
    inputs = piece.inputs(torch.float64)
    before = [x.detach().clone() for x in inputs]
    y = piece.ours(*inputs)
    for _ in range(2):
        y.sum().backward(retain_graph=True)
    assert all(torch.equal(x, old) for x, old in zip(inputs, before, strict=True))


def test_gradients_of_both_orders(piece):
    f, xs = of_leaves(piece, piece.ours), leaves(piece)
    assert torch.autograd.gradcheck(f, xs, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, xs, fast_mode=True)


def test_second_derivatives_are_torchs(piece):
    def second(f):
        xs = leaves(piece)
        gradients = torch.autograd.grad(loss(f)(*xs), xs, create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in gradients), xs)

    # torch adds 1e-12 to the denominators of this one; gradgradcheck above knows better
    rtol = 1e-8 if piece.name == "binary_cross_entropy" else 1e-10
    torch.testing.assert_close(*map(second, both(piece)), rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(piece, dynamic, implementation):
    torch._dynamo.reset()  # every partial shares one code object, and its limit of compilations
    compiled = torch.compile(piece.ours, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    inputs = piece.inputs(torch.float64)
    xs = [x for x in inputs if x.requires_grad]
    y = compiled(*inputs)
    gradients = torch.autograd.grad(y.sum(), xs)
    # under torch.compile a piece is its formula, or one opaque operation where a kernel is forced
    assert bool(ran) == (implementation == "kernel")
    if piece.random:  # torch.compile draws other numbers
        assert torch.equal(y != 0, gradients[0] != 0)
    else:
        expected = piece.theirs(*inputs)
        close(y, expected)
        close(gradients, torch.autograd.grad(expected.sum(), xs))


def test_export(piece):
    class Model(torch.nn.Module):
        def forward(self, *xs):
            return piece.ours(*xs)

    inputs = tuple(x.detach() for x in piece.inputs(torch.float64))
    program = torch.export.export(Model(), inputs)
    assert not ran
    torch.manual_seed(0)
    y = program.module()(*inputs)
    torch.manual_seed(0)
    if not piece.random:  # torch.export draws other numbers
        close(y, piece.theirs(*inputs))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(piece, mode):
    inputs = [x.detach() for x in piece.inputs(torch.float64)]
    graph = make_fx(piece.ours, tracing_mode=mode)(*inputs)
    assert not ran
    results = []
    for f in (graph, piece.theirs):
        torch.manual_seed(0)
        results.append(f(*inputs))
    close(*results)


def test_make_fx_of_a_gradient(piece):
    ours, theirs = both(piece)

    def gradient(f):
        return lambda x, *rest: torch.autograd.grad(loss(f)(x, *rest), x)[0]

    xs = leaves(piece)
    graph = make_fx(gradient(ours))(*xs)
    torch.manual_seed(0)
    close(graph(*xs), gradient(theirs)(*xs))


def test_torch_func(piece):
    ours, theirs = both(piece)
    xs = tuple(x.detach() for x in leaves(piece))
    tangents = tuple(torch.randn_like(x) for x in xs)
    transforms = {
        "grad": lambda f: torch.func.grad(loss(f))(*xs),
        "jvp": lambda f: torch.func.jvp(f, xs, tangents),
        "jacfwd": lambda f: torch.func.jacfwd(f, randomness="same")(*xs),
        "grad of grad": lambda f: torch.func.grad(
            lambda x: torch.func.grad(loss(f))(x, *xs[1:]).sin().sum()
        )(xs[0]),
    }
    if not piece.random:  # vmap allows no random numbers there
        transforms["jacrev"] = lambda f: torch.func.jacrev(f)(*xs)
        transforms["hessian"] = lambda f: torch.func.hessian(loss(f))(*xs)
    for transform in transforms.values():
        close(transform(ours), transform(theirs))


def test_vmap(piece):
    ours, theirs = both(piece)
    x, *rest = (x.detach() for x in leaves(piece))
    batch = torch.stack([x, x.flip(0), x])
    for transform in (lambda f: f, lambda f: torch.func.grad(loss(f))):
        results = []
        for f in map(transform, (ours, theirs)):
            over_first = (0, *[None] * len(rest))
            results.append(torch.vmap(f, over_first, randomness="same")(batch, *rest))
        close(*results)
    assert not ran


def test_forward_mode_in_eager(piece):
    ours, theirs = both(piece)
    xs = [x.detach() for x in leaves(piece)]
    directions = [torch.randn_like(x) for x in xs]
    tangents = []
    with torch.autograd.forward_ad.dual_level():
        duals = [
            torch.autograd.forward_ad.make_dual(x, d) for x, d in zip(xs, directions, strict=True)
        ]
        for f in (ours, theirs):
            tangents.append(torch.autograd.forward_ad.unpack_dual(f(*duals)).tangent)
    close(*tangents)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(piece, use_reentrant):
    def gradient(f):
        xs = leaves(piece)
        y = checkpoint(f, *xs, use_reentrant=use_reentrant)
        return torch.autograd.grad(y.sin().sum(), xs) if not use_reentrant else backward(y, xs)

    def backward(y, xs):
        y.sin().sum().backward()
        return [x.grad for x in xs]

    close(*map(gradient, both(piece)))


def test_saved_tensor_hooks(piece):
    packed = []

    def pack(x):
        packed.append(x)
        return x.numpy()

    ours, theirs = both(piece)
    xs = leaves(piece)
    with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
        y = ours(*xs)
    assert packed
    close(torch.autograd.grad(y.sum(), xs), torch.autograd.grad(theirs(*xs).sum(), xs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
def test_autocast(piece, dtype, to):
    results = []
    for f in (piece.ours, piece.theirs):
        inputs = piece.inputs(dtype)
        torch.manual_seed(0)
        with torch.autocast("cpu", to):
            y = f(*inputs)
        y.float().sin().sum().backward()
        gradients = [x.grad.dtype for x in inputs if x.requires_grad]
        results.append((y.dtype, gradients, y.detach()))
    assert results[0][:2] == results[1][:2]
    tolerance = 1e-5 if results[0][0] == torch.float32 else 2e-2
    torch.testing.assert_close(results[0][2], results[1][2], rtol=tolerance, atol=tolerance)


class Dispatching(torch.Tensor):
    """A wrapper without memory of its own, as DTensor and quantized tensors are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            dtype=inner.dtype,
            strides=inner.stride(),
            requires_grad=inner.requires_grad,
        )

    def __init__(self, inner):
        self.inner = inner.detach()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def unwrap(x):
            return x.inner if isinstance(x, cls) else x

        args, kwargs = torch.utils._pytree.tree_map(unwrap, (args, kwargs or {}))
        result = func(*args, **kwargs)
        return torch.utils._pytree.tree_map_only(torch.Tensor, cls, result)


class Functional(torch.Tensor):
    """A subclass with memory that sees every torch function."""


@pytest.mark.parametrize("wrapper", [Dispatching, Functional])
def test_subclasses(piece, wrapper):
    ours, theirs = both(piece)
    xs = leaves(piece)
    if wrapper is Dispatching:
        wrapped = [Dispatching(x.detach().requires_grad_()) for x in xs]
    else:
        wrapped = [x.detach().as_subclass(Functional).requires_grad_() for x in xs]
    y = ours(*wrapped)
    assert isinstance(y, wrapper)
    assert not ran
    gradients = torch.autograd.grad(y.sum(), wrapped)
    expected = torch.autograd.grad(theirs(*xs).sum(), xs)
    for mine, torchs in zip(gradients, expected, strict=True):
        plain = mine.inner if wrapper is Dispatching else mine.as_subclass(torch.Tensor)
        close(plain, torchs)


def test_meta_tensors(piece):
    inputs = [
        x.detach().to("meta").requires_grad_(x.requires_grad) for x in piece.inputs(torch.float32)
    ]
    y, expected = piece.ours(*inputs), piece.theirs(*inputs)
    assert (y.shape, y.dtype, y.device.type) == (expected.shape, expected.dtype, "meta")
    y.sum().backward()
    assert all(x.grad is not None for x in inputs if x.requires_grad)

import contextlib
import copy
import itertools
import math
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import torchref
import torchref.nn as nn
import torchref.nn.functional as ours
from torchref.nn import bias_act_dropout as module
from torchref.testing import assert_parity

KERNELS = torchref.get_backend() == "triton"
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16][KERNELS:]
ACTIVATIONS = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "elu": F.elu,
    "selu": F.selu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
# A ReLU's backward reads the output, every other the input.
both_kinds = pytest.mark.parametrize("activation", ["relu", "gelu"])
draws_torchs_mask = pytest.mark.skipif(KERNELS, reason="a kernel's mask is that of a seed")


def theirs(x, bias=None, p=0.0, training=True, *, activation="relu", param=None):
    """The same in torch's pieces, with the mask of the formula where kernels run."""
    u = x if bias is None else x + bias
    y = ACTIVATIONS[activation](u, *(() if param is None else (param,)))
    if not (KERNELS and training and 0 < p < 1 and y.numel()):
        return F.dropout(y, p, training)
    seed = torch.randint(2**63 - 1, (), device=y.device)
    kept = module._mask(seed, y.reshape(-1, y.shape[-1]), p)
    return y * (kept.reshape(y.shape).to(y.dtype) / (1 - p))


class Composition(torch.nn.Linear):
    """A module of torch's pieces that computes the same."""

    activation, param, p = "relu", None, 0.0

    def forward(self, input):
        options = {"activation": self.activation, "param": self.param}
        return theirs(F.linear(input, self.weight), self.bias, self.p, self.training, **options)


def draw(*shape: int, dtype=torch.float32):
    return (torch.randn(shape) * 2).to(dtype).requires_grad_()


def parity(*inputs, **kwargs):
    assert_parity(ours.bias_act_dropout, theirs, *inputs, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
@every_activation
def test_values_and_gradients(activation, p, dtype):
    for training in (True, False):
        inputs = draw(13, 7, dtype=dtype), draw(7, dtype=dtype)
        parity(*inputs, p, training, activation=activation)


SHAPES = [(7,), (1, 1), (1, 300), (67, 37), (131, 16), (3, 5, 11), (2, 3, 4, 5), (0, 5), (4, 0)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@both_kinds
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, activation, dtype):
    inputs = draw(*shape, dtype=dtype), draw(shape[-1], dtype=dtype)
    for p in (0.0, 0.4):
        parity(*inputs, p, activation=activation)


@both_kinds
@pytest.mark.parametrize("shape", [(400, 37), (1031, 16), (19, 519)], ids=str)
def test_sizes_of_several_programs_and_parts(shape, activation):
    for p in (0.0, 0.3):
        parity(draw(*shape), draw(shape[1]), p, activation=activation)


@pytest.mark.parametrize(
    ("activation", "param"),
    [("leaky_relu", 0.3), ("leaky_relu", 0.0), ("leaky_relu", -0.5), ("elu", 2.5), ("elu", -0.5)],
)
def test_param_reaches_forward_and_backward(activation, param):
    for p in (0.0, 0.4):
        parity(draw(13, 7), draw(7), p, activation=activation, param=param)


@both_kinds
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_only_some_gradients_are_wanted(p, activation):
    for wants in itertools.product([True, False], repeat=2):
        x, b = (
            t.detach().requires_grad_(w) for t, w in zip((draw(9, 5), draw(5)), wants, strict=True)
        )
        parity(x, b, p, activation=activation)
        parity(x, None, p, activation=activation)


VIEWS = {
    "transposed": lambda: torch.randn(7, 9).t(),
    "strided": lambda: torch.randn(9, 14)[:, ::2],
    "rows apart": lambda: torch.randn(18, 7)[::2],
    "permuted": lambda: torch.randn(3, 7, 5).permute(2, 0, 1).transpose(1, 2),
    "swapped": lambda: torch.randn(3, 5, 7).transpose(0, 1),
    "not aligned": lambda: torch.randn(1 + 9 * 7)[1:].view(9, 7),
}


@both_kinds
@pytest.mark.parametrize("view", VIEWS)
def test_inputs_that_are_views(view, activation):
    x = VIEWS[view]().requires_grad_()
    for p in (0.0, 0.4):
        parity(x, draw(x.shape[-1]), p, activation=activation, strides=False)


@both_kinds
@pytest.mark.parametrize("upstream", [*VIEWS, "expanded"])
def test_upstream_gradients_of_any_layout(upstream, activation):
    dy = torch.ones(()).expand(9, 7) if upstream == "expanded" else VIEWS[upstream]()
    x, b = draw(*dy.shape), draw(dy.shape[-1])
    for p in (0.0, 0.4):
        parity(x, b, p, activation=activation, upstream=dy, strides=False)


def test_a_bias_that_is_a_view():
    bias = torch.randn(14)[::2].requires_grad_()
    parity(draw(5, 7), bias, 0.4, activation="gelu")


@every_activation
def test_large_values_nan_and_infinities(activation):
    bad = [math.nan, 300.0, -300.0, 1e-8, -1e-8, 0.0, -0.0]
    if not activation.startswith("gelu"):  # torch's vectorized kernel makes inf NaN
        bad += [math.inf, -math.inf]
    x = torch.randn(6, 9)
    x[torch.arange(len(bad)) % 6, torch.arange(len(bad))] = torch.tensor(bad)
    # of a NaN's gradient torch's vectorized elu makes a NaN, its scalar one does not
    wanted = activation not in ("elu", "selu")
    parity(x.clone().requires_grad_(wanted), torch.zeros(9), activation=activation)
    parity(x, torch.zeros(9), 0.4, activation=activation)  # a dropped NaN stays one
    parity(x, torch.zeros(9), 1.0, activation=activation)


@draws_torchs_mask
@pytest.mark.cpu
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_the_generator_is_left_where_torch_leaves_it(p, training):
    shapes = [torch.randn(shape) for shape in (*SHAPES, (1001, 3))]
    for x in [*shapes, *(view() for view in VIEWS.values())]:
        b, drawn = torch.randn(x.shape[-1]), []
        for f in (ours.bias_act_dropout, theirs):
            torch.manual_seed(3)
            y = f(x, b, p, training, activation="sigmoid")
            drawn.append((y == 0, torch.get_rng_state()))
        assert torch.equal(drawn[0][0], drawn[1][0])
        assert torch.equal(drawn[0][1], drawn[1][1])


@both_kinds
def test_share_and_gradient_of_the_dropped(activation):
    x = (torch.rand(100, 300) + 1).requires_grad_()
    bias = torch.ones(300, requires_grad=True)
    y = ours.bias_act_dropout(x, bias, 0.3, activation=activation)
    for dims in ((0, 1), (0,), (1,)):  # 5 standard deviations of a binomial share
        shares = (y == 0).double().mean(dims)
        n = y.numel() // shares.numel()
        assert (shares - 0.3).abs().max() < 5 * (0.3 * 0.7 / n) ** 0.5
    assert len((y == 0).unique(dim=0)) == 100  # no two rows alike
    y.sum().backward()
    assert torch.equal(x.grad != 0, y != 0)
    slope = 1 if activation == "relu" else torch.func.vmap(torch.func.grad(F.gelu))
    u = x.detach() + 1
    expected = (y != 0) / 0.7 * (slope if activation == "relu" else slope(u.view(-1)).view(u.shape))
    torch.testing.assert_close(x.grad, expected)
    torch.testing.assert_close(bias.grad, expected.sum(0))


@pytest.mark.parametrize("p", [1e-9, 0.999999])
def test_extreme_shares(p):
    y = ours.bias_act_dropout(torch.ones(64, 64), None, p)
    assert (y == 0).float().mean().item() == pytest.approx(p, abs=1e-3)


def test_every_call_draws_anew_and_seeds_repeat():
    x = torch.ones(40, 40)
    torch.manual_seed(1)
    first, second = (ours.bias_act_dropout(x, None, 0.5) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(ours.bias_act_dropout(x, None, 0.5), first)


@both_kinds
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_draws_the_same_mask(use_reentrant, activation):
    x, b = (torch.rand(20, 30) + 1).requires_grad_(), torch.ones(30, requires_grad=True)

    def f(x, b):
        return ours.bias_act_dropout(x * 2, b, 0.5, activation=activation)

    y = checkpoint(f, x, b, use_reentrant=use_reentrant)
    y.sum().backward()
    assert torch.equal(x.grad != 0, y != 0)


@both_kinds
@pytest.mark.parametrize("forward_sees", [True, False])
def test_a_mode_around_one_of_the_passes(forward_sees, activation):
    """A kernel may run in one pass alone: the mask is the same."""
    x, b = (torch.rand(7, 5) + 1).requires_grad_(), torch.rand(5, requires_grad=True)
    with FlopCounterMode(display=False) if forward_sees else contextlib.nullcontext():
        y = ours.bias_act_dropout(x, b, 0.5, activation=activation)
    with contextlib.nullcontext() if forward_sees else FlopCounterMode(display=False):
        y.sum().backward()
    assert torch.equal(y != 0, x.grad != 0)


@every_activation
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_first_and_second_derivatives(p, activation):
    def f(x, bias):
        torch.manual_seed(0)
        return ours.bias_act_dropout(x, bias, p, activation=activation)

    inputs = draw(5, 3, dtype=torch.float64), draw(3, dtype=torch.float64)
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


@both_kinds
def test_second_derivatives_through_the_mask(activation):
    results = []
    for f in (ours.bias_act_dropout, theirs):
        torch.manual_seed(0)
        x, b = draw(6, 5), draw(5)
        y = f(x, b, 0.4, activation=activation)
        grads = torch.autograd.grad(y.square().sum(), (x, b), create_graph=True)
        results.append(torch.autograd.grad(sum(g.sin().sum() for g in grads), (x, b)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@both_kinds
def test_batched_gradients(activation):
    x, b = draw(6, 5), draw(5)
    upstream = torch.randn(4, 6, 5)
    y = ours.bias_act_dropout(x, b, 0.4, activation=activation)
    batched = torch.autograd.grad(y, (x, b), upstream, retain_graph=True, is_grads_batched=True)
    single = [torch.autograd.grad(y, (x, b), dy, retain_graph=True) for dy in upstream]
    torch.testing.assert_close(batched, tuple(map(torch.stack, zip(*single, strict=True))))


@every_activation
def test_what_backward_keeps(activation):
    """A ReLU its output alone; any other its input, and of the mask a seed or the mask."""
    x, b, kept = draw(6, 5), draw(5), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = ours.bias_act_dropout(x, b, 0.4, activation=activation)
    if activation == "relu":
        assert [t.data_ptr() for t in kept] == [y.data_ptr()]
    else:
        assert [t.data_ptr() for t in kept[:2]] == [x.data_ptr(), b.data_ptr()]
        (noise,) = kept[2:]
        expected = (torch.int64, ()) if KERNELS else (torch.bool, x.shape)
        assert (noise.dtype, noise.shape) == expected


def test_what_backward_keeps_may_not_change():
    for activation, changed in (("relu", "output"), ("gelu", "input")):
        x = draw(6, 5)
        y = ours.bias_act_dropout(x, draw(5), 0.4, activation=activation)
        with torch.no_grad():
            (y if changed == "output" else x).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_at_exactly_zero_a_relu_is_flat():
    x, b = torch.tensor([[-1.0, 1.0, 2.0]]).requires_grad_(), torch.full((3,), -1.0)
    ours.bias_act_dropout(x, b).sum().backward()
    assert x.grad.tolist() == [[0.0, 0.0, 1.0]]


def test_the_result_is_rounded_once():
    """2049.0002 lies between 2048 and 2050, and 2049 alone would be 2048."""
    x, b = torch.tensor([[2048.0]]).half(), torch.tensor([1.0002])
    assert ours.bias_act_dropout(x, b).item() == 2050.0


def test_float16_gradients_of_the_bias_are_summed_in_float32():
    x, b = torch.zeros(4096, 3).half(), torch.ones(3).half().requires_grad_()
    ours.bias_act_dropout(x, b).backward(torch.full((4096, 3), 2.0**-24).half())
    assert b.grad.tolist() == [2.0**-12] * 3


def test_half_input_with_a_float_bias():
    """In the input's type, as under autocast; torch's sum would be float32."""
    for dtype, activation in itertools.product((torch.float16, torch.bfloat16), ("relu", "gelu")):
        x, b = draw(9, 5, dtype=dtype), draw(5)
        y = ours.bias_act_dropout(x, b, activation=activation)
        dx, db = torch.autograd.grad(y, (x, b), torch.ones_like(y))
        assert (y.dtype, dx.dtype, db.dtype) == (dtype, dtype, torch.float32)
        expected = ACTIVATIONS[activation](x.float() + b)
        torch.testing.assert_close(y, expected.to(dtype))


def modules(activation="relu", param=None, p=0.0, bias=True):
    mine = nn.LinearActDropout(6, 5, bias, activation=activation, param=param, p=p)
    torchs = Composition(6, 5, bias)
    torchs.activation, torchs.param, torchs.p = activation, param, p
    return [mine, torchs]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@both_kinds
def test_modules(activation, bias, dtype):
    for p, training in ((0.0, True), (0.4, True), (0.4, False), (1.0, True)):
        pair = [m.to(dtype).train(training) for m in modules(activation, p=p, bias=bias)]
        assert_parity(*pair, draw(7, 6, dtype=dtype))
        assert_parity(*pair, draw(2, 3, 6, dtype=dtype))


def test_in_place_of_three_of_torchs_modules():
    torchs = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.GELU(), torch.nn.Dropout(0.4))
    mine = nn.LinearActDropout(6, 5, activation="gelu", p=0.4)
    mine.load_state_dict(torchs[0].state_dict())
    x = draw(7, 6)
    torch.testing.assert_close(mine.eval()(x), torchs.eval()(x))
    if not KERNELS:
        results = []
        for m in (mine.train(), torchs.train()):
            torch.manual_seed(4)
            results.append(m(x))
        torch.testing.assert_close(*results)


def test_modules_and_torchs_have_one_state():
    mine, torchs = nn.LinearActDropout(6, 5, activation="elu", param=0.7), torch.nn.Linear(6, 5)
    assert isinstance(mine, torch.nn.Linear)
    for source, target in ((torchs, mine), (mine, torch.nn.Linear(6, 5))):
        assert list(source.state_dict()) == list(target.state_dict()) == ["weight", "bias"]
        target.load_state_dict(source.state_dict())
        assert torch.equal(source.weight, target.weight)
        assert torch.equal(source.bias, target.bias)
    torch.manual_seed(0)
    a = nn.LinearActDropout(6, 5, activation="tanh", p=0.2)
    torch.manual_seed(0)
    assert torch.equal(a.weight, torch.nn.Linear(6, 5).weight)  # initialized alike


def test_a_module_that_torch_made():
    """Its class changed, it has a ReLU and drops nothing."""
    m = torch.nn.Linear(6, 5)
    twin = copy.deepcopy(m)
    m.__class__ = nn.LinearActDropout
    x = draw(4, 6)
    torch.testing.assert_close(m(x), F.relu(twin(x)))


def test_modules_are_copied_and_pickled():
    m, x = nn.LinearActDropout(6, 5, activation="leaky_relu", param=0.2, p=0.4), draw(4, 6)
    for copied in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert (copied.activation, copied.param, copied.p) == ("leaky_relu", 0.2, 0.4)
        assert torch.equal(copied.eval()(x), copy.deepcopy(m).eval()(x))


def test_repr():
    for kwargs, shown in (
        ({}, "bias=True, activation='relu', p=0.0"),
        ({"bias": False, "activation": "gelu", "p": 0.5}, "bias=False, activation='gelu', p=0.5"),
        ({"activation": "elu", "param": 2.0}, "bias=True, activation='elu', param=2.0, p=0.0"),
    ):
        expected = f"LinearActDropout(in_features=6, out_features=5, {shown})"
        assert repr(nn.LinearActDropout(6, 5, **kwargs)) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """The types of torch's modules, and numbers as near as theirs."""
    torchs = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.GELU(), torch.nn.Dropout(0.0))
    mine = nn.LinearActDropout(6, 5, activation="gelu")
    mine.load_state_dict(torchs[0].state_dict())
    x, results = draw(7, 6), []
    for m in (mine, torchs):
        with torch.autocast(x.device.type, dtype):
            y = m(x)
        results.append((y, *torch.autograd.grad(y.sum(), (x, *m.parameters()))))
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= 4 * torch.finfo(dtype).eps * b.abs().max()


def test_nothing_is_written_to():
    x, b = draw(9, 5), draw(5)
    before = x.detach().clone(), b.detach().clone()
    for p in (0.0, 0.4, 1.0):
        y = ours.bias_act_dropout(x, b, p)
        y.sum().backward()
        assert y.data_ptr() != x.data_ptr()
    assert torch.equal(x, before[0])
    assert torch.equal(b, before[1])


@both_kinds
def test_backward_twice(activation):
    x, b = draw(9, 5), draw(5)
    y, dy = ours.bias_act_dropout(x, b, 0.4, activation=activation), torch.randn(9, 5)
    first, second = (torch.autograd.grad(y, (x, b), dy, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_errors():
    x = torch.randn(4, 3)
    for p in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"^bias_act_dropout: expected `p` in \[0, 1\], got"):
            ours.bias_act_dropout(x, None, p)
        with pytest.raises(ValueError, match=r"^LinearActDropout: expected `p` in \[0, 1\], got"):
            nn.LinearActDropout(3, 4, p=p)
    for bias in (torch.ones(4), torch.ones(1), torch.ones(1, 3)):  # torch would broadcast two
        shape = str(tuple(bias.shape)).replace("(", r"\(").replace(")", r"\)")
        with pytest.raises(RuntimeError, match=rf"`bias` of shape \(3,\) .*\(4, 3\), got {shape}"):
            ours.bias_act_dropout(x, bias)
    for kwargs, match in [
        ({"activation": "swish"}, "one of relu, leaky_relu, .* silu, got 'swish'"),
        ({"param": 0.1}, r"relu has no `param`, got 0.1"),
    ]:
        with pytest.raises(ValueError, match=f"^bias_act_dropout: .*{match}"):
            ours.bias_act_dropout(x, **kwargs)
        with pytest.raises(ValueError, match=f"^LinearActDropout: .*{match}"):
            nn.LinearActDropout(3, 4, **kwargs)
    with pytest.raises(NotImplementedError, match=r"bias_act_dropout: .*`input`, got torch.int64"):
        ours.bias_act_dropout(x.long())

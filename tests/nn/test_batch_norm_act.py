import copy
import itertools
import math
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import torchref.nn as nn
import torchref.nn.functional as ours
from torchref.testing import assert_parity

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LAST = torch.channels_last
NO_EPS = 1e-12  # beside a variance of 1; torch 2.11 refuses 0
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
train_and_eval = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
alone_and_added = pytest.mark.parametrize("added", [False, True], ids=["alone", "residual"])
# Of a ReLU after a residual backward reads the output, of all else what the activation saw.
both_kinds = pytest.mark.parametrize("activation", ["relu", "silu"])


def theirs(*args, activation="relu", param=None, residual=None, **kwargs):
    """The same in torch's pieces."""
    y = F.batch_norm(*args, **kwargs)
    y = y if residual is None else y + residual
    return ACTIVATIONS[activation](y, *(() if param is None else (param,)))


class Composition:
    """A module of torch's that computes the same."""

    activation, param = "relu", None

    def forward(self, input, residual=None):
        y = super().forward(input)
        y = y if residual is None else y + residual
        return ACTIVATIONS[self.activation](y, *(() if self.param is None else (self.param,)))


COMPOSITIONS = {
    name: type(name, (Composition, getattr(torch.nn, name)), {})
    for name in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")
}


def modules(dims: int, activation="relu", param=None, channels=5, **kwargs):
    """Ours and torch's pieces, with running statistics and parameters that are not the identity."""
    mine = getattr(nn, f"BatchNormAct{dims}d")(
        channels, activation=activation, param=param, **kwargs
    )
    torchs = COMPOSITIONS[f"BatchNorm{dims}d"](channels, **kwargs)
    torchs.activation, torchs.param = activation, param
    for key, tensor in torchs.state_dict().items():
        if key != "num_batches_tracked":
            tensor.copy_(torch.rand(tensor.shape) + (0.5 if key != "bias" else -0.5))
    return [mine, torchs]


def draw(*shape: int, dtype=torch.float32, scale=2.0, mean=1.0):
    return (torch.randn(shape) * scale + mean).to(dtype).requires_grad_()


def channels(n: int, dtype=torch.float32, offset=0.5):
    return (torch.rand(n) + offset).to(dtype).requires_grad_()


def laid_out(x: torch.Tensor, memory_format) -> torch.Tensor:
    return x.detach().contiguous(memory_format=memory_format).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@train_and_eval
@alone_and_added
@every_activation
def test_values_gradients_and_buffers(activation, added, training, dtype):
    pair = [m.to(dtype).train(training) for m in modules(1, activation)]
    residual = (draw(7, 5, dtype=dtype, mean=0.0),) if added else ()
    assert_parity(*pair, draw(7, 5, dtype=dtype), *residual)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@alone_and_added
@every_activation
def test_half_types(activation, added, dtype):
    # either way of running through every activation, in one type or the other
    training = added == (dtype == torch.float16)
    pair = [m.to(dtype).train(training) for m in modules(1, activation)]
    residual = (draw(7, 5, dtype=dtype, mean=0.0),) if added else ()
    assert_parity(*pair, draw(7, 5, dtype=dtype), *residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@train_and_eval
@pytest.mark.parametrize("shape", [(3, 5, 11), (2, 5, 3, 7), (2, 5, 3, 2, 3)], ids=str)
def test_shapes(shape, training, dtype):
    dims = max(len(shape) - 2, 1)
    pair = [m.to(dtype).train(training) for m in modules(dims, "silu")]
    assert_parity(*pair, draw(*shape, dtype=dtype), draw(*shape, dtype=dtype))


@train_and_eval
@pytest.mark.parametrize(
    ("activation", "param"),
    [("leaky_relu", 0.3), ("leaky_relu", 0.0), ("leaky_relu", -0.5), ("elu", 2.5), ("elu", -0.5)],
)
def test_param_reaches_forward_and_backward(activation, param, training):
    pair = [m.train(training) for m in modules(2, activation, param)]
    x, residual = draw(2, 5, 3, 7), draw(2, 5, 3, 7)
    assert_parity(*pair, x)
    assert_parity(*pair, x, residual)


@train_and_eval
@pytest.mark.parametrize(
    "kwargs",
    [
        {"momentum": None},
        {"momentum": 0.0},
        {"momentum": 1.0},
        {"track_running_stats": False},
        {"affine": False},
        {"affine": False, "track_running_stats": False},
        {"eps": 0.1},
    ],
    ids=str,
)
def test_arguments(kwargs, training):
    pair = [m.train(training) for m in modules(2, "silu", **kwargs)]
    assert_parity(*pair, draw(2, 5, 3, 7), draw(2, 5, 3, 7))


@train_and_eval
@both_kinds
@alone_and_added
def test_weight_or_bias_alone(added, activation, training):
    for weighted, biased in ((True, False), (False, True)):
        residual = draw(6, 3) if added else None
        assert_parity(
            *(ours.batch_norm_act, theirs),
            *(draw(6, 3), torch.rand(3), torch.rand(3) + 0.5),
            *(channels(3) if weighted else None, channels(3) if biased else None, training),
            activation=activation,
            residual=residual,
        )


@train_and_eval
@both_kinds
@pytest.mark.parametrize("layouts", ["last-first", "first-last", "last-last", "transposed"])
def test_layouts_of_input_and_residual(layouts, activation, training):
    pair = [m.train(training) for m in modules(2, activation, channels=3)]
    x, residual = draw(4, 3, 5, 5), draw(4, 3, 5, 5)
    if layouts.startswith("last"):
        x = laid_out(x, LAST)
    if layouts.endswith("last"):
        residual = laid_out(residual, LAST)
    if layouts == "transposed":
        residual = residual.detach().mT.requires_grad_()
    assert_parity(*pair, x, residual)


@train_and_eval
@both_kinds
@pytest.mark.parametrize(
    "view",
    [lambda x: x[..., ::2], lambda x: x.transpose(2, 3), lambda x: x[:, :1].expand(x.shape)],
    ids=["strided", "transposed", "expanded"],
)
def test_inputs_that_are_views(view, activation, training):
    # torch makes the result of such an input contiguous, ours keeps the order of dimensions
    x, residual = (view(torch.randn(4, 3, 6, 8)) for _ in range(2))
    pair = [m.train(training) for m in modules(2, activation, channels=3)]
    overlaps = 0 in x.stride()  # what is in it afterwards is no leaf's business
    x, residual = (t if overlaps else t.requires_grad_() for t in (x, residual))
    assert_parity(*pair, x, residual, strides=False)


@both_kinds
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST], ids=str)
@pytest.mark.parametrize("layout", ["expanded", "transposed", "channels_last"])
def test_upstream_gradients_of_any_layout(layout, memory_format, activation):
    upstream = {
        "expanded": torch.ones(()).expand(4, 3, 5, 5),
        "transposed": torch.randn(4, 3, 5, 5).mT,
        "channels_last": torch.randn(4, 3, 5, 5).contiguous(memory_format=LAST),
    }[layout]
    x, residual = (laid_out(draw(4, 3, 5, 5), memory_format) for _ in range(2))
    assert_parity(*modules(2, activation, channels=3), x, residual, upstream=upstream)


def test_the_result_has_the_input_s_memory_format():
    for first, second in itertools.product((torch.contiguous_format, LAST), repeat=2):
        x, residual = laid_out(draw(4, 3, 5, 6), first), laid_out(draw(4, 3, 5, 6), second)
        for training in (True, False):
            y = nn.BatchNormAct2d(3).train(training)(x, residual)
            assert y.is_contiguous(memory_format=first)


@train_and_eval
@both_kinds
@alone_and_added
def test_only_some_gradients_are_wanted(added, activation, training):
    running = torch.rand(3), torch.rand(3) + 0.5
    tensors = [draw(6, 3), channels(3), channels(3), *([draw(6, 3)] if added else [])]
    dy = torch.randn(6, 3)

    def call(f, x, weight, bias, residual=None):
        kwargs = {"activation": activation, "residual": residual}
        return f(x, *(t.clone() for t in running), weight, bias, training, **kwargs)

    every = torch.autograd.grad(call(theirs, *tensors), tensors, dy)
    for wants in itertools.product([True, False], repeat=len(tensors)):
        given = [t.detach().requires_grad_(w) for t, w in zip(tensors, wants, strict=True)]
        y = call(ours.batch_norm_act, *given)
        assert y.requires_grad == any(wants)
        if any(wants):
            y.backward(dy)
        for t, wanted, expected in zip(given, wants, every, strict=True):
            torch.testing.assert_close(t.grad, expected if wanted else None)


@train_and_eval
@both_kinds
def test_the_residual_may_be_the_input(activation, training):
    def twice(f):
        return lambda x, *running: f(
            x, *running, training=training, activation=activation, residual=x
        )

    assert_parity(
        twice(ours.batch_norm_act), twice(theirs), draw(6, 3), torch.rand(3), torch.rand(3) + 0.5
    )


@train_and_eval
@alone_and_added
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (4, 3, 0), (1, 3, 0)], ids=str)
def test_an_empty_batch_leaves_the_statistics(shape, added, training):
    pair = [m.train(training) for m in modules(1, channels=3)]
    inputs = [torch.empty(shape, requires_grad=True) for _ in range(2 if added else 1)]
    assert_parity(*pair, *inputs)


@train_and_eval
@every_activation
def test_nan_and_infinities_stay(activation, training):
    bad = [math.nan, math.inf, -math.inf]
    if activation.startswith("gelu"):  # torch's vectorized kernel makes inf NaN, its scalar one not
        bad = [math.nan] * 3
    x, residual = torch.randn(6, 5), torch.randn(6, 5)
    x[torch.arange(3), torch.arange(3)] = torch.tensor(bad)
    residual[torch.arange(3) + 2, torch.arange(3) + 1] = torch.tensor(bad)
    # a mean of infinities is one or NaN, as the order of the sum has it
    pair = [m.train(training) for m in modules(1, activation, track_running_stats=not training)]
    assert_parity(*pair, x.clone().requires_grad_())
    assert_parity(*pair, x.requires_grad_(), residual.requires_grad_())


@alone_and_added
@pytest.mark.parametrize("mean", [1e2, 1e4])
def test_large_mean(mean, added):
    """E[x^2] - E[x]^2 would lose everything at 1e4."""
    inputs = [draw(1000, 3, scale=1.0, mean=mean)] + [draw(1000, 3)] * added
    assert_parity(*modules(1, "silu", channels=3), *inputs)


def test_half_input_with_float_parameters():
    # an upstream gradient that is half: rounded for one and not for the truth, it would hide much
    upstream = torch.randn(6, 3, 4, 4).bfloat16()
    for activation, training, added in itertools.product(
        ("relu", "silu"), (True, False), (True, False)
    ):
        inputs = draw(6, 3, 4, 4, dtype=torch.bfloat16), torch.rand(3), torch.rand(3) + 0.5
        residual = draw(6, 3, 4, 4, dtype=torch.bfloat16) if added else None
        parameters = channels(3), channels(3), training
        kwargs = {"activation": activation, "residual": residual, "upstream": upstream}
        assert_parity(ours.batch_norm_act, theirs, *inputs, *parameters, **kwargs)


def test_the_sum_is_rounded_once():
    """Between the normalization, the residual and the activation nothing is rounded."""
    x, residual = torch.tensor([[1.0]]).half(), torch.tensor([[2048.0]]).half()
    running, parameters = (torch.zeros(1), torch.ones(1)), (torch.ones(1), torch.full((1,), 2e-4))
    # 2049.0002 lies between 2048 and 2050; 1.0002 alone is 1, and 2049 would be 2048
    for f, expected in ((ours.batch_norm_act, 2050.0), (theirs, 2048.0)):
        y = f(x, *running, *parameters, eps=NO_EPS, residual=residual)
        assert y.item() == expected


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_over_many_batches(momentum):
    pair = [m.double() for m in modules(1, channels=3, momentum=momentum)]
    pair[0].load_state_dict(pair[1].state_dict())
    for _ in range(8):
        x, residual = (torch.randn(8, 3, dtype=torch.float64) for _ in range(2))
        for m in pair:
            m(x, residual)
    assert pair[0].num_batches_tracked == 8
    for mine, torchs in zip(pair[0].buffers(), pair[1].buffers(), strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-13, atol=0)


def test_the_courses_running_variance():
    m = nn.BatchNormAct1d(3, momentum=1 - 0.9, unbiased_running_var=False)
    x = torch.randn(10, 3)
    m(x, torch.randn(10, 3))
    torch.testing.assert_close(m.running_mean, 0.1 * x.mean(0))
    torch.testing.assert_close(m.running_var, 0.9 + 0.1 * x.var(0, correction=0))
    assert "unbiased_running_var=False, activation='relu'" in repr(m)


@alone_and_added
@train_and_eval
def test_at_exactly_zero_a_relu_is_flat(training, added):
    """Of a column -1, 0, 1 the mean is 0, and so are the middle and its gradient."""
    x = torch.tensor([[-1.0], [0.0], [1.0]], requires_grad=True)
    bias = torch.zeros(1, requires_grad=True)
    residual = torch.tensor([[1.0], [-0.0], [1.0]], requires_grad=True) if added else None
    running, eps = (None, 1e-5) if training else (torch.zeros(1), 0.0)
    spread = None if training else torch.ones(1)
    kwargs = {"training": training, "eps": eps, "residual": residual}
    y = ours.batch_norm_act(x, running, spread, None, bias, **kwargs)
    y.sum().backward()
    # beside a residual the first is 0 as well, -1 + 1, in evaluation; in training -1.22 + 1
    assert (y > 0).flatten().tolist() == [False, False, True]
    assert bias.grad.tolist() == [1.0]
    if residual is not None:
        assert residual.grad.flatten().tolist() == [0.0, 0.0, 1.0]
    if not training:
        assert x.grad.flatten().tolist() == [0.0, 0.0, 1.0]


def test_the_mask_of_a_relu_after_a_residual_is_the_outputs():
    """A sum that the output's type rounds to 0 passes nothing, as in torch."""
    x = torch.tensor([[2.0**-7], [1.0]]).half().requires_grad_()
    bias = torch.full((1,), 2.0**-30)  # float16 has nothing below 2**-24
    residual = (-x.detach()).requires_grad_()
    for f in (ours.batch_norm_act, theirs):
        y = f(x, torch.zeros(1), torch.ones(1), torch.ones(1), bias, eps=NO_EPS, residual=residual)
        assert y.tolist() == [[0.0], [0.0]]
        gradients = torch.autograd.grad(y.sum(), (x, residual))
        assert [g.tolist() for g in gradients] == [[[0.0], [0.0]]] * 2


@pytest.mark.parametrize("activation", ["relu", "silu", "tanh"])
def test_what_backward_keeps(activation):
    x, residual = draw(6, 3), draw(6, 3)
    for training, added in itertools.product((True, False), repeat=2):
        kept = []
        m = nn.BatchNormAct1d(3, activation=activation).train(training)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: (kept.append(t.data_ptr()), t)[1], lambda t: t
        ):
            y = m(x, residual if added else None)
        large = {t.data_ptr() for t in (x, residual, y)} & set(kept)
        after = y if activation == "relu" else residual
        assert large == {x.data_ptr(), after.data_ptr()} if added else {x.data_ptr()}


def test_what_backward_keeps_may_not_change():
    for activation, changed in (("relu", "output"), ("silu", "residual")):
        x, residual = draw(6, 3), draw(6, 3)
        y = nn.BatchNormAct1d(3, activation=activation)(x, residual)
        with torch.no_grad():
            (y if changed == "output" else residual).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_a_relu_leaves_the_residual_free():
    x, residual = draw(6, 3), draw(6, 3)
    results = []
    for change in (0, 7):
        added = residual.detach().clone()
        y = nn.BatchNormAct1d(3)(x, added)
        added.add_(change)
        results.append(torch.autograd.grad(y.square().sum(), x)[0])
    assert torch.equal(*results)


@train_and_eval
@both_kinds
def test_backward_twice(activation, training):
    m = nn.BatchNormAct1d(3, activation=activation).train(training)
    inputs = draw(6, 3), draw(6, 3), *m.parameters()
    y, dy = m(*inputs[:2]), torch.randn(6, 3)
    before = dy.clone()
    first, second = (torch.autograd.grad(y, inputs, dy, retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(dy, before)


@alone_and_added
@train_and_eval
@every_activation
def test_first_and_second_derivatives(activation, training, added):
    tensors = [t.double().detach().requires_grad_() for t in (draw(5, 2), channels(2), channels(2))]
    if added:
        tensors.append(draw(5, 2, dtype=torch.float64))
    running = (
        (torch.rand(2).double(), torch.rand(2).double() + 0.5) if not training else (None,) * 2
    )

    def f(x, weight, bias, residual=None):
        return ours.batch_norm_act(
            *(x, *running, weight, bias, training), activation=activation, residual=residual
        )

    assert torch.autograd.gradcheck(f, tensors)
    assert torch.autograd.gradgradcheck(f, tensors)


def test_autocast_leaves_the_types():
    """As torch's batch_norm does: what a convolution made half stays half."""
    upstream = torch.randn(2, 3, 4, 4).bfloat16()
    for training, dtype in itertools.product((True, False), (torch.bfloat16, torch.float32)):
        pair = [m.train(training) for m in modules(2, "silu", channels=3)]
        inputs = [draw(2, 3, 4, 4, dtype=dtype) for _ in range(2)]
        with torch.autocast("cpu", torch.bfloat16):
            assert_parity(*pair, *inputs, upstream=upstream)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_modules_and_torchs_have_one_state(dims):
    torchs = getattr(torch.nn, f"BatchNorm{dims}d")
    mine = getattr(nn, f"BatchNormAct{dims}d")(5, activation="elu", param=0.7)
    assert isinstance(mine, torchs)
    assert isinstance(mine, getattr(nn, f"BatchNorm{dims}d"))
    other = torchs(5)
    for tensor in other.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape) * 9)
    for source, target in ((other, mine), (mine, torchs(5))):
        assert list(source.state_dict()) == list(target.state_dict())
        target.load_state_dict(source.state_dict())
        for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True):
            assert torch.equal(a, b)


def test_modules_are_copied_and_pickled():
    m = nn.BatchNormAct2d(3, activation="leaky_relu", param=0.2, unbiased_running_var=False)
    m(draw(2, 3, 4, 4))
    x = draw(2, 3, 4, 4)
    for copied in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert (copied.activation, copied.param, copied.unbiased_running_var) == (
            "leaky_relu",
            0.2,
            False,
        )
        assert torch.equal(copied.eval()(x), copy.deepcopy(m).eval()(x))


def test_repr():
    for dims, kwargs, shown in (
        (1, {}, "activation='relu'"),
        (2, {"activation": "gelu_tanh"}, "activation='gelu_tanh'"),
        (3, {"activation": "elu", "param": 2}, "activation='elu', param=2"),
    ):
        plain = repr(getattr(torch.nn, f"BatchNorm{dims}d")(3))
        expected = plain.replace("BatchNorm", "BatchNormAct")[:-1] + f", {shown})"
        assert repr(getattr(nn, f"BatchNormAct{dims}d")(3, **kwargs)) == expected


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_module_that_torch_made(dims):
    """Its class changed, it has torch's options and a ReLU."""
    shape = (4, 3, *[2] * dims)
    m = getattr(torch.nn, f"BatchNorm{dims}d")(3)
    twin = copy.deepcopy(m)
    m.__class__ = getattr(nn, f"BatchNormAct{dims}d")
    x, residual = draw(*shape), draw(*shape)
    torch.testing.assert_close(m(x, residual), F.relu(twin(x) + residual))
    torch.testing.assert_close(m.running_var, twin.running_var)


def test_errors():
    x = torch.randn(4, 3)
    zeros, ones = torch.zeros(3), torch.ones(3)
    for args, kwargs, error, match in [
        ((x[:1], None, None), {"training": True}, ValueError, r"more than 1 value.*\(1, 3\)"),
        ((x, zeros, ones, ones[:2]), {}, RuntimeError, r"`weight` of shape \(3,\), got \(2,\)"),
        ((x, zeros, ones, None, ones[:2]), {}, RuntimeError, r"`bias` of shape \(3,\)"),
        ((x, zeros[:2], ones), {}, RuntimeError, r"`running_mean` of shape \(3,\)"),
        ((x, None, None), {}, RuntimeError, "`running_mean` at inference"),
        ((x, zeros, None), {"training": True}, ValueError, "both `running_mean` and"),
        ((x, zeros, ones), {"eps": -1.0}, ValueError, "`eps`, got -1.0"),
        ((x, zeros, ones), {"eps": 0.0, "training": True}, ValueError, "`eps`, got 0.0"),
    ]:
        with pytest.raises(error, match=f"^batch_norm_act: .*{match}"):
            ours.batch_norm_act(*args, **kwargs)
        with pytest.raises(error):
            theirs(*args, **kwargs)
    with pytest.raises(ValueError, match=r"batch_norm_act: .*`input` of shape .*, got \(3,\)"):
        ours.batch_norm_act(zeros, zeros, ones)
    with pytest.raises(NotImplementedError, match=r"batch_norm_act: .*int64"):
        ours.batch_norm_act(x.long(), zeros, ones)
    with pytest.raises(ValueError, match=r"BatchNormAct2d: expected 4D `input`, got .*\(8, 32\)"):
        nn.BatchNormAct2d(32)(torch.randn(8, 32))


def test_errors_of_what_follows():
    x = torch.randn(4, 3)
    call = partial(ours.batch_norm_act, x, torch.zeros(3), torch.ones(3))
    for kwargs, match in [
        ({"residual": x[:2]}, r"`residual` of shape \(4, 3\) .* got \(2, 3\) and torch.float32"),
        ({"residual": x[:1]}, r"`residual` of shape \(4, 3\)"),  # torch would broadcast
        ({"residual": x.half()}, r"type torch.float32, got \(4, 3\) and torch.float16"),
        ({"activation": "swish"}, "one of relu, leaky_relu, .* silu, got 'swish'"),
        ({"param": 0.1}, r"relu has no `param`, got 0.1"),
        ({"activation": "silu", "param": 0.0}, r"silu has no `param`, got 0.0"),
    ]:
        for training in (True, False):
            with pytest.raises(ValueError, match=f"^batch_norm_act: .*{match}"):
                call(training=training, **kwargs)
    for kwargs, match in [
        ({"activation": "softplus"}, "`activation` to be one of relu, .*, got 'softplus'"),
        ({"activation": "gelu", "param": 1.0}, "gelu has no `param`, got 1.0"),
    ]:
        with pytest.raises(ValueError, match=f"^BatchNormAct3d: .*{match}"):
            nn.BatchNormAct3d(3, **kwargs)

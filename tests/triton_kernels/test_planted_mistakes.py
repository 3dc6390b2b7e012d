"""The tests of the kernels find what is wrong: mistakes planted in every kernel, each caught.

A mistake is a change to the text of one file. The kernels are copied with it, the pieces run
through the copy between guards, and a check, which is what a test of the real kernels asserts,
must fail that the unchanged kernels pass. Most mistakes were found in other kernel libraries.

Not planted: offsets of 32 bits, wrong from 2**31 elements on, which test_offsets.py looks for.
"""

import importlib
import importlib.util
import inspect
import math
import os
import shutil
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as theirs

import torchref.nn.functional as ours
from torchref import dispatch
from torchref.nn import bias_act_dropout as formulas
from torchref.testing import assert_parity

if os.environ.get("TRITON_INTERPRET") != "1" or dispatch.get_backend() != "triton":
    pytest.skip(
        "waits for a process with TRITON_INTERPRET=1 TORCHREF_BACKEND=triton",
        allow_module_level=True,
    )

import test_multi_tensor as steps
import triton.language as tl
from kernel_guards import guarded

import torchref.triton_kernels
from torchref.optim import _one_launch

KERNELS = Path(torchref.triton_kernels.__file__).parent
NAN, INF = math.nan, math.inf
HALF = torch.float16
LAST = torch.channels_last

# Sizes in the kernels' files, made small, so that few numbers take several programs. A program that
# forgets its mask then writes no further than the guards.
BLOCKS = {"BYTES": 64}
LOOP = {"WIDEST_FWD": 16, "WIDEST_BWD": 16, "LOOP_COLS": 1}  # 16 or 32 columns a step
TABLES = {"CHUNK": tl.constexpr(32), "BLOCK": tl.constexpr(16)}
TILES = {"TILE": 64}  # four rows of up to 16 columns
SPLIT = {"SHARE_BYTES": 256, "STATS_TILE": 64, "SUMS_TILE": 64, "MAP_BYTES": 256}


drawn: Counter[tuple[int, ...]] = Counter()


def numbers(*shape: int, dtype=torch.float32, scale: float = 1.0, mean: float = 0.0):
    # Each call has a seed of its own: a mistake more or less gives the others no other numbers.
    drawn[shape] += 1
    generator = torch.Generator().manual_seed(math.prod(shape) + 10_000 * drawn[shape])
    x = torch.randn(shape, generator=generator)
    return (x * scale + mean).to(dtype).requires_grad_()


def values(*xs: float, dtype=torch.float32):
    return torch.tensor(xs, dtype=dtype).requires_grad_()


def parity(name: str, *inputs: Any, **kwargs: Any):
    return partial(assert_parity, getattr(ours, name), getattr(theirs, name), *inputs, **kwargs)


def inplace(name: str, x: torch.Tensor, view=lambda y: y):
    """In place, on an intermediate result or on a view of one."""

    def call(library):
        return lambda x: (y := x * 1, getattr(library, name)(view(y), inplace=True))[0]

    return partial(assert_parity, call(ours), call(theirs), x)


def launcher(module: str, name: str):
    return dispatch.find_kernel(module, name)


# What the tests of activations assert.
RAMP = torch.cat([torch.linspace(-12, 12, 34), torch.tensor([0.0, -0.0, 20.5])]).requires_grad_()
SPREAD = values(*[s * x for x in (1e-8, 1e-3, 1.0, 10.0, 80.0, 300.0) for s in (1, -1)], 0.0, 5.0)
TINY = values(1e-8, -1e-8, 1e-30, -1e-30)
NOT_FINITE = values(NAN, INF, -INF, 1.0)
NHWC = numbers(2, 3, 4, 5).detach().contiguous(memory_format=LAST).requires_grad_()


def large_softplus():
    """Torch overflows there too, above its default threshold."""
    assert ours.softplus(torch.tensor([100.0]), threshold=1e9) == 100


EXPANDED = torch.ones(()).expand(3, 5)


# What the tests of softmax and cross-entropy assert.
def rows(*shape: int, **kwargs: Any):
    return numbers(*shape, scale=3.0, **kwargs)


def indices(x: torch.Tensor, ignored: int | None = -100):
    target = torch.randint(0, x.shape[1], (x.shape[0], *x.shape[2:]))
    if ignored is not None:
        target.view(-1)[::3] = ignored
    return target


def entropy(x: torch.Tensor, target=None, ignored: int | None = -100, name="cross_entropy", **kw):
    target = indices(x, ignored) if target is None else target
    return parity(name, x, target, strides=False, **kw)


def probable(*shape: int, mean: float = 0.0, **kwargs: Any):
    target = numbers(*shape).softmax(1).detach().requires_grad_()
    return parity("cross_entropy", numbers(*shape, mean=mean), target, strides=False, **kwargs)


WEIGHT = torch.rand(7) + 0.5
BATCH = numbers(13, 7)
LOW = torch.full((3, 7), -200.0, requires_grad=True)
WIDE, LOW_WIDE = rows(3, 77), torch.full((3, 77), -200.0, requires_grad=True)
MINUS_INF_FIRST = torch.cat([torch.full((3, 1), -INF), torch.randn(3, 76)], 1)
LATE = torch.cat([torch.full((2, 40), -INF), torch.randn(2, 37)], 1)  # finite from column 40 on


def softmax_keeps_the_layout():
    """Torch's result is always contiguous."""
    assert ours.softmax(NHWC, 1).stride() == NHWC.stride()


def nan_in_an_ignored_row():
    for name, smoothing in (("cross_entropy", 0.0), ("cross_entropy", 0.1), ("nll_loss", None)):
        x = torch.tensor([[NAN, 1.0], [0.0, 1.0]], requires_grad=True)
        kwargs = {} if smoothing is None else {"label_smoothing": smoothing}
        loss = getattr(ours, name)(x, torch.tensor([-100, 0]), **kwargs)
        loss.backward()
        assert loss.isfinite()
        assert x.grad[0].tolist() == [0.0, 0.0]


def logits_survive():
    x = numbers(5, 4)
    before = x.detach().clone()
    loss = ours.cross_entropy(x, torch.tensor([0, 1, 2, 3, 0]))
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(x, before)
    (second,) = torch.autograd.grad(loss + x.square().sum(), x)
    torch.testing.assert_close(second, first + 2 * x.detach())


def fp16_gradients_survive():
    """As many zeros as the truth, rounded, has."""
    x = numbers(16, 300, dtype=HALF, scale=8.0)
    target = torch.randint(0, 300, (16,))
    zeros = []
    for dtype, f in ((HALF, ours), (torch.float64, theirs)):
        y = x.detach().to(dtype).requires_grad_()
        (f.cross_entropy(y, target) * 32768.0).backward()
        zeros.append((y.grad.half() == 0).float().mean().item())
    assert zeros[0] == pytest.approx(zeros[1], abs=0.01)


def target_out_of_range():
    """A kernel cannot raise: loss and gradient are NaN, and no address is formed."""
    x, target = torch.randn(3, 5), torch.tensor([0, 5, 2])
    loss, *saved = launcher("cross_entropy", "cross_entropy_fwd")(
        x, target, None, "none", -100, None
    )
    assert loss.isnan().tolist() == [False, True, False]
    backward = launcher("cross_entropy", "cross_entropy_bwd")
    dx = backward(torch.ones(3), x, target, None, *saved, "none", -100, None)
    assert dx.isnan().any(1).tolist() == [False, True, False]


def many_partial_losses():
    partial_sums = torch.rand(1500, 2, dtype=torch.float64)
    loss, total = torch.empty(()), torch.empty(())
    launcher("cross_entropy", "_add_up")(partial_sums, loss, total, "mean")
    expected = partial_sums.sum(0)
    torch.testing.assert_close(loss.double(), expected[0] / expected[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(total.double(), expected[1], rtol=1e-6, atol=0)


def once(x: torch.Tensor, target=None, factor: float = 1.0, **kwargs: Any):
    """The gradient made in forward."""
    target = indices(x) if target is None else target
    mine = partial(ours.cross_entropy, gradient_in_forward=True)
    pair = [lambda *a, f=f, **kw: f(*a, **kw) * factor for f in (mine, theirs.cross_entropy)]
    return partial(assert_parity, *pair, x, target, strides=False, **kwargs)


def chunk(x: torch.Tensor, weight=None, smoothing: float | None = None):
    """Scores that become their own gradient."""
    target, scores = indices(x), x.detach().double().requires_grad_()

    def check():
        mine = x.detach().clone()
        losses = launcher("linear_cross_entropy", "losses_fwd")(
            mine, target, weight, -100, smoothing, True
        )
        options = {"label_smoothing": smoothing or 0.0, "reduction": "none"}
        weights = None if weight is None else weight.double()
        expected = theirs.cross_entropy(scores, target, weights, **options)
        (dx,) = torch.autograd.grad(expected.sum(), scores)
        for result, truth in ((losses, expected), (mine, dx)):
            torch.testing.assert_close(result.double(), truth, rtol=1e-5, atol=1e-6)

    return check


def nan_in_an_ignored_row_once():
    for smoothing in (0.0, 0.1):
        x = torch.tensor([[NAN, 1.0], [0.0, 1.0]], requires_grad=True)
        kwargs = {"label_smoothing": smoothing, "gradient_in_forward": True}
        loss = ours.cross_entropy(x, torch.tensor([-100, 0]), **kwargs)
        loss.backward()
        assert loss.isfinite()
        assert x.grad[0].tolist() == [0.0, 0.0]


def target_out_of_range_once():
    scores = torch.randn(3, 5)
    losses = launcher("linear_cross_entropy", "losses_fwd")(
        scores, torch.tensor([0, 5, 2]), None, -100, None, True
    )
    assert losses.isnan().tolist() == [False, True, False]
    assert scores.isnan().any(1).tolist() == [False, True, False]


def losses_alone_leave_the_scores():
    scores = torch.randn(3, 5)
    before, losses = scores.clone(), launcher("linear_cross_entropy", "losses_fwd")
    losses(scores, torch.tensor([0, 4, 2]), None, -100, None, False)
    assert torch.equal(scores, before)


# What the tests of losses assert.
BCE, LOGITS = "binary_cross_entropy", "binary_cross_entropy_with_logits"
PAIR = numbers(37), numbers(37)
UNIT = tuple(t.detach().sigmoid().requires_grad_() for t in PAIR)
FACTOR = torch.rand(37) + 0.5
TRANSPOSED = numbers(5, 3).detach().t().requires_grad_()


def distance(name: str, *pair: torch.Tensor, reduction="mean", **kwargs: Any):
    return parity(name, *(pair or PAIR), reduction=reduction, **kwargs)


def small_fp16_gradients_survive():
    """They are rounded once, after the loss scale; torch's own are not."""
    x, target = ((torch.rand(37) * 1e-4).half().requires_grad_() for _ in range(2))
    (ours.mse_loss(x, target) * 32768.0).backward()
    expected = 32768.0 * 2 / 37 * (x - target).detach().double()
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-3, atol=0)


def total_of(*terms: float, repeat: int = 1):
    def check():
        x = torch.tensor(terms).repeat(repeat)
        y = launcher("_sums", "total")(x, x)
        torch.testing.assert_close(y.double(), x.double().sum(), rtol=1e-6, atol=0)

    return check


def bias_gradient(count: int, features: int = 5, dtype=torch.float32, upstream=None):
    x, weight = torch.randn(count, 3).to(dtype), torch.randn(features, 3).to(dtype)
    return parity("linear", x, weight, numbers(features, dtype=dtype), upstream=upstream)


# What the tests of dropout assert.
def dropped(p: float = 0.3, scale_at: str = "training", n: int = 1010):
    """Share, values, and a gradient that passes where a value did."""

    def check():
        torch.manual_seed(0)
        x = torch.ones(n, requires_grad=True)
        y = ours.dropout(x, p, scale_at=scale_at)
        y.backward(torch.ones(n))
        scale = 1 / (1 - p) if scale_at == "training" else 1.0
        assert set(y.unique().tolist()) == {0.0, torch.tensor(scale).item()}
        assert (y == 0).float().mean().item() == pytest.approx(p, abs=0.075)  # 5 deviations
        assert torch.equal(x.grad, y.detach())

    return check


def every_bit_of_the_seed_counts():
    bits = (0, 1, 15, 17, 33, 50, 62)
    backward = launcher("dropout", "seeded_dropout_bwd")
    masks = [backward(torch.ones(64), torch.tensor(1 << bit), 0.5, 0.5, (1,)) for bit in bits]
    assert len({tuple(mask.tolist()) for mask in masks}) == len(bits)


def no_part_of_the_mask_repeats(n: int = 2048):
    torch.manual_seed(0)
    kept = ours.dropout(torch.ones(n), 0.5) != 0
    for lag in range(1, n // 2):
        alike = (kept[lag:] == kept[:-lag]).float().mean().item()
        assert abs(alike - 0.5) < 6 * 0.5 / (n - lag) ** 0.5, lag


def dropped_nan_stays():
    for n in (64, 5):  # a whole block, and one with a mask
        assert ours.dropout(torch.full((n,), NAN), 0.5).isnan().all()


def dropout_keeps_the_layout():
    assert ours.dropout(NHWC).stride() == NHWC.stride()


def dropout_leaves_its_input():
    x = torch.ones(64)
    assert ours.dropout(x) is not x
    assert torch.equal(x, torch.ones(64))


# What the tests of bias_act_dropout assert.
def biased(*shape: int, activation: str = "gelu", p: float = 0.0, bias=None, **kwargs: Any):
    """Torch's pieces, with the mask that the formula makes of the seed."""
    bias = numbers(shape[1]) if bias is None else bias

    def composed(x, bias):
        y = getattr(theirs, activation)(x + bias)
        if p == 0:
            return y
        kept = formulas._mask(torch.randint(2**63 - 1, ()), y, p)
        return y * (kept.to(y.dtype) / (1 - p))

    mine = partial(ours.bias_act_dropout, p=p, activation=activation)
    return partial(assert_parity, mine, composed, numbers(*shape), bias, **kwargs)


def dropped_nan_stays_after_a_bias():
    x = torch.full((20, 7), NAN)
    assert ours.bias_act_dropout(x, torch.ones(7), 0.5, activation="gelu").isnan().all()


# What the tests of batch normalization assert.
def norm(x: torch.Tensor, training=True, affine=True, running=True, dtype=None, **kwargs: Any):
    channels, dtype = x.shape[1], dtype or x.dtype
    statistics = [torch.rand(channels) + 0.5 if running else None for _ in range(2)]
    parameters = [None, None]
    if affine:
        drawn = [torch.rand(channels) + offset for offset in (0.5, -0.5)]
        parameters = [t.to(dtype).requires_grad_() for t in drawn]
    inputs = x, *statistics, *parameters, training
    return parity("batch_norm", *inputs, **kwargs)


def output_mask():
    """autograd drops a gradient that nobody wanted: only the launcher shows it."""
    x, one = torch.randn(6, 3), torch.ones(3)
    for wanted in [tuple(i == j for j in range(4)) for i in range(4)]:
        for name, more in (("batch_norm_bwd", ()), ("batch_norm_eval_bwd", (1e-5,))):
            gradients = launcher("batch_norm", name)(x, x, one, one, one, *more, wanted)
            assert tuple(g is not None for g in gradients) == wanted


def statistics_are_float32():
    x = (torch.randn(512, 2) * 0.01 + 3).bfloat16()
    running = torch.zeros(2), torch.ones(2)
    ours.batch_norm(x, *running, training=True, momentum=1.0)
    torch.testing.assert_close(running[0].double(), x.double().mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(running[1].double(), x.double().var(0), rtol=1e-4, atol=0)


def evaluation_keeps_digits():
    """At a mean of 1e4, where torch's own result has three digits."""
    x, mean, var = torch.randn(64, 3) + 1e4, torch.full((3,), 1e4), torch.ones(3)
    y = ours.batch_norm(x, mean, var)
    expected = (x.double() - 1e4) * (1 + 1e-5) ** -0.5
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=0)


def strided_statistics():
    x = torch.randn(6, 3)
    moved = [[torch.ones(3, 2)[:, 0] for _ in range(2)] for _ in range(2)]
    for library, running in zip((ours, theirs), moved, strict=True):
        library.batch_norm(x, *running, training=True)
    torch.testing.assert_close(*moved)


def composed(*args: Any, activation: str, param: float | None, residual: torch.Tensor | None):
    y = theirs.batch_norm(*args)
    y = y if residual is None else y + residual
    return getattr(theirs, activation)(y, *(() if param is None else (param,)))


def norm_act(
    activation: str,
    residual: torch.Tensor | None = None,
    training: bool = True,
    param: float | None = None,
    frozen: bool = False,
    x: torch.Tensor | None = None,
    **kwargs: Any,
):
    x = SMALL if x is None else x
    channels = x.shape[1]
    running = [torch.rand(channels) + 0.5 for _ in range(2)]
    parameters = [torch.rand(channels) + offset for offset in (0.5, -0.5)]
    inputs = x, *running, *(t.requires_grad_(not frozen) for t in parameters), training
    kwargs |= {"activation": activation, "param": param, "residual": residual}
    return partial(assert_parity, ours.batch_norm_act, composed, *inputs, **kwargs)


def residual_mask():
    """Its gradient is made wherever that of x passes through it, and is nobody's unless wanted."""
    x, one = torch.randn(6, 3), torch.ones(3)
    for wanted in (
        (True, True, True, False),
        (True, False, False, True),
        (False, True, False, False),
    ):
        for name, more in (("batch_norm_bwd", ()), ("batch_norm_eval_bwd", (1e-5,))):
            then = one, x, "silu", 0.0
            gradients = launcher("batch_norm", name)(x, x, one, one, one, *more, wanted, *then)
            assert tuple(g is not None for g in gradients) == wanted


SMALL, ADDED = numbers(5, 3, 4, 6, mean=0.5), numbers(5, 3, 4, 6)
TURNED = numbers(5, 3, 6, 4).detach().mT.requires_grad_()
ODD, ODD_ADDED = numbers(1, 7, 11), numbers(1, 7, 11)
NCHW = numbers(7, 3, 5, 5, mean=1.0)
MAPS = numbers(66, 3, 5, mean=1.0)  # columns of several channels
FAR = numbers(150, 3, mean=300.0)
TABLE = numbers(150, 5, mean=1.0)
SHARP = numbers(64, 3, dtype=torch.bfloat16, scale=0.1, mean=3.0)
MAPS_NHWC = NCHW.detach().contiguous(memory_format=LAST).requires_grad_()


# What the tests of the optimizers' kernels assert.
AROUND = [(n,) for n in (1, 15, 16, 17, 33, 47)]
MANY = [(2,)] * 18


class AnyLaunches(list):
    """The tests that count launches look at the real kernels', and here a copy runs."""

    __hash__ = None

    def __eq__(self, other):
        return True


def stepped(name: str, dtype=torch.float32, shapes=None, **kwargs: Any):
    """As good as torch's after a few steps."""

    def check():
        steps.assert_as_good_as_torchs(name, kwargs, lambda: steps.parameters(dtype, shapes))

    return check


def around(name: str, shapes=AROUND):
    """The same of small blocks' odd sizes."""

    def check():
        make = partial(steps.parameters, torch.float32, shapes)
        steps.assert_as_good_as_torchs(name, steps.FULL[name], make, steps=2)

    return check


def clipped(max_norm: float, shapes=AROUND):
    def check():
        steps.assert_clips_as_good_as_torchs(
            max_norm, lambda: steps.parameters(torch.float32, shapes)
        )

    return check


def the_test(name: str, *args: Any, **kwargs: Any):
    """One of test_multi_tensor.py."""
    test = getattr(steps, f"test_{name}")
    if "launches" in inspect.signature(test).parameters:
        kwargs["launches"] = AnyLaunches()
    return partial(test, *args, **kwargs)


def learning_rate_on_the_device():
    with pytest.MonkeyPatch.context() as monkeypatch:
        steps.test_a_learning_rate_that_is_a_tensor("SGD", AnyLaunches(), monkeypatch)


class Mistake(NamedTuple):
    file: str
    name: str
    right: str
    wrong: str
    check: Any
    sizes: dict[str, int]
    times: int = 1  # that `right` occurs in the file


def in_file(file: str, sizes: dict[str, int], *mistakes: tuple) -> list[Mistake]:
    return [Mistake(file, *mistake[:4], sizes, *mistake[4:]) for mistake in mistakes]


ACTIVATION = in_file(
    "activation.py",
    BLOCKS,
    (
        "grid one program short, forward",
        "launch(_activation_fwd_kernel, cdiv(n, block)",
        "launch(_activation_fwd_kernel, n // block",
        parity("relu", RAMP),
    ),
    (
        "grid one program short, backward",
        "launch(_activation_bwd_kernel, cdiv(n, block)",
        "launch(_activation_bwd_kernel, n // block",
        parity("relu", RAMP),
    ),
    (
        "mask missing on the store, forward",
        "tl.store(y_ptr + i, MATH(x, a, b), mask=inside)",
        "tl.store(y_ptr + i, MATH(x, a, b))",
        parity("relu", RAMP),
    ),
    (
        "mask missing on the store, backward",
        "tl.store(dx_ptr + i, MATH(dy, saved, a, b), mask=inside)",
        "tl.store(dx_ptr + i, MATH(dy, saved, a, b))",
        parity("relu", RAMP),
    ),
    (
        "the last block taken for a whole one",
        "if start + BLOCK <= n:",
        "if start <= n:",
        # which turns the sign of a NaN read past the end: one written as it is would not show
        parity("sigmoid", RAMP),
        2,
    ),
    (
        "upstream gradient rounded to half",
        "dy = tl.load(dy_ptr + i).to(tl.float32)",
        "dy = tl.load(dy_ptr + i).to(tl.float16).to(tl.float32)",
        parity("sigmoid", RAMP),
    ),
    (
        "input overwritten",
        "source if inplace else",
        "source if True else",
        parity("relu", RAMP.detach()),
    ),
    (
        "in place on a view: not written back",
        "written(x, y) if inplace else y",
        "x if inplace else y",
        inplace("relu", numbers(4, 6), lambda y: y[:, ::2]),
    ),
    ("channels_last lost", "packed(x)", "x.contiguous()", parity("relu", NHWC)),
    (
        "strided input read as if it were dense",
        "source = packed(x)",
        "source = x",
        parity("relu", numbers(4, 6).detach()[:, ::2]),
    ),
    (
        "upstream gradient assumed contiguous",
        "dy = laid_out_as(dy, saved)",
        "dy = dy",
        parity("relu", numbers(3, 5), upstream=torch.randn(5, 3).t()),
    ),
    (
        "upstream gradient assumed not expanded",
        "dy = laid_out_as(dy, saved)",
        "dy = dy",
        parity("sigmoid", numbers(3, 5), upstream=EXPANDED),
    ),
    (
        "relu drops a NaN: a maximum",
        "tl.where(x <= 0, 0.0, x)",
        "tl.maximum(tl.where(x == x, x, 0.0), 0.0)",  # a GPU's; the interpreter of 3.6 keeps a NaN
        parity("relu", NOT_FINITE),
    ),
    (
        "relu drops a NaN: a comparison",
        "tl.where(x <= 0, 0.0, x)",
        "tl.where(x > 0, x, 0.0)",
        parity("relu", NOT_FINITE),
    ),
    (
        "relu's gradient drops at a NaN",
        "tl.where(y <= 0, 0.0, dy)",
        "tl.where(y > 0, dy, 0.0)",
        parity("relu", NOT_FINITE),
    ),
    (
        "relu's gradient at 0",
        "tl.where(y <= 0, 0.0, dy)",
        "tl.where(y < 0, 0.0, dy)",
        parity("relu", RAMP),
    ),
    (
        "leaky relu's slope ignored in backward",
        "tl.where(x > 0, dy, dy * negative_slope)",
        "tl.where(x > 0, dy, dy * 0.01)",
        parity("leaky_relu", RAMP, negative_slope=0.3),
    ),
    (
        "leaky relu's gradient at 0",
        "tl.where(x > 0, dy, dy * negative_slope)",
        "tl.where(x >= 0, dy, dy * negative_slope)",
        parity("leaky_relu", RAMP, negative_slope=0.3),
    ),
    (
        "sigmoid overflows",
        "return 1 / (1 + tl.exp(-x))",
        "return tl.exp(x) / (1 + tl.exp(x))",
        parity("sigmoid", SPREAD),
    ),
    (
        "tanh by 2 sigmoid(2x) - 1, 0 near 0",
        "tl.where(tl.abs(x) < 0.625, x + x * z * p, tl.where(x < 0, -far, far))",
        "2 / (1 + tl.exp(-2 * x)) - 1",
        parity("tanh", TINY),
    ),
    (
        "tanh by e^2x, which overflows",
        "tl.where(tl.abs(x) < 0.625, x + x * z * p, tl.where(x < 0, -far, far))",
        "(tl.exp(2 * x) - 1) / (tl.exp(2 * x) + 1)",
        parity("tanh", SPREAD),
    ),
    (
        "elu by exp(x) - 1, 0 near 0",
        "tl.where(x > -0.35, x + x * x * p, tl.exp(x) - 1)",
        "tl.exp(x) - 1",
        parity("elu", values(-1e-8, -1e-30)),
    ),
    (
        "elu's alpha left out of backward",
        "slope = scale * alpha * tl.exp(",
        "slope = scale * tl.exp(",
        parity("elu", RAMP, alpha=2.5),
    ),
    (
        "elu's gradient at 0",
        "tl.where(x <= 0, slope, scale)",
        "tl.where(x < 0, slope, scale)",
        parity("elu", RAMP, alpha=2.5),
    ),
    (
        "selu's scale left out of the gradient from the output",
        "y + scale * alpha, scale)",
        "y + alpha, scale)",
        inplace("selu", RAMP),
    ),
    (
        "gelu: tanh for erf, forward",
        "_gelu_tanh if approximate else _gelu,",
        "_gelu_tanh,",
        parity("gelu", RAMP),
    ),
    (
        "gelu: erf for tanh, backward",
        "_gelu_tanh_grad if approximate else _gelu_grad",
        "_gelu_grad",
        parity("gelu", RAMP, approximate="tanh"),
    ),
    (
        "softplus overflows",
        "tl.where(z > 0, z, 0.0) + _log1p(tl.exp(-tl.abs(z)))",
        "tl.log(1 + tl.exp(z))",
        large_softplus,
    ),
    (
        "softplus loses small values",
        "tl.where(w == 1, u, tl.log(w) * (u / (w - 1)))",
        "tl.log(w)",
        parity("softplus", values(-20.0, -16.0, -15.0)),
    ),
    (
        "softplus' threshold ignored, forward",
        "tl.where(z > threshold, x, y / beta)",
        "y / beta",
        parity("softplus", RAMP, beta=3, threshold=2),
    ),
    (
        "softplus' threshold ignored, backward",
        "tl.where(z > threshold, dy, dy / (1 + tl.exp(-z)))",
        "dy / (1 + tl.exp(-z))",
        parity("softplus", RAMP, beta=3, threshold=2),
    ),
)

SHARED = [
    *in_file(
        "_launch.py",
        BLOCKS,
        *[
            (f"every grid one program short: {what}", "(a + b - 1) // b", "a // b", check)
            for what, check in {
                "activation": parity("silu", RAMP),
                "softmax": parity("softmax", numbers(131, 3), dim=1),
                "cross-entropy": entropy(rows(131, 3)),
                "nll": entropy(rows(600, 3), name="nll_loss"),
                "loss": distance("mse_loss"),
                "dropout": dropped(),
                "bias gradient": bias_gradient(5, 200),
            }.items()
        ],
    ),
    *in_file(
        "_layout.py",
        {},
        *[
            (f"layouts never compared: {what}", "t.stride() == x.stride() or", "True or", check)
            for what, check in {
                "softmax": parity("softmax", numbers(3, 5), dim=1, upstream=torch.randn(5, 3).t()),
                "target": distance("mse_loss", numbers(3, 5), TRANSPOSED),
                "upstream of a loss": distance(
                    "mse_loss", numbers(3, 5), numbers(3, 5), reduction="none", upstream=EXPANDED
                ),
                "probabilities": parity(
                    "cross_entropy",
                    NHWC,
                    numbers(2, 3, 4, 5).softmax(1).detach().requires_grad_(),
                    strides=False,
                ),
                "batch norm": norm(NCHW, upstream=torch.randn(7, 3, 5, 5).mT),
            }.items()
        ],
        (
            "an expanded input taken for dense",
            "if stride != expected:",
            "if stride > expected:",
            parity("sigmoid", numbers(4, 1).detach().expand(4, 4)),
        ),
    ),
    *in_file(
        "_rows.py",
        {},
        (
            "last rows dropped",
            "cdiv(x.rows, height) if",
            "x.rows // height if",
            parity("softmax", numbers(131, 3), dim=1),
        ),
        (
            "last strided rows dropped",
            "x.rows // x.inner * cdiv(x.inner, height)",
            "x.rows // x.inner * (x.inner // height)",
            parity("softmax", numbers(2, 3, 116), dim=1),
        ),
        (
            "mask of strided rows missing",
            "i < inner - first",
            "i < inner",
            parity("softmax", numbers(2, 3, 116), dim=1),
        ),
        (
            "stride ignored",
            "inner = x.stride(dim) if cols != 1 else 1",
            "inner = 1",
            parity("softmax", numbers(5, 3), dim=0),
        ),
        (
            "last columns of a wide gradient dropped",
            "cdiv(x.cols, width)",
            "x.cols // width",
            entropy(numbers(2, 2050)),
        ),
    ),
    *in_file(
        "_sums.py",
        {},
        (
            "partial sums beyond the first block dropped",
            "range(0, n, BLOCK)",
            "range(0, BLOCK, BLOCK)",
            total_of(1.0, 2.0, 0.5, repeat=500),
        ),
        (
            "partial sums cancel in float32",
            "sums = tl.zeros([BLOCK], tl.float64)",
            "sums = tl.zeros([BLOCK], tl.float32)",
            total_of(1e8, 1.0, -1e8),
        ),
        (
            "divisor left out",
            "tl.sum(sums, axis=0) / divisor",
            "tl.sum(sums, axis=0)",
            distance("mse_loss"),
        ),
        (
            "last rows of a bias gradient dropped",
            "cols // step, cdiv(rows, parts))",
            "cols // step, rows // parts)",
            bias_gradient(151),
        ),
        (
            "last part of a bias gradient dropped",
            "programs = parts * cdiv(cols, width)",
            "programs = max(1, parts - 1) * cdiv(cols, width)",
            bias_gradient(151),
        ),
        (
            "last columns of a bias gradient dropped",
            "programs = parts * cdiv(cols, width)",
            "programs = parts * (cols // width)",
            bias_gradient(5, 21),
        ),
        (
            "a part of a bias gradient reads past the end",
            "last = tl.minimum(first + rows_of_part, rows)",
            "last = first + rows_of_part",
            bias_gradient(151),
        ),
        (
            "parts of a bias gradient in half",
            "parts, width, torch.float32)",
            "parts, width, x.dtype)",
            bias_gradient(
                150,
                dtype=torch.bfloat16,
                upstream=torch.cat([torch.full((75, 5), 1.0078125), torch.full((75, 5), -1.0)]),
            ),
        ),
        (
            "mask missing on the store of a bias gradient",
            "tl.sum(sums, axis=0), mask=col < cols)",
            "tl.sum(sums, axis=0))",
            bias_gradient(5),
        ),
    ),
    *in_file(
        "linear.py",
        {},
        (
            "upstream gradient assumed contiguous",
            "dy.contiguous()",
            "dy",
            bias_gradient(5, upstream=torch.randn(5, 5).t()),
        ),
    ),
]

SOFTMAX = [
    *in_file(
        "softmax.py",
        {},
        (
            "padding with 0",
            'mask=mask, other=-float("inf")).to(tl.float32)\n    shifted',
            "mask=mask, other=0.0).to(tl.float32)\n    shifted",
            parity("softmax", rows(3, 7), dim=1),
        ),
        (
            "no maximum taken off",
            "shifted = x - tl.max(x, axis=1)[:, None]",
            "shifted = x",
            parity("softmax", torch.tensor([[300.0, -300.0, 299.0]]), dim=1),
        ),
        (
            "maximum started at 0",
            "tl.max(x, axis=1)[:, None]",
            "tl.maximum(tl.max(x, axis=1), 0.0)[:, None]",
            parity("softmax", LOW, dim=1),
        ),
        (
            "logarithm of the softmax",
            "shifted - tl.log(total) if LOG else e / total, mask",
            "tl.log(e / total) if LOG else e / total, mask",
            parity("log_softmax", torch.tensor([[300.0, -300.0, 299.0]]), dim=1),
        ),
        (
            "columns past the end written",
            "shifted - tl.log(total) if LOG else e / total, mask=mask)",
            "shifted - tl.log(total) if LOG else e / total, mask=inside[:, None])",
            parity("softmax", rows(3, 13), dim=1),
        ),
        (
            "rows past the end written",
            "shifted - tl.log(total) if LOG else e / total, mask=mask)",
            "shifted - tl.log(total) if LOG else e / total, mask=(col < cols)[None, :])",
            parity("softmax", rows(127, 13), dim=1),
        ),
        (
            "the row's sum left out of the gradient",
            "dx = dy - tl.exp(y) * total if LOG else y * (dy - total)",
            "dx = dy if LOG else y * dy",
            parity("softmax", rows(3, 7), dim=1),
            2,
        ),
        (
            "log-softmax' gradient without exp",
            "dy - tl.exp(y) * total",
            "dy - y * total",
            parity("log_softmax", rows(3, 7), dim=1),
            2,
        ),
        (
            "channels_last lost",
            "x = packed(x)",
            "x = x.contiguous()",
            softmax_keeps_the_layout,
        ),
    ),
    *in_file(
        "softmax.py",
        LOOP,
        (
            "padding with 0, wide rows",
            'other=-float("inf"),  # the',
            "other=0.0,  # the",
            parity("softmax", WIDE, dim=1),
        ),
        (
            "maximum started at 0, wide rows",
            'm = tl.full([ROWS, COLS], -float("inf"), tl.float32)',
            "m = tl.zeros([ROWS, COLS], tl.float32)",
            parity("softmax", LOW_WIDE, dim=1),
        ),
        (
            "nothing but -inf so far is NaN",
            'tl.where(new == -float("inf"), 0.0, new)',
            "new",
            parity("softmax", LATE, dim=1),
        ),
        (
            "the sum not scaled to a new maximum",
            "s * tl.exp(m - shift) +",
            "s +",
            parity("softmax", torch.linspace(-3, 3, 77).expand(2, 77), dim=1),
        ),
        (
            "end of a wide row left out of its sum",
            "range(0, cols, COLS):\n"
            "        mask = inside[:, None] & columns_left(cols, first, COLS)[None, :]\n"
            "        x = tl.load(\n",
            "range(0, cols // COLS * COLS, COLS):\n"
            "        mask = inside[:, None] & columns_left(cols, first, COLS)[None, :]\n"
            "        x = tl.load(\n",
            parity("softmax", WIDE, dim=1),
        ),
        (
            "end of a wide row left out of its gradient's sum",
            "sums = tl.zeros([ROWS, COLS], tl.float32)\n    for first in range(0, cols, COLS):",
            "sums = tl.zeros([ROWS, COLS], tl.float32)\n"
            "    for first in range(0, cols // COLS * COLS, COLS):",
            parity("softmax", WIDE, dim=1),
        ),
        (
            "columns past the end of a wide row written",
            "tl.store(y_ptr + here, y, mask=mask,",
            "tl.store(y_ptr + here, y, mask=inside[:, None],",
            parity("softmax", rows(2, 81), dim=1),
        ),
    ),
]

CROSS_ENTROPY = [
    *in_file(
        "cross_entropy.py",
        {},
        (
            "padding with 0",
            'x_ptr + offset, mask=mask, other=-float("inf")',
            "x_ptr + offset, mask=mask, other=0.0",
            entropy(rows(13, 7)),
        ),
        (
            "maximum started at 0",
            "row_max = tl.max(x, axis=1)",
            "row_max = tl.maximum(tl.max(x, axis=1), 0.0)",
            entropy(LOW),
        ),
        (
            "digits of the loss lost at scores of 300",
            "x - row_max[:, None] - log_sum[:, None]\n\n",
            "x - (row_max + log_sum)[:, None]\n\n",
            entropy(
                torch.tensor([[300.0, 299.0, 298.5]] * 5).requires_grad_(), indices(BATCH[:5, :3])
            ),
        ),
        (
            "an ignored target is an address that is read",
            "return target, kept, kept & (target >= 0) & (target < cols)",
            "return target, inside, inside",
            entropy(BATCH, ignored=-1, ignore_index=-1),
        ),
        (
            "an ignored target is an address that is written",
            "    tl.store(dx_ptr + offset, dx, mask=mask)\n",
            "    tl.store(dx_ptr + offset, dx, mask=mask)\n"
            "    stray = row * cols + target\n"
            "    tl.store(dx_ptr + stray, 0.0, mask=inside & (target == -3))\n",
            entropy(BATCH, ignored=-3, ignore_index=-3),
        ),
        (
            "a target out of range is an address",
            "kept & (target >= 0) & (target < cols)",
            "kept",
            target_out_of_range,
        ),
        (
            "a NaN in an ignored row poisons the loss",
            "loss = tl.where(kept, loss, 0.0)  # an ignored row may hold a NaN",
            "loss = loss * kept.to(tl.float32)",
            nan_in_an_ignored_row,
            2,
        ),
        (
            "an ignored row in the smoothed loss",
            "loss = tl.where(kept, loss, 0.0)  # an ignored row may hold a NaN",
            "loss = tl.where(inside, loss, 0.0)",
            entropy(numbers(13, 7), label_smoothing=0.1),
            2,
        ),
        (
            "a NaN in an ignored row poisons the likelihood",
            "tl.where(kept, -row_weight * picked.to(tl.float32), 0.0)",
            "-row_weight * picked.to(tl.float32)",
            nan_in_an_ignored_row,
        ),
        (
            "gradient stored for ignored rows",
            'dx = tl.where(valid[:, None], dx, tl.where(kept, float("nan"), 0.0)[:, None])',
            "dx = dx",
            entropy(BATCH, label_smoothing=0.1),
            2,
        ),
        (
            "a NaN in an ignored row gets a gradient",
            'dx = tl.where(valid[:, None], dx, tl.where(kept, float("nan"), 0.0)[:, None])',
            "dx = dx",
            nan_in_an_ignored_row,
            2,
        ),
        (
            "ignored rows in the mean's divisor",
            "tl.sum(row_weight.to(tl.float64), axis=0)",
            "tl.sum(inside.to(tl.float64), axis=0)",
            entropy(BATCH),
        ),
        (
            "class weights left out of the mean's divisor",
            "tl.sum(row_weight.to(tl.float64), axis=0)",
            "tl.sum((row_weight != 0).to(tl.float64), axis=0)",
            entropy(BATCH, weight=WEIGHT),
        ),
        (
            "class weights left out of backward",
            "_row_weights(weight_ptr, target, kept, valid)[:, None]",
            "kept.to(tl.float32)[:, None]",
            entropy(BATCH, weight=WEIGHT),
        ),
        (
            "class weights left out of the smoothing's gradient",
            "p * tl.load(weight_sum_ptr) - _weights(weight_ptr, first, cols, COLS)",
            "p * cols - 1",
            entropy(BATCH, weight=WEIGHT, label_smoothing=0.1),
            2,
        ),
        (
            "label smoothing left out of forward",
            "loss = (1 - smoothing) * loss + spread",
            "loss = loss",
            entropy(BATCH, label_smoothing=0.1),
            2,
        ),
        (
            "label smoothing left out of backward",
            "dx = (1 - smoothing) * dx + smoothing / cols * smooth",
            "dx = dx",
            entropy(BATCH, label_smoothing=0.1),
            2,
        ),
        (
            "padding of a smoothed row is 0 * inf",
            "spread = tl.where(mask, -c * log_p, 0.0)",
            "spread = -c * log_p",
            entropy(BATCH, label_smoothing=0.1),
        ),
        (
            "gradient rounded to half before the loss scale",
            "    dx *= _row_gradient(dy_ptr, row, inside, REDUCED)\n    if total_ptr is not None:\n"
            "        dx /= tl.load(total_ptr)\n",
            "    if total_ptr is not None:\n        dx /= tl.load(total_ptr)\n"
            "    dx = dx.to(dx_ptr.dtype.element_ty).to(tl.float32)\n"
            "    dx *= _row_gradient(dy_ptr, row, inside, REDUCED)\n",
            fp16_gradients_survive,
        ),
        (
            "divisor left out of backward",
            'divisor = total if reduction == "mean" else None',
            "divisor = None",
            entropy(BATCH),
            2,
        ),
        (
            "divisor left out of the likelihood's backward",
            'divisor = total if reduction == "mean" else None',
            "divisor = None",
            entropy(BATCH, name="nll_loss"),
            2,
        ),
        ("logits overwritten", "dx = torch.empty_like(x)", "dx = x", entropy(BATCH), 2),
        (
            "a second backward sees a gradient",
            "dx = torch.empty_like(x)",
            "dx = x",
            logits_survive,
            2,
        ),
        (
            "partial sums sized by floor",
            "torch.empty((programs, 2)",
            "torch.empty((programs - 1, 2)",
            entropy(rows(131, 7)),
        ),
        (
            "partial sums of the likelihood sized by floor",
            "_loss_tensors(x, reduction, programs)",
            "_loss_tensors(x, reduction, view.rows // height)",
            entropy(rows(600, 3), name="nll_loss"),
        ),
        (
            "last rows of the likelihood dropped",
            "programs = cdiv(view.rows, height)",
            "programs = view.rows // height",
            entropy(rows(600, 3), name="nll_loss"),
        ),
        (
            "partial sums beyond the first block dropped",
            "range(0, n, BLOCK)",
            "range(0, BLOCK, BLOCK)",
            many_partial_losses,
        ),
        (
            "likelihood: classes assumed last",
            "start = row // inner * inner * cols + row % inner",
            "start = row * cols",
            entropy(rows(3, 5, 4), name="nll_loss"),
        ),
        (
            "targets assumed contiguous",
            "target.contiguous()",
            "target",
            entropy(numbers(4, 5, 3), torch.randint(0, 5, (3, 4)).t()),
            5,
        ),
        (
            "class weights assumed contiguous",
            "return None if t is None else t.contiguous()",
            "return t",
            entropy(BATCH, weight=(torch.rand(14) + 0.5)[::2]),
        ),
        (
            "upstream gradient assumed contiguous",
            "dy.contiguous()",
            "dy",
            entropy(numbers(4, 5, 3), reduction="none", upstream=torch.randn(3, 4).t()),
        ),
        (
            "strided scores read as if they were dense",
            "and is_dense(x) else",
            "else",
            entropy(numbers(6, 10).detach()[:, ::2].requires_grad_()),
        ),
        (
            "rows assumed in the order of the targets",
            "strides == sorted(strides, reverse=True) and",
            "True and",
            entropy(numbers(2, 3, 4, 5).detach().transpose(2, 3).requires_grad_()),
        ),
    ),
    *in_file(
        "cross_entropy.py",
        {},
        (
            "probabilities: mass left out of backward",
            "d = tl.exp(log_p) * mass[:, None] - c",
            "d = tl.exp(log_p) - c",
            probable(13, 7, weight=WEIGHT),
        ),
        (
            "probabilities: smoothing left out of the target's gradient",
            "d = -log_p * (1 - smoothing)",
            "d = -log_p",
            probable(13, 7, label_smoothing=0.1),
        ),
        (
            "probabilities: weights left out of the target's gradient",
            "d *= _weights(weight_ptr, first, cols, COLS)",
            "d *= 1.0",
            probable(13, 7, weight=WEIGHT),
        ),
        (
            "probabilities: divisor left out of backward",
            "scalars = (divisor(row_max.numel(), reduction),",
            "scalars = (1.0,",
            probable(13, 7),
            2,
        ),
        (
            "probabilities: smoothing left out",
            "c = (1 - smoothing) * c + smoothing / cols",
            "c = c",
            probable(13, 7, label_smoothing=0.1),
        ),
    ),
    *in_file(
        "cross_entropy.py",
        LOOP,
        (
            "padding with 0, wide rows",
            'x_ptr + here, mask=mask, other=-float("inf")',
            "x_ptr + here, mask=mask, other=0.0",
            entropy(WIDE),
        ),
        (
            "maximum started at 0, wide rows",
            'm = tl.full([ROWS, COLS], -float("inf"), tl.float32)',
            "m = tl.zeros([ROWS, COLS], tl.float32)",
            entropy(LOW_WIDE),
        ),
        (
            "end of a wide row left out",
            "range(0, cols, COLS)",
            "range(0, cols // COLS * COLS, COLS)",
            entropy(WIDE),
            2,
        ),
        (
            "probabilities: no pivot at a large mean, wide rows",
            'tl.where(tl.abs(first_x) < float("inf"), first_x, 0.0)',
            "first_x * 0",
            probable(3, 77, mean=1e4),
        ),
        (
            "-inf is the pivot, wide rows",
            'tl.where(tl.abs(first_x) < float("inf"), first_x, 0.0)',
            "first_x",
            entropy(MINUS_INF_FIRST, label_smoothing=0.1),
        ),
    ),
]

ONCE = [  # its barrier shows on a GPU only
    *in_file(
        "cross_entropy.py",
        BLOCKS,
        (
            "once: the score picked as if rows were contiguous",
            'picked = tl.load(x_ptr + start + target * inner, mask=valid, other=float("nan")).to(',
            'picked = tl.load(x_ptr + start + target, mask=valid, other=float("nan")).to(',
            once(numbers(4, 5, 3)),
        ),
        (
            "once: a target out of range is an address",
            'target * inner, mask=valid, other=float("nan")).to(',
            'target * inner, mask=kept, other=float("nan")).to(',
            target_out_of_range_once,
        ),
        (
            "once: the maximum left out of the loss",
            "\n    loss = row_weight * (row_max - picked + log_sum)",
            "\n    loss = row_weight * (log_sum - picked)",
            once(BATCH),
        ),
        (
            "once: the maximum left out of the gradient",
            "p = tl.exp(x - row_max[:, None] - log_sum[:, None])",
            "p = tl.exp(x - log_sum[:, None])",
            once(BATCH),
        ),
        (
            "once: class weights left out of the gradient",
            "dx = row_weight[:, None] * (p - hit)",
            "dx = kept.to(tl.float32)[:, None] * (p - hit)",
            once(BATCH, weight=WEIGHT),
        ),
        (
            "once: label smoothing left out of the loss",
            "\n        loss = (1 - smoothing) * loss + spread",
            "\n        loss = loss",
            chunk(BATCH, smoothing=0.1),
        ),
        (
            "once: label smoothing left out of the gradient",
            "                dx = (1 - smoothing) * dx + smoothing / cols * smooth",
            "                dx = dx",
            once(BATCH, label_smoothing=0.1),
        ),
        (
            "once: class weights left out of the smoothing's gradient",
            "                    smooth = p * tl.load(weight_sum_ptr) - _weights(",
            "                    smooth = p * cols - 1 + 0 * _weights(",
            chunk(BATCH, WEIGHT, 0.1),
        ),
        (
            "once: divisor left out of the gradient",
            "                dx /= tl.load(total_ptr)",
            "                dx = dx",
            once(BATCH),
        ),
        (
            "once: an ignored row in the loss",
            "\n    loss = tl.where(kept, loss, 0.0)",
            "\n    loss = loss * kept.to(tl.float32)",
            nan_in_an_ignored_row_once,
        ),
        (
            "once: an ignored row in the gradient",
            "            dx = tl.where(valid[:, None], dx,",
            "            dx = tl.where((valid | ~kept)[:, None], dx,",
            nan_in_an_ignored_row_once,
        ),
        (
            "once: mask missing on the store",
            "tl.store(dx_ptr + here, dx, mask=mask)",
            "tl.store(dx_ptr + here, dx, mask=inside[:, None])",
            chunk(BATCH),
        ),
        (
            "once: the upstream gradient left out",
            "    if factor != 1:",
            "    if factor == 0:",
            once(BATCH, factor=3.0),
        ),
        (
            "once: mask missing on the store of the last block",
            "tl.store(x_ptr + i, x * factor, mask=inside)",
            "tl.store(x_ptr + i, x * factor)",
            once(BATCH, factor=3.0),
        ),
        (
            "once: grid one program short, backward",
            "launch(_scale_kernel, cdiv(dx.numel(), block)",
            "launch(_scale_kernel, dx.numel() // block",
            once(BATCH, factor=3.0),
        ),
        (
            "once: whole blocks left as they were",
            "tl.store(x_ptr + i, tl.load(x_ptr + i).to(tl.float32) * factor)",
            "tl.store(x_ptr + i, tl.load(x_ptr + i).to(tl.float32))",
            once(BATCH, factor=3.0),
        ),
    ),
    *in_file(
        "cross_entropy.py",
        LOOP,
        (
            "once: end of a wide row without a gradient",
            "for first in range(0, cols, COLS):\n"
            "            mask = inside[:, None] & columns_left(cols, first, COLS)[None, :]\n"
            "            here = tile_offsets(",
            "for first in range(0, cols // COLS * COLS, COLS):\n"
            "            mask = inside[:, None] & columns_left(cols, first, COLS)[None, :]\n"
            "            here = tile_offsets(",
            once(WIDE),
        ),
        (
            "once: every tile of a wide row on the first",
            "tile_offsets(start, col, inner, STRIDED) + first * inner\n            x =",
            "tile_offsets(start, col, inner, STRIDED)\n            x =",
            chunk(WIDE),
        ),
    ),
    *in_file(
        "linear_cross_entropy.py",
        {},
        (
            "a gradient that nobody wants overwrites the scores",
            "dx = x if gradient else None",
            "dx = x",
            losses_alone_leave_the_scores,
        ),
    ),
]

BIAS_ACT = [
    *in_file(
        "bias_act_dropout.py",
        TILES,
        (
            "bias left out of forward",
            "MATH(x + _bias(bias_ptr, c, cols), a, b)",
            "MATH(x, a, b)",
            biased(20, 7),
        ),
        (
            "bias left out of backward",
            "MATH(dx, kept + bias, a, b)",
            "MATH(dx, kept, a, b)",
            biased(20, 7),
        ),
        (
            "scale left out of forward",
            "y *= tl.where(_kept(seed_ptr, row, col, cols, threshold, ROWS, COLS), scale, 0.0)",
            "y *= tl.where(_kept(seed_ptr, row, col, cols, threshold, ROWS, COLS), 1.0, 0.0)",
            biased(20, 7, p=0.4),
        ),
        (
            "scale left out of backward",
            "dx *= tl.where(_kept(seed_ptr, row, col, cols, threshold, ROWS, COLS), scale, 0.0)",
            "dx *= tl.where(_kept(seed_ptr, row, col, cols, threshold, ROWS, COLS), 1.0, 0.0)",
            biased(20, 7, p=0.4),
        ),
        (
            "scale left out of a ReLU's backward",
            "dx *= scale  #",
            "dx *= 1.0  #",
            biased(20, 7, activation="relu", p=0.4),
        ),
        (
            "every tile's mask is the first's, rows",
            "r = tl.cast(row, tl.int64) + tl.arange(0, ROWS)",
            "r = tl.cast(row, tl.int64) * 0 + tl.arange(0, ROWS)",
            biased(20, 7, p=0.4),
        ),
        (
            "two rows share a counter",
            "quads = (cols + 3) // 4",
            "quads = cols // 4",
            biased(20, 7, p=0.4),
        ),
        (
            "backward's mask is another",
            "dx *= tl.where(_kept(seed_ptr, row,",
            "dx *= tl.where(_kept(seed_ptr, row + 1,",
            biased(20, 7, p=0.4),
        ),
        (
            "p keeps instead of dropping",
            "round(p * 2**32)",
            "round((1 - p) * 2**32)",
            biased(20, 7, p=0.3),
        ),
        (
            "a dropped NaN becomes 0",
            "y *= tl.where(_kept(seed_ptr, row, col, cols, threshold, ROWS, COLS), scale, 0.0)",
            "y = tl.where(_kept(seed_ptr, row, col, cols, threshold, ROWS, COLS), y * scale, 0.0)",
            dropped_nan_stays_after_a_bias,
        ),
        (
            "partial sums of the first part alone",
            "add_up_rows(partial)",
            "partial[0]",
            biased(149, 7),
        ),
        (
            "a part's rows reach into the next",
            "last = tl.minimum((part + 1) * rows_of_part, rows)",
            "last = rows",
            biased(149, 7),
        ),
        (
            "last rows of the last part dropped",
            "*(*args, cdiv(rows, parts))",
            "*(*args, rows // parts)",
            biased(149, 7),
        ),
        (
            "rows past a part's end counted",
            "inside = (r < tl.minimum(last - row, ROWS).to(tl.int32))[:, None]",
            "inside = (r < ROWS)[:, None]",
            biased(148, 7),
        ),
        (
            "column mask missing on the store of partial sums",
            "tl.sum(sums, axis=0), mask=c < cols)",
            "tl.sum(sums, axis=0))",
            biased(20, 7),
        ),
        (
            "column mask missing on the store, forward",
            "tl.store(y_ptr + at, y, mask=inside)",
            "tl.store(y_ptr + at, y)",
            biased(20, 7),
        ),
        (
            "column mask missing on the store, backward",
            "tl.store(dx_ptr + at, dx, mask=inside)",
            "tl.store(dx_ptr + at, dx)",
            biased(20, 7),
        ),
        (
            "last rows dropped",
            "cdiv(rows, height) * cdiv(cols, width)",
            "rows // height * cdiv(cols, width)",
            biased(21, 7),
        ),
        (
            "upstream gradient assumed contiguous",
            "dy, kept = dy.contiguous(), kept.contiguous()",
            "dy, kept = dy, kept.contiguous()",
            biased(5, 7, upstream=torch.randn(7, 5).t()),
        ),
        (
            "bias assumed contiguous",
            "return None if t is None else t.contiguous()",
            "return t",
            biased(5, 7, bias=(torch.rand(14) + 0.5)[::2].requires_grad_()),
        ),
        (
            "an activation for another's gradient",
            "_, gradient, a, b = fused(activation, param)",
            '_, gradient, a, b = fused("gelu_tanh", param)',
            biased(20, 7),
        ),
    ),
    *in_file(
        "bias_act_dropout.py",
        {},  # two tiles across
        (
            "every tile's mask is the first's, columns",
            "q = col // 4 + tl.arange(0, COLS // 4)",
            "q = tl.arange(0, COLS // 4)",
            biased(5, 277, p=0.4),
        ),
        (
            "last columns dropped, forward",
            "cdiv(rows, height) * cdiv(cols, width)",
            "cdiv(rows, height) * max(1, cols // width)",
            biased(5, 277),
        ),
        (
            "last columns dropped, backward",
            "across = cdiv(cols, width)",
            "across = cols // width",
            biased(5, 277),
        ),
    ),
]

LOSS = in_file(
    "loss.py",
    BLOCKS,
    (
        "grid one program short, forward",
        "programs = cdiv(n, block)",
        "programs = n // block",
        distance("mse_loss"),
    ),
    (
        "grid one program short, backward",
        "launch(_loss_bwd_kernel, cdiv(n, block)",
        "launch(_loss_bwd_kernel, n // block",
        distance("mse_loss"),
    ),
    (
        "partial sums sized by floor",
        "torch.empty(programs, dtype",
        "torch.empty(n // block, dtype",
        distance("mse_loss"),
    ),
    (
        "last partial sum dropped",
        "total(loss, x, divisor",
        "total(loss[:-1], x, divisor",
        distance("mse_loss"),
    ),
    (
        "padding counted",
        "loss = tl.where(inside, loss, 0.0)",
        "loss = loss",
        distance(LOGITS),
    ),
    (
        "mask missing on the store, forward",
        "tl.store(loss_ptr + i, loss, mask=inside)",
        "tl.store(loss_ptr + i, loss)",
        distance("mse_loss", reduction="none"),
    ),
    (
        "mask missing on the store, backward",
        "divisor * slope, mask=inside)",
        "divisor * slope)",
        distance("mse_loss"),
    ),
    (
        "divisor left out of backward",
        "dy.to(tl.float32) / divisor * slope",
        "dy.to(tl.float32) * slope",
        distance("mse_loss"),
        2,
    ),
    (
        "gradient rounded to half before the loss scale",
        "dy.to(tl.float32) / divisor * slope",
        "(slope / divisor).to(d_ptr.dtype.element_ty).to(tl.float32) * dy",
        small_fp16_gradients_survive,
        2,
    ),
    (
        "pos_weight ignored",
        "1.0 if pos_weight_ptr is None else _load(pos_weight_ptr, i, inside)",
        "1.0",
        distance(LOGITS, PAIR[0], UNIT[1], pos_weight=FACTOR),
    ),
    (
        "pos_weight ignored in backward",
        "(1 + (p - 1) * target) / (1 + tl.exp(-x)) - p * target",
        "1 / (1 + tl.exp(-x)) - target",
        distance(LOGITS, PAIR[0], UNIT[1], pos_weight=FACTOR),
    ),
    (
        "pos_weight ignored in the target's gradient",
        "tl.where(p == 1, -x, p * _softplus_of_minus(x) - _softplus_of_minus(-x))",
        "-x",
        distance(LOGITS, PAIR[0], UNIT[1], pos_weight=FACTOR),
    ),
    (
        "weight ignored",
        "return y if weight_ptr is None else y * _load(weight_ptr, i, inside)",
        "return y",
        distance(BCE, *UNIT, weight=FACTOR),
    ),
    (
        "the course's half squared error's gradient",
        "return 2 * (x - target)",
        "return x - target",
        distance("mse_loss"),
    ),
    (
        "l1's gradient where nothing differs",
        "tl.where(d < 0, -1.0, 0.0)",
        "-1.0",
        distance("l1_loss", values(1.0, 2.0), values(1.0, 1.0)),
    ),
    (
        "sign of the target's gradient",
        "return _log1m(x) - tl.log(x)",
        "return tl.log(x) - _log1m(x)",
        distance(BCE, *UNIT),
    ),
    (
        "sign of the target's gradient, from scores",
        "tl.where(p == 1, -x,",
        "tl.where(p == 1, x,",
        distance(LOGITS),
    ),
    (
        "logarithm of a probability not clamped",
        "return tl.where(log < -100, -100.0, log)",
        "return log",
        distance(BCE, values(0.0, 1.0, 0.0, 1.0), values(0.0, 1.0, 1.0, 0.0), reduction="none"),
    ),
    (
        "gradient of a certain probability not clamped",
        "tl.where(rest < 1e-12, 1e-12, rest)",
        "rest",
        distance(BCE, values(0.0, 1.0), torch.tensor([1.0, 0.0])),
    ),
    (
        "log(1 - x) loses small values",
        "tl.where(w == 1, -x, tl.log(w) * tl.where(w == 0, 1.0, x / (1 - w)))",
        "tl.log(w)",
        distance(BCE, values(1e-8, 3e-8), torch.zeros(2), reduction="none"),
    ),
    (
        "log(1 + e^-x) overflows",
        "tl.where(x < 0, -x, 0.0) + log1p",
        "tl.log(1 + tl.exp(-x))",
        distance(LOGITS, SPREAD, torch.ones(14), reduction="none"),
    ),
    (
        "log(1 + e^-x) loses small values",
        "tl.where(w == 1, u, tl.log(w) * (u / (w - 1)))",
        "tl.log(w)",
        distance(LOGITS, values(15.0, 20.0), torch.ones(2), reduction="none"),
    ),
    (
        "channels_last lost",
        "x = packed(x)",
        "x = x.contiguous()",
        distance("mse_loss", NHWC, NHWC.detach() + 1, reduction="none"),
        2,
    ),
    (
        "strided scores read as if they were dense",
        "x = packed(x)",
        "x = x",
        distance("mse_loss", numbers(4, 6).detach()[:, ::2].requires_grad_(), numbers(4, 3)),
        2,
    ),
)

DROPOUT = in_file(
    "dropout.py",
    {"BYTES": 256},
    ("grid one program short", "cdiv(n, block), x", "n // block, x", dropped()),
    (
        "mask missing on the store",
        "tl.store(y_ptr + i, x * factor, mask=inside)",
        "tl.store(y_ptr + i, x * factor)",
        dropped(),
    ),
    ("scale missing", "tl.where(kept, scale, 0.0)", "tl.where(kept, 1.0, 0.0)", dropped()),
    ("scale applied at both ends", "1 / keep", "1 / (1 - p)", dropped(scale_at="inference")),
    (
        "another seed in backward",
        "_launch_dropout(dy, seed, dx",
        "_launch_dropout(dy, seed + 1, dx",
        dropped(),
    ),
    (
        "another threshold in backward",
        "_launch_dropout(dy, seed, dx, p, keep)",
        "_launch_dropout(dy, seed, dx, 1 - p, keep)",
        dropped(),
    ),
    ("p keeps", "bitcast=True) >=", "bitcast=True) <", dropped()),
    ("threshold of an unsigned number", "2**32 - 1) - 2**31", "2**31 - 1)", dropped()),
    (
        "seed not used",
        "_kept(tl.load(seed_ptr),",
        "_kept(tl.load(seed_ptr) * 0,",
        every_bit_of_the_seed_counts,
    ),
    (
        "16 bits of seed used",
        "_kept(tl.load(seed_ptr),",
        "_kept(tl.load(seed_ptr) & 0xFFFF,",
        every_bit_of_the_seed_counts,
    ),
    (
        "the mask repeats in every block",
        "program * (BLOCK // 4) +",
        "program * 0 +",
        no_part_of_the_mask_repeats,
    ),
    (
        "blocks share half of their numbers",
        "program * (BLOCK // 4) +",
        "program * (BLOCK // 8) +",
        no_part_of_the_mask_repeats,
    ),
    (
        "four neighbours share a number",
        "tl.join(tl.join(r0, r2), tl.join(r1, r3))",
        "tl.join(tl.join(r0, r0), tl.join(r0, r0))",
        no_part_of_the_mask_repeats,
    ),
    (
        "a dropped NaN is 0",
        "tl.store(y_ptr + i, x * factor)",
        "tl.store(y_ptr + i, tl.where(kept, x * scale, 0.0))",
        dropped_nan_stays,
    ),
    (
        "channels_last lost",
        "source = packed(x)",
        "source = x.contiguous()",
        dropout_keeps_the_layout,
    ),
    (
        "input overwritten",
        "source if inplace else",
        "source if True else",
        dropout_leaves_its_input,
    ),
)

BATCH_NORM = [
    *in_file(
        "batch_norm.py",
        SPLIT,
        (
            "variance by E[x^2] - E[x]^2",
            "pivot = _total(x, COLUMNS) / n",
            "pivot = _total(x, COLUMNS) * 0",
            norm(FAR),
        ),
        (
            "partial results merged without the means' spread",
            "m2 += n * (shift - mean) * (shift - mean)",
            "m2 += 0.0",
            norm(TABLE),
        ),
        (
            "partial means merged without their counts",
            "mean = tl.sum(n * shift, axis=0) / total",
            "mean = tl.sum(shift, axis=0) / partials",
            norm(TABLE),
        ),
        (
            "last tile left out of the statistics",
            "range(part + parts, tiles, parts)",
            "range(part + parts, tiles - 1, parts)",
            norm(TABLE),
        ),
        (
            "last tile left out of the gradients' sums",
            "range(part, tiles, parts)",
            "range(part, tiles - 1, parts)",
            norm(TABLE),
        ),
        (
            "last part left out of the statistics",
            "partials,\n    BLOCK: tl.constexpr,\n):\n    channel = tl.program_id(0).to(tl.int64)",
            "partials,\n    BLOCK: tl.constexpr,\n):\n    partials = partials - 1\n"
            "    channel = tl.program_id(0).to(tl.int64)",
            norm(TABLE),
        ),
        ("tiles not counted", "n += more", "n += 0", norm(TABLE)),
        (
            "grid one program short",
            "cdiv(rows, tile_rows) * cdiv(width, cols)",
            "max(1, rows // tile_rows) * cdiv(width, cols)",
            norm(numbers(151, 3)),
        ),
        (
            "mask missing on the store",
            "tl.store(y_ptr + at, y, mask=inside)",
            "tl.store(y_ptr + at, y)",
            norm(numbers(1, 7, 13)),
        ),
        (
            "mask missing on the store of the gradient",
            "tl.store(dx_ptr + at, dx * scale, mask=inside)",
            "tl.store(dx_ptr + at, dx * scale)",
            norm(numbers(1, 7, 13)),
        ),
        (
            "channel of a column",
            "channel = column // inner if COLUMNS else column",
            "channel = column % channels if COLUMNS else column",
            norm(MAPS),
        ),
        (
            "channel of an element",
            "(col.to(tl.int32) + c) // inner",
            "(col.to(tl.int32) + c) % channels",
            norm(MAPS),
        ),
        (
            "running statistics moved by 1 - momentum",
            "(1 - momentum) * running + momentum * batch",
            "momentum * running + (1 - momentum) * batch",
            norm(NCHW),
        ),
        (
            "biased and unbiased swapped",
            "n / (n - 1) if unbiased else 1.0",
            "1.0 if unbiased else n / (n - 1)",
            norm(NCHW),
        ),
        (
            "no running statistics: the input overwritten instead",
            "moved = _contiguous(running_mean), _contiguous(running_var)",
            "moved = [x if r is None else r.contiguous() for r in (running_mean, running_var)]",
            norm(NCHW, running=False),
        ),
        (
            "strided running statistics not written back",
            "written(running, new)",
            "pass",
            strided_statistics,
        ),
        (
            "statistics stored in half",
            "mean, rstd = _per_channel(x), _per_channel(x)",
            "mean, rstd = _per_channel(x, x.dtype), _per_channel(x, x.dtype)",
            norm(SHARP, dtype=torch.float32),
        ),
        (
            "partial statistics stored in half",
            "self.partials, dtype=torch.float32,",
            "self.partials, dtype=x.dtype,",
            statistics_are_float32,
        ),
        (
            "eval statistics ignored",
            "_apply(packed(x), weight, bias, *statistics, eps, True, *then)",
            "_apply(packed(x), weight, bias, *map(torch.zeros_like, statistics), eps, True, *then)",
            norm(NCHW, training=False),
        ),
        (
            "eps left out of evaluation",
            "tl.rsqrt(spread + eps) if EVAL",
            "tl.rsqrt(spread) if EVAL",
            norm(NCHW, training=False, eps=0.1),
        ),
        (
            "backward of evaluation uses the training formula",
            "running_mean, running_var, eps, True, wanted, *then)",
            "running_mean, running_var, eps, False, wanted, *then)",
            norm(NCHW, training=False),
        ),
        (
            "backward of training uses the evaluation's formula",
            "x, weight, mean, rstd, 0.0, False, wanted, *then)",
            "x, weight, mean, (1 / rstd) ** 2, 0.0, True, wanted, *then)",
            norm(NCHW),
        ),
        (
            "weight left out",
            "scale *= _load(weight_ptr, channel, known)",
            "scale *= 1.0",
            norm(NCHW),
        ),
        (
            "bias left out",
            "shift = _load(bias_ptr, channel, known)",
            "shift = tl.zeros_like(mean)",
            norm(NCHW),
        ),
        (
            "share of the batch alone",
            "share = x.shape[1] / x.numel()",
            "share = 1 / x.shape[0]",
            norm(NCHW),
        ),
        (
            "output mask ignored: bias",
            "dbias if wants_dbias else None",
            "dbias",
            output_mask,
        ),
        (
            "output mask ignored: weight",
            "if weight is not None and wanted[1]:",
            "if weight is not None and dscale is not None:",
            output_mask,
        ),
        (
            "output mask ignored: input",
            "wants_dx, wants_dweight, wants_dbias = wanted[0],",
            "wants_dx, wants_dweight, wants_dbias = True,",
            output_mask,
        ),
        (
            "channels_last lost",
            "    x = packed(x)\n",
            "    x = x.contiguous()\n",
            norm(MAPS_NHWC),
            4,
        ),
        (
            "upstream gradient assumed contiguous",
            "dy = laid_out_as(dy, x)",
            "dy = dy",
            norm(NCHW, upstream=torch.randn(7, 3, 5, 5).mT),
        ),
        (
            "parameters assumed contiguous",
            "return t if t is None else t.contiguous()",
            "return t",
            parity(
                "batch_norm",
                NCHW,
                None,
                None,
                *((torch.rand(6) + 0.5)[::2].requires_grad_() for _ in range(2)),
                True,
            ),
        ),
    ),
    *in_file(
        "batch_norm.py",
        {},
        (
            "variance by E[x^2] - E[x]^2, in one part",
            "pivot = _total(x, COLUMNS) / n",
            "pivot = _total(x, COLUMNS) * 0",
            norm(numbers(150, 3, mean=1e4)),
        ),
        (
            "folded to x * scale + shift",
            "u = (x - mean) * scale",
            "u = x * scale - mean * scale",
            evaluation_keeps_digits,
        ),
        (
            "weight's gradient not normalized",
            "_total(dscale, COLUMNS) * _rstd(spread_ptr, channel, known, eps, EVAL)",
            "_total(dscale, COLUMNS)",
            norm(NCHW),
        ),
    ),
    *in_file(
        "batch_norm.py",
        SPLIT,
        (
            "residual left out",
            "u += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)",
            "u += 0.0",
            norm_act("relu", ADDED),
        ),
        ("activation left out", "y = MATH(y, a, b)", "y += 0.0", norm_act("silu")),
        (
            "residual after the activation",
            "bias_ptr, residual_ptr, at, inside)\n    if MATH is not None:\n"
            "        y = MATH(y, a, b)\n",
            "bias_ptr, None, at, inside)\n    if MATH is not None:\n"
            "        y = MATH(y, a, b)\n    if residual_ptr is not None:\n"
            "        y += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)\n",
            norm_act("silu", ADDED),
        ),
        (
            "activation's gradient at the input",
            "return MATH(dy, u, a, b)",
            "return MATH(dy, x, a, b)",
            norm_act("silu"),
        ),
        (
            "a ReLU's mask from the input",
            "return MATH(dy, u, a, b)",
            "return MATH(dy, x, a, b)",
            norm_act("relu", ADDED),
        ),
        (
            "a kept residual taken for the output",
            'activation == "relu" and kept is not None',
            "kept is not None",
            norm_act("silu", ADDED),
        ),
        (
            "a kept output taken for the residual",
            'activation == "relu" and kept is not None',
            "False",
            norm_act("relu", ADDED),
        ),
        (
            "bias left out of what the activation saw",
            "mean[None, :], scale[None, :], shift[None, :]",
            "mean[None, :], scale[None, :], 0 * shift[None, :]",
            norm_act("silu"),
        ),
        (
            "weight left out of what the activation saw",
            "mean[None, :], scale[None, :], shift[None, :]",
            "mean[None, :], _rstd(spread_ptr, channel, known, eps, EVAL)[None, :], shift[None, :]",
            norm_act("silu"),
        ),
        (
            "the running variance taken for 1 / deviation",
            "channel, known, eps, EVAL\n        )\n        mean, scale",
            "channel, known, eps, False\n        )\n        mean, scale",
            norm_act("silu", training=False),
        ),
        (
            "residual's gradient not written by the sums",
            "tl.store(dresidual_ptr + at, dy, mask=inside)",
            "pass",
            norm_act("relu", ADDED),
        ),
        (
            "residual's gradient not written by the pass that is alone",
            "tl.store(dresidual_ptr + at, dx, mask=inside)",
            "pass",
            norm_act("relu", ADDED, training=False, frozen=True),
        ),
        (
            "residual's gradient from before the activation's",
            "tl.store(dresidual_ptr + at, dy, mask=inside)",
            "tl.store(dresidual_ptr + at, tl.load(dy_ptr + at, mask=inside), mask=inside)",
            norm_act("silu", ADDED),
        ),
        (
            "mask missing on the store of the residual's gradient",
            "tl.store(dresidual_ptr + at, dy, mask=inside)",
            "tl.store(dresidual_ptr + at, dy)",
            norm_act("silu", ODD_ADDED, x=ODD),
        ),
        (
            "mask missing on the store of the residual's gradient, alone",
            "tl.store(dresidual_ptr + at, dx, mask=inside)",
            "tl.store(dresidual_ptr + at, dx)",
            norm_act("silu", ODD_ADDED, x=ODD, training=False, frozen=True),
        ),
        (
            "a residual alone has no gradient",
            "or wants_dbias or not wants_dx",
            "or wants_dbias",
            norm_act("silu", ADDED, x=SMALL.detach(), training=False, frozen=True),
        ),
        (
            "the second pass applies the activation's gradient again",
            "dy, then, written_here = dresidual, _Then(None, None, 0.0, 0.0), None",
            "dy, written_here = dresidual, None",
            norm_act("silu", ADDED),
        ),
        (
            "the second pass starts from the upstream gradient",
            "dy, then, written_here = dresidual, _Then(None, None, 0.0, 0.0), None",
            "then, written_here = _Then(None, None, 0.0, 0.0), None",
            norm_act("silu", ADDED),
        ),
        (
            "layout of the residual ignored, forward",
            "residual = None if residual is None else laid_out_as(residual, x)",
            "residual = residual",
            norm_act("silu", TURNED.detach()),
        ),
        (
            "layout of the residual ignored, backward",
            "kept = None if kept is None else laid_out_as(kept, x)",
            "kept = kept",
            norm_act("silu", TURNED.detach()),
        ),
        (
            "param ignored, forward",
            "math, _, a, b = fused(activation, param)",
            "math, _, a, b = fused(activation, 0.01)",
            norm_act("leaky_relu", param=0.3),
        ),
        (
            "param ignored, backward",
            "_, gradient, a, b = fused(activation, param)",
            "_, gradient, a, b = fused(activation, 0.01)",
            norm_act("leaky_relu", ADDED, param=0.3),
        ),
        (
            "input not read for the activation's gradient",
            "x if not evaluates or then.reads_x else None",
            "x if not evaluates else None",
            norm_act("silu", training=False, frozen=True),
        ),
        (
            "input not read for the bias's gradient",
            "x if results[1] is not None or then.reads_x else None",
            "x if results[1] is not None else None",
            partial(
                assert_parity,
                partial(ours.batch_norm_act, activation="silu"),
                partial(composed, activation="silu", param=None, residual=None),
                *(SMALL, torch.zeros(3), torch.ones(3), None, torch.rand(3).requires_grad_()),
            ),
        ),
        (
            "output mask ignored: residual",
            "dresidual = dresidual if wanted[3] else None",
            "dresidual = dresidual",
            residual_mask,
        ),
    ),
    *in_file(
        "activation.py",
        {},
        (
            "a fused elu has no scale",
            '"elu": (_elu, _elu_grad, None, 1.0)',
            '"elu": (_elu, _elu_grad, None, 0.0)',
            norm_act("elu", param=0.7),
        ),
        (
            "a fused selu has elu's arguments",
            '"selu": (_elu, _elu_grad, *SELU)',
            '"selu": (_elu, _elu_grad, 1.0, 1.0)',
            norm_act("selu"),
        ),
        (
            "a fused sigmoid's gradient takes the input for the output",
            "return _sigmoid_grad(dy, _sigmoid(x, a, b), a, b)",
            "return _sigmoid_grad(dy, x, a, b)",
            norm_act("sigmoid"),
        ),
        (
            "a fused tanh's gradient takes the input for the output",
            "return _tanh_grad(dy, _tanh(x, a, b), a, b)",
            "return _tanh_grad(dy, x, a, b)",
            norm_act("tanh"),
        ),
    ),
]

SCALE = the_test("the_scale_divides_and_gradients_lose_it", "SGD", torch.float32)
OVERFLOW = the_test("an_overflow_leaves_everything", "AdamW")
PAUSES = the_test("parameters_that_pause_keep_their_own_counts", "Adam")
NOT_FINITE_STEP = the_test("values_that_are_not_finite", "AdamW", {"amsgrad": True}, torch.float32)
GROUPS_CLIP = the_test("groups_clip_by_the_norm_of_all")
HALF_STATE = the_test("half_parameters_with_float32_state", "AdamW", torch.bfloat16)


def average(corrected: bool, dtype=torch.float32):
    return the_test("averages_of_the_weights", corrected, dtype)


def not_finite_norm(bad: float, max_norm: float = 1.0):
    return the_test("clipping_by_a_norm_that_is_not_finite", max_norm, bad, torch.float32)


MULTI_TENSOR = [
    *in_file(
        "_tables.py",
        TABLES,
        (
            "mask one too wide, load",
            "mask=i < left, other=0.0)",
            "mask=i <= left, other=0.0)",
            clipped(0.5),
        ),
        ("mask one too narrow", "mask=i < left, other", "mask=i < left - 1, other", around("SGD")),
        (
            "mask one too wide, store",
            "x.to(dtype), mask=i < left)",
            "x.to(dtype), mask=i <= left)",
            around("SGD"),
        ),
        (
            "a chunk goes on to the end of its tensor",
            "end = tl.minimum(start + CHUNK, field(rows_ptr, NUMEL, tensors, tensor))",
            "end = field(rows_ptr, NUMEL, tensors, tensor)",
            around("SGD"),
        ),
        (
            "chunk one short",
            "tensor << 32 | torch.arange(len(tensor)) - first",
            "tensor << 32 | (torch.arange(len(tensor)) - first - 1).clamp(min=0)",
            around("SGD"),
        ),
        (
            "last chunk left out",
            "max(1, cdiv(size",
            "max(1, size // CHUNK.value, 0 * cdiv(size",
            around("SGD"),
        ),
    ),
    *in_file(
        "_tables.py",
        {},
        (
            "alignment of the gradient not looked at",
            "(bits | grad) % 16",
            "bits % 16",
            the_test("one_tensor_that_is_not_aligned_is_enough", "gradient"),
        ),
        (
            "alignment of the last column alone",
            "bits |= column[i] % 16",
            "bits = column[i] % 16",
            the_test("one_tensor_that_is_not_aligned_is_enough", "parameter"),
        ),
        (
            "new hyperparameters not sent",
            "if numbers != self._numbers:",
            "if self._numbers is None:",
            the_test("the_learning_rate_in_the_velocity", {}),
        ),
        (
            "a change of groups or starts not sent",
            "if layout != self._layout:",
            "if self._layout is None:",
            the_test("the_learning_rate_in_the_velocity", {"dampening": 0.5}),
        ),
        (
            "groups not told",
            "(groups[i] if groups else 0)",
            "0",
            the_test("groups_with_options_of_their_own_are_one_launch", "Adam"),
        ),
    ),
    *in_file(
        "multi_tensor.py",
        TABLES,
        (
            "tail taken for a whole block",
            "(left >= BLOCK) &",
            "(left > 0) &",
            around("SGD"),
            3,
        ),
        (
            "counts of the first tensors alone",
            "for first in range(0, tensors, BLOCK):",
            "for first in range(0, BLOCK, BLOCK):",
            around("Adam", MANY),
        ),
        (
            "norm of the first chunks alone",
            "for first in range(0, n, BLOCK):",
            "for first in range(0, BLOCK, BLOCK):",
            clipped(0.5, MANY),
        ),
        (
            "norm's mask one too wide",
            "mask=i < n - first",
            "mask=i <= n - first",
            clipped(0.5),
        ),
        (
            "a chunk's last block alone in the norm",
            "squares += g * g",
            "squares = g * g",
            clipped(0.5),
        ),
        (
            "the first program to come counts, not the last",
            "== tl.num_programs(0) - 1",
            "== 0",
            around("Adam"),
        ),
    ),
    *in_file(
        "multi_tensor.py",
        {},
        ("gradient multiplied by the scale", "g = g / scale", "g = g * scale", SCALE),
        (
            "norm with the scale",
            "norm = norm / tl.load(grad_scale_ptr)",
            "norm = norm * 1.0",
            SCALE,
        ),
        (
            "gradient keeps its scale",
            "store(grad, first, left, g, GRAD_TYPE, WHOLE)  #",
            "store(grad, first, left, g * scale, GRAD_TYPE, WHOLE)  #",
            SCALE,
        ),
        ("clipped gradient written", "g = g / scale", "g = g / scale * clip", SCALE),
        (
            "overflow ignored",
            "return tl.load(found_inf_ptr) == 0",
            "return tl.load(found_inf_ptr) != 2",
            OVERFLOW,
        ),
        (
            "ticket not put back",
            "tl.store(ticket_ptr, 0)",
            "tl.store(ticket_ptr, tl.num_programs(0))",
            PAUSES,
        ),
        (
            "power of beta off by one",
            "step = 1 + _count(rows_ptr, STEP",
            "step = 2 + _count(rows_ptr, STEP",
            PAUSES,
        ),
        (
            "count of another tensor",
            "address = field(rows_ptr, column, tensors, tensor)",
            "address = field(rows_ptr, column, tensors, 0)",
            PAUSES,
        ),
        (
            "first moment not corrected",
            "step_size = lr / -_expm1(step * log_beta1)",
            "step_size = lr",
            stepped("Adam"),
        ),
        (
            "correction without its root",
            "correction = tl.sqrt(-_expm1(step * log_beta2))",
            "correction = -_expm1(step * log_beta2)",
            stepped("Adam"),
        ),
        (
            "1 - beta from float32",
            "beta2, 1 - beta2,",
            "beta2, (1 - torch.tensor(beta2)).item(),",
            stepped("Adam"),
        ),
        ("1 - beta ** t from float32", "x > -0.35", "x > 0", stepped("Adam", lr=1.0)),
        (
            "Taylor's sum where it is not good",
            "x > -0.35",
            "x > -3.5",
            stepped("Adam", betas=(0.1, 0.5), lr=0.1),
        ),
        (
            "AMSGrad of the corrected moment",
            "tl.maximum(v_max, v, ",
            "tl.maximum(v_max, v / (correction * correction), ",
            stepped("Adam", amsgrad=True),
        ),
        (
            "AMSGrad drops a NaN",
            "tl.maximum(v_max, v, propagate_nan=tl.PropagateNan.ALL)",
            "tl.where(v > v_max, v, v_max)",
            NOT_FINITE_STEP,
        ),
        (
            "AMSGrad kept, not used",
            "(tl.sqrt(v_max) / correction + eps)",
            "(tl.sqrt(v) / correction + eps)",
            stepped("Adam", amsgrad=True, betas=(0.5, 0.5)),
        ),
        (
            "Adam's eps inside the root",
            "(tl.sqrt(v_max) / correction + eps)",
            "(tl.sqrt(v_max + eps) / correction)",
            stepped("Adam", eps=1e-3),
        ),
        (
            "Adam's eps corrected, too",
            "(tl.sqrt(v_max) / correction + eps)",
            "((tl.sqrt(v_max) + eps) / correction)",
            stepped("Adam", eps=1e-3),
        ),
        (
            "decoupled weight decay left out",
            "return p * decay - step_size",
            "return p - step_size",
            stepped("AdamW"),
        ),
        (
            "decoupled weight decay without the learning rate",
            "1 - lr * tl.load(number_ptr + 6)",
            "1 - tl.load(number_ptr + 6)",
            stepped("AdamW"),
        ),
        (
            "weight decay in the gradient left out",
            "tl.where(l2 != 0, g + l2 * p, g)",
            "g",
            stepped("Adam", weight_decay=0.1),
        ),
        (
            "weight decay of the other sign where maximized",
            "tl.where(l2 != 0, g + l2 * p, g)",
            "tl.where(l2 != 0, g + sign * l2 * p, g)",
            stepped("SGD", weight_decay=0.1, maximize=True),
        ),
        (
            "no weight decay makes NaN",
            "tl.where(l2 != 0, g + l2 * p, g)",
            "g + l2 * p",
            the_test("values_that_are_not_finite", "SGD", {}, torch.float32),
        ),
        ("maximize ignored", "-1.0 if maximize else 1.0", "1.0", stepped("SGD", maximize=True)),
        (
            "options of the first group for all",
            "(flags >> GROUP_SHIFT) * NUMBERS",
            "(flags >> GROUP_SHIFT) * 0",
            the_test("groups_with_options_of_their_own_are_one_launch", "SGD"),
        ),
        (
            "a first gradient dampened",
            "tl.where(starts, 1.0, gain)",
            "gain",
            stepped("SGD", momentum=0.9, dampening=0.5),
        ),
        (
            "no gradient dampened",
            "tl.where(starts, 1.0, gain)",
            "1.0",
            stepped("SGD", momentum=0.9, dampening=0.5),
        ),
        (
            "momentum of the new gradient",
            "v = momentum * v + gain * g",
            "v = momentum * (v + gain * g)",
            stepped("SGD", momentum=0.9),
        ),
        (
            "Nesterov's velocity in full",
            "tl.where(nesterov, g + momentum * v, v)",
            "tl.where(nesterov, g + v, v)",
            stepped("SGD", momentum=0.9, nesterov=True),
        ),
        (
            "learning rate twice",
            "tl.where(lr_in_velocity, 1.0, lr)",
            "lr",
            the_test("the_learning_rate_in_the_velocity", {"nesterov": True}),
        ),
        (
            "learning rate of the host",
            "if address != 0:\n        lr = tl.load",
            "if address == 1:\n        lr = tl.load",
            learning_rate_on_the_device,
        ),
        (
            "RMSprop's eps inside the root",
            "(tl.sqrt(v - mean * mean) + eps)",
            "tl.sqrt(v - mean * mean + eps)",
            stepped("RMSprop", eps=1e-3),
        ),
        (
            "mean's square added",
            "tl.sqrt(v - mean * mean)",
            "tl.sqrt(v + mean * mean)",
            stepped("RMSprop", centered=True),
        ),
        (
            "centered always",
            "tl.where(centered, _lerp(mean, g, gain), 0.0)",
            "_lerp(mean, g, gain)",
            stepped("RMSprop"),
        ),
        (
            "learning rate in RMSprop's velocity",
            "return p - lr * b, v, b, mean",
            "return p - lr * b, v, b * lr, mean",
            stepped("RMSprop", momentum=0.9),
        ),
        (
            "two states in one column",
            "field(rows_ptr, STATE + 1, tensors, tensor) if",
            "field(rows_ptr, STATE, tensors, tensor) if",
            stepped("Adam"),
        ),
        (
            "state in the parameter's type",
            "STATE_TYPE=next((TYPES[dtype] for dtype in states if dtype), tl.float32)",
            "STATE_TYPE=TYPES[types[PARAM.value]]",
            HALF_STATE,
        ),
        (
            "state rounded to the parameter's type",
            "p, x, y, z = UPDATE(p, g, x, y, z, scalars)",
            "p, x, y, z = UPDATE(p, g, x, y, z, scalars)\n    x = x.to(PARAM_TYPE).to(tl.float32)",
            HALF_STATE,
        ),
        ("clips what is short", "tl.where(factor > 1,", "tl.where(factor < 1,", GROUPS_CLIP),
        (
            "a NaN does not clip",
            "tl.where(factor > 1, 1.0, factor)",
            "tl.where(factor <= 1, factor, 1.0)",
            not_finite_norm(NAN),
        ),
        ("a NaN is not written", "if clip != 1:", "if clip < 1:", not_finite_norm(NAN)),
        (
            "an infinite limit spares what torch clips",
            "tl.where(factor > 1, 1.0, factor)",
            'tl.where((factor > 1) | (max_norm == float("inf")), 1.0, factor)',
            not_finite_norm(INF, max_norm=INF),
        ),
        (
            "nothing keeps the norm from 0",
            "max_norm / (norm + 1e-6)",
            "max_norm / norm",
            the_test("clipping_gradients_of_almost_nothing", 1e-7, 1e-6),
        ),
        (
            "a group without a limit clipped",
            "tl.where(max_norm < 0, 1.0, _clip(tl.load(norm_ptr), max_norm))",
            "_clip(tl.load(norm_ptr), max_norm)",
            GROUPS_CLIP,
        ),
        (
            "average of the weights before the step",
            "p, x, y, z = UPDATE(p, g, x, y, z, scalars)\n"
            "    store(param, first, left, p, PARAM_TYPE, WHOLE)",
            "q, x, y, z = UPDATE(p, g, x, y, z, scalars)\n"
            "    store(param, first, left, q, PARAM_TYPE, WHOLE)",
            average(corrected=False),
        ),
        (
            "average of weights not yet rounded",
            "_lerp(average, p.to(PARAM_TYPE).to(tl.float32), ema_gain)",
            "_lerp(average, p, ema_gain)",
            average(corrected=False, dtype=torch.bfloat16),
        ),
        (
            "average's count off by one",
            "ema_step = 1 + _count(",
            "ema_step = 2 + _count(",
            average(corrected=True),
        ),
        (
            "average starts at the weights before the first step",
            "tl.where(step == 1, 1.0, gain)",
            "gain",
            average(corrected=False),
        ),
        (
            "average's count stays",
            "_increment(rows_ptr + EMA_STEP * tensors",
            "_increment(rows_ptr + STEP * tensors",
            average(corrected=True),
        ),
        (
            "average not corrected",
            "_log(decay) if ema_bias_correction else",
            "-math.inf if ema_bias_correction else",
            average(corrected=True),
        ),
    ),
]

MISTAKES = [*ACTIVATION, *SHARED, *SOFTMAX, *CROSS_ENTROPY, *ONCE, *LOSS, *DROPOUT, *BATCH_NORM]
MISTAKES += [*BIAS_ACT, *MULTI_TENSOR]
IDS = [f"{mistake.file.removesuffix('.py')}: {mistake.name}" for mistake in MISTAKES]


@pytest.fixture
def run_through(tmp_path, monkeypatch):
    """Let the pieces run through a copy of the kernels, with one file's text changed."""
    packages = []

    def load(file: str, text: str, sizes: dict[str, int]) -> None:
        package = f"planted_kernels_{len(packages)}"
        packages.append(package)
        folder = tmp_path / package
        shutil.copytree(KERNELS, folder, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / file).write_text(text)
        modules = _imported(package, folder)
        for module in modules.values():
            for size in sizes.keys() & vars(module).keys():
                setattr(module, size, sizes[size])

        def find(file: str, name: str) -> Any:
            return guarded(getattr(modules[file], name))

        monkeypatch.setattr(dispatch, "find_kernel", find)
        monkeypatch.setattr(_one_launch, "find_kernel", find)

    yield load
    for name in [name for name in sys.modules if name.split(".")[0] in packages]:
        del sys.modules[name]


def _imported(package: str, folder: Path) -> dict[str, Any]:
    """Every module of a package outside the import path."""
    path = folder / "__init__.py"
    spec = importlib.util.spec_from_file_location(
        package, path, submodule_search_locations=[str(folder)]
    )
    sys.modules[package] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[package])
    names = [file.stem for file in folder.glob("*.py") if file != path]
    return {name: importlib.import_module(f"{package}.{name}") for name in names}


@pytest.mark.parametrize("mistake", MISTAKES, ids=IDS)
def test_planted_mistakes_are_caught(mistake, run_through):
    text = (KERNELS / mistake.file).read_text()
    assert text.count(mistake.right) == mistake.times, "the kernel changed: plant this anew"
    run_through(mistake.file, text, mistake.sizes)
    mistake.check()
    run_through(mistake.file, text.replace(mistake.right, mistake.wrong), mistake.sizes)
    with pytest.raises(AssertionError):
        mistake.check()


def test_every_size_made_small_is_there():
    """A size that was renamed would leave a loop or a split untried."""
    texts = "".join(path.read_text() for path in KERNELS.glob("*.py"))
    for size in BLOCKS | LOOP | SPLIT | TABLES | TILES:
        assert f"\n{size} = " in texts

"""Bytes and launches of every kernel, counted in the interpreter, against the least there can be.

An access counts the distinct addresses that it touches: lanes that read one number together read it
once. What is counted is what the multiprocessors ask of the caches, so a second pass over a row
counts in full although it mostly hits L2.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from pieces import PIECES
from torch.utils._python_dispatch import TorchDispatchMode

import torchref.optim
from torchref.triton_kernels import (
    _launch,
    batch_norm,
    bias_act_dropout,
    cross_entropy,
    dropout,
    linear,
    linear_cross_entropy,
    loss,
    softmax,
)

pytestmark = pytest.mark.skipif(not _launch.INTERPRETED, reason="counts in the interpreter only")

N, C = 64, 1024
X, DY = torch.randn(N, C), torch.randn(N, C)
NCHW, NHWC = torch.randn(8, 16, 16, 32), torch.randn(8, 16, 32, 16).movedim(-1, 1)
TARGET, WEIGHT = torch.randint(0, C, (N,)), torch.rand(C)
ROWS, CHANNELS = torch.rand(N), torch.rand(16) + 0.5
ONE, THREE = torch.ones(()), torch.full((), 3.0)
SEED = torch.tensor(3)

# What the table in the kernels' docstrings promises: launches, and elements moved for each of x.
CASES: dict[str, tuple[Callable[[], Any], int, float]] = {
    "dropout": (lambda: dropout.seeded_dropout_fwd(X, SEED, 0.5, 0.5, False), 1, 2),
    "dropout backward": (
        lambda: dropout.seeded_dropout_bwd(DY, SEED, 0.5, 0.5, (C, 1)),
        1,
        2,
    ),
    "softmax": (lambda: softmax.softmax_fwd(X, 1), 1, 2),
    "softmax backward": (lambda: softmax.softmax_bwd(DY, X, 1), 1, 3),
    "softmax, strided": (lambda: softmax.softmax_fwd(NCHW, 1), 1, 2),
    "log-softmax backward": (lambda: softmax.log_softmax_bwd(DY, X, 1), 1, 3),
    "cross-entropy": (
        lambda: cross_entropy.cross_entropy_fwd(X, TARGET, None, "mean", -100, None),
        2,
        1,
    ),
    "cross-entropy, smoothed and weighted": (
        lambda: cross_entropy.cross_entropy_fwd(X, TARGET, WEIGHT, "mean", -100, 0.1),
        2,
        1 + 1 / 2,  # two rows in a tile share one reading of the weights, which stay in L1
    ),
    "cross-entropy backward": (
        lambda: cross_entropy.cross_entropy_bwd(
            ONE, X, TARGET, None, ROWS, ROWS, ONE, "mean", -100, None
        ),
        1,
        2,
    ),
    "cross-entropy, probabilities": (
        lambda: cross_entropy.probability_cross_entropy_fwd(X, DY, None, "mean", None),
        2,
        2,
    ),
    "cross-entropy, probabilities, backward": (
        lambda: cross_entropy.probability_cross_entropy_bwd(
            ONE, X, DY, None, ROWS, ROWS, ROWS, "mean", None
        ),
        1,
        3,
    ),
    "cross-entropy, gradient of probabilities": (
        lambda: cross_entropy.probability_cross_entropy_target_bwd(
            ONE, X, DY, None, ROWS, ROWS, "mean", None
        ),
        1,
        2,
    ),
    "nll": (lambda: cross_entropy.nll_loss_fwd(X, TARGET, None, "mean", -100), 2, 0),
    "nll backward": (
        lambda: cross_entropy.nll_loss_bwd(ONE, X, TARGET, None, ONE, "mean", -100),
        1,
        1,
    ),
    # the second reading of the scores, of a program's own rows just read, is counted too
    "cross-entropy and its gradient": (
        lambda: cross_entropy.cross_entropy_once_fwd(X, TARGET, None, ONE, -100, None),
        2,
        3,
    ),
    "cross-entropy and its gradient, upstream 1": (
        lambda: cross_entropy.cross_entropy_once_bwd(X.clone(), ONE),
        2,  # one is the clone
        0,
    ),
    "cross-entropy and its gradient, upstream 3": (
        lambda: cross_entropy.cross_entropy_once_bwd(X.clone(), THREE),
        2,
        2,
    ),
    "cross-entropy of a chunk": (
        lambda: linear_cross_entropy.losses_fwd(X.clone(), TARGET, None, -100, None, True),
        2,
        3,
    ),
    "cross-entropy of a chunk, losses alone": (
        lambda: linear_cross_entropy.losses_fwd(X, TARGET, None, -100, None, False),
        1,
        1,
    ),
    "mse": (lambda: loss.mse_loss_fwd(X, DY, "mean"), 2, 2),
    "mse, not reduced": (lambda: loss.mse_loss_fwd(X, DY, "none"), 1, 3),
    "mse backward": (lambda: loss.mse_loss_bwd(ONE, X, DY, "mean"), 1, 3),
    "l1 backward, not reduced": (lambda: loss.l1_loss_bwd(X, X, DY, "none"), 1, 4),
    "bce with logits, weights": (
        lambda: loss.bce_with_logits_loss_fwd(X, DY, X, DY, "sum"),
        2,
        4,
    ),
    "bias gradient": (lambda: linear.linear_bias_bwd(DY), 1, 1),
}
for activation, seed in itertools.product(("relu", "gelu"), (None, SEED)):
    # a ReLU's backward reads the mask off the output
    noise, p = None if activation == "relu" else seed, 0.0 if seed is None else 0.5
    words = f"{activation}{'' if seed is None else ', dropped'}"
    CASES |= {
        f"bias, {words}": (
            lambda a=activation, s=seed, p=p: bias_act_dropout.bias_act_dropout_fwd(
                X, WEIGHT, s, a, 0.0, p
            ),
            1,
            2 + 1 / 8,  # eight rows in a tile share one reading of the bias, which stays in L1
        ),
        f"bias, {words}, backward": (
            lambda a=activation, s=noise, p=p: bias_act_dropout.bias_act_dropout_bwd(
                DY, X, WEIGHT, s, a, 0.0, p, (True, True)
            ),
            1,
            3 + 1 / 64,  # a sum of each column
        ),
        f"bias, {words}, backward of x alone": (
            lambda a=activation, s=noise, p=p: bias_act_dropout.bias_act_dropout_bwd(
                DY, X, WEIGHT, s, a, 0.0, p, (True, False)
            ),
            1,
            3,
        ),
        f"bias, {words}, backward of the bias alone": (
            lambda a=activation, s=noise, p=p: bias_act_dropout.bias_act_dropout_bwd(
                DY, X, WEIGHT, s, a, 0.0, p, (False, True)
            ),
            1,
            2 + 1 / 64,
        ),
    }
for layout, x, launches in (("NCHW", NCHW, 2), ("NHWC", NHWC, 3)):  # of which one merges parts
    parameters = (CHANNELS, CHANNELS, CHANNELS, CHANNELS)
    CASES |= {
        f"batch norm, {layout}": (
            lambda x=x, p=parameters: batch_norm.batch_norm_fwd(x, *p, 0.1, 1e-5, True),
            launches,
            3,
        ),
        f"batch norm backward, {layout}": (
            lambda x=x: batch_norm.batch_norm_bwd(x, x, *[CHANNELS] * 3, (True, True, True, False)),
            launches,
            5,
        ),
        f"batch norm evaluation, {layout}": (
            lambda x=x, p=parameters: batch_norm.batch_norm_eval_fwd(x, *p, 1e-5),
            1,
            2,
        ),
        f"batch norm's statistics alone, {layout}": (
            lambda x=x: batch_norm.batch_norm_stats_fwd(x),
            launches,  # one writes zeros
            1,
        ),
        f"batch norm backward from sums, {layout}": (
            lambda x=x: batch_norm.batch_norm_dx_bwd(x, x, *[CHANNELS] * 5),
            1,
            3,
        ),
        f"batch norm evaluation backward, dx alone, {layout}": (
            lambda x=x: batch_norm.batch_norm_eval_bwd(
                x, x, *[CHANNELS] * 3, 1e-5, (True, False, False, False)
            ),
            1,
            2,
        ),
    }
# Eight channels: six numbers of each for a tile of 2048 would be a twentieth of x with sixteen.
FEW = torch.randn(8, 16, 64, 8).movedim(-1, 1)
for (layout, x, launches), name, added in itertools.product(
    (("NCHW", NCHW, 2), ("NHWC", FEW, 3)), ("relu", "silu"), (False, True)
):
    path, c = f"{name}{' after a residual' if added else ''}, {layout}", CHANNELS[: x.shape[1]]
    residual, parameters = (x if added else None), (c, c, c, c)
    then, backward_then = (residual, name, 0.0), (c, residual, name, 0.0)
    # it reads dy, x and the residual, or dy and the output of a ReLU after a residual
    frozen = 2 if not added or name == "relu" else 3
    CASES |= {
        f"batch norm, {path}": (
            lambda x=x, p=parameters, t=then: batch_norm.batch_norm_fwd(x, *p, 0.1, 1e-5, True, *t),
            launches,
            4 if added else 3,
        ),
        f"batch norm backward, {path}": (
            lambda x=x, c=c, added=added, t=backward_then: batch_norm.batch_norm_bwd(
                x, x, c, c, c, (True, True, True, added), *t
            ),
            launches,
            7 if added else 5,
        ),
        f"batch norm evaluation, {path}": (
            lambda x=x, p=parameters, t=then: batch_norm.batch_norm_eval_fwd(x, *p, 1e-5, *t),
            1,
            3 if added else 2,
        ),
        f"batch norm evaluation backward, no parameter's gradient, {path}": (
            lambda x=x, c=c, added=added, t=backward_then: batch_norm.batch_norm_eval_bwd(
                x, x, c, c, c, 1e-5, (True, False, False, added), *t
            ),
            1,
            frozen + (2 if added else 1),
        ),
    }


@dataclass
class Traffic(TorchDispatchMode):
    """The launches and the bytes of a call, torch's own among them."""

    launches: list[str] = field(default_factory=list)
    accesses: int = 0

    def __post_init__(self):
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func._schema.name.startswith(("aten::empty", "aten::detach")) and not func.is_view:
            self.launches.append(func._schema.name)
        return func(*args, **(kwargs or {}))

    def counts(self, access, has_value: bool):
        def counted(builder, pointers, *rest):
            mask = rest[1] if has_value else rest[0]
            addresses = np.unique(pointers.data[np.broadcast_to(mask.data, pointers.data.shape)])
            self.accesses += addresses.size * pointers.get_element_ty().primitive_bitwidth // 8
            return access(builder, pointers, *rest)

        return counted


@pytest.fixture
def traffic(monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    counter = Traffic()
    run = _launch._run

    def counted(kernel, *call):
        counter.launches.append(kernel.fn.__name__)
        with torch.utils._python_dispatch._disable_current_modes():
            run(kernel, *call)

    monkeypatch.setattr(_launch, "_run", counted)
    for name, has_value in (("create_masked_load", False), ("create_masked_store", True)):
        access = counter.counts(getattr(Builder, name), has_value)
        monkeypatch.setattr(Builder, name, access)
    return counter


@pytest.fixture
def kernels():
    """For optimizers, whatever the process's backend."""
    with torchref.backend("triton"):
        yield


@pytest.mark.parametrize("name", CASES)
def test_bytes_and_launches(name, traffic):
    call, launches, elements = CASES[name]
    with traffic:
        call()
    assert len(traffic.launches) == launches, traffic.launches
    # Of the rest, a few numbers for each row, channel or program: less than a twentieth of x.
    moved = traffic.accesses / X.element_size() / X.numel()
    assert elements <= moved < elements + 0.06, (moved, traffic.launches)


@pytest.mark.parametrize(
    "piece", [p for p in PIECES if len(p.inputs(torch.float32)) == 1], ids=lambda p: p.name
)
def test_pieces_of_one_tensor_move_two_elements_and_three(piece, traffic):
    x = X.clone().requires_grad_()
    y = piece.ours(x)
    assert len(traffic.launches) == 1
    assert 2 <= traffic.accesses / X.nbytes < 2.06
    traffic.accesses = 0
    y.backward(DY)
    assert len(traffic.launches) == 2
    elements = 2 if piece.random else 3  # a mask is made again
    assert elements <= traffic.accesses / X.nbytes < elements + 0.06


def test_rows_wider_than_a_tile_are_read_twice(traffic, monkeypatch):
    monkeypatch.setattr(softmax, "WIDEST_FWD", 16)
    monkeypatch.setattr(softmax, "WIDEST_BWD", 16)
    for call, elements in (
        (lambda: softmax.softmax_fwd(X, 1), 3),
        (lambda: softmax.softmax_bwd(DY, X, 1), 5),
        (lambda: softmax.log_softmax_bwd(DY, X, 1), 4),  # the sum is of dy alone
    ):
        traffic.accesses = 0
        call()
        assert traffic.accesses == elements * X.numel() * X.element_size()


@pytest.mark.parametrize("rows", [64, 256])
def test_a_bias_gradient_in_parts_takes_one_launch_more(rows, traffic):
    """Partial sums of 64 rows, written and read."""
    x, dy = torch.randn(rows, C), torch.randn(rows, C)
    with traffic:
        bias_act_dropout.bias_act_dropout_bwd(dy, x, WEIGHT, None, "gelu", 0.0, 0.0, (True, True))
    parts = rows // 64
    assert len(traffic.launches) == (1 if parts == 1 else 2)
    # dy, x, dx; the bias for each part; each part's sums, and what they are added up to
    expected = 3 * rows + parts + parts + (0 if parts == 1 else parts + 1)
    assert traffic.accesses == expected * C * x.element_size()


def test_split_batch_norm_takes_one_launch_more(traffic, monkeypatch):
    monkeypatch.setattr(batch_norm, "SHARE_BYTES", 4096)
    x = torch.randn(8, 2, 64, 64)
    with traffic:
        _, mean, rstd = batch_norm.batch_norm_fwd(x, None, None, None, None, 0.1, 1e-5, True)
        batch_norm.batch_norm_bwd(x, x, None, mean, rstd, (True, False, False, False))
    assert len(traffic.launches) == 6


FP32, BF16 = torch.float32, torch.bfloat16
STEP, NORM = ["_step_kernel"], ["_squares_kernel", "_norm_kernel"]
# Bytes a parameter: those of its gradient read, those of the parameter and its state read and
# written, once more the gradient's for its norm.
STEPS: dict[str, tuple[type, dict[str, Any], list[str], float]] = {
    "SGD": (torchref.optim.SGD, {}, STEP, 12),
    "SGD, momentum": (torchref.optim.SGD, {"momentum": 0.9}, STEP, 20),
    "SGD, average": (torchref.optim.SGD, {"ema_decay": 0.9}, STEP, 20),
    "RMSprop": (torchref.optim.RMSprop, {}, STEP, 20),
    "RMSprop, momentum": (torchref.optim.RMSprop, {"momentum": 0.9}, STEP, 28),
    "RMSprop, centered": (torchref.optim.RMSprop, {"momentum": 0.9, "centered": True}, STEP, 36),
    "Adam": (torchref.optim.Adam, {}, STEP, 28),
    "AdamW, AMSGrad": (torchref.optim.AdamW, {"amsgrad": True}, STEP, 36),
    "AdamW, average": (torchref.optim.AdamW, {"ema_decay": 0.9}, STEP, 36),
    "AdamW, clipped": (torchref.optim.AdamW, {"max_norm": 1.0}, NORM + STEP, 32),
}


def weights(dtype: torch.dtype = FP32) -> list[torch.nn.Parameter]:
    """Not all in whole chunks: what a tail reads twice would show, too."""
    params = [torch.nn.Parameter(torch.randn(n).to(dtype)) for n in (3 * 4096, 4096 - 512, 5000)]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


# A program reads its word, the row of its tensor and the group's numbers: less than 200 bytes.
TABLES = 200 * 6 / (3 * 4096 + 4096 - 512 + 5000)


def bytes_a_parameter(traffic, params, step) -> float:
    traffic.accesses = 0
    traffic.launches.clear()
    step()
    return traffic.accesses / sum(p.numel() for p in params)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", STEPS)
def test_steps_move_every_tensor_once(name, traffic):
    cls, options, launches, expected = STEPS[name]
    params = weights()
    optimizer = cls(params, **options)
    optimizer.step()
    moved = bytes_a_parameter(traffic, params, optimizer.step)
    assert traffic.launches == launches
    assert expected <= moved < expected + TABLES


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("state_dtype", "expected"), [(FP32, 22), (None, 14)])
def test_half_parameters_move_half(state_dtype, expected, traffic):
    params = weights(BF16)
    optimizer = torchref.optim.AdamW(params, state_dtype=state_dtype)
    optimizer.step()
    moved = bytes_a_parameter(traffic, params, optimizer.step)
    assert expected <= moved < expected + TABLES


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("max_norm", "expected"), [(1.0, 12), (1e6, 4)])
def test_clipping_writes_only_where_the_norm_is_too_large(max_norm, expected, traffic):
    params = weights()
    moved = bytes_a_parameter(
        traffic, params, lambda: torchref.optim.clip_grad_norm_(params, max_norm)
    )
    assert traffic.launches == [*NORM, "_clip_kernel"]
    assert expected <= moved < expected + TABLES


@pytest.mark.usefixtures("kernels")
def test_an_overflow_reads_nothing_but_the_verdict(traffic):
    params = weights()
    optimizer = torchref.optim.AdamW(params, fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.ones(())
    optimizer.step()
    assert bytes_a_parameter(traffic, params, optimizer.step) < 4 / 1000

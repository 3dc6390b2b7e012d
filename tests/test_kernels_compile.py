"""Every kernel on every path, compiled ahead of time for four GPUs, within the budgets of a table.

A row of kernel_budgets.txt is a kernel as a launcher specializes it, under the first case here that
does. For each target it says how many registers a thread may have, how many loads and stores in the
code must be wide (128 bits or more) and how many may be narrow. Nothing may spill. Both kinds are
counted as the compiler emits them: the full tile and the masked one, and not how often they run.

One table serves every supported Triton, so it holds the worst of them. Under each of them, 3.6, 3.8
and 3.9 today,

    python tests/test_kernels_compile.py --update

writes the rows that are new, drops those that are gone and moves the budgets that do not hold to
what is measured; for registers, to that rounded up to the 8 in which they are allocated, and 8
more. It tightens nothing: delete the rows of a kernel that became better, then update.
"""

import functools
import inspect
import itertools
import os
import sys
import typing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, TypeAlias

import pytest
import torch
from kernel_compiling import (
    CUOBJDUMP,
    MODULES,
    TARGETS,
    Built,
    Launch,
    build,
    recorded,
    specialized,
)
from torch import Tensor
from triton.runtime.jit import JITFunction

from torchref.triton_kernels import (
    _launch,
    activation,
    batch_norm,
    bias_act_dropout,
    cross_entropy,
    dropout,
    linear,
    linear_cross_entropy,
    loss,
    multi_tensor,
    softmax,
)
from torchref.triton_kernels._tables import Tables

pytestmark = [
    pytest.mark.skipif(_launch.INTERPRETED, reason="the interpreter compiles nothing"),
    pytest.mark.skipif(not CUOBJDUMP.exists(), reason="Triton comes without NVIDIA's tools"),
]

TABLE = Path(__file__).with_name("kernel_budgets.txt")
UPDATE = "python tests/test_kernels_compile.py --update"
BF16, FP32 = torch.bfloat16, torch.float32
SHORT = {BF16: "bf16", FP32: "fp32"}
REDUCTIONS = ("mean", "none", "sum")
# The mathematics makes no difference to the masks.
ONCE_WITH_A_TAIL = (
    activation.relu_fwd,
    activation.relu_bwd,
    dropout.seeded_dropout_fwd,
    loss.mse_loss_fwd,
    loss.mse_loss_bwd,
)


MARKS = {"sm_80": pytest.mark.slow, "sm_100": pytest.mark.slow}
Row: TypeAlias = tuple[str, str]  # kernel and path
# Bytes a thread that wait for a better tile; fewer are fine.
KNOWN_SPILLS: dict[Row, int] = {
    ("_batch_norm_dx_kernel", "batch_norm_bwd bf16 64x1000"): 8,  # sm_100, Triton 3.6
    ("_batch_norm_dx_kernel", "batch_norm_bwd bf16 256x64x56x56 NHWC"): 8,  # likewise
    ("_batch_norm_sums_kernel", "batch_norm_bwd bf16 256x1024x14x14"): 8,  # sm_80, Triton 3.6
    # sm_90, Triton 3.6, at 40 registers
    ("_batch_norm_apply_kernel", "batch_norm_fwd fp32 256x64x56x56 NHWC relu residual"): 8,
    # sm_80, Triton 3.6
    ("_batch_norm_apply_kernel", "batch_norm_fwd bf16 256x64x56x56 NHWC gelu_tanh residual"): 8,
    # sm_100, Triton 3.9
    ("_batch_norm_sums_kernel", "batch_norm_eval_bwd bf16 256x64x56x56 NHWC silu"): 8,
    ("_step_kernel", "adam_step fp32 scaled clipped"): 8,  # sm_100, Triton 3.9, at 56 registers
}


@dataclass(frozen=True)
class Case:
    """A call of a launcher on meta tensors."""

    launcher: Callable[..., Any]
    path: str
    args: tuple[Any, ...]

    @property
    def name(self) -> str:
        return f"{self.launcher.__name__} {self.path}"


def meta(*shape: int, dtype: torch.dtype = FP32, channels_last: bool = False) -> Tensor:
    x = torch.empty(shape, dtype=dtype, device="meta")
    return x.to(memory_format=torch.channels_last) if channels_last else x


def scalar(dtype: torch.dtype) -> Tensor:
    return meta(dtype=dtype)


def launchers(module) -> list[Callable[..., Any]]:
    named = vars(module).items()
    return [f for name, f in named if inspect.isfunction(f) and _is_launcher(module, name, f)]


def _is_launcher(module, name: str, f: Callable[..., Any]) -> bool:
    is_public = f.__module__ == module.__name__ and not name.startswith("_")
    # those are for tables, and these for other files' launchers
    shared = (activation.fused, cross_entropy.losses_and_gradient)
    return is_public and not name.endswith("_numbers") and f not in shared


def cases() -> Iterator[Case]:
    for module in (activation, dropout, loss):
        for launcher in launchers(module):
            yield from pointwise(launcher)
    yield from softmaxes()
    yield from cross_entropies()
    yield from nll_losses()
    yield from losses_of_chunks()
    yield from cross_entropies_once()
    yield from batch_norms()
    yield from batch_norms_with_activations()
    for dtype, shape in ((BF16, (8192, 4096)), (FP32, (8192, 1000)), (BF16, (64, 4096))):
        yield Case(linear.linear_bias_bwd, _path(dtype, shape), (meta(*shape, dtype=dtype),))
    yield from biases_and_activations()
    yield from steps()
    yield from norms()


def pointwise(launcher: Callable[..., Any]) -> Iterator[Case]:
    """Every value of what the signature lets vary, and an n that no vector divides."""
    parameters = inspect.signature(launcher).parameters
    for dtype, n in ((BF16, 2**26), (FP32, 2**26), (BF16, 2**26 + 1)):
        if n % 2 and launcher not in ONCE_WITH_A_TAIL:
            continue
        choices = [_choices(p, n, dtype) for p in parameters.values()]
        for i in range(max(map(len, choices))):
            choice = [values[i % len(values)] for values in choices]
            args = dict(zip(parameters, (value for _, value in choice), strict=True))
            if "dy" in args and args.get("reduction", "none") != "none":
                args["dy"] = scalar(dtype)
            path = _path(dtype, (n,) if n % 2 else (), *(word for word, _ in choice))
            yield Case(launcher, path, tuple(args.values()))


def _choices(parameter: inspect.Parameter, n: int, dtype: torch.dtype) -> list[tuple[str, Any]]:
    """Words for the path, and values."""
    name, kind = parameter.name, parameter.annotation
    if name == "seed":
        return [("", scalar(torch.int64))]
    if name == "strides":
        return [("", (1,))]
    if kind is Tensor:
        return [("", meta(n, dtype=dtype))]
    if kind == Tensor | None:
        return [("", None), (name, meta(n, dtype=dtype))]
    if kind is bool:
        return [("", False), (name, True)]
    if name == "reduction":
        return [(reduction, reduction) for reduction in REDUCTIONS]
    assert kind is float, f"{name}: {kind} is new here"
    return [("", 0.3)]


def softmaxes() -> Iterator[Case]:
    shapes = [  # all but the loops hold a row in registers
        ((8192, 1000), 1),
        ((8192, 16384), 1),
        ((4096, 32768), 1),  # a loop backward
        ((4096, 50257), 1),  # a loop, and no row but the first aligned
        ((4096, 128256), 1),  # a loop
        ((8, 21, 512, 512), 1),
        ((64, 512, 32, 32), 1),  # a loop
    ]
    for dtype, (shape, dim) in itertools.product((BF16, FP32), shapes):
        if dtype == FP32 and len(shape) != 2:
            continue
        x, path = meta(*shape, dtype=dtype), _path(dtype, shape)
        yield Case(softmax.softmax_fwd, path, (x, dim))
        yield Case(softmax.softmax_bwd, path, (x, x, dim))
        if dtype == BF16:
            yield Case(softmax.log_softmax_fwd, path, (x, dim))
            yield Case(softmax.log_softmax_bwd, path, (x, x, dim))


def cross_entropies() -> Iterator[Case]:
    plain, full = ("mean", False, None), ("none", True, 0.1)  # reduction, weighted, smoothing
    for shape in [
        (4096, 16384),
        (4096, 50257),  # a loop, and no row but the first aligned
        (4096, 128256),  # a loop
        (8, 21, 512, 512),
        (8, 512, 64, 64),  # a loop
    ]:
        yield from _index_cross_entropy(BF16, shape, *plain)
        yield from _index_cross_entropy(BF16, shape, *full)
        yield from _probability_cross_entropy(BF16, shape, *full)
    for dtype, shape, *options in [
        (BF16, (8192, 1000), *plain),
        (BF16, (8192, 1000), "none", False, 0.1),
        (BF16, (8192, 1000), "sum", True, None),
        (FP32, (8192, 1000), *plain),
        (FP32, (4096, 50257), *full),
    ]:
        yield from _index_cross_entropy(dtype, shape, *options)
        yield from _probability_cross_entropy(dtype, shape, *options)


def _index_cross_entropy(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    reduction: str,
    weighted: bool,
    smoothing: float | None,
) -> Iterator[Case]:
    path = _scores_path(dtype, shape, reduction, weighted, smoothing)
    x, weight, index, dy = _scores(dtype, shape, reduction, weighted)
    row = meta(*index.shape)  # a maximum, the logarithm of a sum
    common = (reduction, -100, smoothing)
    yield Case(cross_entropy.cross_entropy_fwd, path, (x, index, weight, *common))
    args = (dy, x, index, weight, row, row, scalar(FP32), *common)
    yield Case(cross_entropy.cross_entropy_bwd, path, args)


def _probability_cross_entropy(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    reduction: str,
    weighted: bool,
    smoothing: float | None,
) -> Iterator[Case]:
    path = _scores_path(dtype, shape, reduction, weighted, smoothing)
    x, weight, index, dy = _scores(dtype, shape, reduction, weighted)
    row = meta(*index.shape)  # a maximum, the logarithm of a sum, a sum of coefficients
    common = (reduction, smoothing)
    yield Case(cross_entropy.probability_cross_entropy_fwd, path, (x, x, weight, *common))
    args = (dy, x, x, weight, row, row, row, *common)
    yield Case(cross_entropy.probability_cross_entropy_bwd, path, args)
    args = (dy, x, x, weight, row, row, *common)
    yield Case(cross_entropy.probability_cross_entropy_target_bwd, path, args)


def nll_losses() -> Iterator[Case]:
    for dtype, shape, reduction, weighted in [
        (BF16, (8192, 1000), "mean", False),
        (BF16, (8192, 1000), "none", True),
        (BF16, (4096, 50257), "sum", False),
        (BF16, (8, 21, 512, 512), "mean", True),
        (FP32, (8192, 1000), "mean", False),
    ]:
        path = _scores_path(dtype, shape, reduction, weighted, None)
        x, weight, index, dy = _scores(dtype, shape, reduction, weighted)
        args = (x, index, weight, reduction, -100)
        yield Case(cross_entropy.nll_loss_fwd, path, args)
        args = (dy, x, index, weight, scalar(FP32), reduction, -100)
        yield Case(cross_entropy.nll_loss_bwd, path, args)


def losses_of_chunks() -> Iterator[Case]:
    for dtype, shape, weighted, smoothing, gradient in [
        (BF16, (2048, 128256), False, None, True),
        (BF16, (2048, 50257), True, 0.1, True),
        (BF16, (4096, 16384), False, 0.1, True),
        (BF16, (8192, 1000), True, None, False),
        (FP32, (8192, 1000), False, None, True),
    ]:
        path = _scores_path(dtype, shape, "" if gradient else "losses", weighted, smoothing)
        x, weight, index, _ = _scores(dtype, shape, "none", weighted)
        args = (x, index, weight, -100, smoothing, gradient)
        yield Case(linear_cross_entropy.losses_fwd, path, args)


def cross_entropies_once() -> Iterator[Case]:
    for dtype, shape, weighted, smoothing in [
        (BF16, (8192, 1000), False, None),
        (BF16, (8192, 32768), False, None),  # a loop
        (BF16, (8192, 50257), True, 0.1),  # a loop, and no row but the first aligned
        (BF16, (8, 21, 512, 512), False, 0.1),
        (BF16, (8, 512, 64, 64), False, None),  # a loop
        (FP32, (8192, 1000), True, None),
    ]:
        path = _scores_path(dtype, shape, "", weighted, smoothing)
        x, weight, index, _ = _scores(dtype, shape, "mean", weighted)
        args = (x, index, weight, scalar(FP32), -100, smoothing)
        yield Case(cross_entropy.cross_entropy_once_fwd, path, args)
    for dtype, n in ((BF16, 2**26), (FP32, 2**26), (BF16, 2**26 + 1)):
        path = _path(dtype, (n,) if n % 2 else ())
        yield Case(cross_entropy.cross_entropy_once_bwd, path, (meta(n, dtype=dtype), scalar(FP32)))


def biases_and_activations() -> Iterator[Case]:
    for dtype, shape, name, p in [
        *(
            (dtype, (8192, 4096), *then)
            for dtype in (BF16, FP32)
            for then in (("relu", 0.0), ("relu", 0.1), ("gelu", 0.0), ("gelu", 0.1))
        ),
        *((BF16, (8192, 4096), name, 0.1) for name in activation.FUSED),
        (BF16, (8192, 1000), "gelu", 0.1),
        (BF16, (8192, 50), "relu", 0.1),
        (BF16, (8192, 1001), "relu", 0.0),  # no row but the first aligned
    ]:
        x, bias = meta(*shape, dtype=dtype), meta(shape[1], dtype=dtype)
        path = _path(dtype, shape, name, "dropped" if p else "")
        seed = scalar(torch.int64) if p else None
        args = (x, bias, seed, name, 0.3, p)
        yield Case(bias_act_dropout.bias_act_dropout_fwd, path, args)
        kept = (x, None, None) if name == "relu" else (x, bias, seed)
        args = (x, *kept, name, 0.3, p)
        yield Case(bias_act_dropout.bias_act_dropout_bwd, path, (*args, (True, True)))
    seed = scalar(torch.int64)
    x, full = meta(8192, 4096, dtype=BF16), meta(4096)
    args = (x, full, seed, "silu", 0.3, 0.1)
    yield Case(bias_act_dropout.bias_act_dropout_fwd, "bf16 8192x4096 bias in fp32", args)
    args = (x, None, seed, "silu", 0.3, 0.1)
    yield Case(bias_act_dropout.bias_act_dropout_fwd, "bf16 8192x4096 no bias", args)
    for words, wanted in (("no bias", (True, False)), ("bias alone", (False, True))):
        args = (x, x, None, None, "relu", 0.3, 0.1, wanted)
        yield Case(bias_act_dropout.bias_act_dropout_bwd, f"bf16 8192x4096 {words}", args)


def _scores_path(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    reduction: str,
    weighted: bool,
    smoothing: float | None,
) -> str:
    words = (reduction, "weight" if weighted else "", "smoothed" if smoothing else "")
    return _path(dtype, shape, *words)


def _scores(
    dtype: torch.dtype, shape: tuple[int, ...], reduction: str, weighted: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Scores, class weights, target indices and upstream gradient."""
    index = meta(shape[0], *shape[2:], dtype=torch.int64)
    weight = meta(shape[1], dtype=dtype) if weighted else None
    dy = meta(*(index.shape if reduction == "none" else ()), dtype=dtype)
    return meta(*shape, dtype=dtype), weight, index, dy


def batch_norms() -> Iterator[Case]:
    for dtype, shape in [
        (BF16, (256, 1024, 14, 14)),
        (BF16, (256, 2048, 7, 7)),  # maps so small that tiles span channels
        (BF16, (16, 512, 7, 7)),  # and too few of them: rows of 49
        (BF16, (32, 3, 224, 224)),  # few channels
        (BF16, (64, 1000)),  # one partial result a channel
        (FP32, (256, 64, 56, 56)),
        (FP32, (256, 2048, 7, 7)),
        (FP32, (64, 1000)),
    ]:
        yield from _batch_norm(_path(dtype, shape), meta(*shape, dtype=dtype), meta(shape[1]))
    for channels_last in (False, True):
        shape = (256, 64, 56, 56)
        x, c = meta(*shape, dtype=BF16, channels_last=channels_last), meta(shape[1])
        path = _path(BF16, shape, "NHWC" if channels_last else "")
        yield from _batch_norm(path, x, c)
        yield from _batch_norm_options(path, x, c)


ALL = (True, True, True, False)


def _batch_norm(path: str, x: Tensor, c: Tensor) -> Iterator[Case]:
    yield Case(batch_norm.batch_norm_fwd, path, (x, c, c, c, c, 0.1, 1e-5, True))
    yield Case(batch_norm.batch_norm_bwd, path, (x, x, c, c, c, ALL))


def _batch_norm_options(path: str, x: Tensor, c: Tensor) -> Iterator[Case]:
    half, momentum = c.to(BF16), scalar(torch.float64)
    # no affine, nothing kept
    args = (x, None, None, None, None, 0.1, 1e-5, False)
    yield Case(batch_norm.batch_norm_fwd, f"{path} bare", args)
    yield Case(
        batch_norm.batch_norm_bwd, f"{path} bare", (x, x, None, c, c, (True, False, False, False))
    )
    # parameters in half precision, a cumulative average
    args = (x, half, half, c, c, momentum, 1e-5, True)
    yield Case(batch_norm.batch_norm_fwd, f"{path} half", args)
    yield Case(batch_norm.batch_norm_bwd, f"{path} half", (x, x, half, c, c, ALL))
    yield Case(
        batch_norm.batch_norm_bwd, f"{path} dbias", (x, x, c, c, c, (False, False, True, False))
    )
    yield Case(batch_norm.batch_norm_eval_fwd, path, (x, c, c, c, c, 1e-5))
    yield Case(batch_norm.batch_norm_eval_fwd, f"{path} bare", (x, None, None, c, c, 1e-5))
    yield Case(batch_norm.batch_norm_eval_bwd, path, (x, x, c, c, c, 1e-5, ALL))
    wanted = (True, False, True, False)
    args = (x, x, None, c, c, 1e-5, wanted)
    yield Case(batch_norm.batch_norm_eval_bwd, f"{path} bare", args)
    yield Case(batch_norm.batch_norm_stats_fwd, path, (x,))
    yield Case(batch_norm.batch_norm_dx_bwd, path, (x, x, *[c] * 5))
    yield Case(batch_norm.batch_norm_dx_bwd, f"{path} bare", (x, x, None, *[c] * 4))


def batch_norms_with_activations() -> Iterator[Case]:
    for dtype, channels_last, name, residual in [
        *itertools.product((BF16,), (False, True), ("relu", "silu"), (False, True)),
        *(
            (FP32, last, *then)
            for last in (False, True)
            for then in (("relu", True), ("silu", False))
        ),
        *((BF16, True, name, True) for name in activation.FUSED),
    ]:
        shape = (256, 64, 56, 56)
        x, c = meta(*shape, dtype=dtype, channels_last=channels_last), meta(shape[1])
        words = ("NHWC" if channels_last else "", name, "residual" if residual else "")
        path, r = _path(dtype, shape, *words), x if residual else None
        args = (x, c, c, c, c, 0.1, 1e-5, True, r, name, 0.3)
        yield Case(batch_norm.batch_norm_fwd, path, args)
        then = (c, r, name, 0.3)
        args = (x, x, c, c, c, (True, True, True, residual), *then)
        yield Case(batch_norm.batch_norm_bwd, path, args)
        if dtype == BF16 and name in ("relu", "silu"):
            yield from _batch_norm_act_eval(path, x, c, r, name)


def _batch_norm_act_eval(
    path: str, x: Tensor, c: Tensor, r: Tensor | None, name: str
) -> Iterator[Case]:
    yield Case(batch_norm.batch_norm_eval_fwd, path, (x, c, c, c, c, 1e-5, r, name, 0.3))
    for words, wanted in ((" frozen", (True, False, False)), ("", (True, True, True))):
        args = (x, x, c, c, c, 1e-5, (*wanted, r is not None), c, r, name, 0.3)
        yield Case(batch_norm.batch_norm_eval_bwd, path + words, args)


def steps() -> Iterator[Case]:
    sgd, rmsprop, adam = multi_tensor.sgd_step, multi_tensor.rmsprop_step, multi_tensor.adam_step
    for dtype in (FP32, BF16):
        yield Case(sgd, SHORT[dtype], _step_args(dtype, 0))
        yield Case(sgd, f"{SHORT[dtype]} momentum", _step_args(dtype, 0b001))
        yield Case(rmsprop, SHORT[dtype], _step_args(dtype, 0b001, step=True))
        full = f"{SHORT[dtype]} centered momentum"
        yield Case(rmsprop, full, _step_args(dtype, 0b111, step=True))
        yield Case(adam, SHORT[dtype], _step_args(dtype, 0b011, step=True))
        full = f"{SHORT[dtype]} amsgrad ema"
        yield Case(adam, full, _step_args(dtype, 0b111, step=True, ema=True))
    one = scalar(FP32)
    for launcher, states, step in (
        (sgd, 0b001, False),
        (rmsprop, 0b111, True),
        (adam, 0b011, True),
    ):
        tables, *_ = _step_args(FP32, states, step=step)
        yield Case(launcher, "fp32 clipped", (tables, None, None, one))
        yield Case(launcher, "fp32 scaled clipped", (tables, one, one, one))
    tables, *_ = _step_args(BF16, 0b111, step=True, ema=True)
    yield Case(adam, "bf16 amsgrad ema scaled clipped", (tables, one, one, one))
    yield Case(rmsprop, "fp32 centered momentum ema", _step_args(FP32, 0b111, step=True, ema=True))
    yield Case(sgd, "fp32 ema", _step_args(FP32, 0, ema=True))
    yield Case(adam, "bf16 half state", _step_args(BF16, 0b011, step=True, state=BF16))


def _step_args(
    dtype: torch.dtype,
    states: int,
    step: bool = False,
    ema: bool = False,
    state: torch.dtype = FP32,
) -> tuple[Any, ...]:
    """Tables of two tensors, one of which lies at odd addresses; ``states`` as in the kernel."""
    lr, count = FP32, FP32 if step else None
    averages = [FP32 if ema else None] * 2
    kept = [state if states >> i & 1 else None for i in range(3)]
    types = [dtype, dtype, lr, count, *averages, *kept]
    return _tables(types, numbers=13), None, None, None


def _tables(types: list[torch.dtype | None], numbers: int | None = None) -> Tables:
    tables = Tables([2**20, 1000], torch.device("meta"), types)
    rows = None if numbers is None else [(0.5,) * numbers]
    tables.load([[0, 4] if dtype else [0, 0] for dtype in types], numbers=rows)
    return tables


def norms() -> Iterator[Case]:
    for dtype in (FP32, BF16):
        tables = _tables([dtype])
        yield Case(multi_tensor.grad_norm, SHORT[dtype], (tables, None))
        yield Case(multi_tensor.clip_grads, SHORT[dtype], (tables, scalar(FP32), 1.0))
    yield Case(multi_tensor.grad_norm, "fp32 scaled", (_tables([FP32]), scalar(FP32)))


def _path(dtype: torch.dtype, shape: tuple[int, ...], *words: str) -> str:
    return " ".join(filter(None, [SHORT[dtype], "x".join(map(str, shape)), *words]))


@functools.cache
def recordings() -> list[tuple[Case, list[Launch]]]:
    result = []
    for case in cases():
        with recorded() as launches:
            case.launcher(*case.args)
        result.append((case, launches))
    return result


@functools.cache
def rows() -> dict[Row, Launch]:
    """The launches that compile to different code, each under its kernel and its first case."""
    known, found = set(), {}
    for case, launches in recordings():
        for launch in launches:
            code = _code(launch)
            if code not in known:
                known.add(code)
                again = " again" if (launch.name, case.name) in found else ""
                found[launch.name, case.name + again] = launch
    by_kernel = list(dict.fromkeys(kernel for kernel, _ in found))
    return dict(sorted(found.items(), key=lambda row: by_kernel.index(row[0][0])))


def _code(launch: Launch) -> str:
    constexprs = {k: getattr(v, "__name__", v) for k, v in launch.constexprs.items()}
    signature, _, attributes = specialized(launch, "hip")
    return repr((launch.name, signature, attributes, constexprs, launch.num_warps))


def measure(targets: list[str]) -> dict[Row, dict[str, Built]]:
    """What is built of each row for each target."""
    jobs = [(row, target) for row in rows() for target in targets]
    workers = len(os.sched_getaffinity(0))
    # processes: what is Python in the compiler holds its lock, and LLVM's options are global
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        built = list(pool.map(_measured, jobs, chunksize=4))
    measured: dict[Row, dict[str, Built]] = {row: {} for row in rows()}
    for (row, target), result in zip(jobs, built, strict=True):
        measured[row][target] = result
    return measured


def _measured(job: tuple[Row, str]) -> Built:
    row, target = job
    return build(rows()[row], TARGETS[target])


class Budget(NamedTuple):
    registers: int
    wide: int
    narrow: int

    @classmethod
    def of(cls, built: Built) -> "Budget":
        return cls(built.registers, built.wide, built.narrow)

    def holds(self, built: Built) -> bool:
        return self == self.moved(built)

    def moved(self, built: Built) -> "Budget":
        """Where it would hold."""
        registers = self.registers
        if built.registers > registers:
            registers = -(built.registers // -8) * 8 + 8
        return Budget(registers, min(self.wide, built.wide), max(self.narrow, built.narrow))


def read_table() -> dict[Row, dict[str, Budget]]:
    lines = [line for line in TABLE.read_text().splitlines() if line and line[0] != "#"]
    _, *targets = (cell.strip() for cell in lines[0].split("|"))
    table = {}
    for line in lines[2:]:
        name, *cells = line.split("|")
        kernel, path = name.split(maxsplit=1)
        budgets = [Budget(*map(int, cell.split())) for cell in cells]
        table[kernel, path.strip()] = dict(zip(targets, budgets, strict=True))
    return table


def written(table: dict[Row, dict[str, Budget]]) -> str:
    names = [("", ""), ("kernel", "path"), *table]
    cells = [[target.center(15) for target in TARGETS], ["reg wide narrow"] * len(TARGETS)]
    for budgets in table.values():
        cells.append([f"{b.registers:3} {b.wide:4} {b.narrow:6}" for b in budgets.values()])
    first, second = (max(map(len, column)) for column in zip(*names, strict=True))
    lines = [
        f"{kernel:{first}}  {path:{second}} | {' | '.join(row)}"
        for (kernel, path), row in zip(names, cells, strict=True)
    ]
    head = [
        "# The most registers, the fewest wide and the most narrow accesses to global memory.",
        f"# See test_kernels_compile.py. To change: {UPDATE}",
    ]
    return "\n".join([*head, *(line.rstrip() for line in lines)]) + "\n"


def update() -> None:
    before = read_table() if TABLE.exists() else {}
    table: dict[Row, dict[str, Budget]] = {}
    for row, results in measure(list(TARGETS)).items():
        table[row] = {}
        for target, built in results.items():
            budget = before[row][target] if row in before else Budget(0, built.wide, 0)
            table[row][target] = budget.moved(built)
    TABLE.write_text(written(table))


@pytest.mark.parametrize("target", [pytest.param(t, marks=MARKS.get(t, ())) for t in TARGETS])
def test_budgets(target):
    table, complaints = read_table(), []
    for row, results in measure([target]).items():
        built = results[target]
        budget = table.get(row, {}).get(target)
        if budget is None or not budget.holds(built):
            complaints.append(f"{', '.join(row)}: {Budget.of(built)}, budget {budget}")
        if built.spilled > KNOWN_SPILLS.get(row, 0):
            complaints.append(f"{', '.join(row)}: spills {built.spilled} bytes a thread")
    assert not complaints, "\n".join([target, *complaints, f"To change the table: {UPDATE}"])


def test_table_has_every_row():
    text = TABLE.read_text()
    table = read_table()
    assert list(table) == list(rows()), f"To change the table: {UPDATE}"
    assert text == written(table), "not as it would be written"


def test_every_kernel_is_launched():
    kernels = {
        name
        for module in MODULES
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    assert {kernel for kernel, _ in rows()} == kernels


def test_every_launcher_is_called():
    files = [module for module in MODULES if not module.__name__.split(".")[-1].startswith("_")]
    names = {f.__name__ for module in files for f in launchers(module)}
    assert {case.launcher.__name__ for case in cases()} == names


def test_every_flag_of_a_kernel_has_both_values():
    values = {}
    for launch in rows().values():
        for name, value in launch.constexprs.items():
            if isinstance(value, bool):
                values.setdefault((launch.name, name), set()).add(value)
    assert [flag for flag, seen in values.items() if len(seen) < 2] == []


def test_every_kind_of_argument_of_a_launcher_is_given():
    missing = []
    for launcher in dict.fromkeys(case.launcher for case in cases()):
        calls = [_complete(case) for case in cases() if case.launcher is launcher]
        parameters = inspect.signature(launcher).parameters.values()
        for parameter, given in zip(parameters, zip(*calls, strict=True), strict=True):
            for kind in _kinds(parameter.annotation):
                if not _occurs(kind, given, parameter.name):
                    missing.append(f"{launcher.__name__}: {parameter}")
    assert missing == []


def _complete(case: Case) -> tuple[Any, ...]:
    """The arguments with those that the case leaves at their defaults."""
    call = inspect.signature(case.launcher).bind(*case.args)
    call.apply_defaults()
    return call.args


def _kinds(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)


def _occurs(kind: Any, given: tuple[Any, ...], name: str) -> bool:
    if kind is bool:
        return {True, False} <= set(given)
    if kind is str:
        # of activations one whose gradient reads the output, and one whose does not
        return set({"reduction": REDUCTIONS, "activation": ("relu", "silu")}[name]) <= set(given)
    return any(isinstance(value, typing.get_origin(kind) or kind) for value in given)


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit(__doc__)
    update()

"""Parity: how far a piece is from the one it stands in for, measured against float64 truth."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchref.internals import tree_leaves


@dataclass(frozen=True)
class Comparison:
    """One tensor of ours against theirs and against the truth.

    ``error`` and ``their_error`` are the largest absolute differences from the truth, ``bound`` is
    what ``error`` may reach; ``problem`` says in words what is wrong, if anything is.
    """

    name: str
    dtype: torch.dtype
    error: float
    their_error: float
    bound: float
    problem: str


def assert_parity(
    ours: Callable[..., Any],
    theirs: Callable[..., Any],
    *inputs: Any,
    upstream: Tensor | None = None,
    strides: bool = True,
    seed: int = 0,
    **kwargs: Any,
) -> None:
    r"""Assert that ``ours`` computes what ``theirs`` does: values, every gradient, buffers.

    The truth is ``theirs`` in float64. An error, the largest absolute difference from the truth,
    may be at most

    .. math::
        2 \cdot \text{error of theirs} + f \varepsilon \cdot \max |\text{truth}|

    with f = 8 in float32 and float64 and f = 1 in the half types, whatever the size of a reduction.
    In float64, where theirs is its own truth, its error is taken to be that of float32, scaled.
    NaN and infinities must stand where they stand in theirs, unless the truth is finite there: then
    ours may be finite too, and is held to the bound. Shapes, dtypes and strides (of
    outputs, gradients and buffers) must be theirs too.

    Args:
        ours, theirs: functions, or modules. Of modules, copies are run, with ``theirs``' state
            loaded into ours; their parameters' gradients and buffers are compared as well.
        inputs: tensors or anything else, passed to both. A tensor with ``requires_grad`` has its
            gradient compared, and every tensor what is left in it afterwards. Tensors inside lists
            or dicts are refused.
        upstream: the gradient of the first output; None draws one.
        strides: False lets the memory layout differ.
        seed: of torch's generator, set before each call.
        kwargs: passed to both.

    Raises:
        AssertionError: they differ; the message names the worst element and both values.
        TypeError: an input hides tensors in a list, or an output is no tensor.

    Example:
        >>> from torchref.testing import assert_parity
        >>> x = torch.randn(4, 8, requires_grad=True)
        >>> assert_parity(torchref.nn.functional.relu, torch.nn.functional.relu, x)
        >>> assert_parity(torchref.nn.BatchNorm1d(8), torch.nn.BatchNorm1d(8), x)
        >>> assert_parity(lambda x: x * 1.001, lambda x: x, torch.ones(2))
        Traceback (most recent call last):
            ...
        AssertionError: output: error 1.000e-03 exceeds 9.537e-07 (torch's own error 0.000e+00) at
        [0]: ours 1.0010000467300415, theirs 1.0, truth 1.0
    """
    options = {"upstream": upstream, "strides": strides, "seed": seed, **kwargs}
    problems = [c.problem for c in measure_parity(ours, theirs, *inputs, **options) if c.problem]
    if problems:
        raise AssertionError("\n".join(problems))


def measure_parity(
    ours: Callable[..., Any],
    theirs: Callable[..., Any],
    *inputs: Any,
    upstream: Tensor | None = None,
    strides: bool = True,
    seed: int = 0,
    **kwargs: Any,
) -> list[Comparison]:
    """The comparisons behind :func:`assert_parity`, one for each tensor.

    Example:
        >>> from torchref.testing import measure_parity
        >>> x = torch.randn(8, requires_grad=True)
        >>> relu = torchref.nn.functional.relu
        >>> [c.name for c in measure_parity(relu, torch.nn.functional.relu, x)]
        ['output', 'input 0 afterwards', 'gradient of input 0']
    """
    if isinstance(ours, nn.Module) and isinstance(theirs, nn.Module):
        ours = copy.deepcopy(ours)
        ours.load_state_dict(theirs.state_dict())
    for value in [*inputs, *kwargs.values()]:
        if not isinstance(value, Tensor) and any(isinstance(x, Tensor) for x in tree_leaves(value)):
            raise TypeError("parity: pass tensors one by one, not inside a list, tuple or dict")
    run = {"inputs": inputs, "upstream": upstream, "seed": seed, "kwargs": kwargs}
    of_ours, of_theirs = dict(_run(ours, **run)), dict(_run(theirs, **run))
    truth = dict(_run(theirs, **run, dtypes=[torch.float64]))
    errors = {name: _error(of_theirs[name], truth[name]) for name in truth}
    double = (torch.float64, torch.complex128)
    in_double = {k for k, t in of_theirs.items() if t is not None and t.dtype in double}
    if in_double:
        errors |= {k: e for k, e in _float64_errors(theirs, run).items() if k in in_double}
    comparisons = []
    for name in [*of_theirs, *(name for name in of_ours if name not in of_theirs)]:
        tensors = (of_ours.get(name), of_theirs.get(name), truth.get(name))
        comparisons.append(_compare(name, *tensors, errors.get(name, 0.0), strides))
    return comparisons


def _float64_errors(theirs: Callable[..., Any], run: dict[str, Any]) -> dict[str, float]:
    """Their error in float64, where they are the truth: their error in float32, scaled down."""
    single = dict(_run(theirs, **run, dtypes=[torch.float32]))
    truth = dict(_run(theirs, **run, dtypes=[torch.float32, torch.float64]))
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return {
        name: ratio * _error(single[name], tensor)
        for name, tensor in truth.items()
        if tensor is not None and tensor.dtype in (torch.float64, torch.complex128)
    }


def _run(
    function: Callable[..., Any],
    inputs: tuple[Any, ...],
    upstream: Tensor | None,
    seed: int,
    kwargs: dict[str, Any],
    dtypes: Sequence[torch.dtype] = (),
) -> Iterator[tuple[str, Tensor | None]]:
    """Everything that a call and its backward pass leave behind, by name."""
    if isinstance(function, nn.Module):
        function = copy.deepcopy(function)
        for dtype in dtypes:
            _convert(function, dtype)
    args = [_fresh(x, dtypes) if isinstance(x, Tensor) else x for x in inputs]
    kwargs = {k: _fresh(x, dtypes) if isinstance(x, Tensor) else x for k, x in kwargs.items()}
    with torch.random.fork_rng(_gpus(args)):
        torch.manual_seed(seed)
        output = function(*args, **kwargs)
        outputs = list(output) if isinstance(output, tuple | list) else [output]
        if not all(isinstance(y, Tensor) for y in outputs):
            raise TypeError(f"parity: expected tensors as output, got {type(output).__name__}")
        differentiable = [y for y in outputs if isinstance(y, Tensor) and y.requires_grad]
        torch.manual_seed(seed + 1)
        gradients = [
            torch.randn(y.shape, dtype=_converted(y.dtype, torch.float64)) for y in differentiable
        ]
    for number, y in enumerate(outputs):
        yield ("output" if len(outputs) == 1 else f"output {number}"), y.detach()
    if differentiable:
        gradients = [
            g.to(y.device, y.dtype) for g, y in zip(gradients, differentiable, strict=True)
        ]
        if upstream is not None:
            gradients[0] = upstream.to(differentiable[0].dtype)
        torch.autograd.backward(differentiable, gradients)
    for number, x in [*enumerate(args), *kwargs.items()]:
        if isinstance(x, Tensor):
            yield f"input {number} afterwards", x
            if x.requires_grad:
                yield f"gradient of input {number}", x.grad
    if isinstance(function, nn.Module):
        for name, parameter in function.named_parameters(remove_duplicate=False):
            yield f"gradient of {name}", parameter.grad
        for name, buffer in function.named_buffers(remove_duplicate=False):
            yield f"buffer {name}", buffer


def _gpus(args: list[Any]) -> list[int]:
    """Those whose random numbers a call may draw; the CPU's state is kept in any case."""
    return sorted({x.get_device() for x in args if isinstance(x, Tensor) and x.is_cuda})


def _fresh(x: Tensor, dtypes: Sequence[torch.dtype]) -> Tensor:
    """A leaf with the same values, strides and overlaps, in memory of its own."""
    if x.numel() == 0:
        copied = x.detach().clone()
    else:
        extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        memory = x.detach().as_strided((extent,), (1,)).clone()
        copied = memory.as_strided(x.shape, x.stride())
    for dtype in dtypes:
        copied = copied.to(_converted(copied.dtype, dtype))
    return copied.requires_grad_(x.requires_grad)


def _converted(dtype: torch.dtype, to: torch.dtype) -> torch.dtype:
    """``to`` for a real type, its complex type for a complex one, the same for integers."""
    if dtype.is_complex:
        return to.to_complex()
    return to if dtype.is_floating_point else dtype


def _convert(module: nn.Module, to: torch.dtype) -> None:
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data = tensor.data.to(_converted(tensor.dtype, to))


def _compare(
    name: str,
    ours: Tensor | None,
    theirs: Tensor | None,
    truth: Tensor | None,
    their_error: float,
    strides: bool,
) -> Comparison:
    present = [t for t in (ours, theirs) if t is not None]
    dtype = present[0].dtype if present else torch.float32
    if ours is None or theirs is None or truth is None:
        missing = "" if ours is theirs else f"{name}: ours is {ours}, theirs is {theirs}"
        return Comparison(name, dtype, 0.0, 0.0, 0.0, missing)
    for what in ("shape", "dtype", "device"):
        if getattr(ours, what) != getattr(theirs, what):
            problem = f"{name}: {what} is {getattr(ours, what)}, theirs {getattr(theirs, what)}"
            return Comparison(name, dtype, math.nan, 0.0, 0.0, problem)
    if strides and _layout(ours) != _layout(theirs):
        problem = f"{name}: strides are {ours.stride()}, theirs {theirs.stride()}"
        return Comparison(name, dtype, math.nan, 0.0, 0.0, problem)
    return _compare_values(name, ours, theirs, truth, their_error)


def _layout(x: Tensor) -> list[int]:
    """The strides that mean something: not those of dimensions of size 1."""
    if x.numel() == 0:
        return []
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


def _compare_values(
    name: str, ours: Tensor, theirs: Tensor, truth: Tensor, their_error: float
) -> Comparison:
    dtype = ours.dtype
    ours, theirs, truth = map(_in_float64, (ours, theirs, truth))
    finite = ours.isfinite() & truth.isfinite()  # where the dtype overflows nothing can be compared
    saved = finite & ~theirs.isfinite()  # ours may be finite where theirs overflows for no reason
    alike = (
        (ours == theirs) | (ours.isnan() & theirs.isnan()) | (ours.isfinite() & theirs.isfinite())
    )
    wrong = ~alike & ~saved
    if wrong.any():
        where = _first(wrong)
        problem = f"{name}: at {where} ours is {ours[tuple(where)]}, theirs {theirs[tuple(where)]}"
        return Comparison(name, dtype, math.inf, 0.0, 0.0, problem)
    difference = torch.where(finite, (ours - truth).abs(), 0)
    error = _largest(difference)
    bound = 2 * their_error + _floor(dtype) * _largest(torch.where(finite, truth, 0))
    problem = ""
    if error > bound:
        where = _first(difference == error)
        at = tuple(where)
        problem = (
            f"{name}: error {error:.3e} exceeds {bound:.3e} (torch's own error {their_error:.3e}) "
            f"at {where}: ours {ours[at]}, theirs {theirs[at]}, truth {truth[at]}"
        )
    return Comparison(name, dtype, error, their_error, bound, problem)


def _error(theirs: Tensor | None, truth: Tensor | None) -> float:
    if theirs is None or truth is None:
        return 0.0
    difference = (_in_float64(theirs) - _in_float64(truth)).abs()
    return _largest(torch.where(difference.isfinite(), difference, 0))


def _floor(dtype: torch.dtype) -> float:
    if not (dtype.is_floating_point or dtype.is_complex):
        return 0.0
    # A few roundings of an accurate order of operations; a half result is rounded once.
    return (1 if dtype.itemsize == 2 else 8) * torch.finfo(dtype).eps


def _in_float64(x: Tensor) -> Tensor:
    x = x.detach().cpu()
    if x.is_sparse:
        x = x.to_dense()
    if x.is_complex():  # (..., 2)
        x = torch.view_as_real(x.resolve_conj())
    return x.double()


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _first(mask: Tensor) -> list[int]:
    return mask.nonzero()[0].tolist()

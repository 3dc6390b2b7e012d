"""Runs an optimizer of ours and torch's on the same gradients, and compares what they hold."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import torchref
from torchref import compilation
from torchref.optim import adam, rmsprop, sgd

NAMES = ("SGD", "RMSprop", "Adam", "AdamW")

# Rank 0, one element, none, sizes no block divides; the 4-D one is laid out channels_last.
SHAPES: list[tuple[int, ...]] = [(), (1,), (0,), (7,), (3, 5), (2, 3, 4, 5)]

# Every option, and every pair that meets in one line of an update.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {}),
    ("SGD", {"weight_decay": 0.1, "maximize": True}),
    ("SGD", {"momentum": 0.9}),
    ("SGD", {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "maximize": True}),
    ("RMSprop", {}),
    ("RMSprop", {"momentum": 0.9, "weight_decay": 0.1}),
    ("RMSprop", {"centered": True, "maximize": True}),
    ("RMSprop", {"centered": True, "momentum": 0.5, "alpha": 0.9, "eps": 1e-3}),
    ("Adam", {}),
    ("Adam", {"weight_decay": 0.1, "maximize": True}),
    ("Adam", {"amsgrad": True, "betas": (0.5, 0.9), "eps": 1e-3}),
    ("Adam", {"amsgrad": True, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("AdamW", {}),
    ("AdamW", {"amsgrad": True, "maximize": True, "weight_decay": 0.1}),
]

# The one-tensor updates, by the module that calls them.
UPDATES = {
    "SGD": (sgd, "sgd_update"),
    "RMSprop": (rmsprop, "rmsprop_update"),
    "Adam": (adam, "adam_update"),
    "AdamW": (adam, "adam_update"),
}


def ours(name: str) -> type[torch.optim.Optimizer]:
    return getattr(torchref.optim, name)


def theirs(name: str) -> type[torch.optim.Optimizer]:
    return getattr(torch.optim, name)


def make_params(dtype: torch.dtype = torch.float64, seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    params = []
    for shape in SHAPES:
        data = torch.randn(shape, generator=generator, dtype=torch.float64)
        if len(shape) == 4:
            data = data.to(memory_format=torch.channels_last)
        params.append(torch.nn.Parameter(data.to(dtype)))
    return params


def gradients(params: list[torch.nn.Parameter], steps: int, seed: int = 1) -> Iterator[None]:
    """Give the parameters fresh gradients, ``steps`` times; some parameters pause at times."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for i, param in enumerate(params):
            grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
            grad = (grad + 0.5).to(param.dtype).to(memory_format=memory_format(param))
            param.grad = None if step % 5 == 2 and i == 3 else grad
        yield


def memory_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.ndim == 4 else torch.contiguous_format


def train(
    cls: Callable[..., torch.optim.Optimizer],
    kwargs: dict[str, Any],
    *,
    steps: int,
    dtype: torch.dtype = torch.float64,
    truth_of: torch.dtype | None = None,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    """Parameters and optimizer after ``steps`` steps.

    With ``truth_of``, in float64, from parameters and gradients rounded to that type.
    """
    params = make_params(truth_of or dtype)
    rounded = params
    if truth_of is not None:
        params = [torch.nn.Parameter(p.detach().double()) for p in params]
    optimizer = cls(params, **copy.deepcopy(kwargs))
    schedule = scheduler(optimizer) if scheduler else None
    for _ in gradients(rounded, steps):
        for p, r in zip(params, rounded, strict=True):
            p.grad = None if r.grad is None else r.grad.to(p.dtype)
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return params, optimizer


def tensors(params: list[Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters and state, by name."""
    named = {f"param {i}": p.detach() for i, p in enumerate(params)}
    for i, p in enumerate(params):
        for key, value in optimizer.state.get(p, {}).items():
            named[f"{key} {i}"] = value.detach()
    return named


def assert_close(
    actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-12
) -> None:
    """The same names, types and layouts, and values within rtol of the tensor's largest."""
    assert list(actual) == list(expected)
    for name, e in expected.items():
        a = actual[name]
        assert a.dtype == e.dtype, name
        assert a.shape == e.shape, name
        if not e.is_sparse:
            assert a.stride() == e.stride(), name
        scale = e.abs().max().item() if e.numel() else 0.0
        torch.testing.assert_close(a, e, rtol=0, atol=rtol * scale, msg=lambda m, n=name: n + m)


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert_close(actual, expected, rtol=0)


def assert_as_good(
    actual: dict[str, Tensor], torchs: dict[str, Tensor], truth: dict[str, Tensor]
) -> None:
    """Our error is at most twice torch's own, plus 8 eps (1 eps in half) of the largest value."""
    assert list(actual) == list(torchs) == list(truth)
    for name, t in truth.items():
        if t.numel() == 0:
            continue
        dtype = torchs[name].dtype
        assert actual[name].dtype == dtype, name
        eps = torch.finfo(dtype).eps * (1 if dtype in (torch.float16, torch.bfloat16) else 8)
        bound = 2 * (torchs[name].double() - t).abs().max() + eps * t.abs().max()
        error = (actual[name].double() - t).abs().max()
        assert error <= bound, f"{name}: error {error:.3g}, bound {bound:.3g}"


def assert_parity(
    name: str,
    kwargs: dict[str, Any],
    *,
    steps: int = 20,
    backend: str = "auto",
    rtol: float = 0,
    **options: Any,
) -> None:
    """Ours and torch's hold the same parameters and state after the same gradients."""
    expected = tensors(*train(theirs(name), kwargs, steps=steps, **options))
    with torchref.backend(backend):
        actual = tensors(*train(ours(name), kwargs, steps=steps, **options))
    assert_close(actual, expected, rtol)


def spy(monkeypatch: pytest.MonkeyPatch, module: Any, function: str) -> list[tuple[Any, ...]]:
    """The positional arguments of each call of ``module.function`` from now on."""
    calls: list[tuple[Any, ...]] = []
    original = getattr(module, function)

    def spied(*args: Any) -> Any:
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(module, function, spied)
    return calls


def traced(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Compile updates afresh; the list grows by each compilation."""
    compilations: list[Any] = []
    real = torch.compile

    def compile_(function: Any, **kwargs: Any) -> Any:
        compilations.append(function)
        return real(function, **kwargs)

    monkeypatch.setattr(compilation, "_variants", {})
    monkeypatch.setattr(torch, "compile", compile_)
    return compilations

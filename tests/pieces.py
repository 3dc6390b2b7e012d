"""Every piece once, as a function beside torch's, for the tests that ask the same of each."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as theirs
from torch import Tensor

import torchref.nn.functional as ours


@dataclass(frozen=True)
class Piece:
    name: str
    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    inputs: Callable[[torch.dtype], tuple[Tensor, ...]]  # those with a gradient require one
    autocast: bool = True  # torch's autocast takes it
    random: bool = False  # draws a mask


def scores(*shape: int) -> Callable[[torch.dtype], tuple[Tensor, ...]]:
    return lambda dtype: (_draw(shape, dtype),)


def _draw(shape: tuple[int, ...], dtype: torch.dtype, requires_grad: bool = True) -> Tensor:
    # drawn on the CPU, so that every device sees the same numbers
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return x.to(torch.get_default_device(), dtype).requires_grad_(requires_grad)


def _linear(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return _draw((5, 7), dtype), _draw((3, 7), dtype), _draw((3,), dtype)


def _indices(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return _draw((6, 5), dtype), torch.tensor([0, 4, -100, 2, 2, 1])


def _probabilities(dtype: torch.dtype) -> tuple[Tensor, ...]:
    target = _draw((6, 5), torch.float64, False).softmax(1).to(dtype).requires_grad_()
    return _draw((6, 5), dtype), target


def _two(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return _draw((6, 5), dtype), _draw((6, 5), dtype, False).flip(0).requires_grad_()


def _unit(dtype: torch.dtype) -> tuple[Tensor, ...]:
    x, target = _two(torch.float64)
    return tuple(t.detach().sigmoid().to(dtype).requires_grad_() for t in (x, target))


def _normalized(dtype: torch.dtype) -> tuple[Tensor, ...]:
    channels = [_draw((3,), dtype).detach().add(k).requires_grad_() for k in (1.0, 0.0)]
    return _draw((4, 3, 5), dtype), *channels


def _train(f: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor, **kwargs: Any):
    return f(x, None, None, weight, bias, training=True, **kwargs)


def _eval(f: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor, **kwargs: Any):
    mean, var = torch.full_like(weight, 0.5), torch.full_like(weight, 2.0)
    return f(x, mean, var, weight, bias, **kwargs)


def _act_train(f: Callable[..., Tensor], x: Tensor, r: Tensor, w: Tensor, b: Tensor):
    return f(x, None, None, w, b, training=True, activation="silu", residual=r)


def _act_eval(f: Callable[..., Tensor], x: Tensor, r: Tensor, w: Tensor, b: Tensor):
    mean, var = torch.full_like(w, 0.5), torch.full_like(w, 2.0)
    return f(x, mean, var, w, b, activation="relu", residual=r)


def _bias_act_dropout(x: Tensor, bias: Tensor, p: float, *, activation: str) -> Tensor:
    """In torch's pieces."""
    return theirs.dropout(getattr(theirs, activation)(x + bias), p)


def _biased(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return _draw((5, 7), dtype), _draw((7,), dtype)


def _batch_norm_act(*args: Any, activation: str, residual: Tensor, **kwargs: Any) -> Tensor:
    """In torch's pieces."""
    return getattr(theirs, activation)(theirs.batch_norm(*args, **kwargs) + residual)


def _residual(dtype: torch.dtype) -> tuple[Tensor, ...]:
    x, w, b = _normalized(dtype)
    return x, x.detach().flip(0).requires_grad_(), w, b


def _both(name: str, inputs, wrap=None, label: str | None = None, autocast=True, **kwargs: Any):
    """The same call of ours and of theirs."""
    pair = [getattr(library, name) for library in (ours, theirs)]
    pair = [partial(wrap, f, **kwargs) if wrap else partial(f, **kwargs) for f in pair]
    return Piece(label or name, *pair, inputs, autocast)


PIECES = [
    _both("relu", scores(3, 7)),
    _both("leaky_relu", scores(3, 7), negative_slope=0.2),
    _both("sigmoid", scores(3, 7)),
    _both("tanh", scores(3, 7)),
    _both("elu", scores(3, 7), alpha=0.7),
    _both("selu", scores(3, 7)),
    _both("gelu", scores(3, 7)),
    _both("gelu", scores(3, 7), label="gelu_tanh", approximate="tanh"),
    _both("silu", scores(3, 7)),
    _both("softplus", scores(3, 7), beta=2.0, threshold=3.0),
    _both("softmax", scores(3, 7), dim=1),
    _both("log_softmax", scores(3, 7), dim=0),
    _both("linear", _linear),
    _both("cross_entropy", _indices, label_smoothing=0.1),
    _both("cross_entropy", _probabilities, label="cross_entropy_probabilities"),
    _both("nll_loss", _indices),
    _both("mse_loss", _two),
    _both("l1_loss", _two),
    _both("binary_cross_entropy", _unit),
    _both("binary_cross_entropy_with_logits", _two, reduction="sum"),
    _both("batch_norm", _normalized, _train, label="batch_norm_train"),
    _both("batch_norm", _normalized, _eval, label="batch_norm_eval"),
    Piece(
        "batch_norm_act_train",
        partial(_act_train, ours.batch_norm_act),
        partial(_act_train, _batch_norm_act),
        _residual,
    ),
    Piece(
        "batch_norm_act_eval",
        partial(_act_eval, ours.batch_norm_act),
        partial(_act_eval, _batch_norm_act),
        _residual,
    ),
    Piece(
        "bias_act",
        partial(ours.bias_act_dropout, activation="gelu"),
        partial(_bias_act_dropout, p=0.0, activation="gelu"),
        _biased,
    ),
    Piece(
        "bias_act_dropout",
        partial(ours.bias_act_dropout, p=0.4, activation="relu"),
        partial(_bias_act_dropout, p=0.4, activation="relu"),
        _biased,
        random=True,
    ),
    replace(_both("dropout", scores(3, 7), p=0.4), random=True),
]
NAMES = [piece.name for piece in PIECES]

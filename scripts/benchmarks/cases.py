"""The pieces of ``torchref.nn`` as they are measured, one entry of ``CASES`` each."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as theirs
from torch import Tensor

import torchref.nn.functional as ours
from torchref.nn.linear import linear_bias_bwd

from .options import Options

Shape = tuple[int, ...]
Inputs = tuple[Any, ...]
Function = Callable[..., Any]

DROPPED = 0.1


@dataclass(frozen=True)
class Sizes:
    cpu: tuple[Shape, ...]
    gpu: tuple[Shape, ...]
    quick_cpu: tuple[Shape, ...]
    quick_gpu: tuple[Shape, ...]

    def of(self, options: Options) -> tuple[Shape, ...]:
        if options.device == "cpu":
            return self.quick_cpu if options.quick else self.cpu
        return self.quick_gpu if options.quick else self.gpu


FLAT = Sizes(
    cpu=((2**14,), (2**17,), (2**20,), (2**22,)),
    gpu=tuple((2**power,) for power in range(10, 29, 3)),
    quick_cpu=((2**14,), (2**20,)),
    quick_gpu=((2**14,), (2**28,)),
)
ROWS = Sizes(
    cpu=((16, 1024), (128, 1024), (1024, 1024), (4096, 1024)),
    gpu=(*((4096, 2**power) for power in range(10, 19)), (32768, 1024), (32768, 32768)),
    quick_cpu=((16, 1024), (1024, 1024)),
    quick_gpu=((4096, 32768),),
)
IMAGES = Sizes(
    cpu=((1, 64, 16, 16), (8, 64, 16, 16), (64, 64, 16, 16), (256, 64, 16, 16)),
    gpu=(
        *((256, 64, 112, 112), (256, 64, 56, 56), (256, 256, 56, 56)),
        *((256, 512, 28, 28), (256, 1024, 14, 14), (256, 2048, 7, 7)),
    ),
    quick_cpu=((1, 64, 16, 16), (64, 64, 16, 16)),
    quick_gpu=((256, 64, 112, 112),),
)
HEADS = Sizes(  # rows, classes, features
    cpu=((16, 1024, 256), (128, 1024, 256), (1024, 1024, 256), (4096, 1024, 256)),
    gpu=((4096, 32768, 4096), (8192, 131072, 4096)),
    quick_cpu=((16, 1024, 256), (1024, 1024, 256)),
    quick_gpu=((4096, 32768, 4096),),
)


@dataclass(frozen=True)
class Draw:
    """Random tensors of one type, on one device, in one layout."""

    dtype: torch.dtype
    device: str
    layout: str

    def __call__(self, shape: Shape, grad: bool = True) -> Tensor:
        x = torch.randn(shape, dtype=self.dtype, device=self.device)
        if self.layout == "channels_last" and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        return x.requires_grad_(grad)

    def classes(self, rows: int, count: int) -> Tensor:
        return torch.randint(count, (rows,), device=self.device)


@dataclass(frozen=True)
class Case:
    """A piece, as ours and as torch's: one function or several, one after the other.

    Args:
        name: in the results and on the command line.
        ours, theirs: functions of the same arguments.
        inputs: those arguments, of a shape. Where none requires a gradient, forward alone is timed.
        sizes: what shapes to time.
        moves: for each element of the input, the elements that must move through memory, forward,
            then forward and backward; 0 where memory is not what takes the time.
        layouts: of the input.
        peers: where others' functions are, ``"module:name"``, by distribution.
        truth: where the piece draws random numbers, the function that it is once ``call`` has drawn
            them from the seed 0.
        floor: what every implementation of forward and backward must compute, timed beside them.
        elements: how many a shape has.
    """

    name: str
    ours: Function
    theirs: Function
    inputs: Callable[[Draw, Shape], Inputs]
    sizes: Sizes
    moves: tuple[float, float]
    layouts: tuple[str, ...] = ("contiguous",)
    peers: Mapping[str, str] = field(default_factory=dict)
    truth: Callable[[Function, Inputs], Function] | None = None
    floor: Function | None = None
    elements: Callable[[Shape], int] = math.prod


def _one(draw: Draw, shape: Shape) -> Inputs:
    return (draw(shape),)


def _indices(draw: Draw, shape: Shape) -> Inputs:
    return draw(shape), draw.classes(*shape)


def _log_probabilities(draw: Draw, shape: Shape) -> Inputs:
    x = draw(shape, grad=False).log_softmax(1)
    return x.requires_grad_(), draw.classes(*shape)


def _probabilities(draw: Draw, shape: Shape) -> Inputs:
    return draw(shape), draw(shape, grad=False).softmax(1)


def _two(draw: Draw, shape: Shape) -> Inputs:
    return draw(shape), draw(shape, grad=False)


def _unit(draw: Draw, shape: Shape) -> Inputs:
    x, target = (draw(shape, grad=False).sigmoid() for _ in range(2))
    return x.requires_grad_(), target


def _constant(draw: Draw, shape: Shape) -> Inputs:
    return (draw(shape, grad=False),)


def _head(draw: Draw, shape: Shape) -> Inputs:
    rows, classes, features = shape
    weight = draw((classes, features), grad=False) / features**0.5
    return draw((rows, features)), weight.requires_grad_(), draw.classes(rows, classes)


def _normalized(draw: Draw, shape: Shape, grad: bool) -> Inputs:
    """As a batch norm takes them: input, running statistics, weight and bias."""
    channels = shape[1:2]
    mean, var = draw(channels, grad=False), draw(channels, grad=False).square() + 0.5
    return draw(shape), mean, var, draw(channels, grad), draw(channels, grad)


def _with_bias(draw: Draw, shape: Shape) -> Inputs:
    return draw(shape), draw(shape[1:])


def _relu(x: Tensor, bias: Tensor) -> Tensor:
    return theirs.relu(x + bias)


def _relu_then_dropout(x: Tensor, bias: Tensor) -> Tensor:
    return theirs.dropout(_relu(x, bias), DROPPED)


def _with_residual(draw: Draw, shape: Shape) -> Inputs:
    return *_normalized(draw, shape, grad=True), draw(shape)


def _batch_norm_act(*inputs: Tensor) -> Tensor:
    *normalized, residual = inputs
    return ours.batch_norm_act(*normalized, training=True, residual=residual)


def _batch_norm_then_add_and_relu(*inputs: Tensor) -> Tensor:
    *normalized, residual = inputs
    return theirs.relu(theirs.batch_norm(*normalized, training=True) + residual)


def _linear_then_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return theirs.cross_entropy(theirs.linear(x, weight), target)


@torch.no_grad()
def _three_products(x: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    scores = x @ weight.t()
    return scores @ weight, scores.t() @ x


def _masked(before: Function, call: Function, inputs: Inputs) -> Function:
    """What dropout makes of ``before``, by the mask that a call draws. That of ones is not 0."""
    torch.manual_seed(0)
    mask = call(*map(torch.ones_like, inputs)) != 0
    share, deviation = mask.double().mean().item(), math.sqrt(DROPPED * (1 - DROPPED))
    if abs(share - (1 - DROPPED)) > 5 * deviation / math.sqrt(mask.numel()):
        raise ArithmeticError(f"it keeps {share:.3f} of all elements")
    return lambda *inputs: before(*inputs) * mask / (1 - DROPPED)


def _both(name: str, function: str | None = None, **kwargs: Any) -> tuple[str, Function, Function]:
    """The name, ours and torch's of a function that both have."""
    our, their = (getattr(library, function or name) for library in (ours, theirs))
    return name, partial(our, **kwargs), partial(their, **kwargs)


_gradient_in_forward = partial(ours.cross_entropy, gradient_in_forward=True)

_liger = "liger_kernel.transformers.functional:liger_"
_CROSS_ENTROPY = {
    "liger": f"{_liger}cross_entropy",
    "quack": "quack.cross_entropy:cross_entropy",
}
_SOFTMAX = {"liger": f"{_liger}softmax", "quack": "quack.softmax:softmax"}
_HEAD = {"liger": f"{_liger}fused_linear_cross_entropy"}
_LAYOUTS = ("contiguous", "channels_last")

CASES = [
    Case(*_both("relu"), _one, FLAT, (2, 5)),
    Case(*_both("leaky_relu"), _one, FLAT, (2, 5)),
    Case(*_both("sigmoid"), _one, FLAT, (2, 5)),
    Case(*_both("tanh"), _one, FLAT, (2, 5)),
    Case(*_both("elu"), _one, FLAT, (2, 5)),
    Case(*_both("selu"), _one, FLAT, (2, 5)),
    Case(*_both("gelu"), _one, FLAT, (2, 5)),
    Case(*_both("gelu_tanh", "gelu", approximate="tanh"), _one, FLAT, (2, 5)),
    Case(*_both("silu"), _one, FLAT, (2, 5)),
    Case(*_both("softplus"), _one, FLAT, (2, 5)),
    Case(*_both("dropout", p=DROPPED), _one, FLAT, (2, 4), truth=partial(_masked, lambda x: x)),
    Case(*_both("softmax", dim=1), _one, ROWS, (2, 5), peers=_SOFTMAX),
    Case(*_both("log_softmax", dim=1), _one, ROWS, (2, 5)),
    Case(*_both("cross_entropy"), _indices, ROWS, (1, 3), peers=_CROSS_ENTROPY),
    Case(
        *("cross_entropy_gradient_in_forward", _gradient_in_forward, theirs.cross_entropy),
        *(_indices, ROWS, (1, 2)),
        peers=_CROSS_ENTROPY,
    ),
    Case(
        *_both("cross_entropy_smoothed", "cross_entropy", label_smoothing=0.1),
        *(_indices, ROWS, (1, 3)),
    ),
    Case(*_both("cross_entropy_probabilities", "cross_entropy"), _probabilities, ROWS, (2, 5)),
    Case(*_both("nll_loss"), _log_probabilities, ROWS, (0, 1)),
    Case(*_both("mse_loss"), _two, FLAT, (2, 5)),
    Case(*_both("l1_loss"), _two, FLAT, (2, 5)),
    Case(*_both("binary_cross_entropy"), _unit, FLAT, (2, 5)),
    Case(*_both("binary_cross_entropy_with_logits"), _unit, FLAT, (2, 5)),
    Case(
        *_both("batch_norm_train", "batch_norm", training=True),
        *(partial(_normalized, grad=True), IMAGES, (3, 8), _LAYOUTS),
    ),
    Case(
        *_both("batch_norm_eval", "batch_norm"),
        *(partial(_normalized, grad=False), IMAGES, (2, 4), _LAYOUTS),
    ),
    Case(
        *("batch_norm_act", _batch_norm_act, _batch_norm_then_add_and_relu),
        *(_with_residual, IMAGES, (4, 10), _LAYOUTS),
    ),
    Case(
        *("bias_act_dropout", partial(ours.bias_act_dropout, p=DROPPED), _relu_then_dropout),
        *(_with_bias, ROWS, (2, 5)),
        truth=partial(_masked, _relu),
    ),
    Case("linear_bias_gradient", linear_bias_bwd, lambda dy: dy.sum(0), _constant, ROWS, (1, 0)),
    Case(
        *("linear_cross_entropy", ours.linear_cross_entropy, _linear_then_cross_entropy),
        *(_head, HEADS, (0, 0)),
        peers=_HEAD,
        floor=_three_products,
        elements=lambda shape: shape[0] * shape[1],
    ),
]

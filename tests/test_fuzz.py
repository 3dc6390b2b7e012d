"""Every piece on drawn shapes, layouts, types, values and arguments, against torch in float64.

Here the formulas; test_interpreted.py runs this file through the kernels, too. What was found is a
named test beside the piece. Drawn anew each time, and more of it: ``-m slow -s``.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as theirs
from fuzzing import (
    ANY,
    DTYPES,
    FINITE,
    KERNELS,
    NO_NAN,
    REFUSALS,
    Call,
    Draw,
    Indices,
    dense,
    dtypes,
    flags,
    keep,
    layouts,
    quiet,
    seeds,
    shapes,
    tensors,
    upstreams,
    writable,
)
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

import torchref.nn
import torchref.nn.functional as ours
import torchref.optim
from torchref.nn.bias_act_dropout import _mask
from torchref.nn.dropout import _dense_strides, mask_of

EXAMPLES = 25 if KERNELS else 80
MANY = 200 if KERNELS else 1000
REDUCTIONS = st.sampled_from(["mean", "sum", "none"])
ACTIVATIONS = {
    "relu": theirs.relu,
    "leaky_relu": theirs.leaky_relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "elu": theirs.elu,
    "selu": theirs.selu,
    "gelu": theirs.gelu,
    "gelu_tanh": partial(theirs.gelu, approximate="tanh"),
    "silu": theirs.silu,
}
PARAMETERS = {"leaky_relu": [0.2, 0.0, -0.5], "elu": [0.7, 2.5, -0.5]}


def moderate(dtype: torch.dtype) -> list[str]:
    """Where 1 - p is taken of a probability near 1, what is left is the rounding of p.

    In float64, where torch is its own truth, the bound knows of no such error of torch's.
    """
    return [v for v in ANY if dtype != torch.float64 or v not in ("wide", "large")]


def both(name: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    return getattr(ours, name), getattr(theirs, name)


def optional(draw, strategy: st.SearchStrategy, name: str) -> dict[str, Any]:
    """The argument, or nothing: the default is tried as often as all others."""
    return {name: draw(strategy)} if draw(flags) else {}


def some(draw, strategy: st.SearchStrategy) -> Any:
    return draw(strategy) if draw(flags) else None


def activation_arguments(draw, name: str, inplace: bool, differentiated: bool) -> dict[str, Any]:
    if name == "leaky_relu":
        slopes = [0.3, 0.0, 1.5] + ([] if inplace and differentiated else [-0.5])
        return optional(draw, st.sampled_from(slopes), "negative_slope")
    if name == "elu":
        alphas = [0.7, 2.5, 0.0] + ([] if inplace and differentiated else [-0.5])
        return optional(draw, st.sampled_from(alphas), "alpha")
    if name == "gelu":
        return optional(draw, st.sampled_from(["none", "tanh"]), "approximate")
    if name == "softplus":
        beta = optional(draw, st.sampled_from([0.5, 3.0]), "beta")
        return beta | optional(draw, st.sampled_from([2.0, -1.0, 50.0]), "threshold")
    return {}


# Of a NaN, torch's gradient is dy or a NaN, and of an infinity its GELU is that or a NaN: its
# vectorized code says other than its scalar code.
VALUES_FOR = {"elu": NO_NAN, "selu": NO_NAN, "gelu": FINITE, "gelu_tanh": FINITE}
IN_PLACE = ["relu", "leaky_relu", "elu", "selu", "silu"]


@st.composite
def activations(draw, name: str) -> Call:
    dtype = draw(dtypes)
    values = moderate(dtype) if name in ("sigmoid", "tanh") else VALUES_FOR.get(name, ANY)
    x = draw(tensors(draw(shapes()), dtype, values))
    inplace = name in IN_PLACE and draw(flags)
    kwargs = activation_arguments(draw, name, inplace, x.requires_grad)
    pair = both(name)
    if inplace:  # a leaf may not be written to
        pair = tuple(partial(_in_place, f) for f in pair)
    return Call(*pair, (x,), kwargs, draw(upstreams(dtype)))


def _in_place(f: Callable[..., Tensor], x: Tensor, **kwargs: Any) -> Tensor:
    y = f(x * 1, inplace=True, **kwargs)
    # The gradient is computed from y. Where ELU and SELU are flat that is y + alpha, of which the
    # rounding of y may be all that is left, or nothing: an error of torch's of 0, or of all.
    keep(y.data)
    return y


@st.composite
def softmaxes(draw, name: str) -> Call:
    dtype, shape = draw(dtypes), draw(shapes())
    x = draw(tensors(shape, dtype, moderate(dtype)))
    kwargs = {"dim": draw(st.integers(-max(len(shape), 1), max(len(shape), 1) - 1))}
    # A narrower type would round in float64, too, and there would be no truth.
    wider = [d for d in DTYPES if torch.promote_types(d, dtype) == d]
    kwargs |= optional(draw, st.sampled_from(wider), "dtype")
    return Call(*both(name), (x,), kwargs, draw(upstreams(dtype)))


@st.composite
def dropouts(draw) -> Call:
    dtype = draw(dtypes)
    x = draw(tensors(draw(shapes()), dtype, ANY))
    kwargs = optional(draw, st.sampled_from([0.0, 0.1, 0.9, 1.0]), "p")
    kwargs |= optional(draw, flags, "training") | optional(draw, flags, "inplace")
    kwargs |= optional(draw, st.sampled_from(["training", "inference"]), "scale_at")
    pair = (ours.dropout, _torchs_dropout)
    if kwargs.get("inplace"):
        pair = tuple(partial(_on_a_copy, f) for f in pair)
    return Call(*pair, (x,), kwargs, draw(upstreams(dtype)))


def _on_a_copy(f: Callable[..., Tensor], x: Tensor, **kwargs: Any) -> Tensor:
    return f(x * 1, **kwargs)


def _torchs_dropout(
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    scale_at: str = "training",
) -> Tensor:
    """With the mask of the formula where kernels run."""
    if not KERNELS or not training or p in (0.0, 1.0) or not x.numel():
        y = theirs.dropout(x, p, training)
    else:
        number = torch.randint(2**63 - 1, ())
        y = x * (mask_of(number, x.shape, _dense_strides(x), p).to(x.dtype) / (1 - p))
    return y if scale_at == "training" else y * (1 - p)


@st.composite
def biased_activations(draw) -> Call:
    dtype, shape = draw(dtypes), draw(shapes(1))
    activation = draw(st.sampled_from(list(ACTIVATIONS)))
    p, training = draw(st.sampled_from([0.0, 0.1, 0.8, 1.0])), draw(flags)
    # where NaN or infinity was dropped after a ReLU, the output, a NaN, does not say what it was
    hidden = activation == "relu" and 0 < p < 1 and training
    values = FINITE if hidden else VALUES_FOR.get(activation, ANY)
    x = draw(tensors(shape, dtype, values))
    bias = some(draw, tensors(shape[-1:], dtype))
    kwargs = {"activation": activation}
    if activation in PARAMETERS:
        kwargs |= optional(draw, st.sampled_from(PARAMETERS[activation]), "param")
    args = (x, bias, p, training)
    return Call(ours.bias_act_dropout, _bias_act_dropout, args, kwargs, draw(upstreams(dtype)))


def _bias_act_dropout(x, bias, p, training, *, activation, param=None) -> Tensor:
    """In torch's pieces, with the mask of the formula where kernels run."""
    u = x if bias is None else x + bias
    y = ACTIVATIONS[activation](u, *(() if param is None else (param,)))
    if not (KERNELS and training and 0 < p < 1 and y.numel()):
        return theirs.dropout(y, p, training)
    number = torch.randint(2**63 - 1, ())
    kept = _mask(number, y.reshape(-1, y.shape[-1]), p).reshape(y.shape)
    return y * (kept.to(y.dtype) / (1 - p))


@st.composite
def linears(draw) -> Call:
    dtype, rows = draw(dtypes), draw(shapes(0, 3, 129))
    features, neurons = draw(st.sampled_from([0, 1, 3, 8, 17])), draw(st.integers(0, 9))
    x = draw(tensors((*rows, features), dtype))
    if draw(st.integers(0, 4)) == 0:
        return Call(
            *both("linear"), (x, draw(tensors((features,), dtype))), {}, draw(upstreams(dtype))
        )
    weight = draw(tensors((neurons, features), dtype))
    bias = some(draw, tensors((neurons,), dtype))
    return Call(*both("linear"), (x, weight, bias), {}, draw(upstreams(dtype)))


def scores_shape(draw) -> tuple[int, ...]:
    """(K,), (N, K) or (N, K, d1, ...), of one class at least."""
    return draw(shapes(1, 4).filter(lambda shape: shape[len(shape) > 1] > 0))


def without_classes(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[1:] if len(shape) == 1 else (shape[0], *shape[2:])


def index_arguments(draw, shape: tuple[int, ...], dtype: torch.dtype):
    """A target of class indices, and weight, ignore_index, reduction."""
    classes = shape[0] if len(shape) == 1 else shape[1]
    kwargs = optional(draw, REDUCTIONS, "reduction")
    kwargs |= optional(draw, tensors((classes,), dtype, ["positive"], False), "weight")
    kwargs |= optional(draw, st.sampled_from([-1, 0, 2, 250, -100]), "ignore_index")
    ignored = kwargs.get("ignore_index", -100) if draw(flags) else None
    kind = torch.int64
    # torch takes bytes for a loss of one dimension, ours for any
    if len(shape) < 3 and classes < 256 and ignored in (None, 0, 2, 250):
        kind = draw(st.sampled_from([torch.int64, torch.uint8]))
    target = Indices(without_classes(shape), classes, ignored, kind, draw(layouts), draw(seeds))
    return target, kwargs


def smoothed(draw, target: Indices) -> tuple[Indices, dict[str, float]]:
    """With smoothing torch takes no bytes."""
    smoothing = optional(draw, st.sampled_from([0.1, 0.5, 1.0]), "label_smoothing")
    return (replace(target, dtype=torch.int64) if smoothing else target), smoothing


@st.composite
def nll_losses(draw) -> Call:
    dtype, shape = draw(dtypes), scores_shape(draw)
    target, kwargs = index_arguments(draw, shape, dtype)
    x = draw(tensors(shape, dtype, ANY))
    return Call(ours.nll_loss, _nll_loss, (x, target), kwargs, draw(upstreams(dtype)))


def _nll_loss(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """With 4 dimensions torch has no gradient for other layouts."""
    return theirs.nll_loss(x.contiguous(), *args, **kwargs)


@st.composite
def cross_entropies(draw) -> Call:
    dtype, shape = draw(dtypes), scores_shape(draw)
    target, kwargs = index_arguments(draw, shape, dtype)
    target, smoothing = smoothed(draw, target)
    kwargs |= smoothing
    x = draw(tensors(shape, dtype, moderate(dtype)))
    mine = ours.cross_entropy
    if kwargs.get("reduction") != "none" and draw(flags):
        mine = partial(ours.cross_entropy, gradient_in_forward=True)
    return Call(mine, _cross_entropy, (x, target), kwargs, draw(upstreams(dtype)))


def _cross_entropy(x: Tensor, target: Tensor, weight=None, ignore_index=-100, **kwargs) -> Tensor:
    """Of ours an ignored row leaves no trace, where torch makes NaN of a NaN in it."""
    if target.shape == without_classes(tuple(x.shape)):
        x = torch.where((target == ignore_index).unsqueeze(int(x.ndim > 1)), 0, x)
    return theirs.cross_entropy(x, target, weight, ignore_index=ignore_index, **kwargs)


@st.composite
def probability_cross_entropies(draw) -> Call:
    dtype, shape = draw(dtypes), scores_shape(draw)
    classes = shape[0] if len(shape) == 1 else shape[1]
    x = draw(tensors(shape, dtype, moderate(dtype)))
    target = draw(tensors(shape, dtype, ["probabilities"]))
    kwargs = optional(draw, REDUCTIONS, "reduction")
    kwargs |= optional(draw, tensors((classes,), dtype, ["positive"], False), "weight")
    kwargs |= optional(draw, st.sampled_from([0.1, 0.5, 1.0]), "label_smoothing")
    return Call(*both("cross_entropy"), (x, target), kwargs, draw(upstreams(dtype)))


@st.composite
def linear_cross_entropies(draw) -> Call:
    dtype, rows = draw(dtypes), draw(st.sampled_from([0, 1, 3, 8, 13, 33]))
    features, classes = draw(st.sampled_from([0, 1, 3, 8])), draw(st.sampled_from([1, 2, 7, 33]))
    target, kwargs = index_arguments(draw, (rows, classes), dtype)
    target, smoothing = smoothed(draw, target)
    kwargs |= smoothing
    args = [draw(tensors(s, dtype, ["normal"])) for s in ((rows, features), (classes, features))]
    bias = some(draw, tensors((classes,), dtype, ["normal"]))
    kwargs |= {} if bias is None else {"linear_bias": bias}
    options = some(draw, st.builds(SimpleNamespace, batch_chunk_size=st.integers(1, 40)))
    mine = partial(ours.linear_cross_entropy, options=options)
    call = (*args, target)
    return Call(mine, _linear_cross_entropy, call, kwargs, draw(upstreams(dtype)))


def _linear_cross_entropy(x, linear_weight, target, *, linear_bias=None, **kwargs) -> Tensor:
    return theirs.cross_entropy(theirs.linear(x, linear_weight, linear_bias), target, **kwargs)


@st.composite
def distances(draw, name: str) -> Call:
    dtype, shape = draw(dtypes), draw(shapes())
    x = draw(tensors(shape, dtype, ANY))
    same = st.just(dtype)
    # torch 2.11 has no gradient of two types
    other = same if torch.__version__ < (2, 12) else draw(st.sampled_from([same, dtypes]))
    target = draw(tensors(broadcast(draw, shape), draw(other), ANY))
    kwargs = optional(draw, REDUCTIONS, "reduction")
    # a weight's gradient in a mean is a loss less the mean: in half types what rounding leaves
    learned = False if dtype.itemsize == 2 else None
    kwargs |= optional(draw, tensors(shape, dtype, ["positive", "whole"], learned), "weight")
    upstream = draw(upstreams(dtype))
    if torch.float16 in (dtype, target.dtype):
        # what ends within a rounding of the largest number is that, or infinite, and of two
        # infinities a sum may be NaN
        upstream = no_larger(upstream)
        if dtype != target.dtype:  # torch makes float16 of each difference before it sums them
            x, target = no_larger(x), no_larger(target)
    return Call(*both(name), (x, target), kwargs, upstream)


def no_larger(x: Draw) -> Draw:
    """Than float16 can hold the square of."""
    return replace(x, values="normal") if x.values == "large" else x


def broadcast(draw, shape: tuple[int, ...]) -> tuple[int, ...]:
    """``shape``, or one that broadcasts to it."""
    if draw(st.integers(0, 3)):
        return shape
    shape = tuple(1 if draw(flags) else n for n in shape)
    return shape[draw(st.integers(0, len(shape))) :]


@st.composite
def binary_cross_entropies(draw) -> Call:
    dtype, shape = draw(dtypes), draw(shapes())
    args = [draw(tensors(shape, dtype, ["probabilities"])) for _ in range(2)]
    kwargs = optional(draw, REDUCTIONS, "reduction")
    weight = tensors(broadcast(draw, shape), dtype, ["positive", "whole"], False)
    kwargs |= optional(draw, weight, "weight")
    return Call(*both("binary_cross_entropy"), tuple(args), kwargs, draw(upstreams(dtype)))


@st.composite
def logits_losses(draw) -> Call:
    dtype, shape = draw(dtypes), draw(shapes())
    x = draw(tensors(shape, dtype, ANY))
    target = draw(tensors(shape, dtype, ["probabilities"]))  # of two types torch takes the target's
    kwargs = optional(draw, REDUCTIONS, "reduction")
    for name in ("weight", "pos_weight"):
        weight = tensors(broadcast(draw, shape), dtype, ["positive", "whole"], False)
        kwargs |= optional(draw, weight, name)
    pair = both("binary_cross_entropy_with_logits")
    return Call(*pair, (x, target), kwargs, draw(upstreams(dtype)))


# The kernels first divide the weight by the deviation, and may be left with 0.
FACTORS = [v for v in FINITE if not (KERNELS and v == "subnormal")]


def normalized(
    draw, shape: tuple[int, ...], dtype: torch.dtype, values: list[str], of_itself: bool
) -> Draw:
    # Two values become -1 and 1 whatever they are: their gradient is what cancelling leaves.
    two = of_itself and math.prod(shape) == 2 * shape[1]
    # Torch adds the values of a channel one by one and, where all are the same, rounds in the same
    # direction. In float64 it is the truth.
    places = writable if dtype == torch.float64 else layouts
    return draw(tensors(shape, dtype, values, False if two else None, places))


def batch_norm_arguments(
    draw, values: list[str] = ANY
) -> tuple[torch.dtype, tuple[Any, ...], dict[str, Any]]:
    # Of no channels torch says that it finds no first one.
    dtype, shape = draw(dtypes), draw(shapes(2, 5).filter(lambda shape: shape[1] > 0))
    channels = shape[1:2]
    # of half inputs torch also takes parameters and statistics of float32
    wide = torch.float32 if dtype.itemsize == 2 and draw(flags) else dtype
    training = draw(flags)
    # An infinity makes a kernel's running mean of its channel NaN, and torch's infinite.
    x = normalized(draw, shape, dtype, FINITE if KERNELS and training else values, training)
    running = [None, None]
    if not training or draw(flags):
        running = [Draw(channels, wide, v, seed=draw(seeds)) for v in ("normal", "positive")]
    fits = [v for v in FINITE if v != "large" or wide == dtype]  # in what comes of them
    weights = [v for v in fits if v in FACTORS]
    affine = [some(draw, tensors(channels, wide, values)) for values in (weights, fits)]
    kwargs = {"training": training} | optional(draw, st.sampled_from([1.0, 0.3]), "eps")
    kwargs |= optional(draw, st.sampled_from([0.0, 1.0, 0.7]), "momentum")
    return dtype, (x, *running, *affine), kwargs


def added_upstreams(dtype: torch.dtype) -> st.SearchStrategy[Draw]:
    """In float64 not one number for all, as in :func:`normalized`."""

    def various(draw: Draw) -> bool:
        return draw.values != "equal" and not draw.layout.startswith("expanded")

    return upstreams(dtype).filter(various) if dtype == torch.float64 else upstreams(dtype)


@st.composite
def batch_norms(draw) -> Call:
    dtype, args, kwargs = batch_norm_arguments(draw)
    kwargs |= optional(draw, flags, "unbiased_running_var")
    return Call(ours.batch_norm, _batch_norm, args, kwargs, draw(added_upstreams(dtype)))


def _batch_norm(x, mean, var, weight, bias, *, unbiased_running_var=True, **kwargs) -> Tensor:
    before = None if var is None else var.clone()
    # torch 2.13's gradient (CPU) takes the elements of a weight that has steps for a row's
    weight = None if weight is None else weight.contiguous()
    y = _handing_on(theirs.batch_norm(x.contiguous(), mean, var, weight, bias, **kwargs))
    if before is not None and kwargs["training"] and not unbiased_running_var and x.numel():
        share, others = kwargs.get("momentum", 0.1), [d for d in range(x.ndim) if d != 1]
        wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        var.data.copy_((1 - share) * before + share * wide.var(others, correction=0))
    return y


def _handing_on(y: Tensor) -> Tensor:
    """Torch sees contiguous tensors alone: where those of shape (1, 8, 4, 1) have other strides,
    such as (1, 1, 8, 32), which it takes for channels_last, torch 2.13 sums wrong elements (CPU).
    """
    if y.requires_grad:
        y.register_hook(lambda dy: dy.contiguous())
    return y


@st.composite
def batch_norm_acts(draw) -> Call:
    activation = draw(st.sampled_from(list(ACTIVATIONS)))
    # of an infinite value the normalized one is a NaN
    values = FINITE if activation in VALUES_FOR else ANY
    dtype, args, kwargs = batch_norm_arguments(draw, values)
    kwargs["activation"] = activation
    if activation in PARAMETERS:
        kwargs |= optional(draw, st.sampled_from(PARAMETERS[activation]), "param")
    residual = some(draw, tensors(args[0].shape, dtype))
    kwargs |= {} if residual is None else {"residual": residual}
    return Call(ours.batch_norm_act, _batch_norm_act, args, kwargs, draw(added_upstreams(dtype)))


def _batch_norm_act(*args, activation, param=None, residual=None, **kwargs) -> Tensor:
    y = _batch_norm(*args, **kwargs)
    y = y if residual is None else y + residual
    return ACTIVATIONS[activation](y, *(() if param is None else (param,)))


@st.composite
def batch_norm_modules(draw) -> Call:
    dtype, shape = draw(dtypes), draw(shapes(2, 5).filter(lambda shape: shape[1] > 0))
    name = {4: "BatchNorm2d", 5: "BatchNorm3d"}.get(len(shape), "BatchNorm1d")
    options = optional(draw, st.sampled_from([None, 0.0, 0.5]), "momentum")
    options |= optional(draw, flags, "affine") | optional(draw, flags, "track_running_stats")
    training = draw(flags)
    statistics = training or not options.get("track_running_stats", True)
    x = normalized(draw, shape, dtype, FINITE if KERNELS else ANY, statistics)
    state = {}
    if options.get("affine", True):
        for key, values in (("weight", FACTORS), ("bias", FINITE)):
            state[key] = draw(tensors(shape[1:2], dtype, values))
    if options.get("track_running_stats", True):
        for key, values in (("running_mean", "normal"), ("running_var", "positive")):
            state[key] = Draw(shape[1:2], dtype, values, seed=draw(seeds))
        state["num_batches_tracked"] = Indices((), draw(st.sampled_from([1, 1000])))
    pair = [
        partial(run, getattr(library, name)(*shape[1:2], **options).train(training))
        for library, run in ((torchref.nn, _module), (torch.nn, _torchs_module))
    ]
    return Call(*pair, (x,), state, draw(added_upstreams(dtype)))


def _module(module: torch.nn.Module, x: Tensor, **state: Tensor) -> Tensor:
    return torch.func.functional_call(module, state, (x,))


def _torchs_module(module: torch.nn.Module, x: Tensor, **state: Tensor) -> Tensor:
    if "weight" in state:  # as in _batch_norm
        state["weight"] = state["weight"].contiguous()
    return _handing_on(_module(module, x.contiguous(), **state))


OPTIONS = {
    "SGD": {
        "momentum": [0.9],
        "dampening": [0.5],
        "weight_decay": [0.1],
        "nesterov": [True],
    },
    "RMSprop": {
        "alpha": [0.9, 0.5],
        "eps": [1e-3],
        "weight_decay": [0.1],
        "momentum": [0.9],
        "centered": [True],
    },
    "Adam": {
        "betas": [(0.5, 0.9), (0.0, 0.0)],
        "eps": [1e-3],
        "weight_decay": [0.1],
        "amsgrad": [True],
        "decoupled_weight_decay": [True],
    },
    "AdamW": {
        "betas": [(0.5, 0.9), (0.0, 0.0)],
        "eps": [1e-3],
        "weight_decay": [0.0, 0.1],
        "amsgrad": [True],
    },
}
AVERAGES = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "grad_avg")
COMMON = {
    "lr": [0.0, 0.01, 1.0],
    "maximize": [True],
    "foreach": [True, False],
    "max_norm": [0.1, 10.0],
    "ema_decay": [0.0, 0.9],
}


@st.composite
def optimizers(draw, name: str) -> Call:
    dtype, steps = draw(dtypes), draw(st.integers(1, 4))
    kwargs = {}
    for option, values in (OPTIONS[name] | COMMON).items():
        kwargs |= optional(draw, st.sampled_from(values), option)
    if dtype.itemsize == 2:  # a variance that cancels is a rounding, of either sign
        kwargs.pop("centered", None)
    if dtype == torch.float16 and name != "SGD":
        kwargs["eps"] = 1e-3  # as 1e-8 is 0, and 0 / 0 is in torch's parameters
    sizes = draw(st.lists(shapes(elements=600), min_size=1, max_size=3))
    params = [draw(tensors(size, dtype, FINITE, False, writable)) for size in sizes]
    # a parameter may have no gradient in a step
    # lerp makes NaN of an infinite parameter, where an average that starts as it is infinite
    values = FINITE if "ema_decay" in kwargs else ANY
    # torch's norm is that of a clone, as it writes to it; over memory with steps, or of one element
    # for all, its norm has twenty times the error
    places = dense if "max_norm" in kwargs else layouts
    grads = [
        some(draw, tensors(size, dtype, values, False, places))
        for _ in range(steps)
        for size in sizes
    ]
    pair = [
        partial(train, getattr(library.optim, name), len(sizes), kwargs)
        for library, train in ((torchref, _trained), (torch, _torchs_trained))
    ]
    return Call(*pair, (*params, *grads))


def _trained(cls, count: int, options: dict[str, Any], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Parameters, averages and state after steps with the gradients that follow them."""
    params = [torch.nn.Parameter(x) for x in tensors[:count]]
    optimizer = cls(params, **options)
    for step in range(count, len(tensors), count):
        for p, grad in zip(params, tensors[step : step + count], strict=True):
            p.grad = grad
        optimizer.step()
    return _held(optimizer, params, optimizer.ema_parameters())


def _torchs_trained(
    cls,
    count: int,
    options: dict[str, Any],
    *tensors: Tensor,
) -> tuple[Tensor, ...]:
    """Ours' options in torch's pieces."""
    options = dict(options)
    max_norm, decay = options.pop("max_norm", None), options.pop("ema_decay", None)
    params = [torch.nn.Parameter(x) for x in tensors[:count]]
    averages: list[Tensor] = []
    optimizer = cls(params, **options)
    for step in range(count, len(tensors), count):
        for p, grad in zip(params, tensors[step : step + count], strict=True):
            p.grad = None if grad is None else grad.clone()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, max_norm)
        optimizer.step()
        keep(*(p.detach() for p in params))
        keep(*(x for s in optimizer.state.values() for key, x in s.items() if key in AVERAGES))
        wide = [p.detach().to(torch.promote_types(p.dtype, torch.float32)) for p in params]
        if averages:
            averages = [v.lerp(x, 1 - decay) for v, x in zip(averages, wide, strict=True)]
        elif decay is not None and any(p.grad is not None for p in params):
            averages = [x.clone() for x in wide]
    return _held(optimizer, params, averages or params)


def _held(
    optimizer: torch.optim.Optimizer, params: list[Tensor], averages: list[Tensor]
) -> tuple[Tensor, ...]:
    state = [optimizer.state.get(p, {}) for p in params]
    held = [s[key] for s in state for key in sorted(s) if not key.startswith("ema")]
    averages = [v.detach().to(p.dtype) for v, p in zip(averages, params, strict=True)]
    return *(p.detach() for p in params), *averages, *(x for x in held if x is not None)


@st.composite
def clippings(draw) -> Call:
    dtype = draw(dtypes)
    # The squares of subnormal ones are 0 in torch, too, but it does not square a single one.
    # And large ones are infinite where float32 tells torch's error in float64.
    values = [v for v in ANY if v not in ("subnormal", "large")]
    grads = [
        draw(tensors(s, dtype, values, False, writable))
        for s in draw(st.lists(shapes(elements=600), min_size=1, max_size=3))
    ]
    norm = draw(st.sampled_from([0.0, 0.5, 100.0]))
    kwargs = optional(draw, st.sampled_from([1.0, 3.0, math.inf]), "norm_type")
    kwargs |= optional(draw, flags, "error_if_nonfinite") | optional(draw, flags, "foreach")
    pair = [
        partial(_clipped, library.clip_grad_norm_, norm)
        for library in (torchref.optim, torch.nn.utils)
    ]
    return Call(*pair, tuple(grads), kwargs)


def _clipped(clip, max_norm: float, *grads: Tensor, **kwargs: Any) -> tuple[Tensor, ...]:
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    return clip(params, max_norm, **kwargs), *grads


@st.composite
def averages(draw) -> Call:
    dtype, shape = draw(dtypes), draw(shapes())
    values = [draw(tensors(shape, dtype, ANY, False)) for _ in range(draw(st.integers(1, 5)))]
    decay, corrected = draw(st.sampled_from([0.0, 0.5, 0.99])), draw(flags)
    pair = [partial(f, decay, corrected) for f in (_averaged, _torchs_averaged)]
    return Call(*pair, tuple(values))


def _averaged(decay: float, corrected: bool, *values: Tensor) -> Tensor:
    x = torch.empty_like(values[0])
    average = torchref.optim.ExponentialMovingAverage([x], decay)
    for value in values:
        x.copy_(value)
        average.update()
    return average.average(corrected)[0]


def _torchs_averaged(decay: float, corrected: bool, *values: Tensor) -> Tensor:
    wide = [v.to(torch.promote_types(v.dtype, torch.float32)) for v in values]
    v = torch.zeros_like(wide[0])
    for value in wide:
        v = decay * v + (1 - decay) * value
    return (v / (1 - decay ** len(values)) if corrected else v).to(values[0].dtype)


@st.composite
def penalties(draw) -> Call:
    dtype = draw(dtypes)
    weights = [
        draw(tensors(draw(shapes(elements=300)), dtype, ANY, False))
        for _ in range(draw(st.integers(1, 3)))
    ]
    l1, l2 = (draw(st.sampled_from([0.0, 0.5, 3.0])) for _ in range(2))
    pair = [partial(_penalized, f, l1, l2) for f in (torchref.nn.weight_penalty, _penalty)]
    return Call(*pair, tuple(weights))


def _penalized(penalty, l1: float, l2: float, *weights: Tensor) -> tuple[Tensor, ...]:
    module = torch.nn.ParameterList(weights)
    loss = penalty(module, l1, l2)
    if loss.requires_grad:
        loss.backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in module]
    return loss.detach(), *grads


def _penalty(module: torch.nn.Module, l1: float, l2: float) -> Tensor:
    loss = next(module.parameters()).new_zeros(())
    for w in module.parameters():
        if w.ndim > 1 and l1:
            loss = loss + l1 * w.norm(1)
        if w.ndim > 1 and l2:
            loss = loss + l2 * (w * w).sum()
    return loss


@dataclass(frozen=True)
class Filling:
    """An initializer of ours, which fills as torch's does from the same seed."""

    name: str
    draw: Draw
    kwargs: dict[str, Any]

    def check(self) -> None:
        filled = [self._filled(init) for init in (torchref.nn.init, torch.nn.init)]
        assert (filled[0] is None) == (filled[1] is None), "one of the two refuses"
        if filled[0] is not None and filled[1] is not None:
            torch.testing.assert_close(*filled, rtol=0, atol=0, check_stride=True)

    def _filled(self, init: Any) -> Tensor | None:
        x = self.draw.tensor()
        with torch.random.fork_rng(), quiet():
            torch.manual_seed(self.draw.seed)
            try:
                return getattr(init, self.name)(x, **self.kwargs)
            except (*REFUSALS, ZeroDivisionError):
                return None


@st.composite
def fillings(draw) -> Filling:
    arguments = {
        "zeros_": {},
        "constant_": {"val": [0.5]},
        "normal_": {"mean": [1.0], "std": [0.1, 0.0, -1.0]},
        "uniform_": {"a": [-1.0, 2.0], "b": [1.5]},
        "xavier_uniform_": {"gain": [2.0]},
        "xavier_normal_": {"gain": [2.0]},
    }
    kaiming = {
        "a": [0.2],
        "mode": ["fan_out", "fan_sideways"],
        "nonlinearity": ["relu", "tanh", "linear", "selu", "no such"],
    }
    arguments |= {"kaiming_uniform_": kaiming, "kaiming_normal_": kaiming}
    name = draw(st.sampled_from(list(arguments)))
    kwargs: dict[str, Any] = {"val": 2.0} if name == "constant_" else {}
    for argument, values in arguments[name].items():
        kwargs |= optional(draw, st.sampled_from(values), argument)
    shape = draw(shapes(0, 5))
    if name.startswith("kaiming") and (len(shape) < 2 or 0 in shape):
        shape = (3,)  # an empty one torch leaves be before it looks at anything
    return Filling(name, draw(tensors(shape, draw(dtypes), layouts=writable)), kwargs)


PIECES: dict[str, st.SearchStrategy] = {
    **{name: activations(name) for name in (*IN_PLACE, "sigmoid", "tanh", "gelu", "softplus")},
    "softmax": softmaxes("softmax"),
    "log_softmax": softmaxes("log_softmax"),
    "dropout": dropouts(),
    "bias_act_dropout": biased_activations(),
    "linear": linears(),
    "nll_loss": nll_losses(),
    "cross_entropy": cross_entropies(),
    "cross_entropy_probabilities": probability_cross_entropies(),
    "linear_cross_entropy": linear_cross_entropies(),
    "mse_loss": distances("mse_loss"),
    "l1_loss": distances("l1_loss"),
    "binary_cross_entropy": binary_cross_entropies(),
    "binary_cross_entropy_with_logits": logits_losses(),
    "batch_norm": batch_norms(),
    "batch_norm_act": batch_norm_acts(),
    "batch_norm_modules": batch_norm_modules(),
    **{name: optimizers(name) for name in OPTIONS},
    "clip_grad_norm_": clippings(),
    "weight_penalty": penalties(),
}
if not KERNELS:  # that there are none of
    PIECES |= {"ExponentialMovingAverage": averages(), "init": fillings()}


# Of these only shapes: ours take more types than torch's code for one type takes, such as running
# statistics of another type, or refuse them in torch's words.
SHAPES_ONLY = {
    "batch_norm",
    "batch_norm_act",
    "bias_act_dropout",
    "binary_cross_entropy_with_logits",
    "dropout",
    "linear",
    "linear_cross_entropy",
}
# Of shapes that do not broadcast and of booleans torch itself speaks.
MISUSED = [p for p in PIECES if hasattr(ours, p) and p not in ("mse_loss", "l1_loss")]


@st.composite
def misuses(draw, piece: str) -> Call:
    """A call with one of its tensors of another shape or type."""
    call = draw(PIECES[piece])
    places = [i for i, x in enumerate(call.args) if isinstance(x, Draw | Indices)]
    place = draw(st.sampled_from(places))
    args = list(call.args)
    args[place] = misused(draw, args[place], piece not in SHAPES_ONLY)
    return replace(call, args=tuple(args))


def misused(draw, x: Any, types: bool) -> Any:
    if types and draw(flags):
        dtype = draw(st.sampled_from([torch.int32, torch.bool]))
        if isinstance(x, Draw):
            x = replace(x, requires_grad=False, values="whole")
        return replace(x, dtype=dtype)
    shape = list(x.shape)
    kind = draw(st.sampled_from(["longer", "more", "fewer"]))
    if kind == "more" or not shape:
        shape.insert(draw(st.integers(0, len(shape))), draw(st.sampled_from([1, 2])))
    elif kind == "fewer":
        del shape[draw(st.integers(0, len(shape) - 1))]
    else:
        shape[draw(st.integers(0, len(shape) - 1))] += 1
    return replace(x, shape=tuple(shape))


def fuzz(
    strategy: st.SearchStrategy,
    record: Callable[[str, Any], None],
    examples: int,
    anew: bool,
    check: Callable[[Any], None] = lambda case: case.check(),
) -> None:
    """Check that many examples: always the same ones, or some ``anew``."""
    tried = 0

    def counted(case: Any) -> None:
        nonlocal tried
        tried += 1
        check(case)

    options = settings(
        max_examples=examples,
        derandomize=not anew,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run = options(given(strategy)(counted))
    if anew:
        number = random.SystemRandom().randrange(2**32)
        print(f"hypothesis seed {number}")
        run = seed(number)(run)
    try:
        run()
    finally:
        record("fuzz cases", tried)


every_piece = pytest.mark.parametrize("piece", PIECES)


@every_piece
def test_pieces(piece, record_testsuite_property):
    fuzz(PIECES[piece], record_testsuite_property, EXAMPLES, anew=False)


@pytest.mark.slow
@every_piece
def test_many_of_pieces(piece, record_testsuite_property):
    fuzz(PIECES[piece], record_testsuite_property, MANY, anew=True)


@pytest.mark.parametrize("piece", MISUSED)
def test_misuses(piece, record_testsuite_property):
    def check(call: Call) -> None:
        call.check_refusal(piece)

    fuzz(misuses(piece), record_testsuite_property, EXAMPLES // 3, anew=False, check=check)


@pytest.mark.slow
@pytest.mark.skipif(KERNELS, reason="another backend")
@pytest.mark.parametrize("piece", MISUSED)
def test_compiled(piece, record_testsuite_property):
    """Few kinds of tensors, as each is compiled anew."""

    def check(call: Call) -> None:
        with torchref.backend("compiled"):
            call.check()

    plain = PIECES[piece].map(_plain).filter(_is_matrix)
    fuzz(plain, record_testsuite_property, 10, anew=False, check=check)


def _plain(call: Call) -> Call:
    def plain(x: Any) -> Any:
        if isinstance(x, Draw):
            return replace(x, dtype=torch.float32, layout="contiguous")
        return replace(x, layout="contiguous") if isinstance(x, Indices) else x

    args, kwargs = map(plain, call.args), {k: plain(x) for k, x in call.kwargs.items()}
    return replace(call, args=tuple(args), kwargs=kwargs, upstream=plain(call.upstream))


def _is_matrix(call: Call) -> bool:
    return len(call.args[0].shape) == 2 and min(call.args[0].shape) > 1

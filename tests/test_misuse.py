"""What happens to wrong input: the right exception, in words that help, and nothing is touched.

Each row of the tables is a misuse: a call, the exact type of its exception, and a pattern of the
message with the argument and the value. Whatever the call is handed (tensors and their gradients,
modules, optimizers, files) is bit by bit the same afterwards. Where torch has the same misuse, ours
raises torch's type or one derived from it, or ValueError where torch's says less (RuntimeError,
AssertionError); a row that ``differs`` from that says why. Where torch does a check for us (an
optimizer's ranges, the shapes of a state_dict, devices that differ) the words are torch's.

``python tests/test_misuse.py`` prints how many there are.
"""

import importlib.util
import io
import math
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any, NamedTuple, cast
from unittest import mock

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

import torchref
import torchref.optim
from torchref import diagnostics as see
from torchref.data import (
    BagOfWords,
    ImageAugment,
    ImageNormalize,
    Impute,
    MinMax,
    Robust,
    Standard,
    TabularAugment,
    chronological_split,
    folds,
    grouped_split,
    mean_and_interval,
    mixup,
    random_split,
    smote,
    stratified_split,
)
from torchref.optim import ExponentialMovingAverage
from torchref.testing import assert_parity
from torchref.training import (
    Classifier,
    Config,
    CrossValidation,
    DataModule,
    EarlyStopping,
    GradientFlowCallback,
    MLPClassifier,
    MLPRegressor,
    Parity,
    RestoreBest,
    Run,
    build_mlp,
    build_normalizer,
    build_optimizer,
    coverage_curve,
    decide,
    learning_curve_over_size,
    learning_rate_range,
    log_loss,
    overfit_one_batch,
)
from torchref.training.compare import read_run
from torchref.training.tune import Search, tune

pytestmark = [
    pytest.mark.cpu,  # on a GPU nobody looks at values
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]

NAN, INF = math.nan, math.inf
SCRIPTS = Path(__file__).parents[1] / "scripts"
LESS_SPECIFIC = (RuntimeError, AssertionError)
NONE = "torch has none"  # of what is called
SILENT = "torch takes it and says nothing"


class Misuse(NamedTuple):
    """``given`` is handed to ``call``, and first made where it is a function."""

    name: str
    call: Callable[..., Any]
    error: type[Exception]
    message: str
    given: tuple[Any, ...] = ()
    differs: str = ""
    defect: str = ""  # what the library does instead, so far


def row(
    name: str,
    call: Callable[..., Any],
    error: type[Exception],
    message: str,
    *given: Any,
    differs: str = "",
    defect: str = "",
) -> Misuse:
    return Misuse(name, call, error, message, given, differs, defect)


OURS = SimpleNamespace(
    nn=torchref.nn,
    F=torchref.nn.functional,
    optim=torchref.optim,
    clip=torchref.optim.clip_grad_norm_,
)
THEIRS = SimpleNamespace(nn=nn, F=nn.functional, optim=torch.optim, clip=nn.utils.clip_grad_norm_)

torch.manual_seed(0)
X = torch.rand(4, 3)
W = torch.rand(5, 3)
T = torch.tensor([0, 2, 1, 0])
ELSEWHERE = torch.empty(4, 3, device="meta")  # another device than the CPU


def leaf(size: int = 3) -> nn.Parameter:
    parameter = nn.Parameter(torch.rand(size))
    parameter.grad = torch.rand(size)
    return parameter


LEAF = leaf()
NUMBER = nn.Parameter(torch.tensor(0.3))  # where no gradient is taken

LOSSES = [
    row(
        "relu: bool", lambda t, x: t.F.relu(x), NotImplementedError, "relu: .*`input`.*bool", X > 0
    ),
    row(
        "relu: complex",
        lambda t, x: t.F.relu(x),
        NotImplementedError,
        "relu: .*real `input`, got torch.complex64",
        X.to(torch.complex64),
    ),
    row(
        "relu: a list",
        lambda t: t.F.relu([1.0]),
        TypeError,
        "relu.*input.*list",
    ),
    row("relu: an array", lambda t, x: t.F.relu(x.numpy()), TypeError, "`input`.*ndarray", X),
    row(
        "relu: a leaf in place",
        lambda t, x: t.F.relu(x, inplace=True),
        RuntimeError,
        "a leaf Variable that requires grad is being used in an in-place operation",
        LEAF,
    ),
    row(
        "silu: a leaf in place",
        lambda t, x: t.F.silu(x, inplace=True),
        RuntimeError,
        "a leaf Variable that requires grad is being used in an in-place operation",
        LEAF,
    ),
    row(
        "relu: an expanded tensor in place",
        lambda t, x: t.F.relu(x.expand(3), inplace=True),
        RuntimeError,
        "more than one element of the written-to tensor refers to a single memory",
        -torch.ones(1),
    ),
    row(
        "leaky_relu: integers",
        lambda t, x: t.F.leaky_relu(x),
        NotImplementedError,
        "leaky_relu: .*`input`, got torch.int64",
        T,
    ),
    row(
        "leaky_relu: a negative slope in place",
        lambda t, x: t.F.leaky_relu(x.clone(), -0.5, inplace=True).sum().backward(),
        RuntimeError,
        "leaky_relu: .*`negative_slope`, got -0.5",
        LEAF,
    ),
    row(
        "elu: a negative alpha in place",
        lambda t, x: t.F.elu(x.clone(), -0.5, inplace=True).sum().backward(),
        RuntimeError,
        "elu: .*`alpha`, got -0.5",
        LEAF,
    ),
    row(
        "leaky_relu: a slope of NaN",
        lambda t, x: t.F.leaky_relu(x, NAN),
        ValueError,
        "leaky_relu: .*`negative_slope`, got nan",
        X,
        differs=SILENT,
    ),
    row(
        "leaky_relu: a slope that requires a gradient",
        lambda t, x, p: t.F.leaky_relu(x, p),
        TypeError,
        "leaky_relu.*negative_slope.*Parameter",
        X,
        NUMBER,
    ),
    row(
        "elu: alpha that requires a gradient",
        lambda t, x, p: t.F.elu(x, p),
        TypeError,
        "elu.*alpha.*Parameter",
        X,
        NUMBER,
    ),
    row(
        "softplus: beta that requires a gradient",
        lambda t, x, p: t.F.softplus(x, p),
        TypeError,
        "softplus.*beta.*Parameter",
        X,
        NUMBER,
    ),
    row(
        "elu: an infinite alpha",
        lambda t, x: t.F.elu(x, INF),
        ValueError,
        "elu: .*`alpha`, got inf",
        X,
        differs=SILENT,
    ),
    row(
        "elu: alpha is a word",
        lambda t, x: t.F.elu(x, alpha="one"),
        TypeError,
        "elu.*alpha.*(str|one)",
        X,
    ),
    row(
        "softplus: beta is a word",
        lambda t, x: t.F.softplus(x, "1"),
        TypeError,
        "softplus: .*`beta`, got '1'",
        X,
    ),
    row("elu: integers", lambda t, x: t.F.elu(x), NotImplementedError, "elu: .*int64", T),
    row("selu: integers", lambda t, x: t.F.selu(x), NotImplementedError, "selu: .*int64", T),
    row("silu: integers", lambda t, x: t.F.silu(x), NotImplementedError, "silu: .*int64", T),
    row("gelu: integers", lambda t, x: t.F.gelu(x), NotImplementedError, "gelu: .*int64", T),
    row(
        "softplus: integers", lambda t, x: t.F.softplus(x), NotImplementedError, "plus: .*int64", T
    ),
    row(
        "gelu: approximate",
        lambda t, x: t.F.gelu(x, approximate="erf"),
        RuntimeError,
        "gelu: .*`approximate`.*got 'erf'",
        X,
    ),
    row(
        "GELU: approximate",
        lambda t, x: t.nn.GELU("erf")(x),
        RuntimeError,
        "gelu: .*`approximate`.*got 'erf'",
        X,
    ),
    row(
        "softmax: dim too large",
        lambda t, x: t.F.softmax(x, 2),
        IndexError,
        r"softmax: .*`dim` in \[-2, 1\], got 2",
        X,
    ),
    row(
        "log_softmax: dim too small",
        lambda t, x: t.F.log_softmax(x, -3),
        IndexError,
        r"log_softmax: .*`dim` in \[-2, 1\], got -3",
        X,
    ),
    row(
        "softmax: dim of nothing",
        lambda t, x: t.F.softmax(x, 1),
        IndexError,
        r"softmax: .*`dim` in \[-1, 0\], got 1",
        torch.tensor(1.0),
    ),
    row(
        "softmax: dim is 1.5",
        lambda t, x: t.F.softmax(x, 1.5),
        TypeError,
        "softmax: .*`dim`, got 1.5",
        X,
    ),
    row(
        "log_softmax: dim is a list",
        lambda t, x: t.F.log_softmax(x, [1]),
        TypeError,
        r"log_softmax: .*`dim`, got \[1\]",
        X,
    ),
    row(
        "softmax: integers",
        lambda t, x: t.F.softmax(x, 0),
        NotImplementedError,
        "softmax: .*`input`, got torch.int64; pass `dtype`",
        T,
    ),
    row(
        "softmax: to integers",
        lambda t, x: t.F.softmax(x, 0, dtype=torch.int64),
        NotImplementedError,
        "softmax: .*got torch.int64",
        X,
    ),
    row(
        "softmax: no dim",
        lambda t, x: t.F.softmax(x),
        UserWarning,
        "softmax: implicit `dim` is deprecated",
        X,
        differs="a warning in both, which is an error in these tests alone",
    ),
    row(
        "mse_loss: reduction",
        lambda t, x: t.F.mse_loss(x, x, reduction="max"),
        ValueError,
        "mse_loss: .*`reduction`.*got 'max'",
        X,
    ),
    row(
        "mse_loss: a target that is broadcast",
        lambda t, x, y: t.F.mse_loss(x, y),
        UserWarning,
        r"mse_loss: `target` of shape \(3,\) is broadcast with `input` of shape \(4, 3\)",
        X,
        X[0],
        differs="a warning in both, which is an error in these tests alone",
    ),
    row(
        "l1_loss: integers",
        lambda t, x: t.F.l1_loss(x, x),
        NotImplementedError,
        "l1_loss: .*`input`, got torch.int64",
        T,
    ),
    row(
        "l1_loss: weight",
        lambda t, x, w: t.F.l1_loss(x, x, weight=w),
        ValueError,
        r"l1_loss: .*`weight`.*\(4, 3\), got \(3,\)",
        X,
        X[0],
    ),
    row(
        "mse_loss: complex",
        lambda t, x: t.F.mse_loss(x, x),
        NotImplementedError,
        "mse_loss: .*`input`, got torch.complex64",
        X.to(torch.complex64),
    ),
    row(
        "mse_loss: two devices",
        lambda t, x, y: t.F.mse_loss(x, y),
        RuntimeError,
        "meta.*cpu",
        X,
        ELSEWHERE,
    ),
    row(
        "binary_cross_entropy: scores",
        lambda t, x, y: t.F.binary_cross_entropy(x, y),
        RuntimeError,
        "binary_cross_entropy: .*`input` between 0 and 1, got 7",
        torch.tensor([0.5, 7.0]),
        torch.ones(2),
    ),
    row(
        "binary_cross_entropy: targets of -1 and 1",
        lambda t, x, y: t.F.binary_cross_entropy(x, y),
        RuntimeError,
        "binary_cross_entropy: .*`target` between 0 and 1, got -1",
        torch.tensor([0.5, 0.5]),
        torch.tensor([1.0, -1.0]),
    ),
    row(
        "binary_cross_entropy: a target of NaN",
        lambda t, x, y: t.F.binary_cross_entropy(x, y),
        RuntimeError,
        "binary_cross_entropy: .*`target` between 0 and 1",
        X,
        X * NAN,
    ),
    row(
        "binary_cross_entropy: target's shape",
        lambda t, x, y: t.F.binary_cross_entropy(x, y),
        ValueError,
        r"binary_cross_entropy: .*`target`.*\(4, 3\), got \(4,\)",
        X,
        X[:, 0],
    ),
    row(
        "binary_cross_entropy: target's type",
        lambda t, x, y: t.F.binary_cross_entropy(x, y),
        RuntimeError,
        "binary_cross_entropy: .*torch.float32 and torch.int64",
        X,
        (X > 0.5).long(),
    ),
    row(
        "binary_cross_entropy: weight's shape",
        lambda t, x, w: t.F.binary_cross_entropy(x, x, w),
        RuntimeError,
        r"binary_cross_entropy: .*`weight`.*\(7,\)",
        X,
        torch.ones(7),
    ),
    row(
        "binary_cross_entropy: a weight to be learnt",
        lambda t, x, w: t.F.binary_cross_entropy(x, x, w),
        RuntimeError,
        "binary_cross_entropy: no gradient for `weight`; detach it",
        X,
        lambda t: nn.Parameter(X[0].clone()),
    ),
    row(
        "BCEWithLogitsLoss: target's shape",
        lambda t, x, y: t.nn.BCEWithLogitsLoss()(x, y),
        ValueError,
        r"with_logits: .*`target`.*\(4, 3\), got \(4,\)",
        X,
        X[:, 0],
    ),
    row(
        "binary_cross_entropy_with_logits: classes",
        lambda t, x, y: t.F.binary_cross_entropy_with_logits(x, y),
        RuntimeError,
        "with_logits: .*`target`, got torch.float32 and torch.int64",
        X,
        (X > 0.5).long(),
    ),
    row(
        "binary_cross_entropy_with_logits: pos_weight's shape",
        lambda t, x, w: t.F.binary_cross_entropy_with_logits(x, x, pos_weight=w),
        RuntimeError,
        r"with_logits: .*`pos_weight`.*\(7,\)",
        X,
        torch.ones(7),
    ),
    row(
        "cross_entropy: a class too many",
        lambda t, x, y: t.F.cross_entropy(x, y),
        IndexError,
        r"cross_entropy: .*`target` in \[0, 2\] or -100, got 3",
        X,
        T + 1,
    ),
    row(
        "cross_entropy: a class below 0",
        lambda t, x, y: t.nn.CrossEntropyLoss()(x, y),
        IndexError,
        r"cross_entropy: .*`target` in \[0, 2\] or -100, got -1",
        X,
        T - 1,
    ),
    row(
        "cross_entropy: no classes",
        lambda t, x, y: t.F.cross_entropy(x, y),
        IndexError,
        r"cross_entropy: .*`target`.*got 0",
        torch.rand(4, 0),
        T,
    ),
    row(
        "cross_entropy: one number for the scores",
        lambda t, x, y: t.F.cross_entropy(x, y),
        ValueError,
        "cross_entropy: .*`input` with a class dimension, got a 0-dim",
        torch.tensor(1.0),
        T,
        differs="torch says IndexError, of a dimension that nobody named",
    ),
    row(
        "cross_entropy: batches of two sizes",
        lambda t, x, y: t.F.cross_entropy(x, y),
        ValueError,
        r"cross_entropy: .*`target` of shape \(4,\).*got \(2,\)",
        X,
        T[:2],
    ),
    row(
        "cross_entropy: targets of NaN",
        lambda t, x, y: t.F.cross_entropy(x, y),
        RuntimeError,
        "cross_entropy: .*`target` of type .*, got torch.float32",
        X,
        T * NAN,
    ),
    row(
        "cross_entropy: targets of bool",
        lambda t, x, y: t.F.cross_entropy(x, y),
        RuntimeError,
        "cross_entropy: .*`target` of type .*, got torch.bool",
        X,
        T > 0,
    ),
    row(
        "cross_entropy: one-hot integers",
        lambda t, x, y: t.F.cross_entropy(x, y),
        RuntimeError,
        "cross_entropy: .*probabilities in a `target`.*got torch.int64",
        X,
        torch.eye(3)[T].long(),
    ),
    row(
        "cross_entropy: scores of integers",
        lambda t, x, y: t.F.cross_entropy(x, y),
        NotImplementedError,
        "cross_entropy: .*`input`, got torch.int64",
        X.long(),
        T,
    ),
    row(
        "cross_entropy: smoothing is a word",
        lambda t, x, y: t.F.cross_entropy(x, y, label_smoothing="0.1"),
        TypeError,
        "cross_entropy: .*`label_smoothing`, got '0.1'",
        X,
        T,
    ),
    row(
        "cross_entropy: smoothing that requires a gradient",
        lambda t, x, y, p: t.F.cross_entropy(x, y, label_smoothing=p),
        TypeError,
        "cross_entropy.*label_smoothing.*Parameter",
        X,
        T,
        NUMBER,
    ),
    row(
        "cross_entropy: smoothing above 1",
        lambda t, x, y: t.F.cross_entropy(x, y, label_smoothing=2.0),
        RuntimeError,
        r"cross_entropy: .*`label_smoothing` in \[0, 1\], got 2.0",
        X,
        T,
    ),
    row(
        "cross_entropy: smoothing of NaN",
        lambda t, x, y: t.F.cross_entropy(x, y, label_smoothing=NAN),
        RuntimeError,
        r"cross_entropy: .*`label_smoothing` in \[0, 1\], got nan",
        X,
        T,
        differs=SILENT,
    ),
    row(
        "cross_entropy: weight's shape",
        lambda t, x, y, w: t.nn.CrossEntropyLoss(w)(x, y),
        RuntimeError,
        r"cross_entropy: .*`weight` of shape \(3,\), got \(4,\)",
        X,
        T,
        torch.ones(4),
    ),
    row(
        "cross_entropy: weight's type",
        lambda t, x, y, w: t.F.cross_entropy(x, y, w),
        RuntimeError,
        "cross_entropy: .*`weight` of type torch.float32, got torch.float64",
        X,
        T,
        torch.ones(3).double(),
    ),
    row(
        "cross_entropy: ignore_index with probabilities",
        lambda t, x: t.F.cross_entropy(x, x, ignore_index=1),
        RuntimeError,
        "cross_entropy: `ignore_index`.*got 1",
        X,
    ),
    row(
        "cross_entropy: ignore_index is 1.5",
        lambda t, x, y: t.F.cross_entropy(x, y, ignore_index=1.5),
        TypeError,
        "cross_entropy.*ignore_index.*(1.5|float)",
        X,
        T,
    ),
    row(
        "cross_entropy: a list of targets",
        lambda t, x: t.F.cross_entropy(x, [0, 2, 1, 0]),
        TypeError,
        "cross_entropy: .*`target`, got list",
        X,
    ),
    row(
        "cross_entropy: a list of weights",
        lambda t, x, y: t.F.cross_entropy(x, y, [1.0, 2.0, 1.0]),
        TypeError,
        "cross_entropy: .*`weight`, got list",
        X,
        T,
    ),
    row(
        "cross_entropy: two devices",
        lambda t, x, y: t.F.cross_entropy(x, y),
        RuntimeError,
        "cpu.*meta",
        X,
        torch.empty(4, dtype=torch.int64, device="meta"),
    ),
    row(
        "cross_entropy: gradient_in_forward of each row",
        lambda t, x, y: t.F.cross_entropy(x, y, reduction="none", gradient_in_forward=True),
        ValueError,
        'cross_entropy: `gradient_in_forward`.*got reduction "none"',
        X,
        T,
        differs=NONE,
    ),
    row(
        "CrossEntropyLoss: a state of four classes",
        lambda t, loss, state: loss.load_state_dict(state),
        RuntimeError,
        r"size mismatch for weight: .*\[4\].*\[3\]",
        lambda t: t.nn.CrossEntropyLoss(torch.ones(3)),
        {"weight": torch.zeros(4)},
    ),
    row(
        "nll_loss: a class too many",
        lambda t, x, y: t.F.nll_loss(x, y),
        IndexError,
        r"nll_loss: .*`target` in \[0, 2\] or -100, got 3",
        X,
        T + 1,
    ),
    row(
        "nll_loss: probabilities",
        lambda t, x: t.F.nll_loss(x, x),
        RuntimeError,
        r"nll_loss: .*`target` of shape \(4,\).*got \(4, 3\)",
        X,
    ),
    row(
        "NLLLoss: weight's shape",
        lambda t, x, y, w: t.nn.NLLLoss(w)(x, y),
        RuntimeError,
        r"nll_loss: .*`weight` of shape \(3,\), got \(2,\)",
        X,
        T,
        torch.ones(2),
    ),
    row(
        "linear_cross_entropy: input of three dimensions",
        lambda t, x, w, y: t.F.linear_cross_entropy(x, w, y),
        RuntimeError,
        r"linear_cross_entropy: .*`input`, got shape \(2, 2, 3\)",
        torch.rand(2, 2, 3),
        W,
        T,
    ),
    row(
        "linear_cross_entropy: a weight of one dimension",
        lambda t, x, w, y: t.F.linear_cross_entropy(x, w, y),
        RuntimeError,
        r"linear_cross_entropy: .*`linear_weight` of two dimensions.*\(3,\)",
        X,
        W[0],
        T,
    ),
    row(
        "linear_cross_entropy: features",
        lambda t, x, w, y: t.F.linear_cross_entropy(x, w, y),
        RuntimeError,
        r"linear: .*`input`.*`weight` of shape \(5, 4\), got \(4, 3\)",
        X,
        torch.rand(5, 4),
        T,
    ),
    row(
        "linear_cross_entropy: bias",
        lambda t, x, w, y, b: t.F.linear_cross_entropy(x, w, y, linear_bias=b),
        RuntimeError,
        r"`linear_bias` of shape \(5,\), got \(4,\)",
        X,
        W,
        T,
        torch.ones(4),
    ),
    row(
        "linear_cross_entropy: a class too many",
        lambda t, x, w, y: t.F.linear_cross_entropy(x, w, y),
        IndexError,
        r"cross_entropy: .*`target` in \[0, 4\] or -100, got 9",
        X,
        W,
        torch.tensor([0, 9, 1, 0]),
    ),
    row(
        "linear_cross_entropy: smoothing below 0",
        lambda t, x, w, y: t.F.linear_cross_entropy(x, w, y, label_smoothing=-0.1),
        RuntimeError,
        "`label_smoothing`.*got -0.1",
        X,
        W,
        T,
        differs=SILENT,
    ),
    row(
        "linear_cross_entropy: no rows at a time",
        lambda t, x, w, y: t.F.linear_cross_entropy(
            x, w, y, options=SimpleNamespace(batch_chunk_size=0)
        ),
        ValueError,
        "linear_cross_entropy: .*`batch_chunk_size` of 1 or more, got 0",
        X,
        W,
        T,
        differs="torch takes options of its own class alone",
    ),
    row(
        "LinearCrossEntropyLoss: weight's shape",
        lambda t, w: t.nn.LinearCrossEntropyLoss(3, 5, weight=w),
        RuntimeError,
        r"weight.*\(5,\), got \(4,\)",
        torch.ones(4),
    ),
]


def norm_of_two(t: Any) -> nn.Module:
    return t.nn.BatchNorm1d(2)


LAYERS = [
    row(
        "Linear: another number of features",
        lambda t, layer, x: layer(x),
        RuntimeError,
        r"linear: .*`input` of shape \(..., 2\).*got \(4, 3\)",
        lambda t: t.nn.Linear(2, 5),
        X,
    ),
    row(
        "linear: one number",
        lambda t, x, w: t.F.linear(x, w),
        RuntimeError,
        r"linear: .*`input` of shape \(..., 3\).*got \(\)",
        torch.tensor(1.0),
        W,
    ),
    row(
        "linear: no weight",
        lambda t, x: t.F.linear(x, None),
        TypeError,
        "linear: .*`weight`, got NoneType",
        X,
    ),
    row(
        "linear: a weight of three dimensions",
        lambda t, x, w: t.F.linear(x, w),
        RuntimeError,
        r"linear: .*`weight`.*\(2, 5, 3\)",
        X,
        torch.rand(2, 5, 3),
    ),
    row(
        "linear: one neuron with a bias",
        lambda t, x, w, b: t.F.linear(x, w, b),
        RuntimeError,
        r"linear: .*`weight` \(1D without bias\), got shape \(3,\)",
        X,
        W[0],
        torch.ones(1),
    ),
    row(
        "linear: types",
        lambda t, x, w: t.F.linear(x, w),
        RuntimeError,
        "float != double",
        X,
        W.double(),
    ),
    row(
        "linear: integers",
        lambda t, x, w: t.F.linear(x, w),
        RuntimeError,
        "long int != float",
        X.long(),
        W,
    ),
    row(
        "linear: bias",
        lambda t, x, w, b: t.F.linear(x, w, b),
        RuntimeError,
        r"linear: .*`bias` of shape \(5,\).*\(4,\)",
        X,
        W,
        torch.ones(4),
    ),
    row(
        "linear: a bias for each sample",
        lambda t, x, w, b: t.F.linear(x, w, b),
        RuntimeError,
        r"linear: .*`bias` of shape \(5,\).*\(4, 5\)",
        X,
        W,
        torch.ones(4, 5),
        differs="torch takes it, and does not say so in its documentation",
    ),
    row(
        "linear: a weight on another device",
        lambda t, x, w: t.F.linear(x, w),
        RuntimeError,
        "cpu.*meta|meta.*cpu",
        X,
        ELSEWHERE,
        differs="torch, too, returns what happens to be in memory",
    ),
    row(
        "Linear: a state of four features",
        lambda t, layer, state: layer.load_state_dict(state),
        RuntimeError,
        r"size mismatch for weight: .*\[2, 4\].*\[2, 3\]",
        lambda t: t.nn.Linear(3, 2, bias=False),
        {"weight": torch.zeros(2, 4)},
    ),
    row(
        "Linear: a state of something else",
        lambda t, layer, state: layer.load_state_dict(state),
        RuntimeError,
        r'Missing key\(s\) in state_dict: "weight", "bias".*Unexpected.*"kernel"',
        lambda t: t.nn.Linear(3, 2),
        {"kernel": torch.zeros(2, 3)},
    ),
    row(
        "dropout: p",
        lambda t, x: t.F.dropout(x, 1.5),
        ValueError,
        r"dropout: .*`p` in \[0, 1\], got 1.5",
        X,
    ),
    row(
        "dropout: p of NaN",
        lambda t, x: t.F.dropout(x, NAN),
        ValueError,
        "dropout: .*`p`.*got nan",
        X,
    ),
    row(
        "dropout: p is a word",
        lambda t, x: t.F.dropout(x, "0.5"),
        TypeError,
        "dropout: .*`p`, got '0.5'",
        X,
    ),
    row(
        "dropout: p that requires a gradient",
        lambda t, x, p: t.F.dropout(x, p),
        TypeError,
        "dropout.*p.*Parameter",
        X,
        NUMBER,
    ),
    row("Dropout: p", lambda t: t.nn.Dropout(-0.1), ValueError, r"Dropout: .*`p` in .*got -0.1"),
    row("Dropout: no p", lambda t: t.nn.Dropout(None), TypeError, "Dropout: .*`p`, got None"),
    row(
        "Dropout: p of NaN", lambda t, x: t.nn.Dropout(NAN)(x), ValueError, "Dropout: .*`p`.*nan", X
    ),
    row(
        "dropout: integers",
        lambda t, x: t.F.dropout(x),
        RuntimeError,
        "dropout: .*`input`, got torch.int64",
        T,
    ),
    row(
        "dropout: a leaf in place",
        lambda t, x: t.F.dropout(x, inplace=True),
        RuntimeError,
        "a leaf Variable that requires grad is being used in an in-place operation",
        LEAF,
    ),
    row(
        "Dropout: scale_at",
        lambda t: t.nn.Dropout(scale_at="both"),
        ValueError,
        "dropout: .*`scale_at`.*got 'both'",
        differs=NONE,
    ),
    row(
        "batch_norm: a batch of one",
        lambda t, x: t.F.batch_norm(x, None, None, training=True),
        ValueError,
        r"batch_norm: .*more than 1 value per channel.*`input` of shape \(1, 3\)",
        X[:1],
    ),
    row(
        "BatchNorm1d: a batch of one",
        lambda t, norm, x: norm(x),
        ValueError,
        r"batch_norm: .*more than 1 value per channel.*`input` of shape \(1, 2\)",
        norm_of_two,
        X[:1, :2],
    ),
    row(
        "BatchNorm1d: another number of channels",
        lambda t, norm, x: norm(x),
        RuntimeError,
        r"batch_norm: .*`running_mean` of shape \(3,\), got \(2,\)",
        lambda t: norm_of_two(t).eval(),
        X,
    ),
    row(
        "BatchNorm2d: a table",
        lambda t, norm, x: norm(x),
        ValueError,
        r"BatchNorm2d: .*4D `input`, got shape \(4, 3\)",
        lambda t: t.nn.BatchNorm2d(3),
        X,
    ),
    row(
        "BatchNorm1d: images",
        lambda t, norm, x: norm(x),
        ValueError,
        r"BatchNorm1d: .*2D or 3D `input`, got shape \(1, 2, 3, 4\)",
        norm_of_two,
        torch.rand(1, 2, 3, 4),
    ),
    row(
        "batch_norm: integers",
        lambda t, x: t.F.batch_norm(x, None, None, training=True),
        NotImplementedError,
        "batch_norm: .*`input`, got torch.int64",
        X.long(),
    ),
    row(
        "batch_norm: one dimension",
        lambda t, x: t.F.batch_norm(x, x, x),
        ValueError,
        r"batch_norm: .*`input` of shape \(N, C, ...\), got \(3,\)",
        X[0],
    ),
    row(
        "batch_norm: one statistic without the other",
        lambda t, x, mean: t.F.batch_norm(x, mean, None, training=True),
        ValueError,
        "batch_norm: .*both `running_mean` and `running_var`",
        X,
        X[0],
    ),
    row(
        "batch_norm: no statistics",
        lambda t, x: t.F.batch_norm(x, None, None),
        RuntimeError,
        "batch_norm: .*`running_mean` at inference, got None",
        X,
    ),
    row(
        "batch_norm: weight",
        lambda t, x, w: t.F.batch_norm(x, None, None, w, training=True),
        RuntimeError,
        r"batch_norm: .*`weight` of shape \(3,\), got \(5,\)",
        X,
        W[:, 0],
    ),
    row(
        "batch_norm: eps of 0",
        lambda t, x: t.F.batch_norm(x, None, None, training=True, eps=0.0),
        ValueError,
        "batch_norm: .*`eps`, got 0.0",
        X,
    ),
    row(
        "batch_norm: eps is a word",
        lambda t, x: t.F.batch_norm(x, None, None, training=True, eps="1e-5"),
        TypeError,
        "batch_norm: .*`eps`, got '1e-5'",
        X,
    ),
    row(
        "batch_norm: eps that requires a gradient",
        lambda t, x, p: t.F.batch_norm(x, None, None, training=True, eps=p),
        TypeError,
        "batch_norm.*eps.*Parameter",
        X,
        NUMBER,
    ),
    row(
        "batch_norm: momentum that requires a gradient",
        lambda t, x, p: t.F.batch_norm(x, None, None, training=True, momentum=p),
        TypeError,
        "batch_norm.*momentum.*Parameter",
        X,
        NUMBER,
    ),
    row(
        "batch_norm: statistics that are integers",
        lambda t, x, mean, var: t.F.batch_norm(x, mean, var, training=True),
        RuntimeError,
        "batch_norm: .*floating point `running_mean`, got torch.int64",
        X,
        torch.zeros(3, dtype=torch.int64),
        torch.ones(3, dtype=torch.int64),
    ),
    row(
        "batch_norm: eps of NaN",
        lambda t, x: t.F.batch_norm(x, None, None, training=True, eps=NAN),
        ValueError,
        "batch_norm: .*`eps`, got nan",
        X,
        differs=SILENT,
    ),
    row(
        "batch_norm: momentum above 1",
        lambda t, x, mean, var: t.F.batch_norm(x, mean, var, training=True, momentum=2.0),
        ValueError,
        "batch_norm: .*`momentum` of 1 at most, got 2.0",
        X,
        lambda t: torch.zeros(3),
        lambda t: torch.ones(3),
        differs=SILENT,
    ),
    row(
        "batch_norm: momentum of NaN",
        lambda t, x, mean, var: t.F.batch_norm(x, mean, var, training=True, momentum=NAN),
        ValueError,
        "batch_norm: .*`momentum` of 1 at most, got nan",
        X,
        lambda t: torch.zeros(3),
        lambda t: torch.ones(3),
        differs=SILENT,
    ),
    row(
        "batch_norm: no momentum",
        lambda t, x, mean, var: t.F.batch_norm(x, mean, var, training=True, momentum=None),
        TypeError,
        "batch_norm: .*`momentum`, got None",
        X,
        lambda t: torch.zeros(3),
        lambda t: torch.ones(3),
    ),
    row(
        "batch_norm: weight in a column",
        lambda t, x, w: t.F.batch_norm(x, None, None, w, training=True),
        RuntimeError,
        r"batch_norm: .*`weight` of shape \(3,\), got \(3, 1\)",
        X,
        torch.ones(3, 1),
        differs="torch counts its numbers alone",
    ),
    row(
        "BatchNorm2d: a batch of one, in the cumulative average",
        lambda t, norm, x: norm(x),
        ValueError,
        r"batch_norm: .*more than 1 value per channel.*\(1, 2, 1, 1\)",
        lambda t: t.nn.BatchNorm2d(2, momentum=None),
        torch.ones(1, 2, 1, 1),
    ),
    row(
        "BatchNorm1d: a state of three channels",
        lambda t, norm, state: norm.load_state_dict(state),
        RuntimeError,
        r"size mismatch for running_mean: .*\[3\].*\[2\]",
        norm_of_two,
        {"running_mean": torch.zeros(3)},
    ),
    row(
        "SyncBatchNorm: one dimension",
        lambda t, norm, x: norm(x),
        ValueError,
        r"SyncBatchNorm: .*`input` of shape \(N, C, ...\), got \(3,\)",
        lambda t: t.nn.SyncBatchNorm(3),
        X[0],
    ),
    row(
        "BatchNormAct1d: activation",
        lambda t: t.nn.BatchNormAct1d(3, activation="swish"),
        ValueError,
        "BatchNormAct1d: .*`activation`.*got 'swish'",
        differs=NONE,
    ),
    row(
        "BatchNormAct1d: an argument for ReLU",
        lambda t: t.nn.BatchNormAct1d(3, activation="relu", param=0.1),
        ValueError,
        "BatchNormAct1d: relu has no `param`, got 0.1",
        differs=NONE,
    ),
    row(
        "BatchNormAct1d: residual",
        lambda t, norm, x, r: norm(x, r),
        ValueError,
        r"batch_norm_act: .*`residual` of shape \(4, 3\).*got \(4, 2\)",
        lambda t: t.nn.BatchNormAct1d(3).eval(),
        X,
        X[:, :2],
        differs=NONE,
    ),
    row(
        "batch_norm_act: residual's type",
        lambda t, x, r: t.F.batch_norm_act(x, None, None, training=True, residual=r),
        ValueError,
        "batch_norm_act: .*type torch.float32, got .*torch.float64",
        X,
        X.double(),
        differs=NONE,
    ),
    row(
        "LinearActDropout: p",
        lambda t: t.nn.LinearActDropout(3, 2, p=2),
        ValueError,
        r"LinearActDropout: .*`p` in \[0, 1\], got 2",
        differs=NONE,
    ),
    row(
        "bias_act_dropout: bias",
        lambda t, x, b: t.F.bias_act_dropout(x, b),
        RuntimeError,
        r"bias_act_dropout: .*`bias` of shape \(3,\).*got \(4,\)",
        X,
        torch.ones(4),
        differs=NONE,
    ),
    row(
        "bias_act_dropout: integers",
        lambda t, x: t.F.bias_act_dropout(x),
        NotImplementedError,
        "bias_act_dropout: .*`input`, got torch.int64",
        X.long(),
        differs=NONE,
    ),
    row(
        "init: fans of a vector",
        lambda t, x: t.nn.init.xavier_uniform_(x),
        ValueError,
        r"xavier_uniform_: .*`tensor`.*2 dimensions, got shape \(3,\)",
        X[0],
    ),
    row(
        "init: mode",
        lambda t, x: t.nn.init.kaiming_normal_(x, mode="fan"),
        ValueError,
        "kaiming_normal_: .*`mode`.*got 'fan'",
        X,
    ),
    row(
        "init: nonlinearity",
        lambda t, x: t.nn.init.kaiming_uniform_(x, nonlinearity="swish"),
        ValueError,
        "`nonlinearity` 'swish'",
        X,
    ),
    row(
        "init: a slope that is no number",
        lambda t: t.nn.init.calculate_gain("leaky_relu", True),
        ValueError,
        "calculate_gain: .*`param`, got True",
    ),
    row("init: std", lambda t, x: t.nn.init.normal_(x, std=-1.0), RuntimeError, "std >= 0.*-1", X),
    row(
        "init: std of NaN", lambda t, x: t.nn.init.normal_(x, std=NAN), RuntimeError, "std.*nan", X
    ),
    row(
        "init: a range that is none",
        lambda t, x: t.nn.init.uniform_(x, 2.0, 1.0),
        RuntimeError,
        "uniform_ .*from=2 > to=1",
        X,
    ),
    row("init: integers", lambda t, x: t.nn.init.normal_(x), NotImplementedError, "'Long'", T),
    row(
        "initialize: method",
        lambda t, model: t.nn.init.initialize(model, "he"),
        ValueError,
        "initialize: .*`method`.*got 'he'",
        lambda t: nn.Linear(2, 2),
        differs=NONE,
    ),
    row(
        "initialize: no module",
        lambda t: t.nn.init.initialize(3),
        TypeError,
        "initialize: .*`model`.*int",
        differs=NONE,
    ),
    row(
        "initialize: the old weight_norm, second",
        lambda t, model: t.nn.init.initialize(model),
        ValueError,
        "initialize: 1 has torch.nn.utils.weight_norm",
        lambda t: nn.Sequential(nn.Linear(2, 2), old_weight_norm(nn.Linear(2, 2))),
        differs=NONE,
    ),
    row(
        "initialize: a lazy layer, second",
        lambda t, model: t.nn.init.initialize(model),
        ValueError,
        "initialize: 1 is lazy",
        lambda t: nn.Sequential(nn.Linear(2, 2), lazy()),
        differs=NONE,
    ),
    row(
        "initialize: a parametrization without a way back, second",
        lambda t, model: t.nn.init.initialize(model),
        ValueError,
        "initialize: 1 has a Tanh, .*`right_inverse`",
        lambda t: nn.Sequential(nn.Linear(2, 2), parametrized(nn.Linear(2, 2))),
        differs=NONE,
    ),
    row(
        "weight_penalty: l1 is a word",
        lambda t, model: t.nn.weight_penalty(model, l1="1e-4"),
        TypeError,
        "weight_penalty: .*`l1`, got '1e-4'",
        nn.Linear(3, 2),
        differs=NONE,
    ),
    row(
        "weight_penalty: l1",
        lambda t, model: t.nn.weight_penalty(model, l1=-1.0),
        ValueError,
        "weight_penalty: .*`l1` finite and >= 0, got -1.0",
        lambda t: nn.Linear(2, 2),
        differs=NONE,
    ),
    row(
        "weight_penalty: parameters",
        lambda t, model: t.nn.weight_penalty(model.parameters(), l1=1.0),
        TypeError,
        "weight_penalty: .*`module`, got generator",
        lambda t: nn.Linear(2, 2),
        differs=NONE,
    ),
    row(
        "weight_penalty: l2 of NaN",
        lambda t, model: t.nn.weight_penalty(model, l2=NAN),
        ValueError,
        "weight_penalty: .*`l2` finite and >= 0, got nan",
        lambda t: nn.Linear(2, 2),
        differs=NONE,
    ),
]


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


def lazy() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.LazyLinear(2)


def parametrized(layer: nn.Module) -> nn.Module:
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Tanh())
    return layer


def stepped(t: Any, name: str = "Adam", sizes: tuple[int, ...] = (3,), **options: Any) -> Any:
    """An optimizer with a step behind it."""
    optimizer = getattr(t.optim, name)([leaf(size) for size in sizes], lr=0.1, **options)
    optimizer.step()
    return optimizer


def sparse(t: Any) -> nn.Parameter:
    parameter = leaf()
    parameter.grad = torch.ones(3).to_sparse()
    return parameter


def of_nan(t: Any) -> nn.Parameter:
    parameter = leaf()
    parameter.grad = torch.full((3,), NAN)
    return parameter


def capturable(t: Any) -> Any:
    optimizer = stepped(t)
    optimizer.param_groups[0]["capturable"] = True
    return optimizer


def with_option(state: dict[str, Any], **option: Any) -> dict[str, Any]:
    return {**state, "param_groups": [group | option for group in state["param_groups"]]}


def with_state(state: dict[str, Any], **part: Any) -> dict[str, Any]:
    return {**state, "state": {key: of_one | part for key, of_one in state["state"].items()}}


def average(t: Any) -> ExponentialMovingAverage:
    ema = ExponentialMovingAverage([torch.ones(3)], 0.5)
    ema.update()
    return ema


def state_of_average(without: str | None = None, **other: Any) -> dict[str, Any]:
    state = {"decay": 0.9, "num_updates": 1, "averages": [torch.zeros(3)], **other}
    return {name: value for name, value in state.items() if name != without}


OPTIMIZERS = [
    row("SGD: lr", lambda t, p: t.optim.SGD([p], lr=-1.0), ValueError, "learning rate: -1.0", LEAF),
    *(
        row(
            f"{name}: lr is a word",
            lambda t, p, name=name: getattr(t.optim, name)([p], lr="0.1"),
            TypeError,
            f"{name}: .*`lr`, got '0.1'",
            LEAF,
        )
        for name in ("SGD", "RMSprop", "Adam", "AdamW")
    ),
    row(
        "Adam: no weight_decay",
        lambda t, p: t.optim.Adam([p], weight_decay=None),
        TypeError,
        "Adam: .*`weight_decay`, got None",
        LEAF,
    ),
    row(
        "Adam: one beta",
        lambda t, p: t.optim.Adam([p], betas=(0.9,)),
        ValueError,
        r"Adam: .*`betas`, got \(0.9,\)",
        LEAF,
        differs="torch's is an IndexError of a tuple",
    ),
    row(
        "Adam: a beta that is a word",
        lambda t, p: t.optim.Adam([p], betas=("0.9", 0.999)),
        TypeError,
        "Adam: .*`betas`, got '0.9'",
        LEAF,
    ),
    row(
        "SGD: lr of NaN",
        lambda t, p: t.optim.SGD([p], lr=NAN),
        ValueError,
        "lr|learning rate.*nan",
        LEAF,
        differs=SILENT,
    ),
    row(
        "SGD: momentum",
        lambda t, p: t.optim.SGD([p], momentum=-1.0),
        ValueError,
        "momentum.*-1.0",
        LEAF,
    ),
    row(
        "SGD: momentum of NaN",
        lambda t, p: t.optim.SGD([p], momentum=NAN),
        ValueError,
        "momentum.*nan",
        LEAF,
        differs=SILENT,
    ),
    row(
        "SGD: weight_decay",
        lambda t, p: t.optim.SGD([p], weight_decay=-1.0),
        ValueError,
        "weight_decay.*-1",
        LEAF,
    ),
    row(
        "SGD: nesterov alone",
        lambda t, p: t.optim.SGD([p], nesterov=True),
        ValueError,
        "Nesterov momentum",
        LEAF,
    ),
    row(
        "SGD: nesterov alone in a group",
        lambda t, p: t.optim.SGD([{"params": [p], "nesterov": True}]),
        ValueError,
        "Nesterov momentum",
        LEAF,
        differs=SILENT,
    ),
    row(
        "SGD: dampening of NaN",
        lambda t, p: t.optim.SGD([p], momentum=0.9, dampening=NAN),
        ValueError,
        "SGD: .*`dampening`.*got nan",
        LEAF,
        differs=SILENT,
    ),
    row(
        "Adam: lr", lambda t, p: t.optim.Adam([p], lr=-1.0), ValueError, "learning rate: -1.0", LEAF
    ),
    row(
        "AdamW: lr of NaN",
        lambda t, p: t.optim.AdamW([p], lr=NAN),
        ValueError,
        "learning rate: nan",
        LEAF,
    ),
    row(
        "Adam: lr of two",
        lambda t, p, lr: t.optim.Adam([p], lr=lr),
        ValueError,
        "lr must be 1-element",
        LEAF,
        torch.ones(2),
    ),
    row(
        "Adam: beta 1",
        lambda t, p: t.optim.Adam([p], betas=(1.0, 0.9)),
        ValueError,
        "index 0: 1.0",
        LEAF,
    ),
    row(
        "Adam: beta 2",
        lambda t, p: t.optim.Adam([p], betas=(0.9, NAN)),
        ValueError,
        "index 1: nan",
        LEAF,
    ),
    row(
        "Adam: three betas",
        lambda t, p: t.optim.Adam([p], betas=(0.9, 0.99, 0.999)),
        ValueError,
        r"Adam: .*two.*`betas`, got \(0.9, 0.99, 0.999\)",
        LEAF,
        differs="torch takes it, and fails in the first step",
    ),
    row(
        "Adam: eps",
        lambda t, p: t.optim.Adam([p], eps=-1.0),
        ValueError,
        "epsilon value: -1.0",
        LEAF,
    ),
    row(
        "AdamW: weight_decay",
        lambda t, p: t.optim.AdamW([p], weight_decay=NAN),
        ValueError,
        "weight_decay.*nan",
        LEAF,
    ),
    row(
        "RMSprop: lr",
        lambda t, p: t.optim.RMSprop([p], lr=NAN),
        ValueError,
        "learning rate: nan",
        LEAF,
    ),
    row(
        "RMSprop: alpha",
        lambda t, p: t.optim.RMSprop([p], alpha=-1.0),
        ValueError,
        "alpha value: -1.0",
        LEAF,
    ),
    row(
        "RMSprop: alpha above 1",
        lambda t, p: t.optim.RMSprop([p], alpha=1.5),
        ValueError,
        r"RMSprop: .*`alpha` in \[0, 1\), got 1.5",
        LEAF,
        differs=SILENT,
    ),
    row(
        "RMSprop: momentum",
        lambda t, p: t.optim.RMSprop([p], momentum=-1.0),
        ValueError,
        "momentum.*-1.0",
        LEAF,
    ),
    row("Adam: nothing", lambda t: t.optim.Adam([]), ValueError, "empty parameter list"),
    row(
        "Adam: one tensor",
        lambda t, p: t.optim.Adam(p),
        TypeError,
        "params argument.*FloatTensor",
        LEAF,
    ),
    row("Adam: words", lambda t: t.optim.Adam(["weight"]), TypeError, "one of the params is str"),
    row(
        "Adam: no leaf",
        lambda t, p: t.optim.Adam([2 * p]),
        ValueError,
        "can't optimize a non-leaf Tensor",
        LEAF,
    ),
    row(
        "Adam: a parameter in two groups",
        lambda t, p: t.optim.Adam([{"params": [p]}, {"params": [p]}]),
        ValueError,
        "some parameters appear in more than one parameter group",
        LEAF,
    ),
    row(
        "Adam: fused and foreach",
        lambda t, p: t.optim.Adam([p], fused=True, foreach=True),
        RuntimeError,
        "`fused` and `foreach` cannot be `True` together",
        LEAF,
    ),
    row(
        "Adam: a group that is a list",
        lambda t, optimizer: optimizer.add_param_group([leaf()]),
        TypeError,
        "param_group.*list",
        stepped,
    ),
    row(
        "Adam: a group with a negative lr",
        lambda t, optimizer: optimizer.add_param_group({"params": [leaf()], "lr": -1.0}),
        ValueError,
        "lr.*-1.0",
        stepped,
        differs=SILENT,
    ),
    row(
        "Adam: a group with an lr of two",
        lambda t, optimizer, lr: optimizer.add_param_group({"params": [leaf()], "lr": lr}),
        ValueError,
        r"Adam: .*`lr`.*got tensor\(\[1., 1.\]\)",
        stepped,
        torch.ones(2),
        differs=SILENT,
    ),
    row(
        "Adam: a group with an lr in words",
        lambda t, optimizer: optimizer.add_param_group({"params": [leaf()], "lr": "1e-3"}),
        TypeError,
        "Adam: .*`lr`, got '1e-3'",
        stepped,
        differs=SILENT,
    ),
    row(
        "Adam: a sparse gradient",
        lambda t, p: t.optim.Adam([p]).step(),
        RuntimeError,
        "Adam.*sparse gradients",
        sparse,
    ),
    row(
        "Adam: capturable on the CPU",
        lambda t, optimizer: optimizer.step(),
        AssertionError,
        "capturable=True, params and state_steps must be on supported devices",
        capturable,
    ),
    row(
        "Adam: max_norm",
        lambda t, p: t.optim.Adam([p], max_norm=NAN),
        ValueError,
        "Adam: .*`max_norm` >= 0, got nan",
        LEAF,
        differs=NONE,
    ),
    row(
        "SGD: ema_decay",
        lambda t, p: t.optim.SGD([p], ema_decay=1.0),
        ValueError,
        r"SGD: .*`ema_decay` in \[0, 1\), got 1.0",
        LEAF,
        differs=NONE,
    ),
    row(
        "SGD: ema_bias_correction alone",
        lambda t, p: t.optim.SGD([p], ema_bias_correction=True),
        ValueError,
        "SGD: `ema_bias_correction` needs `ema_decay`, which is None",
        LEAF,
        differs=NONE,
    ),
    row(
        "RMSprop: state_dtype",
        lambda t, p: t.optim.RMSprop([p], state_dtype=torch.float16),
        ValueError,
        "RMSprop: .*`state_dtype`.*got torch.float16",
        LEAF,
        differs=NONE,
    ),
    row(
        "Adam: a group with a wrong option",
        lambda t, optimizer: optimizer.add_param_group({"params": [leaf()], "max_norm": -1.0}),
        ValueError,
        "Adam: .*`max_norm` >= 0, got -1.0",
        stepped,
        differs="torch has no max_norm and keeps it",
    ),
    row(
        "Adam: a state of two parameters",
        lambda t, optimizer, state: optimizer.load_state_dict(state),
        ValueError,
        "parameter group that doesn't match the size of optimizer's group",
        stepped,
        lambda t: stepped(t, sizes=(3, 3)).state_dict(),
    ),
    row(
        "Adam: a state of something else",
        lambda t, optimizer: optimizer.load_state_dict({"weight": torch.ones(3)}),
        KeyError,
        "param_groups",
        stepped,
    ),
    row(
        "Adam: a state of other shapes",
        lambda t, optimizer, state: optimizer.load_state_dict(state),
        ValueError,
        r"exp_avg.*\(3,\).*\(4,\)",
        stepped,
        lambda t: stepped(t, sizes=(4,)).state_dict(),
        differs="torch takes it, and fails in the next step",
    ),
    row(
        "Adam: the state of SGD",
        lambda t, optimizer, state: optimizer.load_state_dict(state),
        ValueError,
        "Adam.*betas",
        stepped,
        lambda t: stepped(t, "SGD").state_dict(),
        differs="torch takes it, and fails in the next step: KeyError, 'betas'",
    ),
    row(
        "Adam: the state of Adamax",
        lambda t, optimizer, state: optimizer.load_state_dict(state),
        ValueError,
        "Adam.*`exp_avg_sq`.*got .*exp_inf",
        stepped,
        lambda t: stepped(THEIRS, "Adamax").state_dict(),
        differs="torch takes it, and fails in the next step: KeyError, 'exp_avg_sq'",
    ),
    row(
        "Adam: a state with an lr of NaN",
        lambda t, optimizer, state: optimizer.load_state_dict(state),
        ValueError,
        "Adam.load_state_dict: .*`lr`, got nan",
        stepped,
        lambda t: with_option(stepped(t).state_dict(), lr=NAN),
        differs=SILENT,
    ),
    *(
        row(
            f"Adam: a state with {key} of {value}",
            lambda t, optimizer, state: optimizer.load_state_dict(state),
            error,
            f"Adam.load_state_dict: .*`{key}`.*got {re.escape(repr(value))}",
            stepped,
            lambda t, key=key, value=value: with_option(stepped(t).state_dict(), **{key: value}),
            differs=SILENT,
        )
        for key, value, error in (
            ("lr", "x", TypeError),
            ("betas", (2.0, 0.9), ValueError),
            ("betas", (0.9, 0.9, 0.9), ValueError),
            ("eps", -1.0, ValueError),
            ("weight_decay", -5.0, ValueError),
            ("max_norm", -1.0, ValueError),
        )
    ),
    *(
        row(
            f"Adam: a state with {key} of {value}",
            lambda t, optimizer, state: optimizer.load_state_dict(state),
            error,
            f"Adam.load_state_dict: .*`{key}`.*got {said}",
            stepped,
            lambda t, key=key, value=value: with_state(stepped(t).state_dict(), **{key: value}),
            differs="torch takes it, or fails when it has taken a part",
        )
        for key, value, said, error in (
            ("step", "7", "'7'", TypeError),
            ("step", torch.tensor(NAN), "nan", ValueError),
            ("step", torch.tensor(-1.0), "-1.0", ValueError),
            ("exp_avg", [0.0, 0.0, 0.0], "list", TypeError),
            ("exp_avg_sq", None, "NoneType", TypeError),
        )
    ),
    row(
        "clip_grad_norm_: a negative norm",
        lambda t, p: t.clip([p], -1.0),
        ValueError,
        "clip_grad_norm_: .*`max_norm` >= 0, got -1.0",
        LEAF,
        differs=SILENT,
    ),
    row(
        "clip_grad_norm_: a norm of NaN",
        lambda t, p: t.clip([p], NAN),
        ValueError,
        "clip_grad_norm_: .*`max_norm` >= 0, got nan",
        LEAF,
        differs=SILENT,
    ),
    row(
        "clip_grad_norm_: a norm of order NaN",
        lambda t, p: t.clip([p], 1.0, norm_type=NAN),
        ValueError,
        "clip_grad_norm_: .*`norm_type`, got nan",
        LEAF,
        differs=SILENT,
    ),
    row(
        "clip_grad_norm_: a model",
        lambda t, model: t.clip(model, 1.0),
        TypeError,
        "clip_grad_norm_: .*`parameters`.*got Linear",
        lambda t: nn.Linear(2, 2),
    ),
    row(
        "clip_grad_norm_: gradients of NaN",
        lambda t, p: t.clip([p], 1.0, error_if_nonfinite=True),
        RuntimeError,
        "norm of order 2.0 for gradients from `parameters` is non-finite",
        of_nan,
    ),
    row("clip_grad_norm_: a word", lambda t, p: t.clip([p], "one"), ValueError, "'one'", LEAF),
]

AVERAGES = [
    row(
        "average: decay",
        lambda x: ExponentialMovingAverage([x], 1.0),
        ValueError,
        r"ExponentialMovingAverage: .*`decay` in \[0, 1\), got 1.0",
        X,
    ),
    row(
        "average: decay of NaN",
        lambda x: ExponentialMovingAverage([x], NAN),
        ValueError,
        r"ExponentialMovingAverage: .*`decay` in \[0, 1\), got nan",
        X,
    ),
    row(
        "average: one tensor",
        lambda x: ExponentialMovingAverage(x, 0.5),
        TypeError,
        "ExponentialMovingAverage: .*`params`.*got a Tensor",
        X,
    ),
    row(
        "average: nothing",
        lambda: ExponentialMovingAverage([], 0.5),
        ValueError,
        "ExponentialMovingAverage: .*`params`, got none",
    ),
    row(
        "average: integers",
        lambda x: ExponentialMovingAverage([x], 0.5),
        TypeError,
        "ExponentialMovingAverage: .*`params`, got torch.int64",
        T,
    ),
    row(
        "average: before the first value",
        lambda x: ExponentialMovingAverage([x], 0.5).average(),
        RuntimeError,
        "ExponentialMovingAverage.average: .*call `update` first",
        X,
    ),
    row(
        "average: a state of other shapes",
        lambda ema, state: ema.load_state_dict(state),
        ValueError,
        r"load_state_dict: .*`averages`.*\(3,\).*got .*\(4,\)",
        average,
        state_of_average(averages=[torch.zeros(4)]),
    ),
    row(
        "average: a state with a decay out of range",
        lambda ema, state: ema.load_state_dict(state),
        ValueError,
        r"`decay` in \[0, 1\), got 2.0",
        average,
        state_of_average(decay=2.0),
    ),
    row(
        "average: a state of lists",
        lambda ema, state: ema.load_state_dict(state),
        TypeError,
        "load_state_dict: .*`averages`, got list",
        average,
        state_of_average(averages=[[0.0, 0.0, 0.0]]),
    ),
    row(
        "average: a state of complex numbers",
        lambda ema, state: ema.load_state_dict(state),
        NotImplementedError,
        "load_state_dict: .*`averages`, got torch.complex64",
        average,
        state_of_average(averages=[torch.zeros(3, dtype=torch.complex64)]),
    ),
    row(
        "average: a state of something else",
        lambda ema: ema.load_state_dict({"weight": torch.ones(3)}),
        KeyError,
        "averages",
        average,
    ),
    row(
        "average: a state without its count",
        lambda ema, state: ema.load_state_dict(state),
        KeyError,
        "num_updates",
        average,
        state_of_average(without="num_updates"),
    ),
    row(
        "average: a state with a count of 1.5",
        lambda ema, state: ema.load_state_dict(state),
        ValueError,
        "`num_updates`.*got 1.5",
        average,
        state_of_average(num_updates=1.5),
    ),
    row(
        "average: a state with a count below 0",
        lambda ema, state: ema.load_state_dict(state),
        ValueError,
        "`num_updates`.*got -1",
        average,
        state_of_average(num_updates=-1),
    ),
]


def pair() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.ReLU())


def ours(module: nn.Module) -> Callable[[Any], nn.Module]:
    return lambda _: nn.Sequential(module)


def compiled(_: Any) -> nn.Module:
    model = pair()
    model.compile()
    return model


F = torchref.nn.functional
relu, torchs_relu = F.relu, nn.functional.relu

CONVERTING = [
    row("convert: no module", torchref.convert, TypeError, "convert: .*`model`.*'int'", 3),
    row("convert: a class", torchref.convert, TypeError, "convert: .*`model`.*'type'", nn.ReLU),
    row(
        "convert: DataParallel",
        torchref.convert,
        TypeError,
        "convert: DataParallel wraps the model",
        lambda _: nn.DataParallel(pair()),
    ),
    row("convert: compiled", torchref.convert, TypeError, "convert: torch.compile holds", compiled),
    row(
        "convert: exclude a name that is not there",
        lambda model: torchref.convert(model, exclude=["head"]),
        ValueError,
        "convert: .*`exclude`, got 'head'",
        lambda _: pair(),
    ),
    row(
        "convert: exclude a name that is in no list",
        lambda model: torchref.convert(model, exclude="0"),
        TypeError,
        "convert: .*`exclude`, got '0'",
        lambda _: pair(),
    ),
    row(
        "convert: exclude 5",
        lambda model: torchref.convert(model, exclude=5),
        TypeError,
        "convert: .*`exclude`, got 5",
        lambda _: pair(),
    ),
    row(
        "convert: fuse is a word",
        lambda model: torchref.convert(model, fuse="no"),
        TypeError,
        "convert: .*`fuse`, got 'no'",
        lambda _: pair(),
    ),
    row(
        "convert: exclude a pattern of nothing",
        lambda model: torchref.convert(model, exclude=["layer4.*"]),
        ValueError,
        r"convert: .*`exclude`, got 'layer4.\*'",
        lambda _: pair(),
    ),
    row(
        "convert: exclude another model's module",
        lambda model: torchref.convert(model, exclude=[nn.ReLU()]),
        ValueError,
        r"convert: .*`exclude`, got ReLU\(\)",
        lambda _: pair(),
    ),
    row(
        "convert: exclude a number",
        lambda model: torchref.convert(model, exclude=[cast(Any, 3)]),
        ValueError,
        "convert: .*`exclude`, got 3",
        lambda _: pair(),
    ),
    row("revert: no module", torchref.revert, TypeError, "revert: .*`model`.*'list'", [nn.ReLU()]),
    row("revert: compiled", torchref.revert, TypeError, "revert: torch.compile holds", compiled),
    row(
        "revert: dropout scaled at inference",
        torchref.revert,
        ValueError,
        "revert: torch has no scale_at='inference', as '0' has",
        ours(torchref.nn.Dropout(scale_at="inference")),
    ),
    row(
        "revert: a biased running variance",
        torchref.revert,
        ValueError,
        "revert: torch has no unbiased_running_var=False, as '0' has",
        ours(torchref.nn.BatchNorm1d(3, unbiased_running_var=False)),
    ),
    row(
        "revert: gradient_in_forward",
        torchref.revert,
        ValueError,
        "revert: torch has no gradient_in_forward=True, as '0' has",
        ours(torchref.nn.CrossEntropyLoss(gradient_in_forward=True)),
    ),
    row(
        "optim.convert: another optimizer",
        torchref.optim.convert,
        TypeError,
        "optim.convert: .*`optimizer`, got .*LBFGS",
        lambda _: torch.optim.LBFGS([leaf()]),
    ),
    row(
        "optim.convert: a subclass",
        torchref.optim.convert,
        TypeError,
        "optim.convert: .*`optimizer`, got .*Mine",
        lambda _: type("Mine", (torch.optim.Adam,), {})([leaf()]),
    ),
    row(
        "optim.convert: a model",
        torchref.optim.convert,
        TypeError,
        "optim.convert: .*`optimizer`, got .*Sequential",
        lambda _: pair(),
    ),
    row(
        "optim.revert: the course's momentum",
        torchref.optim.revert,
        ValueError,
        "optim.revert: torch has no lr_in_velocity=True",
        lambda t: stepped(OURS, "SGD", momentum=0.9, lr_in_velocity=True),
    ),
    row(
        "optim.revert: max_norm",
        torchref.optim.revert,
        ValueError,
        "optim.revert: torch has no max_norm=1.0",
        lambda t: stepped(OURS, max_norm=1.0),
    ),
    row("set_backend", torchref.set_backend, ValueError, "set_backend: .*got 'cuda'", "cuda"),
    row("set_backend: None", torchref.set_backend, ValueError, "set_backend: .*got None", None),
    row(
        "backend",
        lambda: torchref.backend("fast").__enter__(),
        ValueError,
        "set_backend: expected one of auto, reference, compiled, triton, got 'fast'",
    ),
    row(
        "convert_sync_batchnorm: no module",
        torchref.nn.SyncBatchNorm.convert_sync_batchnorm,
        TypeError,
        "convert_sync_batchnorm: .*`module`.*int",
        3,
    ),
    row(
        "assert_parity: a list of tensors",
        lambda xs: assert_parity(sum, sum, xs),
        TypeError,
        "parity: pass tensors one by one, not inside a list",
        [X],
    ),
    row(
        "assert_parity: a result that is no tensor",
        lambda x: assert_parity(len, len, x),
        TypeError,
        "parity: expected tensors as output, got int",
        X,
    ),
    row(
        "assert_parity: another shape",
        lambda x: assert_parity(lambda x: x[0], torchs_relu, x),
        AssertionError,
        r"output: shape is torch.Size\(\[3\]\), theirs torch.Size\(\[4, 3\]\)",
        X,
    ),
    row(
        "assert_parity: another type",
        lambda x: assert_parity(lambda x: x.double(), torchs_relu, x),
        AssertionError,
        "output: dtype is torch.float64, theirs torch.float32",
        X,
    ),
    row(
        "assert_parity: NaN",
        lambda x: assert_parity(lambda x: x * NAN, torchs_relu, x),
        AssertionError,
        r"output: at \[0, 0\] ours is nan, theirs",
        X,
    ),
    row(
        "assert_parity: other values",
        lambda x: assert_parity(lambda x: 1.01 * x, torchs_relu, x),
        AssertionError,
        r"output: error .* exceeds .* at \[\d, \d\]: ours .*, theirs .*, truth",
        X,
    ),
    row(
        "assert_parity: no gradient",
        lambda x: assert_parity(lambda x: relu(x).detach(), torchs_relu, x),
        AssertionError,
        "gradient of input 0: ours is None",
        LEAF,
    ),
    row(
        "assert_parity: a module of another size",
        assert_parity,
        RuntimeError,
        r"size mismatch for weight: .*\[4, 3\].*\[2, 3\]",
        lambda _: torchref.nn.Linear(3, 2),
        lambda _: nn.Linear(3, 4),
        X,
    ),
    row(
        "assert_parity: an upstream gradient of another shape",
        lambda x, dy: assert_parity(relu, torchs_relu, x, upstream=dy),
        RuntimeError,
        r"grad_output\[0\] has a shape of torch.Size\(\[2\]\)",
        LEAF,
        torch.ones(2),
    ),
]

TABLE = torch.rand(20, 3)
CLASSES = torch.arange(20) % 2
VALUES = torch.rand(20)
IMAGES = torch.rand(2, 1, 4, 4)


def without(module: str, call: Callable[[], Any]) -> Any:
    """``call()`` where a package is missing."""
    with mock.patch.dict(sys.modules, {module: None}):
        return call()


def fitted(_: Any) -> Standard:
    return Standard().fit(TABLE)


def rarely(*counts: int) -> Tensor:
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


DATA = [
    *(
        row(
            f"{cls.__name__}: unfitted",
            lambda scale, x: scale(x),
            RuntimeError,
            f"{cls.__name__}: not fitted; call `fit`",
            cls(),
            TABLE if cls is not ImageNormalize else IMAGES,
        )
        for cls in (Standard, MinMax, Robust, ImageNormalize, Impute)
    ),
    row(
        "Standard: unfitted inverse",
        lambda s, x: s.inverse(x),
        RuntimeError,
        "not fitted",
        Standard(),
        TABLE,
    ),
    row(
        "Standard: fitted twice",
        lambda scale, x: scale.fit(x),
        RuntimeError,
        "Standard: fitted already; fit a new one",
        fitted,
        TABLE,
    ),
    row(
        "Standard: no samples",
        lambda s, x: s.fit(x),
        ValueError,
        "Standard: .*at least one sample",
        Standard(),
        TABLE[:0],
    ),
    row(
        "MinMax: one dimension",
        lambda s, x: s.fit(x),
        ValueError,
        r"MinMax: .*`x`.*got \(20,\)",
        MinMax(),
        VALUES,
    ),
    row(
        "Robust: NaN",
        lambda scale, x: scale.fit(x),
        ValueError,
        "Robust: column 2 of `x` has a NaN or an infinity",
        Robust(),
        TABLE / torch.tensor([1.0, 1.0, 0.0]),
    ),
    row(
        "Standard: texts",
        lambda s, x: s.fit(x),
        ValueError,
        "`data`, got <class 'str'>",
        Standard(),
        ["text"],
    ),
    row(
        "Standard: complex",
        lambda scale, x: scale.fit(x),
        ValueError,
        "Standard: .*complex64",
        Standard(),
        TABLE.to(torch.complex64),
    ),
    row(
        "Standard: another number of features",
        lambda scale, x: scale(x),
        ValueError,
        r"Standard: expected 3 features, got shape \(20, 2\)",
        fitted,
        TABLE[:, :2],
    ),
    row(
        "Standard: a state of two features",
        lambda scale, state: scale.load_state_dict(state),
        RuntimeError,
        r"size mismatch for mean: .*\[2\].*\[3\]",
        fitted,
        {"mean": torch.zeros(2), "std": torch.ones(2)},
    ),
    row(
        "Standard: the state of MinMax",
        lambda scale, state: scale.load_state_dict(state),
        RuntimeError,
        r'Unexpected key\(s\) in state_dict: "min", "range"',
        lambda _: Standard(),
        {"min": torch.zeros(3), "range": torch.ones(3)},
    ),
    row(
        "Standard: half a state",
        lambda scale, state: scale.load_state_dict(state),
        RuntimeError,
        r'Missing key\(s\) in state_dict: "std"',
        lambda _: Standard(),
        {"mean": torch.zeros(3)},
    ),
    row(
        "ImageNormalize: a deviation of 0",
        ImageNormalize,
        ValueError,
        r"ImageNormalize: .*positive `std`.*got \[0.5\] and \[0.0\]",
        [0.5],
        [0.0],
    ),
    row(
        "ImageNormalize: a mean of NaN",
        ImageNormalize,
        ValueError,
        r"ImageNormalize: .*`mean`.*got \[nan\]",
        [NAN],
        [1.0],
    ),
    row(
        "ImageNormalize: a divisor of 0",
        lambda: ImageNormalize([0.5], [0.5], divisor=0.0),
        ValueError,
        "ImageNormalize: .*`divisor`.*got 0.0",
    ),
    row(
        "ImageNormalize: rows of another length",
        lambda scale, x: scale.fit(x),
        ValueError,
        r"ImageNormalize: expected 16 pixels in a row, got shape \(20, 3\)",
        ImageNormalize(shape=(1, 4, 4)),
        TABLE,
    ),
    row(
        "Impute: integers",
        lambda fill, x: fill.fit(x),
        ValueError,
        r"Impute: .*`data`.*got torch.int64 of shape \(20, 1\)",
        Impute(),
        CLASSES[:, None],
    ),
    row(
        "Impute: all NaN",
        lambda f, x: f.fit(x),
        ValueError,
        "Impute: column 0 of `data` has no number",
        Impute(),
        TABLE * NAN,
    ),
    row(
        "Impute: infinities before a scaler",
        lambda fill, x: fill.fit(x),
        ValueError,
        "Standard: column 0 of `x` has a NaN or an infinity",
        lambda _: Impute(Standard()),
        torch.tensor([[INF], [0.0], [1.0]]),
    ),
    row("BagOfWords: features", BagOfWords, ValueError, "`features` of at least 1, got 0", 0),
    row(
        "BagOfWords: one text",
        lambda b: b.fit("a text"),
        TypeError,
        "`texts`.*got one string",
        BagOfWords(),
    ),
    row(
        "random_split: no samples",
        random_split,
        ValueError,
        r"random_split: .*\[0, 0, 0\] from 0 samples",
        0,
    ),
    row(
        "random_split: ratios",
        random_split,
        ValueError,
        r"`ratios` with sum 1.*got \(0.5, 0.6\)",
        10,
        (0.5, 0.6),
    ),
    row(
        "random_split: a ratio of NaN",
        random_split,
        ValueError,
        r"`ratios`.*got \(0.5, nan\)",
        10,
        (0.5, NAN),
    ),
    row(
        "random_split: a ratio below 0",
        random_split,
        ValueError,
        r"`ratios`.*got \(1.5, -0.5\)",
        10,
        (1.5, -0.5),
    ),
    row(
        "random_split: seed",
        lambda: random_split(10, seed=-1),
        ValueError,
        "random_split: .*`seed`.*got -1",
    ),
    row(
        "stratified_split: a class of NaN",
        stratified_split,
        ValueError,
        "stratified_split: .*`y` without NaN, got 20",
        VALUES * NAN,
    ),
    row(
        "stratified_split: a rare class",
        stratified_split,
        ValueError,
        "at least 3 samples.*class 1 has 1",
        rarely(9, 1),
    ),
    row(
        "stratified_split: shape",
        stratified_split,
        ValueError,
        r"stratified_split: .*`y`.*got \(20, 3\)",
        TABLE,
    ),
    row(
        "stratified_split: no samples",
        stratified_split,
        ValueError,
        "stratified_split: .*from 0 samples",
        CLASSES[:0],
    ),
    row(
        "chronological_split: a time of NaN",
        chronological_split,
        ValueError,
        "`count_or_times` without NaN, got 20",
        VALUES * NAN,
    ),
    row(
        "chronological_split: a gap of NaN",
        lambda: chronological_split(10, gap=cast(Any, NAN)),
        ValueError,
        "`gap` >= 0, got nan",
    ),
    row(
        "chronological_split: gap",
        lambda: chronological_split(10, gap=-1),
        ValueError,
        "`gap` >= 0, got -1",
    ),
    row(
        "grouped_split: one group",
        grouped_split,
        ValueError,
        "grouped_split: .*3 groups.*got 1",
        torch.zeros(10),
    ),
    row(
        "grouped_split: a group of NaN",
        grouped_split,
        ValueError,
        "grouped_split: .*`groups` without NaN, got 2",
        torch.tensor([1.0, 2.0, 3.0, NAN, NAN]),
    ),
    row("folds: k", folds, ValueError, "folds: .*`k` from 2 to the 20 samples, got 1", CLASSES, 1),
    row(
        "folds: no samples",
        folds,
        ValueError,
        "folds: .*`k` from 2 to the 0 samples, got 5",
        CLASSES[:0],
    ),
    row(
        "folds: seed",
        lambda y: folds(y, seed=2**32),
        ValueError,
        r"folds: .*`seed` in \[0, 4294967295\], got 4294967296",
        CLASSES,
    ),
    row(
        "folds: a group of NaN",
        lambda groups: folds(20, 2, method="grouped", groups=groups),
        ValueError,
        "folds: .*`groups` without NaN, got 20",
        VALUES * NAN,
    ),
    row("folds: a rare class", folds, ValueError, "folds: .*class 1 has 4", rarely(9, 4)),
    row(
        "folds: scikit-learn is missing",
        lambda y: without("sklearn.model_selection", lambda: folds(y)),
        ImportError,
        r"folds: sklearn.model_selection is missing: pip install 'torchref-triton\[train\]'",
        CLASSES,
    ),
    row(
        "mean_and_interval: nothing",
        mean_and_interval,
        ValueError,
        r"`scores`, got shape \(0,\)",
        [],
        0.25,
    ),
    row(
        "mean_and_interval: ratio",
        mean_and_interval,
        ValueError,
        "`test_to_train` > 0, got nan",
        [0.5],
        NAN,
    ),
    row(
        "ImageAugment: rotation",
        lambda: ImageAugment(rotation=181),
        ValueError,
        r"`rotation` in \[0, 180\], got 181",
    ),
    row(
        "ImageAugment: NaN",
        lambda: ImageAugment(noise=NAN),
        ValueError,
        r"`noise` in \[0, inf\), got nan",
    ),
    row(
        "ImageAugment: a table",
        lambda x, y: ImageAugment()(x, y),
        ValueError,
        r"`x` of shape \(N, C, H, W\), got \(20, 3\)",
        TABLE,
        CLASSES,
    ),
    row(
        "ImageAugment: targets",
        lambda x, y: ImageAugment()(x, y),
        ValueError,
        r"`y` of as many.*got \(20,\) for \(2,",
        IMAGES,
        CLASSES,
    ),
    row(
        "ImageAugment: kornia is missing",
        lambda: without("kornia", ImageAugment),
        ImportError,
        r"ImageAugment: kornia is missing: pip install 'torchref-triton\[train\]'",
    ),
    row(
        "mixup: alpha",
        mixup,
        ValueError,
        "mixup: .*`alpha` > 0 and finite, got 0.0",
        TABLE,
        CLASSES,
        0.0,
        2,
    ),
    row(
        "mixup: how many classes",
        mixup,
        ValueError,
        "mixup: .*`classes`.*got classes=None",
        TABLE,
        CLASSES,
        0.2,
    ),
    row(
        "mixup: a class too many",
        mixup,
        ValueError,
        r"mixup: .*`y` in \[0, 2\), got 2",
        TABLE,
        CLASSES + 1,
        0.2,
        2,
    ),
    row(
        "TabularAugment: noise",
        lambda: TabularAugment(noise=-1),
        ValueError,
        "finite `noise` >= 0, got -1",
    ),
    row(
        "TabularAugment: shuffle",
        lambda: TabularAugment(shuffle=NAN),
        ValueError,
        r"`shuffle` in \[0, 1\], got nan",
    ),
    row(
        "TabularAugment: unfitted",
        TabularAugment(noise=0.1),
        RuntimeError,
        "TabularAugment: not fitted; call `fit`",
        TABLE,
        CLASSES,
    ),
    row(
        "TabularAugment: a column that is not there",
        TabularAugment(shuffle=0.5, categories=[9]),
        ValueError,
        r"TabularAugment: .*`categories` among 3 columns, got \[9\]",
        TABLE,
        CLASSES,
    ),
    row(
        "smote: one class",
        smote,
        ValueError,
        r"smote: expected two classes or more, got \[0\]",
        TABLE,
        CLASSES * 0,
    ),
    row(
        "smote: a rare class",
        smote,
        ValueError,
        "smote: .*class 1 has 2; pass `neighbors`",
        TABLE,
        rarely(18, 2),
    ),
    row(
        "smote: seed",
        lambda x, y: smote(x, y, seed=-1),
        ValueError,
        "smote: .*`seed`.*got -1",
        TABLE,
        rarely(14, 6),
    ),
    row(
        "smote: values", smote, ValueError, "smote: .*integer `y`.*got torch.float32", TABLE, VALUES
    ),
    row("smote: NaN", smote, ValueError, "Input X contains NaN", TABLE * NAN, rarely(14, 6)),
]


def classifier(_: Any) -> MLPClassifier:
    torch.manual_seed(0)
    return MLPClassifier(3, ["no", "yes"], depth=1, width=4, batch_norm=False, normalize="none")


def module(**options: Any) -> Callable[..., DataModule]:
    return lambda x, y: DataModule(x, y, **options)


def read_twice(x: Tensor, y: Tensor) -> None:
    data = DataModule(x, y)
    data.test_dataloader()
    data.test_dataloader()


def older_run(t: Any) -> Path:
    """A folder with what an older run, or search, left."""
    for folder in ("iris", "tune-iris", "cv-iris"):
        (t.here / folder).mkdir()
        for name in ("last.ckpt", "config.yaml", "search.yaml", "metrics.json"):
            (t.here / folder / name).write_text("dataset: iris\n")
    return t.here


def run(**options: Any) -> Callable[..., Any]:
    return lambda root: Run(Config(**{"dataset": "iris", "parity": False} | options), root=root)


def parts(*indices: list[int]) -> list[Tensor]:
    return [torch.tensor(part, dtype=torch.int64) for part in indices]


IRIS = Config(dataset="iris")
LINEAR = nn.Linear(2, 1)
PROBABILITIES = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])

TRAINING = [
    row(
        "DataModule: targets",
        DataModule,
        ValueError,
        "`y` of as many.*20, got 3",
        TABLE,
        CLASSES[:3],
    ),
    row("DataModule: no samples", DataModule, ValueError, "from 0 samples", TABLE[:0], CLASSES[:0]),
    row(
        "DataModule: batch_size",
        module(batch_size=0),
        ValueError,
        "batch_size: .*got 0",
        TABLE,
        CLASSES,
    ),
    row(
        "DataModule: batch_size of NaN",
        module(batch_size=NAN),
        ValueError,
        "batch_size: .*got nan",
        TABLE,
        CLASSES,
    ),
    row(
        "DataModule: a batch_size in words",
        module(batch_size="all"),
        ValueError,
        "batch_size: expected >= 1 or 'full', got 'all'",
        TABLE,
        CLASSES,
    ),
    row(
        "DataModule: a batch_size of 2.5",
        module(batch_size=2.5),
        ValueError,
        "batch_size: .*got 2.5",
        TABLE,
        CLASSES,
    ),
    row(
        "DataModule: split", module(split="fair"), ValueError, "split: .*got 'fair'", TABLE, CLASSES
    ),
    row(
        "DataModule: strata of values",
        module(split="stratified"),
        ValueError,
        "split: .*'stratified'",
        TABLE,
        VALUES,
    ),
    row(
        "DataModule: no groups",
        module(split="grouped"),
        ValueError,
        "split: grouped needs `groups`",
        TABLE,
        CLASSES,
    ),
    row(
        "DataModule: gap",
        module(gap=2),
        ValueError,
        "gap: .*chronological split, got 2",
        TABLE,
        CLASSES,
    ),
    row(
        "DataModule: gap in words",
        module(split="chronological", gap="two"),
        TypeError,
        "gap: .*got 'two'",
        TABLE,
        CLASSES,
    ),
    row(
        "DataModule: no seed",
        module(seed=None),
        TypeError,
        "seed: expected an integer, got None",
        TABLE,
        CLASSES,
    ),
    row(
        "DataModule: ratios in words",
        module(ratios=["most", "some", "some"]),
        TypeError,
        r"ratios: .*got \['most', 'some', 'some'\]",
        TABLE,
        CLASSES,
    ),
    row(
        "DataModule: one ratio",
        module(ratios=0.8),
        TypeError,
        "ratios: expected three numbers or 'auto', got 0.8",
        TABLE,
        CLASSES,
    ),
    row(
        "DataModule: two ratios",
        module(ratios=(0.5, 0.5)),
        ValueError,
        "ratios: .*three parts.*got 2",
        TABLE,
        CLASSES,
    ),
    row(
        "DataModule: a sample in two parts",
        module(parts=parts([0, 1, 2], [3, 4], [4])),
        ValueError,
        r"parts: .*each sample in one part at most, got \[3, 2, 1\]",
        TABLE,
        CLASSES,
    ),
    row(
        "DataModule: a sample in two parts, once from the end",
        module(parts=parts([0, 1, 2], [3, 19], [-1])),
        ValueError,
        "parts: .*",
        TABLE,
        CLASSES,
    ),
    row(
        "DataModule: a sample that is not there",
        module(parts=parts([0, 1, 2], [3, 4], [99])),
        ValueError,
        "parts: .*99",
        TABLE,
        CLASSES,
    ),
    row(
        "DataModule: a test sample that is not there",
        module(test=torch.tensor([99])),
        ValueError,
        "test: .*99",
        TABLE,
        CLASSES,
    ),
    row(
        "DataModule: values of NaN",
        module(),
        ValueError,
        "`y`.*NaN",
        TABLE,
        VALUES * NAN,
    ),
    row(
        "DataModule: the test part twice",
        read_twice,
        RuntimeError,
        "test: .*opened before",
        TABLE,
        CLASSES,
    ),
    row(
        "Classifier: l1",
        lambda net: Classifier(net, 2, l1=-1.0),
        ValueError,
        "l1: .*got -1.0",
        LINEAR,
    ),
    row(
        "Classifier: l1 in words",
        lambda net: Classifier(net, 2, l1="no"),
        TypeError,
        "Classifier: .*`l1`, got 'no'",
        LINEAR,
    ),
    row(
        "Classifier: classes in words",
        lambda net: Classifier(net, "two"),
        TypeError,
        "classes: .*got 'two'",
        LINEAR,
    ),
    row(
        "Classifier: l2 of NaN",
        lambda net: Classifier(net, 2, l2=NAN),
        ValueError,
        "l2: .*got nan",
        LINEAR,
    ),
    row(
        "Classifier: one class",
        lambda net: Classifier(net, 1),
        ValueError,
        "classes: expected >= 2, got 1",
        LINEAR,
    ),
    row(
        "MLPClassifier: library",
        lambda: MLPClassifier(3, ["no", "yes"], "jax"),
        ValueError,
        "library: expected one of torchref, torch, got 'jax'",
    ),
    row(
        "MLPClassifier: unfitted",
        lambda model, x: model.predict(x),
        RuntimeError,
        "Standard: not fitted",
        MLPClassifier(3, ["no", "yes"]),
        TABLE,
    ),
    row(
        "MLPClassifier: threshold",
        lambda m, x: m.predict(x, 2.0),
        ValueError,
        "threshold: .*2.0",
        classifier,
        TABLE,
    ),
    row(
        "MLPClassifier: another number of features",
        lambda model, x: model.predict(x),
        RuntimeError,
        r"linear: .*`input` of shape \(..., 3\).*got \(20, 2\)",
        classifier,
        TABLE[:, :2],
    ),
    row(
        "MLPClassifier: a class too many",
        lambda model, x, y: model.cost(x, y),
        IndexError,
        r"cross_entropy: .*`target` in \[0, 1\] or -100, got 2",
        classifier,
        TABLE,
        CLASSES + 1,
    ),
    row(
        "MLPRegressor: values of NaN",
        lambda model, y: model.scale.fit(y[:, None]),
        ValueError,
        "Standard: column 0 of `x` has a NaN",
        MLPRegressor(3, normalize="none"),
        VALUES * NAN,
    ),
    row("build_mlp: depth", lambda: build_mlp(3, 2, depth=-1), ValueError, "depth: .*got -1"),
    row(
        "build_mlp: dropout",
        lambda: build_mlp(3, 2, dropout=1.0),
        ValueError,
        r"dropout: .*\[0, 1\), got 1.0",
    ),
    row(
        "build_mlp: activation",
        lambda: build_mlp(3, 2, activation="swish"),
        ValueError,
        "activation: .*'swish'",
    ),
    row(
        "build_mlp: no features",
        lambda: build_mlp(0, 2),
        ValueError,
        "features: .*got 0",
    ),
    row(
        "build_optimizer: name",
        lambda p: build_optimizer("lion", [p], 0.1),
        ValueError,
        "optimizer: .*'lion'",
        LEAF,
    ),
    row(
        "build_optimizer: lr",
        lambda p: build_optimizer("sgd", [p], NAN),
        ValueError,
        "lr: .*got nan",
        LEAF,
    ),
    row("build_normalizer: name", build_normalizer, ValueError, "normalize: .*got 'z'", "z"),
    row(
        "build_normalizer: samples of another kind",
        build_normalizer,
        ValueError,
        "kind.*'sound'",
        "auto",
        {"kind": "sound"},
    ),
    row("Run: dataset", run(dataset="irises"), ValueError, "dataset: .*got 'irises'", older_run),
    row("Run: epochs", run(epochs=0), ValueError, "epochs: expected > 0, got 0", older_run),
    row(
        "Run: seed",
        run(seed=-1),
        ValueError,
        r"seed: expected in \[0, 4294967295\], got -1",
        older_run,
    ),
    row("Run: name", run(name="../up"), ValueError, "name: .*got '../up'", older_run),
    row("Run: lr", run(lr=NAN), ValueError, r"lr: expected in \(0, 1e30\], got nan", older_run),
    row("Run: batches of one", run(batch_size=1), ValueError, "batch_size: .*got 1", older_run),
    row("Run: patience", run(patience=0), ValueError, "patience: expected >= 1, got 0", older_run),
    row("Run: backend", run(backend="cuda"), ValueError, "set_backend: .*got 'cuda'", older_run),
    row(
        "Run: an error after its backend",
        run(backend="reference", dataset="irises"),
        ValueError,
        "dataset: .*got 'irises'",
        older_run,
    ),
    row(
        "Run: resume from nothing",
        lambda root: Run(Config(dataset="iris", name="none"), resume="last", root=root),
        FileNotFoundError,
        "resume: no checkpoint .*last.ckpt",
        older_run,
    ),
    row(
        "Run: resume from a foreign checkpoint",
        lambda root: Run(IRIS, resume="last", root=root),
        ValueError,
        "resume: .*last.ckpt is damaged",
        older_run,
    ),
    row(
        "EarlyStopping: patience",
        lambda: EarlyStopping(patience=0),
        ValueError,
        "patience: .*got 0",
    ),
    row(
        "EarlyStopping: min_delta",
        lambda: EarlyStopping(min_delta=NAN),
        ValueError,
        "min_delta: .*got nan",
    ),
    row(
        "EarlyStopping: mode",
        lambda: EarlyStopping(mode="least"),
        MisconfigurationException,
        "`mode` can be .*, got least",
    ),
    row("RestoreBest: mode", lambda: RestoreBest(mode="least"), ValueError, "mode: .*got 'least'"),
    row(
        "GradientFlowCallback: every",
        lambda: GradientFlowCallback(every=0),
        ValueError,
        "every: .*got 0",
    ),
    row(
        "Parity: sync_every",
        lambda m: Parity(m, sync_every=1),
        ValueError,
        "sync_every: .*got 1",
        classifier,
    ),
    row(
        "overfit_one_batch: steps",
        overfit_one_batch,
        ValueError,
        "steps: .*got 0",
        classifier,
        (TABLE, CLASSES),
        0,
    ),
    row(
        "overfit_one_batch: no samples",
        overfit_one_batch,
        ValueError,
        "batch: .*got 0",
        classifier,
        (TABLE[:0], CLASSES[:0]),
    ),
    row(
        "learning_rate_range: low",
        lambda model, data: learning_rate_range(model, data, low=0.0),
        ValueError,
        "low: expected > 0 and below 1.0, got 0.0",
        classifier,
        lambda _: DataModule(TABLE, CLASSES),
    ),
    row(
        "learning_rate_range: high",
        lambda model, data: learning_rate_range(model, data, high=INF),
        ValueError,
        "high: .*got inf",
        classifier,
        lambda _: DataModule(TABLE, CLASSES),
    ),
    row(
        "read_run: nothing",
        lambda root: read_run(root / "none"),
        FileNotFoundError,
        "no finished run",
        older_run,
    ),
    row(
        "CrossValidation: method",
        lambda root: CrossValidation(IRIS, method="fair", root=root),
        ValueError,
        "method: .*got 'fair'",
        older_run,
    ),
    row(
        "CrossValidation: folds",
        lambda root: CrossValidation(IRIS, folds=1, root=root),
        ValueError,
        "folds: .*`k` from 2 to .*, got 1",
        older_run,
    ),
    row(
        "learning_curve_over_size: sizes",
        lambda root: learning_curve_over_size(IRIS, (0.5, 0.2), root=root),
        ValueError,
        r"learning_curve_over_size: .*`sizes` in \(0, 1\], got \(0.5, 0.2\)",
        older_run,
    ),
    row(
        "tune: method",
        lambda root: tune(IRIS, method="luck", root=root),
        ValueError,
        "method: .*'luck'",
        older_run,
    ),
    row(
        "tune: trials",
        lambda root: tune(IRIS, trials=0, root=root),
        ValueError,
        "trials: .*got 0",
        older_run,
    ),
    row(
        "tune: malformed data",
        lambda root: tune(Config(dataset="csv:none.csv", name="tune-iris"), root=root),
        FileNotFoundError,
        "none.csv",
        older_run,
    ),
    row("search: nothing", Search.parse, ValueError, r"search: .*got \[\]", []),
    row(
        "search: no values",
        Search.parse,
        ValueError,
        "search: expected name=values, got 'lr'",
        ["lr"],
    ),
    row(
        "search: name",
        Search.parse,
        ValueError,
        "search: expected one of .*got 'rate'",
        ["rate=1,2"],
    ),
    row(
        "search: twice", Search.parse, ValueError, "search: lr: .*the name once", ["lr=1,2", "lr=3"]
    ),
    row(
        "search: no number",
        Search.parse,
        ValueError,
        "search: lr: expected float, got 'fast'",
        ["lr=fast"],
    ),
    row(
        "search: NaN",
        Search.parse,
        ValueError,
        "search: lr: expected float, got 'nan'",
        ["lr=nan,1"],
    ),
    row(
        "search: downwards",
        Search.parse,
        ValueError,
        "search: lr: .*low < high, got '2:1'",
        ["lr=2:1"],
    ),
    row(
        "search: log of 0",
        Search.parse,
        ValueError,
        "search: lr: .*0 < low, for log, got",
        ["lr=0:1:log"],
    ),
    row(
        "search: a word",
        Search.parse,
        ValueError,
        "search: activation: .*'swish'",
        ["activation=swish"],
    ),
    row(
        "decide: threshold",
        decide,
        ValueError,
        r"threshold: expected in \[0, 1\], got nan",
        PROBABILITIES,
        NAN,
    ),
    row(
        "decide: thresholds",
        decide,
        ValueError,
        "threshold: expected one, or 2, got",
        PROBABILITIES,
        torch.ones(3),
    ),
    row(
        "log_loss: a class too many",
        log_loss,
        ValueError,
        r"log_loss: .*`y` in \[0, 2\), got 5",
        PROBABILITIES,
        torch.tensor([0, 5, 1]),
    ),
    row(
        "log_loss: fewer classes than samples",
        log_loss,
        ValueError,
        "log_loss: .*3.*`y`, got 2",
        PROBABILITIES,
        torch.tensor([0, 1]),
    ),
    row(
        "coverage_curve: one class for three samples",
        coverage_curve,
        ValueError,
        "coverage_curve: .*3.*`y`, got 1",
        PROBABILITIES,
        torch.tensor([0]),
    ),
    row(
        "log_loss: logits",
        log_loss,
        ValueError,
        r"log_loss: expected `probabilities` in \[0, 1\], got 3",
        torch.tensor([[3.0, -1.0]]),
        torch.tensor([0]),
    ),
    row(
        "decide: logits",
        decide,
        ValueError,
        r"decide: expected `probabilities` in \[0, 1\], got 3",
        torch.tensor([[3.0, -1.0]]),
        0.5,
    ),
]


DIAGNOSTICS = [
    row(
        "gradient_flow: lr",
        lambda net: see.gradient_flow(net, lambda: net(torch.ones(1, 2)).sum(), lr=NAN),
        ValueError,
        "gradient_flow: .*`lr` finite and > 0, got nan",
        LINEAR,
    ),
    row(
        "gradient_flow: a loss for each sample",
        lambda net: see.gradient_flow(net, lambda: net(torch.ones(3, 2))),
        ValueError,
        r"gradient_flow: .*`loss` to return a scalar tensor, got shape \(3, 1\)",
        LINEAR,
    ),
    row(
        "gradient_flow: nothing to learn",
        lambda net: see.gradient_flow(net, lambda: LEAF.sum()),
        ValueError,
        "gradient_flow: .*`model` with weights",
        nn.ReLU(),
    ),
    row(
        "check_symmetry: a loss without the model",
        lambda net: see.check_symmetry(net, lambda: LEAF.sum()),
        ValueError,
        "check_symmetry: .*`loss` that depends on the weights of `model`",
        LINEAR,
    ),
    row(
        "graph: names",
        lambda x: see.graph(torch.sum, x, names="ab"),
        TypeError,
        "graph: .*`names`.*'ab'",
        LEAF,
    ),
    row(
        "graph: y alone",
        lambda x: see.graph(torch.sum, x, y=x),
        ValueError,
        "graph: .*`loss` with `y`",
        LEAF,
    ),
    row(
        "graph: no gradient",
        see.graph,
        ValueError,
        "graph: nothing requires a gradient",
        torch.sum,
        X,
    ),
    row("majority_error: values", see.majority_error, ValueError, "`y`.*got torch.float32", VALUES),
    row(
        "majority_error: a class below 0",
        see.majority_error,
        ValueError,
        "majority_error: .*`y`.*got -1",
        CLASSES - 1,
    ),
    row(
        "majority_error: complex",
        see.majority_error,
        ValueError,
        "majority_error: .*`y`.*got torch.complex64",
        X[0].to(torch.complex64),
    ),
    row("diagnose: nothing", see.diagnose, ValueError, "diagnose: .*`rows`, got none", []),
    row(
        "diagnose: baseline",
        lambda rows: see.diagnose(rows, baseline=NAN),
        ValueError,
        "diagnose: .*`baseline` > 0, got nan",
        [{"train_loss": 1.0, "val_loss": 1.0}],
    ),
    row(
        "diagnose: val_samples",
        lambda rows: see.diagnose(rows, baseline=1.0, val_samples=cast(Any, NAN)),
        ValueError,
        "diagnose: .*`val_samples` > 0, got nan",
        [{"train_loss": 1.0, "val_loss": 1.0}],
    ),
    row(
        "confusion_matrix: classes",
        see.confusion_matrix,
        ValueError,
        "`classes` >= 2, got 1",
        CLASSES,
        CLASSES,
        1,
    ),
    row(
        "confusion_matrix: a class too many",
        see.confusion_matrix,
        ValueError,
        r"confusion_matrix: .*`y` in \[0, 2\), got 2",
        CLASSES,
        CLASSES + 1,
        2,
    ),
    row(
        "reliability: logits",
        see.reliability,
        ValueError,
        r"reliability: .*`probabilities` in \[0, 1\], got 9",
        PROBABILITIES * 10,
        CLASSES[:3],
    ),
    row(
        "reliability: bins",
        see.reliability,
        ValueError,
        "`bins` > 0, got 0",
        PROBABILITIES,
        CLASSES[:3],
        0,
    ),
    row(
        "highest_loss: count",
        see.highest_loss,
        ValueError,
        "`count` > 0, got 0",
        PROBABILITIES,
        CLASSES[:3],
        0,
    ),
    row(
        "residuals: shapes",
        see.residuals,
        ValueError,
        r"`predicted` of shape \(3,\), got \(20,\)",
        VALUES,
        VALUES[:3],
    ),
    row(
        "r2: equal values",
        see.r2,
        ValueError,
        "r2: expected different values in `y`",
        VALUES,
        VALUES * 0,
    ),
    row("smooth: decay", see.smooth, ValueError, r"`decay` in \[0, 1\), got 1.0", VALUES, 1.0),
    row(
        "optimizer_paths: steps",
        lambda: see.optimizer_paths(steps=0),
        ValueError,
        "`steps` > 0, got 0",
    ),
]


class Command(NamedTuple):
    """A script, its arguments, and the files that lie where it is called."""

    name: str
    script: str
    arguments: str
    message: str
    files: Mapping[str, str | bytes] = {}
    defect: str = ""


def foreign_checkpoint() -> bytes:
    file = io.BytesIO()
    torch.save({"model": {"weight": torch.ones(3)}}, file)
    return file.getvalue()


HALF_A_RUN = {"runs/a/config.yaml": "lr: 0.1\n", "runs/a/metrics.csv": "epoch,val_loss\n0,1.0\n"}
COMMANDS = [
    Command(
        "train: lr", "train", "--dataset iris --lr -0.1", r"lr: expected in \(0, 1e30\], got -0.1"
    ),
    Command(
        "train: lr of NaN", "train", "--dataset iris --lr nan", "lr: expected float, got 'nan'"
    ),
    Command("train: an unknown flag", "train", "--rate 0.1", "unrecognized arguments: --rate 0.1"),
    Command("train: dataset", "train", "--dataset irises", "dataset: expected .*got 'irises'"),
    Command(
        "train: one class",
        "train",
        "--dataset csv:one.csv",
        "one.csv: .*(class|target)",
        {"one.csv": "f,y\n" + "1,a\n" * 9},
    ),
    Command(
        "train: no rows",
        "train",
        "--dataset csv:empty.csv",
        "empty.csv: .*",
        {"empty.csv": "f,y\n"},
    ),
    Command(
        "train: a number that is none",
        "train",
        "--dataset csv:bad.csv",
        "bad.csv: row 2, column 1: 'nan' is missing; --missing",
        {"bad.csv": "1,2,a\nnan,3,b\n"},
    ),
    Command(
        "train: a key of the file", "train", "--config a.yaml", "lrr", {"a.yaml": "lrr: 0.1\n"}
    ),
    Command(
        "predict: a foreign checkpoint",
        "train",
        "predict x.csv --run runs/a",
        "best.ckpt: not a checkpoint of a training run, or damaged",
        {"x.csv": "1,2,3\n", "runs/a/best.ckpt": foreign_checkpoint()},
    ),
    Command(
        "predict: half a checkpoint",
        "train",
        "predict x.csv --run runs/a",
        "best.ckpt: not a checkpoint of a training run, or damaged",
        {"x.csv": "1,2,3\n", "runs/a/best.ckpt": foreign_checkpoint()[:100]},
    ),
    Command("predict: no run", "train", "predict x.csv --run runs/b", "no trained run in runs/b"),
    Command(
        "compare: an unfinished run",
        "compare",
        "runs/a",
        "runs/a: no finished run .*metrics.json",
        HALF_A_RUN,
    ),
    Command(
        "compare: a damaged run",
        "compare",
        "runs/a",
        "runs/a/metrics.json is damaged: ",
        {**HALF_A_RUN, "runs/a/metrics.json": "{"},
    ),
    Command(
        "cross_validate: folds", "cross_validate", "--dataset iris --folds 1", "folds: .*`k`.*got 1"
    ),
    Command(
        "cross_validate: method", "cross_validate", "--dataset iris --method x", "method: .*'x'"
    ),
    Command(
        "cross_validate: nothing to resume",
        "cross_validate",
        "--resume --name none",
        "resume: no cross-validation in runs/none",
    ),
    Command("tune: search", "tune", "--dataset iris --search rate=1,2", "search: .*got 'rate'"),
    Command(
        "tune: a range as a grid", "tune", "--method grid --search lr=1:2", "search: lr: a grid"
    ),
    Command(
        "tune: trials in words",
        "tune",
        "--dataset iris --trials many",
        "trials: expected int, got 'many'",
    ),
    Command(
        "overfitting: sizes",
        "overfitting",
        "--sizes 0",
        "sizes: expected > 0 and <= 10000, got .*0",
    ),
    Command("overfitting: noise", "overfitting", "--noise nan", "noise: expected float, got 'nan'"),
    Command("benchmark: section", "benchmark", "speed", "no section 'speed': expected"),
    Command(
        "benchmark: json", "benchmark", "--json none/a.json", "--json: there is no folder none"
    ),
    Command("report_benchmarks: no file", "report_benchmarks", "a.json", "a.json: No such file"),
    Command(
        "report_benchmarks: another file",
        "report_benchmarks",
        "a.json",
        "a.json: not written by scripts/benchmark.py",
        {"a.json": "{}"},
    ),
    Command(
        "parity: dtype",
        "parity",
        "--dtype float8",
        "float8",
    ),
    Command(
        "check_gpu: minutes",
        "check_gpu",
        "--minutes long",
        "--minutes.*'long'",
    ),
]

TWINS = {
    "activations, softmax and losses": LOSSES,
    "layers and initialization": LAYERS,
    "optimizers and clipping": OPTIMIZERS,
}
OWN = {
    "averages": AVERAGES,
    "convert, revert, backend and testing": CONVERTING,
    "data": DATA,
    "training": TRAINING,
    "diagnostics": DIAGNOSTICS,
}
AREAS = {**TWINS, **OWN, "scripts": COMMANDS}

# Of a target that is NaN the loss is, and nothing else may be.
NAN_TARGETS = {
    "mse_loss": X * NAN,
    "l1_loss": X * NAN,
    "binary_cross_entropy_with_logits": X * NAN,
    "cross_entropy": X * NAN,
}


def cases(areas: dict[str, list[Any]]) -> list[Any]:
    found = []
    for case in (case for rows in areas.values() for case in rows):
        marks = [pytest.mark.xfail(strict=True, reason=case.defect)] if case.defect else []
        found.append(pytest.param(case, marks=marks, id=case.name))
    return found


@pytest.fixture(autouse=True)
def _process_as_before():
    backend, threads = torchref.get_backend(), torch.get_num_threads()
    yield
    torchref.set_backend(backend)
    torch.set_num_threads(threads)


def made(case: Misuse, library: Any, here: Path) -> list[Any]:
    """What the call is handed; of a library's own, where a function makes it."""
    library = SimpleNamespace(**vars(library), here=here)
    return [
        thing(library) if isinstance(thing, FunctionType) else copied(thing) for thing in case.given
    ]


def copied(thing: Any) -> Any:
    copy = deepcopy(thing)
    if isinstance(thing, nn.Parameter):
        copy.grad = deepcopy(thing.grad)  # which a parameter's copy lacks
    return copy


def frozen(thing: Any) -> Any:
    """Everything about a thing that a misuse may not change, to be compared bit by bit."""
    if isinstance(thing, Tensor):
        return _frozen_tensor(thing)
    if isinstance(thing, Path):
        files = sorted(thing.rglob("*"))
        return [(str(path), path.read_bytes() if path.is_file() else None) for path in files]
    if isinstance(thing, nn.Module):
        modules = [(type(module), module.training) for module in thing.modules()]
        tensors = [frozen(list(thing.parameters())), frozen(list(thing.buffers()))]
        return modules, list(thing.state_dict()), tensors
    if isinstance(thing, torch.optim.Optimizer):
        params = [p for group in thing.param_groups for p in group["params"]]
        return type(thing), frozen(thing.state_dict()), frozen(params)
    if isinstance(thing, dict):
        return {name: frozen(value) for name, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [frozen(value) for value in thing]
    return frozen(vars(thing)) if isinstance(thing, ExponentialMovingAverage) else repr(thing)


def _frozen_tensor(x: Tensor) -> Any:
    if isinstance(x, nn.parameter.UninitializedParameter):
        return repr(x)
    about = (x.dtype, x.shape, x.requires_grad, x.device)
    if x.device.type == "meta":
        return about
    dense = x.detach().to_dense() if x.is_sparse else x.detach()
    return *about, dense.contiguous().reshape(-1).view(torch.uint8).tolist(), _gradient(x)


def _gradient(x: Tensor) -> Any:
    return frozen(x.grad) if x.is_leaf and x.grad is not None else None


@pytest.mark.parametrize("case", cases(TWINS) + cases(OWN))
def test_a_misuse_raises_and_touches_nothing(case, tmp_path):
    twin = any(case in rows for rows in TWINS.values())
    given = made(case, OURS, tmp_path)
    before = frozen([*given, tmp_path]), torchref.get_backend()
    with pytest.raises(case.error, match=f"(?s){case.message}") as raised:
        case.call(OURS, *given) if twin else case.call(*given)
    assert raised.type is case.error
    assert (frozen([*given, tmp_path]), torchref.get_backend()) == before


@pytest.mark.parametrize("case", [pytest.param(p.values[0], id=p.id) for p in cases(TWINS)])
def test_torchs_type(case, tmp_path):
    """What a row says of torch is so; where the library has a defect, of what it should raise."""
    theirs = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            case.call(THEIRS, *made(case, THEIRS, tmp_path))
        except Exception as error:
            theirs = type(error)
    new = case.name.lower().replace("_", "").startswith("linearcrossentropy")
    if new and not hasattr(nn.functional, "linear_cross_entropy"):
        pytest.skip("torch has it since 2.13")
    less = theirs in LESS_SPECIFIC and case.error is ValueError
    fits = theirs is not None and (issubclass(case.error, theirs) or less)
    assert fits == (not case.differs), f"torch raises {theirs}"


@pytest.mark.parametrize("name", NAN_TARGETS)
def test_a_target_of_nan_is_a_loss_of_nan(name):
    losses = [getattr(library.F, name)(X, NAN_TARGETS[name]) for library in (OURS, THEIRS)]
    assert [loss.isnan().item() for loss in losses] == [True, True]


def main_of(script: str) -> Callable[[], Any]:
    spec = importlib.util.spec_from_file_location(f"misused_{script}", SCRIPTS / f"{script}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # dataclasses look there
    spec.loader.exec_module(found)
    return found.main


@pytest.mark.parametrize("case", cases({"scripts": COMMANDS}))
def test_a_wrong_command_is_one_line_and_status_2(case, tmp_path, monkeypatch, capsys):
    for name, text in case.files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{case.script}.py", *case.arguments.split()])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # a parser replaces it
    main, before = main_of(case.script), frozen(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert re.search(case.message, err)
    assert frozen(tmp_path) == before


def test_there_are_as_many_as_promised(record_testsuite_property):
    tried = sum(map(len, AREAS.values()))
    assert tried >= 150
    record_testsuite_property("misuses", tried)
    names = [case.name for rows in AREAS.values() for case in rows]
    assert len(set(names)) == len(names)


def count() -> str:
    lines = [f"{len(rows):4}  {area}" for area, rows in AREAS.items()]
    return "\n".join([*lines, f"{sum(map(len, AREAS.values())):4}  in all"])


if __name__ == "__main__":
    print(count())

"""torch's own samples for its modules and functions, run through ours."""

import copy
import os

import pytest
import torch
from databases import module_db, op_db
from test_signatures import FUSED, FUSED_MODULES

import torchref
from torchref.testing import assert_parity

# the databases build tensors in ways that torch itself warns about
pytestmark = pytest.mark.filterwarnings("ignore")

DEVICE = os.environ.get("TORCHREF_TEST_DEVICE", "cpu")
MODULES = {
    info.module_cls.__name__: info
    for info in module_db
    if hasattr(torchref.nn, info.module_cls.__name__)
}
OPS = {
    "relu": "nn.functional.relu",
    "leaky_relu": "nn.functional.leaky_relu",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "elu": "nn.functional.elu",
    "selu": "nn.functional.selu",
    "gelu": "nn.functional.gelu",
    "silu": "nn.functional.silu",
    "softplus": "nn.functional.softplus",
    "softmax": "softmax",
    "log_softmax": "log_softmax",
    "linear": "nn.functional.linear",
    "cross_entropy": "nn.functional.cross_entropy",
    "nll_loss": "nn.functional.nll_loss",
    "mse_loss": "nn.functional.mse_loss",
    "l1_loss": "nn.functional.l1_loss",
    "binary_cross_entropy": "nn.functional.binary_cross_entropy",
    "binary_cross_entropy_with_logits": "nn.functional.binary_cross_entropy_with_logits",
    "batch_norm": "nn.functional.batch_norm",
    "dropout": "nn.functional.dropout",
}
if hasattr(torch.nn.functional, "linear_cross_entropy"):  # since 2.13
    OPS["linear_cross_entropy"] = "nn.functional.linear_cross_entropy"


def test_every_piece_is_in_the_databases():
    missing = set(vars(torchref.nn)) - set(MODULES)
    missing = {n for n in missing if isinstance(getattr(torchref.nn, n), type)}
    assert missing - FUSED_MODULES == {"Dropout", "SyncBatchNorm"}
    functions = {n for n in vars(torchref.nn.functional) if n[0] != "_"}
    assert functions - set(OPS) <= FUSED


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, dtype, training):
    info = MODULES[name]
    samples = info.module_inputs_func(info, DEVICE, dtype, requires_grad=True, training=training)
    count = 0
    for sample in samples:
        made = sample.constructor_input
        if made.kwargs.get("options") is not None:
            continue  # of torch's own implementation of linear_cross_entropy
        pair = [
            getattr(library, name)(*made.args, **made.kwargs).to(dtype).train(training)
            for library in (torchref.nn, torch.nn)
        ]
        call = sample.forward_input
        if any(isinstance(a, torch.Tensor) and a.is_complex() for a in call.args):
            continue
        # Softmax keeps channels_last where torch does not
        assert_parity(*pair, *call.args, strides="oftmax" not in name, **call.kwargs)
        count += 1
    assert count


@pytest.mark.parametrize("name", [n for n, i in MODULES.items() if i.module_error_inputs_func])
def test_module_errors(name):
    info = MODULES[name]
    args = {"device": DEVICE, "dtype": torch.float32, "requires_grad": False, "training": True}
    for case in info.module_error_inputs_func(info, **args):
        made, call = (
            case.module_error_input.constructor_input,
            case.module_error_input.forward_input,
        )
        with pytest.raises(case.error_type):
            getattr(torchref.nn, name)(*made.args, **made.kwargs)(*call.args, **call.kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_functions(name, dtype):
    if name == "dropout" and torchref.get_backend() == "triton":
        pytest.skip("a kernel's mask is its own: test_dropout_kernel.py")
    count = 0
    for info in op_db:
        if info.name != OPS[name] or not info.supports_dtype(dtype, DEVICE):
            continue
        if info.variant_test_name.startswith("chunked"):
            continue  # its options are about torch's own implementation
        theirs = getattr(torch.nn.functional, name)
        for sample in info.sample_inputs(DEVICE, dtype, requires_grad=True):
            if name == "batch_norm" and sample.input.ndim < 2:
                continue  # torch takes an empty tensor without channels
            args, kwargs = list(sample.args), dict(sample.kwargs)
            ours = getattr(torchref.nn.functional, name)
            if name == "batch_norm" and any(_needs_gradient(a) for a in args[:2]):
                args[:2] = [a if a is None else a.detach() for a in args[:2]]
            constants = {k: _constant(v) for k, v in kwargs.items() if "weight" in k}
            if name not in ("mse_loss", "l1_loss", "batch_norm", "linear"):
                kwargs |= constants
            strides = name not in ("softmax", "log_softmax", "batch_norm", "cross_entropy")
            assert_parity(ours, theirs, sample.input, *args, strides=strides, **kwargs)
            count += 1
    assert count


@pytest.mark.parametrize("name", OPS)
def test_function_errors(name):
    for info in op_db:
        if info.name != OPS[name] or info.error_inputs_func is None:
            continue
        for case in info.error_inputs(DEVICE):
            sample = copy.copy(case.sample_input)
            with pytest.raises(case.error_type):
                getattr(torchref.nn.functional, name)(sample.input, *sample.args, **sample.kwargs)


def _needs_gradient(x):
    return isinstance(x, torch.Tensor) and x.requires_grad


def _constant(x):
    return x.detach() if isinstance(x, torch.Tensor) else x

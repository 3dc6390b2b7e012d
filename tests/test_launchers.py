"""Launchers as far as they can be looked at without running a kernel."""

import importlib
import inspect
import os
import pkgutil

import pytest
import torch
from kernel_compiling import recorded

import torchref.nn
import torchref.optim
from torchref import dispatch, triton_kernels
from torchref.triton_kernels import (
    activation,
    batch_norm,
    cross_entropy,
    dropout,
    multi_tensor,
    softmax,
)
from torchref.triton_kernels._tables import Tables

MASKS_OF_TORCH = {("dropout", "dropout_fwd"), ("dropout", "dropout_bwd")}  # no kernel draws them
FORMULAS = {
    (info.name, name): formula
    for info in pkgutil.iter_modules(torchref.nn.__path__)
    for name, formula in vars(importlib.import_module(f"torchref.nn.{info.name}")).items()
    if name.endswith(("_fwd", "_bwd")) and hasattr(formula, "__wrapped__")
    if formula.__module__.endswith(f".{info.name}")  # not where it was imported
    if (info.name, name) not in MASKS_OF_TORCH
}
LAUNCHERS = {
    (info.name, name)
    for info in pkgutil.iter_modules(triton_kernels.__path__)
    if info.name[0] != "_"
    for name, launcher in vars(
        importlib.import_module(f"torchref.triton_kernels.{info.name}")
    ).items()
    if inspect.isfunction(launcher) and name.endswith(("_fwd", "_bwd")) and name[0] != "_"
}


def test_every_formula_has_its_kernel_and_every_kernel_its_formula():
    assert len(FORMULAS) > 30
    assert set(FORMULAS) == LAUNCHERS


@pytest.mark.parametrize("where", FORMULAS, ids=".".join)
def test_launchers_have_their_formulas_signatures(where):
    formula, launcher = inspect.signature(FORMULAS[where]), dispatch.find_kernel(*where)
    assert inspect.signature(inspect.unwrap(launcher)) == formula


def test_every_optimizer_has_a_kernel_and_every_step_its_optimizer():
    optimizers = [torchref.optim.SGD, torchref.optim.RMSprop, torchref.optim.Adam]
    steps = {name for name in vars(multi_tensor) if name.endswith("_step") and name[0] != "_"}
    assert {optimizer._kernel for optimizer in optimizers} == steps
    signatures = {str(inspect.signature(getattr(multi_tensor, name))) for name in steps}
    assert len(signatures) == 1  # the optimizers call them alike


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="looks at real launches")
def test_grids_are_legal_for_any_size():
    """A grid's first side ends at 2**31 - 1, its others at 65,535; offsets past 2**31 are int64."""
    huge, tall, wide = meta(2**41 + 3), meta(2**33 + 1, 3), meta(3, 2**31 - 1)
    long = torch.long
    with recorded() as launches:
        activation.relu_fwd(huge, False)
        dropout.seeded_dropout_fwd(huge, meta(dtype=long), 0.5, 0.5, False)
        softmax.softmax_fwd(tall, 1)
        softmax.softmax_fwd(wide, 1)
        softmax.softmax_fwd(meta(2**20, 2**20), 0)
        cross_entropy.cross_entropy_fwd(tall, meta(2**33 + 1, dtype=long), None, "mean", -100, None)
        cross_entropy.nll_loss_fwd(wide, meta(3, dtype=long), None, "none", -100)
        for x in (meta(2**20, 3, 2**16), meta(2**31, 64), meta(1, 1, 2**40), meta(2, 2**20, 7)):
            _, mean, rstd = batch_norm.batch_norm_fwd(x, None, None, None, None, 0.1, 1e-5, True)
            batch_norm.batch_norm_bwd(x, x, None, mean, rstd, (True, False, False, False))
        gradients = Tables([2**35 + 1], torch.device("meta"), [torch.bfloat16])
        gradients.load([[0]])
        multi_tensor.clip_grads(gradients, multi_tensor.grad_norm(gradients, None), 1.0)
    assert len(launches) > 18
    for launch in launches:
        assert 0 < launch.programs < 2**31, launch

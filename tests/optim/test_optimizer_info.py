"""torch's own database of optimizer inputs, run on ours."""

import copy
import importlib
import warnings

import pytest
import torch
from optim_parity import (
    NAMES,
    UPDATES,
    assert_as_good,
    assert_close,
    assert_equal,
    make_params,
    ours,
    spy,
    tensors,
    theirs,
    train,
)

import torchref
from torchref.optim import _update


def optimizer_infos():
    """The unstable import, in one place; it needs `expecttest`."""
    pytest.importorskip("expecttest")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the many modules it pulls in
        from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db
    return {info.optim_cls.__name__: info for info in optim_db}, OptimizerErrorEnum


def flags(info, implementation):
    flags = dict.fromkeys(("foreach", "differentiable"), False)
    if "fused" in info.supported_impls:
        flags["fused"] = False
    if implementation in flags:
        flags[implementation] = True
    return flags


def inputs_of(info, implementation):
    """The database's keyword arguments that select an implementation."""
    # The device only selects inputs. "mps" adds a tensor learning rate, which the CPU also takes.
    inputs = info.optim_inputs_func(device="cpu") + info.optim_inputs_func(device="mps")
    for optim_input in inputs:
        kwargs = optim_input.kwargs | flags(info, implementation)
        tensor_lr = isinstance(kwargs.get("lr"), torch.Tensor)
        # That with `foreach=True` is an error in torch, see test_errors.
        if not (
            implementation == "foreach" and tensor_lr and info.optim_cls is not torch.optim.SGD
        ):
            yield kwargs, tensor_lr


@pytest.mark.parametrize("implementation", ["loop", "foreach", "fused", "compiled"])
@pytest.mark.parametrize("name", NAMES)
def test_inputs(name, implementation, monkeypatch):
    infos, _ = optimizer_infos()
    info = infos[name]
    if implementation == "fused" and "cpu" not in info.supports_fused_on:
        return
    module, update = UPDATES[name]
    in_lists = spy(monkeypatch, module, f"foreach_{update}")
    compiled = spy(monkeypatch, _update, "_update_compiled")
    for kwargs, tensor_lr in inputs_of(info, implementation):
        in_lists.clear()
        compiled.clear()
        expected = tensors(*train(theirs(name), kwargs, steps=10))
        with torchref.backend("compiled" if implementation == "compiled" else "auto"):
            actual = tensors(*train(ours(name), kwargs, steps=10))
        assert bool(in_lists) == (implementation == "foreach")
        assert bool(compiled) == (implementation in ("fused", "compiled"))
        if implementation in ("loop", "foreach"):
            assert_equal(actual, expected)
        else:
            # A tensor learning rate is float32: where torch divides it, the fused one does not.
            assert_close(actual, expected, 1e-6 if tensor_lr else 1e-13)


@pytest.mark.skipif(not torchref.dispatch.interprets(), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("name", NAMES)
def test_inputs_in_one_launch(name, monkeypatch):
    infos, _ = optimizer_infos()
    launches = spy(monkeypatch, importlib.import_module("torchref.triton_kernels._launch"), "_run")
    for kwargs, _ in inputs_of(infos[name], "loop"):
        launches.clear()
        truth = tensors(*train(theirs(name), kwargs, steps=10, truth_of=torch.float32))
        torchs = tensors(*train(theirs(name), kwargs, steps=10, dtype=torch.float32))
        with torchref.backend("triton"):
            actual = tensors(*train(ours(name), kwargs, steps=10, dtype=torch.float32))
        assert len(launches) == 10
        assert_as_good(actual, torchs, truth)


@pytest.mark.parametrize("name", NAMES)
def test_differentiable_inputs(name):
    infos, _ = optimizer_infos()
    info = infos[name]
    for optim_input in info.optim_inputs_func(device="cpu"):
        kwargs = optim_input.kwargs | flags(info, "differentiable")
        results = []
        for cls in (ours(name), theirs(name)):
            params = [p.detach().clone() for p in make_params()]
            optimizer = cls(params, **copy.deepcopy(kwargs))
            for i in range(3):
                for p in params:
                    p.grad = torch.full_like(p, i + 0.5)
                optimizer.step()
            results.append(tensors(params, optimizer))
        assert_close(*results, rtol=1e-6)  # torch counts and corrects in float32 here


@pytest.mark.parametrize("name", NAMES)
def test_errors(name):
    infos, stages = optimizer_infos()
    info = copy.copy(infos[name])
    info.optim_cls = ours(name)
    for error_input in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        optim_input = error_input.optimizer_error_input
        params, kwargs = optim_input.params, optim_input.kwargs
        if params is None:
            params = [torch.nn.Parameter(torch.randn(2, 3))]
        assert error_input.error_on == stages.CONSTRUCTION_ERROR
        if issubclass(error_input.error_type, Warning):
            with pytest.warns(error_input.error_type, match=error_input.error_regex):
                info.optim_cls(params, **kwargs)
        else:
            with pytest.raises(error_input.error_type, match=error_input.error_regex):
                info.optim_cls(params, **kwargs)


@pytest.mark.parametrize("name", NAMES)
def test_schedulers(name):
    infos, _ = optimizer_infos()
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    for chain in infos[name].scheduler_inputs:
        results = []
        for cls in (ours(name), theirs(name)):
            params = [torch.nn.Parameter(torch.ones(3, dtype=torch.float64))]
            optimizer = cls(params, lr=0.1)
            schedulers = [make(optimizer) for make in chain]
            for i in range(12):
                params[0].grad = torch.full_like(params[0], i - 3.0)
                optimizer.step()
                for scheduler in schedulers:
                    scheduler.step(*([1.0] if isinstance(scheduler, plateau) else []))
            results.append(params[0].detach())
        assert torch.equal(*results)

"""torch's own database of optimizer inputs, run on ours."""

import copy
import warnings

import pytest
import torch
from optim_parity import (
    NAMES,
    assert_close,
    assert_equal,
    make_params,
    ours,
    tensors,
    theirs,
    traced,
    train,
)

import torchref


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


@pytest.mark.parametrize("implementation", ["loop", "foreach", "fused", "compiled"])
@pytest.mark.parametrize("name", NAMES)
def test_inputs(name, implementation, monkeypatch):
    infos, _ = optimizer_infos()
    info = infos[name]
    if implementation == "fused" and "cpu" not in info.supports_fused_on:
        return
    if implementation == "compiled":
        traced(monkeypatch)
    # The device only selects inputs. "mps" adds a tensor learning rate, which the CPU also takes.
    inputs = info.optim_inputs_func(device="cpu") + info.optim_inputs_func(device="mps")
    for optim_input in inputs:
        kwargs = optim_input.kwargs | flags(info, implementation)
        tensor_lr = isinstance(kwargs.get("lr"), torch.Tensor)
        if implementation == "foreach" and tensor_lr and name != "SGD":
            continue  # an error in torch, see test_errors
        expected = tensors(*train(theirs(name), kwargs, steps=10))
        with torchref.backend("compiled" if implementation == "compiled" else "auto"):
            actual = tensors(*train(ours(name), kwargs, steps=10))
        if implementation in ("loop", "foreach"):
            assert_equal(actual, expected)
        else:
            # A tensor learning rate is float32: where torch divides it, the fused one does not.
            assert_close(actual, expected, 1e-6 if tensor_lr else 1e-13)


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

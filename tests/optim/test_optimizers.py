"""What holds for every optimizer: torch's numbers, state, flags and surroundings."""

import copy
import importlib
import inspect
import io
import pickle

import pytest
import torch
from optim_parity import (
    CASES,
    NAMES,
    UPDATES,
    assert_as_good,
    assert_close,
    assert_equal,
    assert_parity,
    gradients,
    make_params,
    ours,
    spy,
    tensors,
    theirs,
    traced,
    train,
)

import torchref

FUSED = [case for case in CASES if case[0] != "RMSprop"]  # torch has no fused RMSprop

# The compiler's first run imports modules that use what torch itself deprecates.
DEPRECATED_BY_TORCH = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

SCHEDULERS = {
    "exponential": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.99),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 50),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(("name", "kwargs"), CASES)
def test_step_for_step(name, kwargs, foreach, scheduler):
    options = {**kwargs, "lr": 0.01, "foreach": foreach}
    assert_parity(name, options, steps=200, scheduler=SCHEDULERS[scheduler])


@pytest.mark.parametrize(
    ("name", "kwargs"), [("SGD", {"momentum": 0.9}), ("RMSprop", {"momentum": 0.9}), ("Adam", {})]
)
def test_a_schedule_of_momentum(name, kwargs):
    def one_cycle(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=101)

    assert_parity(name, kwargs, steps=100, scheduler=one_cycle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("name", "kwargs", "flag"),
    [(*case, flag) for case in CASES for flag in ("default", "foreach")]
    + [(*case, "fused") for case in FUSED],
)
def test_error_against_torchs_own(name, kwargs, flag, dtype):
    options = {**kwargs, "lr": 0.01, "eps": 1e-3} if name != "SGD" else {**kwargs, "lr": 0.01}
    flags = {} if flag == "default" else {flag: True}
    truth = tensors(*train(theirs(name), options, steps=30, truth_of=dtype))
    torchs = tensors(*train(theirs(name), options | flags, steps=30, dtype=dtype))
    actual = tensors(*train(ours(name), options | flags, steps=30, dtype=dtype))
    assert_as_good(actual, torchs, truth)


@pytest.mark.parametrize(("name", "kwargs"), CASES)
def test_float32_is_equal_to_torchs(name, kwargs):
    assert_parity(name, kwargs, dtype=torch.float32)


@pytest.mark.parametrize(("name", "kwargs"), FUSED)
def test_fused(name, kwargs):
    assert_parity(name, kwargs | {"fused": True}, rtol=1e-14)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(("name", "kwargs"), CASES)
def test_the_update_under_test_runs(name, kwargs, foreach, monkeypatch):
    module, update = UPDATES[name]
    for function in ("sgd", "rmsprop", "adam"):  # torch's own updates, which must not run
        monkeypatch.delattr(importlib.import_module(f"torch.optim.{function}"), function)
    for_lists = spy(monkeypatch, module, f"foreach_{update}")
    for_one = spy(monkeypatch, module, update)
    train(ours(name), kwargs | {"foreach": foreach}, steps=3)
    assert bool(for_lists) == foreach
    assert bool(for_one) != foreach


@pytest.mark.parametrize(("name", "kwargs"), CASES)
def test_compiled_traces_once_for_all_shapes_and_steps(name, kwargs, monkeypatch):
    compilations = traced(monkeypatch)
    scheduler = SCHEDULERS["exponential"]
    options = kwargs | {"lr": 0.01}
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_parity(name, options, backend="compiled", rtol=1e-13, scheduler=scheduler)
    assert len(compilations) == 1  # tensors of no element and of one take the formula


@DEPRECATED_BY_TORCH
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("inductor")
def test_compiled_by_inductor(name):
    assert_parity(name, {}, dtype=torch.float64, backend="compiled", rtol=1e-13)


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_compiled_bumps_versions(name, monkeypatch):
    traced(monkeypatch)
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = ours(name)([w])
    loss = (w * w).sum()
    w.grad = torch.ones(3)
    with torchref.backend("compiled"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("direction", ["ours to torch", "torch to ours"])
@pytest.mark.parametrize(("name", "kwargs"), CASES)
def test_state_dicts_swap_midway(name, kwargs, direction, foreach):
    options = kwargs | {"foreach": foreach}
    first, second = ours(name), theirs(name)
    if direction == "torch to ours":
        first, second = second, first
    params = make_params()
    optimizer = first(params, **options)
    for i, _ in enumerate(gradients(params, 20)):
        if i == 10:
            saved = io.BytesIO()
            torch.save(optimizer.state_dict(), saved)
            saved.seek(0)
            optimizer = second(params, **options)
            optimizer.load_state_dict(torch.load(saved, weights_only=True))
        optimizer.step()
    expected = tensors(*train(theirs(name), options, steps=20))
    assert_equal(tensors(params, optimizer), expected)


@pytest.mark.parametrize(("name", "kwargs"), CASES)
def test_state_dicts_have_torchs_keys(name, kwargs):
    _, mine = train(ours(name), kwargs, steps=3)
    _, other = train(theirs(name), kwargs, steps=3)
    assert mine.defaults == other.defaults
    assert list(mine.defaults) == list(other.defaults)
    a, b = mine.state_dict(), other.state_dict()
    assert a["param_groups"] == b["param_groups"]
    assert {k: list(v) for k, v in a["state"].items()} == {
        k: list(v) for k, v in b["state"].items()
    }


@pytest.mark.parametrize("copied", ["pickle", "deepcopy"])
@pytest.mark.parametrize("name", NAMES)
def test_copies_continue(name, copied):
    params, optimizer = train(ours(name), {}, steps=3)
    both = (params, optimizer)
    again = pickle.loads(pickle.dumps(both)) if copied == "pickle" else copy.deepcopy(both)
    for params_, optimizer_ in (both, again):
        for _ in gradients(params_, 3):
            optimizer_.step()
    assert_equal(tensors(*again), tensors(*both))


@pytest.mark.parametrize("name", ["RMSprop", "Adam", "AdamW"])
def test_old_state_dicts(name):
    """Before torch 1.12 the step was a number and younger options did not exist."""
    params, optimizer = train(ours(name), {}, steps=3)
    old = optimizer.state_dict()
    for state in old["state"].values():
        state["step"] = int(state["step"])
    for group in old["param_groups"]:
        for key in ("foreach", "maximize", "capturable", "differentiable"):
            del group[key]
    again = ours(name)(params)
    again.load_state_dict(old)
    for _ in gradients(params, 1):
        again.step()
    assert all(state["step"] == 4 for i, state in enumerate(again.state.values()) if i != 3)


@pytest.mark.parametrize("name", NAMES)
def test_is_torchs_class_with_torchs_signature(name):
    assert issubclass(ours(name), theirs(name))
    mine = inspect.signature(ours(name).__init__).parameters
    other = inspect.signature(theirs(name).__init__).parameters
    added = [mine[key] for key in mine if key not in other]
    assert [(p.name, p.default, p.kind) for p in mine.values() if p.name in other] == [
        (p.name, p.default, p.kind) for p in other.values()
    ]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in added)
    own = ["lr_in_velocity"] if name == "SGD" else []
    options = ["max_norm", "ema_decay", "ema_bias_correction", "state_dtype"]
    assert [p.name for p in added] == own + options
    assert inspect.signature(ours(name).step).parameters.keys() == {"self", "closure"}


def test_adamw_is_an_adam():
    assert issubclass(torchref.optim.AdamW, torchref.optim.Adam)


@pytest.mark.parametrize("name", NAMES)
def test_hooks_closure_and_groups(name):
    w, u = (torch.nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    seen = []
    results = []
    for cls in (ours(name), theirs(name)):
        w.data.fill_(1.0)
        u.data.fill_(1.0)
        optimizer = cls([{"params": [w], "lr": 0.5}, {"params": [u], "weight_decay": 0.3}])
        optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
        optimizer.register_step_post_hook(lambda *_: seen.append("after"))

        def closure(optimizer=optimizer):
            optimizer.zero_grad()
            loss = (w * w).sum() + u.sum()
            loss.backward()
            return loss

        assert optimizer.step(closure).item() == 4.0
        results.append((w.detach().clone(), u.detach().clone()))
    assert seen == ["before", "after"] * 2
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_left_alone(name):
    params, optimizer = train(ours(name), {"weight_decay": 0.1, "maximize": True}, steps=2)
    for _ in gradients(params, 1):
        before = [p.grad.clone() for p in params]
        optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=True))


@pytest.mark.parametrize("backend", ["auto", "compiled"])
@pytest.mark.parametrize("name", NAMES)
def test_layouts_that_differ_between_parameter_and_gradient(name, backend, monkeypatch):
    traced(monkeypatch)
    results = []
    for cls in (ours(name), theirs(name)):
        base = torch.arange(24.0, dtype=torch.float64).reshape(4, 6)
        params = [
            torch.nn.Parameter(base.clone().t()),  # dense, not contiguous
            torch.nn.Parameter(base.clone()[:, ::2]),  # not dense
            torch.nn.Parameter(base.clone().reshape(2, 3, 2, 2)),
        ]
        optimizer = cls(params, lr=0.1)
        for scale in (1.0, -2.0):
            params[0].grad = scale * torch.ones_like(params[0])
            params[1].grad = scale * torch.ones(3, 4, dtype=torch.float64).t()
            params[2].grad = scale * torch.ones_like(params[2], memory_format=torch.channels_last)
            with torchref.backend(backend):
                optimizer.step()
        results.append(tensors(params, optimizer))
    for key, value in results[1].items():
        torch.testing.assert_close(results[0][key], value, rtol=1e-13, atol=0)


def _scaled_steps(cls, kwargs, backend="auto"):
    """Five steps under GradScaler, some of which overflow."""
    # Torch's velocity is uninitialized memory after an overflow in the first step.
    overflows = (2,) if kwargs.get("momentum") else (0, 2)
    params = [torch.nn.Parameter(torch.linspace(-1, 1, 6).reshape(2, 3))]
    optimizer = cls(params, fused=True, **kwargs)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    seen = []
    with torchref.backend(backend):
        for i in range(5):
            optimizer.zero_grad()
            factor = torch.tensor(float("inf") if i in overflows else i + 1.0)
            scaler.scale((params[0].square() * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            seen.append(params[0].detach().clone())
            seen.append(params[0].grad.clone())
    return seen, tensors(params, optimizer)


@pytest.mark.parametrize("backend", ["auto", "compiled"])
@pytest.mark.parametrize(("name", "kwargs"), FUSED)
def test_grad_scaler_inside_fused(name, kwargs, backend, monkeypatch):
    if backend == "compiled":
        traced(monkeypatch)
    seen, state = _scaled_steps(ours(name), kwargs, backend)
    torch_seen, torch_state = _scaled_steps(theirs(name), kwargs)
    for a, b in zip(seen, torch_seen, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert list(state) == list(torch_state)
    for key, value in torch_state.items():
        torch.testing.assert_close(state[key], value, rtol=1e-6, atol=1e-7)
    if "step 0" in state:
        assert state["step 0"] == 3


def test_only_fused_takes_the_scale():
    w = [torch.nn.Parameter(torch.ones(1))]
    for name in NAMES:
        assert not hasattr(ours(name)(w), "_step_supports_amp_scaling")
    for name in ("SGD", "Adam", "AdamW"):
        assert ours(name)(w, fused=True)._step_supports_amp_scaling


@pytest.mark.parametrize("name", ["RMSprop", "Adam", "AdamW"])
def test_errors_of_misuse_are_torchs(name):
    for kwargs in ({"capturable": True}, {"foreach": True, "differentiable": True}):
        messages = []
        for cls in (ours(name), theirs(name)):
            w = torch.nn.Parameter(torch.ones(2))
            w.grad = torch.ones(2)
            optimizer = cls([w], **kwargs)
            with pytest.raises(AssertionError) as error:
                optimizer.step()
            messages.append(str(error.value))
        assert messages[0] == messages[1]


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_complex(name, foreach):
    results = []
    for cls in (ours(name), theirs(name)):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(3, 2, dtype=torch.complex128)) for _ in range(2)]
        params.append(torch.nn.Parameter(torch.randn(4, dtype=torch.float64)))
        options = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {"amsgrad": True}
        optimizer = cls(params, weight_decay=0.1, foreach=foreach, **options)
        for _ in range(10):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        results.append(tensors(params, optimizer))
    # Torch multiplies the weight decay as a complex number, which rounds differently.
    assert_close(*results, rtol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_complex_compiled(name, monkeypatch):
    traced(monkeypatch)
    results = []
    for cls, backend in ((ours(name), "compiled"), (theirs(name), "auto")):
        w = torch.nn.Parameter(torch.ones(3, dtype=torch.complex128))
        optimizer = cls([w], lr=0.1)
        for i in range(3):
            w.grad = torch.full_like(w, complex(i, 1))
            with torchref.backend(backend):
                optimizer.step()
        results.append(w.detach())
    torch.testing.assert_close(*results, rtol=1e-13, atol=0)


def _differentiable_steps(cls, kwargs, start, lr, grads):
    w = start.clone()
    optimizer = cls([w], lr=lr, differentiable=True, **kwargs)
    for grad in grads:
        w.grad = grad.clone()
        optimizer.step()
    return w


@pytest.fixture
def _float64_steps():
    """Torch counts steps in the default type, and its differentiable Adam computes in it."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# Torch's second step overwrites what autograd saved of these two options' averages.
TORCH_DIFFERENTIATES = [c for c in CASES if not {"centered", "amsgrad"} & set(c[1])]


@pytest.mark.usefixtures("_float64_steps")
@pytest.mark.parametrize(("name", "kwargs"), TORCH_DIFFERENTIATES)
def test_differentiable(name, kwargs):
    """Gradients through three steps, with respect to where they start and to each gradient."""
    results = []
    for cls in (ours(name), theirs(name)):
        inputs = [torch.linspace(0.5, 2, 4) + i for i in range(4)]
        start, *grads = [x.requires_grad_() for x in inputs]
        w = _differentiable_steps(cls, kwargs, start, 0.1, grads)
        gradients_ = torch.autograd.grad(w.square().sum(), inputs, allow_unused=True)
        results.append((w.detach(), *gradients_))
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)  # a velocity's first gradient, in torch's choice
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("_float64_steps")
@pytest.mark.parametrize(("name", "kwargs"), CASES)
def test_differentiable_against_differences(name, kwargs):
    """With the learning rate, which torch differentiates only in SGD and Adam."""
    if kwargs.get("momentum") and name == "SGD":
        return  # the first gradient is cut off by torch's choice
    start, g1, g2 = (torch.linspace(0.5, 2, 4).add(i).requires_grad_() for i in range(3))
    lr = torch.tensor(0.1, requires_grad=True)

    def steps(start, lr, *grads):
        return _differentiable_steps(ours(name), kwargs, start, lr, grads)

    assert torch.autograd.gradcheck(steps, (start, lr, g1, g2))


@pytest.mark.parametrize("lr", [torch.tensor(0.01), torch.tensor([0.01])], ids=["0d", "1d"])
@pytest.mark.parametrize("backend", ["auto", "compiled"])
@pytest.mark.parametrize("name", NAMES)
def test_tensor_lr(name, lr, backend, monkeypatch):
    traced(monkeypatch)
    assert_parity(name, {"lr": lr}, backend=backend, rtol=1e-7 if backend == "compiled" else 0)


def test_tensor_betas():
    betas = (torch.tensor(0.8), torch.tensor([0.9]))
    assert_parity("Adam", {"betas": betas, "amsgrad": True, "weight_decay": 0.1})


@DEPRECATED_BY_TORCH
@pytest.mark.parametrize("name", NAMES)
def test_under_torch_compile(name):
    """As many graphs and breaks as torch's own, one graph for every step."""

    def run(cls, compiled):
        torch._dynamo.reset()
        counters.clear()
        w = torch.nn.Parameter(torch.linspace(-1, 1, 10, dtype=torch.float64))
        optimizer = cls([w], lr=torch.tensor(0.1, dtype=torch.float64))
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        for i in range(4):
            w.grad = torch.full_like(w, i + 1.0)
            step()
        counts = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        return tensors([w], optimizer), counts

    counters = torch._dynamo.utils.counters
    expected, _ = run(theirs(name), compiled=False)
    _, counts = run(theirs(name), compiled=True)
    actual, our_counts = run(ours(name), compiled=True)
    assert our_counts == counts
    for key, value in actual.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-12, atol=0)


@pytest.fixture
def one_process_mesh():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("backend", ["auto", "compiled"])
@pytest.mark.parametrize("name", NAMES)
def test_dtensor(name, backend, one_process_mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    def sharded(value):
        return distribute_tensor(torch.full((4, 3), value), one_process_mesh, [Shard(0)])

    results = []
    for cls in (ours(name), theirs(name)):
        w = torch.nn.Parameter(sharded(1.0))
        optimizer = cls([w], lr=0.1, weight_decay=0.1)
        for i in range(3):
            w.grad = sharded(i + 1.0)
            with torchref.backend(backend):
                optimizer.step()
        results.append(w.full_tensor().detach())
    assert torch.equal(*results)

"""Options that torch's optimizers have not: clipping and averaging in the step, state types."""

import copy
import io
import pickle

import pytest
import torch
from optim_parity import (
    NAMES,
    assert_close,
    assert_equal,
    gradients,
    make_params,
    ours,
    tensors,
    theirs,
    traced,
    train,
)
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import torchref
from torchref.optim import _optimizer

FLAGS = [{}, {"foreach": True}, {"fused": True}]
BACKENDS = ["auto", "compiled"]


def flags_of(name, flags):
    return {} if name == "RMSprop" and "fused" in flags else flags  # torch has no such flag


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e3])
@pytest.mark.parametrize("name", NAMES)
def test_max_norm_clips_as_clip_grad_norm_does(name, max_norm, flags, backend):
    options = flags_of(name, flags)
    expected = make_params()
    optimizer = theirs(name)(expected, **options)
    norms = []
    for _ in gradients(expected, 8):
        norms.append(clip_grad_norm_(expected, max_norm))
        optimizer.step()
    actual = make_params()
    with torchref.backend(backend):
        clipping = ours(name)(actual, max_norm=max_norm, **options)
        for norm, _ in zip(norms, gradients(actual, 8), strict=True):
            before = [None if p.grad is None else p.grad.clone() for p in actual]
            clipping.step()
            torch.testing.assert_close(clipping.grad_norm, norm, rtol=1e-14, atol=0)
            for p, grad in zip(actual, before, strict=True):
                assert (p.grad is None and grad is None) or torch.equal(p.grad, grad)
    assert_close(tensors(actual, clipping), tensors(expected, optimizer), rtol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_the_norm_is_of_all_groups_and_each_has_its_own_limit(name):
    results = []
    for cls in (ours(name), theirs(name)):
        w, u, free = (torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(3))
        for i, p in enumerate((w, u, free)):
            p.grad = torch.full_like(p, i + 1.0)
        groups = [{"params": [w]}, {"params": [u]}, {"params": [free]}]
        if cls is ours(name):
            groups[0]["max_norm"], groups[1]["max_norm"] = 0.5, 2.0
        else:
            norm = torch.cat([w.grad, u.grad, free.grad]).norm()
            w.grad *= 0.5 / (norm + 1e-6)
            u.grad *= 2.0 / (norm + 1e-6)
        optimizer = cls(groups, lr=0.1)
        optimizer.step()
        results.append([p.detach() for p in (w, u, free)])
    torch.testing.assert_close(*results, rtol=1e-13, atol=0)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_norm_that_is_not_finite_clips_as_torch_does(bad):
    results = []
    for cls in (torchref.optim.SGD, torch.optim.SGD):
        w = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        w.grad = torch.tensor([1.0, bad, -1.0], dtype=torch.float64)
        options = {"max_norm": 1.0} if cls is torchref.optim.SGD else {}
        optimizer = cls([w], lr=0.1, **options)
        if not options:
            clip_grad_norm_([w], 1.0)
        optimizer.step()
        results.append(w.detach())
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


def test_max_norm_is_of_gradients_without_their_scale():
    """Clipping the scaled gradients to the limit would leave a step 1024 times too small."""
    w = torch.nn.Parameter(torch.ones(2))
    optimizer = torchref.optim.SGD([w], lr=1.0, fused=True, max_norm=1.0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    w.grad = torch.tensor([3.0, 4.0]) * 1024
    optimizer.step()
    assert optimizer.grad_norm == 5.0
    torch.testing.assert_close(w.detach(), torch.tensor([0.4, 0.2]))


def averaged_by_torch(name, steps, kwargs, dtype=torch.float64):
    """Parameters, and their average by torch, after steps in which some parameters pause."""
    params = make_params(dtype)
    model = torch.nn.ParameterList(params)
    average = None
    optimizer = theirs(name)(params, **kwargs)
    for _ in gradients(params, steps):
        if average is None:
            average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        optimizer.step()
        average.update_parameters(model)
    return params, [p.detach() for p in average.module]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_ema_is_torchs_averaged_model(name, flags, backend):
    options = flags_of(name, flags)
    params, averages = averaged_by_torch(name, 12, options)
    with torchref.backend(backend):
        actual, optimizer = train(ours(name), options | {"ema_decay": 0.9}, steps=12)
    for p, q in zip(actual, params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)
    for ema, average in zip(optimizer.ema_parameters(), averages, strict=True):
        torch.testing.assert_close(ema, average, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_ema_with_bias_correction_is_in_closed_form(name):
    decay, history = 0.8, []
    params = make_params()
    optimizer = ours(name)(params, ema_decay=decay, ema_bias_correction=True)
    for _ in gradients(params, 9):
        optimizer.step()
        history.append([p.detach().clone() for p in params])
    weights = (1 - decay) * decay ** torch.arange(8, -1, -1, dtype=torch.float64)
    for i, ema in enumerate(optimizer.ema_parameters()):
        values = torch.stack([step[i] for step in history])
        expected = torch.tensordot(weights, values, 1) / weights.sum()
        torch.testing.assert_close(ema, expected, rtol=1e-12, atol=1e-13)


def test_a_first_gradient_that_comes_late_finds_the_average_of_a_constant():
    """Starting the average there would forget the steps before."""
    results = []
    for cls in (torchref.optim.SGD, torch.optim.SGD):
        w, late = (torch.nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2))
        model = torch.nn.ParameterList([w, late])
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        ema = {"ema_decay": 0.9} if cls is torchref.optim.SGD else {}
        optimizer = cls([w, late], lr=0.5, **ema)
        for step in range(4):
            w.grad = torch.ones_like(w)
            late.grad = torch.ones_like(late) if step >= 2 else None
            optimizer.step()
            average.update_parameters(model)
        results.append(optimizer.ema_parameters() if ema else [p.detach() for p in average.module])
    torch.testing.assert_close(*results, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_averages_of_half_types_do_not_stall(dtype):
    """In bfloat16 an average with decay 0.999 never leaves its start."""
    w = torch.nn.Parameter(torch.ones(4, dtype=dtype))
    optimizer = torchref.optim.SGD([w], lr=0.0, ema_decay=0.999)
    for step in range(100):
        w.grad = torch.zeros_like(w)
        optimizer.step()
        if step == 0:
            w.data.fill_(2.0)
    (ema,) = optimizer.ema_parameters()
    assert ema.dtype == torch.float32
    torch.testing.assert_close(ema, torch.full((4,), 2 - 0.999**99), rtol=1e-5, atol=0)


def test_averaged_swaps_for_a_block_and_back_even_after_an_error():
    params, optimizer = train(ours("Adam"), {"ema_decay": 0.9}, steps=5)
    before = [p.detach().clone() for p in params]
    averages = [ema.clone() for ema in optimizer.ema_parameters()]
    seen = []

    def fail_in_the_block():
        with optimizer.averaged():
            seen.extend(p.detach().clone() for p in params)
            raise KeyError

    with pytest.raises(KeyError):
        fail_in_the_block()
    assert all(torch.equal(x, ema) for x, ema in zip(seen, averages, strict=True))
    assert all(torch.equal(p, x) for p, x in zip(params, before, strict=True))
    assert all(
        torch.equal(x, ema) for x, ema in zip(optimizer.ema_parameters(), averages, strict=True)
    )


def test_without_ema_the_parameters_are_their_own_average():
    params, optimizer = train(ours("Adam"), {}, steps=2)
    for p, ema in zip(params, optimizer.ema_parameters(), strict=True):
        assert torch.equal(p, ema)
        assert not ema.requires_grad


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_an_overflow_moves_no_average_and_no_count(name):
    w = torch.nn.Parameter(torch.ones(3))
    pauses = torch.nn.Parameter(torch.ones(3))
    optimizer = ours(name)([w, pauses], fused=True, ema_decay=0.5, max_norm=1.0)
    w.grad, pauses.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    before = {key: x.clone() for key, x in tensors([w, pauses], optimizer).items()}
    pauses.grad = None
    w.grad = torch.full((3,), float("inf"))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    optimizer.step()
    assert_equal(tensors([w, pauses], optimizer), before)
    optimizer.found_inf = torch.tensor(0.0)
    w.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[w]["ema_step"] == optimizer.state[pauses]["ema_step"] == 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_state_of_float32_for_half_parameters(name, dtype, backend):
    """The state is float32's to its last digits: only the parameter is rounded."""
    momentum = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    with torchref.backend(backend):
        cls, options = ours(name), {**momentum, "state_dtype": torch.float32}
        params, optimizer = train(cls, options, steps=12, dtype=dtype)
    reference = [torch.nn.Parameter(p.detach().float()) for p in make_params(dtype)]
    rounded = make_params(dtype)
    expected = theirs(name)(reference, **momentum)
    for _ in gradients(rounded, 12):
        for p, r in zip(reference, rounded, strict=True):
            p.grad = None if r.grad is None else r.grad.float()
        expected.step()
        for p in reference:
            p.data.copy_(p.data.to(dtype))
    for p, q in zip(params, reference, strict=True):
        assert p.dtype == dtype
        for key, x in expected.state[q].items():
            mine = optimizer.state[p][key]
            assert mine.dtype == torch.float32
            torch.testing.assert_close(mine, x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_state_dicts_keep_averages_and_state_types(name):
    """Torch casts a state to its parameter's type when it is loaded."""
    momentum = {"momentum": 0.9} if name == "SGD" else {}
    options = {"ema_decay": 0.99, "state_dtype": torch.float32, "max_norm": 2.0, **momentum}
    params, optimizer = train(ours(name), options, steps=5, dtype=torch.bfloat16)
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    again = ours(name)(copies, **options)
    again.load_state_dict(torch.load(saved, weights_only=True))
    assert_equal(tensors(copies, again), tensors(params, optimizer))
    pickled, pickled_optimizer = pickle.loads(pickle.dumps((params, optimizer)))
    runs = [(params, optimizer), (copies, again), (pickled, pickled_optimizer)]
    for run, stepping in runs:
        for _ in gradients(run, 3):
            stepping.step()
    for run, stepping in runs[1:]:
        assert_equal(tensors(run, stepping), tensors(params, optimizer))


def test_a_learning_rate_that_a_schedule_rounded_to_below_zero_is_loaded():
    optimizer = theirs("SGD")([torch.nn.Parameter(torch.ones(1))], lr=0.3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 3, 0.0, 4)
    for _ in range(4):
        optimizer.step()
        schedule.step()
    assert -1e-15 < optimizer.param_groups[0]["lr"] < 0
    again = ours("SGD")([torch.nn.Parameter(torch.ones(1))])
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_of_torchs_leaves_our_options_on(name):
    """Or clipping would end without a word where training resumes."""
    options = {"max_norm": 0.5, "ema_decay": 0.9, "state_dtype": torch.float32}
    params, torchs = train(theirs(name), {}, steps=3)
    optimizer = ours(name)(params, **options)
    optimizer.load_state_dict(torchs.state_dict())
    assert {key: optimizer.param_groups[0][key] for key in options} == options
    for _ in gradients(params, 1):
        optimizer.step()
    assert optimizer.grad_norm is not None
    # torch continues from a state with averages in it
    theirs(name)(params).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_averages_come_back_from_torch_in_their_own_types(name):
    """Torch casts them to bfloat16, in which a count stops at 256."""
    options = {"ema_decay": 0.99}
    params, optimizer = train(ours(name), options, steps=3, dtype=torch.bfloat16)
    torchs = theirs(name)(params)
    torchs.load_state_dict(optimizer.state_dict())
    again = ours(name)(params, **options)
    again.load_state_dict(torchs.state_dict())
    for p in params:
        assert again.state[p]["ema"].dtype == again.state[p]["ema_step"].dtype == torch.float32


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_only_half_types_have_a_state_of_another_type(name, foreach):
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.complex64)
    params = [torch.nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in dtypes]
    momentum = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = ours(name)(params, state_dtype=torch.float32, foreach=foreach, **momentum)
    for _ in range(3):
        for p in params:
            p.grad = torch.full_like(p, 0.5 + (0.5j if p.is_complex() else 0))
        optimizer.step()
    key = optimizer._state_keys[0]
    state_types = [optimizer.state[p][key].dtype for p in params]
    assert state_types == [torch.float32, torch.float64, torch.float32, torch.complex64]
    assert (params[3].detach().imag != 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_has_no_norm(name):
    params = make_params()
    optimizer = ours(name)(params, max_norm=1.0, ema_decay=0.5)
    optimizer.step()
    assert optimizer.grad_norm == 0
    assert_equal(tensors(params, optimizer), tensors(make_params(), optimizer))


@pytest.mark.parametrize("name", NAMES)
def test_options_leave_no_trace_where_they_are_off(name):
    plain, optimizer = ours(name)(make_params()), theirs(name)(make_params())
    assert plain.state_dict() == optimizer.state_dict()
    assert plain.defaults == optimizer.defaults


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_norm": -1.0}, "expected `max_norm` >= 0, got -1.0"),
        ({"max_norm": float("nan")}, "expected `max_norm` >= 0, got nan"),
        ({"ema_decay": 1.0}, r"expected `ema_decay` in \[0, 1\), got 1.0"),
        ({"ema_decay": -0.1}, r"expected `ema_decay` in \[0, 1\), got -0.1"),
        ({"state_dtype": torch.float64}, "expected `state_dtype` to be None or torch.float32"),
    ],
)
def test_wrong_options(name, options, message):
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        ours(name)(make_params(), **options)
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        ours(name)([{"params": make_params(), **options}])
    optimizer = ours(name)(make_params())
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        optimizer.add_param_group({"params": make_params(), **options})
    assert len(optimizer.param_groups) == 1


def test_bias_correction_needs_an_average():
    with pytest.raises(ValueError, match="Adam: `ema_bias_correction` needs `ema_decay`"):
        torchref.optim.Adam(make_params(), ema_bias_correction=True)
    # as a group's own options, beside the optimizer's, in either place
    groups = [{"params": make_params(), "ema_bias_correction": True}]
    torchref.optim.Adam(groups, ema_decay=0.9).add_param_group(
        {"params": make_params(), "ema_decay": None}
    )


def test_hooks_of_state_dicts_see_and_change_everything():
    params, optimizer = train(ours("Adam"), {"ema_decay": 0.9}, steps=2)
    saved = optimizer.state_dict()
    optimizer.register_load_state_dict_pre_hook(lambda _, wrapped: wrapped["inside"])

    def sevens(optimizer):
        for state in optimizer.state.values():
            state["ema"] = torch.full_like(state["ema"], 7.0)

    optimizer.register_load_state_dict_post_hook(sevens)
    optimizer.load_state_dict({"inside": saved})
    assert (optimizer.state[params[3]]["ema"] == 7).all()
    optimizer.register_state_dict_post_hook(lambda _, state_dict: {"inside": state_dict})
    assert set(optimizer.state_dict()) == {"inside"}
    assert len(optimizer._optimizer_load_state_dict_post_hooks) == 1  # ours leave no trace


def test_a_state_that_is_none_is_loaded():
    """Torch wrote them for SGD without momentum."""
    optimizer = torchref.optim.SGD(make_params(), state_dtype=torch.float32)
    saved = optimizer.state_dict()
    saved["state"] = {0: {"momentum_buffer": None}}
    optimizer.load_state_dict(saved)


def _unscaled_norm_forgotten(self, launch, left, grad_scale):
    return norm_of(self, launch, left, None)


norm_of = _optimizer.Optimizer._norm


def test_a_norm_of_scaled_gradients_is_caught(monkeypatch):
    monkeypatch.setattr(_optimizer.Optimizer, "_norm", _unscaled_norm_forgotten)
    with pytest.raises(AssertionError):
        test_max_norm_is_of_gradients_without_their_scale()


@pytest.mark.parametrize("name", NAMES)
def test_an_average_of_the_parameters_before_their_step_is_caught(name, monkeypatch):
    step, average = ours(name)._formula, _optimizer.average

    def too_early(self, rows, group, *args):
        average(rows, group, None)
        step(self, rows, group, *args)

    monkeypatch.setattr(ours(name), "_formula", too_early)
    monkeypatch.setattr(_optimizer, "average", lambda *args: None)
    with pytest.raises(AssertionError):
        test_ema_is_torchs_averaged_model(name, {}, "auto")


def test_fused_runs_uncompiled_without_a_compiler_and_says_so(monkeypatch):
    compilations = traced(monkeypatch)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    torchref.compilation.can_compile.cache_clear()
    try:
        with pytest.warns(UserWarning, match="fused steps run uncompiled: no C"):
            fused = tensors(*train(ours("Adam"), {"fused": True}, steps=3))
    finally:
        torchref.compilation.can_compile.cache_clear()
    assert not compilations
    assert_close(fused, tensors(*train(theirs("Adam"), {"fused": True}, steps=3)), rtol=1e-14)


def test_a_copy_of_an_optimizer_has_its_own_average():
    params, optimizer = train(ours("Adam"), {"ema_decay": 0.9}, steps=2)
    copied, again = copy.deepcopy((params, optimizer))
    for _ in gradients(copied, 1):
        again.step()
    assert not torch.equal(again.ema_parameters()[3], optimizer.ema_parameters()[3])

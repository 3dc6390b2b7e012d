"""Steps, norms and clipping of all tensors in one launch, against torch's own.

A result is as good as torch's where its error against float64 is at most twice torch's and 8 eps.
"""

import copy
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton.language as tl
from kernel_compiling import recorded
from optim.optim_parity import (
    CASES,
    NAMES,
    SHAPES,
    assert_as_good,
    assert_equal,
    memory_format,
    ours,
    tensors,
    theirs,
)
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

import torchref
from torchref import dispatch
from torchref.optim import _one_launch, _optimizer
from torchref.triton_kernels import _launch, _tables, multi_tensor

if os.environ.get("TRITON_INTERPRET") != "1" or dispatch.get_backend() != "triton":
    pytest.skip(
        "waits for a process with TRITON_INTERPRET=1 TORCHREF_BACKEND=triton",
        allow_module_level=True,
    )

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [FP32, BF16, FP16]
# In half types the error of one element is a draw, that of dozens together is not.
HALF_SHAPES = [(61,), (0,), (5, 13), (67,), (2, 3, 4, 5)]
STEP, NORM = ["_step_kernel"], ["_squares_kernel", "_norm_kernel"]
BLOCK, CHUNK = _tables.BLOCK.value, _tables.CHUNK.value

# For each optimizer, with every tensor of state that it may have.
FULL: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "dampening": 0.5},
    "RMSprop": {"momentum": 0.9, "centered": True, "eps": 1e-3},
    "Adam": {"amsgrad": True, "eps": 1e-3},
    "AdamW": {"amsgrad": True, "eps": 1e-3, "weight_decay": 0.1},
}


@pytest.fixture(autouse=True)
def _optimizers_between_guards(between_guards, monkeypatch):
    monkeypatch.setattr(_one_launch, "find_kernel", dispatch.find_kernel)


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels that were launched."""
    names: list[str] = []
    run = _launch._run

    def counted(kernel, *call):
        names.append(kernel.fn.__name__)
        run(kernel, *call)

    monkeypatch.setattr(_launch, "_run", counted)
    return names


def parameters(dtype: torch.dtype = FP32, shapes=None) -> list[Parameter]:
    shapes = shapes or (SHAPES if dtype == FP32 else HALF_SHAPES)
    generator = torch.Generator().manual_seed(len(shapes))
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    return [Parameter(x.to(dtype).contiguous(memory_format=memory_format(x))) for x in drawn]


def gradients(params: list[Parameter], steps: int) -> list[list[Tensor | None]]:
    """Of each step. The fourth parameter pauses in the third step."""
    generator = torch.Generator().manual_seed(steps + 1)

    def drawn(i: int, p: Parameter, step: int) -> Tensor | None:
        grad = torch.randn(p.shape, generator=generator) + 0.5
        return None if step % 5 == 2 and i == 3 else grad.to(p.dtype)

    return [[drawn(i, p, step) for i, p in enumerate(params)] for step in range(steps)]


def give(params: list[Parameter], grads: list[Tensor | None]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else torch.empty_like(p).copy_(g)


def trained(
    make: Callable[[list[Parameter]], torch.optim.Optimizer],
    params: list[Parameter],
    grads: list[list[Tensor | None]],
    clip: float | None = None,
    each_step: Callable[[], Any] = lambda: None,
) -> dict[str, Tensor]:
    """Parameters and state after a step of each of the gradients."""
    optimizer = make(params)
    for step in grads:
        give(params, step)
        if clip is not None:
            clip_grad_norm_(params, clip)
        optimizer.step()
        each_step()
    return tensors(params, optimizer)


def doubled(params: list[Parameter]) -> list[Parameter]:
    return [Parameter(p.detach().double()) for p in params]


def assert_as_good_as_torchs(
    name: str,
    kwargs: dict[str, Any],
    make: Callable[[], list[Parameter]],
    steps: int = 6,
    groups: Callable[[list[Parameter]], Any] = lambda params: params,
    clip: float | None = None,
    **options: Any,
) -> None:
    """``options`` are ours alone; ``clip`` is the norm that torch's gradients are clipped to."""
    grads = gradients(make(), steps)

    def build(cls, kwargs):
        return lambda params: cls(groups(params), **copy.deepcopy(kwargs))

    truth = trained(build(theirs(name), kwargs), doubled(make()), grads, clip)
    torchs = trained(build(theirs(name), kwargs), make(), grads, clip)
    actual = trained(build(ours(name), kwargs | options), make(), grads)
    assert_as_good(actual, torchs, truth)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Adam", {"betas": (0.0, 0.9)}),
        ("RMSprop", {"alpha": 0.0, "centered": True, "eps": 1.0}),
    ],
)
def test_an_average_forgets_a_gradient_that_was_large(name, options):
    """With m + (g - m), the small gradient after a large one is rounded away."""
    params = [Parameter(torch.zeros(3)) for _ in range(2)]
    optimizers = [
        library(name)([p], **options) for library, p in zip((ours, theirs), params, strict=True)
    ]
    for size in (1e8, 1.0):
        for p, optimizer in zip(params, optimizers, strict=True):
            p.grad = torch.full((3,), size)
            optimizer.step()
    key = "grad_avg" if name == "RMSprop" else "exp_avg"
    averages = [o.state[p][key] for p, o in zip(params, optimizers, strict=True)]
    assert averages[0].tolist() == averages[1].tolist() == [1.0] * 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "kwargs"), CASES)
def test_every_option(name, kwargs, dtype, launches):
    options = {"lr": 0.1} | kwargs  # so that what is wrong of a step is not lost in its parameter
    if name != "SGD":
        options["eps"] = 1e-3  # which half types have
    assert_as_good_as_torchs(name, options, lambda: parameters(dtype), steps=3)
    assert launches == 3 * STEP


AROUND_BLOCKS = [(n,) for n in (1, BLOCK - 1, BLOCK, BLOCK + 1, CHUNK - 1, CHUNK + 1)]


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_sizes_that_a_wrong_mask_shows_in(name, dtype, launches):
    assert_as_good_as_torchs(name, FULL[name], lambda: parameters(dtype, AROUND_BLOCKS), steps=2)
    assert launches == 2 * STEP


def test_a_tensor_of_several_chunks():
    sizes = [(CHUNK,), (3 * CHUNK + 1,), (2 * CHUNK - BLOCK,)]
    assert_as_good_as_torchs("Adam", {}, lambda: parameters(FP32, sizes), steps=2)


@pytest.fixture
def small_blocks(monkeypatch):
    for module in (_tables, multi_tensor):
        monkeypatch.setattr(module, "BLOCK", tl.constexpr(16))
    monkeypatch.setattr(_tables, "CHUNK", tl.constexpr(32))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", NAMES)
def test_more_tensors_and_chunks_than_a_block_has_elements(name):
    """The last program counts for all tensors, and the norm is of all chunks' sums."""
    shapes = [(n % 5,) for n in range(33)] + [(33,), (47,), (48,), (49,), (32 * 20 + 1,)]
    options = FULL[name] | ({} if name == "SGD" else {"eps": 1.0})
    assert_as_good_as_torchs(
        name, options, lambda: parameters(FP32, shapes), steps=2, clip=0.5, max_norm=0.5
    )


ENDS = [
    ("SGD", {"momentum": 0.9, "dampening": 1.0}),
    ("RMSprop", {"alpha": 0.0, "eps": 1e-3}),
    ("Adam", {"betas": (0.0, 0.0), "eps": 1e-3}),
    ("Adam", {"betas": (0.0, 0.999)}),
    ("AdamW", {"lr": 0.0}),
]


@pytest.mark.parametrize(("name", "kwargs"), ENDS)
def test_hyperparameters_at_their_ends(name, kwargs):
    """A beta of 0 has no logarithm."""
    assert_as_good_as_torchs(name, kwargs, parameters, steps=3)


def views(dtype: torch.dtype) -> list[Parameter]:
    """Dense, but at odd elements, and in other orders than rows first."""
    (x,) = parameters(dtype, [(8 * BLOCK,)])
    memory = x.detach().clone()
    matrix = memory[2 * BLOCK + 5 :][: 19 * 28]
    image = memory[4 * BLOCK + 7 :][:120]
    return [
        Parameter(memory[1 : BLOCK + 6]),
        Parameter(matrix.view(28, 19).t()),
        Parameter(image.view(2, 4, 5, 3).movedim(-1, 1)),
        Parameter(memory[5 * BLOCK : 6 * BLOCK]),  # aligned, among others that are not
    ]


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_memory_that_is_not_aligned_and_other_orders(name, dtype, launches):
    assert_as_good_as_torchs(name, FULL[name], lambda: views(dtype), steps=2)
    assert launches == 2 * STEP


@pytest.mark.parametrize("which", ["parameter", "gradient", "state", "average"])
def test_one_tensor_that_is_not_aligned_is_enough(which):
    """The row's flag is about all of its tensors, or vectors would be read across their edges."""
    memory = torch.randn(BLOCK + 8)
    w = Parameter(memory[which == "parameter" :][:BLOCK])
    optimizer = ours("AdamW")([w], ema_decay=0.5)
    w.grad = torch.randn_like(w)
    optimizer.step()
    state = optimizer.state[w]
    off = memory.clone()[1 : BLOCK + 1]
    if which == "gradient":
        w.grad = off
    elif which in ("state", "average"):
        key = {"state": "exp_avg_sq", "average": "ema"}[which]
        state[key] = off.copy_(state[key])
    else:
        w.grad = torch.randn_like(w)
    optimizer.step()
    (part,) = optimizer._in_one_launch.parts
    assert not part.tables.rows[_tables.FLAGS.value, 0] & _tables.ALIGNED.value


def test_words_cover_every_chunk_of_every_tensor_once():
    sizes = (0, 1, CHUNK, CHUNK + 1, 3 * CHUNK, 0)
    words = _tables.words_for(sizes, torch.device("cpu")).tolist()
    assert [(word >> 32, word & 0xFFFFFFFF) for word in words] == [
        (i, chunk) for i, n in enumerate(sizes) for chunk in range(max(1, math.ceil(n / CHUNK)))
    ]


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_half_parameters_with_float32_state(name, dtype, launches):
    """As torch's in float32, if it rounded its parameters after each step."""
    grads = gradients(parameters(dtype), 6)

    def rounded(make_wide):
        params = make_wide(parameters(dtype))

        def each_step():
            for p in params:
                p.data.copy_(p.data.to(dtype))

        def make(params):
            return theirs(name)(params, **FULL[name])

        result = trained(make, params, grads, each_step=each_step)
        return {key: x.to(dtype) if key[0] == "p" else x for key, x in result.items()}

    truth = rounded(doubled)
    torchs = rounded(lambda params: [Parameter(p.detach().float()) for p in params])
    cls = ours(name)
    actual = trained(
        lambda params: cls(params, **FULL[name], state_dtype=FP32), parameters(dtype), grads
    )
    assert launches == 6 * STEP
    assert_as_good(actual, torchs, truth)


@pytest.mark.parametrize("name", NAMES)
def test_one_launch_for_each_mix_of_types(name, launches):
    def mixed():
        return parameters(FP32) + parameters(BF16) + parameters(FP16)

    assert_as_good_as_torchs(name, FULL[name], mixed, steps=3)
    assert launches == 9 * STEP


def test_a_gradient_wider_than_its_parameter(launches):
    results = []
    for grad_dtype in (FP32, BF16):
        (w,) = parameters(BF16, [(9,)])
        w.grad_dtype = grad_dtype
        w.grad = torch.linspace(-1, 1, 9).to(BF16).to(grad_dtype)
        ours("AdamW")([w]).step()
        results.append(w.detach())
    assert torch.equal(*results)
    assert launches == 2 * STEP


GROUPS: dict[str, list[dict[str, Any]]] = {
    "SGD": [
        {"lr": 0.1, "weight_decay": 0.1},
        {"momentum": 0.9, "dampening": 0.5, "maximize": True},
        {"momentum": 0.5, "nesterov": True},
    ],
    "RMSprop": [
        {"lr": 0.1, "alpha": 0.9, "maximize": True},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"centered": True, "eps": 1e-2},
    ],
    "Adam": [
        {"lr": 0.1, "betas": (0.5, 0.9)},
        {"amsgrad": True, "maximize": True, "eps": 1e-2},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"weight_decay": 0.1, "decoupled_weight_decay": False},
    ],
    "AdamW": [{"weight_decay": 0.0}, {"weight_decay": 0.1, "amsgrad": True}],
}


def in_groups(name: str) -> Callable[[list[Parameter]], list[dict[str, Any]]]:
    """Each group has parameters of all sizes."""
    n = len(GROUPS[name])
    return lambda params: [{"params": params[i::n], **g} for i, g in enumerate(GROUPS[name])]


@pytest.mark.parametrize("name", NAMES)
def test_groups_with_options_of_their_own_are_one_launch(name, launches):
    assert_as_good_as_torchs(
        name, {}, lambda: parameters(FP32, [(9,), (5,), (8,), (7,), (3,)]), groups=in_groups(name)
    )
    assert launches == 6 * STEP


@pytest.mark.parametrize("name", NAMES)
def test_parameters_that_pause_keep_their_own_counts(name, launches):
    """Of two, they take turns; their bias corrections differ from then on."""
    results = []
    for cls in (ours(name), theirs(name)):
        params = parameters(FP32, [(5,), (7,)])
        optimizer = cls(params, lr=0.1, **FULL[name])
        for pattern in (0b01, 0b11, 0b10, 0b10, 0b11):
            give(params, [p.detach() if pattern >> i & 1 else None for i, p in enumerate(params)])
            optimizer.step()
        results.append(tensors(params, optimizer))
    for key, value in results[1].items():
        torch.testing.assert_close(results[0][key], value, rtol=2e-6, atol=1e-7)
    assert launches == 5 * STEP


@pytest.mark.parametrize("name", NAMES)
def test_a_learning_rate_that_is_a_tensor(name, launches, monkeypatch):
    """The device reads it: the host's is NaN. On the CPU the host would read it."""
    lr = torch.tensor(0.1)
    common = _optimizer.Optimizer._common_numbers
    monkeypatch.setattr(_one_launch, "_lr_tensor", lambda group: group["lr"])
    monkeypatch.setattr(
        _optimizer.Optimizer, "_common_numbers", lambda *args: (math.nan, *common(*args)[1:])
    )
    assert_as_good_as_torchs(name, {"lr": lr} | FULL[name], lambda: parameters(FP32), steps=3)
    assert launches == 3 * STEP


@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"dampening": 0.5, "maximize": True}])
def test_the_learning_rate_in_the_velocity(options, launches):
    """Against the formula, for torch has no such thing."""
    options = {"momentum": 0.9, "lr_in_velocity": True, **options}
    grads = gradients(parameters(), 5)

    def run(params):
        optimizers = []

        def make(params):
            optimizers.append(torchref.optim.SGD(params, lr=0.1, **options))
            return optimizers[0]

        def each_step():
            optimizers[0].param_groups[0]["lr"] *= 0.5

        return trained(make, params, grads, each_step=each_step)

    actual = run(parameters())
    assert launches == 5 * STEP
    with torchref.backend("reference"):
        assert_as_good(actual, run(parameters()), run(doubled(parameters())))


@pytest.mark.parametrize("max_norm", [0.5, 1e6, 0.0])
@pytest.mark.parametrize("name", NAMES)
def test_clipping_is_the_norm_and_a_step(name, max_norm, launches):
    options = FULL[name] | {"eps": 1.0} if name != "SGD" else FULL[name]
    assert_as_good_as_torchs(name, options, parameters, steps=3, clip=max_norm, max_norm=max_norm)
    assert launches == 3 * (NORM + STEP)


def test_clipping_leaves_gradients_and_tells_their_norm():
    params = parameters()
    optimizer = ours("AdamW")(params, max_norm=0.5)
    give(params, gradients(params, 1)[0])
    before = [p.grad.clone() for p in params]
    optimizer.step()
    assert all(map(torch.equal, [p.grad for p in params], before))
    norm = torch.cat([g.flatten().double() for g in before]).norm()
    torch.testing.assert_close(optimizer.grad_norm.double(), norm, rtol=1e-7, atol=0)


@pytest.mark.parametrize("max_norm", [1.0, math.inf])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_step_clipped_by_a_norm_that_is_not_finite(bad, max_norm):
    """A group that does not clip is spared; an infinite limit does clip, as in torch."""
    results = []
    for cls in (ours("SGD"), theirs("SGD")):
        clipped, free = params = parameters(FP32, [(5,), (7,)])
        give(params, gradients(params, 1)[0])
        clipped.grad[1] = bad
        optimizer = cls([{"params": [clipped]}, {"params": [free]}], lr=1.0)
        if cls is ours("SGD"):
            optimizer.param_groups[0]["max_norm"] = max_norm
        else:
            clip_grad_norm_([clipped], max_norm)
        optimizer.step()
        results.append(params)
    torch.testing.assert_close(*results, equal_nan=True)


def test_groups_clip_by_the_norm_of_all(launches):
    (w, u), (x, y) = parameters(FP32, [(5,), (7,)]), parameters(FP32, [(5,), (7,)])
    groups = [{"params": [w], "max_norm": 0.5}, {"params": [u]}]
    optimizer, torchs = ours("SGD")(groups, lr=1.0), theirs("SGD")([x, y], lr=1.0)
    for p in (w, u, x, y):
        p.grad = torch.ones_like(p)
    x.grad *= 0.5 / 12**0.5
    optimizer.step()
    torchs.step()
    torch.testing.assert_close([w, u], [x, y], rtol=2e-6, atol=1e-7)
    assert launches == NORM + STEP


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("corrected", [False, True])
def test_averages_of_the_weights(corrected, dtype, launches):
    """Of the weights as stored, after the step; against torch's, or the correction's definition."""
    decay, grads = 0.75, gradients(parameters(dtype), 7)
    model = torch.nn.ParameterList(parameters(dtype))
    optimizer = ours("AdamW")(
        model.parameters(), lr=0.1, ema_decay=decay, ema_bias_correction=corrected
    )
    multi_avg_fn = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
    torchs = torch.optim.swa_utils.AveragedModel(model.double(), multi_avg_fn=multi_avg_fn)
    for p in model:
        p.data = p.data.to(dtype)
    expected = [torch.zeros_like(p, dtype=torch.float64) for p in model]
    for step in grads:
        give(list(model), step)
        optimizer.step()
        torchs.update_parameters(copy.deepcopy(model).double())
        for e, p in zip(expected, model, strict=True):
            e.lerp_(p.detach().double(), 1 - decay)
    total = 1 - decay ** len(grads)
    if not corrected:
        expected, total = [p.detach() for p in torchs.module], 1.0
    for ema, e in zip(optimizer.ema_parameters(), expected, strict=True):
        assert ema.dtype == FP32
        torch.testing.assert_close(ema.double(), e / total, rtol=1e-6, atol=3e-7)
    assert launches == 7 * STEP


def everything(optimizer, params: list[Parameter]) -> dict[str, Tensor]:
    (part,) = optimizer._in_one_launch.parts
    grads = {f"grad {i}": p.grad for i, p in enumerate(params)}
    kept = tensors(params, optimizer) | grads | {"ticket": part.tables.ticket}
    return {key: x.clone() for key, x in kept.items()}


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_an_overflow_leaves_everything(name):
    params = parameters(FP32, [(CHUNK + 1,), (3,)])
    optimizer = ours(name)(params, fused=True, ema_decay=0.5, max_norm=1.0, **FULL[name])
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    give(params, gradients(params, 1)[0])
    optimizer.step()
    optimizer.found_inf = torch.tensor(1.0)
    params[0].grad[3] = params[1].grad[0] = math.inf
    before = everything(optimizer, params)
    optimizer.step()
    torch.testing.assert_close(everything(optimizer, params), before, rtol=0, atol=0)


def test_an_overflow_in_the_first_step_leaves_no_trace():
    for name in ("SGD", "Adam"):
        w, u = parameters(FP32, [(5,)]) + parameters(FP32, [(5,)])
        optimizer, other = ours(name)([w], fused=True, **FULL[name]), ours(name)([u], **FULL[name])
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(1.0)
        w.grad = torch.full_like(w, math.inf)
        optimizer.step()
        optimizer.found_inf = torch.tensor(0.0)
        for _ in range(2):
            w.grad, u.grad = torch.full_like(w, 2.0), torch.full_like(u, 0.5)
            optimizer.step()
            other.step()
        if name == "Adam":
            assert_equal(tensors([w], optimizer), tensors([u], other))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_the_scale_divides_and_gradients_lose_it(name, dtype, launches):
    """Also from the norm, which is that of the unscaled gradients."""
    params, others = parameters(dtype), parameters(dtype)
    options = {"max_norm": 0.5, **FULL[name]}
    optimizer, other = ours(name)(params, fused=True, **options), ours(name)(others, **options)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    for step in gradients(params, 3):
        give(params, [None if g is None else 8 * g for g in step])
        give(others, step)
        optimizer.step()
        other.step()
        for p, q in zip(params, others, strict=True):
            assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad)
    assert_equal(tensors(params, optimizer), tensors(others, other))
    assert launches == 6 * (NORM + STEP)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [*FULL.items(), *((name, {"weight_decay": 0.1}) for name in NAMES), ("SGD", {})],
)
def test_values_that_are_not_finite(name, kwargs, dtype):
    """An infinite parameter makes no NaN of a weight decay of 0."""
    bad = [math.nan, math.inf, -math.inf, 1.0]
    results = []
    for cls in (ours(name), theirs(name)):
        w = Parameter(torch.tensor(bad, dtype=dtype).repeat_interleave(4))
        optimizer = cls([w], lr=0.1, **kwargs)
        for roll in (0, 1):
            w.grad = torch.tensor(bad, dtype=dtype).roll(roll).repeat(4)
            optimizer.step()
        results.append(tensors([w], optimizer))
    for key, value in results[1].items():
        torch.testing.assert_close(results[0][key], value, equal_nan=True)


def test_counts_and_corrections_after_hundreds_of_steps(launches):
    """What float32 makes of beta, 1 - beta and beta ** t shows late."""

    def make(cls):
        def build(params):
            optimizers.append(cls(params, lr=0.05, betas=(0.9, 0.9999)))
            schedulers.append(torch.optim.lr_scheduler.ExponentialLR(optimizers[-1], 0.99))
            return optimizers[-1]

        return build

    optimizers, schedulers = [], []
    grads = [step for _ in range(6) for step in gradients(parameters(FP32, [(9,)]), 50)]
    results = []
    for cls, params in (
        (ours("Adam"), parameters(FP32, [(9,)])),
        (theirs("Adam"), parameters(FP32, [(9,)])),
        (theirs("Adam"), doubled(parameters(FP32, [(9,)]))),
    ):
        results.append(trained(make(cls), params, grads, each_step=lambda: schedulers[-1].step()))
    assert_as_good(*results)
    assert results[0]["step 0"] == 300
    assert launches == 300 * STEP


def test_results_repeat_bit_by_bit():
    results = []
    for _ in range(2):
        params = parameters(FP32, [(CHUNK + 1,), (700,)])
        results.append(
            trained(lambda p: ours("AdamW")(p, max_norm=0.1), params, gradients(params, 2))
        )
    assert_equal(*results)


# Which tensors a step sends to the device, and when.


@pytest.fixture
def sent(monkeypatch):
    """What was sent to the device: all rows, the gradients' addresses, or numbers."""
    log: list[str] = []
    real = _tables._on_host

    def noted(values, dtype, *rest):
        rows = "rows" if isinstance(values[0], list) else "gradients"
        log.append("numbers" if dtype == FP32 else rows)
        return real(values, dtype, *rest)

    monkeypatch.setattr(_tables, "_on_host", noted)
    return log


def two(name: str = "AdamW", **options: Any):
    params = parameters(FP32, [(5,), (7,)])
    optimizer = ours(name)(params, lr=0.1, **options)
    for p in params:
        p.grad = torch.ones_like(p)
    return params, optimizer


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_sent_again_where_nothing_moved(name, sent):
    _, optimizer = two(name, **FULL[name])
    optimizer.step()
    optimizer.step()  # SGD's buffers have started
    kept, (part,) = optimizer._in_one_launch, optimizer._in_one_launch.parts
    sent.clear()
    optimizer.step()
    optimizer.step()
    assert optimizer._in_one_launch is kept
    assert kept.parts == [part]
    assert sent == []


def test_gradients_that_move_send_addresses_alone(sent):
    params, optimizer = two()
    optimizer.step()
    kept = optimizer._in_one_launch
    olds = []  # memory that is in use is not handed out again
    for _ in range(3):
        sent.clear()
        for p in params:
            olds.append(p.grad)
            p.grad = torch.full_like(p, len(olds))
        optimizer.step()
        assert sent == ["gradients"]
    assert optimizer._in_one_launch is kept
    assert [optimizer.state[p]["step"].item() for p in params] == [4, 4]
    params[0].grad = torch.ones(6)[1:]  # not aligned, which their flags say
    optimizer.step()
    assert sent == ["gradients", "rows"]


def test_a_schedule_sends_numbers_alone(sent):
    _, optimizer = two()
    optimizer.step()
    kept = optimizer._in_one_launch
    sent.clear()
    optimizer.param_groups[0]["lr"] = 0.05
    optimizer.step()
    assert sent == ["numbers"]
    assert optimizer._in_one_launch is kept


def replace_parameter(params, optimizer):
    new = Parameter(params[0].detach().clone())
    new.grad, params[0] = params[0].grad, new
    optimizer.param_groups[0]["params"][0] = new


def move_parameter(params, optimizer):
    params[0].data = params[0].detach().clone()


def replace_state(params, optimizer):
    state = optimizer.state[params[0]]
    state["exp_avg"] = state["exp_avg"].clone()


def replace_count(params, optimizer):
    state = optimizer.state[params[0]]
    state["step"] = state["step"] + 5


def add_group(params, optimizer):
    params.append(parameters(FP32, [(3,)])[0])
    params[-1].grad = torch.ones_like(params[-1])
    optimizer.add_param_group({"params": params[-1:], "lr": 1.0})


def add_option(params, optimizer):
    optimizer.param_groups[0]["amsgrad"] = True
    for p in params:
        optimizer.state[p]["max_exp_avg_sq"] = torch.full_like(p, 4.0)


def pause(params, optimizer):
    params[1].grad = None


def transpose_gradient(params, optimizer):
    p = params[0].data = torch.arange(6.0).view(2, 3)
    optimizer.state[params[0]] |= {k: torch.ones_like(p) for k in ("exp_avg", "exp_avg_sq")}
    params[0].grad = torch.arange(6.0).view(3, 2).t()


def load(params, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


CHANGES = [replace_parameter, move_parameter, replace_state, replace_count, add_group, add_option]
CHANGES += [pause, transpose_gradient, load]


@pytest.mark.parametrize("change", CHANGES)
def test_tables_are_made_anew_after(change):
    results = []
    for cls in (ours("AdamW"), theirs("AdamW")):
        params = parameters(FP32, [(5,), (7,)])
        optimizer = cls(params, lr=0.1)
        give(params, gradients(params, 1)[0])
        optimizer.step()
        kept = getattr(optimizer, "_in_one_launch", None)
        change(params, optimizer)
        optimizer.step()
        if kept is not None:
            assert optimizer._in_one_launch is not kept
        optimizer.step()
        results.append(tensors(params, optimizer))
    for key, value in results[1].items():
        torch.testing.assert_close(results[0][key], value, rtol=2e-6, atol=1e-7)


def test_a_parameter_that_becomes_smaller_where_it_lies():
    """Its address is the same: a step of the old size would write past it."""
    base = torch.ones(8)
    w = Parameter(base)
    optimizer = ours("SGD")([w], lr=1.0)
    w.grad = torch.ones(8)
    optimizer.step()
    w.grad = None
    w.data = base[:2]
    w.grad = torch.ones(2)
    optimizer.step()
    assert base.tolist() == [-1.0] * 2 + [0.0] * 6


@pytest.mark.parametrize("direction", ["ours to torch", "torch to ours"])
@pytest.mark.parametrize(("name", "kwargs"), CASES)
def test_state_dicts_swap_midway(name, kwargs, direction):
    """60 steps under a schedule, the first and the second half by one library each."""

    def swapped(make, params, grads):
        first, second = make
        optimizer = first(params, **copy.deepcopy(kwargs), lr=0.01)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        for i, step in enumerate(grads):
            if i == len(grads) // 2:
                saved = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
                optimizer = second(params, **copy.deepcopy(kwargs), lr=0.01)
                optimizer.load_state_dict(saved[0])
                schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
                schedule.load_state_dict(saved[1])
            give(params, step)
            optimizer.step()
            schedule.step()
        return tensors(params, optimizer)

    shapes = [(61,), (5, 13), (0,)]
    both = (ours(name), theirs(name))[:: 1 if direction == "ours to torch" else -1]
    grads = gradients(parameters(FP32, shapes), 60)
    results = [
        swapped(both, parameters(FP32, shapes), grads),
        swapped((theirs(name),) * 2, parameters(FP32, shapes), grads),
        swapped((theirs(name),) * 2, doubled(parameters(FP32, shapes)), grads),
    ]
    assert_as_good(*results)


def test_another_backend_takes_the_formula_at_once(launches):
    _, optimizer = two()
    optimizer.step()
    with torchref.backend("reference"):
        optimizer.step()
    assert launches == STEP
    assert [state["step"].item() for state in optimizer.state.values()] == [2, 2]
    optimizer.step()
    assert launches == 2 * STEP


def test_what_no_kernel_takes_goes_to_the_formula(launches):
    """In the same step as the rest: float64, memory with gaps, a gradient in another order."""

    def mixed():
        (a, b, c, d) = parameters(FP32, [(5,), (4, 6), (2, 3), (7,)])
        return [a, Parameter(b.detach()[:, ::2]), c, Parameter(d.detach().double())]

    results = []
    for cls in (ours("AdamW"), theirs("AdamW")):
        params = mixed()
        optimizer = cls(params, lr=0.1)
        for _ in range(3):
            for p in params:
                p.grad = torch.ones_like(p)
            params[2].grad = torch.arange(6.0).view(3, 2).t()
            optimizer.step()
        results.append(tensors(params, optimizer))
    for key, value in results[1].items():
        torch.testing.assert_close(results[0][key], value, rtol=2e-6, atol=1e-7)
    assert launches == 3 * STEP


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_listed_twice_takes_two_steps(launches):
    (w,), (u,) = parameters(FP32, [(5,)]), parameters(FP32, [(5,)])
    w.grad, u.grad = torch.ones(5), torch.ones(5)
    ours("SGD")([w, w], lr=0.1).step()
    theirs("SGD")([u, u], lr=0.1).step()
    assert torch.equal(w, u)
    assert launches == []


def test_autograd_learns_what_a_step_writes():
    (w,) = parameters(FP32, [(5,)])
    optimizer = ours("AdamW")([w])
    w.grad = torch.ones(5)
    loss = (w * w).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Sizes of real models, which the interpreter could not step through.

RESNET50 = [(64, 3, 7, 7), (64,), (64,), (1000, 2048), (1000,)]
for width, blocks, before in ((64, 3, 64), (128, 4, 256), (256, 6, 512), (512, 3, 1024)):
    for block in range(blocks):
        inner = before if block == 0 else 4 * width
        RESNET50 += [(width, inner, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
        RESNET50 += [(width,)] * 4 + [(4 * width,)] * 2
    RESNET50 += [(4 * width, before, 1, 1), (4 * width,), (4 * width,)]
GPT2 = [(50257, 768), (1024, 768), (768,), (768,)]
for _ in range(12):
    GPT2 += [(768,)] * 4 + [(2304, 768), (2304,), (768, 768), (768,)]
    GPT2 += [(3072, 768), (3072,), (768, 3072), (768,)]
MODELS = {"ResNet-50": (RESNET50, 161, 25_557_032), "GPT-2": (GPT2, 148, 124_439_808)}


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", MODELS)
def test_a_whole_model_is_one_launch(model, name, dtype):
    shapes, count, total = MODELS[model]
    params = [Parameter(torch.empty(s, dtype=dtype, device="meta")) for s in shapes]
    assert (len(params), sum(p.numel() for p in params)) == (count, total)
    no_decay = [p for p in params if p.ndim == 1]
    groups = [{"params": [p for p in params if p.ndim > 1]}, {"params": no_decay, "lr": 0.5}]
    optimizer = ours(name)(groups, lr=0.1, state_dtype=FP32, **FULL[name])
    for p in params:
        p.grad = torch.empty_like(p)
    with recorded() as launches:
        optimizer.step()
        optimizer.step()
    assert [launch.name for launch in launches] == 2 * STEP
    assert launches[0].programs == sum(math.ceil(p.numel() / CHUNK) for p in params)


# The norm of gradients, and clipping by it.


def clipped(
    clip: Callable[..., Tensor],
    max_norm: float,
    params: list[Parameter],
    grads: list[Tensor | None],
) -> dict[str, Tensor]:
    """The norm and the gradients. The last parameter has none."""
    give(params, [*grads[:-1], None])
    norm = clip(params, max_norm)
    return {"norm": norm} | {f"{i}": p.grad for i, p in enumerate(params) if p.grad is not None}


def assert_clips_as_good_as_torchs(max_norm: float, make: Callable[[], list[Parameter]]) -> None:
    (grads,) = gradients(make(), 1)
    truth = clipped(clip_grad_norm_, max_norm, doubled(make()), grads)
    torchs = clipped(clip_grad_norm_, max_norm, make(), grads)
    actual = clipped(torchref.optim.clip_grad_norm_, max_norm, make(), grads)
    assert actual["norm"].dtype == torchs["norm"].dtype
    assert_as_good(actual, torchs, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("max_norm", [0.5, 1e6, 0.0])
def test_clipping_in_place(max_norm, dtype, launches):
    assert_clips_as_good_as_torchs(max_norm, lambda: parameters(dtype))
    assert launches == [*NORM, "_clip_kernel"]


@pytest.mark.parametrize("max_norm", [0.0, 1e-6, 1.0])
@pytest.mark.parametrize("scale", [0.0, 1e-7])
def test_clipping_gradients_of_almost_nothing(scale, max_norm):
    """Where the 1e-6 that keeps the norm from 0 counts."""
    (grads,) = gradients(parameters(), 1)
    grads = [None if g is None else scale * g for g in grads]
    results = [
        clipped(clip, max_norm, parameters(), grads)
        for clip in (torchref.optim.clip_grad_norm_, clip_grad_norm_)
    ]
    torch.testing.assert_close(*results, rtol=5e-7, atol=0)


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_sizes_that_a_wrong_mask_shows_in(max_norm):
    shapes = [*AROUND_BLOCKS, (3 * CHUNK + 1,), (1,)]
    assert_clips_as_good_as_torchs(max_norm, lambda: parameters(FP32, shapes))
    assert_clips_as_good_as_torchs(max_norm, lambda: views(FP32))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("max_norm", [1.0, 0.0, math.inf])
def test_clipping_by_a_norm_that_is_not_finite(max_norm, bad, dtype):
    (grads,) = gradients(parameters(dtype), 1)
    grads[0].view(-1)[0] = bad
    results = [
        clipped(clip, max_norm, parameters(dtype), grads)
        for clip in (torchref.optim.clip_grad_norm_, clip_grad_norm_)
    ]
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_several_types_by_one_norm(max_norm, launches):
    def make():
        return parameters(FP32) + parameters(BF16) + doubled(parameters())

    params, truth = make(), doubled(make())
    give(params, gradients(make(), 1)[0])
    give(truth, gradients(make(), 1)[0])
    norm = torchref.optim.clip_grad_norm_(params, max_norm)
    assert launches == NORM * 2 + ["_clip_kernel"] * 2
    torch.testing.assert_close(norm, clip_grad_norm_(truth, max_norm), rtol=3e-7, atol=0)
    for p, t in zip(params, truth, strict=True):
        eps = max(torch.finfo(p.dtype).eps / 2, 3e-7)
        torch.testing.assert_close(p.grad.double(), t.grad, rtol=eps, atol=0)


def test_the_norm_of_a_large_tensor_keeps_its_digits():
    """Of squares in float32 from first to last it would have four."""
    (w,) = parameters(FP32, [(12 * CHUNK,)])
    w.grad = torch.full_like(w, 1.1)
    norm = torchref.optim.clip_grad_norm_([w], math.inf)
    assert norm.item() == pytest.approx(w.grad.double().norm().item(), rel=2e-7)
    assert torch.equal(w.grad, torch.full_like(w, 1.1))

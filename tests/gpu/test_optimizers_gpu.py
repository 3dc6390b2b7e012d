"""The optimizers as a GPU runs them: one launch a step, in graphs, on streams, without a wait."""

import contextlib
import copy
import functools
import gc
import importlib
import io
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from benchmarks import parameter_lists
from optim import optim_parity
from optim.optim_parity import CASES, NAMES, assert_as_good, assert_close, gradients, make_params
from optim.optim_parity import ours as our
from optim.optim_parity import theirs as torchs
from torch import Tensor
from torch.nn.utils import clip_grad_norm_ as torchs_clip

import torchref
from torchref.optim import clip_grad_norm_

DEVICE = "cuda"
HALF_AND_SINGLE = [torch.float32, torch.float16, torch.bfloat16]
FLAGS: dict[str, dict[str, Any]] = {
    "default": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
STEPS = 12

pytestmark = [
    pytest.mark.gpu,
    # a graph's optimizer also takes eager steps here
    pytest.mark.filterwarnings("ignore:This instance was constructed with capturable:UserWarning"),
    # torch says once that it does not find every wait
    pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning"),
]
every_optimizer = pytest.mark.parametrize("name", NAMES)


def flagged(cases: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any], str]]:
    """Each case with each flag that torch's optimizer has."""
    return [
        (name, kwargs, flag)
        for name, kwargs in cases
        for flag in FLAGS
        if not (name == "RMSprop" and flag == "fused")
    ]


@pytest.fixture(autouse=True)
def kernels(needs_a_gpu):
    with torchref.backend("triton"):
        yield


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels launched."""
    launcher = importlib.import_module("torchref.triton_kernels._launch")
    names, run = [], launcher._run

    def spy(kernel, *args):
        names.append(kernel.fn.__name__)
        run(kernel, *args)

    monkeypatch.setattr(launcher, "_run", spy)
    return names


@pytest.fixture
def roomy():
    """Give other processes' memory back to the device, before and after."""
    gc.collect()
    torch.cuda.empty_cache()
    yield
    gc.collect()
    torch.cuda.empty_cache()


def needs(gib: int) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of GPU memory, {free:.1f} are free")


@contextlib.contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_gpu(tensors: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(x.detach().clone().to(DEVICE)) for x in tensors]


def give(params: list[torch.nn.Parameter], drawn: list[torch.nn.Parameter]) -> None:
    """Give the parameters copies of the gradients of those on the CPU."""
    for p, d in zip(params, drawn, strict=True):
        p.grad = None if d.grad is None else d.grad.to(DEVICE, copy=True)


def train(
    cls: Callable[..., torch.optim.Optimizer],
    kwargs: dict[str, Any],
    dtype: torch.dtype,
    steps: int = STEPS,
) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    """On the GPU, what ``optim_parity.train`` does on the CPU."""
    drawn = make_params(dtype)
    params = on_gpu(drawn)
    optimizer = cls(params, **copy.deepcopy(kwargs))
    for _ in gradients(drawn, steps):
        give(params, drawn)
        optimizer.step()
    return params, optimizer


def tensors(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Parameters and state, by name, on the CPU."""
    return {key: x.cpu() for key, x in optim_parity.tensors(params, optimizer).items()}


# One launch


@pytest.fixture
def many_elements(monkeypatch):
    """So many in each tensor that the largest error is no matter of luck."""
    shapes = [(4099,), (3, 1021), (0,), (1000,), (17, 31), (7, 3, 5, 11)]
    monkeypatch.setattr(optim_parity, "SHAPES", shapes)


@pytest.mark.usefixtures("many_elements")
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize(("name", "kwargs", "flag"), flagged(CASES))
def test_error_against_torchs_own(name, kwargs, flag, dtype, launches):
    options = {**kwargs, "lr": 0.01} if name == "SGD" else {**kwargs, "lr": 0.01, "eps": 1e-3}
    truth = optim_parity.tensors(
        *optim_parity.train(torchs(name), options, steps=STEPS, truth_of=dtype)
    )
    other = tensors(*train(torchs(name), options | FLAGS[flag], dtype))
    actual = tensors(*train(our(name), options | FLAGS[flag], dtype))
    assert launches == ["_step_kernel"] * STEPS
    assert_as_good(actual, other, truth)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("flag", FLAGS)
@every_optimizer
def test_clipping_and_averaging_are_in_the_launch(name, flag, dtype, launches):
    flags = {} if name == "RMSprop" and flag == "fused" else FLAGS[flag]
    options = {"lr": 0.01, "max_norm": 0.5, "ema_decay": 0.9, "state_dtype": torch.float32}
    if name != "SGD":
        options["eps"] = 1e-3
    actual, optimizer = train(our(name), options | flags, dtype)
    assert launches == ["_squares_kernel", "_norm_kernel", "_step_kernel"] * STEPS
    with torchref.backend("reference"):
        expected, formula = train(our(name), options | flags, dtype)
    # a parameter of a half type may round the other way in each of the steps
    eps = torch.finfo(dtype).eps * (16 if dtype == torch.float32 else 4)
    assert_close(tensors(actual, optimizer), tensors(expected, formula), rtol=eps)
    torch.testing.assert_close(optimizer.grad_norm, formula.grad_norm, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@every_optimizer
def test_wide_and_complex_take_the_formula(name, dtype, launches):
    options = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {"amsgrad": True}
    actual = tensors(*train(our(name), {**options, "weight_decay": 0.1}, dtype))
    expected = tensors(*train(torchs(name), {**options, "weight_decay": 0.1}, dtype))
    assert not launches
    assert_close(actual, expected, rtol=1e-12)


@every_optimizer
def test_differentiable_takes_the_formula(name, launches):
    results = []
    for cls, device in [(our(name), DEVICE), (torchs(name), "cpu")]:
        start, first, second = (
            torch.linspace(0.5, 2, 4, device=device).add(i).requires_grad_() for i in range(3)
        )
        w = start.clone()
        optimizer = cls([w], lr=0.1, differentiable=True)
        for grad in (first, second):
            w.grad = grad.clone()
            optimizer.step()
        slopes = torch.autograd.grad(w.square().sum(), (start, first, second))
        results.append([x.detach().cpu() for x in (w, *slopes)])
    assert not launches
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_types_of_one_model_take_a_launch_each(launches):
    params = [torch.nn.Parameter(torch.ones(5, device=DEVICE, dtype=t)) for t in HALF_AND_SINGLE]
    params.append(torch.nn.Parameter(torch.ones(5, device=DEVICE, dtype=torch.float64)))
    optimizer = torchref.optim.SGD(params, lr=0.5, momentum=0.9)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert launches == ["_step_kernel"] * 6
    for p in params:
        expected = torch.full_like(p, -0.45)
        torch.testing.assert_close(p, expected, rtol=2**-6, atol=0)


# Lists of tensors, and large ones


def parameters(shapes: list[tuple[int, ...]]) -> list[torch.nn.Parameter]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, device=DEVICE)
    return [torch.nn.Parameter(draw(shape)) for shape in shapes]


LISTS = {
    "resnet50": parameter_lists.resnet50,
    "gpt2": parameter_lists.gpt2,
    "500 of 1K": lambda: [(1024,)] * 500,
}


@pytest.mark.usefixtures("roomy")
@pytest.mark.parametrize("shapes", LISTS)
@every_optimizer
def test_a_models_parameters_in_one_launch(name, shapes, launches):
    needs(6)
    listed = LISTS[shapes]()
    params, others = parameters(listed), parameters(listed)
    momentum = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    mine = our(name)(params, lr=0.01, **momentum)
    other = torchs(name)(others, lr=0.01, foreach=True, **momentum)
    for _ in range(3):
        for p, q in zip(params, others, strict=True):
            p.grad = q.grad = torch.randn_like(p)
        mine.step()
        other.step()
    assert launches == ["_step_kernel"] * 3
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q)
        for key, x in other.state[q].items():
            torch.testing.assert_close(mine.state[p][key], x.to(DEVICE))


def test_every_count_goes_up_by_one_in_each_of_many_steps():
    """A program that counts before all have read would leave some behind or ahead."""
    params = parameters([(5000,)] * 300)
    optimizer = torchref.optim.Adam(params, ema_decay=0.9)
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(200):
        optimizer.step()
    for key in ("step", "ema_step"):
        counts = torch.stack([optimizer.state[p][key] for p in params])
        assert torch.equal(counts, torch.full_like(counts, 200.0))
    for p in params[1:]:  # of equal gradients, equal averages
        assert torch.equal(
            optimizer.state[p]["exp_avg_sq"], optimizer.state[params[0]]["exp_avg_sq"]
        )


@pytest.mark.usefixtures("roomy")
def test_a_billion_elements(launches):
    needs(17)
    n = 10**9
    p = torch.nn.Parameter(torch.empty(n, device=DEVICE).normal_())
    p.grad = torch.empty(n, device=DEVICE).normal_()
    parts = [slice(at, at + 5000) for at in (0, n // 3, 2**29 - 2500, n - 5000)]
    few = [torch.nn.Parameter(p.detach()[part].clone()) for part in parts]
    for q, part in zip(few, parts, strict=True):
        q.grad = p.grad[part].clone()
    mine, other = torchref.optim.Adam([p], lr=0.01), torch.optim.Adam(few, lr=0.01)
    for _ in range(2):
        mine.step()
        other.step()
    assert launches == ["_step_kernel"] * 2
    for q, part in zip(few, parts, strict=True):
        torch.testing.assert_close(p.detach()[part], q.detach())
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(mine.state[p][key][part], other.state[q][key])


@pytest.mark.usefixtures("roomy")
def test_more_elements_than_32_bits_count():
    needs(10)
    n = 2**31 + 5003
    p = torch.nn.Parameter(torch.empty(n, dtype=torch.bfloat16, device=DEVICE).normal_())
    p.grad = torch.empty_like(p).normal_()
    lr = math.sqrt(n)  # times the gradient, clipped to a norm of 1: steps as long as it was
    optimizer = torchref.optim.SGD([p], lr=lr, max_norm=1.0)
    parts = [slice(at, at + 5000) for at in (0, n // 3, 2**31 - 2500, n - 5000)]
    before = [(p.detach()[part].float(), p.grad[part].float()) for part in parts]
    optimizer.step()
    norm = optimizer.grad_norm.item()
    assert norm == pytest.approx(lr, rel=1e-3)
    for part, (x, grad) in zip(parts, before, strict=True):
        expected = x - lr / norm * grad
        torch.testing.assert_close(p.detach()[part].float(), expected, rtol=2**-8, atol=1e-3)


# Graphs

GRAPHED: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"momentum": 0.9, "weight_decay": 0.1}),
    ("RMSprop", {"momentum": 0.9, "centered": True, "capturable": True}),
    ("Adam", {"amsgrad": True, "capturable": True}),
    ("AdamW", {"fused": True, "capturable": True}),
]
EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"max_norm": 0.05},
    "averaged": {"ema_decay": 0.9, "ema_bias_correction": True},
    "both": {"max_norm": 0.05, "ema_decay": 0.9},
}
WARM_UP = 3
in_a_graph = pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(name, {**kwargs, **extra}, id=f"{name} {key}")
        for name, kwargs in GRAPHED
        for key, extra in EXTRAS.items()
    ],
)


class Training:
    """Parameters, their optimizer, and batches for whole steps, which wait where a graph reads."""

    def __init__(self, name: str, options: dict[str, Any], clip: float | None = None) -> None:
        self.generator = torch.Generator("cpu").manual_seed(0)
        self.params = [
            torch.nn.Parameter(self.draw(*shape)) for shape in [(37, 11), (37,), (5, 37)]
        ]
        self.lr = torch.tensor(0.01, device=DEVICE)
        self.optimizer = our(name)(self.params, lr=self.lr, **options)
        self.clip = clip
        self.batches = [(self.draw(n, 11), self.draw(n, 5)) for n in (64, 48)]
        self.norm = torch.zeros((), device=DEVICE)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device="cpu").to(DEVICE)

    def renew(self, turn: int) -> None:
        """Other numbers where the next step reads."""
        for batch in self.batches:
            for x in batch:
                x.copy_(self.draw(*x.shape))
        self.lr.fill_(0.02 / (turn + 1))

    def step(self, batch: int = 0) -> None:
        x, target = self.batches[batch]
        w, b, v = self.params
        self.optimizer.zero_grad()  # each backward pass allocates its gradients
        # without a library's products, whose algorithm may be another one in a graph
        hidden = ((x[:, None] * w).sum(-1) + b).tanh()
        ((hidden[:, None] * v).sum(-1) - target).square().mean().backward()
        if self.clip is not None:
            self.norm.copy_(clip_grad_norm_(self.params, self.clip))
        self.optimizer.step()
        if self.optimizer.grad_norm is not None:
            self.norm.copy_(self.optimizer.grad_norm)


class Graph:
    """A step, captured once to be replayed."""

    def __init__(self, step: Callable[[], Any], warm_up: int = WARM_UP) -> None:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # compiles, which a capture could not
            for _ in range(warm_up):
                step()
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            step()

    def replay(self) -> None:
        overwrite_free_memory()
        self.graph.replay()


def overwrite_free_memory() -> None:
    """Zeros in what is nobody's: a graph that reads there updates nothing, which shows."""
    places = [{"device": DEVICE}, {"device": "cpu"}]
    places += [{"device": "cpu", "pin_memory": True}] * (DEVICE == "cuda")
    taken = [
        torch.zeros(2**k, dtype=torch.int64, **place)
        for place in places
        for k in range(14)
        for _ in range(4)
    ]
    assert len(taken) == 56 * len(places)


def assert_same_training(a: Training, b: Training) -> None:
    x, y = (tensors(t.params, t.optimizer) for t in (a, b))
    assert list(x) == list(y)
    for key, value in x.items():
        torch.testing.assert_close(value, y[key], msg=lambda m, key=key: f"{key}: {m}")
    torch.testing.assert_close(a.norm, b.norm)


def both(name: str, options: dict[str, Any], **more: Any) -> tuple[Training, Training]:
    return Training(name, options, **more), Training(name, options, **more)


@in_a_graph
def test_a_graph_replays_whole_steps(name, options):
    eager, captured = both(name, options)
    graph = Graph(captured.step)
    for _ in range(WARM_UP):  # a capture takes no step
        eager.step()
    assert_same_training(captured, eager)
    for turn in range(7):
        eager.renew(turn)
        captured.renew(turn)
        eager.step()
        graph.replay()
        assert_same_training(captured, eager)


def test_a_graph_of_one_launch_a_step(launches):
    Graph(Training("Adam", {"capturable": True}).step)
    assert launches == ["_step_kernel"] * (WARM_UP + 1)


@in_a_graph
def test_replays_and_eager_steps_take_turns(name, options):
    eager, captured = both(name, options)
    for _ in range(2):  # the optimizer has tables of its own before the graph has
        eager.step()
        captured.step()
    graph = Graph(captured.step)
    for _ in range(WARM_UP):
        eager.step()
    turns = ["replay", "replay", "eager", "eager", "replay", "eager", "replay", "replay"]
    for turn, kind in enumerate(turns):
        eager.renew(turn)
        captured.renew(turn)
        eager.step()
        if kind == "replay":
            graph.replay()
        else:
            captured.step()
        assert_same_training(captured, eager)


@in_a_graph
def test_two_graphs_of_one_optimizer(name, options):
    """As of two sizes of batches; either outlives the other."""
    eager, captured = both(name, options)
    graphs = [Graph(functools.partial(captured.step, batch)) for batch in (0, 1)]
    for batch in (0, 1):
        for _ in range(WARM_UP):
            eager.step(batch)
    for turn, batch in enumerate([0, 1, 1, 0, 1, 0, 1, 1]):
        if turn == 6:
            graphs[0].graph.reset()
            torch.cuda.empty_cache()
        eager.renew(turn)
        captured.renew(turn)
        eager.step(batch)
        graphs[batch].replay()
        assert_same_training(captured, eager)


@pytest.mark.parametrize(("name", "options"), GRAPHED)
def test_a_graph_clips_between_backward_and_step(name, options):
    eager, captured = both(name, options, clip=0.05)
    graph = Graph(captured.step)
    for _ in range(WARM_UP):
        eager.step()
    for turn in range(6):
        eager.renew(turn)
        captured.renew(turn)
        eager.step()
        graph.replay()
        assert_same_training(captured, eager)


def test_a_graph_of_sizes_never_seen_before():
    """What says who works on what is not on the device yet."""
    for shapes in ([(1001,), (77,), (4097,)], [(1003,), (79,), (4099,)]):
        params = parameters(shapes)
        for p in params:
            p.grad = torch.zeros_like(p)
        if shapes[0] == (1001,):
            clip_grad_norm_(params, 0.5)  # compiles
    graph = Graph(functools.partial(clip_grad_norm_, params, 0.5), warm_up=0)
    for _ in range(5):
        others = parameters(shapes)
        for p, q in zip(params, others, strict=True):
            q.grad = torch.randn_like(p)
            p.grad.copy_(q.grad)
        graph.replay()
        torchs_clip(others, 0.5)
        for p, q in zip(params, others, strict=True):
            torch.testing.assert_close(p.grad, q.grad)


def test_a_graph_in_bfloat16_with_a_state_of_float32():
    """Gradients of another type than the parameters' states, whose addresses are the graph's."""
    runs = []
    for graphed in (False, True):
        generator = torch.Generator(DEVICE).manual_seed(0)
        w = torch.nn.Parameter(
            torch.randn(10_007, device=DEVICE, generator=generator).to(torch.bfloat16)
        )
        x = torch.ones(10_007, device=DEVICE, dtype=torch.bfloat16)
        optimizer = torchref.optim.Adam([w], 0.1, capturable=True, state_dtype=torch.float32)

        def step(w=w, x=x, optimizer=optimizer):
            optimizer.zero_grad()
            (w * x).tanh().sum().backward()
            optimizer.step()

        if graphed:
            step = Graph(step).replay
        else:
            for _ in range(WARM_UP):
                step()
        for turn in range(5):
            x.fill_(turn - 2.0)
            step()
        runs.append((w, optimizer))
    x, y = (tensors([w], optimizer) for w, optimizer in runs)
    assert x["exp_avg 0"].dtype == torch.float32
    for key, value in x.items():
        torch.testing.assert_close(value, y[key])


# Waits


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("lr", ["number", "tensor", "schedule"])
@every_optimizer
def test_a_step_waits_for_nothing(name, lr, extra):
    """With gradients that move."""
    params = on_gpu(make_params(torch.float32))
    rate = torch.tensor(0.01, device=DEVICE) if lr == "tensor" else 0.01
    optimizer = our(name)(params, lr=rate, **EXTRAS[extra])
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    kept = []
    for step in range(5):
        for p in params:
            p.grad = torch.randn_like(p)
            kept.append(p.grad)
        # the first step compiles, and makes the state
        with waiting_is_an_error() if step else contextlib.nullcontext():
            optimizer.step()
            if lr == "schedule":
                schedule.step()
            elif lr == "tensor":
                rate.mul_(0.9)


@pytest.mark.parametrize("extra", EXTRAS)
@every_optimizer
def test_pausing_parameters_are_not_waited_for(name, extra):
    params = on_gpu(make_params(torch.float32))
    optimizer = our(name)(params, lr=0.01, **EXTRAS[extra])
    for step in range(8):
        for i, p in enumerate(params):
            p.grad = None if i == 3 and step % 2 else torch.randn_like(p)
        with waiting_is_an_error() if step >= 2 else contextlib.nullcontext():
            optimizer.step()


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_a_loss_scale_is_not_waited_for(name, extra):
    params = on_gpu(make_params(torch.float32))
    optimizer = our(name)(params, lr=0.01, fused=True, **EXTRAS[extra])
    for step in range(4):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.grad_scale = torch.full((), 8.0, device=DEVICE)
        optimizer.found_inf = torch.full((), float(step == 2), device=DEVICE)
        with waiting_is_an_error() if step else contextlib.nullcontext():
            optimizer.step()
    for i, p in enumerate(params):
        if "step" in optimizer.state[p]:
            assert optimizer.state[p]["step"].item() == 3, i


@every_optimizer
def test_float64_in_the_same_group_is_not_waited_for(name):
    params = [
        torch.nn.Parameter(torch.ones(5, dtype=dtype, device=DEVICE))
        for dtype in (torch.float32, torch.float64)
    ]
    optimizer = our(name)(params, lr=0.01, max_norm=1.0)
    for step in range(4):
        for p in params:
            p.grad = torch.randn_like(p)
        with waiting_is_an_error() if step else contextlib.nullcontext():
            optimizer.step()


def test_betas_on_the_device_are_not_waited_for():
    """The kernel leaves their group to the formula, and goes on with the other one."""
    params = parameters([(100,), (100,)])
    betas = tuple(torch.tensor(beta, device=DEVICE) for beta in (0.9, 0.999))
    groups = [{"params": params[:1]}, {"params": params[1:], "betas": betas}]
    # torch's lists take a tensor for a number, and wait for it
    optimizer = torchref.optim.Adam(groups, lr=0.01, capturable=True, foreach=False)
    for step in range(4):
        for p in params:
            p.grad = torch.randn_like(p)
        with waiting_is_an_error() if step else contextlib.nullcontext():
            optimizer.step()


def test_a_wait_would_be_found():
    with pytest.raises(RuntimeError, match="synchroniz"), waiting_is_an_error():
        torch.ones(3, device=DEVICE).sum().item()


# GradScaler


def scaled_steps(
    cls: Callable[..., torch.optim.Optimizer], overflows: tuple[int, ...], **options: Any
) -> tuple[dict[str, Tensor], float]:
    """Five steps of float32 parameters in float16's autocast; those that overflow change nothing.

    Returns:
        Parameters and state, and the loss scale that is left.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    x, w, b = (
        torch.randn(shape, generator=generator, device="cpu").to(DEVICE)
        for shape in [(32, 16), (24, 16), (24,)]
    )
    params = [torch.nn.Parameter(w), torch.nn.Parameter(b)]
    optimizer = cls(params, **options)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0, growth_interval=2)
    for i in range(5):
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.float16):
            y = F.linear(x, *params)
        assert y.dtype == torch.float16
        loss = y.float().square().mean() * (math.inf if i in overflows else 1.0)
        scaler.scale(loss).backward()
        before = tensors(params, optimizer)
        scaler.step(optimizer)
        scaler.update()
        after = tensors(params, optimizer)
        if i in overflows:
            assert all(torch.equal(after[key], value) for key, value in before.items())
    return tensors(params, optimizer), scaler.get_scale()


@pytest.mark.parametrize(("name", "kwargs", "flag"), flagged(CASES))
def test_grad_scaler_on_autocast(name, kwargs, flag):
    # Torch's velocity is uninitialized memory after an overflow in the first step.
    overflows = (1, 3) if kwargs.get("momentum") else (0, 3)
    options = {**kwargs, **FLAGS[flag]}
    actual, scale = scaled_steps(our(name), overflows, **options)
    expected, torchs_scale = scaled_steps(torchs(name), overflows, **options)
    assert scale == torchs_scale
    assert list(actual) == list(expected)
    for key, value in expected.items():
        # a weight that rounds the other way to float16 changes the gradients by 2**-11
        torch.testing.assert_close(actual[key], value, rtol=2e-3, atol=1e-4)
        if key.startswith("step"):
            assert actual[key] == value == 3


def test_the_scale_is_read_in_the_launch(launches):
    scaled_steps(torchref.optim.Adam, (1,), fused=True, max_norm=0.1)
    assert launches == ["_squares_kernel", "_norm_kernel", "_step_kernel"] * 5


def test_an_overflow_moves_no_average_and_no_count():
    params = parameters([(5000,), (3,)])
    optimizer = torchref.optim.AdamW(params, fused=True, ema_decay=0.5, max_norm=1.0)
    for found_inf in (0.0, 1.0, 1.0, 0.0):
        for p in params:
            p.grad = torch.full_like(p, math.inf if found_inf else 1.0)
        optimizer.grad_scale = torch.full((), 2.0, device=DEVICE)
        optimizer.found_inf = torch.full((), found_inf, device=DEVICE)
        before = tensors(params, optimizer)
        optimizer.step()
        after = tensors(params, optimizer)
        if found_inf:
            assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(after[f"{key} {i}"] == 2 for key in ("step", "ema_step") for i in range(2))


# State

STATE_FLAGS = [{}, {"foreach": True}, {"fused": True}, {"capturable": True}]
with_flags = pytest.mark.parametrize(
    ("name", "flags"),
    [
        (name, flags)
        for name in NAMES
        for flags in STATE_FLAGS
        if not (name == "SGD" and "capturable" in flags)
        and not (name == "RMSprop" and "fused" in flags)
    ],
)


@with_flags
def test_counts_are_on_the_device_and_saved_where_torch_has_them(name, flags):
    params, optimizer = train(our(name), flags, torch.float32)
    _, other = train(torchs(name), flags, torch.float32)
    mine, expected = optimizer.state_dict()["state"], other.state_dict()["state"]
    assert mine.keys() == expected.keys()
    for key, state in expected.items():
        assert mine[key].keys() == state.keys()
        if "step" in state:
            assert optimizer.state[params[key]]["step"].device.type == DEVICE
            assert mine[key]["step"].device == state["step"].device
            assert mine[key]["step"].dtype == state["step"].dtype
            assert mine[key]["step"] == state["step"]


@pytest.mark.parametrize("direction", ["ours to torch", "torch to ours"])
@pytest.mark.parametrize("map_location", [None, "cpu"])
@with_flags
def test_state_dicts_swap_midway(name, flags, map_location, direction):
    options = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {"amsgrad": True}
    options |= flags
    first, second = our(name), torchs(name)
    if direction == "torch to ours":
        first, second = second, first
    drawn = make_params(torch.float32)
    params = on_gpu(drawn)
    optimizer = first(params, **options)
    for i, _ in enumerate(gradients(drawn, STEPS)):
        if i == STEPS // 2:
            saved = io.BytesIO()
            torch.save(optimizer.state_dict(), saved)
            saved.seek(0)
            optimizer = second(params, **options)
            loaded = torch.load(saved, map_location=map_location, weights_only=True)
            optimizer.load_state_dict(loaded)
        give(params, drawn)
        optimizer.step()
    expected = tensors(*train(torchs(name), options, torch.float32))
    assert_close(tensors(params, optimizer), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str
)
@pytest.mark.parametrize("name", ["RMSprop", "Adam", "AdamW"])
def test_counts_of_a_group_that_the_kernel_takes_in_part(name, dtypes):
    params = [torch.nn.Parameter(torch.ones(3, dtype=t, device=DEVICE)) for t in dtypes]
    optimizer = our(name)(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for state in optimizer.state_dict()["state"].values():
        assert state["step"].is_cpu
        assert state["step"] == 1


@every_optimizer
def test_formula_and_kernel_take_turns(name):
    """The formula goes on from counts on the device, and the kernel from the formula's."""
    drawn = make_params(torch.float32)
    params = on_gpu(drawn)
    optimizer = our(name)(params, ema_decay=0.9)
    for i, _ in enumerate(gradients(drawn, STEPS)):
        give(params, drawn)
        with torchref.backend("reference" if i % 3 == 1 else "triton"):
            optimizer.step()
    expected = tensors(*train(our(name), {"ema_decay": 0.9}, torch.float32))
    assert_close(tensors(params, optimizer), expected, rtol=1e-5)


# Streams and devices


@pytest.mark.parametrize("extra", ["plain", "both"])
@every_optimizer
def test_a_step_on_a_side_stream_and_then_one_here(name, extra):
    trained = []
    for streams in (False, True):
        training = Training(name, EXTRAS[extra])
        side = torch.cuda.Stream()
        for turn in range(6):
            training.renew(turn)
            if streams and turn % 2:
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    torch.cuda._sleep(20_000_000)  # some milliseconds, for others to be too early
                    training.step()
                torch.cuda.current_stream().wait_stream(side)
            else:
                training.step()
        trained.append(training)
    assert_same_training(*trained)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device or none")
@every_optimizer
def test_a_model_on_two_devices(name, launches):
    results = []
    for devices in (("cuda:0", "cuda:1"), ("cuda:1", "cuda:0"), ("cuda:0", "cuda:0")):
        drawn = make_params(torch.float32)
        params = [
            torch.nn.Parameter(p.detach().clone().to(devices[i % 2])) for i, p in enumerate(drawn)
        ]
        optimizer = our(name)(params, lr=0.01, max_norm=0.5, ema_decay=0.9)
        for _ in gradients(drawn, STEPS):
            for p, d in zip(params, drawn, strict=True):
                p.grad = None if d.grad is None else d.grad.to(p.device)
            optimizer.step()
            assert torch.cuda.current_device() == 0
        optimizer.state_dict()
        results.append(tensors(params, optimizer))
    assert launches.count("_step_kernel") == (2 + 2 + 1) * STEPS
    for result in results[:2]:
        assert_close(result, results[2], rtol=1e-5)


# Clipping


def clipped(
    clip: Callable[..., Tensor], dtypes: list[torch.dtype], **options: Any
) -> tuple[Tensor, list[Tensor]]:
    params = []
    for dtype in dtypes:
        drawn = make_params(dtype)
        next(gradients(drawn, 1))
        params += on_gpu(drawn)
        give(params[-len(drawn) :], drawn)
    norm = clip(params, 0.5, **options)
    return norm, [p.grad for p in params]


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_clipping_is_three_launches(dtype, foreach, launches):
    norm, grads = clipped(clip_grad_norm_, [dtype], foreach=foreach)
    assert launches == ["_squares_kernel", "_norm_kernel", "_clip_kernel"]
    torchs_norm, torchs_grads = clipped(torchs_clip, [dtype], foreach=foreach)
    exact = [g.double() for g in clipped(lambda params, _: params[0].detach(), [dtype])[1]]
    truth = torch.cat([g.flatten() for g in exact]).norm()
    eps = torch.finfo(dtype).eps
    assert norm.dtype == torchs_norm.dtype
    assert norm.device == torchs_norm.device
    torch.testing.assert_close(norm.double(), truth, rtol=2 * eps, atol=0)
    torch.testing.assert_close(norm, torchs_norm, rtol=8 * eps, atol=0)
    for g, other, t in zip(grads, torchs_grads, exact, strict=True):
        torch.testing.assert_close(g.double(), t * 0.5 / truth, rtol=2 * eps, atol=1e-7)
        torch.testing.assert_close(g, other, rtol=16 * eps, atol=1e-7)


def test_clipping_of_several_types(launches):
    types = [*HALF_AND_SINGLE, torch.float64]
    norm, grads = clipped(clip_grad_norm_, types)
    assert sorted(launches) == sorted(["_squares_kernel", "_norm_kernel", "_clip_kernel"] * 3)
    torchs_norm, torchs_grads = clipped(torchs_clip, types)
    assert norm.dtype == torchs_norm.dtype
    torch.testing.assert_close(norm, torchs_norm, rtol=1e-2, atol=0)  # of half types in theirs
    for g, other in zip(grads, torchs_grads, strict=True):
        torch.testing.assert_close(g, other, rtol=2e-2, atol=1e-5)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_gradients_within_the_limit_stay_as_they_are(dtype):
    params = on_gpu(make_params(dtype))
    for p in params:
        p.grad = torch.randn_like(p)
    before = [p.grad.clone() for p in params]
    clip_grad_norm_(params, 1e4)
    assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=True))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_gradients_that_are_not_finite(dtype, bad):
    def spoilt(clip, params, *args, **options):
        params[3].grad[0] = bad
        return clip(params, *args, **options)

    messages = []
    for clip in (clip_grad_norm_, torchs_clip):
        params = on_gpu(make_params(dtype))
        for p in params:
            p.grad = torch.ones_like(p)
        params[3].grad[0] = bad
        before = [p.grad.clone() for p in params]
        with pytest.raises(RuntimeError, match="non-finite") as error:
            clip(params, 0.5, error_if_nonfinite=True)
        messages.append(str(error.value))
        for p, g in zip(params, before, strict=True):
            torch.testing.assert_close(p.grad, g, rtol=0, atol=0, equal_nan=True)
    assert messages[0] == messages[1]
    norm, grads = clipped(functools.partial(spoilt, clip_grad_norm_), [dtype])
    torchs_norm, others = clipped(functools.partial(spoilt, torchs_clip), [dtype])
    torch.testing.assert_close(norm, torchs_norm, equal_nan=True)
    for g, other in zip(grads, others, strict=True):
        torch.testing.assert_close(g, other, equal_nan=True)


def test_clipping_waits_for_nothing():
    params = on_gpu(make_params(torch.float32))
    for step in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        with waiting_is_an_error() if step else contextlib.nullcontext():
            clip_grad_norm_(params, 0.5)


def test_what_autograd_saved_is_stale_after_a_step_and_after_clipping():
    """A kernel writes past autograd, which must hear of it."""
    w = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    w.grad = torch.ones_like(w)
    for write in (torchref.optim.SGD([w], lr=0.1).step, lambda: clip_grad_norm_([w], 0.1)):
        loss = (w * w).sum() + (w * w.grad).sum()
        write()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

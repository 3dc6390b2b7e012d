"""The launcher's cache, against Triton's own JIT, on a GPU that only takes notes."""

import contextlib
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import create_function_from_signature

from torchref.triton_kernels import _launch

pytestmark = pytest.mark.skipif(_launch.INTERPRETED, reason="the interpreter compiles nothing")

TARGETS = {"cuda": GPUTarget("cuda", 90, 32), "hip": GPUTarget("hip", "gfx942", 64)}


@triton.jit
def _twice(x):
    return 2 * x


@triton.jit
def _thrice(x):
    return 3 * x


@triton.jit
def _parameter(x):
    pass


@triton.jit
def _constexpr(x: tl.constexpr):
    pass


def _map(x_ptr, y_ptr, n, a, MATH: tl.constexpr, BLOCK: tl.constexpr):
    pass


def _map_again(x_ptr, y_ptr, n, a, MATH: tl.constexpr, BLOCK: tl.constexpr):
    pass


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    index = 0

    def get_device(self):
        return self.index


class Compiled:
    """What Triton's compiler returns."""

    packed_metadata = "metadata"

    def __init__(self, gpu, function, options):
        self.gpu = gpu
        self.function = function
        self.options = options

    def launch_metadata(self, grid, stream, *args):
        return "launch metadata"

    def run(self, *call):
        self.gpu.calls.append(call)


class Gpu:
    """Stands for Triton's driver and compiler."""

    def __init__(self):
        self.device = 0
        self.compiled = []
        self.calls = []

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return f"stream of {device}"

    def get_current_target(self):
        return TARGETS["cuda"]

    def compile(self, source, target, options, **_):
        self.compiled.append(Compiled(self, f"function {len(self.compiled)}", options))
        return self.compiled[-1]

    @contextlib.contextmanager
    def entered(self, device):
        before, self.device = self.device, device
        yield
        self.device = before

    @property
    def functions(self):
        """Which of what was compiled ran, in the order of the launches."""
        return [int(call[4].removeprefix("function ")) for call in self.calls]

    @property
    def through_the_jit(self):
        """For each launch, whether it went through the JIT, which describes it for hooks."""
        return [call[6] == "launch metadata" for call in self.calls]


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    monkeypatch.setattr(triton.runtime.driver, "_active", gpu)
    monkeypatch.setattr(triton.compiler, "compile", gpu.compile)
    monkeypatch.setattr(torch.cuda, "current_device", gpu.get_current_device)
    monkeypatch.setattr(torch.cuda, "device", gpu.entered)
    monkeypatch.setattr(_launch, "_compiled", {})
    return gpu


@pytest.fixture
def kernel(gpu):
    return triton.jit(_map)  # one that has compiled nothing yet


def tensor(n=64, dtype=torch.float32, device=0):
    x = torch.zeros(n, dtype=dtype).as_subclass(OnGpu)
    x.index = device
    return x


X = tensor()


def launch(kernel, x=X, n=1000, a=0.5, math=_twice, block=1024, num_warps=4):
    _launch.launch(kernel, 3, x, X, n, a, MATH=math, BLOCK=block, num_warps=num_warps)


# Where the JIT's rules change: 1, multiples of 16, 32 bits, 64 bits, 64 bits without a sign.
INTEGERS = [0, 1, 2, 15, 16, 17, -1, -16, -17, 2**31 - 16, 2**31 - 1, 2**31, 2**31 + 1]
INTEGERS += [-(2**31), -(2**31) - 1, -(2**31) - 16, 2**40, 2**40 + 1, 2**40 + 16, 2**63 - 1, 2**63]
INTEGERS += [2**64 - 16, 2**64 - 1, -(2**63)]
OTHERS = [0.0, 1.0, -0.5, 16.0, float("inf"), float("nan"), True, False, None]
HALF = (torch.float16, torch.bfloat16)
QUARTER = (torch.float8_e4m3fn, torch.float8_e5m2)
DTYPES = [torch.float32, torch.float64, *HALF, *QUARTER, torch.int64, torch.int32, torch.int16]
DTYPES += [torch.int8, torch.uint8, torch.bool]


def tensors():
    for dtype in DTYPES:
        x = torch.zeros(64, dtype=dtype)
        yield from (x, x[1:], x[16:], x[:0], x[:0].clone())
    x = torch.zeros(64)
    yield from (torch.nn.Parameter(x), x.t(), x[::2], x.as_subclass(OnGpu))
    for size in (2**31 - 1, 2**31, 2**31 + 16):  # what AMD's buffer instructions reach
        x = torch.empty(size, dtype=torch.uint8, device="meta")
        yield from (x, x[:16], x.view(torch.bool))


def disagreements(values, ours, jits):
    """The pairs that one of two keys tells apart and the other does not."""
    keys = [(value, ours(value), jits(value)) for value in values]
    pairs = itertools.combinations_with_replacement(keys, 2)
    return [(a, b) for a, b in pairs if (a[1] == b[1]) is not (a[2] == b[2])]


def jit_key(kernel, backend):
    target = triton.compiler.make_backend(TARGETS[backend])
    binder = create_function_from_signature(kernel.signature, kernel.params, target)
    return lambda value: binder(value)[1]


@pytest.mark.parametrize("backend", TARGETS)
def test_arguments_are_told_apart_exactly_where_the_jit_does(backend, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0" if backend == "hip" else None)
    values = [*INTEGERS, *OTHERS, *tensors()]
    assert not disagreements(values, _launch.specialization, jit_key(_parameter, backend))


def test_constexprs_are_told_apart_exactly_where_the_jit_does():
    values = [0, 1, 16, 17, 1024, 0.5, True, False, None, "sum", (1, 2), tl.float32, tl.float16]
    values += [_twice, _thrice]
    assert not disagreements(values, _launch._hashable, jit_key(_constexpr, "cuda"))


def test_the_first_launch_is_compiled_with_our_options(gpu, kernel):
    launch(kernel, num_warps=8)
    (compiled,) = gpu.compiled
    assert gpu.through_the_jit == [True]
    assert compiled.options["num_warps"] == 8
    assert compiled.options["enable_fp_fusion"] is True


def test_a_later_launch_runs_what_was_compiled(gpu, kernel):
    x = tensor()
    launch(kernel, x)
    launch(kernel, x)
    hooks = (None, None, None)
    values = (x, X, 1000, 0.5, _twice, 1024)
    assert len(gpu.compiled) == 1
    assert gpu.calls[1:] == [
        (3, 1, 1, "stream of 0", "function 0", "metadata", *hooks, *values),
    ]


def test_our_call_is_the_jits_but_for_the_hooks(gpu, kernel):
    launch(kernel)
    launch(kernel)
    jits, ours = gpu.calls
    assert jits[6] == "launch metadata"
    assert jits[7] is knobs.runtime.launch_enter_hook
    assert jits[8] is knobs.runtime.launch_exit_hook
    assert ours == (*jits[:6], None, None, None, *jits[9:])


@pytest.mark.parametrize(
    "other",
    [
        {"x": tensor(dtype=torch.float16)},
        {"x": tensor()[1:]},
        {"x": tensor(device=1)},
        {"num_warps": 8},
        {"n": 1001 * 16},
        {"n": 1},
        {"n": 2**40},
        {"a": 1},
        {"a": None},
        {"math": _thrice},
        {"block": 2048},
    ],
    ids=lambda other: ", ".join(other),
)
def test_another_kind_has_a_compilation_of_its_own(gpu, kernel, other):
    for changes in ({}, other, {}, other):
        launch(kernel, **changes)
    assert len(gpu.compiled) == 2
    assert gpu.functions == [0, 1, 0, 1]
    assert gpu.through_the_jit == [True, True, False, False]


def test_another_kernel_has_a_compilation_of_its_own(gpu, kernel):
    other = triton.jit(_map_again)
    launch(kernel)
    launch(other)
    assert gpu.functions == [0, 1]


def test_values_of_one_kind_share_a_compilation_and_are_passed_on(gpu, kernel):
    longer = tensor(128)
    launch(kernel)
    launch(kernel, longer, n=1001, a=float("inf"))
    assert gpu.functions == [0, 0]
    assert gpu.calls[1][9:13] == (longer, X, 1001, float("inf"))


def watch_launches(kernel, monkeypatch):
    monkeypatch.setattr(knobs.runtime.launch_enter_hook, "calls", [lambda metadata: None])


def watch_the_ends_of_launches(kernel, monkeypatch):
    monkeypatch.setattr(knobs.runtime.launch_exit_hook, "calls", [lambda metadata: None])


def watch_the_kernel(kernel, monkeypatch):
    monkeypatch.setattr(kernel, "pre_run_hooks", [lambda *args, **kwargs: None])


def debug(kernel, monkeypatch):
    monkeypatch.setattr(knobs.runtime, "debug", True)


def change_the_compiler(kernel, monkeypatch):
    hook = "add_stages_inspection_hook"
    monkeypatch.setattr(knobs.runtime, hook, lambda *_: ("key", "hash"))


def instrument(kernel, monkeypatch):
    monkeypatch.setattr(knobs.compilation, "instrumentation_mode", "proton")


WATCHERS = [watch_launches, watch_the_ends_of_launches, watch_the_kernel]
MEDDLERS = [debug, change_the_compiler, instrument]


@pytest.mark.parametrize("watcher", [*WATCHERS, *MEDDLERS])
def test_who_watches_sees_every_launch(gpu, kernel, monkeypatch, watcher):
    launch(kernel)
    watcher(kernel, monkeypatch)
    launch(kernel)
    launch(kernel)
    assert gpu.through_the_jit == [True, True, True]


@pytest.mark.parametrize("watcher", [*WATCHERS, *MEDDLERS])
def test_what_was_compiled_for_a_watcher_does_not_outlive_it(gpu, kernel, watcher):
    with pytest.MonkeyPatch.context() as monkeypatch:
        watcher(kernel, monkeypatch)
        launch(kernel)
    launch(kernel)
    launch(kernel)
    assert gpu.through_the_jit == [True, True, False]
    assert not gpu.compiled[gpu.functions[-1]].options["debug"]


def test_a_compilation_that_a_hook_prevents_is_tried_again(gpu, kernel, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(knobs.runtime, "jit_cache_hook", lambda **_: True)
        launch(kernel, math=None)  # Triton 3.6 cannot describe a jitted function to this hook
    assert gpu.calls == []
    launch(kernel, math=None)
    assert gpu.through_the_jit == [True]


def test_a_tensor_on_another_device_is_worked_on_there(gpu, kernel):
    x = tensor(device=1)
    launch(kernel, x)
    launch(kernel, x)
    assert [call[3] for call in gpu.calls] == ["stream of 1", "stream of 1"]
    assert gpu.through_the_jit == [True, False]
    assert gpu.device == 0


def test_the_device_is_the_tensors_at_the_moment_of_a_launch(gpu, kernel, monkeypatch):
    devices = []
    monkeypatch.setattr(Compiled, "run", lambda self, *call: devices.append(gpu.device))
    x = tensor(device=1)
    launch(kernel, x)
    launch(kernel, x)
    assert devices == [1, 1]


def test_fake_tensors_launch_nothing(gpu, kernel):
    with FakeTensorMode():
        launch(kernel, torch.empty(64))
    assert gpu.compiled == gpu.calls == []


def test_two_threads_may_meet_at_a_new_kind(gpu, kernel, monkeypatch):
    compile = gpu.compile
    start = threading.Barrier(2)

    def slowly(*args, **kwargs):
        time.sleep(0.05)  # the other thread looks meanwhile, and finds nothing either
        return compile(*args, **kwargs)

    def together(_):
        start.wait(timeout=10)
        launch(kernel)

    monkeypatch.setattr(triton.compiler, "compile", slowly)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(together, range(2)))
    launch(kernel)
    assert gpu.through_the_jit == [True, True, False]
    assert {call[9:] for call in gpu.calls} == {(X, X, 1000, 0.5, _twice, 1024)}


def test_a_block_holds_its_row_within_its_bounds():
    sizes = [1, 15, 16, 17, 1000, 1024, 1025, 5000]
    blocks = [_launch.power_of_2(n, least=16, most=4096) for n in sizes]
    assert blocks == [16, 16, 16, 32, 1024, 1024, 2048, 4096]

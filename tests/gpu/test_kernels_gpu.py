"""Every piece's kernels as a GPU runs them: in graphs, on streams, compiled, without a wait."""

import contextlib
import gc
from functools import partial

import pytest
import torch
import torch.nn.functional as theirs
from pieces import PIECES
from running import (
    CHANNELS,
    N,
    assert_same,
    large,
    refill,
    run,
    small,
    turned,
    upstream,
)
from torch.utils.checkpoint import checkpoint

import torchref
import torchref.nn.functional as ours
from torchref import dispatch
from torchref.testing import assert_parity

DEVICE = "cuda"
HALF_AND_SINGLE = [torch.float32, torch.float16, torch.bfloat16]

pytestmark = pytest.mark.gpu
every_piece = pytest.mark.parametrize("piece", PIECES, ids=lambda p: p.name)
without_random = pytest.mark.parametrize(
    "piece", [p for p in PIECES if not p.random], ids=lambda p: p.name
)


@pytest.fixture(autouse=True)
def kernels(needs_a_gpu):
    with torchref.backend("triton"):
        yield


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@without_random  # a kernel's mask is its own
def test_sizes_that_no_block_divides(piece, dtype):
    assert_parity(piece.ours, piece.theirs, *large(piece, DEVICE, dtype))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "cross_entropy"])
def test_rows_too_wide_for_registers(name, dtype):
    x = torch.randn(3, 70_001, device=DEVICE).to(dtype).requires_grad_()
    last = torch.tensor([0, 70_000, -100], device=DEVICE) if name == "cross_entropy" else 1
    assert_parity(getattr(ours, name), getattr(theirs, name), x, last)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(37, 13, 31, 29), (64, 96, 7, 7), (9001, 5, 1, 1)], ids=str)
def test_batch_norm_of_channels_last(shape, training, dtype):
    x = torch.randn(shape, device=DEVICE, dtype=dtype).to(memory_format=torch.channels_last)
    pair = [library.nn.BatchNorm2d(shape[1], device=DEVICE) for library in (torchref, torch)]
    assert_parity(*[m.to(dtype).train(training) for m in pair], x.requires_grad_())


@pytest.mark.parametrize("activation", ["relu", "gelu_tanh"])  # from the output, and not
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("added", [True, False])
def test_batch_norm_and_what_follows_it_of_channels_last(added, training, dtype, activation):
    def composed(*args, activation, residual):
        y = theirs.batch_norm(*args)
        y = y if residual is None else y + residual
        return theirs.relu(y) if activation == "relu" else theirs.gelu(y, approximate="tanh")

    x, residual = (
        torch.randn(7, 24, 31, 29, device=DEVICE, dtype=dtype)
        .to(memory_format=torch.channels_last)
        .requires_grad_()
        for _ in range(2)
    )
    channels = [(torch.rand(24, device=DEVICE) + 0.5).to(dtype) for _ in range(4)]
    parameters = [c.requires_grad_() for c in channels[2:]]
    kwargs = {"activation": activation, "residual": residual if added else None}
    inputs = x, *channels[:2], *parameters, training
    assert_parity(ours.batch_norm_act, composed, *inputs, **kwargs)


@every_piece
def test_results_repeat_bit_by_bit(piece):
    inputs = large(piece, DEVICE)
    dy = upstream(piece.ours, inputs)
    torch.manual_seed(0)
    first = run(piece.ours, inputs, dy)
    for _ in range(4):
        torch.manual_seed(0)
        assert_same(run(piece.ours, inputs, dy), first, piece)


class Graph:
    """Forward and backward, captured once to be replayed on what lies in ``inputs``."""

    def __init__(self, f, inputs, dy):
        self.inputs = inputs
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # compiles, which a capture could not
            for _ in range(3):
                run(f, inputs, dy)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = run(f, inputs, dy)

    def replay(self, inputs):
        refill(self.inputs, inputs)
        self.graph.replay()
        return [result.clone() for result in self.results]


@every_piece
def test_a_graph_replays_on_new_inputs(piece):
    inputs = small(piece, DEVICE)
    dy = upstream(piece.ours, inputs)
    graph = Graph(piece.ours, inputs, dy)
    for turn in range(3):
        new = turned(inputs)
        torch.manual_seed(turn)
        replayed = graph.replay(new)
        torch.manual_seed(turn)
        assert_same(replayed, run(piece.ours, new, dy), piece)


def test_a_graph_draws_a_new_mask_each_time():
    inputs = (torch.ones(10_007, device=DEVICE, requires_grad=True),)
    graph = Graph(partial(ours.dropout, p=0.4), inputs, torch.ones(10_007, device=DEVICE))
    masks = []
    for _ in range(3):
        y, dx = graph.replay(inputs)
        assert torch.equal(y, dx)
        assert (y == 0).double().mean().item() == pytest.approx(0.4, abs=0.025)  # 5 deviations
        masks.append(y)
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_graph_moves_the_running_statistics(momentum):
    captured, eager = (
        torchref.nn.BatchNorm1d(5, momentum=momentum, device=DEVICE) for _ in range(2)
    )
    x = torch.randn(64, 5, device=DEVICE, requires_grad=True)
    dy = torch.randn(64, 5, device=DEVICE)
    graph = Graph(captured, (x,), dy)
    eager.load_state_dict(captured.state_dict())
    for _ in range(3):
        new = (torch.randn(64, 5, device=DEVICE, requires_grad=True),)
        graph.replay(new)
        run(eager, new, dy)
    tolerance = {"rtol": 0.0, "atol": 0.0}
    torch.testing.assert_close(captured.state_dict(), eager.state_dict(), **tolerance)
    assert captured.num_batches_tracked.item() == 6  # three to warm up, none in the capture


@contextlib.contextmanager
def waiting_is_an_error():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# torch says once that it does not find every wait
no_notice = pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")


@no_notice
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)  # kernels, formulas
@every_piece
def test_nothing_waits_for_the_gpu(piece, dtype):
    inputs = small(piece, DEVICE, dtype)
    dy = upstream(piece.ours, inputs)
    run(piece.ours, inputs, dy)  # compiles
    with waiting_is_an_error():
        run(piece.ours, inputs, dy)


@no_notice
def test_no_module_waits_for_the_gpu():
    nn = torchref.nn
    x = torch.randn(16, 5, device=DEVICE, requires_grad=True)
    target = torch.randint(0, 5, (16,), device=DEVICE)
    weight = torch.rand(5, device=DEVICE)
    cross_entropy = nn.CrossEntropyLoss(weight, label_smoothing=0.1)
    average = nn.BatchNorm1d(5, momentum=None, device=DEVICE)
    net = torch.nn.Sequential(average, nn.Dropout(), nn.ReLU(inplace=True))
    for f, inputs in [
        (cross_entropy, (x, target)),
        (nn.NLLLoss(weight), (x, target)),
        (nn.BCEWithLogitsLoss(weight, pos_weight=weight), (x, x.detach().sigmoid())),
        (net, (x,)),
    ]:
        dy = upstream(f, inputs)
        run(f, inputs, dy)
        with waiting_is_an_error():
            run(f, inputs, dy)


@no_notice
def test_a_wait_would_be_found():
    x = torch.ones(3, device=DEVICE)
    with pytest.raises(RuntimeError, match="synchroniz"), waiting_is_an_error():
        x.sum().item()


def operations(graph):
    """Ours in what Dynamo traced, in the bodies of Functions too."""
    return {
        str(node.target)
        for module in graph.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if getattr(node.target, "namespace", None) == "torchref"
    }


def twice_the_batch(inputs):
    """The inputs, each that is as long as the first one doubled."""
    size = inputs[0].shape[0]
    return tuple(
        torch.cat([x, x]).detach().requires_grad_(x.requires_grad) if x.shape[0] == size else x
        for x in inputs
    )


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")  # a hint of Inductor's
@pytest.mark.parametrize("dynamic", [False, True])
@every_piece
def test_compiled_graphs_call_our_kernels(piece, dynamic):
    torch._dynamo.reset()  # every partial shares one code object, and its limit of compilations
    traced = []

    def backend(graph, example_inputs):
        traced.append(operations(graph))
        return torch._dynamo.lookup_backend("inductor")(graph, example_inputs)

    compiled = torch.compile(piece.ours, fullgraph=True, dynamic=dynamic, backend=backend)
    inputs = small(piece, DEVICE)
    compilations = []
    for given in (inputs, twice_the_batch(inputs)) if dynamic else (inputs,):
        dy = upstream(piece.ours, given)
        torch.manual_seed(0)
        mine = run(compiled, given, dy)
        torch.manual_seed(0)
        torch.testing.assert_close(mine, run(piece.ours, given, dy))
        compilations.append(len(traced))
    assert all(traced)
    assert compilations[0] == compilations[-1]  # one serves every size


def requested(which: str) -> int:
    """Bytes asked of torch's allocator, before it rounds them up to 512."""
    return torch.cuda.memory_stats()[f"requested_bytes.all.{which}"]


# What forward keeps beside its inputs and its output.
KEPT = {
    "dropout": 8,  # the seed: no mask
    "cross_entropy": N * 8 + 4,  # two numbers a row, and the mean's divisor
    "cross_entropy_probabilities": N * 12,  # and the sum of the row's targets
    "nll_loss": 4,
    "batch_norm_train": CHANNELS * 8,
    "batch_norm_eval": CHANNELS * 8,  # this piece makes its running statistics itself
    "batch_norm_act_train": CHANNELS * 8,
    "batch_norm_act_eval": CHANNELS * 8,  # likewise
}


@every_piece
def test_memory(piece):
    inputs = large(piece, DEVICE)
    dy = upstream(piece.ours, inputs)
    run(piece.ours, inputs, dy)  # compiles; the libraries take their workspaces
    gc.collect()
    passing = inputs[0].nbytes // 64  # partial sums, for the time of a pass
    if piece.name == "linear":  # the library's workspaces
        passing = 2**26

    start = requested("current")
    torch.cuda.reset_peak_memory_stats()
    y = piece.ours(*inputs)
    kept = requested("current") - start
    assert kept <= y.nbytes + KEPT.get(piece.name, 0)
    assert requested("peak") - start <= kept + passing

    start = requested("current")
    torch.cuda.reset_peak_memory_stats()
    gradients = torch.autograd.grad(y, [x for x in inputs if x.requires_grad], dy)
    made = sum(dx.nbytes for dx in gradients)
    assert requested("peak") - start <= made + passing


@every_piece
def test_another_stream(piece):
    """What runs there sees what was written there just before."""
    inputs, new = large(piece, DEVICE), turned(large(piece, DEVICE))
    dy = upstream(piece.ours, inputs)
    torch.manual_seed(0)
    expected = run(piece.ours, new, dy)
    torch.manual_seed(0)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # some milliseconds, for another stream to be too early
        refill(inputs, new)
        results = run(piece.ours, inputs, dy)
    stream.synchronize()
    assert_same(results, expected, piece)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device or none")
@every_piece
def test_a_second_device_while_the_first_is_current(piece):
    results = []
    for device in ("cuda:0", "cuda:1"):
        inputs = small(piece, device)
        dy = torch.ones_like(piece.ours(*inputs))
        for _ in range(2):  # compiled, and then from the launcher's cache
            torch.manual_seed(0)
            result = run(piece.ours, inputs, dy)
            assert all(t.device == torch.device(device) for t in result)
        results.append([t.cpu() for t in result])
        assert torch.cuda.current_device() == 0
    torch.testing.assert_close(*results)


@pytest.fixture
def ran(monkeypatch):
    """The names of the kernels that ran."""
    names, find = [], dispatch.find_kernel

    def spying(module, name):
        kernel = find(module, name)

        def spy(*args):
            names.append(name)
            return kernel(*args)

        return kernel and spy

    monkeypatch.setattr(dispatch, "find_kernel", spying)
    return names


@every_piece
def test_auto_runs_kernels(piece, ran):
    with torchref.backend("auto"):
        inputs = small(piece, DEVICE)
        run(piece.ours, inputs, upstream(piece.ours, inputs))
        assert ran
        ran.clear()
        inputs = small(piece, DEVICE, torch.float64)
        run(piece.ours, inputs, upstream(piece.ours, inputs))
        assert not ran


@every_piece
def test_backward_runs_the_kernel_that_forward_chose(piece, ran):
    with torchref.backend("auto"):
        inputs = small(piece, DEVICE)
        y = piece.ours(*inputs)
    ran.clear()
    with torchref.backend("reference"):
        y.sum().backward()  # in a thread of autograd's
    assert ran


def test_seeds_of_dropout():
    x = torch.ones(10_007, device=DEVICE)
    torch.manual_seed(1)
    first, second = ours.dropout(x), ours.dropout(x)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    with torch.random.fork_rng([x.get_device()]):
        assert torch.equal(ours.dropout(x), first)
    state = torch.cuda.get_rng_state()
    assert torch.equal(ours.dropout(x), first)
    torch.cuda.set_rng_state(state)
    assert torch.equal(ours.dropout(x), first)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_draws_the_same_mask(use_reentrant):
    x = torch.randn(10_007, device=DEVICE, requires_grad=True)
    y = checkpoint(lambda x: ours.dropout(x * 2, 0.5), x, use_reentrant=use_reentrant)
    torch.rand(5, device=DEVICE)  # the generator has gone on by the time of backward
    y.sum().backward()
    assert torch.equal(x.grad != 0, y != 0)

"""Batch norm over processes equals batch norm of the joined batch in one."""

import copy
import io
import os
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import torchref
from torchref.nn.sync_batch_norm import SyncBatchNormFunction

# Even, uneven, one value of a channel, none at all, and three processes.
SHARES = ((4, 4), (5, 2), (7, 1), (6, 0), (3, 1, 4))
SHAPE = {2: (), 3: (5,), 4: (3, 2), 5: (2, 3, 2)}  # of a sample's channel, by rank


def norm_of(rank: int, act: bool, dtype: torch.dtype, **options) -> tuple[nn.Module, nn.Module]:
    """One for processes and one for a single process, of the same parameters."""
    torch.manual_seed(0)
    cls = torchref.nn.SyncBatchNormAct if act else torchref.nn.SyncBatchNorm
    alone = getattr(torchref.nn, f"BatchNorm{'Act' * act}{max(1, rank - 2)}d")
    if act:
        options |= {"activation": "silu"}
    pair = [made(4, dtype=dtype, **options) for made in (cls, alone)]
    with torch.no_grad():
        for p in pair[0].parameters():
            p.copy_(torch.randn(4))
    pair[1].load_state_dict(pair[0].state_dict())
    return pair[0], pair[1]


def run(norm: nn.Module, x, dy, residual):
    """Two steps; the outputs, the gradients of x, residual and parameters, and the buffers."""
    x = x.clone().requires_grad_()
    residual = None if residual is None else residual.clone().requires_grad_()
    results = []
    for _ in range(2):
        y = norm(x) if residual is None else norm(x, residual=residual)
        wanted = [t for t in (x, residual, *norm.parameters()) if t is not None]
        results += [y.detach(), *torch.autograd.grad(y, wanted, dy)]
    return results, [b.clone() for b in norm.buffers()]


def process(rank: int, size: int, store: str, cases: list, collected) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=size)
    collected[rank] = [part(rank, *case) for case in cases]
    leave()


def leave() -> None:
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # at an ordinary exit a thread of gloo's that is still there aborts the process


def part(rank: int, shares, ndim, act, dtype, layout, options):
    norm, _ = norm_of(ndim, act, dtype, **options)
    x, dy, residual = inputs(shares, ndim, act, dtype, layout)
    first = sum(shares[:rank])
    mine = slice(first, first + shares[rank])
    residual = None if residual is None else residual[mine]
    return run(norm, x[mine], dy[mine], residual)


def inputs(shares, ndim, act, dtype, layout):
    torch.manual_seed(1)
    shape = (sum(shares), 4, *SHAPE[ndim])
    x, dy, residual = (torch.randn(shape).to(dtype) for _ in range(3))
    x = x * 2 + 300  # a mean at which a merge of squares loses its digits
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    return x, dy, residual if act else None


CASES = [
    *[(shares, 4, False, torch.float32, "contiguous", {}) for shares in SHARES],
    *[((5, 2), ndim, ndim == 4, torch.float64, "contiguous", {}) for ndim in SHAPE],
    ((5, 2), 4, True, torch.float32, "channels_last", {}),
    ((5, 2), 4, True, torch.bfloat16, "contiguous", {}),
    ((5, 2), 4, False, torch.float64, "contiguous", {"momentum": None}),
    ((5, 2), 4, False, torch.float64, "contiguous", {"affine": False}),
    ((5, 2), 4, False, torch.float64, "contiguous", {"track_running_stats": False}),
    ((5, 2), 4, False, torch.float64, "contiguous", {"unbiased_running_var": False}),
]


def spawned(function, size: int, tmp_path, *args):
    """What processes put at their ranks of a shared dict."""
    with mp.Manager() as manager:
        collected = manager.dict()
        mp.spawn(function, (size, str(tmp_path / "store"), *args, collected), nprocs=size)
        return [collected[rank] for rank in range(size)]


@pytest.fixture(scope="module")
def by_process(tmp_path_factory):
    """The results of all cases, by the number of processes, whose start takes seconds."""
    return {
        size: spawned(
            process,
            size,
            tmp_path_factory.mktemp("store"),
            [case for case in CASES if len(case[0]) == size],
        )
        for size in (2, 3)
    }


@pytest.mark.parametrize("case", CASES, ids=str)
def test_processes_equal_one_with_the_joined_batch(case, by_process):
    shares, ndim, act, dtype, layout, options = case
    _, alone = norm_of(ndim, act, dtype, **options)
    expected, buffers = run(alone, *inputs(shares, ndim, act, dtype, layout))
    place = [other for other in CASES if len(other[0]) == len(shares)].index(case)
    parts = [results[place] for results in by_process[len(shares)]]
    split = 3 if act else 2  # the output, dx and dresidual are shares of the batch
    each = split + len(list(alone.parameters()))
    # Sums in another order: some eps of values up to 300, and of half types one rounding.
    tolerances = {
        torch.float64: {"rtol": 1e-11, "atol": 1e-11},
        torch.float32: {"rtol": 1e-4, "atol": 1e-4},
        torch.bfloat16: {"rtol": 1e-2, "atol": 2e-2},
    }[dtype]
    for i, value in enumerate(expected):
        if i % each < split:
            joined = torch.cat([results[i] for results, _ in parts])
        else:
            joined = sum(results[i] for results, _ in parts)
        torch.testing.assert_close(joined, value, **tolerances)
    # A process's mean is rounded before it is merged: by 3e-5 at 300, of which the variance sees
    # twice that times the distance of two means, about 1.
    close = {"rtol": 1e-5, "atol": 6e-5} if dtype != torch.float64 else tolerances
    for _, theirs in parts:
        torch.testing.assert_close(theirs, buffers, **close)


def alone_in_its_group(rank: int, size: int, store: str, collected) -> None:
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=size)
    groups = [dist.new_group([i]) for i in range(size)]
    torch.manual_seed(rank)
    x = torch.randn(4, 3)
    norm = torchref.nn.SyncBatchNorm(3, process_group=groups[rank])
    same = torch.equal(norm(x), torchref.nn.BatchNorm1d(3)(x))
    shared = torchref.nn.SyncBatchNorm(3)
    evaluated = torch.equal(shared.eval()(x), torchref.nn.BatchNorm1d(3).eval()(x))
    shared.train()
    untracked = torchref.nn.SyncBatchNorm(3, track_running_stats=False)  # no count in the way
    errors = []
    for call in (
        lambda: torch.func.grad(lambda x: untracked(x).sum())(x),
        lambda: torch.func.jvp(untracked, (x,), (x,)),
        lambda: torch.autograd.grad(
            shared(x.requires_grad_()).square().sum(), x, create_graph=True
        ),
        lambda: shared(torch.ones(4, 2)),
    ):
        try:
            call()
        except RuntimeError as error:
            errors.append(str(error))
    compiled = torch.compile(copy.deepcopy(shared), backend="aot_eager")
    graph_breaks = torch.equal(compiled(x), copy.deepcopy(shared)(x))
    collected[rank] = same, evaluated, graph_breaks, errors
    leave()


def test_groups_of_one_evaluation_and_errors(tmp_path):
    for same, evaluated, graph_breaks, errors in spawned(alone_in_its_group, 2, tmp_path):
        assert same
        assert evaluated
        assert graph_breaks
        assert len(errors) == 4
        assert all("do not reach into other processes" in error for error in errors[:2]), errors
        assert "no second derivative" in errors[2]
        assert "expected `running_mean` of shape (2,), got (3,)" in errors[3]


def trained(rank: int, size: int, store: str, collected) -> None:
    """Three steps under DistributedDataParallel with what convert_sync_batchnorm makes."""
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=size)
    net, x, target = network()
    net = nn.parallel.DistributedDataParallel(torchref.nn.SyncBatchNorm.convert_sync_batchnorm(net))
    collected[rank] = steps(net, x[rank::size], target[rank::size])
    leave()


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    net = nn.Sequential(*net, nn.Linear(64, 5), nn.BatchNorm1d(5))
    torchref.convert(net, fuse=True)
    return net, torch.randn(8, 2, 6, 6), torch.randn(8, 5)


def steps(net, x, target):
    optimizer = torchref.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        torchref.nn.functional.mse_loss(net(x), target).backward()
        optimizer.step()
    return [t.detach().clone() for t in net.state_dict().values()]


def test_data_parallel_training_equals_one_process(tmp_path):
    expected = steps(*network())
    for state in spawned(trained, 2, tmp_path):
        torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-6)


def test_without_processes_it_is_batch_norm():
    x = torch.randn(4, 3, 5)
    for training in (True, False):
        norm, alone = torchref.nn.SyncBatchNorm(3), torchref.nn.BatchNorm1d(3)
        assert torch.equal(norm.train(training)(x), alone.train(training)(x))
    act = torchref.nn.SyncBatchNormAct(3, activation="tanh")
    assert torch.equal(act(x, residual=x), torchref.nn.BatchNormAct1d(3, activation="tanh")(x, x))
    for wrong in (torch.ones(3), torch.ones(2, 0)):
        with pytest.raises(ValueError, match=r"SyncBatchNorm: expected `input` of shape \(N, C"):
            norm(wrong)


def test_convert_sync_batchnorm_changes_classes_and_nothing_else():
    net = nn.Sequential(
        nn.BatchNorm1d(3),
        torchref.nn.BatchNorm2d(3, unbiased_running_var=False),
        torchref.nn.BatchNormAct3d(3, activation="elu", param=0.5),
        nn.SyncBatchNorm(3),
        nn.Linear(2, 2),
    )
    modules, state = list(net), {k: id(v) for k, v in net.state_dict(keep_vars=True).items()}
    assert torchref.nn.SyncBatchNorm.convert_sync_batchnorm(net, "a group") is net
    plain, act = torchref.nn.SyncBatchNorm, torchref.nn.SyncBatchNormAct
    assert [type(module) for module in net] == [plain, plain, act, plain, nn.Linear]
    assert list(net) == modules
    assert {k: id(v) for k, v in net.state_dict(keep_vars=True).items()} == state
    assert net[0].process_group == "a group"
    assert not net[1].unbiased_running_var
    assert (net[2].activation, net[2].param) == ("elu", 0.5)
    with warnings.catch_warnings():  # again: nothing is left
        torchref.nn.SyncBatchNorm.convert_sync_batchnorm(net, "a group")


def test_convert_sync_batchnorm_names_what_it_leaves():
    class Special(nn.BatchNorm2d):
        pass

    with pytest.warns(UserWarning, match="left '1', a Special"):
        torchref.nn.SyncBatchNorm.convert_sync_batchnorm(
            nn.Sequential(nn.BatchNorm2d(3), Special(3))
        )


def test_convert_makes_torchs_ours_and_revert_restores_it():
    net = nn.Sequential(nn.SyncBatchNorm(3))
    torchref.convert(net)
    assert type(net[0]) is torchref.nn.SyncBatchNorm
    assert net[0].process_group is None
    for copied in (copy.deepcopy(net), torch.load(saved(net), weights_only=False)):
        assert type(copied[0]) is torchref.nn.SyncBatchNorm
    torchref.revert(net)
    assert type(net[0]) is nn.SyncBatchNorm


def saved(net: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return file


def test_one_gathering_forward_and_one_reduction_backward(monkeypatch):
    """Counted; what others hold is this process's own, twice."""
    calls = []

    def all_gather(into, mine, group):
        calls.append(("all_gather", mine.numel()))
        for x in into:
            x.copy_(mine)

    def all_reduce(x, group):
        calls.append(("all_reduce", x.numel()))
        x.mul_(2)

    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(dist, "all_gather", all_gather)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    options = (None, None, 0.1, 1e-5, True, None, 0.0, None)
    y = SyncBatchNormFunction.call(x, None, None, None, *options)[0]
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert calls == [("all_gather", 7), ("all_reduce", 6)]
    expected = torch.nn.functional.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(dx, *torch.autograd.grad(expected, x, dy))

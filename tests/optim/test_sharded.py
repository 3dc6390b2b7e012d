"""Parameters that several processes share, as FSDP2 has them."""

import os

import pytest
import torch
import torch.multiprocessing
from optim_parity import NAMES, ours, theirs

import torchref
from torchref.optim import _one_launch

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch without distributed"
)


def values(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 3, generator=generator) for n in (5, 4, 1)]  # 1 row for 2 processes


def train(cls, distribute, **options):
    """Parameters after three steps, whole."""
    params = [torch.nn.Parameter(distribute(x)) for x in values(0)]
    optimizer = cls(params, lr=0.1, **options)
    norms = []
    for step in range(3):
        for p, grad in zip(params, values(step + 1), strict=True):
            p.grad = distribute(grad)
        if cls.__module__.startswith("torch.") and "max_norm" not in options:
            norms.append(torch.nn.utils.clip_grad_norm_(params, 0.5))
        optimizer.step()
    return params, norms, optimizer


def process(rank, file, backend):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=2
    )
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    torchref.set_backend(backend)
    for name in NAMES:
        expected, norms, _ = train(theirs(name), torch.clone)
        sharded, _, optimizer = train(
            ours(name), lambda x: distribute_tensor(x, mesh, [Shard(0)]), max_norm=0.5
        )
        optimizer.load_state_dict(optimizer.state_dict())  # whose shapes are not the shards'
        assert (optimizer._in_one_launch is not None) == (backend == "triton")
        torch.testing.assert_close(optimizer.grad_norm, norms[-1])
        for p, q in zip(sharded, expected, strict=True):
            torch.testing.assert_close(p.full_tensor(), q.detach(), rtol=1e-5, atol=1e-6)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # at an ordinary exit a thread of gloo's that is still there aborts the process


def test_two_processes_clip_by_the_norm_of_all(tmp_path):
    """A norm of what one process has would clip each shard by a factor of its own."""
    backend = "triton" if torchref.dispatch.interprets() else "auto"
    torch.multiprocessing.spawn(process, (tmp_path / "store", backend), nprocs=2)


def test_a_tensor_that_is_not_sharded_is_itself():
    x = torch.nn.Parameter(torch.ones(2))
    assert _one_launch.local(x) is x
    assert _one_launch.whole(x) is x

"""Two processes over gloo train as one does with the joined batch, and send what the page says."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import torchref
from torchref.training import Config, ConvertCallback, Run, SyncBatchNormPlugin

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch without distributed"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),  # Lightning on torch's newer pytree
]

ROOT = Path(__file__).parents[2]
# A joined batch is summed in another order: roundings of float64, passed on by twelve steps.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
SIZE = 2  # processes
# What FSDP2 calls up to torch 2.12 and from 2.13 on.
GATHERS = ("all_gather_into_tensor", "all_gather_single")
SCATTERS = ("reduce_scatter_tensor", "reduce_scatter_single")


class Network(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = layers().double()
        self.losses, self.seen = [], []

    def training_step(self, batch):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.detach())
        self.seen.append(type(self.net[1]).__name__)
        return loss

    def test_step(self, batch):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("test_loss", loss, sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class Sharded(Network):
    def configure_model(self):
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if isinstance(self.net, FSDPModule):  # in a test after a fit
            return
        torchref.convert(self)
        torchref.nn.SyncBatchNorm.convert_sync_batchnorm(self)
        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.net[0], mesh=mesh)
        fully_shard(self.net, mesh=mesh)


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    # No bias before batch norm: Adam would make steps of its gradient, which is rounding alone.
    first = nn.Linear(6, 16, bias=False)
    net = nn.Sequential(first, nn.BatchNorm1d(16), nn.SiLU(), nn.Linear(16, 3))
    nn.init.uniform_(net[1].weight, 0.5, 1.5)
    return net


def data(batch_size: int, rank: int = 0, size: int = 1) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 6, dtype=torch.float64, generator=generator)
    x[::2] += 1.5  # the processes take every other sample: their own statistics differ
    samples = TensorDataset(x, x[:, :3].argmax(1))
    sampler = DistributedSampler(samples, size, rank, shuffle=False)
    return DataLoader(samples, batch_size, sampler=sampler)


def share() -> DataLoader:
    """What this process trains on."""
    return data(8, dist.get_rank(), SIZE)


def trainer_of(folder, epochs: int = 3, **options) -> Trainer:
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,  # Lightning's would shuffle
        **options,
    )


def result(model: Network, trainer: Trainer) -> dict:
    state = {name: whole(value) for name, value in model.state_dict().items()}
    classes = {type(optimizer) for optimizer in trainer.optimizers}
    found = {"losses": torch.stack(model.losses), "state": state, "optimizers": classes}
    trainer.test(model, data(64), verbose=False)
    return found | {"test": trainer.callback_metrics["test_loss"], "seen": set(model.seen)}


def whole(x: torch.Tensor) -> torch.Tensor:
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()


def process(rank: int, folder: str, collected) -> None:
    torch.set_num_threads(1)
    # What torchrun tells Lightning; the processes are there already.
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": SIZE, "LOCAL_WORLD_SIZE": SIZE}
    place |= {"MASTER_ADDR": "localhost", "MASTER_PORT": 0, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in place.items()})
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=SIZE)
    collected[rank] = {
        "ddp": data_parallel(folder),
        "fsdp2": sharded(folder),
        "refusal": refusal(folder),
        "bytes": counted(),
    }
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # at an ordinary exit a thread of gloo's that is still there aborts the process


def data_parallel(folder: str) -> dict:
    model = Network()
    options = {"callbacks": [ConvertCallback(fuse=True)], "plugins": [SyncBatchNormPlugin()]}
    trainer = trainer_of(folder, devices=SIZE, strategy="ddp", **options)
    trainer.fit(model, share())
    after = type(model.net[1])
    trainer.save_checkpoint(f"{folder}/ddp.ckpt")
    return result(model, trainer) | {"after": after}


def sharded(folder: str) -> dict:
    """One epoch, a checkpoint, and the others by a model that resumes from it."""
    callback = ConvertCallback()
    options = {"devices": SIZE, "callbacks": [callback]}
    first = Sharded()
    trainer = trainer_of(folder, 1, strategy=ModelParallelStrategy(SIZE, 1), **options)
    trainer.fit(first, share())
    trainer.save_checkpoint(f"{folder}/fsdp2")
    model = Sharded()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()  # whatever it has then comes from the checkpoint
    one_file = ModelParallelStrategy(SIZE, 1, save_distributed_checkpoint=False)
    trainer = trainer_of(folder, strategy=one_file, **options)
    trainer.fit(model, share(), ckpt_path=f"{folder}/fsdp2", weights_only=True)
    trainer.save_checkpoint(f"{folder}/fsdp2.ckpt")
    parts = {type(p).__name__ for p in model.parameters()}
    found = result(model, trainer)
    losses = torch.cat([torch.stack(first.losses), found["losses"]])
    return found | {"losses": losses, "parts": parts}


def refusal(folder: str) -> str:
    """What torch's SyncBatchNorm says to a CPU."""
    trainer = trainer_of(folder, devices=SIZE, strategy="ddp", sync_batchnorm=True)
    try:
        trainer.fit(Network(), share())
    except ValueError as error:
        return str(error)
    return "nothing"


def counted() -> dict:
    """The calls of collectives in one step: their names and the bytes of the whole tensor."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    ours = torchref.nn.SyncBatchNorm.convert_sync_batchnorm
    ddp = nn.parallel.DistributedDataParallel(ours(layers()))
    ddp.register_comm_hook(None, default_hooks.allreduce_hook)  # as without, but by way of `dist`
    net = layers()
    mesh = init_device_mesh("cpu", (SIZE,))
    fully_shard(net[0], mesh=mesh)
    fully_shard(net, mesh=mesh)
    return {"ddp": one_step(ddp), "fsdp2": one_step(net)}


def one_step(net: nn.Module) -> list[tuple[str, int]]:
    calls = []

    def counting(name, size_of):
        collective = getattr(dist, name)

        def call(*args, **kwargs):
            x = size_of(*args, **kwargs)
            tensors = x if isinstance(x, list) else [x]
            calls.append((name, sum(t.numel() * t.element_size() for t in tensors)))
            return collective(*args, **kwargs)

        return call

    sizes = {
        "all_reduce": lambda tensor, *_, **__: tensor,
        "all_gather": lambda tensor_list, *_, **__: tensor_list,
        **dict.fromkeys(GATHERS, lambda output_tensor, *_, **__: output_tensor),
        **dict.fromkeys(SCATTERS, lambda output, input, *_, **__: input),
        "_broadcast_coalesced": lambda group, tensors, *_, **__: list(tensors),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, size_of in sizes.items():
            if hasattr(dist, name):
                patch.setattr(dist, name, counting(name, size_of))
        net(torch.randn(8, 6)).square().mean().backward()
    return calls


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def processes(folder):
    """What each of the processes found, which are started once: that takes seconds."""
    with mp.Manager() as manager:
        collected = manager.dict()
        mp.spawn(process, (str(folder), collected), nprocs=SIZE)
        return [collected[rank] for rank in range(SIZE)]


@pytest.fixture(scope="module")
def alone(folder):
    """Torch's model in one process, with the joined batch."""
    model = Network()
    trainer = trainer_of(folder)
    trainer.fit(model, data(8 * SIZE))
    return result(model, trainer)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_equal_torch_in_one(strategy, processes, alone):
    found = [results[strategy] for results in processes]
    for each in found:
        torch.testing.assert_close(each["state"], alone["state"], **CLOSE)
        torch.testing.assert_close(each["test"], alone["test"], **CLOSE)
        assert each["optimizers"] == {torchref.optim.AdamW}
    joined = sum(each["losses"] for each in found) / SIZE
    torch.testing.assert_close(joined, alone["losses"], **CLOSE)
    assert not torch.allclose(found[0]["losses"], found[1]["losses"])  # they had their own samples


def test_batch_norm_is_shared_while_fitting(processes):
    for results in processes:
        assert results["ddp"]["seen"] == {"SyncBatchNormAct"}  # the activation is still in it
        assert results["ddp"]["after"] is torchref.nn.BatchNormAct1d
        assert results["fsdp2"]["parts"] == {"DTensor"}
        assert "only work with GPU modules" in results["refusal"]


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
@pytest.mark.parametrize("ours", [True, False], ids=["ours", "torch"])
def test_one_process_goes_on_from_their_checkpoint(name, ours, processes, folder):
    model = Network()
    trainer = trainer_of(folder, 4, callbacks=[ConvertCallback()] if ours else [])
    trainer.fit(model, data(8 * SIZE), ckpt_path=folder / f"{name}.ckpt", weights_only=True)
    expected = Network()
    trainer_of(folder, 4).fit(expected, data(8 * SIZE))
    assert len(model.losses) == 4  # of the last epoch
    torch.testing.assert_close(model.losses, expected.losses[-4:], **CLOSE)


def test_bytes_are_as_the_page_says(processes):
    page = (ROOT / "docs" / "distributed.md").read_text()
    names = {}
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL).group(1), names)
    net, share = layers(), (SIZE - 1) / SIZE
    sent = {  # by each process, of the bytes of the whole tensor
        "all_reduce": 2 * share,
        "all_gather": share,
        **dict.fromkeys((*GATHERS, *SCATTERS), share),
        "_broadcast_coalesced": 0,
    }
    expected = {
        "ddp": names["ddp_bytes"](net, SIZE) + names["sync_batch_norm_bytes"](16, SIZE),
        "fsdp2": names["fsdp2_bytes"](net, SIZE, [net[0]]),
    }
    for results in processes:
        for strategy, calls in results["bytes"].items():
            assert sum(sent[name] * size for name, size in calls) == expected[strategy], calls
        broadcast = [size for name, size in results["bytes"]["ddp"] if "broadcast" in name]
        assert broadcast == [8 * 16 + 8]


def test_both_launches_of_the_script_take_one_process_s_steps(tmp_path):
    """Two processes with half of the batch, started by Lightning and by torchrun."""
    flags = ("--dataset", "iris", "--epochs", "3", "--no-batch_norm", "--dropout", "0")
    flags += ("--accelerator", "cpu", "--devices", "2", "--strategy", "ddp", "--batch_size", "16")
    script = [ROOT / "scripts" / "train.py", *flags, "--name"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    commands = {"lightning": [*script, "lightning"], "torchrun": [*torchrun, *script, "torchrun"]}
    started = {
        name: subprocess.Popen(
            [sys.executable, *command], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for name, command in commands.items()
    }
    config = Config(
        "iris", epochs=3, batch_norm=False, dropout=0.0, batch_size=32, accelerator="cpu"
    )
    threads = torch.get_num_threads()
    Run(config, root=tmp_path / "runs").execute()
    torch.set_num_threads(threads)
    expected = metrics(tmp_path / "runs" / "iris")
    for name, popen in started.items():
        out, err = popen.communicate(timeout=240)
        assert popen.returncode == 0, err.decode()
        assert out.count(b"test     accuracy") == 1  # one process reports
        # Losses near 1, and some roundings of float32 in twelve steps of Adam.
        assert metrics(tmp_path / "runs" / name) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def metrics(folder: Path) -> list[float]:
    with open(folder / "metrics.csv", newline="") as file:
        return [float(value) for row in csv.DictReader(file) for value in row.values() if value]

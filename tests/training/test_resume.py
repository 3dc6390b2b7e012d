"""Killed at any moment and resumed, training ends as if nothing had happened, bit for bit."""

import os
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from killing import (
    KILLED,
    Trouble,
    Witness,
    assert_same,
    batches,
    drawn,
    ended,
    fork_server,
    generator,
    metrics,
    same,
)
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import IterableDataset
from torchmetrics import MeanMetric

import torchref
from torchref.training import (
    AtomicCheckpointIO,
    Config,
    ExactResume,
    LastCheckpoint,
    ResumableDataLoader,
    Run,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),  # Lightning on torch's newer pytree
]

# Ten batches an epoch, dropout, augmentation; the torch twin trains along.
CONFIG = Config(
    "digits",
    epochs=3,
    batch_size=128,
    width=32,
    augment={"noise": 0.1, "rotation": 10},
    accelerator="cpu",
    save_every=3,
    threads=1,
    name="run",
)
BATCHES = 10


def part_of_a_run(root, config, resume, place=None, count=0):
    """In a process of its own: a run up to its end, or to its kill."""
    callbacks = [Witness(root), *([Trouble(place, count)] if place else [])]
    Run(config, resume=resume, root=root, callbacks=callbacks, progress=False).execute()


@pytest.fixture(scope="module")
def processes():
    context = fork_server()

    def call(function, *args, several=None):
        """The exit code, or the codes of several processes that are told their rank."""
        ranks = [()] if several is None else [(rank,) for rank in range(several)]
        started = [context.Process(target=function, args=(*rank, *args)) for rank in ranks]
        for process in started:
            process.start()
        for process in started:
            process.join(60)
        codes = [process.exitcode for process in started]  # None of one that still runs
        for process in started:
            process.kill()
        return codes[0] if several is None else codes

    return call


@pytest.fixture(scope="module")
def whole(processes, tmp_path_factory):
    """A run that nobody disturbs."""
    root = tmp_path_factory.mktemp("whole")
    assert processes(part_of_a_run, root, CONFIG, None) == 0
    return root


def go_on(processes, root, config, *kill):
    """Start the run, or resume it where there is something to resume."""
    ready = (root / "run" / "last.ckpt").exists()
    return processes(part_of_a_run, root, config, "last" if ready else None, *kill)


@pytest.mark.parametrize(
    "kills",
    [
        [("on_train_batch_start", 6)],
        [("on_train_batch_end", 14), ("on_before_optimizer_step", 3)],
        [("on_validation_batch_start", 2), ("on_test_batch_start", 1)],
        [("fsync", 13), ("replace", 9), ("link", 2)],
        [("on_train_epoch_end", 3)],
    ],
    ids=lambda kills: "-".join(f"{place}_{count}" for place, count in kills),
)
def test_a_killed_run_ends_as_if_it_had_not_been(
    kills, processes, whole, tmp_path, record_testsuite_property
):
    for kill in kills:
        assert go_on(processes, tmp_path, CONFIG, *kill) == KILLED
    assert go_on(processes, tmp_path, CONFIG) == 0
    assert_same(tmp_path, whole)
    record_testsuite_property("kill points survived", len(kills))


@pytest.mark.slow
def test_fifty_random_kill_points(processes, whole, tmp_path_factory, record_testsuite_property):
    survived, draw = 0, generator()
    while survived < 50:
        root = tmp_path_factory.mktemp("killed")
        while not ended(root):
            place, count = drawn(draw, BATCHES)
            code = go_on(processes, root, CONFIG, place, count)
            assert code == KILLED or (code == 0 and ended(root)), (place, count)
            survived += code == KILLED
        assert_same(root, whole)
    record_testsuite_property("kill points survived", survived)


def test_without_batches_between_a_resumed_run_repeats_its_epoch(processes, whole, tmp_path):
    config = replace(CONFIG, save_every=None)
    assert go_on(processes, tmp_path, config, "on_train_batch_end", 17) == KILLED
    assert go_on(processes, tmp_path, config) == 0
    expected = {line.split()[0:2] == ["1", "0"] for line in batches(tmp_path)}
    assert expected == {True, False}
    assert metrics(tmp_path) == metrics(whole)
    assert batches(tmp_path).count(next(b for b in batches(whole) if b.startswith("1 0 "))) == 2


def test_a_stopped_run_that_was_killed_stops_again(
    processes, tmp_path_factory, record_testsuite_property
):
    config = replace(CONFIG, epochs=30, patience=1, lr=0.5, save_every=None)
    roots = [tmp_path_factory.mktemp(name) for name in ("whole", "killed")]
    assert processes(part_of_a_run, roots[0], config, None) == 0
    assert metrics(roots[0])["stop_reason"].startswith("val_loss did not improve")
    assert go_on(processes, roots[1], config, "on_test_batch_start", 1) == KILLED
    assert go_on(processes, roots[1], config) == 0
    assert_same(roots[1], roots[0])
    record_testsuite_property("kill points survived", 1)


def test_float64_goes_on_as_float64(processes, tmp_path_factory, record_testsuite_property):
    config = replace(CONFIG, precision="64", augment=None, parity=False, epochs=2)
    roots = [tmp_path_factory.mktemp(name) for name in ("whole", "killed")]
    assert processes(part_of_a_run, roots[0], config, None) == 0
    assert go_on(processes, roots[1], config, "on_train_batch_end", 14) == KILLED
    assert go_on(processes, roots[1], config) == 0
    assert_same(roots[1], roots[0])
    record_testsuite_property("kill points survived", 1)


def test_a_parity_check_may_begin_at_the_resume(processes, tmp_path):
    alone = replace(CONFIG, parity=False)
    assert go_on(processes, tmp_path, alone, "on_train_batch_end", 14) == KILLED
    assert go_on(processes, tmp_path, CONFIG) == 0
    assert metrics(tmp_path)["parity_max_loss_diff"] < 1e-5


# Samples that workers load and change at random, and two processes.


class Noisy(torch.utils.data.Dataset):
    """Each sample draws from the generators of torch, NumPy and Python."""

    def __len__(self):
        return 48

    def __getitem__(self, index):
        noise = torch.rand(()).item() + np.random.rand() + random.random()
        return torch.full((4,), index / 48 + noise), index % 3


class Network(LightningModule):
    """Dropout, batch norm, a schedule, momentum; a mean that is a metric."""

    def __init__(self, workers=0):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
        torchref.convert(self)
        self.mean = MeanMetric()
        self.workers = workers

    def train_dataloader(self):
        # forked: workers of a fork server would not notice that their process was killed
        context = "fork" if self.workers else None
        return ResumableDataLoader(
            Noisy(), 4, seed=1, num_workers=self.workers, multiprocessing_context=context
        )

    def setup(self, stage):
        torch.manual_seed(self.trainer.global_rank)  # each process drops other units

    def training_step(self, batch):
        loss = torchref.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.mean.update(loss.detach())
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        optimizer = torchref.optim.SGD(self.parameters(), 0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 24)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def part_of_a_fit(rank, root, workers, devices, place=None, count=0):
    """As a user's own module and Trainer; of several processes the last one is killed."""
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    if devices > 1:
        join(root, rank, devices)
    options = {"devices": devices, "strategy": "ddp"} if devices > 1 else {}
    last = rank == devices - 1
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        plugins=[AtomicCheckpointIO()],
        callbacks=[
            ExactResume(),
            Witness(root, rank),
            *([Trouble(place, count)] if place and last else []),
            LastCheckpoint(root, every=5 // devices),
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    path = root / "last.ckpt"
    model = Network(workers)
    trainer.fit(model, ckpt_path=path if path.exists() else None, weights_only=True)
    ended = [model.state_dict(), trainer.optimizers[0].state_dict(), dict(trainer.callback_metrics)]
    torch.save(ended, root / f"ended-{rank}.pt")
    if devices > 1:
        dist.barrier()
        os._exit(0)  # at an ordinary exit a thread of gloo's that is still there aborts the process


def join(root, rank, devices):
    """What torchrun tells Lightning; the processes are there already."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": devices, "LOCAL_WORLD_SIZE": devices}
    place |= {"MASTER_ADDR": "localhost", "MASTER_PORT": 0, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in place.items()})
    dist.init_process_group("gloo", f"file://{root}/store", rank=rank, world_size=devices)


@pytest.mark.parametrize(
    ("workers", "devices"), [(0, 1), (2, 1), (2, 2)], ids=["alone", "workers", "ddp"]
)
def test_a_fit_goes_on_in_the_middle_of_an_epoch(workers, devices, processes, tmp_path):
    roots = [tmp_path / name for name in ("whole", "killed")]
    for root in roots:
        root.mkdir()
    steps = 12 // devices
    assert processes(part_of_a_fit, roots[0], workers, devices, several=devices) == [0] * devices
    for count in (steps + 6, 3) if devices == 1 else (steps + 3, 2):
        kill = ("on_train_batch_end", count)
        codes = processes(part_of_a_fit, roots[1], workers, devices, *kill, several=devices)
        assert codes[-1] == KILLED
        (roots[1] / "store").unlink(missing_ok=True)
    assert processes(part_of_a_fit, roots[1], workers, devices, several=devices) == [0] * devices
    for rank in range(devices):
        ended = [torch.load(root / f"ended-{rank}.pt", weights_only=True) for root in roots]
        assert same(*ended)
        lines = [batches(root, rank) for root in roots]
        assert len(lines[0]) == 2 * steps
        assert set(lines[0]) == set(lines[1])
        # killed twice in the second epoch, which has not begun anew
        assert len([line for line in lines[1] if line.startswith("1 0 ")]) == 1


def test_workers_of_all_processes_draw_other_numbers():
    def first(rank):
        loader = ResumableDataLoader(
            Noisy(), 4, shuffle=False, num_workers=1, num_replicas=2, rank=rank
        )
        x, _ = next(iter(loader))
        return x[:, 0] - torch.arange(rank, 8, 2) / 48

    assert same(first(0), first(0))
    assert not torch.isclose(first(0), first(1)).any()


def test_order_and_seeds_are_functions_of_seed_and_epoch():
    def order(seed, epoch, **options):
        loader = ResumableDataLoader(range(20), 4, seed=seed, **options)
        loader.sampler.set_epoch(epoch)
        return torch.cat(list(loader)).tolist()

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed in (0, 10) for epoch in (0, 1)}) == 4
    assert sorted(order(0, 0)) == list(range(20))
    assert order(0, 0, shuffle=False) == list(range(20))
    shares = [order(0, 0, num_replicas=2, rank=rank) for rank in (0, 1)]
    assert sorted(shares[0] + shares[1]) == list(range(20))
    assert len(order(0, 0, drop_last=True, num_replicas=3, rank=0)) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_from_its_state(workers):
    def loader():
        made = ResumableDataLoader(Noisy(), 10, seed=3, num_workers=workers)
        made.sampler.set_epoch(2)
        return made

    torch.manual_seed(0)
    first = loader()
    batches = iter(first)
    done = [next(batches)[1] for _ in range(3)]
    state, generators = first.state_dict(), torch.get_rng_state()
    assert (state["epoch"], state["batches"]) == (2, 3)
    expected = [y for _, y in batches]
    again = loader()
    again.load_state_dict(state)
    torch.set_rng_state(generators)
    assert same([y for _, y in again], expected)
    assert len(again) == len(first) == 5
    assert same([y for _, y in again], done + expected)  # once: then an epoch is whole


def test_a_state_of_another_epoch_skips_nothing():
    loader = ResumableDataLoader(range(6), 2)
    loader.load_state_dict(loader.state_dict() | {"batches": 3})
    loader.sampler.set_epoch(1)
    assert len(list(loader)) == 3


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


def test_what_a_resumable_loader_refuses():
    with pytest.raises(ValueError, match="dataset: expected one with a length, got 'Stream'"):
        ResumableDataLoader(Stream())
    for option in ("sampler", "batch_sampler", "generator", "persistent_workers"):
        with pytest.raises(ValueError, match=f"{option}: expected nothing: it is taken"):
            ResumableDataLoader(range(3), **{option: True})


def test_generators_come_back():
    module, trainer, checkpoint = Network(), Trainer(logger=False, accelerator="cpu"), {}

    def drawn():
        return [torch.rand(2).tolist(), np.random.randn(3).tolist(), random.gauss(0, 1)]

    np.random.randn(1)  # NumPy and Python keep the second of two normal numbers
    random.gauss(0, 1)
    ExactResume().on_save_checkpoint(trainer, module, checkpoint)
    expected = drawn()
    ExactResume().on_load_checkpoint(trainer, module, checkpoint)
    assert drawn() == expected
    with pytest.warns(UserWarning, match="ExactResume: the checkpoint was saved without it"):
        ExactResume().on_load_checkpoint(trainer, module, {})
    assert drawn() != expected


def test_another_number_of_processes_begins_with_the_first_s_generators():
    module, trainer = Network(), Trainer(logger=False, accelerator="cpu")
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        module.mean.update(seed)
        checkpoint = {}
        ExactResume().on_save_checkpoint(trainer, module, checkpoint)
        states += checkpoint["ExactResume"]
    module.mean.reset()
    counts = {"ready": 3, "completed": 2}
    loops = {"state_dict": {}, "epoch_loop.batch_progress": {"current": counts}}
    checkpoint = {"ExactResume": states, "loops": {"fit_loop": loops}}
    ExactResume().on_load_checkpoint(trainer, module, checkpoint)
    assert counts == {"ready": 0, "completed": -1}
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert drawn == torch.rand(1)
    assert not module.mean.weight


def test_generators_of_other_gpus_are_told():
    module, trainer, checkpoint = Network(), Trainer(logger=False, accelerator="cpu"), {}
    ExactResume().on_save_checkpoint(trainer, module, checkpoint)
    there = torch.cuda.device_count()
    generators = checkpoint["ExactResume"][0]["generators"]
    generators["cuda"] = [torch.zeros(16, dtype=torch.uint8)] * (there + 1)
    with pytest.warns(UserWarning, match=rf"of {there + 1} GPUs, there are {there}"):
        ExactResume().on_load_checkpoint(trainer, module, checkpoint)


def test_damaged_generators_leave_all_as_they_are():
    module, trainer, checkpoint = Network(), Trainer(logger=False, accelerator="cpu"), {}
    ExactResume().on_save_checkpoint(trainer, module, checkpoint)
    checkpoint["ExactResume"][0]["generators"]["python"] = [3, torch.zeros(5), None]
    before = torch.rand(1), torch.get_rng_state()
    with pytest.raises(ValueError, match="ExactResume: damaged: .*wrong size"):
        ExactResume().on_load_checkpoint(trainer, module, checkpoint)
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": 4}, r"state_dict: batches: expected an integer in \[0, 3\], got 4"),
        ({"batches": -1}, r"state_dict: batches: .*, got -1"),
        ({"batches": "1"}, r"state_dict: batches: .*, got '1'"),
        ({"batches": None}, r"state_dict: batches: .*, got None"),
        ({"epoch": -1}, "state_dict: epoch: expected an integer >= 0, got -1"),
        ({"epoch": "0"}, "state_dict: epoch: .*, got '0'"),
        ({"batch_size": 1}, "state_dict: batch_size: expected 2, got 1"),
        ({"samples": 7}, "state_dict: samples: expected 6, got 7"),
        ({"seed": 1}, "state_dict: seed: expected 0, got 1"),
        ({"shuffle": False}, "state_dict: shuffle: expected True, got False"),
        ({"num_replicas": 2}, "state_dict: num_replicas: expected 1, got 2"),
    ],
    ids=str,
)
def test_a_state_of_other_batches_is_refused(change, message):
    loader = ResumableDataLoader(range(6), 2)
    state = loader.state_dict()
    with pytest.raises(ValueError, match=message):
        loader.load_state_dict(state | change)
    assert len(list(loader)) == 3


@pytest.mark.parametrize("state", [{}, None, {"epoch": 0, "batches": 1}])
def test_what_is_no_state_of_a_loader_is_refused(state):
    with pytest.raises(ValueError, match="state_dict: .*, got None"):
        ResumableDataLoader(range(6), 2).load_state_dict(state)


def test_a_loader_takes_numbers_of_numpy():
    loader = ResumableDataLoader(range(6), np.int64(2), seed=np.int64(1))
    expected = ResumableDataLoader(range(6), 2, seed=1)
    loader.load_state_dict(expected.state_dict())
    assert [batch.tolist() for batch in loader] == [batch.tolist() for batch in expected]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seed": "x"}, TypeError, "seed: expected an integer, got 'x'"),
        ({"seed": -1}, ValueError, "seed: expected >= 0, got -1"),
        ({"batch_size": None}, TypeError, "batch_size: expected an integer, got None"),
        ({"batch_size": 0}, ValueError, "batch_size: expected >= 1, got 0"),
    ],
)
def test_what_a_resumable_loader_is_not_made_with(options, error, message):
    with pytest.raises(error, match=message):
        ResumableDataLoader(range(3), **options)

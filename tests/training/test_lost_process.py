"""A process that is killed or hangs ends the others, and what is left goes on, bit for bit."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
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
)
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch import LightningModule, Trainer

from torchref.training import Config, Run, read_checkpoint
from torchref.training.lost_process import EndTogether

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.py"
# Ten batches an epoch for each of two processes, dropout, augmentation, batch norm of both.
CONFIG = Config(
    "digits",
    epochs=3,
    batch_size=64,
    width=32,
    augment={"noise": 0.1, "rotation": 10},
    accelerator="cpu",
    devices=2,
    parity=False,
    save_every=3,
    threads=1,
    name="run",
)
SAMPLES = 1257  # of the training part
BATCHES = 10
FAILED, LOST = 3, 4  # exit codes: an error of its own, another process's end
LIMIT = 60  # seconds; without a timeout the others would wait for 1800


def part_of_a_run(rank, port, root, config, resume, victim=None, *trouble):
    """In a process of its own: a run up to its end, or to the end of one of its processes."""
    if config.devices > 1:  # what torchrun tells
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": config.devices}
        place |= {"LOCAL_WORLD_SIZE": config.devices, "TORCHELASTIC_RUN_ID": "test"}
        place |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        place |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
        os.environ.update({name: str(value) for name, value in place.items()})
    callbacks = [Witness(root, rank)]
    callbacks += [Trouble(*trouble)] if rank == victim else []
    code = 0
    try:
        Run(config, resume=resume, root=root, callbacks=callbacks, progress=False).execute()
    except ConnectionError as error:
        code = LOST if "another process of this run" in str(error) else 1
    except RuntimeError as error:
        code = FAILED if str(error) == "its own" else 1
    os._exit(code)  # at an ordinary exit a thread of gloo's that is still there aborts the process


@pytest.fixture(scope="module")
def processes():
    context = fork_server()

    def call(root, config, *trouble):
        """The exit codes, of a new run or of one that goes on; None of one that has not ended."""
        resume = "last" if (root / "run" / "last.ckpt").exists() else None
        store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            "localhost", 0, is_master=True, wait_for_workers=False
        )
        started = [
            context.Process(
                target=part_of_a_run, args=(rank, store.port, root, config, resume, *trouble)
            )
            for rank in range(config.devices)
        ]
        for process in started:
            process.start()
        end = time.monotonic() + LIMIT
        stopped = trouble[0] if trouble[3:] == (signal.SIGSTOP,) else None
        for rank, process in enumerate(started):
            if rank != stopped:
                process.join(end - time.monotonic())
        codes = [process.exitcode for process in started]
        for process in started:
            process.kill()
            process.join()
        return codes

    return call


@pytest.fixture(scope="module")
def whole(processes, tmp_path_factory):
    """A run that nobody disturbs."""
    root = tmp_path_factory.mktemp("whole")
    assert processes(root, CONFIG) == [0, 0]
    return root


def codes_of(victim, code):
    return [code if rank == victim else LOST for rank in range(2)]


@pytest.mark.parametrize(
    "kills",
    [
        [(1, "on_before_optimizer_step", 5), (0, "on_train_batch_end", 12)],
        [(0, "fsync", 9), (1, "on_train_batch_start", 7)],
        [(1, "on_validation_batch_start", 2)],
    ],
    ids=lambda kills: "-".join(f"{victim}_{place}_{count}" for victim, place, count in kills),
)
def test_a_killed_process_ends_the_other_and_the_run_goes_on(
    kills, processes, whole, tmp_path, record_testsuite_property
):
    for kill in kills:
        assert processes(tmp_path, CONFIG, *kill) == codes_of(kill[0], KILLED)
    assert processes(tmp_path, CONFIG) == [0, 0]
    assert_same(tmp_path, whole, ranks=2)
    record_testsuite_property("kill points survived with two processes", len(kills))


@pytest.mark.slow
def test_ten_random_kill_points(processes, whole, tmp_path_factory, record_testsuite_property):
    survived, draw = 0, generator()
    config = replace(CONFIG, timeout=30)  # for those killed before the two have met
    while survived < 10:
        root = tmp_path_factory.mktemp("killed")
        while not ended(root):
            victim = draw.randrange(2)
            place, count = drawn(draw, BATCHES, writes=victim == 0)
            codes = processes(root, config, victim, place, count)
            survived += codes[victim] == KILLED
            # after the test part, for which there is a best.ckpt, neither needs the other
            apart = (root / "run" / "best.ckpt").exists() or ended(root)
            fine = codes == codes_of(victim, KILLED) or (
                apart and codes[1 - victim] == 0 and (codes[victim] == KILLED or ended(root))
            )
            assert fine, (victim, place, count, codes)
        assert_same(root, whole, ranks=2)
    record_testsuite_property("kill points survived with two processes", survived)


def test_a_process_that_hangs_ends_the_other_after_the_timeout(processes, tmp_path):
    config = replace(CONFIG, timeout=8)  # the start counts, too
    trouble = (1, "on_before_optimizer_step", 5, signal.SIGSTOP)
    assert processes(tmp_path, config, *trouble) == codes_of(1, None)
    assert read_checkpoint(tmp_path / "run" / "last.ckpt")["global_step"] == 3


def test_one_killed_before_they_have_met_ends_the_other_after_the_timeout(processes, tmp_path):
    config = replace(CONFIG, timeout=8)
    trouble = (0, "fsync", 1)  # of config.yaml, which is written before training begins
    assert processes(tmp_path, config, *trouble) == codes_of(0, KILLED)
    assert not (tmp_path / "batches-1.txt").exists()


def test_an_error_of_its_own_stays_what_it_is(processes, tmp_path):
    trouble = (1, "on_before_optimizer_step", 2, None)
    assert processes(tmp_path, CONFIG, *trouble) == codes_of(1, FAILED)


@pytest.mark.parametrize(
    ("before", "after", "save_every"),
    [(2, 1, 3), (1, 2, 3), (2, 1, None)],
    ids=["one_fewer", "one_more", "after_an_epoch"],
)
def test_another_number_of_processes_begins_the_epoch_anew(
    before, after, save_every, processes, tmp_path
):
    config, other = (
        replace(CONFIG, devices=devices, save_every=save_every) for devices in (before, after)
    )
    per_epoch = [-(-SAMPLES // devices // 64) for devices in (before, after)]
    kill = (before - 1, "on_before_optimizer_step", per_epoch[0] + 9)
    codes = processes(tmp_path, config, *kill)
    assert codes == codes_of(1, KILLED)[-before:]
    saved = read_checkpoint(tmp_path / "run" / "last.ckpt")
    assert saved["epoch"] == (1 if save_every else 0)
    assert saved["global_step"] == per_epoch[0] + (6 if save_every else 0)
    done = len(batches(tmp_path, 0))
    assert processes(tmp_path, other) == [0] * after
    begun = [line.split() for line in batches(tmp_path, 0)[done:]]
    assert [line[:2] for line in begun] == [
        [str(epoch), str(batch)] for epoch in (1, 2) for batch in range(per_epoch[1])
    ]
    assert sum(int(line[2]) for line in begun) == 2 * -(-SAMPLES // after)
    ended = read_checkpoint(tmp_path / "run" / "last.ckpt")
    assert ended["global_step"] == saved["global_step"] + 2 * per_epoch[1]
    assert metrics(tmp_path)["epochs"] == 3


def beside_a_failed_one():
    """In a process of its own: Lightning's thread looks, and finds a process that failed."""
    failed = subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"])
    thread = _ChildProcessObserver(os.getpid(), [failed], sleep_period=1)
    thread.start()
    EndTogether().setup(Trainer(logger=False, accelerator="cpu"), LightningModule(), "fit")
    failed.wait()
    thread.join(30)


def test_lightning_kills_none_that_can_tell():
    process = fork_server().Process(target=beside_a_failed_one)
    process.start()
    process.join(LIMIT)
    assert process.exitcode == 0
    callbacks = Run(Config("iris", accelerator="cpu"), progress=False).trainer.callbacks
    assert any(isinstance(callback, EndTogether) for callback in callbacks)


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan"), float("inf")])
def test_a_timeout_is_a_time(timeout, tmp_path):
    with pytest.raises(ValueError, match=r"timeout: expected seconds in \(0, 1e9\], got"):
        Run(Config("iris", timeout=timeout, accelerator="cpu"), root=tmp_path)


@pytest.mark.parametrize(
    ("launcher", "victim", "number"),
    [
        ("lightning", 1, signal.SIGKILL),
        *[
            pytest.param(launcher, victim, number, marks=pytest.mark.slow)
            for launcher, victim, number in [
                ("lightning", 0, signal.SIGKILL),
                ("torchrun", 0, signal.SIGKILL),
                ("torchrun", 1, signal.SIGKILL),
                ("lightning", 1, signal.SIGSTOP),
                ("torchrun", 1, signal.SIGSTOP),
            ]
        ],
    ],
)
def test_the_script_says_so_and_goes_on_with_one_process(launcher, victim, number, tmp_path):
    hangs = number == signal.SIGSTOP
    flags = ["--data", "iris", "--epochs", "10000", "--patience", "10000", "--batch_size", "4"]
    flags += ["--accelerator", "cpu", "--devices", "2", "--strategy", "ddp", "--name", "run"]
    flags += ["--save_every", "5", "--no-parity"]
    flags += ["--timeout", "40"] if hangs else []
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *(torchrun if launcher == "torchrun" else []), SCRIPT, *flags]
    last = tmp_path / "runs" / "run" / "last.ckpt"
    with started_in(tmp_path, command) as process:
        wait_for(last.exists, process)
        ranks = children(process.pid)
        if launcher == "lightning":
            ranks = [process.pid, *ranks]
        os.kill(ranks[victim], number)
        # Nobody is left when this returns: whoever is left holds the other end of the pipe. One
        # that hangs is killed by torchrun 30 seconds after the others have ended.
        error = process.communicate(timeout=150)[1].decode()
    said = [line for line in error.splitlines() if line.startswith("train.py: error: ")]
    text = f"train.py: error: rank {1 - victim}: another process of this run ended or did not "
    assert said == [f"{text}answer in time; continue with --resume --name run"]
    assert "RuntimeError" not in error
    assert process.returncode == (KILLED if (launcher, victim) == ("lightning", 0) else 1)
    epochs = read_checkpoint(last)["epoch"] + 1
    flags = ["--resume", "--name", "run", "--devices", "1", "--strategy", "auto"]
    command = [sys.executable, SCRIPT, *flags, "--epochs", str(epochs + 1)]
    with started_in(tmp_path, command) as process:
        error = process.communicate(timeout=150)[1].decode()
    assert process.returncode == 0, error
    assert metrics(tmp_path / "runs")["epochs"] == epochs + 1


@contextmanager
def started_in(folder, command):
    """A process of which nothing is left, whatever happens."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        # Torchrun's have groups of their own; Lightning's may outlive their launcher.
        own = children(process.pid) if process.poll() is None else []
        for pid in [*own, -process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def wait_for(condition, process):
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.1)


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

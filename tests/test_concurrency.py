"""Several threads, the workers of a DataLoader, two runs in one folder, and Ctrl-C twice."""

import contextlib
import csv
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from pieces import PIECES
from torch.utils.data import DataLoader, Dataset

import torchref
import torchref.nn as nn
import torchref.nn.functional as ours
from torchref import compilation

ROOT = Path(__file__).parents[1]
KERNELS = os.environ.get("TRITON_INTERPRET") == "1"
THREADS = 4
WAIT = 10  # seconds, for another thread

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),  # Lightning on torch's newer pytree
]


@pytest.fixture
def restless():
    """Threads take turns a thousand times as often as they do."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(function):
    """What it returns for 0, 1, ... each in a thread of its own, all started together."""
    start = threading.Barrier(THREADS)

    def together(number):
        start.wait(WAIT)
        return function(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(together, range(THREADS)))


def same(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


# Threads.


def results(piece, number, times):
    """Outputs and gradients, again and again, of inputs that no other thread has."""
    inputs = [
        (x.detach() * (1 - number / 8)).requires_grad_() if x.requires_grad else x
        for x in piece.inputs(torch.float32)
    ]
    xs = [x for x in inputs if x.requires_grad]
    found = []
    for _ in range(times):
        y = piece.ours(*inputs)
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), xs)])
    return found


@pytest.mark.usefixtures("restless")
@pytest.mark.parametrize(
    "piece",
    [piece for piece in PIECES if not piece.random],  # masks come from one generator for all
    ids=lambda p: p.name,
)
def test_pieces_in_threads_give_what_they_give_alone(piece):
    expected = [results(piece, number, 1)[0] for number in range(THREADS)]
    found = in_threads(lambda number: results(piece, number, 50))
    for number, repetitions in enumerate(found):
        assert all(same(one, expected[number]) for one in repetitions)


def trained(seed, steps=15):
    generator = torch.Generator().manual_seed(seed)
    net = torch.nn.Sequential(
        nn.Linear(5, 8), nn.BatchNormAct1d(8, activation="silu"), nn.Linear(8, 3)
    )
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=generator)
    options = {"max_norm": 1.0, "ema_decay": 0.9}
    cls = (torchref.optim.SGD, torchref.optim.RMSprop, torchref.optim.AdamW)[seed % 3]
    optimizer = cls(net.parameters(), lr=0.01, **options)
    for _ in range(steps):
        x = torch.randn(16, 5, generator=generator)
        target = torch.randint(0, 3, (16,), generator=generator)
        optimizer.zero_grad()
        ours.cross_entropy(net(x), target).backward()
        optimizer.step()
    return [*net.state_dict().values(), *optimizer.ema_parameters()]


@pytest.mark.usefixtures("restless")
def test_models_and_optimizers_in_threads_train_as_they_do_alone():
    expected = [trained(seed) for seed in range(THREADS)]
    assert not same(expected[0], expected[3])
    assert all(map(same, in_threads(trained), expected))


@pytest.mark.usefixtures("restless")
def test_backward_passes_of_one_model_add_up():
    """Whole numbers, whose sum does not depend on the order."""
    layer = nn.Linear(3, 2)
    count = 50

    def run(number):
        for _ in range(count):
            layer(torch.full((1, 3), float(number + 1))).sum().backward()

    in_threads(run)
    expected = count * THREADS * (THREADS + 1) / 2
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad, torch.full((2, 3), expected))


@pytest.fixture
def uncompiled(monkeypatch):
    """The compiled backend without a compiler."""
    monkeypatch.setattr(compilation, "_variants", {})
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.usefixtures("restless", "uncompiled")
def test_threads_share_the_compiled_backends_cache(monkeypatch):
    monkeypatch.setattr(compilation, "REPLAYS", 3)  # so that they empty it under each other

    def replay(calls, args, result):  # no code was recorded, so one is made up
        return lambda given: given[0] * 2

    monkeypatch.setattr(compilation, "_replay", replay)
    compiled = compilation.Compiled(_double)

    def run(number):
        return [
            bool((compiled(torch.full((size,), number + 1.0)) == 2 * (number + 1)).all())
            for size in [2, 3, 4, 5, 6, 7] * 20
        ]

    assert all(map(all, in_threads(run)))
    assert len(compiled.replays) < 3 + THREADS


def _double(x):
    return x * 2


def test_a_backend_is_chosen_for_the_whole_process():
    """As `torch.backends`: what one thread chooses, another sees."""
    with torchref.backend("reference"):
        assert in_threads(lambda _: torchref.get_backend()) == ["reference"] * THREADS
    assert in_threads(lambda _: torchref.get_backend()) == ["auto"] * THREADS


def test_blocks_that_overlap_in_two_threads_leave_the_choice_as_it_was():
    entered, left = threading.Event(), threading.Event()

    def second():
        entered.wait(WAIT)
        with torchref.backend("compiled"):
            entered.clear()
            left.wait(WAIT)

    thread = threading.Thread(target=second)
    try:
        with torchref.backend("reference"):
            thread.start()
            entered.set()
            while entered.is_set():  # until the second block has begun
                time.sleep(0.001)
        left.set()
        thread.join()
        assert torchref.get_backend() == "auto"
    finally:
        torchref.set_backend("auto")


def test_the_end_of_one_compilation_is_not_that_of_anothers(monkeypatch):
    """A formula traced after it would lose its own order of sums."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)

    def compile_something():
        with compilation._recording():
            pass

    with compilation._recording():
        assert compilation.traces_formula()
        thread = threading.Thread(target=compile_something)
        thread.start()
        thread.join()
        assert compilation.traces_formula()


@pytest.mark.skipif(KERNELS, reason="needs no kernel")
def test_two_threads_may_fill_the_optimizers_tables_at_once(monkeypatch):
    tables = pytest.importorskip("torchref.triton_kernels._tables")
    both_look = threading.Barrier(2)

    class Watched(dict):
        def __iter__(self):
            oldest = next(super().__iter__())
            with contextlib.suppress(threading.BrokenBarrierError):
                both_look.wait(0.5)  # breaks where only one may look at a time
            return iter([oldest])

    full = {((size,), torch.device("cpu")): torch.zeros(1) for size in range(1, 65)}
    monkeypatch.setattr(tables, "_words", Watched(full))
    with ThreadPoolExecutor(2) as pool:
        sizes = [(1000,), (2000,)]
        list(pool.map(lambda size: tables.words_for(size, torch.device("cpu")), sizes))
    assert len(tables._words) <= 64


# Workers of a DataLoader.


class Normalized(Dataset):
    """Rows that a worker computes with our functions, their gradients among them."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        x = torch.arange(4.0).add(index).requires_grad_()
        y = ours.softmax(ours.gelu(x), 0)
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        layer = nn.Linear(4, 1, bias=False)
        optimizer = torchref.optim.SGD(layer.parameters(), lr=0.1)
        torch.nn.init.ones_(layer.weight)
        layer(x.detach()).sum().backward()
        optimizer.step()
        return y.detach(), gradient, layer.weight.detach()


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_compute_what_the_main_process_does(method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"waits for {method} on {sys.platform}")
    expected = list(DataLoader(Normalized(), 4))  # before: a fork finds torch's threads started
    loader = DataLoader(Normalized(), 4, num_workers=2, multiprocessing_context=method, timeout=60)
    for _ in range(2):
        assert all(map(same, loader, expected))


def chosen(_):
    return torchref.get_backend()


@pytest.mark.skipif(os.name == "nt", reason="Windows does not fork")
def test_a_forked_worker_has_its_parents_backend():
    with torchref.backend("reference"):
        loader = DataLoader(
            Normalized(), 4, num_workers=1, collate_fn=chosen, multiprocessing_context="fork"
        )
        assert list(loader) == ["reference", "reference"]


# Runs.

IRIS = ["--dataset", "iris", "--batch_size", "16", "--accelerator", "cpu", "--no-parity"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
# The user presses Ctrl-C in the third epoch, and again at one of two later moments.
IMPATIENT = """
import atexit, os, signal, sys
import train
from torchref.training.history import History


def press(*_):
    os.kill(os.getpid(), signal.SIGINT)


def in_third_epoch(self, trainer, *_):
    if trainer.current_epoch == 2:
        press()


History.on_train_batch_start = in_third_epoch
if sys.argv[1] == "while it stops":
    History.on_exception = press
else:
    atexit.register(press)
train.main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def train():
    """The script; imported here, so that spawned workers need not wait for Lightning."""
    return importlib.import_module("train")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
@pytest.mark.parametrize(
    "again",
    [
        "while it stops",
        pytest.param(
            "while Python ends",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_interrupted_twice(again, here, train, capsys):
    command = [sys.executable, "-c", IMPATIENT, again, *IRIS, "--epochs", "9"]
    run = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    lines = [line for line in run.stderr.splitlines() if not line.startswith("epoch ")]
    assert lines == ["interrupted; continue with --resume --name iris"]
    assert run.returncode == 130
    assert run.stdout == ""
    train.main(["--resume", "--name", "iris", "--epochs", "3"])
    assert "(3 epochs" in capsys.readouterr().out


@pytest.fixture
def _interrupts():
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize("where", ["Run", "write_report"])
@pytest.mark.usefixtures("here", "_interrupts")
def test_interrupted_before_and_after_training(where, train, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, where, interrupt)
    ended = None
    try:
        train.main([*IRIS, "--epochs", "1"])
    except (SystemExit, KeyboardInterrupt) as error:  # pytest itself would end at the latter
        ended = error
    assert isinstance(ended, SystemExit)
    assert ended.code == 130


@pytest.mark.slow
def test_two_runs_in_one_folder_do_not_meet(tmp_path):
    """Each of a name of its own. Both make ``runs/``, whoever comes first."""
    names = ("one", "two")
    script = str(ROOT / "scripts" / "train.py")
    runs = [
        subprocess.Popen(
            [sys.executable, script, *IRIS, "--epochs", "3", "--name", name],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in names
    ]
    for run in runs:
        assert run.communicate(timeout=120)[1].startswith("epoch ")
        assert run.returncode == 0
    found = []
    for name in names:
        folder = tmp_path / "runs" / name
        found.append(json.loads((folder / "metrics.json").read_text()))
        for checkpoint in ("best.ckpt", "last.ckpt"):
            torch.load(folder / checkpoint, weights_only=True)
        assert len((folder / "metrics.csv").read_text().splitlines()) > 3
    assert found[0]["best_val_loss"] == found[1]["best_val_loss"]


@pytest.mark.usefixtures("here")
def test_a_second_run_of_a_name_does_not_spoil_the_first():
    from lightning.pytorch import Callback

    from torchref.training import Config, Run

    config = Config(dataset="iris", epochs=3, batch_size=16, accelerator="cpu", parity=False)

    class Second(Callback):
        def on_train_epoch_end(self, trainer, module):
            if trainer.current_epoch == 0:
                with pytest.raises(OSError, match="another run is writing to it; --name names"):
                    Run(config, progress=False).execute()

    Run(config, callbacks=[Second()], progress=False).execute()
    rows = csv.DictReader(Path("runs/iris/metrics.csv").read_text().splitlines())
    assert [row["epoch"] for row in rows if row["val_loss"]] == ["0", "1", "2"]
    assert not Path("runs/iris/.lock").exists()
    Run(config, progress=False).execute()  # it is free again

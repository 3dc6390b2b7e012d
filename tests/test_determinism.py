"""Same seed, same bits: in a second run, on other threads, and where torch is told to be strict.

Torch promises nothing across numbers of threads. What it keeps all the same, ours keep.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pieces import PIECES

import torchref
import torchref.nn as nn
import torchref.nn.functional as ours

ROOT = Path(__file__).parents[1]
KERNELS = os.environ.get("TRITON_INTERPRET") == "1"
LONGER = 16 if KERNELS else 64  # times; there are two programs then, or two threads
OPTIMIZERS = {
    "SGD": (torchref.optim.SGD, {"momentum": 0.9, "max_norm": 1.0}),
    "RMSprop": (torchref.optim.RMSprop, {"centered": True, "momentum": 0.9}),
    "Adam": (torchref.optim.Adam, {"amsgrad": True}),
    "AdamW": (torchref.optim.AdamW, {"max_norm": 1.0, "ema_decay": 0.9}),
}
# Sums over all elements, of which each thread takes a part, in torch's own as in ours.
SPLIT_SUMS = {"binary_cross_entropy", "binary_cross_entropy_with_logits"}

of_pieces = pytest.mark.parametrize("piece", PIECES, ids=lambda p: p.name)


def large_inputs(piece):
    """A piece's inputs, each side some times as long: enough elements for two threads."""
    inputs = piece.inputs(torch.float32)
    times = LONGER if max(x.ndim for x in inputs) < 3 else LONGER // 4
    generator = torch.Generator().manual_seed(1)
    for x in inputs:
        y = x.detach().repeat(*[times] * x.ndim)
        if y.is_floating_point():  # no two rows alike; what was in [0, 1] remains there
            y *= 0.5 + torch.rand(y.shape, generator=generator) / 2
        yield y.requires_grad_(x.requires_grad)


def results(piece, function):
    """The output and the gradients."""
    inputs = list(large_inputs(piece))
    torch.manual_seed(0)
    y = function(*inputs)
    xs = [x for x in inputs if x.requires_grad]
    return [y.detach(), *torch.autograd.grad(y.sin().sum(), xs)]


def same_bits(some, others):
    """NaNs and the sign of 0 count."""
    return all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(map(flat, some), map(flat, others), strict=True)
    )


def flat(x):
    return x.detach().contiguous().reshape(-1)


def trained(optimizer):
    """All that training with one seed leaves: losses, parameters, statistics, states, averages."""
    torch.manual_seed(3)
    net = torch.nn.Sequential(
        nn.Linear(16, 40),
        nn.BatchNorm1d(40),
        nn.ReLU(),
        nn.LinearActDropout(40, 30, p=0.2, activation="gelu"),
        nn.BatchNormAct1d(30, activation="silu"),
        *(nn.LeakyReLU(), nn.Sigmoid(), nn.Tanh(), nn.ELU(), nn.SELU(), nn.Softplus()),
        nn.Dropout(0.1),
        nn.Linear(30, 5),
    )
    for module in net:
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    cls, options = OPTIMIZERS[optimizer]
    optimizer = cls(net.parameters(), lr=1e-2, **options)
    losses = []
    for _ in range(4):
        x, target = torch.randn(64, 16), torch.randint(0, 5, (64,))
        optimizer.zero_grad()
        loss = ours.cross_entropy(net(x), target, label_smoothing=0.1)
        loss = loss + nn.weight_penalty(net, l1=1e-4, l2=1e-4)
        loss.backward()
        optimizer.step()
        losses.append(loss)
    return [*losses, *net.state_dict().values(), *tensors_of(optimizer)]


def stepped(optimizer, **changes):
    """Parameters and states after three steps."""
    cls, options = OPTIMIZERS[optimizer]
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(n)) for n in (3, 50_001)]
    optimizer = cls(params, lr=1e-2, **options | changes)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return [*params, *tensors_of(optimizer)]


def tensors_of(optimizer):
    states = [x for state in optimizer.state.values() for x in state.values()]
    return [x for x in states if isinstance(x, torch.Tensor)]


@pytest.fixture
def threads():
    """Set the number of threads; the one before comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def strict():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@of_pieces
def test_a_second_run_has_the_same_bits(piece):
    assert same_bits(results(piece, piece.ours), results(piece, piece.ours))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_again_has_the_same_bits(optimizer):
    assert same_bits(trained(optimizer), trained(optimizer))


def test_another_seed_draws_another_mask():
    """Or the tests above would not see a mask that ignores the seed."""
    masks = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        masks.append(ours.dropout(torch.ones(100), 0.5))
    assert torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], masks[1])


@pytest.mark.cpu
@of_pieces
def test_one_thread_and_two_agree_where_torchs_do(piece, threads):
    found = []
    for function in (piece.ours, piece.theirs):
        runs = []
        for count in (1, 2):
            threads(count)
            runs.append(results(piece, function))
        found.append(same_bits(*runs))
    mine, torchs = found
    assert mine or not torchs
    assert mine or piece.name in SPLIT_SUMS


@pytest.mark.cpu
def test_masks_are_the_same_on_any_number_of_threads(threads):
    masks = []
    for count in (1, 2, 3):
        threads(count)
        torch.manual_seed(0)
        masks.append(ours.dropout(torch.ones(100_001), 0.3))
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


@pytest.mark.cpu
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_is_the_same_on_any_number_of_threads(optimizer, threads):
    """A clipped one excepted, whose norm is a sum over all elements."""
    runs = []
    for count in (1, 2):
        threads(count)
        runs.append(stepped(optimizer, max_norm=None))
    assert same_bits(*runs)


@of_pieces
def test_deterministic_algorithms_change_nothing(piece, request):
    """Nothing raises, nothing warns, and no result holds the NaNs that empty memory then has."""
    expected = results(piece, piece.ours)
    request.getfixturevalue("strict")
    assert same_bits(results(piece, piece.ours), expected)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_deterministic_algorithms_do_not_change_training(optimizer, request):
    expected = trained(optimizer)
    request.getfixturevalue("strict")
    assert same_bits(trained(optimizer), expected)


# What docs/determinism.md says.


def atomics_and_autotuning():
    """Where the kernels' source has them: file, function and name."""
    for path in sorted((ROOT / "triton_kernels").glob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                for name in re.findall(r"\batomic_\w+|\bautotune\b", ast.unparse(function)):
                    yield path.name, function.name, name


def test_kernels_add_nothing_atomically():
    """The one is a counter: who is the last to come does not matter."""
    assert list(atomics_and_autotuning()) == [("multi_tensor.py", "_advance", "atomic_add")]


def test_the_table_has_every_piece():
    table = (ROOT / "docs" / "determinism.md").read_text()
    kinds = r"_(train|eval|probabilities)$"  # of inputs of one piece
    missing = {name for p in PIECES if f"`{(name := re.sub(kinds, '', p.name))}`" not in table}
    assert not missing
    assert all(f"`{name}`" in table for name in OPTIMIZERS)


# Kernels, in a process of Triton's interpreter.

BACKWARDS = """
import sys
sys.path.insert(0, "tests")
import conftest, torch, torchref
from triton.runtime import interpreter
from test_determinism import OPTIMIZERS, PIECES, results, same_bits, stepped


class Reversed(type(interpreter.interpreter_builder)):
    def set_grid_idx(self, x, y, z):
        super().set_grid_idx(self.grid_dim[0] - 1 - x, y, z)


cases = {p.name: lambda p=p: results(p, p.ours) for p in PIECES if p.name in sys.argv[1:]}
cases |= {o: lambda o=o: stepped(o) for o in OPTIMIZERS if o in sys.argv[1:]}
for name, run in cases.items():
    first, again = run(), run()
    interpreter.interpreter_builder.__class__ = Reversed
    backwards = run()
    interpreter.interpreter_builder.__class__ = Reversed.__base__
    print(name, same_bits(first, again), same_bits(first, backwards))
"""
REDUCTIONS = ["softmax", "cross_entropy", "mse_loss", "batch_norm_train", "bias_act", "AdamW"]
OTHERS = [n for n in [p.name for p in PIECES] + list(OPTIMIZERS) if n not in REDUCTIONS]


def backwards(*names):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TORCHREF_BACKEND": "triton"}
    command = [sys.executable, "-c", BACKWARDS, *names]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [f"{name} True True" for name in names]


@pytest.mark.skipif(KERNELS, reason="starts the interpreter itself")
def test_reductions_do_not_depend_on_the_order_of_programs():
    """A GPU starts them in any order. A sum by atomic additions would have other bits each time."""
    backwards(*REDUCTIONS)


@pytest.mark.slow
@pytest.mark.skipif(KERNELS, reason="starts the interpreter itself")
def test_no_kernel_depends_on_the_order_of_programs():
    backwards(*OTHERS)

"""Same seed, same bits: in a second run, on other threads, and where torch is told to be strict.

Torch promises nothing across numbers of threads. What it keeps all the same, ours keep.
"""

import ast
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as theirs
from pieces import PIECES, Piece, scores

import torchref
import torchref.nn as nn
import torchref.nn.functional as ours

ROOT = Path(__file__).parents[1]
KERNELS = os.environ.get("TRITON_INTERPRET") == "1"
LONGER = 16 if KERNELS else 64  # times; there are two programs then, or two threads
LONG = 9_001 if KERNELS else 50_001  # elements, for the same reason
OPTIMIZERS = {
    "SGD": (torchref.optim.SGD, {"momentum": 0.9, "max_norm": 1.0}),
    "RMSprop": (torchref.optim.RMSprop, {"centered": True, "momentum": 0.9}),
    "Adam": (torchref.optim.Adam, {"amsgrad": True}),
    "AdamW": (torchref.optim.AdamW, {"max_norm": 1.0, "ema_decay": 0.9}),
}
# Sums over all elements, of which each thread takes a part, in torch's own as in ours.
SPLIT_SUMS = {"binary_cross_entropy", "binary_cross_entropy_with_logits"}


def drawn(dtype, *shapes):
    return [scores(*shape)(dtype)[0] for shape in shapes]


def of_scores(x, w, b, target):
    """Of 50 rows at a time: of the long inputs there are more."""
    options = SimpleNamespace(batch_chunk_size=50)
    return ours.linear_cross_entropy(x, w, target, linear_bias=b, options=options)


def of_all_scores(x, w, b, target):
    """In torch's pieces."""
    return theirs.cross_entropy(theirs.linear(x, w, b), target)


def layer_and_indices(dtype):
    return *drawn(dtype, (6, 5), (12, 5), (12,)), torch.tensor([0, 4, -100, 2, 11, 1])


NAMED = {piece.name: piece for piece in PIECES}
CASES = [
    *PIECES,
    replace(
        NAMED["cross_entropy"],
        name="cross_entropy_once",
        ours=partial(NAMED["cross_entropy"].ours, gradient_in_forward=True),
    ),
    Piece("linear_cross_entropy", of_scores, of_all_scores, layer_and_indices),
]
of_pieces = pytest.mark.parametrize("piece", CASES, ids=lambda p: p.name)


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
    return output_and_gradients(function, list(large_inputs(piece)))


def output_and_gradients(function, inputs):
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
    params = [torch.nn.Parameter(torch.randn(n)) for n in (3, LONG)]
    optimizer = cls(params, lr=1e-2, **options | changes)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return [*params, *tensors_of(optimizer)]


def tensors_of(optimizer):
    states = [x for state in optimizer.state.values() for x in state.values()]
    return [x for x in states if isinstance(x, torch.Tensor)]


def clipped():
    """The norm, and the gradients after it."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.empty(n)) for n in (3, LONG)]
    for p in params:
        p.grad = torch.randn_like(p)
    norm = torchref.optim.clip_grad_norm_(params, 1.0)
    return [norm, *(p.grad for p in params)]


RUNS = {name: partial(trained, name) for name in OPTIMIZERS} | {"clip_grad_norm_": clipped}
of_runs = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)


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


@of_runs
def test_training_again_has_the_same_bits(run):
    assert same_bits(run(), run())


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


@of_runs
def test_deterministic_algorithms_do_not_change_training(run, request):
    expected = run()
    request.getfixturevalue("strict")
    assert same_bits(run(), expected)


# What docs/determinism.md says.


def source_of_kernels():
    for path in sorted((ROOT / "triton_kernels").glob("*.py")):
        yield path.name, path.read_text()


def atomics_and_autotuning():
    """Where the kernels' source has them: file, function or None, and name."""
    for file, source in source_of_kernels():
        for statement in ast.parse(source).body:  # not the text, whose comments may speak of them
            for name in re.findall(r"\batomic_\w+|\bautotune\b", ast.unparse(statement)):
                yield file, getattr(statement, "name", None), name


def test_kernels_add_nothing_atomically():
    """The one is a counter: who is the last to come does not matter."""
    assert list(atomics_and_autotuning()) == [("multi_tensor.py", "_advance", "atomic_add")]


def test_the_table_has_what_is_run_here_and_nothing_else():
    page = (ROOT / "docs" / "determinism.md").read_text()
    rows = re.findall(r"^\| ([^|]+)", page, re.M)
    kinds = r"_(train|eval|probabilities|once)$"  # of inputs and options of one piece
    pieces = {re.sub(kinds, "", piece.name) for piece in CASES}
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == {*pieces, *RUNS, "max_norm"}


# Kernels, in a process of Triton's interpreter.


of_sizes = partial(drawn, torch.float32)
# Inputs of which kernels cut into parts what of the others they leave whole.
SPLIT = {
    "softmax": of_sizes((2, 33_000)),  # a row
    "nll_loss": [*of_sizes((600, 5)), torch.arange(600) % 5],  # the rows
    "batch_norm_train": of_sizes((1400, 12), (12,), (12,)),  # the sums of a channel
    "linear": of_sizes((150, 7), (3, 7), (3,)),  # the sum of a column
    "bias_act": of_sizes((150, 112), (112,)),
}
IN_INTERPRETER = (
    {p.name: partial(results, p, p.ours) for p in CASES}
    | {f"{n}, split": partial(output_and_gradients, NAMED[n].ours, SPLIT[n]) for n in SPLIT}
    | {name: partial(stepped, name) for name in OPTIMIZERS}
    | {"clip_grad_norm_": clipped}
)
# They add up the parts of all programs, in one.
OF_ONE_PROGRAM = {"_total_kernel", "_total_loss_kernel", "_norm_kernel"}
BACKWARDS = """
import json, sys
sys.path.insert(0, "tests")
import conftest, torch, torchref
from test_determinism import IN_INTERPRETER, same_bits
from torchref.triton_kernels import _launch
from triton.runtime.interpreter import interpreter_builder as builder


class Reversed(type(builder)):
    kernels = set()  # of which more than one program ran

    def set_grid_idx(self, x, y, z):
        super().set_grid_idx(self.grid_dim[0] - 1 - x, y, z)
        if x > 0:
            self.kernels.add(self.kernel)


def interpret(kernel, *arguments):
    builder.kernel = kernel.fn.__name__
    launch(kernel, *arguments)


launch, _launch._interpret = _launch._interpret, interpret
same = {}
for name, run in IN_INTERPRETER.items():
    first, again = run(), run()
    builder.__class__ = Reversed
    backwards = run()
    builder.__class__ = Reversed.__base__
    same[name] = same_bits(first, again), same_bits(first, backwards)
print(json.dumps({"same": same, "kernels": list(Reversed.kernels)}))
"""


@pytest.fixture(scope="module")
def backwards():
    """Which runs had the same bits again and in reverse, and the kernels of several programs."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TORCHREF_BACKEND": "triton"}
    command = [sys.executable, "-c", BACKWARDS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.skipif(KERNELS, reason="starts the interpreter itself")
def test_no_kernel_depends_on_the_order_of_programs(backwards):
    """A GPU starts them in any order. A sum by atomic additions would have other bits each time."""
    assert backwards["same"] == {name: [True, True] for name in IN_INTERPRETER}


@pytest.mark.skipif(KERNELS, reason="starts the interpreter itself")
def test_every_kernel_ran_in_reverse(backwards):
    source = "".join(text for _, text in source_of_kernels())
    kernels = set(re.findall(r"^def (\w+_kernel)\(", source, re.M))
    assert set(backwards["kernels"]) == kernels - OF_ONE_PROGRAM

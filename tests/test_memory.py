"""What pieces keep for their backward passes, that training does not grow, that caches end."""

import gc
import os
import sys

import pytest
import torch
from pieces import PIECES

import torchref
import torchref.nn as nn
import torchref.nn.functional as ours
from torchref import compilation
from torchref.optim import _update

pytestmark = pytest.mark.usefixtures("only_new_objects")
KERNELS = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "half"])

# Bytes held beyond torch's, in float32 and in bfloat16. Most is memory that the model has anyway.
MORE = {
    # two float32 a row and the weights' sum, but not the mask of the targets to ignore
    "cross_entropy": (34, 36),
    # three float32 a row, where torch keeps only log-probabilities beside the target
    "cross_entropy_probabilities": (72, 72),
    "nll_loss": (0, 2),  # the sum of the weights is of float32
    "l1_loss": (120, 60),  # both inputs, where torch keeps a new tensor, their difference
    "batch_norm_train": (0, 12),  # mean and deviation are of float32
    "batch_norm_act_train": (12, 18),  # the bias, to compute anew what torch keeps
    "batch_norm_act_eval": (12, 6),
    "bias_act": (28, 14),  # the same
}
# Bytes of tensors that live on for the backward pass alone, neither an input nor the output.
MORE_OF_ITS_OWN = {
    "cross_entropy_probabilities": (0, 12),  # three float32 a row, not two rows of bfloat16
    "nll_loss": (0, 2),
    "batch_norm_train": (0, 12),
}


@pytest.fixture(scope="module")
def only_new_objects():
    """The collector leaves the imported modules alone, so that it and ``tensors`` are fast."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def kept_by(function, inputs):
    """The bytes of the storages that autograd saves, and of those that nobody else has."""
    saved = {}

    def pack(x):
        storage = x.untyped_storage()
        saved[storage._cdata] = storage
        return x

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = function(*inputs)
    held_anyway = {x.untyped_storage()._cdata for x in (*inputs, y)}
    own = [storage.nbytes() for key, storage in saved.items() if key not in held_anyway]
    return sum(storage.nbytes() for storage in saved.values()), sum(own)


@DTYPES
@pytest.mark.parametrize("piece", PIECES, ids=lambda p: p.name)
def test_no_more_is_saved_than_by_torch(piece, dtype):
    inputs = piece.inputs(dtype)
    found, torchs = kept_by(piece.ours, inputs), kept_by(piece.theirs, inputs)
    for bytes_, limit, exceptions in zip(found, torchs, (MORE, MORE_OF_ITS_OWN), strict=True):
        more = exceptions.get(piece.name, (0, 0))[dtype != torch.float32]
        # an exception that is no longer needed shows, too
        assert bytes_ - limit == more if more else bytes_ <= limit


@pytest.mark.parametrize("piece", PIECES, ids=lambda p: p.name)
def test_nothing_is_kept_where_no_gradient_is_asked_for(piece):
    inputs = piece.inputs(torch.float32)
    with torch.no_grad():
        assert kept_by(piece.ours, inputs) == (0, 0)
    assert kept_by(piece.ours, [x.detach() for x in inputs]) == (0, 0)


@pytest.mark.parametrize("piece", PIECES, ids=lambda p: p.name)
def test_a_backward_pass_frees_what_was_kept(piece):
    """With the collector off: a cycle through a saved tensor would keep it until a collection."""
    inputs = piece.inputs(torch.float32)
    xs = [x for x in inputs if x.requires_grad]
    torch.autograd.grad(piece.ours(*inputs).sum(), xs)  # what is made once
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        for _ in range(3):
            torch.autograd.grad(piece.ours(*inputs).sum(), xs)
            piece.ours(*inputs)
        assert tensors() == before
    finally:
        gc.enable()


# Growth.


def tensors():
    # by type: isinstance would ask some objects for their class and make them warn
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())


class Training:
    """A network of every layer, whose weights and running statistics move at each step."""

    def __init__(self, optimizer):
        torch.manual_seed(0)
        self.net = nn_of_every_layer()
        self.optimizer = optimizer(self.net.parameters(), lr=1e-3)
        self.x, self.target = torch.randn(8, 6), torch.randint(0, 3, (8,))

    def steps(self, count):
        for step in range(count):
            rows = slice(0, 4 + step % 5)  # batches of many sizes
            self.optimizer.zero_grad()
            loss = ours.cross_entropy(self.net(self.x[rows]), self.target[rows])
            (loss + nn.weight_penalty(self.net, l1=1e-4, l2=1e-4)).backward()
            self.optimizer.step()


def nn_of_every_layer():
    activations = [nn.LeakyReLU(), nn.Sigmoid(), nn.Tanh(), nn.ELU(), nn.SELU(), nn.Softplus()]
    return torch.nn.Sequential(
        nn.Linear(6, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(inplace=True),
        nn.LinearActDropout(8, 8, p=0.2, activation="gelu"),
        nn.BatchNormAct1d(8, activation="silu"),
        *activations,
        nn.Dropout(0.1),
        nn.Linear(8, 3),
    )


OPTIMIZERS = {
    "SGD": lambda params, lr: torchref.optim.SGD(params, lr, momentum=0.9),
    "RMSprop": torchref.optim.RMSprop,
    "AdamW": lambda params, lr: torchref.optim.AdamW(params, lr, max_norm=1.0, ema_decay=0.9),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_does_not_grow(optimizer):
    training = Training(OPTIMIZERS[optimizer])
    training.steps(200)
    before, count, grown = blocks(), tensors(), []
    # the first windows still fill Python's free lists: 91, 63, 31, 11 were seen
    for _ in range(6):
        training.steps(100)
        grown.append(blocks() - before - sum(grown))
    assert tensors() == count
    assert min(grown) < 60  # a leak shows in each, with a piece or more a step


def blocks():
    """How many pieces of memory Python has given out."""
    gc.collect()
    return sys.getallocatedblocks()


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux's /proc")
def test_ten_thousand_steps_do_not_grow():
    training = Training(OPTIMIZERS["AdamW"])
    training.steps(1000)
    gc.collect()
    before = tensors(), resident()
    training.steps(9000)
    gc.collect()
    assert tensors() == before[0]
    assert resident() - before[1] < 4 * 2**20  # 460 bytes a step


def resident():
    """Bytes of the process in memory, those of C and C++ among them."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_an_optimizer_leaves_with_its_parameters():
    gc.collect()
    before = tensors()
    training = Training(OPTIMIZERS["AdamW"])
    training.steps(3)
    del training
    gc.collect()
    assert tensors() == before


# Caches.


@pytest.fixture
def uncompiled(monkeypatch):
    """The compiled backend without a compiler; what it would have compiled."""
    monkeypatch.setattr(compilation, "_variants", {})
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)

    def count():
        return sum(len(variants) for variants in compilation._variants.values())

    with torchref.backend("compiled"):
        yield count


def test_sizes_and_scalars_share_a_compilation(uncompiled):
    for size in range(2, 400):
        ours.leaky_relu(torch.ones(size, 2 + size % 7), 1 / size)
        assert uncompiled() == 1


def test_compilations_are_bounded(uncompiled, monkeypatch):
    """A new integer is a new compilation: an index to ignore, a dimension."""
    monkeypatch.setattr(compilation, "VARIANTS", 5)
    compilation._say_no_more.cache_clear()
    x, target = torch.randn(3, 4).log_softmax(1), torch.tensor([0, 1, 2])
    expected = torch.nn.functional.nll_loss(x, target)
    with pytest.warns(UserWarning, match="nll_loss_fwd is compiled for 5 kinds") as said:
        losses = [ours.nll_loss(x, target, ignore_index=index) for index in (*range(-30, 0), -30)]
    torch.testing.assert_close(losses, [expected] * 31)
    assert len(said) == 1
    assert uncompiled() == 5


def test_a_step_beyond_the_bound_is_the_formula(uncompiled, monkeypatch):
    monkeypatch.setattr(compilation, "VARIANTS", 0)
    compilation._say_no_more.cache_clear()
    pair = [torch.nn.Parameter(torch.arange(5.0)) for _ in range(2)]
    for p in pair:
        p.grad = torch.ones(5)
    with pytest.warns(UserWarning, match="_update_batch is compiled for 0 kinds"):
        torchref.optim.Adam(pair[:1]).step()
    torch.optim.Adam(pair[1:]).step()
    torch.testing.assert_close(*pair)
    assert uncompiled() == 0


def test_examples_of_an_optimizer_do_not_stay():
    """Those to compile on are of a million numbers a state."""
    types, device = (torch.float32, torch.float32), torch.device("cpu")
    before = tensors()
    _update._examples(types, device, 2**10)
    assert tensors() == before
    for least in range(70):  # those to fill a batch up with stay, and are small
        _update._padding((*types, *[None] * least), device)
    info = _update._padding.cache_info()
    assert info.currsize <= info.maxsize == 64


def test_views_of_parameters_go_with_the_parameters():
    """The compiled optimizers keep a flat view of each parameter and state."""
    before = len(_update._vectors)
    params = [torch.nn.Parameter(torch.randn(3, 4)) for _ in range(5)]
    for _ in range(3):
        assert len([*map(_update._kept_vector, params)]) == 5
    assert len(_update._vectors) == before + 5
    del params
    assert len(_update._vectors) == before


@pytest.fixture
def keys(monkeypatch):
    """The keys under which the launcher would keep a compiled kernel, on a GPU."""
    kernel_compiling = pytest.importorskip("kernel_compiling")
    launch = kernel_compiling._launch

    def seen(launches):
        return {
            (
                each.kernel.fn,
                each.num_warps,
                *map(launch.specialization, each.args),
                *map(launch._hashable, each.constexprs.values()),
            )
            for each in launches
        }

    with kernel_compiling.recorded() as launches:
        yield lambda: seen(launches)


class Kernel:
    """As the JIT's, with nothing to compile."""

    fn, pre_run_hooks = None, ()

    def __getitem__(self, grid):
        return lambda *args, **options: object()


@pytest.mark.skipif(KERNELS, reason="looks at real launches")
def test_launches_are_bounded(monkeypatch):
    launch = pytest.importorskip("torchref.triton_kernels._launch")
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(launch, "KINDS", 5)
    for block in range(20):
        launch._run_here(Kernel(), 1, 0, (), 4, {"BLOCK": block})
        assert 0 < len(launch._compiled) <= 5


@pytest.mark.skipif(KERNELS, reason="looks at real launches")
def test_launches_of_many_sizes_share_few_kernels(keys):
    """So that the bound of the launcher's cache is never met."""
    activation = pytest.importorskip("torchref.triton_kernels.activation")
    softmax = pytest.importorskip("torchref.triton_kernels.softmax")
    counts = []
    for sizes in (range(2, 300), range(300, 3000, 7)):
        for size in sizes:
            x = torch.empty(3, size, device="meta")
            activation.leaky_relu_fwd(x, 1 / size, False)
            softmax.softmax_fwd(x, 1)
            softmax.softmax_fwd(x, 0)
        counts.append(len(keys()))
    assert counts[0] < 60
    assert counts[1] < 1.5 * counts[0]


@pytest.mark.skipif(KERNELS, reason="looks at real launches")
def test_tables_of_optimizers_are_bounded(monkeypatch):
    tables = pytest.importorskip("torchref.triton_kernels._tables")
    monkeypatch.setattr(tables, "_words", {})
    for size in range(1, 200):
        tables.words_for((size, 7), torch.device("cpu"))
        assert len(tables._words) <= 64

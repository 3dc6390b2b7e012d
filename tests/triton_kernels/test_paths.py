"""Every way a kernel can go: several programs, rows wider than a tile, split reductions."""

import math

import pytest
import torch
import torch.nn.functional as theirs
from pieces import PIECES

import torchref.nn.functional as ours
from torchref.testing import assert_parity
from torchref.triton_kernels import (
    _rows,
    activation,
    batch_norm,
    cross_entropy,
    dropout,
    softmax,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
POINTWISE = [p for p in PIECES if len(p.inputs(torch.float32)) == 1 and not p.random]
DISTANCES = ["mse_loss", "l1_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 293), (3, 1367)], ids=str)
@pytest.mark.parametrize("piece", POINTWISE, ids=lambda p: p.name)
def test_sizes_that_no_block_divides(piece, shape, dtype):
    assert_parity(piece.ours, piece.theirs, (torch.randn(shape) * 2).to(dtype).requires_grad_())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("piece", POINTWISE, ids=lambda p: p.name)
def test_memory_that_is_not_aligned(piece, dtype):
    x = torch.randn(1 + 3 * 700).to(dtype)[1:].view(3, 700).requires_grad_()
    upstream = torch.randn(1 + 3 * 700).to(dtype)[1:].view(3, 700)
    assert_parity(piece.ours, piece.theirs, x, upstream=upstream)


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses_over_several_programs(name, reduction, dtype):
    x, target = torch.rand(3001).to(dtype), torch.rand(3001).to(dtype)
    inputs = x.requires_grad_(), target.requires_grad_()
    assert_parity(getattr(ours, name), getattr(theirs, name), *inputs, reduction=reduction)


@pytest.fixture
def narrow_tiles(monkeypatch):
    """Rows of more than 16 take the loop, 32 columns a step."""
    for module in (softmax, cross_entropy):
        monkeypatch.setattr(module, "WIDEST_FWD", 16)
        monkeypatch.setattr(module, "WIDEST_BWD", 16)
    monkeypatch.setattr(_rows, "LOOP_COLS", 1)


WIDE = {
    "random": torch.randn(3, 101) * 3,
    "high": torch.randn(2, 101) + 300,
    "low": torch.randn(2, 101) - 300,
    "rising": torch.linspace(-300, 300, 101).expand(2, 101),
    "inf": torch.where(torch.arange(202).view(2, 101) % 3 == 0, -math.inf, torch.randn(2, 101)),
    "inf-first-tile": torch.cat([torch.full((2, 40), -math.inf), torch.randn(2, 61)], dim=1),
    "all-inf": torch.full((2, 101), -math.inf),
    "nan": torch.cat([torch.randn(1, 100), torch.tensor([[math.nan]])], dim=1),
    "+inf": torch.cat([torch.randn(1, 100), torch.tensor([[math.inf]])], dim=1),
}


@pytest.mark.usefixtures("narrow_tiles")
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize("which", WIDE)
def test_softmax_of_rows_wider_than_a_tile(name, which):
    x = WIDE[which].clone().requires_grad_("inf" not in which and which != "nan")
    assert_parity(getattr(ours, name), getattr(theirs, name), x, dim=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize(("shape", "dim"), [((2, 70, 130), 1), ((300, 3), 0), ((2, 5, 3, 41), 1)])
def test_softmax_along_a_strided_dimension(name, shape, dim, dtype):
    x = torch.randn(shape).to(dtype).requires_grad_()
    assert_parity(getattr(ours, name), getattr(theirs, name), x, dim=dim)


@pytest.mark.usefixtures("narrow_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("target", ["index", "probability"])
def test_cross_entropy_of_rows_wider_than_a_tile(target, reduction, smoothing, weighted, dtype):
    x = torch.randn(5, 101).to(dtype).requires_grad_()
    if target == "index":
        targets = torch.tensor([0, 100, -100, 33, 64])
    else:
        targets = torch.randn(5, 101).softmax(1).to(dtype).requires_grad_()
    weight = torch.rand(101).to(dtype) if weighted else None
    kwargs = {"weight": weight, "reduction": reduction, "label_smoothing": smoothing}
    assert_parity(ours.cross_entropy, theirs.cross_entropy, x, targets, **kwargs)


@pytest.mark.usefixtures("narrow_tiles")
@pytest.mark.parametrize("which", ["high", "low", "rising", "inf-first-tile"])
def test_cross_entropy_of_extreme_rows_wider_than_a_tile(which):
    x = WIDE[which].clone().requires_grad_()
    assert_parity(ours.cross_entropy, theirs.cross_entropy, x, torch.tensor([100, 99]))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(2, 70, 130), (2, 3, 9, 11), (300, 3), (3, 2500)], ids=str)
def test_cross_entropy_over_several_programs(shape, smoothing):
    x = torch.randn(shape, requires_grad=True)
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    target.view(-1)[::5] = -100
    kwargs = {"weight": torch.rand(shape[1]), "label_smoothing": smoothing}
    assert_parity(ours.cross_entropy, theirs.cross_entropy, x, target, **kwargs)
    assert_parity(ours.nll_loss, theirs.nll_loss, x, target, weight=kwargs["weight"])


@pytest.mark.parametrize("layout", ["transposed", "classes-last", "classes-first", "strided"])
def test_cross_entropy_of_scores_in_any_order(layout):
    x = {
        "transposed": torch.randn(2, 5, 7, 6).transpose(2, 3),
        "classes-last": torch.randn(2, 6, 7, 5).permute(0, 3, 1, 2),
        "classes-first": torch.randn(5, 2, 6, 7).transpose(0, 1),
        "strided": torch.randn(2, 5, 6, 14)[..., ::2],
    }[layout].requires_grad_()
    target = torch.randint(0, 5, (2, 6, 7))
    for reduction in ("mean", "none"):
        assert_parity(
            ours.cross_entropy, theirs.cross_entropy, x, target, reduction=reduction, strides=False
        )
    probabilities = torch.randn(2, 5, 6, 7).softmax(1).requires_grad_()
    assert_parity(ours.cross_entropy, theirs.cross_entropy, x, probabilities, strides=False)


def test_targets_out_of_range_are_loud(monkeypatch):
    """A GPU cannot raise: loss and gradient are NaN, and no address is formed."""
    monkeypatch.setattr("torchref.nn.cross_entropy.reads_values", lambda *_: False)
    for bad in (5, -1, 2**40):
        for loss in (ours.cross_entropy, ours.nll_loss):
            for weight in (None, torch.rand(5)):
                x = torch.randn(3, 5, requires_grad=True)
                y = loss(x, torch.tensor([0, bad, 2]), weight=weight, reduction="none")
                y.sum().backward()
                assert y.isnan().tolist() == [False, True, False]
                assert x.grad.isnan().any(1).tolist() == [False, True, False]


SPLIT = {
    "rows": ((4, 8, 56, 56), torch.contiguous_format),
    "columns": ((4, 24, 50, 50), torch.channels_last),
    "one channel": ((1, 1, 100, 103), torch.contiguous_format),
    "one sample, odd width": ((1, 3, 151, 401), torch.contiguous_format),
    "small maps": ((70, 5, 3, 3), torch.contiguous_format),
    "small maps, split": ((300, 6, 7, 7), torch.contiguous_format),
}


@pytest.mark.parametrize("which", SPLIT)
def test_batch_norm_in_parts(which, monkeypatch):
    shape, memory_format = SPLIT[which]
    monkeypatch.setattr(batch_norm, "SHARE_BYTES", 4096)
    x = (torch.randn(shape) + 1).contiguous(memory_format=memory_format).requires_grad_()
    weight, bias = (torch.rand(shape[1], requires_grad=True) for _ in range(2))
    running = torch.zeros(shape[1]), torch.ones(shape[1])
    for training in (True, False):
        inputs = (x, *running, weight, bias, training)
        assert_parity(ours.batch_norm, theirs.batch_norm, *inputs)


@pytest.mark.parametrize("which", SPLIT)
def test_batch_norm_and_what_follows_it_in_parts(which, monkeypatch):
    def composed(*args, activation, residual):
        return getattr(theirs, activation)(theirs.batch_norm(*args) + residual)

    shape, memory_format = SPLIT[which]
    monkeypatch.setattr(batch_norm, "SHARE_BYTES", 4096)
    # the residual's dimensions are in the other order
    x = (torch.randn(shape) + 1).contiguous(memory_format=memory_format).requires_grad_()
    residual = torch.randn(*shape[:2], shape[3], shape[2]).mT.requires_grad_()
    weight, bias = (torch.rand(shape[1], requires_grad=True) for _ in range(2))
    running = torch.zeros(shape[1]), torch.ones(shape[1])
    # of a ReLU backward reads the output, of a SiLU the residual
    for training, name in ((True, "silu"), (False, "relu")):
        inputs = (x, *running, weight, bias, training)
        kwargs = {"activation": name, "residual": residual}
        assert_parity(ours.batch_norm_act, composed, *inputs, **kwargs)


@pytest.mark.parametrize("mean", ["large mean", "outlier first"])
def test_batch_norm_statistics_in_parts_keep_their_digits(mean, monkeypatch):
    monkeypatch.setattr(batch_norm, "SHARE_BYTES", 4096)
    x = torch.randn(8, 2, 90, 90) + (1e4 if mean == "large mean" else 0)
    x[0, :, 0, 0] += 0 if mean == "large mean" else 1e4
    _, mean, rstd = batch_norm.batch_norm_fwd(x, None, None, None, None, 0.0, 1e-5, True)
    truth = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean.double(), truth.mean(1), rtol=1e-6, atol=1e-7)
    # E[x^2] - E[x]^2 would be off by 1 and more
    expected = (truth.var(1, correction=0) + 1e-5).rsqrt()
    torch.testing.assert_close(rstd.double(), expected, rtol=2e-6, atol=0)


def test_batch_norm_of_half_parameters_and_strided_statistics():
    x = torch.randn(6, 3, 5, dtype=torch.float16, requires_grad=True)
    parameters = [torch.rand(3, dtype=torch.float16, requires_grad=True) for _ in range(2)]
    assert_parity(ours.batch_norm, theirs.batch_norm, x, None, None, *parameters, True)
    moved = [torch.ones(3, 2)[:, 0], torch.ones(3, 2)[:, 0]], [torch.ones(3), torch.ones(3)]
    for library, running in zip((ours, theirs), moved, strict=True):
        library.batch_norm(x.detach().float(), *running, training=True)
    torch.testing.assert_close(*moved)


def test_bias_gradients_in_parts():
    for rows, features in ((400, 37), (131, 300), (5, 1), (1, 5)):
        x, weight = torch.randn(rows, 3), torch.randn(features, 3)
        bias = torch.randn(features, requires_grad=True)
        assert_parity(ours.linear, theirs.linear, x, weight, bias)


def test_results_repeat_bit_by_bit():
    x = torch.randn(300, 6, 7, 7)
    dy = torch.randn(300, 6, 7, 7)
    results = []
    for _ in range(2):
        y, mean, rstd = batch_norm.batch_norm_fwd(x, None, None, None, None, 0.1, 1e-5, True)
        gradients = batch_norm.batch_norm_bwd(dy, x, torch.ones(6), mean, rstd, (True,) * 4)
        results.append([y, mean, rstd, *gradients])
    assert all(map(torch.equal, *results))


def test_autograd_learns_what_kernels_write():
    """It sees no pointer: what it saved of a tensor would be taken for unchanged."""
    x, running = torch.randn(8, 3), [torch.zeros(3), torch.ones(3)]
    for write, written in [
        (lambda: activation.relu_fwd(x, True), [x]),
        (lambda: dropout.seeded_dropout_fwd(x, torch.tensor(1), 0.5, 0.5, True), [x]),
        (lambda: batch_norm.batch_norm_fwd(x, None, None, *running, 0.1, 1e-5, True), running),
    ]:
        before = [t._version for t in written]
        write()
        assert all(t._version > v for t, v in zip(written, before, strict=True))
    with torch.inference_mode():  # where tensors have no version
        activation.relu_fwd(torch.randn(8), True)

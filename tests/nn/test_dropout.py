import copy

import pytest
import torch
import torch.nn.functional as theirs
from torch.utils.checkpoint import checkpoint

import torchref
import torchref.nn as nn
import torchref.nn.functional as ours
from torchref.testing import assert_parity

draws_torchs_mask = pytest.mark.skipif(
    torchref.get_backend() == "triton", reason="a kernel's mask is its own: test_dropout_kernel.py"
)


@pytest.mark.cpu
@draws_torchs_mask
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bit_equal_to_torch_on_the_cpu(p, dtype):
    x = torch.randn(1001, dtype=dtype)
    drawn = []
    for library in (ours, theirs):
        torch.manual_seed(3)
        drawn.append((library.dropout(x, p), torch.get_rng_state()))
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[0][1], drawn[1][1])


@draws_torchs_mask
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(13, 7), (), (0, 3)], ids=str)
def test_values_and_gradients(shape, p, dtype):
    x = torch.randn(shape).to(dtype).requires_grad_()
    assert_parity(ours.dropout, theirs.dropout, x, p)
    assert_parity(ours.dropout, theirs.dropout, x, p, False)


@draws_torchs_mask
def test_layouts():
    for x in (
        torch.randn(4, 3, 5, 6).contiguous(memory_format=torch.channels_last),
        torch.randn(6, 8)[:, ::2],
        torch.randn(5, 7).t(),
    ):
        assert_parity(ours.dropout, theirs.dropout, x.requires_grad_())


def test_share_and_expectation():
    x = torch.ones(100_000)
    y = ours.dropout(x, 0.3)
    # 5 standard deviations of a binomial share: sqrt(0.3 * 0.7 / 1e5) = 1.4e-3
    assert (y == 0).float().mean().item() == pytest.approx(0.3, abs=7.5e-3)
    assert y.mean().item() == pytest.approx(1.0, abs=1.1e-2)
    assert set(y.unique().tolist()) == {0.0, (1 / torch.tensor(0.7)).item()}


@draws_torchs_mask
def test_the_courses_form():
    keep = 0.8  # the course's p
    m = nn.Dropout(1 - keep, scale_at="inference")
    x = torch.randn(1000, requires_grad=True)
    torch.manual_seed(0)
    y = m(x)
    y.sum().backward()
    torch.manual_seed(0)
    kept = theirs.dropout(torch.ones(1000), 1 - keep) != 0
    assert torch.equal(y.detach(), x.detach() * kept)
    assert torch.equal(x.grad, kept.float())
    torch.testing.assert_close(m.eval()(x), x * keep)
    assert "scale_at='inference'" in repr(m)


def test_nothing_to_do_returns_the_input():
    x = torch.randn(3)
    assert ours.dropout(x, 0.5, training=False) is x
    assert ours.dropout(x, 0.0) is x
    assert nn.Dropout(0.5).eval()(x) is x


def test_dropping_everything_keeps_nan():
    x = torch.tensor([1.0, float("nan"), float("inf")])
    for f in (ours.dropout, theirs.dropout):
        assert f(x, 1.0)[0] == 0
        assert f(x, 1.0)[1:].isnan().all()


@pytest.mark.parametrize("scale_at", ["training", "inference"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("p", [0.4, 1.0])
def test_inplace(p, training, scale_at):
    torch.manual_seed(1)
    x = torch.randn(50)
    torch.manual_seed(2)
    expected = ours.dropout(x, p, training, scale_at=scale_at)
    torch.manual_seed(2)
    y = ours.dropout(x, p, training, True, scale_at=scale_at)
    assert y is x
    assert torch.equal(y, expected)


@draws_torchs_mask
def test_inplace_gradient():
    x = torch.randn(20, requires_grad=True)
    assert_parity(
        lambda x: ours.dropout(x * 1, inplace=True),
        lambda x: theirs.dropout(x * 1, inplace=True),
        x,
    )


@draws_torchs_mask
def test_inplace_on_a_view():
    def f(library):
        return lambda x: (y := x * 1, library.dropout(y[:, ::2], inplace=True))[0]

    assert_parity(f(ours), f(theirs), torch.randn(4, 6, requires_grad=True))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_draws_the_same_mask(use_reentrant):
    x = torch.randn(100, requires_grad=True)
    torch.manual_seed(5)
    y = checkpoint(lambda x: ours.dropout(x * 2, 0.5), x, use_reentrant=use_reentrant)
    y.sum().backward()
    assert torch.equal(x.grad != 0, y != 0)


def test_seeds_and_fork_rng():
    x = torch.ones(1000)
    torch.manual_seed(1)
    first = ours.dropout(x)
    second = ours.dropout(x)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    with torch.random.fork_rng([x.get_device()] if x.is_cuda else []):
        assert torch.equal(ours.dropout(x), first)
    assert torch.equal(ours.dropout(x), first)


def test_every_copy_draws_anew():
    m = nn.Dropout(0.5)
    x = torch.ones(1000)
    assert not torch.equal(m(x), copy.deepcopy(m)(x))


def test_errors():
    x = torch.randn(3)
    for p in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"dropout: expected `p` in \[0, 1\], got"):
            ours.dropout(x, p)
    for f in (ours.dropout, lambda x, **k: nn.Dropout(**k)):
        with pytest.raises(ValueError, match="`scale_at`.*'both'"):
            f(x, scale_at="both")
    with pytest.raises(RuntimeError, match="int64"):
        ours.dropout(torch.ones(3).long())
    torchs = torch.nn.Dropout(0.3)
    torchs.__class__ = nn.Dropout  # a module made by torch has torch's rule
    assert torchs.scale_at == "training"

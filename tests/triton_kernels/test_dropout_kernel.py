"""The kernel's mask: that of its seed by Philox, in every layout, forward as backward."""

import contextlib
import functools

import pytest
import torch
import triton
import triton.language as tl
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import torchref.nn.functional as ours
from torchref.nn.dropout import seeded_dropout_fwd
from torchref.triton_kernels import dropout
from torchref.triton_kernels._launch import launch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def philox(counter: int, seed: int) -> list[int]:
    """Philox 4x32, ten rounds (Salmon et al., 2011), of one counter: four numbers of 32 bits."""
    low = 0xFFFFFFFF
    c, k = [counter & low, counter >> 32, 0, 0], [seed & low, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & low, a >> 32 ^ c[3] ^ k[1], a & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return c


def expected_mask(n: int, seed: int, p: float, first: int = 0) -> torch.Tensor:
    """Which of n elements, from ``first`` on, are kept."""
    numbers = [r for counter in range(n // 4 + 1) for r in philox(first // 4 + counter, seed)]
    signed = [r - 2**32 if r >= 2**31 else r for r in numbers[:n]]
    return torch.tensor(signed) >= round(p * 2**32) - 2**31


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 4, 1023, 2051])
def test_the_mask_is_that_of_the_seed(n, dtype):
    x = torch.ones(n, dtype=dtype)
    seed = torch.randint(2**63 - 1, ())
    y = dropout.seeded_dropout_fwd(x, seed, 0.3, 0.7, False)
    assert torch.equal(y != 0, expected_mask(n, seed.item(), 0.3))
    assert set(y.unique().tolist()) <= {0.0, torch.tensor(1 / 0.7).to(dtype).item()}
    assert torch.equal(dropout.seeded_dropout_bwd(x, seed, 0.3, 0.7, (1,)), y)


def test_known_numbers_of_philox():
    """Of Random123's known-answer tests (kat_vectors, philox4x32 10)."""
    assert philox(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@triton.jit
def _kept_kernel(y_ptr, seed_ptr, program, threshold, BLOCK: tl.constexpr):
    program = tl.cast(program, tl.int64)
    kept = dropout._kept(tl.load(seed_ptr), program, threshold, BLOCK)
    tl.store(y_ptr + tl.arange(0, BLOCK), kept.to(tl.int32))


@pytest.mark.parametrize("program", [7, 2**24 + 1, 2**36 + 5])
def test_counters_beyond_32_bits(program):
    """Element 2**34 takes counter 2**32, whose upper half is not lost."""
    y, seed = torch.empty(256, dtype=torch.int32), torch.tensor(2**62 + 12345)
    launch(_kept_kernel, 1, y, seed, program, 0, BLOCK=256)
    assert torch.equal(y.bool(), expected_mask(256, seed.item(), 0.5, first=program * 256))


def test_every_bit_of_the_seed_counts():
    masks = []
    for bit in (0, 1, 17, 33, 50, 62):
        dx = dropout.seeded_dropout_bwd(torch.ones(256), torch.tensor(1 << bit), 0.5, 1.0, (1,))
        masks.append(tuple(dx.tolist()))
    assert len(set(masks)) == len(masks)


LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3),
    "strided": lambda x: x[..., ::2],
    "expanded": lambda x: x[:, :1].expand(2, 3, 5, 8),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("upstream", ["contiguous", *LAYOUTS])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_follow_the_mask_in_every_layout(layout, upstream, inplace):
    x = LAYOUTS[layout](torch.rand(2, 3, 5, 8) + 1).requires_grad_()
    if inplace and layout == "expanded":
        pytest.skip("torch refuses to write into an expanded tensor")
    with torch.no_grad():
        blank = torch.empty_like(x)
    dy = torch.rand(2, 3, 5, 8) + 1
    dy = dy if upstream == "contiguous" else LAYOUTS[upstream](dy)
    if dy.shape != x.shape:
        dy = (torch.rand(x.shape) + 1).expand(x.shape)
    y = ours.dropout(x.clone() if inplace else x, 0.5, inplace=inplace)
    assert y.stride() == blank.stride()
    y.backward(dy)
    torch.testing.assert_close(x.grad, torch.where(y == 0, 0, 2 * dy))


@pytest.mark.parametrize("p", [1e-9, 0.25, 0.999999])
def test_extreme_shares(p):
    y = ours.dropout(torch.ones(4096), p, scale_at="inference")
    # 5 standard deviations of a binomial share
    share = (y == 0).float().mean().item()
    assert share == pytest.approx(p, abs=5 * (p * (1 - p) / 4096) ** 0.5 + 1e-6)


def test_dropped_nan_stays():
    y = ours.dropout(torch.full((64,), float("nan")), 0.5)
    assert y.isnan().all()


@pytest.mark.cpu
def test_the_seed_is_one_draw_of_torchs_generator():
    x = torch.ones(8)
    torch.manual_seed(4)
    ours.dropout(x)
    after = torch.get_rng_state()
    torch.manual_seed(4)
    torch.randint(2**63 - 1, ())
    assert torch.equal(after, torch.get_rng_state())


@pytest.mark.parametrize("layout", [*LAYOUTS, "contiguous"])
def test_the_formula_draws_the_kernels_mask(layout):
    x = torch.randn(2, 3, 5, 8)
    x = x if layout == "contiguous" else LAYOUTS[layout](x)
    seed = torch.tensor(2**40 + 3)
    formula = seeded_dropout_fwd.__wrapped__(x, seed, 0.3, 0.7, False)
    torch.testing.assert_close(dropout.seeded_dropout_fwd(x, seed, 0.3, 0.7, False), formula)


def test_second_derivatives_of_the_mask_of_a_seed():
    x = torch.rand(20).add(1).requires_grad_()
    y = ours.dropout(x, 0.5)
    (dx,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)
    torch.testing.assert_close(dx, torch.where(y == 0, 0, 4 * y))
    (ddx,) = torch.autograd.grad(dx.sum(), x)
    torch.testing.assert_close(ddx, torch.where(y == 0, 0, 8.0))


def test_batched_gradients_of_the_mask_of_a_seed():
    x = torch.rand(6, 4).add(1).t().requires_grad_()
    y = ours.dropout(x, 0.5)
    upstream = torch.rand(5, 4, 6)
    (dx,) = torch.autograd.grad(y, x, upstream, is_grads_batched=True)
    torch.testing.assert_close(dx, torch.where(y == 0, 0, 2 * upstream))


@pytest.mark.parametrize("forward_sees", [True, False])
def test_a_mode_around_one_of_the_passes(forward_sees):
    """A kernel may run in one pass alone: the mask is the same."""
    x = torch.rand(7, 5).add(1).t().requires_grad_()
    with FlopCounterMode(display=False) if forward_sees else contextlib.nullcontext():
        y = ours.dropout(x, 0.5)
    with contextlib.nullcontext() if forward_sees else FlopCounterMode(display=False):
        y.sum().backward()
    assert torch.equal(y != 0, x.grad != 0)


def test_selective_checkpointing_keeps_the_mask():
    x = torch.rand(40).add(1).requires_grad_()
    contexts = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    y = checkpoint(lambda x: ours.dropout(x * 2, 0.5), x, use_reentrant=False, context_fn=contexts)
    y.sum().backward()
    assert torch.equal(y != 0, x.grad != 0)

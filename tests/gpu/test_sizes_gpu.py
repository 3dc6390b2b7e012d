"""Offsets of tensors of more than 2**31 elements do not fit 32 bits. Samples, beside torch's."""

import gc
import itertools
import math

import pytest
import torch
import torch.nn.functional as theirs

import torchref
import torchref.nn.functional as ours

DEVICE = "cuda"
BEYOND = 2**31 + 5003  # full blocks and a rest
ONE_ROW = 2**31 - 1
MANY_ROWS = (2_103_473, 1021)
SCORES = [(16_411, 131_101), (214_748_371, 10)]
IMAGES = (32_771, 256, 16, 16)
CHUNK = 2**28

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def kernels(needs_a_gpu):
    gc.collect()
    torch.cuda.empty_cache()
    with torchref.backend("triton"):
        yield
    gc.collect()
    torch.cuda.empty_cache()  # for the processes beside this one


def needs(gib: int) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of GPU memory, {free:.1f} are free")


def normal(*shape: int, **options) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=DEVICE, **options).normal_()


def samples(shape: tuple[int, ...]) -> list[slice]:
    """The first, the last and some in between, along the first dimension."""
    row = math.prod(shape[1:])
    few = min(2**13, max(5, 2**20 // row), shape[0])
    return [slice(0, few), slice(None, None, shape[0] // few), slice(-few, None)]


def sampled(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x.detach()[part] for part in samples(x.shape)])


def gradient(y: torch.Tensor, x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(y, x, dy)[0]


@pytest.mark.parametrize("name", ["tanh", "gelu"])  # backward from the output, from the input
def test_activation(name):
    needs(14)
    x = normal(BEYOND).requires_grad_()
    y = getattr(ours, name)(x)
    dx = gradient(y, x, x.detach())
    few = sampled(x).requires_grad_()
    expected = getattr(theirs, name)(few)
    # y may round the other way, by 2**-8; at dy = 6 and dx = dy (1 - y^2) that is 0.05
    torch.testing.assert_close(sampled(y), expected.detach(), rtol=2**-7, atol=1e-5)
    torch.testing.assert_close(
        sampled(dx), gradient(expected, few, few.detach()), rtol=2**-7, atol=0.05
    )


def test_dropout():
    needs(16)
    x = torch.ones(BEYOND, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    y = ours.dropout(x, 0.4)
    dx = gradient(y, x, x.detach())
    kept = 0
    for part, dpart in zip(y.detach().split(CHUNK), dx.split(CHUNK), strict=True):
        assert torch.equal(part, dpart)
        kept += int((part != 0).sum())
    deviation = math.sqrt(0.4 * 0.6 / BEYOND)
    assert kept / BEYOND == pytest.approx(0.6, abs=5 * deviation)
    parts = y.detach()[:4096], y.detach()[BEYOND // 2 : BEYOND // 2 + 4096], y.detach()[-4096:]
    for part in parts:
        assert (part != 0).double().mean().item() == pytest.approx(0.6, abs=0.04)  # 5 deviations
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(parts, 2))


def test_mean_of_a_loss():
    needs(14)
    x = torch.full((BEYOND,), 2.0, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
    loss = ours.mse_loss(x, torch.full_like(x, 0.5, requires_grad=False))
    assert loss.item() == 1.5**2
    dx = gradient(loss, x, torch.ones_like(loss))
    expected = torch.full_like(sampled(dx), 2 * 1.5 / BEYOND)
    torch.testing.assert_close(sampled(dx), expected, rtol=2**-8, atol=0)


def test_softmax_of_one_row():
    needs(18)
    x = torch.zeros(1, ONE_ROW, dtype=torch.bfloat16, device=DEVICE)
    score = round(math.log(ONE_ROW) * 8) / 8  # in bfloat16; the last element has half of it all
    x[0, -1] = score
    y = ours.softmax(x.requires_grad_(), 1)
    dy = torch.zeros_like(x, requires_grad=False)
    dy[0, -1] = 1.0
    dx = gradient(y, x, dy)
    last = math.exp(score) / (ONE_ROW - 1 + math.exp(score))
    other = last / math.exp(score)
    for tensor, value_of_last, value_of_others in [
        (y.detach(), last, other),
        (dx, last * (1 - last), -last * other),
    ]:
        assert tensor[0, -1].item() == pytest.approx(value_of_last, rel=2**-7)
        others = [tensor[0, i].item() for i in (0, 1, ONE_ROW // 2, -2)]
        assert others == pytest.approx([value_of_others] * 4, rel=2**-7)


def test_softmax_of_many_rows():
    needs(14)
    x = normal(*MANY_ROWS).requires_grad_()
    y = ours.softmax(x, 1)
    dx = gradient(y, x, x.detach())
    few = sampled(x).requires_grad_()
    expected = theirs.softmax(few, 1)
    torch.testing.assert_close(sampled(y), expected.detach(), rtol=2**-7, atol=0)
    # y may round the other way, by 2**-9 of 0.1 at most, and dx is y times up to 6
    dfew = gradient(expected, few, few.detach())
    torch.testing.assert_close(sampled(dx), dfew, rtol=2**-6, atol=1e-3)


@pytest.mark.parametrize("shape", SCORES, ids=str)
def test_cross_entropy(shape):
    needs(16)
    x = normal(*shape).requires_grad_()
    target = torch.randint(0, shape[1], shape[:1], device=DEVICE)
    loss = ours.cross_entropy(x, target, reduction="none")
    dx = gradient(loss, x, torch.ones_like(loss))
    few = sampled(x).float().requires_grad_()
    indices = torch.cat([target[part] for part in samples(shape)])
    expected = theirs.cross_entropy(few, indices, reduction="none")
    dfew = gradient(expected, few, torch.ones_like(expected))
    losses = torch.cat([loss.detach()[part] for part in samples(shape)])
    torch.testing.assert_close(losses.float(), expected.detach(), rtol=2**-8, atol=1e-3)
    torch.testing.assert_close(sampled(dx).float(), dfew, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_batch_norm(layout):
    needs(20)
    x = normal(*IMAGES, memory_format=layout).add_(1).requires_grad_()
    dy = normal(*IMAGES, memory_format=layout)
    y = ours.batch_norm(x, None, None, training=True)
    dx = gradient(y, x, dy)
    for channel in (0, IMAGES[1] // 2, IMAGES[1] - 1):
        values, slopes = x.detach()[:, channel].double(), dy[:, channel].double()
        centred = values - values.mean()
        rstd = (centred.square().mean() + 1e-5).rsqrt()
        xhat = centred * rstd
        expected = rstd * (slopes - slopes.mean() - xhat * (xhat * slopes).mean())
        tolerance = {"rtol": 2**-7, "atol": 1e-4}  # roundings of bfloat16
        torch.testing.assert_close(y.detach()[:, channel].double(), xhat, **tolerance)
        torch.testing.assert_close(dx[:, channel].double(), expected, **tolerance)

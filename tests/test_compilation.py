import pytest
import torch
from pieces import PIECES

import torchref
import torchref.nn.functional as ours
from torchref import compilation


@pytest.fixture
def compilations(monkeypatch):
    """The clones of formulas that were given to torch.compile."""
    made = []
    real = torch.compile

    def spy(function, **kwargs):
        made.append(function.__name__)
        return real(function, **kwargs)

    monkeypatch.setattr(torch, "compile", spy)
    return made


@pytest.mark.parametrize("piece", PIECES, ids=lambda p: p.name)
def test_compiled_equals_torch(piece):
    if piece.random:
        return _test_compiled_mask(MASKED[piece.name])
    inputs = piece.inputs(torch.float32)
    xs = [x for x in inputs if x.requires_grad]
    expected = piece.theirs(*inputs)
    with torchref.backend("compiled"):
        y = piece.ours(*inputs)
        gradients = torch.autograd.grad(y.sum(), xs)
    # float32 roundings in another order: 8 eps of values near 1
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        gradients, torch.autograd.grad(expected.sum(), xs), rtol=1e-5, atol=1e-6
    )


MASKED = {
    "dropout": lambda x: ours.dropout(x, 0.3),
    "bias_act_dropout": lambda x: ours.bias_act_dropout(x - 1, torch.ones(100), 0.3),
}


def _test_compiled_mask(f):
    x = (torch.rand(100, 100) + 0.1).requires_grad_()
    with torchref.backend("compiled"):
        y = f(x)
        y.sum().backward()
    kept = y != 0
    assert kept.float().mean() == pytest.approx(0.7, abs=0.025)  # 5 standard deviations
    torch.testing.assert_close(y[kept], x[kept] / 0.7)
    assert torch.equal(kept, x.grad != 0)
    torch.manual_seed(3)
    with torchref.backend("compiled"):
        first = f(x)
        torch.manual_seed(3)
        assert torch.equal(first, f(x))


def test_compiled_serves_every_shape_and_scalar_with_one_compilation(compilations):
    shapes = [(3, 5), (5, 3), (8, 8), (2, 9), (64, 100), (17, 3), (300, 7), (2, 2), (9, 11), (6, 4)]
    with torchref.backend("compiled"):
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for number, shape in enumerate(shapes):
            x = torch.randn(shape)
            slope = 0.1 + number / 100
            torch.testing.assert_close(
                ours.leaky_relu(x, slope), torch.nn.functional.leaky_relu(x, slope)
            )
        after = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert len(compilations) <= 1
    assert after - before <= 3  # sizes are symbolic; Inductor guards on a range or two


def test_compiled_takes_many_kinds_of_input(compilations):
    """More kinds than Dynamo's limit of eight recompilations, and none of them runs eager."""
    kinds = [torch.randn(2, 3, 4, 5).to(dtype) for dtype in (torch.float32, torch.bfloat16)]
    kinds += [torch.randn((3,) * n) for n in range(6)]
    kinds += [torch.randn(3, 1), torch.randn(1, 3), torch.randn(1), torch.empty(0, 3)]
    kinds += [torch.randn(4, 6).t(), torch.randn(4, 6)[:, ::2], torch.randn(4, 1).expand(4, 3)]
    with torchref.backend("compiled"):
        for x in kinds:
            torch.testing.assert_close(ours.silu(x), torch.nn.functional.silu(x))
    assert len(compilations) > 8


def test_compiled_on_views_whose_memory_is_not_their_value():
    x = torch.randn(4, dtype=torch.complex64).conj().imag
    with torchref.backend("compiled"):
        assert torch.equal(ours.relu(x), torch.nn.functional.relu(x))


def test_compiled_in_place():
    for name in ("relu", "leaky_relu", "elu", "selu", "silu"):
        x = torch.randn(5, requires_grad=True)
        results = []
        for library in (ours, torch.nn.functional):
            with torchref.backend("compiled"):
                before = x * 1
                y = getattr(library, name)(before, inplace=True)
                assert y is before
            results.append((y, *torch.autograd.grad(y.sin().sum(), x)))
        torch.testing.assert_close(*results)
    with torchref.backend("compiled"):
        x = torch.randn(100, requires_grad=True)
        before = x * 1
        y = ours.dropout(before, 0.5, inplace=True)
        assert y is before
        y.sum().backward()
        assert torch.equal(x.grad != 0, y != 0)


def test_compiled_batch_norm_moves_the_statistics():
    pair = [library.BatchNorm1d(3, momentum=None) for library in (torchref.nn, torch.nn)]
    for _ in range(4):
        x = torch.randn(6, 3)
        with torchref.backend("compiled"):
            y = pair[0](x)
        torch.testing.assert_close(y, pair[1](x))
    for mine, torchs in zip(pair[0].buffers(), pair[1].buffers(), strict=True):
        torch.testing.assert_close(mine, torchs)


@pytest.mark.parametrize("piece", PIECES, ids=lambda p: p.name)
def test_a_second_call_goes_past_dynamo(piece, monkeypatch):
    def run():
        inputs = piece.inputs(torch.float32)
        with torchref.backend("compiled"):
            y = piece.ours(*inputs)
            torch.autograd.grad(y.sum(), [x for x in inputs if x.requires_grad])

    run()
    monkeypatch.setattr(compilation, "compiled_variant", lambda *_: pytest.fail("asked Dynamo"))
    run()


def test_a_second_call_sees_new_values_and_scalars():
    for slope in (0.1, 0.2, 0.1):
        x, dy = torch.randn(9, requires_grad=True), torch.randn(9)
        with torchref.backend("compiled"):
            y = ours.leaky_relu(x, slope)
            y.backward(dy)
        torch.testing.assert_close(y, torch.nn.functional.leaky_relu(x, slope))
        torch.testing.assert_close(x.grad, dy * torch.where(x > 0, 1.0, slope))


def test_a_call_with_one_tensor_twice_says_nothing_of_others():
    """Dynamo makes one input of two arguments that are one tensor."""
    x, other = torch.randn(9), torch.randn(9)
    for target in (x, other, x[:9], x):
        with torchref.backend("compiled"):
            loss = ours.mse_loss(x, target)
        torch.testing.assert_close(loss, torch.nn.functional.mse_loss(x, target))
    for one, two in ((1.0, 1.0), (1.0, 2.0)):  # nor of equal scalars
        with torchref.backend("compiled"):
            y = ours.softplus(x, one, two)
        torch.testing.assert_close(y, torch.nn.functional.softplus(x, one, two))


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(compilation, "REPLAYS", 4)
    compiled = compilation.Compiled(_double)
    for size in range(2, 12):
        assert torch.equal(compiled(torch.ones(size)), torch.full((size,), 2.0))
        assert len(compiled.replays) <= 4


def _double(x):
    return x * 2


def test_code_for_other_threads_is_not_taken():
    """Inductor writes the number of threads into its code."""
    compiled, threads = compilation.Compiled(_double), torch.get_num_threads()
    x = torch.ones(5)
    compiled(x)
    try:
        torch.set_num_threads(threads + 1)
        compiled(x)
    finally:
        torch.set_num_threads(threads)
    assert len(compiled.replays) == 2


def test_many_threads_take_large_tensors_after_a_small_one(monkeypatch, tmp_path):
    """Inductor writes code for one thread where the first tensor is small, and caches it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for size in (8, compilation.LARGE):
            compilation.Compiled(_tripled)(torch.ones(size))
    finally:
        torch.set_num_threads(threads)
    codes = [path.read_text() for path in tmp_path.rglob("*.cpp")]
    codes = [code for code in codes if "static_cast<float>(3.0)" in code]  # no probes of the CPU
    assert sorted("#pragma omp parallel" in code for code in codes) == [False, True]


def _tripled(x):
    return x * 3


def test_frozen_parameters_of_many_sizes():
    """Dynamo would fix the sizes of a Parameter, and give up after eight."""
    with torchref.backend("compiled"):
        for n in range(3, 14):
            norm = torchref.nn.BatchNorm1d(n).requires_grad_(False)
            assert norm(torch.randn(6, n)).shape == (6, n)


@pytest.mark.parametrize("name", ["tanh", "elu", "selu"])
def test_compiled_digits_near_0(name):
    """Inductor's code for a CPU has e^x - 1 as a difference."""
    x = torch.tensor([0.0, 1e-30, 1e-8, 1e-6, 1e-4, 1e-2, 0.3, 0.6, 3.0, 90.0, float("inf")])
    x = torch.cat([x, -x])
    theirs = getattr(torch if name == "tanh" else torch.nn.functional, name)
    with torchref.backend("compiled"):
        y = getattr(ours, name)(x)
    expected = theirs(x.double()).float()
    torch.testing.assert_close(y, expected, rtol=4 * 2**-24, atol=0)  # four roundings

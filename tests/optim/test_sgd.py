import copy

import pytest
import torch
from optim_parity import assert_parity, gradients, make_params, tensors, traced, train

import torchref
from torchref.optim import SGD


def steps(optimizer, w, grads, lrs=None):
    """Where w is after each gradient."""
    path = []
    for i, grad in enumerate(grads):
        if lrs is not None:
            optimizer.param_groups[0]["lr"] = lrs[i]
        w.grad = torch.full_like(w, grad)
        optimizer.step()
        path.append(w.item())
    return path


def scalar(value=1.0):
    return torch.nn.Parameter(torch.tensor(value, dtype=torch.float64))


GRADS = [1.0, -2.0, 0.5, 3.0]
LRS = [0.1, 0.2, 0.05, 0.05]


@pytest.mark.parametrize("foreach", [False, True])
def test_the_courses_momentum(foreach):
    w = scalar()
    optimizer = SGD([w], lr=0.1, momentum=0.9, lr_in_velocity=True, foreach=foreach)
    theta, v, expected = 1.0, 0.0, []
    for grad, lr in zip(GRADS, LRS, strict=True):
        v = 0.9 * v + lr * grad
        theta -= v
        expected.append(theta)
    assert steps(optimizer, w, GRADS, LRS) == pytest.approx(expected, rel=1e-14)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # the compiler's imports
def test_the_courses_momentum_compiled():
    w, u = scalar(), scalar()
    options = {"lr": 0.1, "momentum": 0.9, "lr_in_velocity": True}
    with torchref.backend("compiled"):
        actual = steps(SGD([w], **options), w, GRADS, LRS)
    assert actual == pytest.approx(steps(SGD([u], **options), u, GRADS, LRS), rel=1e-14)


@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"dampening": 0.5}])
def test_both_momenta_agree_at_a_constant_rate(options):
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, **options}
    actual = tensors(*train(SGD, {**options, "lr_in_velocity": True}, steps=50))
    expected = tensors(*train(torch.optim.SGD, options, steps=50))
    for i in range(6):
        torch.testing.assert_close(actual[f"param {i}"], expected[f"param {i}"], rtol=1e-12, atol=0)


def test_the_momenta_differ_by_the_step_in_flight():
    """After g at rate a, then no gradient at rate b: torch coasts by b, the course by a."""
    w, u = scalar(0.0), scalar(0.0)
    course = SGD([w], lr=1.0, momentum=0.5, lr_in_velocity=True)
    torchs = SGD([u], lr=1.0, momentum=0.5)
    assert steps(course, w, [2.0, 0.0], [0.1, 0.01]) == pytest.approx([-0.2, -0.3])
    assert steps(torchs, u, [2.0, 0.0], [0.1, 0.01]) == pytest.approx([-0.2, -0.21])


def test_lr_in_velocity_in_groups_and_state_dicts():
    w, u = scalar(), scalar()
    optimizer = SGD(
        [{"params": [w]}, {"params": [u], "lr_in_velocity": False}],
        lr=0.1,
        momentum=0.9,
        lr_in_velocity=True,
    )
    optimizer.add_param_group({"params": [scalar()]})
    assert [g["lr_in_velocity"] for g in optimizer.param_groups] == [True, False, True]
    for p in (w, u):
        p.grad = torch.ones_like(p)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    assert optimizer.state[w]["momentum_buffer"] == 0.1
    assert optimizer.state[u]["momentum_buffer"] == 1.0

    groups = [{"params": [w]}, {"params": [u]}, {"params": [scalar()]}]
    again = SGD(groups, lr=1.0)
    again.load_state_dict(saved)
    assert again.state_dict() == saved
    torchs = torch.optim.SGD(groups, lr=1.0)
    torchs.load_state_dict(saved)  # torch accepts the key
    torchs.step()


def test_a_torch_state_dict_brings_torchs_momentum():
    options = {"lr": 0.1, "momentum": 0.9}
    params = make_params()
    first = torch.optim.SGD(params, **options)
    for i, _ in enumerate(gradients(params, 20)):
        if i == 10:
            second = SGD(params, **options, lr_in_velocity=True)
            second.load_state_dict(first.state_dict())
            first = second
        first.step()
    expected = tensors(*train(torch.optim.SGD, options, steps=20))
    for key, value in tensors(params, first).items():
        assert torch.equal(value, expected[key])


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"maximize": True}],
)
@pytest.mark.parametrize("foreach", [None, True])
@pytest.mark.parametrize("backend", ["auto", "compiled"])
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # torch 2.11's own sums
def test_sparse_gradients(options, foreach, backend, monkeypatch):
    traced(monkeypatch)
    results = []
    for cls in (SGD, torch.optim.SGD):
        w = torch.nn.Parameter(torch.ones(4, 2, dtype=torch.float64))
        dense = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = cls([w, dense], lr=0.1, foreach=foreach, **options)
        for i in range(4):
            index = torch.tensor([[i % 3, 3]])
            values = torch.tensor([[1.0, 2.0], [3.0, i]], dtype=torch.float64)
            w.grad = torch.sparse_coo_tensor(index, values, (4, 2), check_invariants=True)
            dense.grad = torch.full_like(dense, i)
            with torchref.backend(backend):  # compiled: the dense parameter only
                optimizer.step()
        results.append([w.detach(), dense.detach()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=0)


def test_sparse_errors_are_torchs():
    messages = []
    for cls in (SGD, torch.optim.SGD):
        for options in ({"fused": True}, {"weight_decay": 0.1}):
            w = torch.nn.Parameter(torch.ones(2))
            w.grad = torch.ones(2).to_sparse()
            with pytest.raises(RuntimeError) as error:
                cls([w], **options).step()
            messages.append(str(error.value))
    assert messages[:2] == messages[2:]


def test_an_overflow_in_the_first_step_leaves_no_trace():
    w, u = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = SGD([w], lr=0.1, momentum=0.9, fused=True)
    other = SGD([u], lr=0.1, momentum=0.9)
    optimizer.grad_scale = torch.tensor(4.0)
    optimizer.found_inf = torch.tensor(1.0)
    w.grad = torch.tensor([float("inf"), float("nan"), 1.0])
    optimizer.step()
    assert torch.equal(w, torch.ones(3))
    optimizer.found_inf = torch.tensor(0.0)
    for grad in ([4.0, 8.0, 12.0], [-4.0, 0.0, 4.0]):
        w.grad, u.grad = torch.tensor(grad), torch.tensor(grad) / 4
        optimizer.step()
        other.step()
        assert torch.equal(w.grad, u.grad)  # unscaled in place, as torch's fused update does
    assert torch.equal(w, u)


def test_tensor_weight_decay():
    assert_parity("SGD", {"weight_decay": torch.tensor(0.1), "momentum": 0.9})

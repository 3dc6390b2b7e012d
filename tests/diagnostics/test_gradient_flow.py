import math
import re
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import torchref
from torchref.diagnostics.gradient_flow import (
    FLAT,
    GradientFlow,
    LayerFlow,
    gradient_flow,
    norm,
    plot_gradient_flow,
)
from torchref.nn.init import initialize
from torchref.training.gradient_flow import GradientFlowCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),  # Lightning on torch's newer pytree
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Layers are small: threads would wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SEEDS = range(5)
X = torch.randn(128, 20, generator=torch.Generator().manual_seed(1))
Y = torch.randint(4, (128,), generator=torch.Generator().manual_seed(2))


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.relu = nn.BatchNorm1d(width), nn.ReLU()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return x + self.linear(self.relu(self.norm(x)))


def plain(activation, depth=20, scale=1.0):
    layers = [nn.Linear(20, 64), activation()]
    for _ in range(depth - 2):
        layers += [nn.Linear(64, 64), activation()]
    net = nn.Sequential(*layers, nn.Linear(64, 4))
    initialize(net)
    with torch.no_grad():
        for layer in net[::2]:
            layer.weight *= scale
    return net


def residual(depth=20):
    blocks = [Residual(64) for _ in range(depth - 2)]
    head = [nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 4)]
    net = nn.Sequential(nn.Linear(20, 64), *blocks, *head)
    initialize(net, "kaiming_normal")
    return net


def dead():
    net = plain(nn.ReLU)
    for layer in net[::2]:
        nn.init.constant_(layer.bias, -10.0)
    return net


def measured(net, **arguments):
    return gradient_flow(net, lambda: F.cross_entropy(net(X), Y), **arguments)


# Verdicts.


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: plain(nn.Sigmoid), "vanishing"),
        (lambda: plain(torchref.nn.Sigmoid), "vanishing"),
        (residual, "healthy"),
        (lambda: plain(nn.ReLU, scale=2.0), "exploding"),
        (lambda: plain(nn.Tanh, scale=5.0), "exploding"),
        (dead, "dead"),
        (lambda: plain(nn.ReLU, depth=2), "healthy"),
        (lambda: plain(nn.ReLU, depth=3), "healthy"),
        (lambda: plain(nn.Tanh), "healthy"),
        (lambda: plain(nn.Tanh, depth=3, scale=9.0), "saturated"),
        (lambda: plain(nn.Sigmoid, depth=4), "unclear"),
        (lambda: plain(nn.ReLU, depth=50), "unclear"),
    ],
    ids=[
        "sigmoid",
        "our sigmoid",
        "residual",
        "relu too large",
        "tanh too large",
        "dead",
        "two layers",
        "three layers",
        "xavier tanh",
        "saturated",
        "between",
        "half dead",
    ],
)
def test_the_verdict_on_networks_whose_fault_is_known(build, expected, seed):
    torch.manual_seed(seed)
    verdict = measured(build()).verdict
    assert verdict.name == expected, verdict


def test_a_verdict_has_its_numbers_and_the_course_s_remedies_in_order():
    torch.manual_seed(0)
    verdict = measured(plain(nn.Sigmoid)).verdict
    assert "times the gradient of late ones" in verdict.reason
    assert "in 20 layers; certain up to 0.001" in verdict.reason
    words = [("ReLU", "ELU"), ("Xavier", "He"), ("batch normalization",), ("residual",)]
    for remedy, expected in zip(verdict.remedies, words, strict=True):
        assert all(word in remedy for word in expected)
    assert str(verdict).startswith("vanishing: early layers receive ")
    assert "\n  4. residual connections" in str(verdict)
    assert "Leaky ReLU" in measured(dead()).verdict.remedies[0]
    assert measured(residual()).verdict.remedies == ()


def layers_of(*norms, weight=1.0, saturated=None, dead=None):
    return GradientFlow(
        tuple(LayerFlow(str(i), g, weight, 0.0, saturated, dead) for i, g in enumerate(norms))
    )


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=30), st.floats(0, 1), st.floats(0, 1))
def test_a_verdict_does_not_depend_on_the_unit_of_the_loss_unless_it_explodes(norms, dead, flat):
    flow = layers_of(*norms, weight=1e7, saturated=flat, dead=dead)
    smaller = layers_of(*(g / 1024 for g in norms), weight=1e7, saturated=flat, dead=dead)
    assert flow.verdict.name == smaller.verdict.name


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 40), st.floats(1e-3, 1e3))
def test_a_geometric_decay_vanishes_or_explodes_by_its_total(depth, ratio):
    factor = ratio ** (1 / max(depth - 1, 1))
    name = layers_of(*(factor**i for i in range(depth)), weight=1e9).verdict.name
    between = ratio ** ((depth - max(depth // 3, 1)) / (depth - 1))  # of the thirds' middles
    if 0.06 < between < 18:
        assert name == "healthy"
    elif between < 1e-3 or between > 1e3:
        assert name in ("exploding", "vanishing")


@pytest.mark.parametrize(
    ("flow", "name", "words"),
    [
        (layers_of(), "unclear", "0 layers with a gradient"),
        (layers_of(1.0), "unclear", "1 layer with a gradient"),
        (layers_of(1.0, math.nan), "exploding", "the gradient of 1 is nan"),
        (layers_of(math.inf, 1.0), "exploding", "the gradient of 0 is inf"),
        (layers_of(0.0, 0.0, 0.0), "unclear", "late layers receive a gradient of 0"),
        (layers_of(0.0, 1.0, weight=0.0), "unclear", "all 0; see check_symmetry"),
        (layers_of(1.0, 1e-3), "exploding", "1e[+]03 times"),
        (layers_of(1e-3, 1.0), "vanishing", "0.001 times"),
        (layers_of(0.02, 1.0), "unclear", "possibly vanishing"),
        (layers_of(0.06, 1.0), "healthy", "0.06 times"),
        (layers_of(50.0, 50.0), "unclear", "possibly exploding"),
        (layers_of(1.0, 1.0, dead=0.5, saturated=0.5), "unclear", "possibly dead.*possibly satur"),
        (layers_of(1.0, 1.0, dead=0.8, saturated=0.9), "dead", "80%"),
        (layers_of(1.0, 1.0, saturated=0.9), "saturated", "90%"),
    ],
)
def test_borders(flow, name, words):
    assert flow.verdict.name == name
    assert re.search(words, flow.verdict.reason)


def test_a_saturated_output_is_no_fault():
    flow = GradientFlow(
        (LayerFlow("0", 1.0, 1.0, 0.0, 0.1, None), LayerFlow("1", 1.0, 1.0, 0.0, 0.9, None))
    )
    assert flow.verdict.name == "healthy"


# Numbers.


def test_norms_and_ratio_are_those_of_autograd():
    net = plain(nn.Tanh, depth=3)
    flow = measured(net, lr=0.5)
    F.cross_entropy(net(X), Y).backward()
    assert [layer.layer for layer in flow.layers] == ["0", "2", "4"]
    for found in flow.layers:
        w = net[int(found.layer)].weight
        assert found.grad_norm == pytest.approx(w.grad.norm().item(), rel=1e-5)
        assert found.weight_norm == pytest.approx(w.norm().item(), rel=1e-5)
        step = (0.5 * w.grad).norm() / w.norm()
        assert found.update_ratio == pytest.approx(step.item(), rel=1e-5)


def test_the_model_stays_as_it_was():
    net = residual(4)
    F.cross_entropy(net(X), Y).backward()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    grads = [p.grad.clone() for p in net.parameters()]
    measured(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), grads, strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    with pytest.raises(RuntimeError, match="shapes"):
        gradient_flow(net, lambda: net(X[:, :3]).sum())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_layers_are_in_the_order_of_the_forward_pass():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(64, 4), nn.Linear(20, 64)
            self.unused = nn.Linear(2, 2)

        def forward(self, x):
            return self.last(self.first(x).relu())

    assert [layer.layer for layer in measured(Backwards()).layers] == ["first", "last"]


def test_weights_of_every_kind_are_layers():
    class Texts(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(50, 8, sparse=True)
            self.lstm = nn.LSTM(8, 8, batch_first=True)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.out = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
            self.tied = nn.Linear(8, 50, bias=False)
            self.tied.weight = self.out.parametrizations.weight.original1

        def forward(self, x):
            x = self.lstm(self.words(x))[0]
            return self.out(self.attention(x, x, x)[0])

    net = Texts()
    flow = gradient_flow(net, lambda: net(torch.arange(20).reshape(4, 5)).square().mean())
    names = [layer.layer for layer in flow.layers]
    assert names == ["words", "lstm", "attention", "attention.out_proj", "out"]
    assert all(layer.grad_norm > 0 for layer in flow.layers)


def test_a_norm_neither_underflows_nor_overflows():
    for scale in (1e-30, 1e30):
        x = torch.full((4,), scale)
        assert norm([x, x]).item() == pytest.approx(8**0.5 * scale, rel=1e-5)
    assert norm([torch.zeros(3)]).item() == 0.0
    assert norm([torch.ones(4, dtype=torch.float16) * 6e4]).item() == pytest.approx(1.2e5, rel=1e-3)
    assert not norm([torch.tensor([1.0, math.inf])]).isfinite()


@pytest.mark.parametrize("library", [nn, torchref.nn])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [("Sigmoid", ()), ("Tanh", ()), ("ELU", ()), ("ELU", (2.5,)), ("SELU", ())],
)
def test_the_share_of_flat_outputs_is_that_of_autograd(library, name, arguments):
    class Sub(getattr(library, name)):
        """A subclass is seen, too."""

    activation = Sub(*arguments)
    x = torch.linspace(-9, 9, 1001, requires_grad=True)
    slope = torch.autograd.grad(activation(x).sum(), x)[0]
    expected = (slope < FLAT * slope.max()).float().mean().item()
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    net = nn.Sequential(layer, activation)
    flow = gradient_flow(net, lambda: net(x.detach()[:, None]).sum())
    assert flow.layers[0].saturated == pytest.approx(expected, abs=0.003)
    assert flow.layers[0].dead is None


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "elu", "selu"])
def test_fused_activations_are_seen_without_what_dropout_did(activation):
    fused = torchref.nn.LinearActDropout(20, 400, activation=activation, p=0.5)
    with torch.no_grad():
        fused.weight *= 20
    alone = getattr(nn, {"selu": "SELU", "elu": "ELU"}.get(activation, activation.title()))()
    linear = nn.Linear(20, 400)
    linear.load_state_dict(fused.state_dict())
    shares = [
        gradient_flow(net, lambda net=net: net(X).square().mean()).layers[0].saturated
        for net in (nn.Sequential(fused), nn.Sequential(linear, alone))
    ]
    assert 0.05 < shares[1] < 0.95
    assert shares[0] == pytest.approx(shares[1], abs=0.02)


def test_batch_norm_with_its_activation_is_seen():
    norm = torchref.nn.BatchNormAct1d(8)
    nn.init.constant_(norm.bias[:6].detach(), -20.0)
    net = nn.Sequential(torchref.nn.Linear(20, 8), norm)
    assert gradient_flow(net, lambda: net(X).sum()).layers[0].dead == 0.75


@pytest.mark.parametrize("cls", [nn.ReLU, torchref.nn.ReLU, nn.ReLU6])
@pytest.mark.parametrize("inplace", [True, False])
def test_dead_units_are_0_for_every_sample(cls, inplace):
    net = nn.Sequential(nn.Linear(20, 8), cls(inplace), nn.Linear(8, 4))
    with torch.no_grad():
        net[0].bias[:2] = -1000.0
    assert measured(net).layers[0].dead == 0.25
    assert measured(net).layers[1].dead is None


def test_leaky_units_do_not_die():
    net = dead()
    for i in range(1, len(net), 2):
        net[i] = nn.LeakyReLU()
    flow = measured(net)
    assert all(layer.dead is None for layer in flow.layers)
    assert flow.verdict.name != "dead"


def test_a_convolution_s_units_are_its_channels():
    conv = nn.Conv2d(1, 4, 3)
    with torch.no_grad():
        conv.bias[1] = -1000.0
    pooled = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    images = torch.randn(8, 1, 6, 6)
    for x in (images, images[0]):
        net = nn.Sequential(conv, nn.ReLU())
        assert gradient_flow(net, lambda net=net, x=x: net(x).sum()).layers[0].dead == 0.25
    pooled(images)
    assert gradient_flow(pooled, lambda: pooled(images).sum()).layers[0].dead == 0.25
    late = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.ReLU())
    assert gradient_flow(late, lambda: late(images).sum()).layers[0].dead >= 0.25


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda net: net(X), r"scalar tensor, got shape \(128, 4\)"),
        (lambda net: 1.0, "scalar tensor, got <class 'float'>"),
        (lambda net: net(X).sum().detach(), "detached"),
        (lambda net: torch.zeros((), requires_grad=True), "depends on the weights"),
    ],
)
def test_a_loss_that_is_none_raises(loss, words):
    net = plain(nn.ReLU, 2)
    with pytest.raises(ValueError, match=f"gradient_flow: expected .*{words}"):
        gradient_flow(net, lambda: loss(net))


def test_other_wrong_arguments_raise():
    net = plain(nn.ReLU, 2)
    for lr in (0.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="expected `lr` finite and > 0"):
            measured(net, lr=lr)
    with pytest.raises(ValueError, match="expected a `model` with weights that require a gradient"):
        measured(net.requires_grad_(False))
    with pytest.raises(ValueError, match="every: expected >= 1, got 0"):
        GradientFlowCallback(every=0)


def test_a_frozen_layer_is_left_out():
    net = plain(nn.ReLU, 3)
    net[0].requires_grad_(False)
    assert [layer.layer for layer in measured(net).layers] == ["2", "4"]


def test_the_table():
    lines = str(measured(plain(nn.ReLU, 2))).splitlines()
    assert lines[0].split() == ["layer", "gradient", "weights", "update", "saturated", "dead"]
    assert len(lines) == 3
    assert lines[2].split()[-2:] == ["-", "-"]


# The picture.


@pytest.mark.parametrize("build", [lambda: plain(nn.Sigmoid), residual, dead])
def test_a_picture_of_one_batch(build, tmp_path):
    plot_gradient_flow(measured(build()), tmp_path / "flow.png")
    assert (tmp_path / "flow.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_a_training(tmp_path):
    callback = fit(every=2)[0]
    plot_gradient_flow(callback.rows, tmp_path / "flow.svg")
    assert "<svg" in (tmp_path / "flow.svg").read_text()
    without_first = [r for r in callback.rows if r["step"] or r["layer"] != "net.0"]
    plot_gradient_flow(without_first, tmp_path / "flow.png")
    plot_gradient_flow(layers_of(math.inf, math.nan), tmp_path / "none.png")


@pytest.mark.parametrize("nothing", [[], GradientFlow(())])
def test_nothing_to_draw_raises(nothing, tmp_path):
    with pytest.raises(ValueError, match="at least one reading"):
        plot_gradient_flow(nothing, tmp_path / "flow.png")


# The callback.


class Model(LightningModule):
    def __init__(self, net=None, optimizer=torch.optim.SGD, fail_at=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = net or nn.Sequential(
            nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 4)
        )
        self.optimizer, self.fail_at = optimizer, fail_at

    def training_step(self, batch, batch_idx):
        if self.fail_at == self.global_step:
            raise KeyError("planted")
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=0.1)


class Spy(Callback):
    """How many hooks there are in each forward pass, and what weights and gradients are."""

    def __init__(self):
        self.hooks, self.weights, self.grads = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        modules = list(pl_module.net.modules())
        self.hooks.append(sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.weights.append(pl_module.net[0].weight.detach().clone())
        grad = pl_module.net[0].weight.grad
        self.grads.append(None if grad is None else grad.clone())


def fit(
    every=3, epochs=2, model=None, callback=None, resume=None, path=None, loader=None, **options
):
    """Eight batches of 16 an epoch."""
    model = model or Model()
    callback = callback or GradientFlowCallback(every)
    spy = Spy()
    callbacks = callback if isinstance(callback, list) else [callback]
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[*callbacks, spy],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **{"logger": False, **options},
    )
    torch.manual_seed(5)
    loader = loader or DataLoader(TensorDataset(X, Y), 16)
    trainer.fit(model, loader, ckpt_path=resume, weights_only=True)
    if path:
        trainer.save_checkpoint(path)
    return callback, spy, model


def steps(callback):
    return list(dict.fromkeys(row["step"] for row in callback.rows))


def test_every_third_step_is_read_and_no_hook_is_there_in_between():
    callback, spy, model = fit(every=3)
    assert steps(callback) == [0, 3, 6, 9, 12, 15]
    assert [row["epoch"] for row in callback.rows if row["layer"] == "net.0"] == [0, 0, 0, 1, 1, 1]
    assert [count > 0 for count in spy.hooks] == [i % 3 == 0 for i in range(16)]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert callback.verdict.name == "healthy"
    assert [layer.layer for layer in callback.flow.layers] == ["net.0", "net.4"]


def test_numbers_are_those_of_the_step():
    callback, spy, model = fit(every=1)
    weights = [*spy.weights, model.net[0].weight.detach()]
    found = [row for row in callback.rows if row["layer"] == "net.0"]
    assert len(found) == 16
    for i, row in enumerate(found):
        assert row["grad_norm"] == pytest.approx(spy.grads[i].norm().item(), rel=1e-5)
        assert row["weight_norm"] == pytest.approx(weights[i].norm().item(), rel=1e-5)
        change = (weights[i + 1] - weights[i]).norm() / weights[i].norm()
        assert row["update_ratio"] == pytest.approx(change.item(), rel=1e-4)
        assert row["saturated"] is None
        assert 0 <= row["dead"] < 0.5
        assert not row["skipped"]


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torchref.optim.Adam])
def test_training_is_the_same_bit_for_bit(optimizer):
    _, _, seen = fit(every=1, model=Model(optimizer=optimizer))
    _, _, unseen = fit(every=1000, model=Model(optimizer=optimizer), callback=Callback())
    for name, value in seen.state_dict().items():
        assert torch.equal(value, unseen.state_dict()[name]), name


def test_gradient_accumulation_is_one_reading():
    callback, spy, _ = fit(every=2, accumulate_grad_batches=4)
    assert steps(callback) == [0, 2]
    assert [count > 0 for count in spy.hooks] == [True] * 4 + [False] * 4 + [True] * 4 + [False] * 4
    grads = [row["grad_norm"] for row in callback.rows if row["layer"] == "net.0"]
    assert grads == pytest.approx([spy.grads[i].norm().item() for i in (0, 2)], rel=1e-5)


def test_a_unit_that_was_alive_once_in_the_epoch_is_not_dead():
    """Each unit of an identity is alive for one sample alone; batches are of one sample."""
    linear = nn.Linear(20, 20, bias=False)
    net = nn.Sequential(linear, nn.ReLU(), nn.Linear(20, 4))
    nn.init.eye_(linear.weight)
    model = Model(net)
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=1e-9)
    loader = DataLoader(TensorDataset(torch.eye(20)[:15], Y[:15]), 1)
    callback, _, _ = fit(every=1, model=model, loader=loader)
    dead = [row["dead"] for row in callback.rows if row["layer"] == "net.0"]
    assert dead == pytest.approx([1 - (i % 15 + 1) / 20 for i in range(30)])
    assert callback.flow.layers[0].dead == pytest.approx(0.25)


def test_saturation_is_that_of_the_reading_alone():
    linear = nn.Linear(2, 2)
    nn.init.eye_(linear.weight)
    nn.init.zeros_(linear.bias)
    model = Model(nn.Sequential(linear, nn.Sigmoid(), nn.Linear(2, 4)))
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=1e-9)
    x = torch.tensor([[9.0, 9.0], [0.0, 0.0], [0.0, 9.0]])
    loader = DataLoader(TensorDataset(x, Y[:3]), 1)
    callback, _, _ = fit(every=1, epochs=1, model=model, loader=loader)
    shares = [row["saturated"] for row in callback.rows if row["layer"] == "net.0"]
    assert shares == [1.0, 0.0, 0.5]
    assert callback.flow.layers[0].saturated == 0.5  # the median


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.equal.default,
        )
        return func(*args, **(kwargs or {}))


def test_no_step_waits_for_the_device():
    """Of SGD's own steps none does either."""
    counts, reads = [], []

    class Before(Callback):
        def on_train_batch_start(self, *_):
            reads.append(Reads())
            reads[-1].__enter__()

    class After(Callback):
        def on_train_batch_end(self, *_):
            reads[-1].__exit__(None, None, None)
            counts.append(reads[-1].count)

    net = nn.Sequential(nn.Linear(20, 8), nn.Sigmoid(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    callback = GradientFlowCallback(every=2)
    fit(epochs=1, model=Model(net), callback=[Before(), callback, After()])
    assert counts == [0] * 8
    assert steps(callback) == [0, 2, 4, 6]


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_rows_are_in_the_checkpoint_and_logged_once(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    fit(every=3, epochs=1, path=tmp_path / "a.ckpt", logger=logger)
    callback, _, _ = fit(
        every=3, resume=tmp_path / "a.ckpt", logger=CSVLogger(tmp_path, name="", version="")
    )
    assert steps(callback) == [0, 3, 6, 9, 12, 15]
    whole, _, _ = fit(every=3)
    assert [row["layer"] for row in callback.rows] == [row["layer"] for row in whole.rows]
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert set(lines[0].split(",")) == {"grad_norm/net.0", "grad_norm/net.4", "step"}
    place = lines[0].split(",").index("step")
    assert [int(line.split(",")[place]) for line in lines[1:]] == [0, 3, 6, 9, 12, 15]


def test_a_checkpoint_within_an_epoch_has_what_was_read(tmp_path):
    callback, _, _ = fit(every=2, epochs=-1, max_steps=5, path=tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]
    assert state["GradientFlowCallback"]["rows"] == callback.rows
    assert steps(callback) == [0, 2, 4]


def test_an_error_leaves_no_hooks():
    callback, model = GradientFlowCallback(1), Model(fail_at=5)
    with pytest.raises(KeyError, match="planted"):
        fit(model=model, callback=callback)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_s_factor_is_divided_away(fused):
    """By Lightning or, in a fused step, by the optimizer, after the gradient was read."""
    optimizer = partial(torch.optim.SGD, fused=fused)
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    scaled, _, _ = fit(every=4, model=Model(optimizer=optimizer), plugins=[plugin])
    plain, _, _ = fit(every=4)
    for found, expected in zip(scaled.rows, plain.rows, strict=True):
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.05)
        assert not found["skipped"]


def test_a_step_that_the_scaler_left_out_is_no_explosion():
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**30))
    callback, _, _ = fit(every=1, epochs=2, plugins=[plugin])
    first = [row for row in callback.rows if row["step"] == 0]
    assert all(row["skipped"] for row in first)
    assert all(row["update_ratio"] == 0 for row in first)
    assert not callback.rows[-1]["skipped"]
    assert callback.verdict.name == "healthy"


def test_without_a_scaler_an_overflow_explodes():
    net = plain(nn.ReLU, 4, scale=1e12)
    callback, _, _ = fit(every=4, epochs=1, model=Model(net))
    assert callback.verdict.name == "exploding"
    assert not any(row["skipped"] for row in callback.rows)


def test_gradients_are_read_before_clipping():
    callback, _, _ = fit(every=1, epochs=1, gradient_clip_val=1e-3)
    assert all(row["grad_norm"] > 1e-2 for row in callback.rows)
    assert all(row["update_ratio"] < 1e-4 for row in callback.rows)  # after it


def test_a_layer_that_is_unfrozen_later_is_read():
    class Unfreeze(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            pl_module.net[0].requires_grad_(trainer.current_epoch == 1)

    callback = GradientFlowCallback(4)
    fit(
        callback=[callback, Unfreeze()],
        model=Model(nn.Sequential(nn.Linear(20, 8), nn.Linear(8, 4))),
    )
    assert [row["epoch"] for row in callback.rows if row["layer"] == "net.0"] == [1, 1]


def test_two_optimizers_each_have_their_layers():
    class Two(Model):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            first = torch.optim.SGD(self.net[0].parameters(), lr=0.1)
            return [first, torch.optim.SGD(self.net[4].parameters(), lr=0.1)], []

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                optimizer.step()

    callback, _, _ = fit(every=4, epochs=1, model=Two())
    assert [row["layer"] for row in callback.rows] == ["net.0", "net.4"] * 4
    assert steps(callback) == [0, 4, 8, 12]
    assert all(row["update_ratio"] > 0 for row in callback.rows)


def test_the_other_processes_and_sharded_weights_are_not_read(monkeypatch):
    monkeypatch.setattr(Trainer, "is_global_zero", False)
    assert fit(every=1, epochs=1)[0].rows == []
    monkeypatch.undo()
    monkeypatch.setattr(nn.Parameter, "full_tensor", None, raising=False)
    callback, spy, _ = fit(every=1, epochs=1)
    assert callback.off == "weights are sharded over processes"
    assert callback.rows == []
    assert set(spy.hooks) == {0}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_what_runs_compiled_has_norms_but_no_shares():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model = Model()
    run = torch.compile(model.net, backend=backend)
    model.training_step = lambda batch, batch_idx: F.cross_entropy(run(batch[0]), batch[1])
    callback, _, model = fit(every=3, model=model)
    eager, _, other = fit(every=3)
    assert len(compiled) == 2  # with hooks and without; each is compiled once
    for found, expected in zip(callback.rows, eager.rows, strict=True):
        assert found["saturated"] is found["dead"] is None
        assert (found["layer"], found["step"]) == (expected["layer"], expected["step"])
        for name in ("grad_norm", "weight_norm", "update_ratio"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4)
    assert torch.equal(model.net[0].weight, other.net[0].weight)
    assert callback.verdict.name == "healthy"


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        (0.05, "healthy"),
        (0.5, "unclear"),
        (1.0, "exploding"),
        (70.0, "exploding"),
        (math.nan, "exploding"),
    ],
)
def test_a_step_as_long_as_the_weights_leaves_nothing_of_them(ratio, verdict):
    layers = [LayerFlow(name, 1.0, 1.0, ratio, None, 0.0) for name in ("first", "last")]
    found = GradientFlow(tuple(layers)).verdict
    assert found.name == verdict
    if verdict == "exploding":
        assert "a step of first is" in found.reason


def test_a_buffer_that_the_model_assigns_anew_is_put_back():
    class Averaging(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            self.register_buffer("mean", torch.ones(2))

        def forward(self, x):
            y = self.layers(x)
            self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
            return y

    model = Averaging()
    before = model.mean
    gradient_flow(model, lambda: model(torch.randn(8, 3)).square().mean())
    assert model.mean is before
    assert torch.equal(before, torch.ones(2))

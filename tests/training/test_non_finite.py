import math
import os
import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, Metric

import torchref
from torchref.training import (
    ConvertCallback,
    DataModule,
    EarlyStopping,
    GradientFlowCallback,
    MLPClassifier,
    RestoreBest,
    StopOnNonFinite,
    SyncBatchNormPlugin,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),  # Lightning on torch's newer pytree
    pytest.mark.filterwarnings("ignore:.*lightning_logs"),
]

NAN, INF = math.nan, math.inf
OPTIMIZERS = ("SGD", "RMSprop", "Adam", "AdamW")
MOMENTUM = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
SIZE = 2  # processes


class Net(LightningModule):
    """Trains what it is given; counts what a second pass must not change."""

    def __init__(self, net, loss=None, optimizer=MOMENTUM):
        super().__init__()
        self.net, self.loss = net, loss or nn.MSELoss()
        self.make_optimizer = optimizer
        self.mean = MeanMetric(nan_strategy="disable")
        self.calls, self.kept, self.last = 0, [], None

    def training_step(self, batch, batch_idx):
        *x, y = batch
        loss = self.loss(self.net(*x), y)
        self.mean.update(loss)
        self.calls += 1
        self.last = loss  # of a graph: deepcopy refuses it
        self.kept.append(loss)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return {"loss": loss}

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


class Log(nn.Module):
    def forward(self, x):
        return x.log()


class Exp(nn.Module):
    def forward(self, x):
        return (x * 1e4).exp()


class Sqrt(nn.Module):
    """Finite, with a gradient that is NaN."""

    def forward(self, x):
        return x + (x * 0).abs().sqrt()


class Endless(nn.MSELoss):
    """Infinite, with a gradient that is finite."""

    def forward(self, z, y):
        return super().forward(z, y) + INF


class Sum(nn.Module):
    def forward(self, inputs, *, scale=None):
        x = torch.stack(inputs).sum(0)
        return x if scale is None else x * scale["by"]


def layers(*middle, out=2):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), *middle, nn.Linear(5, out))


def samples(bad=None, value=NAN):
    """Four batches of four; ``bad`` are indices of samples."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(16, 3, generator=generator), torch.randn(16, 2, generator=generator)
    if bad is not None:
        x[bad, 1] = value
    return x, y


def trainer_of(callbacks, epochs, **options):
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        **options,
    )


def fit(model, data, callbacks=None, epochs=1, batch_size=4, **options):
    callbacks = [StopOnNonFinite()] if callbacks is None else callbacks
    trainer = trainer_of(callbacks, epochs, **options)
    trainer.fit(model, DataLoader(TensorDataset(*data), batch_size))
    return next((c for c in callbacks if isinstance(c, StopOnNonFinite)), None), trainer


def reason(model, data=None, **options):
    return fit(model, samples() if data is None else data, **options)[0].reason


def state(model, optimizer=None):
    tensors = {name: x.clone() for name, x in model.state_dict().items()}
    for number, values in (optimizer.state_dict()["state"] if optimizer else {}).items():
        tensors |= {f"{number} {k}": torch.as_tensor(v).clone() for k, v in values.items()}
    return tensors


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


# What stops, and what is left.


@pytest.mark.parametrize("ours", [False, True], ids=["torch", "torchref"])
@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in OPTIMIZERS), ("SGD", {"fused": True}), ("Adam", {"fused": True})],
    ids=str,
)
def test_weights_statistics_and_optimizer_are_those_before_the_batch(name, options, ours):
    optimizer = partial(getattr(torchref.optim if ours else torch.optim, name), lr=0.1, **options)
    norm = torchref.nn.BatchNorm1d if ours else nn.BatchNorm1d

    def model():
        return Net(layers(norm(5), nn.ReLU()), optimizer=optimizer)

    good = model()
    _, trainer = fit(good, samples(), limit_train_batches=2)
    expected = state(good, trainer.optimizers[0])
    stopped = model()
    finite, trainer = fit(stopped, samples([9, 11]), epochs=3)
    assert finite.reason == (
        "the loss became NaN at epoch 0, batch 2: the batch is not finite, samples 1, 3"
    )
    assert trainer.global_step == 3
    assert stopped.calls == 3
    assert_same(state(stopped, trainer.optimizers[0]), expected)


def test_training_that_is_finite_is_as_without():
    def train(callbacks):
        model = Net(layers(nn.BatchNorm1d(5), nn.Dropout(0.5)))
        torch.manual_seed(3)
        _, trainer = fit(model, samples(), callbacks, epochs=3)
        return state(model, trainer.optimizers[0]) | {"loss": trainer.callback_metrics["loss"]}

    finite = StopOnNonFinite()
    assert_same(train([finite]), train([]))
    assert finite.reason is None
    assert finite._batches == []  # nothing is kept of a batch
    assert finite._buffers == {}


def test_clipping_comes_later():
    model = Net(layers())
    found = reason(model, samples([0], INF), gradient_clip_val=1.0)
    assert "batch 0: the batch is not finite, samples 0" in found
    assert all(p.isfinite().all() for p in model.parameters())


def test_gradients_whose_squares_overflow_are_finite():
    model = Net(
        layers(), loss=lambda z, y: z.sum() * 1e25, optimizer=partial(torch.optim.SGD, lr=0)
    )
    finite, trainer = fit(model, samples())
    assert finite.reason is None
    assert trainer.global_step == 4


def test_min_epochs_goes_on_without_the_bad_batches():
    model = Net(layers())
    finite, trainer = fit(model, samples([5]), min_epochs=2, epochs=2)
    assert "epoch 0, batch 1" in finite.reason
    assert trainer.global_step == 8
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_second_fit_begins_anew():
    finite, model = StopOnNonFinite(), Net(layers())
    fit(model, samples([0]), [finite])
    fit(model, samples(), [finite])
    assert finite.reason is None


def test_validation_sees_the_last_good_weights_and_the_gradient_flow_no_bad_ones():
    torch.manual_seed(0)
    x = torch.randn(120, 4)
    data = DataModule(x, (x[:, 0] > 0).long(), batch_size=16)
    data.train.x[:] = NAN
    model = MLPClassifier(4, ["no", "yes"], normalize="none")
    before = state(model)
    finite, stopping, flow = StopOnNonFinite(), EarlyStopping(), GradientFlowCallback(every=1)
    trainer_of([finite, stopping, flow], 3).fit(model, data)
    assert stopping.best_epoch == 0
    assert_same(state(model), before)
    assert flow.rows == []
    assert finite.reason.startswith("the loss became NaN at epoch 0, batch 0: the batch is")


def test_arguments_and_manual_optimization_are_checked():
    model = Net(layers())
    model.automatic_optimization = False
    with pytest.raises(ValueError, match="automatic_optimization: expected True"):
        fit(model, samples())
    with pytest.raises(ValueError, match="every: expected >= 1, got 0"):
        StopOnNonFinite(0)


# What is named.


def test_the_layer_that_makes_it():
    at = "at epoch 0, batch 0: "
    assert (
        reason(Net(layers(Log())))
        == f"the loss became NaN {at}net.1 (Log) made NaN of finite values"
    )
    model = Net(layers(nn.ReLU(inplace=True), Exp()))
    assert reason(model) == f"the loss became NaN {at}net.2 (Exp) made infinity of finite values"
    model = Net(layers(), loss=lambda z, y: (z - z).mean().log() * -1)
    assert reason(model) == f"the loss became infinite {at}training_step, outside of modules"


def test_the_loss_module_that_makes_it():
    class Bad(nn.Module):
        def forward(self, z, y):
            return (z - y).square().mean() / 0

    assert reason(Net(layers(), Bad())).endswith(
        "batch 0: loss (Bad) made infinity of finite values"
    )


def test_a_metric_that_is_not_finite_is_not_to_blame():
    class Ratio(Metric):
        def update(self, z):
            pass

        def compute(self):
            return torch.zeros(()) / 0

    class Scored(Net):
        def __init__(self):
            super().__init__(layers(), Endless())
            self.ratio = Ratio()

        def training_step(self, batch, batch_idx):
            self.ratio(self.net(batch[0]))
            return super().training_step(batch, batch_idx)

    assert reason(Scored()).endswith("loss (Endless) made infinity of finite values")


def test_nan_of_infinite_values_where_the_batch_is_finite():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.scores = nn.Linear(3, 2)
            self.softmax = nn.Softmax(1)

        def forward(self, x):
            return self.softmax(self.scores(x) * 0 - INF)

    assert reason(Net(Masked())).endswith("net.softmax (Softmax) made NaN of infinite values")


@pytest.mark.parametrize(("name", "index"), [("weight", 0), ("bias", 2)])
def test_weights_that_are_bad_already(name, index):
    model = Net(layers(nn.ReLU()))
    getattr(model.net[index], name).data[0] = NAN
    assert reason(model) == (
        f"the loss became NaN at or before epoch 0, batch 0: net.{index} (Linear), "
        f"whose {name} is not finite"
    )


def test_buffers_that_are_bad_already_and_statistics_that_become_so():
    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("shift", torch.tensor(NAN))
            self.register_buffer("scale", torch.tensor(-INF))

        def forward(self, x):
            return x * self.scale + self.shift

    whose = "net.1 (Shift), whose shift and scale are not finite"
    found = reason(Net(layers(Shift())))
    assert found == f"the loss became NaN at epoch 0, batch 0: {whose}"

    class Center(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(5))

        def forward(self, x):
            self.mean.copy_(x.log().mean(0))
            return x - self.mean

    found = reason(Net(layers(Center())))
    assert found.endswith("net.1 (Center) made NaN of finite values")


def test_samples_of_any_part_of_the_batch_are_named_and_counted():
    x, y = samples()
    y[[4, 6], 0] = INF
    assert reason(Net(layers()), (x, y)).endswith("batch 1: the batch is not finite, samples 0, 2")
    found = reason(Net(layers()), samples(slice(0, 7)), batch_size=8)
    assert found.endswith("samples 0, 1, 2, 3, 4 and 2 more")


def test_a_layer_that_is_bad_comes_before_a_batch_that_is():
    x, y = samples()
    y[0] = NAN
    assert reason(Net(layers(Log())), (x, y)).endswith("net.1 (Log) made NaN of finite values")


@pytest.mark.parametrize("inplace", [False, True])
def test_the_backward_pass_that_makes_it(inplace):
    model = Net(layers(nn.ReLU(inplace=inplace), Sqrt()))
    assert reason(model) == (
        "a gradient is not finite at epoch 0, batch 0: first in the backward pass of net.2 (Sqrt)"
    )


def test_gradients_that_no_module_passes_on():
    def functional(z, y):
        return (z * 0).abs().sqrt().sum() + (z - y).square().mean()

    found = reason(Net(layers(), functional))
    assert found.endswith("first at the output of net.1 (Linear)")

    class Penalty(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)["loss"]
            return loss + (self.net[0].bias * 0).norm().sqrt()

    assert reason(Penalty(layers())).endswith("first of net.0.bias")


class Draws(nn.Module):
    """Takes the logarithm when it is called for the third time, and when that is repeated."""

    def __init__(self, bad=(3, 4)):
        super().__init__()
        self.bad, self.drawn = bad, drawn
        drawn.clear()

    def forward(self, x):
        drawn.append(torch.rand(()).item())
        return x.log() if len(drawn) in self.bad else x


drawn = []  # by the copy, too


def test_a_second_pass_draws_the_same_numbers_and_leaves_no_trace():
    class Augmented(Net):
        def training_step(self, batch, batch_idx):
            random.random(), np.random.random()
            return super().training_step(batch, batch_idx)

    def train(bad, callbacks):
        model = Augmented(layers(nn.BatchNorm1d(5), Draws(bad), nn.Dropout(0.5)))
        model.net[2].__deepcopy__ = lambda memo: model.net[2]
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(5)
        _, trainer = fit(model, samples(), callbacks, limit_train_batches=3)
        return model, trainer, (torch.rand(()).item(), np.random.random(), random.random())

    finite = StopOnNonFinite()
    model, trainer, after = train((3, 4), [finite])
    assert finite.reason.endswith("batch 2: net.2 (Draws) made NaN of finite values")
    assert len(drawn) == 4
    assert drawn[2] == drawn[3]
    assert model.calls == len(model.kept) == model.mean._update_count == 3
    assert math.isnan(trainer.callback_metrics["loss"])
    assert not any(p._backward_hooks for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert after == train((), [])[2]


def test_shared_frozen_and_nested_modules():
    class Tree(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.shared = nn.Linear(3, 3)
            self.frozen = nn.Linear(3, 2).requires_grad_(False)
            self.sum = Sum()
            self.attention = nn.MultiheadAttention(2, 1, batch_first=True)
            self.root = Sqrt()

        def forward(self, x):
            x = self.sum([self.shared(self.shared(x)), x], scale={"by": torch.ones(3)})
            z = self.frozen(x)[:, None]
            return self.root(self.attention(z, z, z)[0][:, 0])

    assert reason(Net(Tree())).endswith("first in the backward pass of net.root (Sqrt)")
    model = Net(Tree())
    model.net.frozen.weight.data.fill_(INF)
    found = reason(model)
    assert "at or before epoch 0, batch 0: net.frozen (Linear), whose weight is not finite" in found
    model = Net(Tree())
    model.net.shared.weight.data.fill_(1e20)  # finite once, infinite when called again
    assert "net.shared (Linear) made infinity of finite values" in reason(model)


def test_what_hooks_make_of_weights_is_no_hindrance():
    """They put results of a graph where weights are, which deepcopy refuses."""
    model = Net(layers(Log()))
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(model.net[0])
    assert reason(model).endswith("net.1 (Log) made NaN of finite values")


def test_sparse_gradients():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.root = nn.Embedding(4, 2, sparse=True), Sqrt()

        def forward(self, x):
            return self.root(self.table(x) * 0)

    x, y = torch.arange(16) % 4, samples()[1]
    optimizer = partial(torch.optim.SGD, lr=0.1)
    found = reason(Net(Words(), optimizer=optimizer), (x, y))
    assert found.endswith("first in the backward pass of net.root (Sqrt)")


def test_torchrefs_pieces():
    model = Net(layers(nn.BatchNorm1d(5), nn.SiLU(), nn.Dropout(0.2), Log()))
    finite = StopOnNonFinite()
    fit(model, samples(), [ConvertCallback(fuse=True), finite])
    assert finite.reason.endswith("net.4 (Log) made NaN of finite values")
    x, y = samples()
    x[2] = NAN
    net = nn.Sequential(torchref.nn.Linear(3, 2), torchref.nn.Softmax(-1))
    assert reason(Net(net, torchref.nn.MSELoss()), (x, y)).endswith("samples 2")


@pytest.fixture
def eager(monkeypatch):
    """torch.compile without a compiler, which takes seconds."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def test_a_network_that_is_compiled_runs_without(eager):
    data = DataModule(samples()[0], torch.arange(16) % 2, batch_size=4, ratios=(0.5, 0.25, 0.25))
    model = MLPClassifier(3, ["no", "yes"], normalize="none", depth=1, width=4, batch_norm=False)
    model.net[0].weight.data[0, 0] = INF
    model.compile_net()
    finite = StopOnNonFinite()
    trainer_of([finite], 1).fit(model, data)
    assert "whose weight is not finite" in finite.reason
    assert "batch 0: net.0 (" in finite.reason


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo's, of what the module keeps
def test_modules_that_are_compiled_run_without(eager):
    model = Net(layers(Log()))
    model.net = torch.compile(model.net)
    assert reason(model).endswith("net._orig_mod.1 (Log) made NaN of finite values")
    model = Net(layers(Log()))
    model.net.compile(backend="eager")
    assert reason(model).endswith("net.1 (Log) made NaN of finite values")

    class Plain(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = layers(Log())

        def training_step(self, batch):
            return nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    assert reason(torch.compile(Plain())).endswith("net.1 (Log) made NaN of finite values")


def test_a_step_that_cannot_be_repeated_stops_all_the_same():
    class Once(Net):
        def training_step(self, batch, batch_idx):
            if self.calls:
                raise KeyError("twice")
            return super().training_step(batch, batch_idx)

    assert reason(Once(layers()), samples([0])) == (
        "the loss became NaN at epoch 0, batch 0: its second pass failed: KeyError: 'twice'"
    )

    class Fickle(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)["loss"]
            return loss / 0 if self.calls == 1 else loss

    assert reason(Fickle(layers())) == (
        "not finite at epoch 0, batch 0: a second pass does not show why"
    )


# When it looks.


def test_gradients_that_add_up_blame_the_batch():
    model = Net(layers(nn.BatchNorm1d(5)))
    before = state(model)
    finite, trainer = fit(model, samples([5, 9]), accumulate_grad_batches=4)
    assert finite.reason.endswith("epoch 0, batch 1: the batch is not finite, samples 1")
    assert trainer.global_step == 1
    assert_same(state(model), before)

    class Slope(Sqrt):
        def forward(self, x):
            return super().forward(x) if x.sum() > 1e3 else x

    x, y = samples()
    x[9] = 1e4
    model = Net(nn.Sequential(nn.Linear(3, 2), Slope()))
    model.net[0].weight.data.fill_(1.0)
    finite, _ = fit(model, (x, y), accumulate_grad_batches=4)
    assert finite.reason == (
        "a gradient is not finite at epoch 0, batch 2: first in the backward pass of net.1 (Slope)"
    )


def test_a_batch_that_training_step_skips_is_not_repeated():
    class Skips(Net):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 0 else super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="returned `None`"):
        found = reason(Skips(layers()), samples([0, 5]), accumulate_grad_batches=2)
    assert found.endswith("epoch 0, batch 1: the batch is not finite, samples 1")


def test_between_checks_weights_may_go():
    finite = StopOnNonFinite(every=3)
    model = Net(layers())
    _, trainer = fit(model, samples([5]), [finite], epochs=2)
    assert trainer.global_step == 4  # looks at steps 0 and 3
    assert finite.reason == (
        "the loss became NaN at or before epoch 0, batch 3: net.0 (Linear), "
        "whose weight and bias are not finite"
    )
    finite = StopOnNonFinite(every=3)
    fit(Net(layers()), samples([13]), [finite])
    assert finite.reason.endswith("NaN at epoch 0, batch 3: the batch is not finite, samples 1")


@pytest.mark.parametrize(("every", "error"), [(1.5, TypeError), ("2", TypeError), (0, ValueError)])
def test_steps_between_checks_are_counted(every, error):
    with pytest.raises(error, match=f"every: expected .*, got {every!r}"):
        StopOnNonFinite(every=every)


def test_one_wait_for_the_device_a_step(monkeypatch):
    waits = []
    for name in ("__bool__", "item", "__float__", "__int__", "tolist", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, counting(waits, getattr(torch.Tensor, name)))
    callback, model = StopOnNonFinite(), Net(layers())
    _, trainer = fit(model, samples())
    optimizer = trainer.optimizers[0]
    waits.clear()
    callback.on_train_batch_start(trainer, model, None, 0)
    callback.on_before_backward(trainer, model, torch.ones(()))
    callback.on_before_optimizer_step(trainer, model, optimizer)
    assert len(waits) == 1


def counting(calls, function):
    def call(*args, **kwargs):
        calls.append(function)
        return function(*args, **kwargs)

    return call


# Under a GradScaler.


class Steps(Callback):
    """Which steps changed weights or the optimizer's state, and the scale after each."""

    def __init__(self, scaler):
        self.scaler, self.changed, self.scales = scaler, [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = state(pl_module.net, trainer.optimizers[0])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        after = state(pl_module.net, trainer.optimizers[0])
        # a fused optimizer's state begins with zeros in a step that is left out
        before = {name: self.before.get(name, torch.zeros_like(x)) for name, x in after.items()}
        self.changed.append(any(not torch.equal(before[name], x) for name, x in after.items()))
        self.scales.append(self.scaler.get_scale())


def scaled(model, y=None, init_scale=2.0**16):
    """Four steps in float16."""
    data = samples()[0], samples()[1] if y is None else y
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    finite, steps = StopOnNonFinite(), Steps(scaler)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    fit(model, data, [finite, steps], plugins=[plugin])
    return finite.reason, steps


def regression(make_optimizer, ours=True):
    library = torchref.nn if ours else nn
    torch.manual_seed(0)
    net = nn.Sequential(library.Linear(3, 5), library.Tanh(), library.Linear(5, 2))
    return Net(net, library.MSELoss(), make_optimizer)


FUSED = [(name, fused) for name in OPTIMIZERS for fused in (False, True) if name != "RMSprop"]


@pytest.mark.parametrize(("name", "fused"), [*FUSED, ("RMSprop", None)])
def test_overflows_recover_through_the_scaler(name, fused):
    """A residual of 100 has a gradient of 100 * 2**16 / 4, more than float16's 65504."""
    y = samples()[1]
    y[[0, 8]] = 100.0
    options = {"lr": 0.01} if fused is None else {"lr": 0.01, "fused": fused}
    results = []
    for ours in (True, False):
        library = torchref.optim if ours else torch.optim
        model = regression(partial(getattr(library, name), **options), ours)
        reason, steps = scaled(model, y)
        assert reason is None
        assert steps.changed == [False, True, False, True]
        assert steps.scales == [2.0**15, 2.0**15, 2.0**14, 2.0**14]
        results.append(state(model.net))
    # The products of float16 are torch's; what is left are roundings of float32 in two steps.
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_loss_that_is_not_finite_stops_under_a_scaler_too(value, fused):
    y = samples()[1]
    y[6, 0] = value
    model = regression(partial(torchref.optim.Adam, lr=0.01, fused=fused))
    reason, steps = scaled(model, y, 4.0)
    assert reason.endswith("at epoch 0, batch 1: the batch is not finite, samples 2")
    assert steps.changed == [True, False]


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_that_alone_is_infinite_makes_no_step(fused):
    model = regression(partial(torchref.optim.Adam, lr=0.01, fused=fused))
    model.loss = Endless()
    reason, steps = scaled(model, init_scale=4.0)
    assert reason == (
        "the loss became infinite at epoch 0, batch 0: "
        "loss (Endless) made infinity of finite values"
    )
    assert steps.changed == [False]


def test_a_scale_that_fell_to_nothing_stops():
    model = Net(layers(Sqrt()))
    reason, steps = scaled(model, init_scale=2.0**-12)
    assert steps.changed == [False] * 4
    assert reason == (
        "a gradient is not finite at epoch 0, batch 3: first in the backward pass of net.1 (Sqrt)"
    )
    assert scaled(Net(layers(Sqrt())), init_scale=2.0**-11)[0] is None


def test_a_loss_in_float16_that_overflows_with_its_scale_recovers():
    """Its own gradient is the scale, which is more than 65504."""
    model = Net(layers(), lambda z, y: (z - y).square().mean().half() + 10)
    reason, steps = scaled(model, init_scale=2.0**17)
    assert reason is None
    assert steps.changed == [False, False, True, True]


# Of several processes.


def process(rank, folder, collected):
    torch.set_num_threads(1)
    # What torchrun tells Lightning; the processes are there already.
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": SIZE, "LOCAL_WORLD_SIZE": SIZE}
    place |= {"MASTER_ADDR": "localhost", "MASTER_PORT": 0, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in place.items()})
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=SIZE)
    collected[rank] = {name: one_of_two(rank, name) for name in PARTS}
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # at an ordinary exit a thread of gloo's that is still there aborts the process


PARTS = {  # what is wrong in process 1, and what both say
    "batch": "the loss became NaN at epoch 0, batch 2 of process 1: the batch is not finite, "
    "samples 1",
    "loss": "the loss became infinite at epoch 0, batch 2 of process 1: loss (Own) made infinity "
    "of finite values",
    "gradient": "a gradient is not finite at epoch 0, batch 2 of process 1: first in the backward "
    "pass of net.4 (Turn)",
}


class Own(nn.Module):
    """Infinite where a target is large, with a gradient that is finite."""

    def forward(self, z, y):
        return (z - y).square().mean() + torch.where(y.max() > 1e3, INF, 0.0)


class Turn(Sqrt):
    """In process 1, from the third call on."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) if dist.get_rank() == 1 and self.calls >= 3 else x


def one_of_two(rank, name):
    x, y = samples(9 if rank == 1 and name == "batch" else None)
    if rank == 1 and name == "loss":
        y = y.clamp(-1, 1)
        y[8] = 1e4
    turn = Turn() if name == "gradient" else nn.Identity()
    net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2), turn)
    net[0].load_state_dict(layers()[0].state_dict())
    net[3].load_state_dict(layers()[1].state_dict())
    model = Net(net, Own() if name == "loss" else None)
    finite = StopOnNonFinite()
    callbacks = [ConvertCallback(), finite]
    options = {"devices": SIZE, "strategy": "ddp", "plugins": [SyncBatchNormPlugin()]}
    _, trainer = fit(model, (x, y), callbacks, use_distributed_sampler=False, **options)
    shared = {name: value.tolist() for name, value in model.state_dict().items()}
    return finite.reason, trainer.global_step, shared


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_all_processes_stop_together_and_say_the_same(tmp_path):
    with mp.Manager() as manager:
        collected = manager.dict()
        mp.spawn(process, (str(tmp_path), collected), nprocs=SIZE)
        found = [collected[rank] for rank in range(SIZE)]
    for name, expected in PARTS.items():
        assert found[0][name] == found[1][name]
        reason, steps, weights = found[0][name]
        assert reason == expected
        assert steps == 3
        assert all(np.isfinite(value).all() for value in weights.values())


# A metric that is not finite is never the best.


class Scores(LightningModule):
    """Logs the given scores; its weight counts the epochs."""

    def __init__(self, scores):
        super().__init__()
        self.scores, self.weight = scores, nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        return -self.weight  # one step of SGD with rate 1 adds 1

    def validation_step(self, batch, batch_idx):
        self.log("score", torch.tensor(self.scores[self.current_epoch]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def best_of(callback, scores, path=None, resume=None):
    model, loader = Scores(scores), DataLoader(torch.zeros(1))
    trainer = trainer_of([callback], len(scores))
    trainer.fit(model, loader, loader, ckpt_path=resume, weights_only=True)
    if path is not None:
        trainer.save_checkpoint(path)
    return model.weight.item()


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_score_that_is_not_finite_is_never_the_best(value, mode, tmp_path):
    sign = 1.0 if mode == "min" else -1.0
    for place in range(3):
        scores = [sign * s for s in (3.0, 2.0, 4.0)]
        finite = [s for i, s in enumerate(scores) if i != place]
        best = scores.index(min(finite) if mode == "min" else max(finite))
        scores[place] = value
        callback = RestoreBest("score", mode)
        assert best_of(callback, scores, tmp_path / "a.ckpt") == best + 1
        assert (callback.epoch, callback.score) == (best, scores[best])
        resumed = RestoreBest("score", mode)
        assert best_of(resumed, [*scores, value], resume=tmp_path / "a.ckpt") == best + 1
        assert resumed.score == scores[best]

        stopping = EarlyStopping("score", mode=mode)
        before = [s for s in scores[:place]]
        weight = best_of(stopping, scores, tmp_path / "a.ckpt")
        if before:
            best = scores.index(min(before) if mode == "min" else max(before))
            assert (stopping.best_epoch, stopping.best_score) == (best, scores[best])
            assert weight == best + 1
        else:
            assert stopping.best_epoch is stopping.best_state is None
        saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]
        (kept,) = saved.values()
        assert kept["best_epoch"] == stopping.best_epoch

"""A LightningModule converted by the Trainer trains as torch's, and shares checkpoints with it."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torchref
from torchref.training import ConvertCallback, ExactResume, SyncBatchNormPlugin

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),  # Lightning on torch's newer pytree
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),  # a resumed run's folder
]

WAYS = ("before", "callback", "configure_model")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


class Network(LightningModule):
    """Its losses are kept; with ``late`` its layers are made, and converted, in configure_model."""

    def __init__(self, late: bool = False, optimizer=torch.optim.SGD) -> None:
        super().__init__()
        self.late, self.make_optimizer = late, optimizer
        self.net = None if late else layers()
        self.loss = nn.CrossEntropyLoss()
        self.losses = []

    def configure_model(self):
        if self.net is None:
            self.net = layers()
            torchref.convert(self)

    def training_step(self, batch):
        x, y = batch
        loss = self.loss(self.net(x), y)
        self.losses.append(loss.detach())
        return loss

    def test_step(self, batch):
        self.log("test_loss", self.loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def layers() -> nn.Sequential:
    with torch.random.fork_rng():  # wherever they are made, dropout draws the same masks
        torch.manual_seed(0)
        hidden = (nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.25))
        return nn.Sequential(*hidden, nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 3))


def data() -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(48, 6, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=16)


def trainer_of(folder, *callbacks, epochs: int = 3, precision: str = "32-true", **options):
    if precision == "16-mixed":  # which Lightning takes on a CPU as a plugin alone
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler)]
    else:
        options["precision"] = precision
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[ExactResume(), *callbacks],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def fit(folder, model, *callbacks, resume=None, **options):
    """The losses of a run, and its trainer."""
    torch.manual_seed(2)  # of dropout
    trainer = trainer_of(folder, *callbacks, **options)
    arguments = {} if resume is None else {"ckpt_path": resume, "weights_only": True}
    trainer.fit(model, data(), **arguments)
    return torch.stack(model.losses), trainer


@pytest.fixture(scope="module")
def of_torch(tmp_path_factory):
    """The losses of torch's model, by precision."""
    folder = tmp_path_factory.mktemp("torch")
    return {name: fit(folder, Network(), precision=name)[0] for name in PRECISIONS}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("way", WAYS)
def test_three_ways_to_convert_give_torchs_losses(way, precision, of_torch, tmp_path):
    callbacks = []
    if way == "callback":
        model = Network()
        callbacks.append(ConvertCallback())
    else:
        model = Network(late=way == "configure_model", optimizer=torchref.optim.SGD)
    if way == "before":
        torchref.convert(model)
    losses, trainer = fit(tmp_path, model, *callbacks, precision=precision)
    assert type(model.net[1]) is torchref.nn.BatchNorm1d
    assert type(model.net[3]) is torchref.nn.Dropout
    assert type(model.loss) is torchref.nn.CrossEntropyLoss
    assert type(trainer.optimizers[0]) is torchref.optim.SGD
    # Of losses near 1, some roundings of each type (of float32, bfloat16, float16), in nine steps.
    bound = {"32-true": 2**-20, "bf16-mixed": 2**-9, "16-mixed": 2**-12}[precision]
    torch.testing.assert_close(losses, of_torch[precision], rtol=0, atol=bound)


def test_the_report_is_of_what_was_swapped(tmp_path):
    callback = ConvertCallback(exclude=["net.5", nn.Dropout], fuse=True)
    model = Network()
    _, trainer = fit(tmp_path, model, callback, epochs=1)
    first = callback.report
    assert {"net.1", "net.2", "loss"} <= first.swapped.keys()
    assert first.left["net.5"] == ("GELU", "excluded")
    assert type(model.net[1]) is torchref.nn.BatchNormAct1d
    assert type(model.net[5]) is nn.GELU
    trainer.test(model, data(), verbose=False)  # a second setup, of a model that is ours
    assert callback.report is first


def test_functional_runs_ours_inside_forward(tmp_path):
    """Seen by the name of the gradient that a function leaves on its result."""
    names = []

    class Functions(Network):
        def forward(self, x):
            y = nn.functional.relu(self.net(x))
            names.append(type(y.grad_fn).__name__)
            return y

        def training_step(self, batch):
            return self.loss(self(batch[0]), batch[1])

    for functional in (False, True):
        callback = ConvertCallback(functional=functional)
        trainer_of(tmp_path, callback, epochs=1).fit(Functions(), data())
    assert names == ["ReluBackward0"] * 3 + ["ReLUFunctionBackward"] * 3


def test_other_optimizers_stay(tmp_path):
    class Special(torch.optim.SGD):
        pass

    _, trainer = fit(tmp_path, Network(optimizer=Special), ConvertCallback(), epochs=1)
    assert type(trainer.optimizers[0]) is Special
    _, trainer = fit(tmp_path, Network(), ConvertCallback(optimizers=False), epochs=1)
    assert type(trainer.optimizers[0]) is torch.optim.SGD


def test_lightning_knows_the_optimizer_by_its_new_class(tmp_path):
    model = Network()
    seen = []
    model.on_train_start = lambda: seen.append(model.optimizers())
    fit(tmp_path, model, ConvertCallback(), epochs=1)
    assert isinstance(seen[0], torchref.optim.SGD)


@pytest.mark.parametrize("first", [True, False], ids=["saved-with", "saved-without"])
def test_a_checkpoint_resumes_with_and_without(first, of_torch, tmp_path):
    def callbacks(wanted):
        return [ConvertCallback()] if wanted else []

    before, trainer = fit(tmp_path, Network(), *callbacks(first), epochs=1)
    path = tmp_path / "epoch.ckpt"
    trainer.save_checkpoint(path)
    for second in (True, False):
        model = Network()
        after, _ = fit(tmp_path, model, *callbacks(second), resume=path)
        assert (type(model.net[1]) is torchref.nn.BatchNorm1d) == second
        losses = torch.cat([before, after])
        torch.testing.assert_close(losses, of_torch["32-true"], rtol=0, atol=2**-20)  # as above


def test_a_checkpoint_has_nothing_of_the_callback(tmp_path):
    states = []
    for callbacks in ([], [ConvertCallback(fuse=True)]):
        _, trainer = fit(tmp_path, Network(), *callbacks, epochs=1)
        trainer.save_checkpoint(tmp_path / "any.ckpt")
        states.append(torch.load(tmp_path / "any.ckpt", weights_only=True))
    without, with_callback = states
    assert without["state_dict"].keys() == with_callback["state_dict"].keys()
    assert without["callbacks"].keys() == with_callback["callbacks"].keys()
    groups = [state["optimizer_states"][0]["param_groups"][0] for state in states]
    assert groups[0].keys() <= groups[1].keys()


def test_the_plugin_puts_classes_and_groups_back():
    net = nn.Sequential(
        nn.BatchNorm1d(3),
        torchref.nn.BatchNorm2d(3),
        torchref.nn.BatchNormAct3d(3, activation="relu"),
        nn.SyncBatchNorm(3, process_group="its own"),
        torchref.nn.SyncBatchNorm(3, process_group="its own"),
        nn.ReLU(),
    )
    before = [(type(module), dict(vars(module))) for module in net]
    plugin = SyncBatchNormPlugin("a group")
    for _ in range(2):
        assert plugin.apply(net) is net
        ours = torchref.nn.SyncBatchNorm
        assert all(isinstance(module, ours) for module in net[:5])
        assert type(net[2]) is torchref.nn.SyncBatchNormAct
        assert [module.process_group for module in net[:4]] == ["a group"] * 4
        assert plugin.revert(net) is net
        assert [(type(module), dict(vars(module))) for module in net] == before


def test_lightnings_own_plugin_would_drop_the_activation():
    """Why there is one of ours; nothing else in these tests depends on it."""
    norm = nn.SyncBatchNorm.convert_sync_batchnorm(torchref.nn.BatchNormAct1d(3, activation="relu"))
    assert (norm(torch.randn(8, 3)) < 0).any()


@pytest.mark.parametrize("exclude", ["net", 3, nn.Linear])
def test_what_is_no_list_excludes_nothing(exclude):
    with pytest.raises(TypeError, match="ConvertCallback: expected a list as `exclude`, got "):
        ConvertCallback(exclude=exclude)


@pytest.mark.parametrize("name", ["functional", "fuse", "optimizers"])
def test_a_word_is_neither_true_nor_false(name):
    with pytest.raises(TypeError, match=f"{name}: expected True or False, got 'no'"):
        ConvertCallback(**{name: "no"})

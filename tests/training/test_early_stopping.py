import math

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from torchref.training import EarlyStopping, RestoreBest

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),  # Lightning on torch's newer pytree
    pytest.mark.filterwarnings("ignore:.*lightning_logs"),
]


class Planted(LightningModule):
    """Logs the given losses; its weight and buffer count the epochs."""

    def __init__(self, losses):
        super().__init__()
        self.losses = losses
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.register_buffer("buffer", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        self.buffer += 1
        return -self.weight  # one step of SGD with rate 1 adds 1

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", torch.tensor(self.losses[self.current_epoch]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def fit(losses, resume=None, max_epochs=None, path=None, **arguments):
    stopping = EarlyStopping(**arguments)
    model = Planted(losses)
    trainer = train(model, [stopping], max_epochs or len(losses), resume)
    if path:
        trainer.save_checkpoint(path)
    return stopping, model, trainer


def train(model, callbacks, max_epochs, resume=None):
    loader = DataLoader(TensorDataset(torch.zeros(1)))
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=max_epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )
    trainer.fit(model, loader, loader, ckpt_path=resume, weights_only=True)
    return trainer


def test_a_planted_optimum_is_found_and_restored():
    stopping, model, trainer = fit([5.0, 3.0, 1.25, 2.0, 4.0, 3.0, 0.5], patience=3)
    assert stopping.best_epoch == 2
    assert trainer.current_epoch == 6
    assert model.weight.item() == model.buffer.item() == 3.0  # after three epochs, not six
    assert stopping.reason == "val_loss did not improve for 3 epochs; best 1.2500 at epoch 2"


def test_the_last_epoch_is_not_the_best_one_when_epochs_run_out():
    stopping, model, _ = fit([5.0, 3.0, 4.0], patience=3)
    assert model.weight.item() == 2.0
    assert stopping.reason == "reached max_epochs; best 3.0000 at epoch 1"


@pytest.mark.parametrize(("value", "became"), [(math.nan, "NaN"), (math.inf, "infinite")])
def test_a_value_that_is_not_finite_stops_and_is_never_the_best(value, became):
    stopping, model, _ = fit([5.0, 3.0, value, 1.0], patience=3)
    assert model.weight.item() == 2.0
    assert stopping.reason == f"val_loss became {became} at epoch 2; best 3.0000 at epoch 1"


def test_nan_from_the_start_leaves_nothing_to_restore():
    stopping, model, _ = fit([math.nan, 1.0])
    assert stopping.best_epoch is None
    assert model.weight.item() == 1.0
    assert stopping.reason == "val_loss became NaN at epoch 0; no best weights to restore"


def test_an_improvement_exceeds_min_delta():
    stopping, _, _ = fit([1.0, 0.95, 0.91, 0.88], patience=2, min_delta=0.2)
    assert stopping.best_epoch == 0


def test_the_largest_is_the_best_in_mode_max():
    stopping, model, _ = fit([1.0, 3.0, 2.0], mode="max")
    assert stopping.best_epoch == 1
    assert model.weight.item() == 2.0


def test_the_best_weights_survive_a_resume(tmp_path):
    path = tmp_path / "a.ckpt"
    losses = [5.0, 1.0, 2.0, 3.0, 4.0, 0.5]
    fit(losses, max_epochs=3, path=path, patience=3)
    stopping, model, trainer = fit(losses, resume=path, patience=3)
    assert trainer.current_epoch == 5  # two more without improvement, not three
    assert model.weight.item() == 2.0
    assert stopping.reason == "val_loss did not improve for 3 epochs; best 1.0000 at epoch 1"


def test_a_resumed_run_may_be_more_patient(tmp_path):
    path = tmp_path / "a.ckpt"
    losses = [5.0, 1.0, 2.0, 3.0, 4.0, 0.5]
    fit(losses, path=path, patience=2)
    stopping, _, _ = fit(losses, resume=path, patience=4)
    assert stopping.best_epoch == 5
    assert stopping.reason == "reached max_epochs; best 0.5000 at epoch 5"


@pytest.mark.parametrize("wrong", [{"patience": 0}, {"min_delta": -0.1}])
def test_a_wrong_argument_raises(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
        EarlyStopping(**wrong)


def test_epochs_before_the_start_neither_count_nor_are_the_best():
    losses = [0.5, 9.0, 8.0, 3.0, 4.0, 5.0, 6.0]
    stopping, model, _ = fit(losses, patience=2, start_from_epoch=2)
    assert stopping.best_epoch == 3
    assert stopping.stopped_epoch == 5
    assert model.buffer == 4
    assert fit(losses, patience=2)[0].best_epoch == 0


@pytest.mark.parametrize(
    ("mode", "scores", "best"),
    [
        ("min", [3.0, 1.0, 2.0], 1),
        ("max", [3.0, 1.0, 2.0], 0),
        ("min", [math.nan, 2.0, -math.inf, 3.0], 1),
        ("max", [math.nan, 2.0, math.inf, 1.0], 1),
    ],
)
def test_the_best_weights_come_back_without_stopping(mode, scores, best):
    callback = RestoreBest(mode=mode)
    model = Planted(scores)
    trainer = train(model, [callback], len(scores))
    assert trainer.current_epoch == len(scores)
    assert (callback.epoch, callback.score) == (best, scores[best])
    assert model.buffer == best + 1
    again = RestoreBest(mode=mode)
    again.load_state_dict(callback.state_dict())
    assert (again.epoch, again.score) == (callback.epoch, callback.score)


def test_nothing_finite_leaves_the_last_weights():
    callback, model = RestoreBest(), Planted([math.nan, math.nan])
    train(model, [callback], 2)
    assert callback.epoch is None
    assert model.buffer == 2


def test_a_metric_that_nobody_logs_is_named():
    with pytest.raises(RuntimeError, match="no metric 'val_f1' is logged; there is val_loss"):
        train(Planted([1.0]), [RestoreBest("val_f1")], 1)
    with pytest.raises(ValueError, match="mode: expected one of min, max, got 'least'"):
        RestoreBest(mode="least")
    with pytest.raises(ValueError, match="start_from_epoch: expected >= 0, got -1"):
        EarlyStopping(start_from_epoch=-1)


def test_what_stopped_once_may_fit_again():
    stopping = EarlyStopping("val_loss", patience=1)
    assert train(Planted([1.0, 2.0, 3.0]), [stopping], 3).current_epoch == 2
    assert train(Planted([0.5, 0.4, 0.3]), [stopping], 3).current_epoch == 3


@pytest.mark.parametrize("kind", [EarlyStopping, RestoreBest])
def test_a_second_fit_knows_nothing_of_the_first(kind):
    callback = kind()
    train(Planted([0.5, 0.1, 0.3]), [callback], 3)
    worse = Planted([5.0, 4.0, 6.0, 3.0, 7.0])
    train(worse, [callback], 5)
    assert worse.weight.item() == worse.buffer.item() == 4.0  # its own, not the two of the first


@pytest.mark.parametrize("kind", [EarlyStopping, RestoreBest])
def test_a_callback_that_was_used_before_resumes_from_the_checkpoint(tmp_path, kind):
    losses = [5.0, 1.0, 2.0, 3.0]
    train(Planted(losses), [kind()], 3).save_checkpoint(tmp_path / "a.ckpt")
    callback, model = kind(), Planted(losses)
    train(Planted([0.5, 0.1]), [callback], 2)
    train(model, [callback], 4, resume=tmp_path / "a.ckpt")
    assert model.weight.item() == 2.0  # the best is before the resume


@pytest.mark.parametrize(
    ("losses", "reason"), [([1.0, 2.0], "did not improve"), ([1.0, math.nan], "NaN")]
)
def test_training_that_had_stopped_stops_again(tmp_path, losses, reason):
    stopping, model, trainer = fit([*losses, 0.5, 0.4], path=tmp_path / "a.ckpt", patience=1)
    again, resumed, trainer_again = fit([*losses, 0.5, 0.4], resume=tmp_path / "a.ckpt", patience=1)
    assert reason in stopping.reason
    assert again.reason == stopping.reason
    assert trainer_again.global_step == trainer.global_step
    assert resumed.weight == model.weight

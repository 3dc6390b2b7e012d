import copy
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchref.nn.functional import cross_entropy
from torchref.training import Classifier, MLPClassifier

pytestmark = [
    # `self.log` outside a Trainer, where these tests call the steps by hand
    pytest.mark.filterwarnings("ignore:You are trying to `self.log"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),  # Lightning on torch's newer pytree
]


def model(**arguments):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    return Classifier(net, 3, **arguments)


def test_penalties_in_closed_form_without_biases_and_gains():
    m = model(l1=0.1, l2=0.01)
    for p in m.parameters():
        nn.init.constant_(p, -2.0)
    weights = 4 * 5 + 5 * 3
    assert m.penalty().item() == pytest.approx(weights * (0.1 * 2 + 0.01 * 4))


def test_gradient_of_the_l2_term_is_2_lambda_w():
    m = model(l2=0.01)
    m.penalty().backward()
    for p in m.net.parameters():
        if p.ndim > 1:
            torch.testing.assert_close(p.grad, 2 * 0.01 * p.detach())
        else:
            assert p.grad is None


def test_gradient_of_the_l1_term_is_lambda_sign_w():
    m = model(l1=0.01)
    m.penalty().backward()
    torch.testing.assert_close(m.net[0].weight.grad, 0.01 * m.net[0].weight.detach().sign())


def test_l2_is_half_of_weight_decay_under_sgd():
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    ours, theirs = model(l2=0.05), model()
    for m, decay in ((ours, 0.0), (theirs, 0.1)):
        weights = [p for p in m.net.parameters() if p.ndim > 1]
        optimizer = torch.optim.SGD(weights, lr=0.1, weight_decay=decay)
        m.training_step((x, y)).backward()
        optimizer.step()
    for a, b in zip(ours.net.parameters(), theirs.net.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["l1", "l2"])
@pytest.mark.parametrize("value", [-1e-3, float("nan"), float("inf")])
def test_a_wrong_penalty_raises(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected finite and >= 0"):
        model(**{name: value})


def test_classes_may_be_a_number_of_numpy():
    m = Classifier(nn.Linear(4, 3), np.int64(3))
    assert m.train_score.num_classes == 3


def test_training_cost_is_the_mean_cross_entropy_plus_penalty():
    m = model(l2=0.01)
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    expected = nn.functional.cross_entropy(m.net(x), y) + m.penalty()
    torch.testing.assert_close(m.training_step((x, y)), expected)


def test_the_largest_logit_is_the_largest_probability():
    m, x = model(), torch.randn(200, 4)
    p = m.predict_proba(x)
    assert torch.equal(m.predict(x), p.argmax(-1))
    torch.testing.assert_close(p.sum(-1), torch.ones(200))
    assert not p.requires_grad


def test_abstention_below_the_threshold():
    m, x = model(), torch.randn(200, 4)
    confidence, label = m.predict_proba(x).max(-1)
    threshold = confidence.median().item()
    predicted = m.predict(x, threshold=threshold)
    assert torch.equal(predicted, torch.where(confidence >= threshold, label, -1))
    assert 0 < (predicted == -1).sum() < 200
    assert (m.predict(x, threshold=0.0) >= 0).all()


def test_nan_is_never_confident():
    assert model().predict(torch.full((1, 4), float("nan")), threshold=0.0).item() == -1


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_a_wrong_threshold_raises(threshold):
    with pytest.raises(ValueError, match=r"threshold: expected in \[0, 1\]"):
        model().predict(torch.zeros(1, 4), threshold)


def test_predict_evaluates_and_leaves_each_mode_as_it_was():
    m = model()
    m.train()
    m.net[1].eval()  # frozen
    before = copy.deepcopy(m.state_dict())
    m.predict(torch.randn(8, 4))
    assert m.training
    assert not m.net[1].training
    assert all(torch.equal(before[name], value) for name, value in m.state_dict().items())


def test_any_network_any_loss_any_optimizer():
    m = model(loss=nn.CrossEntropyLoss(label_smoothing=0.1), optimizer=torch.optim.Adagrad)
    assert isinstance(m.configure_optimizers(), torch.optim.Adagrad)


def test_hyperparameters_are_plain_types_and_rebuild_the_network():
    m = MLPClassifier(4, ["a", "b"], depth=1, width=6, init="he", dropout=0.0)
    kinds = {type(value) for value in m.hparams.values()}
    assert kinds <= {int, float, str, bool, list}
    again = MLPClassifier(**m.hparams)
    assert [p.shape for p in again.parameters()] == [p.shape for p in m.parameters()]


def test_a_wrong_optimizer_is_an_error_at_once():
    with pytest.raises(ValueError, match="optimizer: expected one of"):
        MLPClassifier(4, ["a", "b"], optimizer="lion")


def test_without_lightning_the_error_names_the_extra():
    code = "import sys; sys.modules['lightning'] = None; import torchref.training"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert last.endswith("pip install 'torchref-triton[train]'")


def test_importing_torchref_does_not_import_lightning():
    code = "import sys, torchref; assert 'lightning' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true"])
def test_the_train_loss_is_the_mean_over_samples(precision):
    """Of batches of 8 and 1, whose weights do not move; rounded as often as there are batches."""
    torch.manual_seed(0)
    x, y = torch.randn(9, 4), torch.arange(9) % 2
    net = torch.nn.Linear(4, 2)
    optimizer = partial(torch.optim.SGD, lr=0.0)
    classifier = Classifier(net, classes=2, optimizer=optimizer)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        precision=precision,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(TensorDataset(x, y), 8)
    trainer.fit(classifier, loader, loader)
    found = trainer.callback_metrics["train_loss"]
    dtype = next(net.parameters()).dtype
    losses = [
        cross_entropy(net(x[part].to(dtype)), y[part]).detach() for part in (slice(8), slice(8, 9))
    ]
    expected = (8 * losses[0].double() + losses[1].double()) / 9
    assert found.dtype == (torch.float64 if precision == "64-true" else torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def test_a_nan_in_the_train_loss_is_not_left_out():
    loss = model().train_loss
    loss.update(torch.tensor(1.0), 3)
    loss.update(torch.tensor(torch.nan), 1)
    assert loss.compute().isnan()

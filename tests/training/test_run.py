import csv
import json
from dataclasses import replace

import pytest
import torch

import torchref
from torchref.training import Config, MLPClassifier, Run

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),  # Lightning on torch's newer pytree
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),  # a resumed run's folder
]

IRIS = Config(dataset="iris", epochs=6, batch_size=16, width=16, accelerator="cpu", dropout=0.3)


@pytest.fixture(autouse=True)
def _threads():
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def run(path, config=IRIS, **arguments):
    made = Run(config, root=path, **arguments)
    return made, made.execute()


def rows(path):
    with open(path / "iris" / "metrics.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row["val_loss"]]


def test_a_run_leaves_its_files(tmp_path):
    made, metrics = run(tmp_path)
    folder = tmp_path / "iris"
    assert {file.name for file in folder.iterdir()} == {
        "best.ckpt",
        "last.ckpt",
        "config.yaml",
        "hparams.yaml",
        "metrics.json",
        "metrics.csv",
        "learning_curves.png",
    }
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert metrics["epochs"] == len(made.history.rows) == 6
    assert metrics["stop_reason"].startswith("reached max_epochs; best ")
    best = min(made.history.rows, key=lambda row: row["val_loss"])
    assert (best["val_loss"], best["epoch"]) == (metrics["best_val_loss"], metrics["best_epoch"])


def test_the_checkpoint_alone_rebuilds_the_model(tmp_path):
    made, _ = run(tmp_path)
    path = tmp_path / "iris" / "best.ckpt"
    model = MLPClassifier.load_from_checkpoint(path, weights_only=True)
    x = made.data.test.tensors[0]
    assert torch.equal(model.predict_proba(x), made.model.predict_proba(x))
    assert model.hparams["classes"] == ["setosa", "versicolor", "virginica"]
    torch.testing.assert_close(model.normalize.mean, made.data.train.tensors[0].mean(0))


def test_the_same_seed_gives_the_same_run(tmp_path):
    a, b = run(tmp_path)[1], run(tmp_path)[1]
    c = run(tmp_path, replace(IRIS, seed=1))[1]
    assert a["best_val_loss"] == b["best_val_loss"] != c["best_val_loss"]
    assert [int(row["epoch"]) for row in rows(tmp_path)] == list(range(6))  # of the last run alone


def test_the_twin_agrees_and_leaves_the_run_as_it_is(tmp_path):
    with_twin, without = run(tmp_path)[1], run(tmp_path, replace(IRIS, parity=False))[1]
    assert with_twin["parity_max_loss_diff"] < 1e-5
    assert without["parity_max_loss_diff"] is None
    assert with_twin["best_val_loss"] == without["best_val_loss"]


@pytest.mark.parametrize(
    "change", [{"l2": 0.0}, {"optimizer": "rmsprop", "lr": 1e-3}, {"optimizer": "momentum"}]
)
def test_the_twin_sees_a_wrong_gradient(tmp_path, change):
    config = replace(IRIS, epochs=2, **change)
    made = Run(config, root=tmp_path)
    made.model.net[0].weight.register_hook(lambda grad: grad.roll(1, 0))
    assert made.execute()["parity_max_loss_diff"] > 1e-6


def test_the_twin_is_off_in_another_precision(tmp_path):
    made, metrics = run(tmp_path, replace(IRIS, epochs=1, precision="bf16-mixed"))
    assert metrics["parity_max_loss_diff"] is None
    assert made.parity.off == "it compares precision 32, not bf16-mixed"


def test_the_twin_is_off_beside_a_compiled_network(tmp_path):
    made = Run(replace(IRIS, epochs=1), root=tmp_path)
    made.model._compiled = (made.model.net,)  # without the compiler, which is not what is tested
    assert made.execute()["parity_max_loss_diff"] is None
    assert made.parity.off.startswith("a compiled network")


def test_the_twin_is_off_where_masks_differ(tmp_path):
    made = Run(replace(IRIS, epochs=1, dropout=0.1), root=tmp_path)
    with torchref.backend("compiled"):
        made.parity.on_train_start(made.trainer, made.model)
    assert made.parity.off.startswith("the compiled backend draws other")


def test_the_twin_goes_on_in_a_resumed_run(tmp_path):
    run(tmp_path, replace(IRIS, epochs=2))
    _, metrics = run(tmp_path, resume=True)
    assert 0 <= metrics["parity_max_loss_diff"] < 1e-5


@pytest.mark.parametrize("stopped_after", [1, 3])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, stopped_after):
    whole, expected = run(tmp_path / "whole")
    run(tmp_path / "parts", replace(IRIS, epochs=stopped_after))
    made, metrics = run(tmp_path / "parts", resume=True)
    assert made.history.rows == whole.history.rows
    for name in set(metrics) - {"seconds", "parity_max_loss_diff"}:
        assert metrics[name] == expected[name]
    for a, b in zip(made.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [int(row["epoch"]) for row in rows(tmp_path / "parts")] == list(range(6))


def test_resume_without_a_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="resume: no checkpoint"):
        Run(IRIS, resume=True, root=tmp_path)


def test_resume_with_another_network(tmp_path):
    run(tmp_path, replace(IRIS, epochs=1))
    with pytest.raises(ValueError, match="resume: width was 16 in .*, got 32"):
        Run(replace(IRIS, width=32), resume=True, root=tmp_path)


def test_a_new_run_keeps_other_files_of_the_folder(tmp_path):
    note = tmp_path / "iris" / "note.txt"
    note.parent.mkdir()
    note.write_text("mine")
    run(tmp_path, replace(IRIS, epochs=1))
    assert note.read_text() == "mine"


@pytest.mark.parametrize("batch_size", ["full", 1])
def test_batch_and_stochastic_gradient_descent(tmp_path, batch_size):
    config = replace(IRIS, batch_size=batch_size, batch_norm=False, epochs=1, lr=0.01)
    made, _ = run(tmp_path, config)
    assert made.trainer.global_step == (1 if batch_size == "full" else 106)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs: expected > 0"),
        ({"seed": -1}, "seed: expected in"),
        ({"name": "../x"}, "name: expected a plain folder name"),
        ({"batch_size": 1}, "batch norm needs two samples"),
        ({"threads": 0}, "threads: expected > 0 or auto"),
        ({"backend": "magic"}, "magic"),
    ],
)
def test_a_wrong_value_is_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        Run(replace(IRIS, **change), root=tmp_path)


def test_launched_processes_that_would_each_train_alone_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="devices: the launcher started 2 processes, .* say 1"):
        Run(IRIS, root=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("normalize", ["minmax", "robust", "none"])
def test_other_scalers_train_and_are_in_the_checkpoint(normalize, tmp_path):
    config = replace(IRIS, normalize=normalize, epochs=2, dropout=0.0)
    made, metrics = run(tmp_path, config)
    assert metrics["parity_max_loss_diff"] < 1e-5  # the twin has the same scaler
    model = MLPClassifier.load_from_checkpoint(tmp_path / "iris" / "best.ckpt", weights_only=True)
    x = made.data.test.tensors[0]
    torch.testing.assert_close(model.normalize(x), made.model.normalize(x))
    assert len(list(model.normalize.buffers())) == (0 if normalize == "none" else 2)


def test_an_unknown_scaler_is_named(tmp_path):
    with pytest.raises(ValueError, match="normalize: expected one of standard, minmax, robust, no"):
        Run(replace(IRIS, normalize="z"), root=tmp_path)

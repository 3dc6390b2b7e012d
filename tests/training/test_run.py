import csv
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback

import torchref
from torchref.training import Config, MLPClassifier, MLPRegressor, Run, read_checkpoint
from torchref.training.compare import read_run

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
    found = {file.name for file in folder.iterdir() if "tfevents" not in file.name}
    assert found == {  # and TensorBoard's, where it is installed
        "best.ckpt",
        "last.ckpt",
        "last.ckpt.previous",
        "config.yaml",
        "hparams.yaml",
        "metrics.json",
        "metrics.csv",
        "learning_curves.png",
    }
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert metrics["epochs"] == len(made.history.rows) == 6
    assert made.model.history == made.history.rows
    assert metrics["stop_reason"].startswith("reached max_epochs; best ")
    best = min(made.history.rows, key=lambda row: row["val_loss"])
    assert (best["val_loss"], best["epoch"]) == (metrics["best_val_loss"], metrics["best_epoch"])


def test_the_checkpoint_alone_rebuilds_the_model(tmp_path):
    made, _ = run(tmp_path)
    path = tmp_path / "iris" / "best.ckpt"
    model = MLPClassifier.load_from_checkpoint(path, weights_only=True)
    x = made.data.test.x
    assert torch.equal(model.predict_proba(x), made.model.predict_proba(x))
    assert model.hparams["classes"] == ["setosa", "versicolor", "virginica"]
    torch.testing.assert_close(model.normalize.mean, made.data.train.x.mean(0))


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
    _, metrics = run(tmp_path, resume="last")
    assert 0 <= metrics["parity_max_loss_diff"] < 1e-5


@pytest.mark.parametrize("stopped_after", [1, 3])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, stopped_after):
    whole, expected = run(tmp_path / "whole")
    run(tmp_path / "parts", replace(IRIS, epochs=stopped_after))
    made, metrics = run(tmp_path / "parts", resume="last")
    assert made.history.rows == made.model.history == whole.history.rows
    for name in set(metrics) - {"seconds", "parity_max_loss_diff", "test_opened"}:
        assert metrics[name] == expected[name]
    assert (expected["test_opened"], metrics["test_opened"]) == (1, 2)
    for a, b in zip(made.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [int(row["epoch"]) for row in rows(tmp_path / "parts")] == list(range(6))


def test_resume_without_a_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="resume: no checkpoint"):
        Run(IRIS, resume="last", root=tmp_path)


def test_resume_with_another_network(tmp_path):
    run(tmp_path, replace(IRIS, epochs=1))
    with pytest.raises(ValueError, match="resume: width was 16 in .*, got 32"):
        Run(replace(IRIS, width=32), resume="last", root=tmp_path)


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
        ({"start_from_epoch": 6}, "start_from_epoch: expected below epochs, 6, got 6"),
        ({"name": "../x"}, "name: expected a plain folder name"),
        ({"batch_size": 1}, "batch norm needs two samples"),
        ({"threads": 0}, "threads: expected > 0 or auto"),
        ({"threads": 10**11}, "threads: expected > 0 or auto"),
        ({"lr": 1e38}, r"lr: expected in \(0, 1e30\], got 1e\+38"),
        ({"lr": math.nan}, r"lr: expected in \(0, 1e30\], got nan"),
        ({"backend": "magic"}, "magic"),
    ],
)
def test_a_wrong_value_is_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        Run(replace(IRIS, **change), root=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": "0.1"}, "lr: expected float, got '0.1'"),
        ({"epochs": 1.0}, "epochs: expected int, got 1.0"),
        ({"epochs": True}, "epochs: expected int, got True"),
        ({"smote": 1}, "smote: expected bool, got 1"),
        ({"name": 3}, "name: expected str | None, got 3"),
        ({"batch_size": "half"}, "batch_size: expected Union[int, Literal['full']], got 'half'"),
        ({"categories": ["a", 1]}, "categories: expected list[str] | None, got ['a', 1]"),
        ({"augment": {"noise": "x"}}, "augment: expected dict[str, float] | None, got"),
    ],
)
def test_a_value_of_another_type_is_named(change, message):
    with pytest.raises(TypeError, match="^" + re.escape(message)):
        replace(IRIS, **change)


def test_numbers_of_numpy_are_numbers(tmp_path):
    config = replace(IRIS, lr=np.float64(0.01), epochs=np.int64(1), smote=np.bool_(False))
    made, metrics = run(tmp_path, config)
    saved = yaml.safe_load((made.path / "config.yaml").read_text())
    assert (saved["lr"], metrics["epochs"]) == (0.01, 1)


def test_a_run_is_executed_once(tmp_path):
    made, _ = run(tmp_path)
    before = {file: file.read_bytes() for file in made.path.iterdir()}
    with pytest.raises(RuntimeError, match="Run: it was executed before"):
        made.execute()
    assert {file: file.read_bytes() for file in made.path.iterdir()} == before


def test_a_run_is_not_over_before_its_picture_is_drawn(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("torchref.training.run.plot_learning_curves", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert not (tmp_path / "iris" / "metrics.json").exists()


@pytest.mark.parametrize("change", [{"lr": 0.5}, {"activation": "tanh"}])
def test_an_edited_configuration_does_not_change_a_resumed_run(change, tmp_path):
    made, _ = run(tmp_path)
    other = replace(IRIS, epochs=9, **change)
    (made.path / "config.yaml").write_text(yaml.safe_dump(asdict(other)))
    (name,) = change
    with pytest.raises(ValueError, match=rf"resume: {name} was .* in .*last.ckpt, got"):
        Run(other, resume="last", root=tmp_path)


def test_what_is_resumed_is_the_last_checkpoint_or_the_one_before(tmp_path):
    with pytest.raises(ValueError, match="resume: expected one of last, previous, got 'first'"):
        Run(IRIS, resume="first", root=tmp_path)


def test_the_backend_of_the_environment_is_the_default():
    code = "from torchref.training import Config; print(Config().backend)"
    env = os.environ | {"TORCHREF_BACKEND": "reference"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == "reference\n"


def test_a_size_of_the_world_that_is_no_number(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ValueError, match="WORLD_SIZE: expected a number, got 'two'"):
        Run(IRIS, root=tmp_path)


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
    x = made.data.test.x
    torch.testing.assert_close(model.normalize(x), made.model.normalize(x))
    assert len(list(model.normalize.buffers())) == (0 if normalize == "none" else 2)


def table(path, rows=80):
    """Two numbers and a category, some of them missing; the price follows from them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 2, generator=generator)
    lines = ["size,color,weight,price"]
    for i, (a, b) in enumerate(x.tolist()):
        color = "red" if i % 3 else "blue"
        size = "" if i % 10 == 0 else f"{a:.3f}"
        price = 100 + 10 * a * bool(size) + 5 * (color == "red") - 3 * b
        lines.append(f"{size},{color},{b:.3f},{price:.4f}")
    path.write_text("\n".join(lines))
    return f"csv:{path}"


def test_values_are_learned_from_a_table_with_categories_and_gaps(tmp_path):
    config = replace(
        IRIS, dataset=table(tmp_path / "a.csv"), missing="impute", epochs=60, lr=0.01, dropout=0.0
    )
    made, metrics = run(tmp_path, config)
    assert metrics["parity_max_loss_diff"] < 1e-5
    assert list(metrics)[:5] == ["test_mae", "test_r2", "test_rmse", "test_loss", "test_opened"]
    assert metrics["test_r2"] > 0.8
    x, y = made.data.test.x, made.data.test.y
    error = made.model.predict(x) - y  # in the price's own units
    assert error.square().mean().sqrt().item() == pytest.approx(metrics["test_rmse"], rel=1e-5)
    assert error.abs().mean().item() == pytest.approx(metrics["test_mae"], rel=1e-5)
    train = made.data.train.y
    assert made.model.scale.mean.item() == pytest.approx(train.mean().item(), rel=1e-6)
    unexplained = error.square().mean() / train.var(correction=0)
    assert metrics["test_loss"] == pytest.approx(unexplained.item(), rel=1e-4)
    again = MLPRegressor.load_from_checkpoint(tmp_path / "csv-a" / "best.ckpt", weights_only=True)
    assert torch.equal(again.predict(x), made.model.predict(x))
    assert (tmp_path / "csv-a" / "learning_curves.png").exists()


def test_the_twin_sees_a_wrong_gradient_of_a_regression(tmp_path):
    made = Run(replace(IRIS, dataset="diabetes", epochs=2), root=tmp_path)
    made.model.net[0].weight.register_hook(lambda grad: grad.roll(1, 0))
    assert made.execute()["parity_max_loss_diff"] > 1e-6


def test_texts_are_learned(tmp_path):
    config = replace(IRIS, dataset="reviews", epochs=15, augment={"replace": 0.1, "swap": 0.1})
    made, metrics = run(tmp_path, config)
    assert metrics["parity_max_loss_diff"] < 1e-5
    assert metrics["test_accuracy"] > 0.6
    again = MLPClassifier.load_from_checkpoint(
        tmp_path / "reviews" / "best.ckpt", weights_only=True
    )
    texts = ["a wonderful, warm film", "broken on arrival"]
    assert torch.equal(again.predict_proba(texts), made.model.predict_proba(texts))
    words = set(re.findall(r"\w\w+", " ".join(made.data.train.x).lower()))
    assert set(again.normalize.terms) <= words  # no word of another part


DIGITS = replace(IRIS, dataset="digits", epochs=2, batch_size=256)


def test_images_are_augmented_in_training_alone(tmp_path):
    config = replace(DIGITS, augment={"rotation": 15, "mixup": 0.2}, augment_picture=True)
    made = Run(config, root=tmp_path)
    seen = []
    made.model.normalize.register_forward_pre_hook(
        lambda module, args: seen.append((made.model.training, args[0]))
    )
    metrics = made.execute()
    assert metrics["parity_max_loss_diff"] < 1e-5  # the twin gets the same batch
    originals = {tuple(row) for row in made.dataset.x.tolist()}
    for training, x in seen:
        assert x.shape[1:] == (64,)
        unchanged = [tuple(row) in originals for row in x.tolist()]
        assert any(unchanged) != training
    assert (tmp_path / "digits" / "augmented.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("dataset", "augment"),
    [
        ("digits", {"rotation": 10, "cutout": 0.2, "mixup": 0.4}),
        ("iris", {"noise": 0.2, "shuffle": 0.1, "interpolate": 0.4}),
        ("diabetes", {"noise": 0.1, "interpolate": 0.4}),
        ("reviews", {"replace": 0.2, "delete": 0.1}),
    ],
)
def test_a_resumed_run_draws_the_same_augmentation(tmp_path, dataset, augment):
    config = replace(IRIS, dataset=dataset, epochs=3, augment=augment, batch_size=128)
    whole, _ = run(tmp_path / "whole", config)
    run(tmp_path / "parts", replace(config, epochs=1))
    made, _ = run(tmp_path / "parts", config, resume="last")
    assert made.history.rows == whole.history.rows
    plain, _ = run(tmp_path / "plain", replace(config, augment=None))
    assert plain.history.rows != whole.history.rows


def test_small_classes_are_filled_up_after_scalers_have_been_fitted(tmp_path):
    rows = [f"{i % 7 / 7},{i * 1000},{'rare' if i % 8 == 0 else 'usual'}" for i in range(120)]
    (tmp_path / "a.csv").write_text("\n".join(rows))
    plain = Run(replace(IRIS, dataset=f"csv:{tmp_path}/a.csv"), root=tmp_path)
    made = Run(replace(IRIS, dataset=f"csv:{tmp_path}/a.csv", smote=True), root=tmp_path)
    before, after = plain.data.train, made.data.train
    assert before.y.bincount().tolist() == [11, 73]
    assert after.y.bincount().tolist() == [73, 73]
    assert torch.equal(after.x[: len(before)], before.x)
    assert torch.equal(made.model.normalize.mean, plain.model.normalize.mean)
    for part in ("val", "test"):
        assert torch.equal(getattr(made.data, part).x, getattr(plain.data, part).x)
    assert after.x[:, 1].max() <= before.x[:, 1].max()
    assert made.execute()["epochs"] == 6


def test_confusing_augmentation_is_mentioned(tmp_path):
    with pytest.warns(UserWarning, match="horizontal_flip may confuse .*: a mirrored digit is no"):
        Run(replace(DIGITS, augment={"horizontal_flip": 0.5}), root=tmp_path)
    Run(replace(DIGITS, augment={"horizontal_flip": 0.0, "rotation": 9}), root=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"augment": {"rotate": 5}}, "augment, for tables: expected one of noise, .*got 'rotate'"),
        ({"augment": {"noise": -1}}, "`noise`.*got -1"),
        ({"dataset": "digits", "augment": {"swap": 5}}, "augment, for images: expected one of rot"),
        ({"dataset": "digits", "augment": {"crop": 5}}, "`crop`.*got 5"),
        ({"dataset": "reviews", "augment": {"rewrite": 5}}, "augment, for texts: expected one of"),
        ({"dataset": "diabetes", "smote": True}, "smote: expected no, for values to predict"),
        ({"dataset": "digits", "smote": True}, "smote: expected no, for what is no table"),
        ({"dataset": "reviews", "normalize": "minmax"}, "normalize: expected auto, for texts"),
        ({"normalize": "image"}, "normalize: expected another scaler, for a table"),
        ({"augment_picture": True}, "augment_picture: expected --augment and images"),
        ({"split": "luck"}, "split: expected one of auto, stratified"),
        ({"split": "grouped"}, "split: grouped needs `groups`; --group"),
        ({"dataset": "diabetes", "split": "stratified"}, "split: expected random, for values"),
        ({"ratios": [0.5, 0.5]}, "ratios: expected three parts"),
        ({"ratios": [0.5, 0.2, 0.2]}, "with sum 1"),
        ({"ratios": [-1, 1, 1]}, "ratios: expected positive numbers with sum 1"),
        ({"dataset": "diabetes", "augment": {"shuffle": 0.1}}, "expected integer labels"),
        ({"gap": 3}, "gap: expected 0 but for a chronological split, got 3"),
    ],
)
def test_wrong_data_options_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        Run(replace(IRIS, **change), root=tmp_path)


def test_resume_with_other_data(tmp_path):
    run(tmp_path, replace(IRIS, epochs=1))
    for change in ({"ratios": [0.6, 0.2, 0.2]}, {"augment": {"noise": 0.1}}):
        with pytest.raises(ValueError, match="resume: (ratios|augment) was None"):
            Run(replace(IRIS, **change), resume="last", root=tmp_path)


def test_without_the_test_part(tmp_path):
    made = Run(IRIS, root=tmp_path)
    metrics = made.execute(test=False)
    assert made.data.test_opened == metrics["test_opened"] == 0
    assert not [n for n in metrics if n.startswith("test_") and n != "test_opened"]
    _, metrics = run(tmp_path, replace(IRIS, epochs=7), resume="last")
    assert metrics["test_opened"] == 1  # the first opening, whatever ran before


def test_an_unknown_scaler_is_named(tmp_path):
    with pytest.raises(ValueError, match="normalize: expected one of auto, standard, minmax, r"):
        Run(replace(IRIS, normalize="z"), root=tmp_path)


def test_other_data_under_the_same_name_are_not_resumed(tmp_path):
    path = tmp_path / "a.csv"
    rows = [f"{i % 7},{i % 5},{'p' if i % 2 else 'q'}" for i in range(60)]
    config = replace(IRIS, dataset=f"csv:{path}", epochs=1)
    path.write_text("\n".join(["f,g,y", *rows]))
    run(tmp_path, config)
    changes = {
        "a class": "\n".join(["f,g,y", *rows]).replace("p", "z"),
        "a column": "\n".join(["g,f,y", *rows]),
        "rows": "\n".join(["f,g,y", *rows, *rows]),
        "a number": "\n".join(["f,g,y", "9,9,p", *rows[1:]]),
    }
    for text in changes.values():
        path.write_text(text)
        with pytest.raises(ValueError, match="resume: the samples, targets or names of csv:.* are"):
            Run(replace(config, epochs=2), resume="last", root=tmp_path)


@pytest.mark.parametrize("text", ["[]", '{"test_opened": null}', '{"test_op'])
def test_damaged_metrics_are_named(tmp_path, text):
    run(tmp_path, replace(IRIS, epochs=1))
    (tmp_path / "iris" / "metrics.json").write_text(text)
    with pytest.raises(ValueError, match=r"resume: .*metrics.json is damaged"):
        Run(IRIS, resume="last", root=tmp_path)


@pytest.mark.parametrize("precision", ["64", "16-true"])
@pytest.mark.parametrize("dataset", ["iris", "diabetes", "reviews"])
def test_a_model_of_another_precision_predicts(tmp_path, precision, dataset):
    config = replace(IRIS, dataset=dataset, precision=precision, epochs=2, batch_norm=False)
    made, metrics = run(tmp_path, config)
    model = MLPRegressor if dataset == "diabetes" else MLPClassifier
    again = model.load_from_checkpoint(tmp_path / dataset / "best.ckpt", weights_only=True)
    x = made.dataset.x[:4]
    torch.testing.assert_close(
        again.predict(x).double(), made.model.predict(x).double(), rtol=2e-2, atol=2e-2
    )
    if dataset == "diabetes":
        assert 10 < metrics["test_rmse"] < 1000


def test_r2_of_targets_far_from_0(tmp_path):
    """A price of 1.7 million, give or take 4: sums of squares in float32 would cancel."""
    x = torch.arange(200) % 10
    noise = (torch.arange(200) * 7 % 11 - 5) / 5
    rows = [
        f"{a},{1_700_000 + 4 * a + b:.2f}" for a, b in zip(x.tolist(), noise.tolist(), strict=True)
    ]
    (tmp_path / "a.csv").write_text("\n".join(rows))
    made, metrics = run(tmp_path, replace(IRIS, dataset=f"csv:{tmp_path}/a.csv", epochs=40))
    predicted, y = made.model.predict(made.data.test.x).double(), made.data.test.y.double()
    expected = 1 - (predicted - y).square().sum() / (y - y.mean()).square().sum()
    assert metrics["test_r2"] == pytest.approx(expected.item(), abs=0.02)
    assert metrics["test_r2"] < 1


def test_a_part_of_one_sample_has_no_r2(tmp_path):
    (tmp_path / "a.csv").write_text("\n".join(f"{i},{i / 2}" for i in range(6)))
    _, metrics = run(tmp_path, replace(IRIS, dataset=f"csv:{tmp_path}/a.csv", epochs=2))
    assert metrics["test_r2"] is None
    assert metrics["test_rmse"] >= 0


def test_columns_of_groups_and_times_decide_the_split(tmp_path):
    rows = [f"{i % 7},{i % 13},{60 - i},{'pq'[i % 2]}" for i in range(60)]
    (tmp_path / "a.csv").write_text("\n".join(["f,patient,day,y", *rows]))
    config = replace(IRIS, dataset=f"csv:{tmp_path}/a.csv")
    made = Run(replace(config, group="patient"), root=tmp_path)
    of = [set(made.dataset.groups[part].tolist()) for part in made.data.parts]
    assert sum(map(len, of)) == 13
    made = Run(replace(config, time="day"), root=tmp_path)
    train, val, test = (made.dataset.times[part] for part in made.data.parts)
    assert train.max() < val.min()
    assert val.max() < test.min()
    for change, message in (
        ({"split": "random", "group": "patient"}, "split: expected grouped, by the column"),
        ({"group": "patient", "time": "day"}, "split: expected grouped or chronological"),
    ):
        with pytest.raises(ValueError, match=message):
            Run(replace(config, **change), root=tmp_path)


def test_threads_are_for_a_run_not_for_good(tmp_path):
    count = torch.get_num_threads()
    Run(IRIS, root=tmp_path)
    assert torch.get_num_threads() == 1
    Run(replace(DIGITS, width=2048), root=tmp_path)
    assert torch.get_num_threads() >= min(count, 2)


def test_a_resumed_run_that_stops_leaves_nothing_of_the_earlier_result(tmp_path, monkeypatch):
    _, before = run(tmp_path, replace(IRIS, epochs=2))
    folder = tmp_path / "iris"
    (folder / "report.html").write_text("of two epochs")
    made = Run(IRIS, resume="last", root=tmp_path)
    monkeypatch.setattr(made.trainer, "fit", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made.execute()
    assert not (folder / "report.html").exists()
    assert not (folder / "learning_curves.png").exists()
    left = json.loads((folder / "metrics.json").read_text())
    assert left == {"test_opened": 1, "seconds": before["seconds"], "unfinished": True}
    with pytest.raises(FileNotFoundError, match="no finished run"):
        read_run(folder)
    _, after = run(tmp_path, resume="last")
    assert after["test_opened"] == 2
    assert after["seconds"] > before["seconds"]


class Spoil(Callback):
    """A batch of the third epoch that is not finite."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (2, 3):
            batch[0][5] = math.nan


def test_a_run_that_meets_nan_says_where_and_keeps_the_last_good_weights(tmp_path):
    made, metrics = run(tmp_path, callbacks=[Spoil()])
    why = "the loss became NaN at epoch 2, batch 3: the batch is not finite, samples 5"
    assert metrics["stop_reason"] == why
    assert metrics["epochs"] == 3
    assert math.isnan(made.history.rows[-1]["train_loss"])
    assert math.isfinite(metrics["best_val_loss"])
    for name in ("best.ckpt", "last.ckpt"):
        saved = read_checkpoint(tmp_path / "iris" / name)["state_dict"]
        assert all(x.isfinite().all() for x in saved.values())
    with pytest.raises(ValueError, match=rf"resume: .*iris had stopped: {why}"):
        Run(replace(IRIS, epochs=9), resume="last", root=tmp_path)
    metrics_file = tmp_path / "iris" / "metrics.json"
    metrics_file.unlink()  # as if it had been killed before the end
    again = Run(IRIS, resume="last", root=tmp_path, progress=False).execute()
    assert {**again, "seconds": 0} == {**metrics, "seconds": 0}

import csv
import json
import math
import os
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from killing import full_disk
from sklearn.metrics import accuracy_score
from yaml.representer import RepresenterError

from torchref.data import kfold, load_dataset
from torchref.training import Config, MLPClassifier, Run, cross_validate
from torchref.training.cross_validate import CrossValidation

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),  # Lightning on torch's newer pytree
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),  # a fold that runs again
]

IRIS = Config(dataset="iris", epochs=2, batch_size=16, width=16, accelerator="cpu", lr=0.02)


@pytest.fixture(autouse=True)
def _threads():
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A cross-validation that ran, its result, and the rows that it reported."""
    cv, rows = CrossValidation(IRIS, folds=3, root=tmp_path_factory.mktemp("cv")), []
    return cv, cv.execute(report=rows.append), rows


@pytest.fixture
def planted(monkeypatch):
    """``planted([...])`` makes each fold's accuracy one of the list, without training."""

    def plant(scores):
        left = iter(scores)

        def run(config, root, parts, dataset=None):
            if (score := next(left)) is KeyboardInterrupt:
                raise score
            metrics = dict.fromkeys(("test_accuracy", "test_f1", "test_loss"), score)
            metrics |= {"test_opened": 1, "best_val_loss": 0.5}
            metrics |= {"best_epoch": 1, "epochs": 2, "seconds": 0.1}
            (root / config.name).mkdir()
            (root / config.name / "metrics.json").write_text(json.dumps(metrics))
            return metrics

        monkeypatch.setattr(cross_validate, "_run", run)

    return plant


def table(cv):
    with open(cv.path / "folds.csv", newline="") as file:
        return list(csv.DictReader(file))


def write_table(path, days, groups=None):
    """A csv of 60 rows, of two classes."""
    groups = ["g"] * 60 if groups is None else groups
    rows = [f"{i * 7 % 11},{i % 5},{days[i]},{groups[i]},{'ab'[i % 2]}" for i in range(60)]
    path.write_text("\n".join(["u,v,day,who,label", *rows]) + "\n")
    return replace(IRIS, dataset=f"csv:{path}", drop=["who", "day"], batch_size=8)


# Who sees which sample.


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(2, 8),
    st.integers(1, 3),
    st.integers(0, 99),
    st.sampled_from(["stratified", "plain"]),
)
def test_each_sample_but_the_held_out_is_in_one_fold_of_each_repeat(folds, repeats, seed, method):
    config = replace(IRIS, seed=seed)
    cv = CrossValidation(config, folds, method, repeats)
    held_out = Run(replace(config, parity=False)).data.parts[2]
    assert torch.equal(cv.held_out, held_out)
    rest = sorted(set(range(150)) - set(held_out.tolist()))
    y = cv.dataset.y[rest]
    pairs = kfold.folds(y, folds, method=method, repeats=repeats, seed=seed)
    for (*_, fold), (_, expected) in zip(cv.parts, pairs, strict=True):
        assert torch.equal(fold, torch.tensor(rest)[expected])
    for r in range(repeats):
        in_repeat = cv.parts[r * folds : (r + 1) * folds]
        assert torch.cat([fold for *_, fold in in_repeat]).sort().values.tolist() == rest
    for parts in cv.parts:
        assert torch.cat(parts).sort().values.tolist() == rest


def test_repeats_share_the_samples_out_anew():
    cv = CrossValidation(IRIS, folds=3, repeats=2)
    first, second = ({tuple(fold.tolist()) for *_, fold in cv.parts[i : i + 3]} for i in (0, 3))
    assert not first & second


def test_every_part_of_a_stratified_fold_has_the_proportions_of_the_classes():
    cv = CrossValidation(IRIS, folds=5)
    counts = torch.stack(
        [torch.stack([cv.dataset.y[part].bincount(minlength=3) for part in p]) for p in cv.parts]
    )  # (folds, parts, classes)
    assert (counts[:, 2].amax(0) - counts[:, 2].amin(0) <= 1).all()
    assert (counts.amax(2) - counts.amin(2) <= 2).all()
    assert (counts[:, 1:].amax(2) - counts[:, 1:].amin(2) <= 1).all()


def test_the_inner_validation_part_has_its_share_of_the_others():
    cv = CrossValidation(replace(IRIS, ratios=[0.6, 0.2, 0.2]), folds=4)
    assert [tuple(map(len, parts)) for parts in cv.parts] == [(68, 22, 30)] * 4
    assert len(cv.held_out) == 30


@pytest.mark.parametrize("gap", [0, 2])
def test_folds_in_time_come_after_what_their_models_saw(tmp_path, gap):
    days = [i * 37 % 60 for i in range(60)]  # the rows are in another order
    config = write_table(tmp_path / "t.csv", days)
    config = replace(config, time="day", drop=["who"], gap=gap)
    cv = CrossValidation(config, folds=3, method="time")
    assert cv.config.split == "chronological"
    day = torch.tensor(days)
    assert day[cv.held_out].min() > max(day[torch.cat(parts)].max() for parts in cv.parts) + gap
    for train, val, fold in cv.parts:
        assert day[train].max() + gap < day[val].min()
        assert day[val].max() + gap < day[fold].min()
    ends = [day[fold].max() for *_, fold in cv.parts]
    assert ends == sorted(ends)


def test_rows_are_in_the_order_of_time_by_default(tmp_path):
    cv = CrossValidation(write_table(tmp_path / "t.csv", range(60)), folds=3, method="time")
    for train, val, fold in cv.parts:
        assert train.max() < val.min() <= val.max() < fold.min()


def test_no_group_is_in_two_parts(tmp_path):
    who = [f"p{i // 2 % 15}" for i in range(60)]
    config = replace(write_table(tmp_path / "t.csv", range(60), who), group="who", drop=["day"])
    cv = CrossValidation(config, folds=3, method="grouped")
    assert cv.config.split == "grouped"
    for parts in cv.parts:
        groups = [{who[i] for i in part.tolist()} for part in (*parts, cv.held_out)]
        assert sum(map(len, groups)) == len(set.union(*groups)) == 15


@pytest.mark.parametrize(
    ("dataset", "split", "method"),
    [
        ("iris", "auto", "stratified"),
        ("iris", "stratified", "stratified"),
        ("iris", "random", "plain"),
        ("iris", "chronological", "time"),
        ("diabetes", "auto", "plain"),
    ],
)
def test_the_method_follows_the_split(dataset, split, method):
    config = replace(IRIS, dataset=dataset, split=split)
    assert CrossValidation(config, folds=2).method == method


# What a fold is.


def test_scalers_know_the_training_part_of_the_fold_alone(done):
    cv, _, _ = done
    for number, (train, _, _) in enumerate(cv.parts, 1):
        path = cv.path / f"fold-{number}" / "best.ckpt"
        scale = MLPClassifier.load_from_checkpoint(path, weights_only=True).normalize
        x = cv.dataset.x[train]
        torch.testing.assert_close(scale.mean, x.mean(0), rtol=1e-6, atol=0)
        torch.testing.assert_close(scale.std, x.std(0, correction=0), rtol=1e-5, atol=0)


def test_the_score_of_a_fold_is_of_its_samples(done):
    cv, result, _ = done
    for number, (_, val, fold) in enumerate(cv.parts, 1):
        path = cv.path / f"fold-{number}" / "best.ckpt"
        model = MLPClassifier.load_from_checkpoint(path, weights_only=True)
        scores = [
            accuracy_score(cv.dataset.y[part], model.predict_proba(cv.dataset.x[part]).argmax(-1))
            for part in (fold, val)
        ]
        assert result["scores"]["test_accuracy"]["values"][number - 1] == pytest.approx(scores[0])
        metrics = json.loads((cv.path / f"fold-{number}" / "metrics.json").read_text())
        assert metrics["test_opened"] == 1


def test_the_twin_is_off_and_a_fold_has_one_thread_unless_told_otherwise():
    config = CrossValidation(IRIS, folds=2).config
    assert (config.parity, config.threads) == (False, 1)
    assert CrossValidation(replace(IRIS, threads=2), folds=2).config.threads == 2


def test_nothing_is_printed(tmp_path, capfd):
    CrossValidation(replace(IRIS, epochs=1), folds=2, root=tmp_path).execute()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "change", [{"smote": True}, {"augment": {"noise": 0.1}}, {"dataset": "diabetes"}]
)
def test_other_configurations(tmp_path, change):
    config = replace(IRIS, **{"dataset": "wine", "epochs": 1, "name": "x", **change})
    result = CrossValidation(config, folds=2, root=tmp_path).execute()
    expected = "test_rmse" if change.get("dataset") else "test_accuracy"
    assert expected in result["scores"]
    assert (tmp_path / "x" / "folds.csv").exists()


# What is left of it.


def test_the_files(done):
    cv, result, rows = done
    assert cv.path.name == "cv-iris"
    assert {file.name for file in cv.path.iterdir()} == {
        "cross_validation.yaml",
        "cross_validation.json",
        "fingerprint.txt",
        "folds.csv",
        "fold-1",
        "fold-2",
        "fold-3",
    }
    assert json.loads((cv.path / "cross_validation.json").read_text()) == result
    assert (result["folds"], result["method"], result["repeats"]) == (3, "stratified", 1)
    assert (result["samples"], result["test_samples"]) == (128, 22)
    assert [{name: str(value) for name, value in row.items()} for row in rows] == table(cv)
    assert [row["fold"] for row in rows] == [1, 2, 3]
    assert list(result["scores"]) == ["test_accuracy", "test_f1", "test_loss"]
    for name, score in result["scores"].items():
        values = [float(row[name]) for row in table(cv)]
        assert score["values"] == values
        assert score["mean"] == pytest.approx(sum(values) / 3)


def test_mean_deviation_and_interval_by_hand(tmp_path, planted):
    planted([0.5, 0.75, 0.75, 1.0])
    cv = CrossValidation(IRIS, folds=4, root=tmp_path)  # 32 samples each, so that 1/3 is exact
    found = cv.execute()["scores"]["test_accuracy"]
    assert found["mean"] == 0.75
    assert found["std"] == pytest.approx(math.sqrt(0.125 / 3))
    half = 3.182446305284263 * found["std"] * math.sqrt(1 / 4 + 1 / 3)  # Student's t, 3 degrees
    assert (found["low"], found["high"]) == pytest.approx((0.75 - half, 0.75 + half))
    assert [float(row["test_accuracy"]) for row in table(cv)] == [0.5, 0.75, 0.75, 1.0]


def test_repeats_in_the_files(tmp_path, planted):
    planted([0.5] * 6)
    cv = CrossValidation(IRIS, folds=3, repeats=2, root=tmp_path)
    cv.execute()
    assert [(row["fold"], row["repeat"]) for row in table(cv)] == [
        (str(i + 1), "1" if i < 3 else "2") for i in range(6)
    ]


def test_a_score_that_is_not_finite_is_null(tmp_path, planted):
    planted([0.5, None])
    cv = CrossValidation(IRIS, folds=2, root=tmp_path)
    found = cv.execute()["scores"]["test_accuracy"]
    assert found == {"values": [0.5, None], **dict.fromkeys(("mean", "std", "low", "high"))}


def test_processes_change_no_result(done, tmp_path):
    cv, result, _ = done
    reported = []
    twin = CrossValidation(IRIS, folds=3, root=tmp_path)
    assert twin.execute(jobs=2, report=reported.append) == result
    assert sorted(row["fold"] for row in reported) == [1, 2, 3]
    assert [{**a, "seconds": 0} for a in table(twin)] == [{**a, "seconds": 0} for a in table(cv)]


# Stopped and continued.


def test_a_resumed_one_equals_an_uninterrupted_one(done, tmp_path):
    _, expected, _ = done
    cv = CrossValidation(IRIS, folds=3, root=tmp_path)
    cv.execute()
    (cv.path / "cross_validation.json").unlink()
    (cv.path / "fold-2" / "metrics.json").unlink()  # killed while it trained
    (cv.path / "fold-3" / "metrics.json").write_text("")  # killed while it wrote
    kept, again = (cv.path / f"fold-{i}" / "best.ckpt" for i in (1, 2))
    times = kept.stat().st_mtime_ns, again.stat().st_mtime_ns
    rows = []
    resumed = CrossValidation(IRIS, folds=3, root=tmp_path)
    assert resumed.execute(resume=True, report=rows.append) == expected
    assert [row["fold"] for row in rows] == [1, 2, 3]
    assert kept.stat().st_mtime_ns == times[0]
    assert again.stat().st_mtime_ns > times[1]
    assert len(table(cv)) == 3


def test_folds_of_an_older_one_are_not_taken_for_ones_of_this(tmp_path, planted):
    planted([0.1] * 4)
    CrossValidation(IRIS, folds=4, root=tmp_path).execute()
    (tmp_path / "cv-iris" / "fold-4" / "note.txt").write_text("mine")
    changed = CrossValidation(replace(IRIS, lr=0.03), folds=3, root=tmp_path)
    planted([0.5, KeyboardInterrupt, 0.5, 0.5])
    with pytest.raises(KeyboardInterrupt):
        changed.execute()
    assert not (changed.path / "folds.csv").exists()
    assert changed.execute(resume=True)["scores"]["test_accuracy"]["values"] == [0.5] * 3
    names = {path.name for path in changed.path.glob("fold-*")}
    assert names == {"fold-1", "fold-2", "fold-3", "fold-4"}  # the last holds the note alone
    assert [path.name for path in (changed.path / "fold-4").iterdir()] == ["note.txt"]


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"lr": 0.5}, {}, "resume: lr was 0.02 in .*cv-iris, got 0.5"),
        ({"epochs": 9}, {}, "resume: epochs was 2 in .*, got 9"),
        ({}, {"folds": 3}, "resume: folds was 2 in .*, got 3"),
        ({}, {"method": "plain"}, "resume: method was 'stratified' in .*, got 'plain'"),
        ({}, {"repeats": 2}, "resume: repeats was 1 in .*, got 2"),
    ],
)
def test_another_configuration_is_not_resumed(tmp_path, planted, change, arguments, message):
    planted([0.5] * 2)
    CrossValidation(IRIS, folds=2, root=tmp_path).execute()
    other = CrossValidation(replace(IRIS, **change), root=tmp_path, **{"folds": 2, **arguments})
    with pytest.raises(ValueError, match=message):
        other.execute(resume=True)


def test_other_data_are_not_resumed(tmp_path, planted):
    planted([0.5] * 4)
    table = tmp_path / "t.csv"
    config = write_table(table, range(60))
    path = CrossValidation(config, folds=2, root=tmp_path).path
    CrossValidation(config, folds=2, root=tmp_path).execute()
    assert len(CrossValidation(config, folds=2, root=tmp_path).execute(resume=True)["scores"]) == 3
    shutil.rmtree(path / "fold-2")  # it is left to be run
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0], "99,0,0,g,a", *lines[2:]]) + "\n")
    changed = CrossValidation(config, folds=2, root=tmp_path)
    message = (
        "resume: the samples, targets or names of csv:.*t.csv are other than those of .*cv-csv-t "
        rf"\(fingerprint [0-9a-f]{{12}}, now {changed.dataset.fingerprint}\)"
    )
    with pytest.raises(ValueError, match=message):
        changed.execute(resume=True)
    assert {file: file.read_bytes() for file in before} == before
    (path / "fingerprint.txt").unlink()  # as an earlier version left it
    assert changed.execute(resume=True)["folds"] == 2


def test_the_folder_may_have_been_named_since(tmp_path, planted):
    planted([0.5] * 2)
    CrossValidation(IRIS, folds=2, root=tmp_path).execute()
    named = CrossValidation(replace(IRIS, name="cv-iris"), folds=2, root=tmp_path)
    assert named.execute(resume=True)["folds"] == 2


class Word(str):
    """Text that YAML has no form for."""


def test_nothing_is_cleared_for_what_cannot_be_written(tmp_path, planted):
    planted([0.5] * 2)
    path = CrossValidation(IRIS, folds=2, root=tmp_path).path
    CrossValidation(IRIS, folds=2, root=tmp_path).execute()
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with pytest.raises(RepresenterError):
        CrossValidation(replace(IRIS, init=Word("he")), folds=2, root=tmp_path).execute()
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


WHOLE = {
    "epochs": 2,
    "best_epoch": 1,
    "best_val_loss": 0.5,
    "seconds": 0.1,
    **dict.fromkeys(("test_accuracy", "test_f1", "test_loss"), 0.5),
}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "epochs is 'missing'"),
        ("[]", "expected names and values"),
        ("{}".encode("utf-16"), "can't decode byte 0xff"),
        ("[" * 100_000, "recursion"),
        (json.dumps(WHOLE | {"test_f1": "high"}), "test_f1 is 'high'"),
        (json.dumps(WHOLE | {"test_loss": math.nan}), "test_loss is nan"),
        (json.dumps(WHOLE | {"test_accuracy": 1}), "test_accuracy is 1"),
        (json.dumps(WHOLE | {"epochs": "x"}), "epochs is 'x'"),
        (json.dumps(WHOLE | {"epochs": True}), "epochs is True"),
        (json.dumps(WHOLE | {"epochs": None}), "epochs is None"),
        (json.dumps(WHOLE | {"best_epoch": 1.0}), "best_epoch is 1.0"),
        (json.dumps(WHOLE | {"seconds": []}), "seconds is []"),
        (json.dumps({k: v for k, v in WHOLE.items() if k != "test_f1"}), "test_f1 is 'missing'"),
    ],
)
def test_a_damaged_fold_is_named(tmp_path, planted, content, message):
    planted([0.5] * 2)
    CrossValidation(IRIS, folds=2, root=tmp_path).execute()
    path = tmp_path / "cv-iris" / "fold-2" / "metrics.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    rows = []
    with pytest.raises(ValueError, match="^resume: .*fold-2.metrics.json is damaged: ") as caught:
        CrossValidation(IRIS, folds=2, root=tmp_path).execute(resume=True, report=rows.append)
    assert message in str(caught.value)
    assert rows == []


def test_a_fold_that_is_a_pipe_is_refused(tmp_path, planted):
    planted([0.5] * 2)
    CrossValidation(IRIS, folds=2, root=tmp_path).execute()
    path = tmp_path / "cv-iris" / "fold-2" / "metrics.json"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"fold-2.metrics.json.*: expected a file, got a pipe"):
        CrossValidation(IRIS, folds=2, root=tmp_path).execute(resume=True)


def test_nothing_to_resume(tmp_path):
    with pytest.raises(FileNotFoundError, match="resume: no cross-validation in .*cv-iris"):
        CrossValidation(IRIS, folds=2, root=tmp_path).execute(resume=True)


def test_a_second_one_of_a_name_does_not_spoil_the_first(tmp_path, planted):
    planted([0.5, 0.75])
    first = CrossValidation(IRIS, folds=2, root=tmp_path)

    def second(row):
        for resume in (False, True):
            with pytest.raises(OSError, match="another cross-validation is writing to it; --name"):
                CrossValidation(IRIS, folds=2, root=tmp_path).execute(resume=resume)

    assert first.execute(report=second)["scores"]["test_accuracy"]["values"] == [0.5, 0.75]
    assert first.execute(resume=True)["folds"] == 2  # the folder is free again


# 100 bytes are less than any of them, 1000 more than a table of two folds and less than all that
# came of them.
@pytest.mark.parametrize(("size", "file"), [(100, "folds.csv"), (1000, "cross_validation.json")])
def test_a_full_disk_leaves_the_last_results(tmp_path, planted, size, file):
    planted([0.5] * 2)
    cv = CrossValidation(IRIS, folds=2, root=tmp_path)
    cv.execute()
    before = (cv.path / file).read_bytes()
    with full_disk(size), pytest.raises(OSError, match=rf"File too large: .*{file}'"):
        cv.execute(resume=True)
    assert (cv.path / file).read_bytes() == before


def test_a_full_disk_leaves_no_part_of_the_configuration(tmp_path):
    cv = CrossValidation(IRIS, folds=2, root=tmp_path)
    name = "cross_validation.yaml"
    with full_disk(100), pytest.raises(OSError, match=rf"File too large: .*{name}'"):
        cv.execute()
    assert [path.name for path in cv.path.iterdir()] == ["fingerprint.txt"]


# Errors.


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({}, {"folds": 1}, "expected `k` from 2 to the 128 samples, got 1"),
        ({}, {"folds": 43}, "at least 43 samples of each class"),
        ({}, {"folds": 129, "method": "plain"}, "expected `k` from 2 to the 128 samples, got 129"),
        ({}, {"repeats": 0}, "expected `repeats` in .1, 4294967296., got 0"),
        ({}, {"method": "magic"}, "method: expected one of auto, plain, stratified, time, group"),
        ({}, {"method": "time", "repeats": 2}, "expected `repeats` 1 for method 'time'"),
        (
            {},
            {"method": "time", "folds": 126},
            "fold 1: chronological_split: expected at least one",
        ),
        ({}, {"method": "grouped"}, "split: grouped needs `groups`"),
        ({"split": "random"}, {"method": "time"}, "method, for split random: .* got 'time'"),
        ({"split": "chronological"}, {"method": "plain"}, "one of auto, time, got 'plain'"),
        ({"dataset": "diabetes"}, {"method": "stratified"}, "method, for values: expected one of"),
        ({"gap": 3}, {}, "gap: expected 0 but for a chronological split"),
        ({"lr": -1.0}, {}, r"lr: expected in \(0, 1e30\]"),
        ({"devices": 2, "strategy": "ddp"}, {}, "devices: expected one process for a fold, got 2"),
        ({"name": "../x"}, {}, "name: expected a plain folder name"),
    ],
)
def test_a_wrong_value_is_named_and_nothing_written(tmp_path, change, arguments, message):
    with pytest.raises(ValueError, match=message):
        CrossValidation(replace(IRIS, **change), root=tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


def test_fewer_than_one_job(tmp_path):
    with pytest.raises(ValueError, match="jobs: expected >= 1, got 0"):
        CrossValidation(IRIS, folds=2, root=tmp_path).execute(jobs=0)
    assert not list(tmp_path.iterdir())


def test_the_data_are_not_changed(done):
    cv, _, _ = done
    assert torch.equal(cv.dataset.x, load_dataset("iris").x)

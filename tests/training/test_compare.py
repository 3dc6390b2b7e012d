import csv
import json

import pytest
import yaml

from torchref.diagnostics.drawing import new_figure
from torchref.training import compare as module
from torchref.training.compare import compare, plot_runs, read_run


def write_run(path, config, metrics, csv=None):
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    (path / "metrics.json").write_text(json.dumps(metrics))
    lines = "epoch,step,train_loss,val_loss\n0,9,,2.0\n0,9,1.5,\n1,19,,1.0\n1,19,0.5,\n"
    (path / "metrics.csv").write_text(lines if csv is None else csv)
    return path


@pytest.fixture
def runs(tmp_path):
    a = write_run(tmp_path / "a", {"lr": 0.1, "width": 8, "name": "a"}, {"test_accuracy": 0.9})
    b = write_run(
        tmp_path / "b",
        {"lr": 0.2, "width": 8, "name": "b", "gap": 3},
        {"test_accuracy": None, "seconds": 1.5, "versions": {"torch": "2"}, "seed": 1},
    )
    return a, b


def test_what_differs_and_what_came_of_it(runs):
    assert compare([read_run(path) for path in runs]) == [
        ["", "a", "b"],
        ["lr", "0.1", "0.2"],
        ["gap", "", "3"],
        ["test_accuracy", "0.9", ""],
        ["seconds", "", "1.5"],
    ]


def test_an_epoch_is_one_row_whose_lines_belong_together(runs):
    assert read_run(runs[0]).rows == [
        {"epoch": 0, "step": 9, "train_loss": 1.5, "val_loss": 2.0},
        {"epoch": 1, "step": 19, "train_loss": 0.5, "val_loss": 1.0},
    ]


def test_a_picture(runs, tmp_path):
    plot_runs([read_run(path) for path in runs], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_a_run_without_rows_is_drawn_without_points(tmp_path, monkeypatch):
    """No style takes the place of the data that are not there, nor a folder's name that of TeX."""
    made = []
    monkeypatch.setattr(module, "new_figure", lambda size: made.append(new_figure(size)) or made[0])
    name = "cost$^$"  # no formula of TeX
    run = write_run(tmp_path / name, {}, {}, csv="epoch,step,train_loss,val_loss\n")
    plot_runs([read_run(run)], tmp_path / "a.png")
    (_, axes), *_ = made
    assert [line.get_xydata().tolist() for line in axes.lines] == [[], []]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [name]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("metrics.json", "{", "a.metrics.json is damaged: Expecting property name"),
        ("metrics.json", "[]", "a.metrics.json is damaged: expected names and values"),
        ("metrics.json", "[" * 100_000, "a.metrics.json is damaged: maximum recursion depth"),
        ("config.yaml", "a: [", "a.config.yaml is damaged: while parsing"),
        (
            "config.yaml",
            "!!python/object/apply:os.system [true]",
            "a.config.yaml is damaged: could not determine",
        ),
        ("metrics.csv", "epoch,val_loss\n0,x\n", "a.metrics.csv is damaged: could not convert"),
        (
            "metrics.csv",
            "epoch,val_loss\n0,1.0,5,6\n",
            "a.metrics.csv is damaged: line 2 has more cells than the header",
        ),
    ],
)
def test_a_damaged_run_is_named(runs, file, text, message):
    (runs[0] / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_run(runs[0])


def test_a_cell_beyond_the_limit_of_the_process_is_named(runs):
    (runs[0] / "metrics.csv").write_text(f"epoch\n{'1' * 200}\n")
    limit = csv.field_size_limit(100)
    try:
        with pytest.raises(ValueError, match=r"a.metrics.csv is damaged: field larger"):
            read_run(runs[0])
    finally:
        csv.field_size_limit(limit)


def test_an_unfinished_run_is_named(runs):
    (runs[0] / "metrics.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"a: no finished run \(metrics.json is missing\)"):
        read_run(runs[0])

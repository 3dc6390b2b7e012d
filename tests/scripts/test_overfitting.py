import importlib.util
import os
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "overfitting.py"
SPEC = importlib.util.spec_from_file_location("overfitting_script", SCRIPT)
overfitting = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(overfitting)


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def rows(out):
    """(size, training error, validation error) of the printed table."""
    cells = [line.split() for line in out.splitlines()[1:-1]]
    return [(int(size), float(train), float(val)) for size, train, val in cells]


def test_a_large_layer_learns_its_samples_by_heart(capsys):
    overfitting.main(
        ["--sizes", "1", "3", "50", "--seeds", "2", "--samples", "60", "--epochs", "600"]
    )
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "hidden size  train error  validation error"
    (_, train_1, val_1), (_, train_3, val_3), (size, train_50, val_50) = rows(out)
    assert size == 50
    assert train_1 > train_3 > train_50
    assert train_50 < 0.03
    assert val_50 > val_3
    assert val_50 > train_50 + 0.1
    assert val_1 > 0.1
    assert out.splitlines()[-1] == ("files        runs/overfitting/ (boundaries.png, errors.png)")
    for name in ("boundaries.png", "errors.png"):
        assert Path("runs/overfitting", name).stat().st_size > 10_000


def test_validation_points_are_others(monkeypatch):
    drawn = []
    real = overfitting.moons
    monkeypatch.setattr(
        overfitting, "moons", lambda *args, **kw: drawn.append(real(*args, **kw)) or drawn[-1]
    )
    samples = overfitting.VALIDATION  # as many: the same seed would draw the same points
    one = overfitting.train(2, samples, 0.3, seed=3, epochs=1)
    (x, _), (x_val, y_val) = drawn
    assert (len(x), len(x_val)) == (samples, samples)
    assert torch.equal(one.x, x)
    assert not (x_val[:, None] == x).all(-1).any()
    assert one.val_error == overfitting.error(one.net, x_val, y_val)


def test_the_same_seed_trains_the_same(capsys):
    arguments = ["--sizes", "2", "--seeds", "1", "--epochs", "5", "--samples", "8"]
    overfitting.main(arguments)
    first = capsys.readouterr().out
    overfitting.main([*arguments, "--folder", "other"])
    assert rows(capsys.readouterr().out) == rows(first)
    assert Path("runs/other/errors.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "0"], "sizes: expected > 0 and <= 10000, got [0]"),
        (["--sizes", "two"], "sizes"),
        (["--samples", "3"], "samples: expected >= 4 and <= 100000, got 3"),
        (["--sizes", "2", "1" + "0" * 20], "sizes: expected > 0 and <= 10000, got [2, 1000"),
        (["--samples", "1" + "0" * 20], "samples: expected >= 4 and <= 100000, got 1000"),
        (["--noise", "-1"], "noise: expected >= 0 and <= 1000, got -1.0"),
        (["--noise", "1e300"], "noise: expected >= 0 and <= 1000, got 1e+300"),
        (["--noise", "nan"], "noise: expected float, got 'nan'"),
        (["--seeds", "0"], "seeds: expected >= 1, got 0"),
        (["--epochs", "0"], "epochs: expected > 0, got 0"),
        (["--epochs", "many"], "epochs: expected int, got 'many'"),
        (["--folder", "../up"], "folder: expected a plain folder name, got '../up'"),
        (["--width", "3"], "unrecognized arguments: --width 3"),
    ],
)
def test_a_wrong_option_is_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        overfitting.main(arguments)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("overfitting.py: error: ")
    assert message in err
    assert not Path("runs").exists()


def test_a_file_in_the_way_is_one_line(capsys):
    Path("runs").write_text("")
    with pytest.raises(SystemExit):
        overfitting.main(["--epochs", "1"])
    assert capsys.readouterr().err.startswith("overfitting.py: error: runs")


def test_interrupted(monkeypatch, capsys):
    def train(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(overfitting, "train", train)
    monkeypatch.setattr("signal.signal", lambda *args: None)  # pytest's Ctrl-C stays
    with pytest.raises(SystemExit) as stopped:
        overfitting.main([])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_reader_that_has_gone_is_no_traceback(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        monkeypatch.setattr("sys.stdout", gone)
        with pytest.raises(SystemExit) as stopped:
            overfitting.main(["--sizes", "2", "--seeds", "1", "--epochs", "1"])
    assert stopped.value.code == 1
    assert capsys.readouterr().err == ""

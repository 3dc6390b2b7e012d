import csv
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from sklearn.datasets import load_iris

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),  # Lightning on torch's newer pytree
]

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.py"
SPEC = importlib.util.spec_from_file_location("train_script", SCRIPT)
train = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(train)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    count = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(count)


@pytest.fixture(scope="module")
def iris(tmp_path_factory):
    """A folder with a trained run of iris."""
    folder = tmp_path_factory.mktemp("iris")
    run_script(folder, *SMALL)
    return folder


SMALL = ("--dataset", "iris", "--epochs", "30", "--batch_size", "16", "--accelerator", "cpu")


def run_script(folder, *arguments):
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )


def fails(capsys, *arguments, text=None):
    """The one line that a wrong command ends with; ``text`` is what its file holds."""
    if text is not None:
        Path(arguments[1]).write_text(text)
    with pytest.raises(SystemExit) as stopped:
        train.main(list(arguments))
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_the_default_run(tmp_path):
    begin = time.perf_counter()
    done = run_script(tmp_path)
    seconds = time.perf_counter() - begin
    run = tmp_path / "runs" / "digits"
    metrics = json.loads((run / "metrics.json").read_text())
    assert list(metrics) == [
        "test_accuracy",
        "test_f1",
        "test_loss",
        "test_opened",
        "best_val_loss",
        "best_epoch",
        "epochs",
        "stop_reason",
        "parity_max_loss_diff",
        "seconds",
        "seed",
        "versions",
    ]
    assert metrics["test_accuracy"] >= 0.97
    assert metrics["test_f1"] >= 0.97
    assert metrics["parity_max_loss_diff"] < 1e-5
    assert seconds < 30
    for name in ("best.ckpt", "last.ckpt", "learning_curves.png", "metrics.csv", "config.yaml"):
        assert (run / name).stat().st_size > 0
    assert len(done.stdout.splitlines()) == 4
    assert f"accuracy {metrics['test_accuracy']:.4f}" in done.stdout
    assert metrics["stop_reason"] in done.stdout
    assert "parity   largest difference of the loss" in done.stdout
    assert all(line.startswith("epoch ") for line in done.stderr.splitlines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rate", "0.1"], "unrecognized arguments: --learning_rate 0.1"),
        (["extra"], "unrecognized arguments: extra"),
        (["--lr", "-0.1"], "lr: expected in (0, 1e30], got -0.1"),
        (["--lr", "fast"], "lr: expected float, got 'fast'"),
        (["--lr"], "expected one argument"),
        (["--batch_size", "some"], "batch_size: expected int or ['full'], got 'some'"),
        (["--batch-size", "0"], "batch_size: expected >= 1 or 'full', got 0"),
        (["--epochs", "-1"], "epochs: expected > 0, got -1"),
        (["--depth", "-1"], "depth: expected >= 0, got -1"),
        (["--width", "0"], "width: expected > 0, got 0"),
        (["--dropout", "1"], "dropout: expected in [0, 1), got 1.0"),
        (["--l1", "-1"], "l1: expected finite and >= 0, got -1.0"),
        (["--l2", "-1"], "l2: expected finite and >= 0, got -1.0"),
        (["--patience", "0"], "patience: expected >= 1, got 0"),
        (["--activation", "step"], "activation: expected one of relu"),
        (["--init", "glorot"], "init: expected one of auto"),
        (["--optimizer", "lion"], "optimizer: expected one of sgd"),
        (["--dataset", "nowhere"], "dataset: expected one of digits"),
        (["--data", "mnist", "--root", "none"], "none: neither train-images-idx3-ubyte nor"),
        (["--data", "torchvision:MNIST"], "torchvision:MNIST"),
        (["--data", "csv:good.csv", "--target", "z"], "good.csv: no column 'z'; it has f, g, y"),
        (["--data", "csv:good.csv", "--task", "x"], "task: expected one of auto, classification"),
        (["--data", "csv:gaps.csv"], "gaps.csv: row 3, column 2: '' is missing; --missing impute"),
        (["--augment.rotation", "x"], "augment: expected float"),
        (["--augment.rotate", "5"], "augment, for images: expected one of rotation"),
        (["--augment.rotation", "999"], "ImageAugment: expected `rotation` in [0, 180], got 999"),
        (["--ratios", "0.5", "0.4", "x"], "ratios: expected float"),
        (["--ratios", "0.5", "0.4", "0.3"], "with sum 1"),
        (["--split", "alphabetical"], "split: expected one of auto"),
        (["--smote"], "smote: expected no, for what is no table of numbers"),
        (["--dataset", "csv:none.csv"], "none.csv: No such file or directory"),
        (["--dataset", "csv:bad.csv"], "bad.csv: row 2, column 1: 'x' is not a finite number"),
        (["--config", "none.yaml"], "none.yaml"),
        (["--config", "bad.yaml"], "lrr"),
        (["--config", "broken.yaml"], "Problems parsing config"),
        (["--resume", "--name", "none"], "resume: no run in runs/none"),
        (["--accelerator", "abacus"], "abacus"),
        (["--precision", "7"], "Precision 7 is invalid"),
        (["--strategy", "luck"], "luck"),
        (["--backend", "magic"], "magic"),
        (["predict"], "file"),
        (["predict", "x.csv", "--run", "runs/none"], "no trained run in runs/none"),
    ],
)
def test_a_wrong_command_ends_with_one_line_and_status_2(here, capsys, arguments, message):
    (here / "bad.csv").write_text("1,2,a\nx,3,b\n")
    (here / "good.csv").write_text("f,g,y\n1,2,a\n2,3,b\n")
    (here / "gaps.csv").write_text("f,g,y\n1,2,a\n2,,b\n")
    (here / "bad.yaml").write_text("lrr: 0.1\n")
    (here / "broken.yaml").write_text("lr: [\n")
    assert message in fails(capsys, *arguments)


def test_flags_override_the_yaml_file(here):
    (here / "a.yaml").write_text("lr: 0.5\nwidth: 7\nprecision: 32\nbatch_size: full\n")
    args = train.train_parser().parse_args(["--config", "a.yaml", "--width", "9", "--no-parity"])
    config = train.to_config(args)
    assert (config.lr, config.width, config.precision, config.batch_size) == (0.5, 9, 32, "full")
    assert not config.parity


@pytest.mark.parametrize(
    "text", ["#2", "~", "null", "&a", "1e3", "2024", "yes", "[a]", "a: b", "{a: 1}", "", "'a'"]
)
def test_the_text_of_a_flag_is_its_value(text):
    names = [option.name for option in train_options() if option.type in (str, str | None)]
    assert {"dataset", "target", "group", "time", "root", "name"} <= set(names)
    lists = ["--categories", text, "b", "--drop", "a", text]
    args = train.train_parser().parse_args([*(f"--{name}={text}" for name in names), *lists])
    assert {name: args[name] for name in names} == dict.fromkeys(names, text)
    assert (args.categories, args.drop) == ([text, "b"], ["a", text])
    args = train.predict_parser().parse_args(["x.csv", f"--target={text}", f"--run={text}"])
    assert (args.target, args.run) == (text, text)


def train_options():
    return train.to_config(train.train_parser().parse_args([])).__dataclass_fields__.values()


def test_null_in_a_file_is_no_text(here, capsys):
    (here / "a.yaml").write_text("target: null\ngroup: '#2'\nname: ~\n")
    args = train.train_parser().parse_args(["--config", "a.yaml"])
    assert (args.target, args.group, args.name) == (None, "#2", None)
    line = fails(capsys, "--config", "b.yaml", text="target: 5\n")
    assert line == "train.py: error: target: expected str, got '5'\n"


def test_a_csv_of_ones_own_from_yaml(here, capsys):
    x, y = load_iris(return_X_y=True)
    names = np.array(["a", "b", "c"])[y]
    with open("flowers.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [*row, name] for row, name in zip(x.tolist(), names, strict=True)
        )
    (here / "a.yaml").write_text("dataset: csv:flowers.csv\nepochs: 3\nwidth: 16\n")
    train.main(["--config", "a.yaml", "--accelerator", "cpu"])
    assert "files    runs/csv-flowers/ (3 epochs" in capsys.readouterr().out


def test_resume_keeps_the_configuration(iris, monkeypatch, capsys):
    monkeypatch.chdir(iris)
    config = (iris / "runs" / "iris" / "config.yaml").read_text()
    train.main(["--dataset", "iris", "--name", "again", *SMALL[2:], "--epochs", "2"])
    train.main(["--resume", "--name", "again", "--epochs", "5"])
    assert "(5 epochs" in capsys.readouterr().out
    again = (iris / "runs" / "again" / "config.yaml").read_text()
    assert again.replace("again", "null").replace("epochs: 5", "epochs: 30") == config
    assert "resume: width was 128" in fails(capsys, "--resume", "--name", "again", "--width", "5")


def table(text):
    return list(csv.reader(text.splitlines()))


def test_predict_from_csv_and_npy(iris, monkeypatch, capsys):
    monkeypatch.chdir(iris)
    x, y = load_iris(return_X_y=True)
    np.save("x.npy", x)
    np.savetxt("x.csv", x, delimiter=",")
    train.main(["predict", "x.npy", "--run", "runs/iris"])
    out = capsys.readouterr().out
    train.main(["predict", "x.csv", "--run", "runs/iris"])
    assert capsys.readouterr().out == out
    header, *rows = table(out)
    assert header == ["class", "p(setosa)", "p(versicolor)", "p(virginica)"]
    names = load_iris().target_names
    assert np.mean([row[0] == names[label] for row, label in zip(rows, y, strict=True)]) > 0.9
    assert all(abs(sum(map(float, row[1:])) - 1) < 2e-4 for row in rows)


def test_predict_abstains_below_the_threshold(iris, monkeypatch, capsys):
    monkeypatch.chdir(iris)
    np.save("x.npy", load_iris().data)
    train.main(["predict", "x.npy", "--run", "runs/iris", "--threshold", "0.9"])
    out, err = capsys.readouterr()
    for name, *p in table(out)[1:]:
        assert (name == "abstain") == (max(map(float, p)) < 0.9)
    assert err == f"abstained on {out.count('abstain')} of 150, below 0.9\n"


def test_predict_names_what_is_wrong_with_the_file(iris, monkeypatch, capsys):
    monkeypatch.chdir(iris)
    Path("wide.csv").write_text("1,2,3,4,5\n")
    Path("bad.csv").write_text("1,2,3,4\n1,2,?,4\n")
    run = ("--run", "runs/iris")
    wrong = fails(capsys, "predict", "wide.csv", *run)
    assert "error: wide.csv: expected 4 features, got shape (1, 5)" in wrong
    assert "row 2, column 3: '?'" in fails(capsys, "predict", "bad.csv", *run)
    assert "none.csv: No such file" in fails(capsys, "predict", "none.csv", *run)
    wrong = fails(capsys, "predict", "bad.csv", *run, "--threshold", "x")
    assert "threshold: expected float" in wrong


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((0, 4), "expected one sample or more, got shape (0, 4)"),
        ((3, 0), "expected 4 features, got shape (3, 0)"),
        (
            (3, 2, 2),
            "expected numbers of shape (samples, features), got float64 of shape (3, 2, 2)",
        ),
    ],
)
def test_predict_takes_rows_of_the_model_s_features(iris, monkeypatch, capsys, shape, message):
    monkeypatch.chdir(iris)
    np.save("x.npy", np.zeros(shape))
    line = fails(capsys, "predict", "x.npy", "--run", "runs/iris")
    assert line == f"train.py predict: error: x.npy: {message}\n"


def test_predict_names_a_file_that_is_too_large(iris, monkeypatch, capsys):
    def read_features(*args, **kwargs):
        raise MemoryError

    monkeypatch.chdir(iris)
    monkeypatch.setattr(train, "read_features", read_features)
    line = fails(capsys, "predict", "x.npy", "--run", "runs/iris")
    assert line == "train.py predict: error: x.npy: too large for the memory\n"


def predict_into(output, folder):
    np.save(folder / "x.npy", np.zeros((3, 4)))
    return run_into(output, folder, "predict", "x.npy", "--run", "runs/iris")


def run_into(output, folder, *arguments, **environment):
    """In a process of its own, as Python writes what is left when it ends."""
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONUNBUFFERED": ""} | environment,
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
        timeout=240,
    )


def test_predict_without_an_output_says_so(iris):
    np.save(iris / "x.npy", np.zeros((3, 4)))
    command = f"{sys.executable} {SCRIPT} predict x.npy --run runs/iris >&-"
    done = subprocess.run(["sh", "-c", command], cwd=iris, stderr=subprocess.PIPE, text=True)
    message = "the predictions cannot be written: standard output is closed"
    assert (done.returncode, done.stderr) == (2, f"train.py predict: error: {message}\n")


def test_predict_is_quiet_where_its_reader_has_gone(iris):
    reader, writer = os.pipe()
    os.close(reader)
    done = predict_into(writer, iris)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="waits for a system with /dev/full")
def test_predict_tells_of_a_full_disk_in_one_line(iris):
    with open("/dev/full", "w") as full:
        done = predict_into(full, iris)
    message = "the predictions cannot be written: No space left on device"
    assert (done.returncode, done.stderr) == (2, f"train.py predict: error: {message}\n")


def test_a_training_whose_reader_has_gone_is_whole(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    done = run_into(writer, tmp_path, *SMALL[:2], "--epochs", "2", "--accelerator", "cpu")
    os.close(writer)
    assert done.returncode == 1
    assert all(line.startswith("epoch ") for line in done.stderr.splitlines())
    assert (tmp_path / "runs" / "iris" / "report.html").stat().st_size > 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="waits for a system with /dev/full")
def test_a_training_on_a_full_disk_of_output_is_whole(here, monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as stopped:
            train.main([*SMALL[:2], "--epochs", "2", "--accelerator", "cpu"])
    assert stopped.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == "train.py: error: the summary cannot be written: No space left on device"
    assert (here / "runs" / "iris" / "report.html").stat().st_size > 0


def test_letters_that_the_output_lacks_are_escaped(tmp_path):
    rows = [f"{i % 7},{('ü', '良い')[i % 7 > 3]}\n" for i in range(40)]
    (tmp_path / "ü.csv").write_text("f,y\n" + "".join(rows), encoding="utf-8")
    (tmp_path / "new.csv").write_text("f\n1\n")
    flags = ("--data", "csv:ü.csv", "--epochs", "1", "--width", "8", "--accelerator", "cpu")
    done = run_into(subprocess.PIPE, tmp_path, *flags, PYTHONIOENCODING="ascii")
    assert r"files    runs/csv-\xfc/ (1 epochs" in done.stdout
    assert done.returncode == 0
    flags = ("predict", "new.csv", "--run", "runs/csv-ü")
    done = run_into(subprocess.PIPE, tmp_path, *flags, PYTHONIOENCODING="ascii")
    assert done.stdout.splitlines()[0] == r"class,p(\xfc),p(\u826f\u3044)"
    assert done.returncode == 0


def houses():
    rows = [(i % 5, ("sea", "town")[i % 2], 50 + 20 * (i % 5) + 7.5 * (i % 2)) for i in range(60)]
    return "rooms,place,price\n" + "".join(
        f"{rooms},{place},{price}\n" for rooms, place, price in rows
    )


def test_predict_values_from_a_table_in_any_order(here, capsys):
    Path("houses.csv").write_text(houses().replace("\n3,", "\n,"))
    run = ("--data", "csv:houses.csv", "--missing", "impute", "--epochs", "60", "--lr", "0.02")
    train.main([*run, "--width", "16", "--dropout", "0", "--accelerator", "cpu", "--name", "h"])
    assert "rmse " in capsys.readouterr().out
    Path("new.csv").write_text("place,note,rooms\nsea,x,4\ntown,y,0\nsea,z,\n")
    train.main(["predict", "new.csv", "--run", "runs/h"])
    header, *rows = table(capsys.readouterr().out)
    assert header == ["value"]
    values = [float(row[0]) for row in rows]
    assert values[0] == pytest.approx(130, abs=15)
    assert values[1] == pytest.approx(57.5, abs=15)
    assert values[2] == values[2]  # not NaN
    run = ("--run", "runs/h")
    assert "no column 'rooms'" in fails(capsys, "predict", "houses2.csv", *run, text="a,b\n1,c\n")
    assert "'moon' is none of" in fails(
        capsys, "predict", "houses2.csv", *run, text="rooms,place\n1,moon\n"
    )
    line = fails(capsys, "predict", "new.csv", *run, "--threshold", "0.5")
    assert "expected a model of classes" in line


def test_predict_texts_and_tell_log_loss_and_coverage(here, capsys):
    epochs = ("--epochs", "15", "--width", "16", "--accelerator", "cpu")
    train.main(["--data", "reviews", *epochs])
    capsys.readouterr()
    Path("new.csv").write_text('text,truth\n"A lovely, warm film",positive\nBroken,negative\n')
    train.main(["predict", "new.csv", "--run", "runs/reviews", "--target", "truth"])
    out, err = capsys.readouterr()
    header, *rows = table(out)
    assert header == ["class", "p(negative)", "p(positive)"]
    p = [float(rows[0][2]), float(rows[1][1])]
    first, second, *curve = err.splitlines()
    expected = -np.mean(np.log(p))
    assert float(first.removeprefix("log-loss ")) == pytest.approx(expected, abs=2e-3)
    assert second.split() == ["threshold", "coverage", "accuracy"]
    assert [float(line.split()[0]) for line in curve] == [0.0, 0.5, 0.7, 0.9, 0.95, 0.99]
    assert float(curve[0].split()[1]) == 1.0
    Path("new.txt").write_text("A lovely, warm film\nBroken\n")
    train.main(["predict", "new.txt", "--run", "runs/reviews"])
    assert capsys.readouterr().out == out
    line = fails(capsys, "predict", "empty.txt", "--run", "runs/reviews", text="")
    assert line == "train.py predict: error: empty.txt: no rows; expected a text each\n"
    line = fails(capsys, "predict", "new.csv", "--run", "runs/reviews", "--target", "text")
    assert "target: sample 1: 'A lovely, warm film' is none of negative, positive" in line


def test_predict_images_as_pictures_or_rows(here, capsys):
    run_digits = ("--epochs", "2", "--width", "16", "--accelerator", "cpu", "--name", "d")
    train.main(["--augment.rotation", "10", "--augment_picture", *run_digits])
    assert (here / "runs" / "d" / "augmented.png").exists()
    assert yaml.safe_load(Path("runs/d/config.yaml").read_text())["augment"] == {"rotation": 10.0}
    capsys.readouterr()
    x = np.random.default_rng(0).integers(0, 17, (5, 1, 8, 8))
    np.save("images.npy", x)
    np.save("rows.npy", x.reshape(5, 64))
    train.main(["predict", "images.npy", "--run", "runs/d"])
    out = capsys.readouterr().out
    train.main(["predict", "rows.npy", "--run", "runs/d"])
    assert capsys.readouterr().out == out
    assert len(table(out)) == 6


def test_a_confusing_augmentation_is_one_line(tmp_path):
    flags = ("--augment.horizontal_flip", "0.5", "--epochs", "1", "--accelerator", "cpu")
    done = run_script(tmp_path, *flags)
    (line,) = [line for line in done.stderr.splitlines() if "confus" in line]
    assert line.startswith("warning: augment: horizontal_flip may confuse the model: a mirrored")


def test_a_second_opening_of_the_test_part_is_mentioned(here, capsys):
    small = (*SMALL[2:4], "--accelerator", "cpu", "--data", "iris", "--patience", "50")
    train.main([*small, "--epochs", "1"])
    assert "opened" not in capsys.readouterr().out
    train.main(["--resume", "--name", "iris", "--epochs", "2"])
    assert "(opened 2 times: what was chosen since has seen it" in capsys.readouterr().out
    train.main(["--resume", "--name", "iris", "--epochs", "3", "--reopen_test"])
    assert "(opened" not in capsys.readouterr().out
    metrics = json.loads((here / "runs" / "iris" / "metrics.json").read_text())
    assert metrics["test_opened"] == 3


def test_two_processes(tmp_path):
    ddp = ("--devices", "2", "--strategy", "ddp")
    done = run_script(tmp_path, *SMALL, *ddp)
    metrics = json.loads((tmp_path / "runs" / "iris" / "metrics.json").read_text())
    assert metrics["epochs"] <= 30
    assert metrics["test_accuracy"] > 0.8
    assert "parity   off: it compares a single process" in done.stdout
    assert len(done.stdout.splitlines()) == 4


@pytest.mark.skipif(os.name == "nt", reason="waits for a C++ compiler on Windows")
@pytest.mark.slow
def test_compile(tmp_path):
    done = run_script(tmp_path, *SMALL, "--compile")
    assert "parity   off: a compiled network" in done.stdout
    run_script(tmp_path, "--resume", "--name", "iris", "--no-compile", "--epochs", "32")


def test_names_stay_under_runs(here, capsys):
    for name in ("..", ".", "a/b", ""):
        assert "name: expected a plain folder name" in fails(capsys, "--name", name)
        assert "name: expected" in fails(capsys, "--resume", "--name", name)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_predict_names_a_damaged_checkpoint(here, capsys, content, iris):
    path = here / "runs" / "bad" / "best.ckpt"
    path.parent.mkdir(parents=True)
    whole = (iris / "runs" / "iris" / "best.ckpt").read_bytes()
    path.write_bytes(whole[:5000] if content is None else content)
    line = fails(capsys, "predict", "x.csv", "--run", "runs/bad")
    assert "best.ckpt: not a checkpoint of a training run, or damaged" in line


def test_resume_looks_before_it_writes(here, capsys, iris):
    shutil.copytree(iris / "runs", here / "runs")
    config = (here / "runs" / "iris" / "config.yaml").read_text()
    line = fails(capsys, *SMALL, "--resume", "--epochs", "2")
    assert "epochs: expected more than the" in line
    for damaged in ("", "a: [", "just a text"):
        (here / "runs" / "iris" / "config.yaml").write_text(damaged)
        assert "iris/config.yaml is damaged" in fails(capsys, *SMALL, "--resume", "--epochs", "99")
    (here / "runs" / "iris" / "config.yaml").write_text(config)
    (here / "runs" / "iris" / "last.ckpt").write_bytes(b"broken")
    assert "last.ckpt is damaged" in fails(capsys, *SMALL, "--resume", "--epochs", "99")
    assert (here / "runs" / "iris" / "config.yaml").read_text() == config


def test_what_cannot_run_here_is_one_line(here, capsys):
    small = (*SMALL, "--epochs", "1")
    assert "devices:" in fails(capsys, *small, "--devices", "abc")
    with pytest.warns(UserWarning, match="bfloat16|bf16"):
        line = fails(capsys, *small, "--precision", "16-mixed")
    assert "precision: 16-mixed needs a GPU" in line
    (here / "runs").write_text("a file")
    assert "runs" in fails(capsys, *small)


def test_a_diverged_run_is_no_success(here, capsys):
    arguments = (*SMALL, "--lr", "1e30", "--optimizer", "sgd", "--epochs", "2", "--name", "nan")
    with pytest.raises(SystemExit) as stopped:
        train.main(list(arguments))
    assert stopped.value.code == 1
    out, err = capsys.readouterr()
    assert "no usable model" in err
    assert "the loss was not finite" in out
    text = (here / "runs" / "nan" / "metrics.json").read_text()
    metrics = json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
    assert metrics["best_val_loss"] is None
    assert not (here / "runs" / "nan" / "best.ckpt").exists()


def test_checks_before_a_run(here, capsys):
    small = ("--data", "iris", "--accelerator", "cpu", "--width", "32")
    with pytest.raises(SystemExit) as stopped:
        train.main([*small, "--overfit_batch", "--lr_range"])
    assert stopped.value.code == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("overfit  passed: one batch, ")
    assert second.startswith("rates    steepest at ")
    assert [path.name for path in (here / "runs" / "iris").iterdir()] == ["lr_range.png"]
    with pytest.raises(SystemExit) as stopped:
        train.main([*small, "--overfit_batch", "--init", "zeros"])
    assert stopped.value.code == 1
    assert "overfit  FAILED" in capsys.readouterr().out


def test_what_a_check_before_a_run_cannot_do_is_one_line(here, capsys):
    (here / "s.csv").write_text("a,y\n" + "".join(f"{i % 7},{i % 2}\n" for i in range(20)))
    small = ("--epochs", "1", "--accelerator", "cpu")
    line = fails(capsys, "--data", "csv:s.csv", "--size_curve", *small)
    assert line == "train.py: error: sizes: expected two samples or more in a share, got 1\n"
    (here / "runs").write_text("a file")
    for flag in ("--lr_range", "--size_curve"):
        assert "error: runs/iris" in fails(capsys, "--data", "iris", flag, *small)


def test_a_size_curve_without_a_usable_model_is_no_verdict(here, capsys):
    rows = [f"{i % 3 + 1}e38,{i % 2}\n" for i in range(80)]  # their products are infinite
    (here / "large.csv").write_text("a,y\n" + "".join(rows))
    flags = ("--normalize", "none", "--epochs", "1", "--width", "8", "--accelerator", "cpu")
    with pytest.raises(SystemExit) as stopped:
        train.main(["--data", "csv:large.csv", "--size_curve", *flags])
    assert stopped.value.code == 1
    out, err = capsys.readouterr()
    assert "verdict" not in out
    assert "samples  56: train error not finite, validation error not finite" in out
    message = "no usable model of 6, 14, 28, 42, 56 samples: val_loss was never finite\n"
    assert err.endswith(message)


@pytest.mark.slow
def test_two_processes_go_on_with_their_own_random_numbers(tmp_path):
    """Changes to texts draw as often as the text asks for, so the states of processes part."""
    flags = ("--data", "reviews", "--augment.replace", "0.3", "--augment.swap", "0.3")
    flags = (*flags, "--devices", "2", "--strategy", "ddp", "--accelerator", "cpu")
    for name, epochs in (("whole", 3), ("parts", 1)):
        run_script(tmp_path, *flags, "--name", name, "--epochs", str(epochs))
    run_script(tmp_path, *flags, "--name", "parts", "--epochs", "3", "--resume")
    rows = [(tmp_path / "runs" / name / "metrics.csv").read_text() for name in ("whole", "parts")]
    losses = [
        [row["val_loss"] for row in csv.DictReader(text.splitlines()) if row["val_loss"]]
        for text in rows
    ]
    assert losses[0] == losses[1]


def test_predict_images_in_the_order_of_the_training_set(here, capsys):
    x = np.random.default_rng(0).integers(0, 256, (40, 4, 5, 3)).astype(np.uint8)
    np.savez("a.npz", x=x, y=np.arange(40) % 2)
    train.main(["--data", "npz:a.npz", "--epochs", "2", "--width", "16", "--name", "i"])
    np.save("last.npy", x)
    np.save("first.npy", x.transpose(0, 3, 1, 2))
    np.save("other.npy", x[:, 1:])
    printed = []
    for name in ("last.npy", "first.npy"):
        capsys.readouterr()
        train.main(["predict", name, "--run", "runs/i"])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    line = fails(capsys, "predict", "other.npy", "--run", "runs/i")
    assert "other.npy: expected shape (N, 60), (N, 3, 4, 5) or (N, 4, 5, 3)" in line


def test_a_regression_on_images(here, capsys):
    np.savez("a.npz", x=np.random.default_rng(0).random((40, 4, 5)), y=np.arange(40) / 7)
    train.main(["--data", "npz:a.npz", "--epochs", "2", "--width", "16", "--name", "v"])
    assert "rmse" in capsys.readouterr().out


def test_predict_classes_of_tables_with_their_truth(here, iris, capsys):
    small = ("--epochs", "2", "--width", "16", "--accelerator", "cpu")
    rows = [f"{i % 2 * 3 + i / 40},{'uv'[i % 3 == 0]},{i % 2}\n" for i in range(40)]
    Path("t.csv").write_text("f,k,y\n" + "".join(rows))
    train.main(["--data", "csv:t.csv", *small])
    capsys.readouterr()
    run = ("--run", "runs/csv-t")
    gap = fails(capsys, "predict", "gap.csv", *run, text="f,k\n1,u\n,v\n")
    assert "gap.csv: row 3, column 1: '' is missing, and the model was trained without gaps" in gap
    gap = fails(capsys, "predict", "gap.csv", *run, text="f,k\n1,u\n1,\n")
    assert "gap.csv: row 3, column 2: '' is missing" in gap
    Path("zeros.csv").write_text("y,k,f\n0.0,u,1\n1.0,v,3\n")  # the classes 0 and 1
    train.main(["predict", "zeros.csv", *run, "--target", "y"])
    assert capsys.readouterr().err.startswith("log-loss ")
    line = fails(capsys, "predict", "two.csv", *run, "--target", "y", text="f,k,y\n1,u,1\n1,u,2\n")
    assert "two.csv: row 3, column 3: " in line
    assert "'2' is none of 0, 1" in line
    assert "expected a .csv file" in fails(capsys, "predict", "a.npy", *run, "--target", "y")

    Path("flower.csv").write_text("5.1,3.5,1.4,0.2,setosa\n")
    run = ("--run", str(iris / "runs" / "iris"), "--target")
    train.main(["predict", "flower.csv", *run, "5"])
    without_names = capsys.readouterr()
    Path("flower.csv").write_text("kind,a,b,c,d\nsetosa,5.1,3.5,1.4,0.2\n")
    train.main(["predict", "flower.csv", *run, "kind"])
    assert capsys.readouterr() == without_names
    assert "flower.csv: no column 'z'" in fails(capsys, "predict", "flower.csv", *run, "z")

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from torchref.training.checkpoint import alone

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),  # Lightning on torch's newer pytree
]

SCRIPTS = Path(__file__).parents[2] / "scripts"


def script(name):
    spec = importlib.util.spec_from_file_location(f"{name}_script", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tune, train = script("tune"), script("train")
SMALL = ("--dataset", "iris", "--width", "16", "--accelerator", "cpu", "--batch_size", "16")


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def fails(capsys, *arguments):
    """The one line that a wrong command ends with."""
    with pytest.raises(SystemExit) as stopped:
        tune.main(list(arguments))
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert out == ""
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--search", "learning=1,2"], "search: expected one of depth"),
        (["--search", "lr=0:1:log"], "search: lr: expected 0 < low, for log"),
        (["--method", "grid"], "search: lr: a grid needs values, as a,b,c"),
        (["--method", "luck"], "method: expected one of grid, random, bayes"),
        (["--engine", "steam"], "engine: expected one of optuna, ray"),
        (["--trials", "0"], "trials: expected >= 1, got 0"),
        (["--trials", "many"], "trials: expected int, got 'many'"),
        (["--dataset", "none"], "dataset: expected"),
        (["--dataset", "csv:none.csv"], "none.csv: No such file"),
        (["--name", "../up"], "name: expected a plain folder name"),
        (["--name", "a\0b"], "name: expected a plain folder name, got 'a\\x00b'"),
        (["--devices", "2"], "devices: expected 1"),
        (["--resume", "--name", "none"], "resume: no search in runs/none"),
    ],
)
def test_a_wrong_command_ends_with_one_line_and_status_2(capsys, arguments, message):
    assert message in fails(capsys, *arguments)


@pytest.mark.parametrize("text", ["", "lr: [", "- a"])
def test_a_damaged_search_is_named(capsys, text):
    Path("runs/tune-iris").mkdir(parents=True)
    Path("runs/tune-iris/search.yaml").write_text(text)
    message = "tune.py: error: runs/tune-iris/search.yaml is damaged: "
    assert fails(capsys, "--resume", "--dataset", "iris").startswith(message)


@pytest.mark.parametrize("more", [(), ("--resume",)])
def test_a_search_that_another_one_is_at_is_left_alone(capsys, more):
    folder = Path("runs/tune-iris")
    (folder / "trials").mkdir(parents=True)
    for name in ("search.yaml", "study.db"):
        (folder / name).write_text("lr: 0.1\n")
    with alone(folder / ".search.lock", "search"):
        assert fails(capsys, *SMALL, *more) == (
            "tune.py: error: runs/tune-iris: another search is writing to it; "
            "--name names another folder\n"
        )
    names = {"search.yaml", "study.db", "trials"}
    assert {path.name for path in folder.iterdir()} == names


def test_a_search_from_a_file_and_what_it_prints(capsys):
    text = "search: ['l2=0,0.1', 'depth=1,2']\nmethod: grid\nepochs: 2\n"
    Path("a.yaml").write_text(text)
    tune.main(["--config", "a.yaml", *SMALL])
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 4
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert list(lines) == ["trials", "best", "values", "matters", "files", "next"]
    assert lines["trials"] == "4 complete"
    assert "l2 " in lines["values"]
    assert "depth 0." in lines["matters"]
    assert "best.yaml, trials.csv, history.png, importance.png" in lines["files"]
    assert lines["next"] == "python scripts/train.py --config runs/tune-iris/best.yaml"

    args = train.train_parser().parse_args(lines["next"].split()[2:])
    config = train.to_config(args)
    assert (config.epochs, config.width, config.name, config.folder) == (2, 16, None, "iris")


def test_no_usable_trial_is_no_success(capsys):
    arguments = ("--search", "depth=1,2", "--method", "grid", "--lr", "-1")
    with pytest.raises(SystemExit) as stopped:
        tune.main([*SMALL, *arguments])
    assert stopped.value.code == 1
    err = capsys.readouterr().err.splitlines()
    assert err[-1] == "no trial is complete; the last error: lr: expected in (0, 1e30], got -1.0"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no process groups to kill")
def test_killed_and_resumed(capsys):
    options = ["--search", "lr=1e-3:1e-1:log", "--method", "random", "--trials", "6"]
    command = [sys.executable, SCRIPTS / "tune.py", *SMALL, *options, "--epochs", "12"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    ended = [process.stderr.readline() for _ in range(2)]
    begun = Path("runs/tune-iris/trials/2/metrics.csv")
    while not begun.exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert ended[1].startswith("2/6  trial 1: val_loss")
    before = yaml.safe_load(Path("runs/tune-iris/search.yaml").read_text())

    assert "resume: method was 'random'" in fails(
        capsys, "--resume", "--dataset", "iris", "--method", "bayes"
    )
    tune.main(["--resume", "--dataset", "iris"])
    out, err = capsys.readouterr()
    assert out.startswith("trials   6 complete, 1 killed\n") or "pruned" in out
    assert err.startswith("3/6  trial 3: ")
    rows = [line.split(",") for line in Path("runs/tune-iris/trials.csv").read_text().splitlines()]
    states = [row[1] for row in rows[1:]]
    assert len(states) == 7
    assert states[:3] == ["complete", "complete", "killed"]
    assert rows[3][4] == rows[4][4]  # its rate was tried again
    assert len({row[4] for row in rows[1:]}) == 6
    assert yaml.safe_load(Path("runs/tune-iris/search.yaml").read_text()) == before


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_interrupted():
    options = ["--search", "lr=1e-3:1e-1:log", "--trials", "99", "--jobs", "2"]
    command = [sys.executable, SCRIPTS / "tune.py", *SMALL, *options, "--epochs", "5"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    process.stderr.readline()
    os.killpg(process.pid, signal.SIGINT)
    rest = process.communicate(timeout=60)[1]  # which waits for the workers' stderr, too
    assert process.returncode == 130
    assert rest.splitlines()[-1] == "interrupted; continue with --resume --name tune-iris"
    assert "Traceback" not in rest

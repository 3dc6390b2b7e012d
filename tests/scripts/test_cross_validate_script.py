import contextlib
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torchref.training import cross_validate
from torchref.training.checkpoint import alone

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),  # Lightning on torch's newer pytree
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),  # a fold that runs again
]

SCRIPT = Path(__file__).parents[2] / "scripts" / "cross_validate.py"
SPEC = importlib.util.spec_from_file_location("cross_validate_script", SCRIPT)
script = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(script)

IRIS = ("--dataset", "iris", "--batch_size", "16", "--accelerator", "cpu", "--name", "k")
SHORT = (*IRIS, "--epochs", "2", "--folds", "3")
LONG = (*IRIS, "--epochs", "30", "--patience", "30", "--folds", "3")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    count = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(count)


def fails(capsys, *arguments):
    """The one line that a wrong command ends with."""
    with pytest.raises(SystemExit) as stopped:
        script.main(list(arguments))
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("cross_validate.py: error: ")
    return err


def result(folder):
    return json.loads((folder / "runs" / "k" / "cross_validation.json").read_text())


def test_what_it_prints(here, capsys):
    script.main(list(SHORT))
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert [line[:21] for line in lines[:3]] == [f"fold  {i}/3  epochs   2" for i in (1, 2, 3)]
    scores = result(here)["scores"]
    for i, line in enumerate(lines[:3]):
        accuracy, f1, loss = (score["values"][i] for score in scores.values())
        assert line.endswith(f"  accuracy {accuracy:.4f}  f1 {f1:.4f}  loss {loss:.4f}")
    found = scores["test_accuracy"]
    assert lines[3] == (
        f"accuracy  mean {found['mean']:.4f}, deviation {found['std']:.4f}, "
        f"95% interval from {found['low']:.4f} to {found['high']:.4f}"
    )
    assert lines[6:] == ["the test part of 22 samples was not opened", "files     runs/k/"]


@pytest.mark.skipif(os.name == "nt", reason="signals and sessions are POSIX")
@pytest.mark.parametrize(
    "stop", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_stopped_and_resumed_equals_uninterrupted(here, stop, request, capsys):
    done = subprocess.Popen(
        [sys.executable, SCRIPT, *LONG, "--jobs", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert done.stdout.readline().startswith("fold ")
    if stop is signal.SIGINT:
        os.killpg(done.pid, stop)  # as a terminal does
    else:
        done.kill()
    _, err = done.communicate(timeout=60)  # returns when no process of it is left
    if stop is signal.SIGINT:
        assert done.returncode == 130
        assert err == "interrupted; continue with --resume --name k\n"
    finished = [path.parent.name for path in here.glob("runs/k/fold-*/metrics.json")]
    assert 1 <= len(finished) < 3
    script.main(["--resume", "--name", "k"])
    assert capsys.readouterr().out.count("fold ") == 3
    assert result(here) == request.getfixturevalue("uninterrupted")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with contextlib.chdir(folder):
        script.main(list(LONG))
    return result(folder)


@pytest.mark.parametrize("name", [(), ("--name", "k"), ("--name", "two words")])
def test_the_advice_after_an_interrupt_works(here, monkeypatch, capsys, name):
    run, interrupts = cross_validate._run, iter([False, True])

    def interrupted(*arguments):
        if next(interrupts):
            raise KeyboardInterrupt
        return run(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(cross_validate, "_run", interrupted)
        with pytest.raises(SystemExit):
            script.main([*IRIS[:-2], *name, "--epochs", "2", "--folds", "2"])
    first, advice = capsys.readouterr()
    assert first.count("fold ") == 1
    script.main(shlex.split(advice.removeprefix("interrupted; continue with ")))
    again = capsys.readouterr().out
    assert again.startswith(first)
    assert again.count("fold ") == 2


def test_a_reader_that_has_enough_loses_no_fold(here, monkeypatch, capfd):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        script.main(list(SHORT))
    assert result(here)["folds"] == 3
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit(1)])
def test_interrupted_without_processes(here, monkeypatch, capsys, stop):
    def run(*_):
        raise stop

    monkeypatch.setattr(cross_validate, "_run", run)
    with pytest.raises(SystemExit) as stopped:
        script.main([*SHORT[:-2], "--folds", "2"])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "interrupted; continue with --resume --name k\n"


def test_a_diverged_fold_is_no_success(here, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main([*SHORT, "--lr", "1e30", "--optimizer", "sgd"])
    assert stopped.value.code == 1
    out, err = capsys.readouterr()
    assert "loss      mean not finite" in out
    assert err == "no usable model in fold 1, 2, 3: val_loss was never finite\n"


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("fold-1/metrics.json", "{}", "resume: runs/k/fold-1/metrics.json is damaged: epochs is"),
        ("cross_validation.yaml", "", "runs/k/cross_validation.yaml is damaged: expected names"),
    ],
)
def test_a_damaged_file_is_named(here, capsys, file, text, message):
    script.main(list(SHORT))
    capsys.readouterr()
    (here / "runs" / "k" / file).write_text(text)
    assert message in fails(capsys, "--resume", "--name", "k")


@pytest.mark.parametrize("more", [(), ("--resume",)])
def test_a_folder_that_another_one_is_at_is_left_alone(here, capsys, more):
    folder = Path("runs/k")
    folder.mkdir(parents=True)
    (folder / "cross_validation.yaml").write_text("lr: 0.1\n")
    with alone(folder / ".cross_validation.lock", "cross-validation"):
        assert fails(capsys, *SHORT, *more) == (
            "cross_validate.py: error: runs/k: another cross-validation is writing to it; "
            "--name names another folder\n"
        )
    assert [path.name for path in folder.iterdir()] == ["cross_validation.yaml"]


def test_resume_keeps_what_the_command_line_leaves_open(here, capsys):
    script.main([*SHORT, "--seed", "3"])
    out = capsys.readouterr().out
    script.main(["--resume", "--name", "k"])
    assert capsys.readouterr().out == out
    assert "resume: lr was 0.002 in runs/k, got 0.1" in fails(
        capsys, "--resume", "--name", "k", "--lr", "0.1"
    )
    assert "resume: folds was 3 in runs/k, got 4" in fails(
        capsys, "--resume", "--name", "k", "--folds", "4"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--folds", "1"], "expected `k` from 2 to the 128 samples, got 1"),
        (["--folds", "99"], "at least 99 samples of each class"),
        (["--folds", "few"], "folds: expected int, got 'few'"),
        (["--jobs", "0"], "jobs: expected >= 1, got 0"),
        (["--method", "magic"], "method: expected one of auto"),
        (["--method", "time", "--repeats", "2"], "expected `repeats` 1 for method 'time'"),
        (["--method", "grouped"], "--group names a column of the table"),
        (["--lr", "-1"], "lr: expected in (0, 1e30], got -1.0"),
        (["--learning_rate", "1"], "unrecognized arguments: --learning_rate 1"),
        (["--dataset", "csv:none.csv"], "none.csv: No such file or directory"),
        (["--resume"], "resume: no cross-validation in runs/cv-iris"),
        (["--name", ".."], "name: expected a plain folder name, got '..'"),
    ],
)
def test_a_wrong_command_ends_with_one_line_and_status_2(here, capsys, arguments, message):
    assert message in fails(capsys, "--dataset", "iris", *arguments)
    assert list(here.iterdir()) == []

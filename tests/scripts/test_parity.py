import importlib.util
import os
from pathlib import Path

import pytest
import torch

import torchref

SPEC = importlib.util.spec_from_file_location(
    "parity_script", Path(__file__).parents[2] / "scripts" / "parity.py"
)
parity = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(parity)


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["parity.py", *arguments])
    return parity.main()


def test_every_piece_is_within_its_bound(monkeypatch, capsys):
    assert run(monkeypatch) == 0
    out = capsys.readouterr().out
    assert "FAILS" not in out
    rows = [line.split("(")[0] for line in out.splitlines() if line.endswith("  ok")]
    pieces = {n for n, m in vars(torchref.nn).items() if isinstance(m, type)}
    pieces |= {"SGD", "RMSprop", "Adam", "AdamW"}
    pieces -= {"SyncBatchNorm", "SyncBatchNormAct"}  # in one process they are batch norm
    assert set(rows) == pieces
    assert f"{len(rows)} of {len(rows)} within the bound" in out


def test_a_wrong_piece_fails(monkeypatch, capsys):
    monkeypatch.setattr(torchref.nn.ReLU, "forward", lambda self, x: torch.relu(x) * 1.001)
    assert run(monkeypatch, "--only", "relu(", "--dtype", "float32") == 1
    out = capsys.readouterr().out
    assert "FAILS: output: error" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "int8"], "invalid choice"),
        (["--only", "nothing"], "no piece's name contains 'nothing'"),
        (["--backend", "triton"], "cannot run here"),
        (["--device", "cuda:99"], ""),
    ],
)
def test_wrong_arguments(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_reader_that_has_gone_is_no_traceback(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        monkeypatch.setattr("sys.stdout", gone)
        with pytest.raises(SystemExit) as stopped:
            run(monkeypatch, "--only", "relu(", "--dtype", "float32")
    assert stopped.value.code == 1
    assert capsys.readouterr().err == ""

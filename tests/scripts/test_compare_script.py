import io
import os

import pytest
from compare import main


def test_a_table_side_by_side(tmp_path, capsys):
    for name, lr in (("a", 0.1), ("b", 0.25)):
        run = tmp_path / name
        run.mkdir()
        (run / "config.yaml").write_text(f"lr: {lr}\n")
        (run / "metrics.json").write_text('{"test_accuracy": 0.9}')
        (run / "metrics.csv").write_text("epoch,train_loss,val_loss\n0,,2.0\n0,1.5,\n")
    main([str(tmp_path / "a"), str(tmp_path / "b"), "--picture", str(tmp_path / "c.png")])
    assert capsys.readouterr().out == (
        "               a    b\nlr             0.1  0.25\ntest_accuracy  0.9  0.9\n"
    )
    assert (tmp_path / "c.png").exists()


def test_a_damaged_run_is_one_line(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("lr: 0.1\n")
    (tmp_path / "metrics.json").write_text("{}")
    (tmp_path / "metrics.csv").write_text("epoch,val_loss\n0,1.0,5,6\n")
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path)])
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "metrics.csv is damaged: line 2 has more cells than the header" in err


@pytest.mark.parametrize("arguments", [["nowhere"], [], ["x", "--pictures", "y"]])
def test_wrong_commands_are_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """The name of a run's folder."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "ü"
    run.mkdir()
    (run / "config.yaml").write_text("lr: 0.1\n")
    (run / "metrics.json").write_text('{"test_accuracy": 0.9}')
    (run / "metrics.csv").write_text("epoch,train_loss,val_loss\n0,,2.0\n0,1.5,\n")
    return run.name


@pytest.mark.parametrize("picture", ["~", "null", "#2"])
def test_a_picture_s_name_is_text(finished, tmp_path, picture):
    main([finished, "--picture", picture])
    assert (tmp_path / f"{picture}.png").exists()  # Matplotlib adds the ending


def test_a_reader_that_has_gone_is_no_traceback(finished, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        monkeypatch.setattr("sys.stdout", gone)
        with pytest.raises(SystemExit) as stopped:
            main([finished])
    assert stopped.value.code == 1
    assert capsys.readouterr().err == ""


def test_letters_that_the_output_lacks_are_escaped(finished, monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", output)
    main([finished])
    assert (
        output.buffer.getvalue()
        == rb"""               \xfc
test_accuracy  0.9
"""
    )

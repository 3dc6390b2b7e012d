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


@pytest.mark.parametrize("arguments", [["nowhere"], [], ["x", "--pictures", "y"]])
def test_wrong_commands_are_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1

import json
import math

import benchmark_optimizers
import parameter_lists
import pytest


def test_a_table_and_every_figure(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(benchmark_optimizers.MODELS, "small", lambda: [(3, 4), (5,)])
    file = tmp_path / "steps.json"
    arguments = ["--model", "small", "--optimizer", "SGD", "--optimizer", "RMSprop"]
    assert benchmark_optimizers.main([*arguments, "--rounds", "2", "--json", str(file)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[:2] for line in table[-2:]] == [
        ["| small", "SGD"],
        ["| small", "RMSprop"],
    ]
    assert table[-1].split(" | ")[6] == "-"  # torch has no fused RMSprop
    written = json.loads(file.read_text())
    assert written["environment"]["torch"]
    names = {row["implementation"] for row in written["rows"] if row["optimizer"] == "SGD"}
    assert {"torch default", "torchref fused", "torchref compiled", "torch again"} <= names
    assert all(0 < row["p20_ms"] <= row["ms"] <= row["p80_ms"] for row in written["rows"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds: expected 1 or more, got 0"),
        (["--model", "vgg"], "invalid choice: 'vgg'"),
        (["--dtype", "float64"], "invalid choice: 'float64'"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        benchmark_optimizers.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "tensors", "parameters"),
    [("resnet50", 161, 25_557_032), ("gpt2", 148, 124_439_808)],
)
def test_the_models_have_their_sizes(model, tensors, parameters):
    shapes = getattr(parameter_lists, model)()
    assert len(shapes) == tensors
    assert sum(map(math.prod, shapes)) == parameters

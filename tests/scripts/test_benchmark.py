import dataclasses
import json
import math
import time
from functools import partial

import benchmark
import pytest
import torch
from benchmarks import cases, cuda, optimizers, parameter_lists, pieces, results, timing
from benchmarks.options import Options

import torchref

RELU = next(case for case in pieces.CASES if case.name == "relu")
ENVIRONMENT = {"device": "a CPU", "torch": "2.13.0"}


def sizes(*shapes):
    return cases.Sizes(shapes, (), shapes, ())


@pytest.fixture
def quick(monkeypatch):
    """Seconds instead of minutes: few samples, nothing compiled, small shapes."""
    monkeypatch.setattr(timing, "ROUNDS", 5)
    monkeypatch.setattr(timing, "SHORTEST", 1e-5)
    every = pieces.contestants

    def uncompiled(case, options):
        return {n: c for n, c in every(case, options).items() if "compile" not in n}

    monkeypatch.setattr(pieces, "contestants", uncompiled)
    small = {
        id(cases.FLAT): sizes((64,)),
        id(cases.ROWS): sizes((4, 16)),
        id(cases.IMAGES): sizes((2, 4, 3, 3)),
        id(cases.HEADS): sizes((4, 16, 8)),
    }
    shrunk = [dataclasses.replace(case, sizes=small[id(case.sizes)]) for case in pieces.CASES]
    monkeypatch.setattr(pieces, "CASES", shrunk)


def measured(rows, name):
    """The first row of an implementation."""
    return next(row for row in rows if row["implementation"] == name)


@pytest.mark.usefixtures("quick")
def test_every_piece_is_right_and_timed():
    rows = pieces.run(Options())
    assert {row["op"] for row in rows} == set(pieces.NAMES)
    assert {row["note"] for row in rows} == {None}
    assert all(0 < row["p20_ms"] <= row["ms"] <= row["p80_ms"] for row in rows)
    assert {row["samples"] for row in rows} == {5}
    timed_once = {row["op"] for row in rows} - {
        row["op"] for row in rows if row["pass"] == "forward+backward"
    }
    assert timed_once == {"linear_bias_gradient"}
    assert {row["op"] for row in rows if row["implementation"] == "floor"} == {
        "linear_cross_entropy"
    }
    assert {row["layout"] for row in rows if row["op"] == "batch_norm_train"} == {
        "contiguous",
        "channels_last",
    }


def test_no_function_is_left_out():
    for name, function in vars(torchref.nn.functional).items():
        if callable(function):
            assert any(case.startswith(name) for case in pieces.NAMES), name


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (lambda x: torch.relu(x) * 1.001, "output: error"),
        (lambda x: torch.relu(x.detach()) + 0 * x, "gradient of input 0: error"),
        (lambda x: torch.relu(x).log(), "output: at"),
    ],
)
def test_what_is_wrong_is_reported_and_not_timed(monkeypatch, capsys, wrong, what):
    case = cases.Case("relu", wrong, torch.relu, cases._one, sizes((64,)), (2, 5))
    monkeypatch.setattr(pieces, "CASES", [case])
    rows = pieces.run(Options())
    formula, torchs = measured(rows, "formula"), measured(rows, "torch")
    assert formula["note"].startswith(f"wrong: {what}")
    assert formula["ms"] is formula["ratio_to_torch"] is None
    assert torchs["ms"] > 0
    assert "formula wrong: " in capsys.readouterr().out
    assert any(line.startswith("relu forward formula") for line in benchmark.summary(rows))


@pytest.mark.usefixtures("quick")
def test_a_dropout_that_keeps_too_much_is_wrong(monkeypatch):
    real = next(case for case in pieces.CASES if case.name == "dropout")
    keeps = partial(torch.nn.functional.dropout, p=0.0)
    case = dataclasses.replace(real, ours=keeps, sizes=sizes((4096,)))
    monkeypatch.setattr(pieces, "CASES", [case])
    assert measured(pieces.run(Options()), "formula")["note"] == (
        "wrong: it keeps 1.000 of all elements"
    )


@pytest.mark.usefixtures("quick")
def test_a_case_that_cannot_run_is_one_row_and_no_end(monkeypatch):
    def broken(x):
        raise RuntimeError("no memory\nfor this")

    first = cases.Case("relu", torch.relu, broken, cases._one, sizes((64,)), (2, 5))
    monkeypatch.setattr(pieces, "CASES", [first, RELU_SMALL])
    failed, *rest = pieces.run(Options())
    assert (failed["note"], failed["ms"]) == ("failed: no memory", None)
    assert all(row["ms"] for row in rest)


RELU_SMALL = dataclasses.replace(RELU, sizes=sizes((64,)))


@pytest.mark.usefixtures("quick")
def test_after_the_deadline_the_rest_is_skipped_and_said():
    rows = pieces.run(Options(deadline=time.monotonic()))
    assert {row["note"] for row in rows} == {"skipped: no time left"}
    assert {row["op"] for row in rows} == set(pieces.NAMES)
    sized = [row["elements"] for row in rows]
    assert sized == sorted(sized, reverse=True)


def test_torch_compile_is_checked_and_timed(monkeypatch):
    monkeypatch.setattr(timing, "ROUNDS", 3)
    monkeypatch.setattr(pieces, "CASES", [RELU_SMALL])
    rows = pieces.run(Options())
    compiled = [row for row in rows if row["implementation"] == "torch.compile"]
    assert [row["pass"] for row in compiled] == ["forward", "forward+backward"]
    for row in compiled:
        assert row["ratio_to_compile"] == 1
        assert row["error"] <= row["bound"]
    ours = measured(rows, "formula")
    assert math.isclose(ours["ratio_to_compile"], compiled[0]["ms"] / ours["ms"], rel_tol=1e-9)


def test_a_large_case_is_checked_on_fewer_rows():
    plan = pieces.Plan(RELU, (pieces.CHECKED * 8,), cases.Draw(torch.float32, "cpu", ""))
    assert plan.inputs(pieces.CHECKED)[0].numel() == pieces.CHECKED
    wide = pieces.Plan(RELU, (2, 64), cases.Draw(torch.float32, "cpu", ""))
    assert wide.inputs(16)[0].shape == (1, 64)


def test_peers_that_are_not_installed_are_absent():
    case = next(case for case in pieces.CASES if case.name == "cross_entropy")
    found, absent = pieces.peers(case)
    assert found.keys() | absent.keys() == {"liger", "quack"}
    assert all(note.startswith("absent: ") for note in absent.values())
    case = dataclasses.replace(case, peers={"torch": "torch.nn.functional:cross_entropy"})
    assert pieces.peers(case)[0]["torch"].function is torch.nn.functional.cross_entropy


def test_optimizers(monkeypatch):
    monkeypatch.setattr(timing, "ROUNDS", 3)
    monkeypatch.setattr(optimizers, "MODELS", {"tiny": lambda: [(3, 4), (5,)]})
    rows = optimizers.run(Options(only=frozenset(["SGD", "RMSprop", "AdamW_clipped"])))
    assert {row["note"] for row in rows} == {None}
    of = {
        op: {row["implementation"] for row in rows if row["op"] == op}
        for op in ("SGD", "RMSprop", "AdamW_clipped")
    }
    assert of["SGD"] == of["AdamW_clipped"]
    assert {"torch fused", "torchref fused"} == of["SGD"] - of["RMSprop"]
    torchs = measured(rows, "torch")
    assert math.isclose(torchs["gbs"], 12 * 17 / torchs["ms"] / 1e6)
    late = optimizers.run(Options(deadline=time.monotonic()))
    assert {row["note"] for row in late} == {"skipped: no time left"}


def test_a_wrong_optimizer_is_not_timed(monkeypatch):
    monkeypatch.setattr(timing, "ROUNDS", 3)
    monkeypatch.setattr(optimizers, "MODELS", {"tiny": lambda: [(3, 4), (5,)]})
    monkeypatch.setattr(torchref.optim, "Adam", partial(torchref.optim.Adam, eps=1e-3))
    rows = optimizers.run(Options(only=frozenset(["Adam"])))
    ours = [row for row in rows if row["implementation"].startswith("torchref")]
    assert all(row["note"].startswith("wrong: ") and row["ms"] is None for row in ours)
    assert measured(rows, "torch fused")["ms"]


@pytest.mark.parametrize(
    ("model", "tensors", "parameters"),
    [("resnet50", 161, 25_557_032), ("gpt2", 148, 124_439_808)],
)
def test_the_models_have_their_sizes(model, tensors, parameters):
    shapes = getattr(parameter_lists, model)()
    assert len(shapes) == tensors
    assert sum(map(math.prod, shapes)) == parameters


# Arithmetic, on times that are made up.


def test_samples_are_taken_in_turns_in_a_new_order_each_round(monkeypatch):
    monkeypatch.setattr(timing, "ROUNDS", 40)
    order = []
    samples = {name: lambda name=name: order.append(name) or 1.0 for name in "abc"}
    taken = timing.in_turns(samples, seconds=10.0)
    assert {name: len(times) for name, times in taken.items()} == {"a": 40, "b": 40, "c": 40}
    rounds = ["".join(order[i : i + 3]) for i in range(0, 120, 3)]
    assert {"".join(sorted(each)) for each in rounds} == {"abc"}
    assert len(set(rounds)) > 1


def test_what_takes_long_is_sampled_less_often_but_sampled():
    taken = timing.in_turns({"slow": lambda: time.sleep(0.005) or 0.005}, seconds=0.0)
    assert len(taken["slow"]) == timing.FEWEST


def test_short_calls_are_repeated_within_a_sample():
    calls = []
    sample = timing.repeated(lambda: calls.append(1))
    before = len(calls)
    seconds = sample()
    assert len(calls) - before > 100
    assert 0 < seconds < 1e-5


def test_a_tie_is_what_chance_alone_explains():
    steady, again = [1.0, 1.01, 0.99] * 10, [1.0, 0.99, 1.01] * 10
    noisy, noisier = [0.5, 1.0, 2.0] * 10, [0.6, 1.1, 2.1] * 10
    assert timing.spread(steady, again) <= 0.02
    assert timing.spread(noisy, noisier) >= 0.1  # the medians differ by so much
    assert timing.spread(steady, [2 * t for t in steady]) >= 1.0
    assert timing.is_tie(1.04, 0.05)
    assert timing.is_tie(1 / 1.04, 0.05)
    assert not timing.is_tie(1.06, 0.05)
    assert not timing.is_tie(0.9, 0.05)
    assert timing.is_tie(1.09, 0.05, 0.05)


def test_a_lucky_pair_of_medians_does_not_make_the_spread_0():
    first, second = ([1 + i / 10 + shift for i in range(11)] for shift in (0.01, -0.01))
    second[5] = first[5]  # the medians
    assert timing.spread(first, second) > 0.05


def test_rows_of_a_group():
    seconds = {"torch": [2e-3] * 9, "torch again": [2.02e-3] * 9, "ours": [1e-3] * 9}
    seconds |= {"torch.compile": [1.6e-3] * 9, "even": [2.01e-3] * 9}
    figures = {name: {} for name in seconds} | {"liger": {"note": "absent: not there"}}
    shared = results.group("pieces", "relu", "forward", "1000", 1000)
    rows = results.rows_of(shared, seconds, figures, moved=8000.0, copy_gbs=0.016)
    ours, even = measured(rows, "ours"), measured(rows, "even")
    assert (ours["ms"], ours["samples"]) == (1.0, 9)
    assert ours["ratio_to_torch"] == 2
    assert math.isclose(ours["ratio_to_compile"], 1.6)
    assert math.isclose(ours["gbs"], 0.008)
    assert math.isclose(ours["fraction_of_copy"], 0.5)
    assert (ours["tie"], even["tie"]) == (False, True)
    assert math.isclose(ours["spread"], 0.01)
    assert measured(rows, "liger") == shared | {"implementation": "liger"} | dict.fromkeys(
        results.FIGURES
    ) | {"note": "absent: not there"}
    assert {frozenset(row) for row in rows} == {
        frozenset([*results.GROUP, "implementation", *results.FIGURES])
    }


def row(elements, ms, ratio, **rest):
    shared = results.group("pieces", "relu", "forward", str(elements), elements)
    known = {"ms": ms, "ratio_to_torch": ratio, "spread": 0.05, "tie": False} | rest
    return shared | {"implementation": "formula"} | dict.fromkeys(results.FIGURES) | known


def test_the_growth_of_cost():
    rows = [row(n, 3e-6 * n**1.25, 1.0) for n in (2**10, 2**14, 2**20)] + [row(2**22, None, None)]
    (grown,) = results.growth(rows).values()
    assert math.isclose(grown["exponent"], 1.25)
    assert math.isclose(grown["ns"][2**20], 3 * 2**5)
    assert list(grown["ns"]) == [2**10, 2**14, 2**20]


def test_means_are_over_large_shapes():
    rows = [row(2**20, 1.0, 4.0), row(2**22, 1.0, 1.0), row(2**14, 1.0, 99.0)]
    assert results.geometric_means(rows) == {"formula": 2.0}
    assert results.largest([*rows, row(2**24, None, None)]) == [rows[1]]


def record(*rows, **environment):
    return {"environment": ENVIRONMENT | environment, "rows": list(rows)}


def test_comparison_names_what_moved_beyond_both_spreads():
    before = record(row(1, 1.0, 1.0), row(2, 1.0, 1.0), row(3, 1.0, 1.0), row(4, 1.0, 1.0))
    after = record(row(1, 9.0, 1.09), row(2, 1.0, 1.2), row(3, 1.0, 0.5), row(5, 1.0, 1.0))
    lines, is_slower = results.compare(before, after)
    assert lines == [
        "faster: relu forward formula 2 float32 eager: 1.00 -> 1.20 x torch",
        "slower: relu forward formula 3 float32 eager: 1.00 -> 0.50 x torch",
        "2 of 3 rows that both runs timed have moved",
    ]
    assert is_slower
    lines, is_slower = results.compare(record(), record(torch="2.14.0"))
    assert lines[0] == "torch: 2.13.0 -> 2.14.0"
    assert not is_slower


@pytest.mark.parametrize(
    ("implementation", "ratio", "slower"),
    [("formula", 0.85, False), ("formula", 0.8, True), ("torch.compile", 0.8, False)],
)
def test_comparison_fails_where_one_of_ours_lost_a_fifth(
    implementation, ratio, slower, tmp_path, capsys
):
    files = []
    for number, value in enumerate((1.0, ratio)):
        files.append(tmp_path / f"{number}.json")
        rows = [row(1, 1.0, value) | {"implementation": implementation}]
        results.write(files[-1], record(*rows))
    assert benchmark.main(["--compare", *map(str, files)]) == slower
    assert "1 of 1 rows that both runs timed have moved" in capsys.readouterr().out


def test_the_arithmetic_of_a_gpu():
    assert cuda.sets_of_buffers(input_bytes=2**30, l2_bytes=50 * 2**20) == 2
    assert cuda.sets_of_buffers(input_bytes=2**20, l2_bytes=50 * 2**20) == 200
    assert cuda.calls_in_a_graph(1e-5) == cuda.CALLS
    assert cuda.calls_in_a_graph(1e-3) == 5
    assert cuda.calls_in_a_graph(1.0) == 1
    gpu = Options(device="cuda")
    assert {"kernel", "formula", "torch.compile max-autotune"} < set(pieces.contestants(RELU, gpu))
    quick = Options(device="cuda", quick=True)
    assert set(pieces.contestants(RELU, quick)) == {
        *("torch", "torch again", "torch.compile", "kernel")
    }
    small = pieces.Plan(RELU, (2**10,), cases.Draw(torch.bfloat16, "cuda", "contiguous"))
    large = pieces.Plan(RELU, (2**20,), cases.Draw(torch.bfloat16, "cuda", "contiguous"))
    assert (small.modes(), large.modes()) == (("graph", "eager"), ("cold", "graph", "eager"))
    assert {plan.draw.dtype for plan in pieces.plans(quick)} == {torch.bfloat16}


def test_what_is_measured_in_each_mode_of_a_gpu(monkeypatch):
    graphs = []
    monkeypatch.setattr(cuda, "eager", lambda call: lambda: 1e-3)
    monkeypatch.setattr(cuda, "replayed", lambda calls: graphs.append(calls) or (lambda: 2e-3))
    for name in ("host_us", "launches", "peak_bytes"):
        monkeypatch.setattr(cuda, name, lambda call, name=name: name)
    sample, known = pieces.sample_of("a", "eager", "cuda")
    assert (sample(), known) == (1e-3, {name: name for name in known})
    assert set(known) == {"host_us", "launches", "peak_bytes"}
    for calls, mode in (("ab", "cold"), ("a", "graph"), ("abcdefg", "cold")):
        assert pieces.sample_of(calls, mode, "cuda")[1] == {}
    # five calls of a millisecond, or as many as have buffers of their own
    assert ["".join(calls) for calls in graphs] == ["ababa", "aaaaa", "abcdefg"]


# The command.


@pytest.mark.usefixtures("quick")
def test_the_command_writes_what_it_can_read(tmp_path, capsys):
    file = tmp_path / "a.json"
    assert benchmark.main(["pieces", "--only", "relu", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("device ")
    assert "ratios to torch, ~ a tie:" in out
    written = results.read(file)
    assert written["command"] == f"python scripts/benchmark.py pieces --only relu --json {file}"
    assert written["environment"]["torch"] == torch.__version__
    assert {"device", "threads", "triton", "torchref", "commit", "date"} <= set(
        written["environment"]
    )
    assert [row["op"] for row in written["rows"]] == ["relu"] * 6
    assert benchmark.main(["--compare", str(file), str(file)]) == 0
    assert capsys.readouterr().out == "0 of 4 rows that both runs timed have moved\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds=3"], "unrecognized arguments: --rounds=3"),
        (["everything"], "no section 'everything': expected pieces, optimizers, models"),
        (["--only", "rellu"], "--only: none is called 'rellu'; there are "),
        (["pieces", "--only", "AdamW"], "--only: none is called 'AdamW'"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--json", "no/such/a.json"], "--json: there is no folder no/such"),
        (["--compare", "none.json", "none.json"], "none.json: No such file or directory"),
        (["--compare", "theirs.json", "theirs.json"], "theirs.json: not written by scripts/bench"),
        (["--compare", "text.json", "text.json"], "text.json: not a JSON file"),
        (["--compare", "one.json"], "argument --compare: expected 2 arguments"),
    ],
)
def test_what_is_wrong_with_the_command_is_one_line(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs.json").write_text(json.dumps({"rows": []}))
    (tmp_path / "text.json").write_text("a table")
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.cpu
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--device", "cuda"])
    assert capsys.readouterr().err.endswith("--device cuda: there is no CUDA or ROCm device\n")

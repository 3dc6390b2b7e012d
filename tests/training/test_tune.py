import csv
import math
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing import Pipe
from threading import Thread

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from killing import full_disk
from yaml.representer import RepresenterError

from torchref.training import Config, DataModule, Run
from torchref.training.tune import (
    DEFAULT,
    Choices,
    Outcome,
    Range,
    Search,
    Training,
    Trial,
    _asked,
    _open_study,
    _plan,
    _receive,
    _storage,
    _tell,
    _work,
    measure_importance,
    plot_history,
    plot_sweep,
    run_optuna,
    try_once,
    tune,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),  # Lightning on torch's newer pytree
]

IRIS = Config(dataset="iris", epochs=8, batch_size=16, width=16, accelerator="cpu")
LR = ["lr=1e-6:1e2:log"]
PNG = b"\x89PNG"


@pytest.fixture(autouse=True)
def _threads():
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def bowl(config, root, report):
    """Its smallest loss, 0.1, is at lr 0.01."""
    return Outcome(0.1 + (math.log10(config.lr) + 2) ** 2, 0.05, 3)


def search(path, texts, objective=bowl, config=IRIS, **options):
    return tune(config, texts, root=path, objective=objective, **options)


def points(results):
    return [trial.params for trial in results.trials]


def read(path, name):
    return yaml.safe_load((path / "tune-iris" / name).read_text())


# What is searched.


def test_the_grammar():
    search = Search.parse(
        [
            "lr=1e-4:1e-1:log",
            "width=16:250:16",
            "depth=1:4",
            "batch-size=8,full",
            "dropout=0:0.5:0.2",
            "batch_norm=true,no",
            "activation=relu,tanh",
            "l2=0,1e-3",
            "augment.noise=0:0.2",
        ]
    )
    assert search.parameters == (
        Range("lr", 1e-4, 1e-1, log=True),
        Range("width", 16, 240, step=16),
        Range("depth", 1, 4),
        Choices("batch_size", (8, "full")),
        Range("dropout", 0.0, 0.4, step=0.2),
        Choices("batch_norm", (True, False)),
        Choices("activation", ("relu", "tanh")),
        Choices("l2", (0.0, 1e-3)),
        Range("augment.noise", 0.0, 0.2),
    )
    assert [p.is_integer for p in search.parameters if isinstance(p, Range)] == [0, 1, 1, 0, 0]


def test_the_default_is_what_the_course_lists():
    names = {parameter.name for parameter in Search.parse(DEFAULT).parameters}
    assert names == {
        "lr", "batch_size", "depth", "width", "activation",
        "init", "optimizer", "dropout", "l1", "l2",
    }  # fmt: skip


def test_values_are_put_into_the_configuration():
    config = replace(IRIS, augment={"noise": 0.1, "shuffle": 0.2})
    made = Search(()).apply(config, {"lr": 0.5, "augment.noise": 0.3})
    assert made == replace(config, lr=0.5, augment={"noise": 0.3, "shuffle": 0.2})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr", "search: expected name=values, got 'lr'"),
        ("learning=1,2", "search: expected one of depth, .*augment.NAME, got 'learning'"),
        ("seed=1,2", "search: expected one of .*, got 'seed'"),
        ("augment.blur=0:1", "search: augment: expected one of rotation, .*, got 'blur'"),
        ("lr=", "search: lr: expected float, got ''"),
        ("lr=0.1,,1", "search: lr: expected float, got ''"),
        ("lr=fast", "search: lr: expected float, got 'fast'"),
        ("lr=nan,1", "search: lr: expected float, got 'nan'"),
        ("width=1.5,2", "search: width: expected int, got '1.5'"),
        ("batch_size=all", "search: batch_size: expected int, got 'all'"),
        ("batch_norm=1", "search: batch_norm: expected one of true, yes, false, no, got '1'"),
        ("activation=step", "search: activation: expected one of relu, .*, got 'step'"),
        ("activation=a:b", "search: activation: expected values, as a,b,c, got 'a:b'"),
        ("batch_norm=no:yes", "search: batch_norm: expected values"),
        ("lr=1:1", "search: lr: expected low < high, got '1:1'"),
        ("lr=2:1", "search: lr: expected low < high, got '2:1'"),
        ("lr=0:1:log", "search: lr: expected 0 < low, for log, got '0:1:log'"),
        ("lr=0:1:0", "search: lr: expected 0 < step <= high - low, got '0:1:0'"),
        ("lr=0:1:2", "search: lr: expected 0 < step <= high - low, got '0:1:2'"),
        ("lr=0:1:x", "search: lr: expected float, got 'x'"),
        ("width=1:9:0.5", "search: width: expected int, got '0.5'"),
        ("lr=0.1:0.2:1e-30", "search: lr: expected up to .* steps, got '0.1:0.2:1e-30'"),
        ("lr=-1e308:1e308:1", "search: lr: expected up to .* steps, got '-1e308:1e308:1'"),
        (f"depth=1:{10**32}:1", "search: depth: expected up to .* steps, got '1:10+:1'"),
        ("lr=1:2:1:log", "search: lr: expected low:high, low:high:log or low:high:step"),
        ("lr=1,1", "search: lr: expected each value once, got '1,1'"),
    ],
)
def test_what_is_no_range_is_one_line(text, message):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        Search.parse([text])
    assert "\n" not in str(caught.value)


def test_a_name_comes_once():
    with pytest.raises(ValueError, match="search: lr: expected the name once"):
        Search.parse(["lr=1,2", "lr=3,4"])
    with pytest.raises(ValueError, match="search: expected a hyperparameter or more"):
        Search.parse([])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 9), st.integers(1, 99))
def test_a_grid_has_each_combination_once(sizes, seed, most):
    names = ["lr", "l1", "l2", "dropout"]
    parameters = [Choices(n, tuple(range(s))) for n, s in zip(names, sizes, strict=False)]
    grid = Search(tuple(parameters)).grid(most, seed)
    whole = Search(tuple(parameters)).grid(10**6, seed)
    assert grid == whole[:most]
    assert len({tuple(point.values()) for point in whole}) == len(whole) == math.prod(sizes)


def test_a_grid_is_in_an_order_by_the_seed():
    search = Search.parse(["depth=1,2,3,4,5,6,7,8,9"])
    assert search.grid(9, 0) == search.grid(9, 0) != search.grid(9, 1)
    with pytest.raises(ValueError, match="search: lr: a grid needs values, as a,b,c"):
        Search.parse(LR).grid(9, 0)
    many = ",".join(map(str, range(1, 200)))
    with pytest.raises(ValueError, match="expected up to 1000000 combinations, got 7880599"):
        Search.parse([f"{name}={many}" for name in ("depth", "width", "epochs")]).grid(9, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "luck"}, "method: expected one of grid, random, bayes, got 'luck'"),
        ({"engine": "steam"}, "engine: expected one of optuna, ray, got 'steam'"),
        ({"trials": 0}, "trials: expected >= 1, got 0"),
        ({"jobs": 0}, "jobs: expected >= 1, got 0"),
        ({"method": "grid"}, "search: lr: a grid needs values"),
        ({"config": replace(IRIS, devices=2)}, "devices: expected 1, .*, got 2"),
        ({"config": replace(IRIS, devices="auto")}, "devices: expected 1, .*, got 'auto'"),
        ({"config": replace(IRIS, num_nodes=2)}, "num_nodes: expected 1"),
        ({"config": replace(IRIS, dataset="none"), "objective": None}, "dataset: expected"),
    ],
)
def test_wrong_arguments_raise_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        search(tmp_path, LR, **options)
    assert not list(tmp_path.iterdir())


# The search.


def test_every_method_finds_the_planted_optimum(tmp_path):
    grid = search(tmp_path, ["lr=1e-6,1e-2,10"], method="grid")
    assert grid.best.params == {"lr": 0.01}
    assert len(grid.trials) == 3
    config = replace(IRIS, seed=1)
    assert search(tmp_path, LR, method="random", trials=10, config=config).best.value < 0.35
    bayes = search(tmp_path, LR, trials=25, config=config)
    assert bayes.best.value < 0.2  # a third of a decade
    # By chance half of the losses are above 4.1; a model of the first ten proposes better.
    assert sorted(trial.value for trial in bayes.trials[10:])[7] < 2


@pytest.mark.parametrize(("count", "expected"), [(4, 4), (99, 6)])
def test_a_grid_ends_with_its_combinations_or_its_trials(tmp_path, count, expected):
    texts = ["lr=0.1,1", "depth=1,2,3"]
    results = search(tmp_path, texts, method="grid", trials=count)
    assert points(results) == Search.parse(texts).grid(count, 0)
    assert len(results.trials) == expected


def test_the_seed_decides(tmp_path):
    for method, count in (("random", 3), ("bayes", 12)):
        a, b, c = (
            points(search(tmp_path, LR, method=method, trials=n, config=replace(IRIS, seed=seed)))
            for seed, n in ((0, count), (0, count), (1, 2))
        )
        assert a == b
        assert a[:2] != c
        assert len({p["lr"] for p in a}) == count


def test_integers_stay_integers_and_ranges_hold(tmp_path):
    texts = ["width=16:64:16", "depth=1:3", "batch_size=8:64:log", "dropout=0:0.5:0.25"]
    tried = points(search(tmp_path, texts, method="random", trials=12))
    assert all(isinstance(p[name], int) for p in tried for name in list(p)[:3])
    assert {p["width"] for p in tried} == {16, 32, 48, 64}
    assert {p["depth"] for p in tried} == {1, 2, 3}
    assert {p["dropout"] for p in tried} == {0.0, 0.25, 0.5}
    assert all(8 <= p["batch_size"] <= 64 for p in tried)


def test_a_failed_trial_is_one_of_the_trials(tmp_path, capsys):
    def fragile(config, root, report):
        return Outcome(error="it broke") if config.depth == 2 else bowl(config, root, report)

    results = search(tmp_path, ["depth=1,2,3"], fragile, method="grid")
    states = {trial.params["depth"]: (trial.state, trial.error) for trial in results.trials}
    assert states == {1: ("complete", None), 2: ("failed", "it broke"), 3: ("complete", None)}
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert sum("failed: it broke" in line for line in lines) == 1
    assert lines[-1].startswith("3/3  trial 2: ")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_a_loss_that_is_not_finite_is_no_loss(value, place, tmp_path):
    def planted(config, root, report):
        loss = value if config.depth == place + 1 else 2.0
        report(0, loss)
        return Outcome(loss, 0.1, 1)

    results = search(tmp_path, ["depth=1,2"], planted, method="grid")
    bad = next(trial for trial in results.trials if trial.params["depth"] == place + 1)
    assert (bad.state, bad.value, bad.error) == ("failed", None, f"its loss is {value}")
    assert results.best.value == 2.0
    assert "inf" not in (results.path / "trials.csv").read_text()


def test_a_pruner_hears_of_no_loss_that_is_not_finite(tmp_path):
    heard = []

    def objective(config, root, report):
        for epoch, loss in enumerate([math.nan, 1.0, -math.inf]):
            report(epoch, loss)
        return Outcome(1.0)

    try_once(objective, IRIS, tmp_path, lambda *values: heard.append(values))
    assert heard == [(1, 1.0)]


def test_all_failed(tmp_path):
    results = search(tmp_path, ["depth=1,2"], lambda *_: Outcome(error="no"), method="grid")
    assert results.best is None
    assert results.no_importance == "two complete trials are needed"
    assert {f.name for f in results.path.iterdir()} == {
        "search.yaml",
        "study.db",
        "trials",
        "trials.csv",
    }


def tells(config, root, report):
    """Ten epochs at a loss that is the width."""
    for epoch in range(10):
        report(epoch, float(config.width))
    return Outcome(float(config.width), 0.0, 10)


def test_pruned_trials_are_recorded(tmp_path):
    texts = ["width=1:99"]
    results = search(tmp_path, texts, tells, method="random", trials=12)
    pruned = [trial for trial in results.trials if trial.state == "pruned"]
    assert pruned
    for trial in pruned:
        assert trial.number >= 5
        assert trial.epochs == 6  # the sixth is the first that may be the last
        assert trial.value == trial.params["width"]
        before = sorted(t.value for t in results.trials[: trial.number] if t.state == "complete")
        assert trial.value > before[len(before) // 2 - 1]
    assert results.best.value == min(trial.value for trial in results.trials)
    assert len(results.trials) == 12
    table = list(csv.DictReader((results.path / "trials.csv").read_text().splitlines()))
    assert [row["state"] for row in table] == [trial.state for trial in results.trials]
    whole = search(tmp_path, texts, tells, method="random", trials=8, prune=False)
    assert {trial.state for trial in whole.trials} == {"complete"}
    assert "pruned" in [trial.state for trial in results.trials[:8]]


class Stop(Exception):
    pass


class StopsAt:
    """An objective that is interrupted once."""

    def __init__(self, count):
        self.count = count

    def __call__(self, config, root, report):
        self.count -= 1
        if self.count == 0:
            raise Stop
        return bowl(config, root, report)


@pytest.mark.parametrize(
    ("method", "texts", "count"),
    [("random", LR, 4), ("bayes", LR, 12), ("grid", ["lr=1,2,3", "depth=1,2"], 6)],
)
def test_a_resumed_search_tries_what_the_uninterrupted_one_does(tmp_path, method, texts, count):
    options = {"method": method, "trials": count}
    whole = points(search(tmp_path / "whole", texts, **options))
    objective = StopsAt(3)
    with pytest.raises(Stop):
        search(tmp_path, texts, objective, **options)
    results = search(tmp_path, texts, objective, resume=True, **options)
    states = [trial.state for trial in results.trials]
    assert states == ["complete"] * 2 + ["killed"] + ["complete"] * (count - 2)
    assert results.trials[2].params == results.trials[3].params
    assert [t.params for t in results.trials if t.state != "killed"] == whole


def test_what_was_under_way_is_tried_again_whatever_ended_since(tmp_path):
    options = {"config": replace(IRIS, seed=1), "trials": 12}
    search(tmp_path, LR, **options)
    plan = _plan(options["config"], LR, "bayes", 15, 3, None, tmp_path)
    storage = _storage(plan)
    study = _open_study(plan, storage)
    asked = list(_asked(plan, study))  # by three jobs
    lost = [trial.params for trial in asked[1:]]
    _tell(study, asked[0], Outcome(-9.0))  # now the model of the losses would propose others
    storage.engine.dispose()  # and now the kill
    results = search(tmp_path, LR, resume=True, **options | {"trials": 15})
    assert points(results)[13:] == lost + lost
    states = [trial.state for trial in results.trials[12:]]
    assert states == ["complete", "killed", "killed", "complete", "complete"]


def test_resume_may_ask_for_more(tmp_path):
    search(tmp_path, LR, trials=3)
    results = search(tmp_path, LR, trials=5, resume=True)
    assert points(results) == points(search(tmp_path / "whole", LR, trials=5))
    assert len(search(tmp_path, LR, trials=2, resume=True).trials) == 5


def test_a_search_whose_folder_has_another_name_since_goes_on(tmp_path):
    before = points(search(tmp_path, LR, trials=2))
    (tmp_path / "tune-iris").rename(tmp_path / "other")
    tried = []

    def counted(config, root, report):
        tried.append(config.lr)
        return bowl(config, root, report)

    config = replace(IRIS, name="other")
    results = search(tmp_path, LR, counted, config, trials=3, resume=True)
    assert points(results) == [*before, {"lr": tried[0]}]
    assert len(tried) == 1  # beginning anew, it would draw the first two again


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "resume: .*study.db is missing"),
        (b"", "resume: .*study.db is damaged: it holds no search"),
        (b"no database" * 99, "resume: .*study.db is damaged: file is not a database"),
    ],
)
def test_a_search_whose_trials_are_lost_does_not_begin_anew(tmp_path, content, message):
    path = search(tmp_path, LR, trials=2).path
    (path / "study.db").unlink()
    if content is not None:
        (path / "study.db").write_bytes(content)
    before = {file: file.read_bytes() for file in path.iterdir() if file.is_file()}
    for _ in range(2):  # the error is no beginning, either
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            search(tmp_path, LR, fails, trials=3, resume=True)
    assert {file: file.read_bytes() for file in path.iterdir() if file.is_file()} == before


def fails(config, root, report):
    raise AssertionError("it was tried")


def test_a_second_search_of_a_name_does_not_spoil_the_first(tmp_path):
    def second(config, root, report):
        for resume in (False, True):
            with pytest.raises(OSError, match="another search is writing to it; --name names") as e:
                search(tmp_path, LR, fails, trials=3, resume=resume)
            assert e.value.filename == str(tmp_path / "tune-iris")
        return bowl(config, root, report)

    alone = search(tmp_path / "alone", LR, trials=3)
    first = search(tmp_path, LR, second, trials=3)
    assert points(first) == points(alone)
    assert search(tmp_path, LR, trials=1).best  # the folder is free again


# A full disk.


def test_a_full_disk_leaves_what_was_asked_for(tmp_path):
    path = search(tmp_path, LR, trials=2).path
    before = (path / "search.yaml").read_bytes()
    with full_disk(100), pytest.raises(OSError, match=r"File too large: .*search.yaml'"):
        search(tmp_path, LR, trials=3, resume=True)
    assert (path / "search.yaml").read_bytes() == before
    assert len(search(tmp_path, LR, trials=3, resume=True).trials) == 3


# 100 bytes are less than a table of two trials, 500 more than it and less than a configuration.
@pytest.mark.parametrize(("size", "file"), [(100, "trials.csv"), (500, "best.yaml")])
def test_a_full_disk_leaves_the_last_results(tmp_path, monkeypatch, size, file):
    module = sys.modules[tune.__module__]
    path = search(tmp_path, LR, trials=2).path
    before = (path / file).read_bytes()
    monkeypatch.setattr(module, "write_results", full_disk(size)(module.write_results))
    with pytest.raises(OSError, match=rf"File too large: .*{file}'"):
        search(tmp_path, LR, trials=2, resume=True)
    assert (path / file).read_bytes() == before


def test_a_full_disk_is_told_by_the_study_and_the_search_goes_on(tmp_path):
    def filling(config, root, report):
        disk.enter_context(full_disk(100))
        return bowl(config, root, report)

    with ExitStack() as disk, pytest.raises(OSError, match=r"study.db'"):
        search(tmp_path, LR, filling, trials=3)
    states = [t.state for t in search(tmp_path, LR, trials=3, resume=True).trials]
    assert states == ["killed"] + ["complete"] * 3
    plan = _plan(IRIS, LR, "bayes", 1, 1, None, tmp_path)
    (plan.path / "study.db").unlink()
    with full_disk(100), pytest.raises(OSError, match=r"study.db'"):
        run_optuna(plan, bowl)


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (LR, {"method": "random"}, "resume: method was 'bayes' in .*, got 'random'"),
        (["lr=1,2"], {}, "resume: search was .*, got "),
        (LR, {"config": replace(IRIS, width=17)}, "resume: width was 16 in .*, got 17"),
    ],
)
def test_a_resumed_search_is_the_same_search(tmp_path, texts, options, message):
    search(tmp_path, LR, trials=1)
    with pytest.raises(ValueError, match=message):
        search(tmp_path, texts, resume=True, **options)
    with pytest.raises(FileNotFoundError, match="resume: no search in"):
        search(tmp_path / "none", LR, resume=True)


def test_other_data_are_not_resumed(tmp_path):
    table = tmp_path / "t.csv"
    rows = [f"{i * 7 % 11},{'ab'[i % 2]}" for i in range(40)]
    table.write_text("\n".join(["u,label", *rows]) + "\n")
    config = replace(IRIS, dataset=f"csv:{table}", epochs=1, name="t")
    path = search(tmp_path, LR, None, config, trials=1).path
    assert len(search(tmp_path, LR, None, config, trials=2, resume=True).trials) == 2
    before = {file: file.read_bytes() for file in path.iterdir() if file.is_file()}
    table.write_text("\n".join(["u,label", "5,b", *rows[1:]]) + "\n")
    message = (
        "resume: the samples, targets or names of csv:.*t.csv are other than those of .*t "
        r"\(fingerprint [0-9a-f]{12}, now [0-9a-f]{12}\)"
    )
    with pytest.raises(ValueError, match=message):
        search(tmp_path, LR, None, config, trials=3, resume=True)
    assert {file: file.read_bytes() for file in path.iterdir() if file.is_file()} == before
    (path / "fingerprint.txt").unlink()  # as an earlier version left it
    assert len(search(tmp_path, LR, None, config, trials=3, resume=True).trials) == 3


class Word(str):
    """Text that YAML has no form for."""


def test_nothing_is_cleared_for_what_cannot_be_written(tmp_path):
    path = search(tmp_path, LR, trials=1).path
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with pytest.raises(RepresenterError):
        search(tmp_path, LR, config=replace(IRIS, init=Word("he")), trials=1)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_a_new_search_replaces_its_own_files_alone(tmp_path):
    folder = search(tmp_path, LR, trials=2).path
    for name in ("sweep.png", "study.db-journal", "trials/9", "ray"):
        (folder / name).mkdir() if name in ("trials/9", "ray") else (folder / name).touch()
    (folder / "notes.txt").write_text("mine")
    results = search(tmp_path, ["activation=relu,tanh"], method="grid")
    assert len(results.trials) == 2
    assert not list((folder / "trials").iterdir())
    assert {file.name for file in folder.iterdir()} == {
        "notes.txt",
        "study.db",
        "search.yaml",
        "trials",
        "trials.csv",
        "best.yaml",
        "history.png",
    }


def needs_two(config, root, report):
    """At depth 2 the process dies, as where memory is short; depth 1 waits for depth 3."""
    if config.depth == 2:
        os._exit(9)
    (root / f"depth-{config.depth}").touch()
    end = time.monotonic() + 60
    while config.depth == 1 and not (root / "depth-3").exists():
        if time.monotonic() > end:
            return Outcome(error="nobody else is at work")
        time.sleep(0.01)
    return Outcome(float(config.depth), 0.0, os.getpid())


def test_two_jobs_and_a_worker_that_dies(tmp_path):
    texts = ["depth=1,2,3,4,5"]
    order = [point["depth"] for point in Search.parse(texts).grid(5, 0)]
    assert order.index(1) < order.index(2) < order.index(3)
    results = search(tmp_path, texts, needs_two, method="grid", jobs=2)
    found = {trial.params["depth"]: (trial.state, trial.error) for trial in results.trials}
    assert found.pop(2) == ("failed", "its process ended with 9")
    assert found == dict.fromkeys([1, 3, 4, 5], ("complete", None))
    assert os.getpid() not in {trial.epochs for trial in results.trials}
    assert results.best.params == {"depth": 1}


def wrong(config, root, report):
    raise KeyError("a mistake")


def test_a_mistake_in_a_worker_is_raised(tmp_path, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *_: None)  # a process may, a thread may not
    plan = _plan(IRIS, ["depth=1,2"], "random", 2, 2, None, tmp_path)
    plan.path.mkdir()
    storage = _storage(plan)
    trial = next(_asked(plan, _open_study(plan, storage)))
    ours, theirs = Pipe()
    worker = Thread(target=_work, args=(plan, wrong, theirs))
    worker.start()
    assert _receive(None, ours) is None  # ready
    ours.send(trial._trial_id)
    with pytest.raises(KeyError, match="a mistake"):
        _receive(None, ours)
    ours.close()
    worker.join(60)
    assert not worker.is_alive()  # the end of the search is its end
    theirs.close()
    storage.engine.dispose()


# Training.


def test_training_finds_the_planted_rate_and_never_opens_the_test_part(tmp_path, monkeypatch):
    def opened(self):
        raise AssertionError("the test part was opened")

    monkeypatch.setattr(DataModule, "test_dataloader", opened)
    results = search(tmp_path, ["lr=1e-6,1e-2"], None, method="grid")
    assert results.best.params == {"lr": 0.01}
    metrics = [read(tmp_path, f"trials/{t.number}/metrics.json") for t in results.trials]
    assert [m["best_val_loss"] for m in metrics] == [t.value for t in results.trials]
    assert [m["test_opened"] for m in metrics] == [0, 0]
    assert not [n for m in metrics for n in m if n.startswith("test_") and n != "test_opened"]
    assert all(m["parity_max_loss_diff"] is None for m in metrics)
    monkeypatch.undo()

    best = read(tmp_path, "best.yaml")
    assert (best["name"], best["parity"], best["lr"], best["threads"]) == (None, True, 0.01, 1)
    run = Run(Config(**best), root=tmp_path, progress=False)
    assert run.execute(test=False)["best_val_loss"] == results.best.value
    row = run.history.rows[run.stopping.best_epoch]
    assert row["train_loss"] == results.best.train_loss

    table = list(csv.DictReader((results.path / "trials.csv").read_text().splitlines()))
    assert list(table[0]) == [
        "number", "state", "value", "train_loss", "lr", "seconds", "epochs_trained",
    ]  # fmt: skip
    assert [float(row["value"]) for row in table] == [t.value for t in results.trials]
    assert (results.path / "sweep.png").read_bytes().startswith(PNG)


def test_what_cannot_run_or_diverges_has_failed(tmp_path):
    config = replace(IRIS, epochs=2, optimizer="sgd", batch_norm=False)
    results = search(tmp_path, ["lr=0.01,1e30"], None, config, method="grid")
    states = {trial.params["lr"]: (trial.state, trial.error) for trial in results.trials}
    assert states == {0.01: ("complete", None), 1e30: ("failed", "val_loss was never finite")}
    told = []  # a loss that is not finite would be pruned, not failed
    try_once(Training(), replace(config, lr=1e30), tmp_path, lambda *args: told.append(args))
    assert told == []
    outcome = Training()(replace(IRIS, batch_size=1), tmp_path, lambda *args: None)
    assert outcome.error.startswith("batch_size: batch norm needs two samples or more")


def test_a_rate_that_overflows_is_a_failed_trial(tmp_path):
    config = replace(IRIS, epochs=1)
    results = search(tmp_path, ["lr=1e38,0.01"], None, config, method="grid")
    states = {trial.params["lr"]: trial.state for trial in results.trials}
    assert states == {1e38: "failed", 0.01: "complete"}


def test_training_tells_each_epoch_to_the_pruner(tmp_path):
    told = []
    config = replace(IRIS, epochs=3, name="told")
    outcome = Training()(config, tmp_path, lambda *args: told.append(args))
    assert [epoch for epoch, _ in told] == [0, 1, 2]
    assert min(loss for _, loss in told) == outcome.value


# Results.


def trial(number, value, state="complete", **params):
    return Trial(number, state, value, None if value is None else value / 2, params)


def test_importance_tells_what_matters():
    search = Search.parse(["lr=0:1", "dropout=0:1", "depth=1,2"])
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(40, 2, generator=generator).tolist()
    trials = [trial(i, a + b / 10, lr=a, dropout=b, depth=1) for i, (a, b) in enumerate(draws)]
    importance = measure_importance(search, [*trials, trial(40, 9.0, "pruned", lr=0.0)])
    assert list(importance) == ["lr", "dropout"]  # depth did not vary
    assert importance["lr"] > 0.8
    assert sum(importance.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("trials", "message"),
    [
        ([trial(0, 1.0, lr=1.0, l2=0.0)], "two complete trials are needed"),
        ([trial(i, 1.0, lr=i, l2=i) for i in range(3)], "all complete trials have the same loss"),
        ([trial(i, float(i), lr=i, l2=0) for i in range(3)], "only one hyperparameter varies"),
    ],
)
def test_importance_may_be_unknown(trials, message):
    with pytest.raises(ValueError, match=message):
        measure_importance(Search.parse(["lr=0:9", "l2=0:9"]), trials)


@pytest.mark.parametrize("values", [[0, 1e-6, 1e-1], [1e-6, 1e-1], [0, 0.5], [1, 2], [3]])
def test_pictures(tmp_path, values):
    trials = [trial(i, 1.0 + i, l2=value) for i, value in enumerate(values)]
    plot_sweep(trials, "l2", tmp_path / "a.png")
    others = [trial(8, 1e4, "pruned", l2=1.0), trial(9, None, "failed", l2=1.0)]
    plot_history([*trials, *others], tmp_path / "b.png")
    assert all((tmp_path / name).read_bytes().startswith(PNG) for name in ("a.png", "b.png"))


@pytest.mark.parametrize(
    ("texts", "drawn"),
    [
        (["l2=0,1"], True),
        (["depth=1,2"], True),
        (["batch_size=8,full"], False),
        (["batch_norm=yes,no"], False),
        (["activation=relu,tanh"], False),
        (["l2=0,1", "depth=1,2"], False),
    ],
)
def test_a_sweep_is_of_one_number(tmp_path, texts, drawn):
    results = search(tmp_path, texts, method="grid")
    assert (results.path / "sweep.png").exists() == drawn


@pytest.mark.parametrize("name", ["a?b", "x#y", "50%41", "two words"])
def test_the_study_lies_in_the_folder_whatever_its_name(tmp_path, name):
    for choices in ("lr=0.1,0.2", "lr=0.3,0.4"):  # a new search knows nothing of the old one
        config = replace(IRIS, name=name)
        results = search(tmp_path, [choices], config=config, method="grid")
        tried = sorted(trial.params["lr"] for trial in results.trials)
        assert tried == [float(value) for value in choices[3:].split(",")]
    assert (tmp_path / name / "study.db").is_file()
    assert [path.name for path in tmp_path.iterdir()] == [name]

"""The search by Ray Tune, with two workers on this machine."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml

pytest.importorskip("ray", reason="no ray: pip install -e '.[ray]' brings it")

from torchref.training import Config, Run
from torchref.training.tune import Range, Search, tune
from torchref.training.tune_ray import _domain, _params

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),  # Lightning on torch's newer pytree
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves its log files open
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
]

IRIS = Config(dataset="iris", epochs=6, width=16, batch_size=16, accelerator="cpu")


def test_a_search_with_two_workers(tmp_path):
    texts = ["lr=1e-6,1e-2", "batch_size=1,16"]
    results = tune(IRIS, texts, method="grid", jobs=2, engine="ray", root=tmp_path)
    assert [trial.number for trial in results.trials] == [0, 1, 2, 3]
    assert [trial.params for trial in results.trials] == Search.parse(texts).grid(4, 0)
    for trial in results.trials:
        alone = trial.params["batch_size"] == 1
        assert trial.state == ("failed" if alone else "complete")
        assert ("batch norm needs two samples" in (trial.error or "")) == alone
    assert results.best.params == {"lr": 0.01, "batch_size": 16}
    best = Config(**yaml.safe_load((results.path / "best.yaml").read_text()))
    assert best == replace(IRIS, lr=0.01, threads=1)
    again = Run(best, root=tmp_path, progress=False).execute(test=False)
    assert again["best_val_loss"] == results.best.value
    metrics = yaml.safe_load(
        (results.path / "trials" / str(results.best.number) / "metrics.json").read_text()
    )
    assert metrics["best_val_loss"] == results.best.value
    assert metrics["test_opened"] == 0
    assert {"history.png", "trials.csv", "ray"} <= {f.name for f in results.path.iterdir()}


PROGRAM = """
from torchref.training import Config
from torchref.training.tune import tune
config = Config(dataset="iris", epochs=6, width=16, accelerator="cpu")
results = tune(config, ["lr=1e-4:1e-1:log", "width=8:32:8"], trials=8, jobs=2, engine="ray",
               resume={resume})
print([trial.state for trial in results.trials], [trial.params for trial in results.trials])
"""


@pytest.mark.slow
def test_killed_and_resumed(tmp_path):
    command = [sys.executable, "-c", PROGRAM.format(resume=False)]
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    lines = [process.stderr.readline() for _ in range(3)]
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert lines[0].startswith("1/8  trial ")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(resume=True)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,  # on a busy machine
    )
    ended = [line for line in done.stderr.splitlines() if "/8  trial " in line]
    assert 1 <= len(ended) < 8  # what had ended was not tried again
    assert ended[-1].startswith("8/8")
    assert len(ended) == len(done.stderr.splitlines())
    assert done.stdout.count("'lr'") == 8
    assert done.stdout.count("'complete'") + done.stdout.count("'pruned'") == 8


def test_a_search_whose_trials_are_lost_does_not_begin_anew(tmp_path):
    asked = {"search": ["lr=0.01,0.1"], "engine": "ray", "root": tmp_path, "trials": 1}
    path = tune(IRIS, **asked).path
    shutil.rmtree(path / "ray")
    with pytest.raises(FileNotFoundError, match="resume: .*ray is missing"):
        tune(IRIS, resume=True, **asked)
    assert [trial.name for trial in (path / "trials").iterdir()] == ["0"]


def test_ranges_are_as_optuna_draws_them():
    import numpy as np

    random = np.random.default_rng(0)
    for parameter, expected in (
        (Range("width", 10, 42, step=16), {10, 26, 42}),
        (Range("depth", 1, 3), {1, 2, 3}),
        (Range("dropout", 0.1, 0.3, step=0.1), {0.1, 0.2, 0.3}),
        (Range("batch_size", 2, 4, log=True), {2, 3, 4}),
    ):
        plan = type("Plan", (), {"method": "random", "search": Search((parameter,))})
        drawn = {
            _params(plan, {parameter.name: _domain(parameter).sample(random_state=random)})[
                parameter.name
            ]
            for _ in range(200)
        }
        assert {round(value, 9) for value in drawn} == expected

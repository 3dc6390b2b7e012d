"""The search of :mod:`torchref.training.tune` by Ray Tune, on this machine."""

# pyright: reportMissingImports=false
# Ray is an extra of its own, and the types are checked without it, too.

import logging
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torchref.training.tune import (
    UNPRUNED,
    Choices,
    Objective,
    Plan,
    Range,
    Trial,
    best_of,
    tell_progress,
    try_once,
)

if TYPE_CHECKING:
    from ray import tune

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths are meant from where the search was started
    "RAY_AIR_NEW_OUTPUT": "0",  # its tables, also at verbose=0
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # a trial's run writes its own metrics.csv
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a failed trial has no loss
    "TUNE_GLOBAL_CHECKPOINT_S": "1",  # what a kill may lose
}


def run_ray(plan: Plan, objective: Objective, resume: bool) -> list[Trial]:
    """Let Ray Tune try; its own files, from which a killed search goes on, are in ``ray/``.

    Ray is started with one CPU for each job, without dashboard and usage statistics, unless the
    program has started it already.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray

    ours = not ray.is_initialized()
    if ours:
        logging.getLogger("ray").setLevel(logging.CRITICAL)
        ray.init(
            address="local",
            num_cpus=plan.jobs,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.CRITICAL,
        )
    try:
        with warnings.catch_warnings():
            # Optuna's, of a trial that is tried again and so tells its epochs again
            warnings.filterwarnings("ignore", message="The reported value is ignored")
            results = _tuner(plan, objective, resume).fit()
        records = [
            _record(plan, Path(r.path).name, r.config or {}, r.metrics or {}, r.error)
            for r in results
        ]
    finally:
        if ours:
            ray.shutdown()
    return sorted(records, key=lambda trial: trial.number)


def _tuner(plan: Plan, objective: Objective, resume: bool) -> "tune.Tuner":
    from ray import tune

    path = plan.path.resolve() / "ray"
    trainable = _trainable(plan, objective)
    if resume:
        if not tune.Tuner.can_restore(str(path)):
            raise FileNotFoundError(f"resume: {path} is missing, and with it what was tried")
        return tune.Tuner.restore(str(path), trainable, resume_unfinished=True)
    return tune.Tuner(
        trainable,
        param_space=_space(plan),
        tune_config=tune.TuneConfig(
            search_alg=_search_algorithm(plan),
            scheduler=_scheduler(plan),
            num_samples=1 if plan.method == "grid" else plan.trials,
            max_concurrent_trials=None if plan.method != "bayes" else plan.jobs,
            trial_name_creator=_claim_number(plan.path.resolve() / "trials"),
            trial_dirname_creator=str,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=path.name,
            storage_path=str(path.parent),
            verbose=0,
            callbacks=[_progress(plan)],
        ),
    )


def _trainable(plan: Plan, objective: Objective) -> Any:
    from ray import tune

    root = plan.path.resolve() / "trials"

    def trial(values: dict[str, Any]) -> None:
        number = int(tune.get_context().get_trial_name())
        best = float("inf")

        def report(epoch: int, loss: float) -> None:
            nonlocal best
            best = min(best, loss)
            tune.report({"val_loss": loss, "best_val_loss": best, "epochs": epoch + 1})

        config = plan.trial_config(_params(plan, values), number)
        outcome = try_once(objective, config, root, report)
        if outcome.value is None:  # no exception: Ray would start a new process for the next trial
            lost = {"best_val_loss": float("inf"), "error": outcome.error}
            tune.report({**lost, "epochs": outcome.epochs})
            return
        losses = {"val_loss": outcome.value, "best_val_loss": outcome.value}
        tune.report({**losses, "train_loss": outcome.train_loss, "epochs": outcome.epochs})

    gpu = torch.cuda.is_available() and plan.config.accelerator in ("auto", "gpu", "cuda")
    return tune.with_resources(trial, {"cpu": 1, "gpu": 1 / plan.jobs if gpu else 0})


def _space(plan: Plan) -> dict[str, Any]:
    from ray import tune

    if plan.method == "grid":
        return {"point": tune.grid_search(plan.grid())}  # capped, and in the order by the seed
    return {parameter.name: _domain(parameter) for parameter in plan.search.parameters}


def _domain(parameter: Choices | Range) -> Any:
    from ray import tune

    if isinstance(parameter, Choices):
        return tune.choice(list(parameter.values))
    low, high = parameter.low, parameter.high
    if parameter.step is not None:  # Ray's own steps are multiples, wherever `low` is
        return tune.randint(0, round((high - low) / parameter.step) + 1)
    if parameter.is_integer:  # Ray leaves out the end of integers
        draw = tune.lograndint if parameter.log else tune.randint
        return draw(int(low), int(high) + 1)
    return (tune.loguniform if parameter.log else tune.uniform)(low, high)


def _params(plan: Plan, values: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters that Ray's values stand for."""
    if plan.method == "grid":
        return dict(values["point"])
    params = {p.name: values[p.name] for p in plan.search.parameters}
    for p in plan.search.parameters:
        if isinstance(p, Range) and p.step is not None:
            params[p.name] = type(p.low)(p.low + params[p.name] * p.step)
    return params


def _search_algorithm(plan: Plan) -> Any:
    from ray.tune.search import BasicVariantGenerator
    from ray.tune.search.optuna import OptunaSearch

    if plan.method == "bayes":
        return OptunaSearch(metric="best_val_loss", mode="min", seed=plan.config.seed)
    return BasicVariantGenerator(max_concurrent=plan.jobs, random_state=plan.config.seed)


def _scheduler(plan: Plan) -> Any:
    from ray.tune.schedulers import FIFOScheduler, MedianStoppingRule

    if not plan.prune:
        return FIFOScheduler()
    return MedianStoppingRule(
        time_attr="epochs",
        metric="val_loss",
        mode="min",
        grace_period=UNPRUNED,
        min_samples_required=UNPRUNED,
    )


def _claim_number(path: Path) -> Callable[[Any], str]:
    """Name a new trial by the first number without a folder, also after a search was resumed."""

    def claim(trial: Any) -> str:
        number = 0
        while (path / str(number)).exists():
            number += 1
        (path / str(number)).mkdir(parents=True)
        return str(number)

    return claim


def _progress(plan: Plan) -> "tune.Callback":
    from ray import tune

    class Progress(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            self._tell(trials, trial, None)

        def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            self._tell(trials, trial, RuntimeError("an error that the end will tell"))

        def _tell(self, trials: list, trial: Any, error: Exception | None) -> None:
            ended = [t for t in trials if t.is_finished() and t is not trial]
            before = [_record(plan, str(t), t.config, t.last_result, None) for t in ended]
            record = _record(plan, str(trial), trial.config, trial.last_result, error)
            tell_progress(record, best_of([*before, record]), len(ended) + 1, plan.total)

    return Progress()


def _record(
    plan: Plan,
    number: str,
    values: Mapping[str, Any],
    metrics: Mapping[str, Any],
    error: BaseException | None,
) -> Trial:
    reason = str(error).strip().splitlines()[-1] if error else metrics.get("error")
    state = "failed" if reason else "complete" if "train_loss" in metrics else "pruned"
    return Trial(
        int(number),
        state,
        None if reason else metrics.get("best_val_loss"),
        metrics.get("train_loss"),
        _params(plan, values),
        round(metrics.get("time_total_s", 0.0), 2),
        metrics.get("epochs", 0),
        reason,
    )

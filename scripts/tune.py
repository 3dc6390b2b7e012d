"""Search hyperparameters for the smallest validation loss; the test part stays closed.

python scripts/tune.py                                the course's hyperparameters, on digits
python scripts/tune.py --search lr=1e-4:1e-1:log width=16:256:16 activation=relu,tanh --jobs 4
python scripts/tune.py --method grid --search l2=0,1e-6,1e-5,1e-4,1e-3,1e-2,1e-1
python scripts/tune.py --resume --trials 60           what the last one asked for, and more of it
python scripts/train.py --config runs/tune-digits/best.yaml
"""

import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from jsonargparse import ActionYesNo

from torchref.training.command_line import (
    USER_ERRORS,
    OneLineParser,
    add_config,
    describe,
    to_config,
)
from torchref.training.config import read_mapping
from torchref.training.tune import DEFAULT, Results, describe_params, search_folder, tune

SHOWN = ("best.yaml", "trials.csv", "history.png", "importance.png", "sweep.png")


def tune_parser() -> OneLineParser:
    parser = OneLineParser(
        prog="tune.py",
        description="Search hyperparameters. The flags of train.py are what all trials have in "
        "common, --search is what varies.",
    )
    add_config(parser)
    group = parser.add_argument_group("search")
    group.add_argument(
        "--search",
        type=str,
        nargs="+",
        default=list(DEFAULT),
        help="name=a,b,c, name=low:high, name=low:high:log or name=low:high:step of a network's "
        "setting, batch_size, epochs, patience or augment.NAME",
    )
    group.add_argument(
        "--method", type=str, default="bayes", help="grid (of listed values), random or bayes"
    )
    group.add_argument("--trials", type=int, default=30, help="how many are to end, >= 1")
    group.add_argument("--jobs", type=int, default=1, help="how many run at once, >= 1")
    group.add_argument(
        "--prune",
        action=ActionYesNo(no_prefix="no-"),
        default=None,
        help="stop trials that are worse than the median; default: yes, but not for a grid",
    )
    group.add_argument("--engine", type=str, default="optuna", help="optuna or ray")
    group.add_argument("--resume", action="store_true", help="continue the search of that name")
    return parser


def summarize(results: Results) -> None:
    states = Counter(trial.state for trial in results.trials)
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    print(f"trials   {counts}")
    if results.best is not None:
        print(f"best     val_loss {results.best.value:.4f}, trial {results.best.number}")
        print(f"values   {describe_params(results.best.params)}")
    if results.importance is None:
        print(f"matters  unknown: {results.no_importance}")
    else:
        print(f"matters  {', '.join(f'{n} {v:.2f}' for n, v in results.importance.items())}")
    files = ", ".join(name for name in SHOWN if (results.path / name).exists())
    print(f"files    {results.path}/ ({files})")
    if results.best is not None:
        best = shlex.quote(str(results.path / "best.yaml"))
        print(f"next     python scripts/train.py --config {best}")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = tune_parser()
    args, path = read(parser, argv)
    try:
        results = tune(
            to_config(args),
            args.search,
            method=args.method,
            trials=args.trials,
            jobs=args.jobs,
            prune=args.prune,
            engine=args.engine,
            resume=args.resume,
        )
    except USER_ERRORS as error:
        parser.error(describe(error))
    except (KeyboardInterrupt, SystemExit):  # the second is how Lightning leaves after Ctrl-C
        parser.exit(130, f"interrupted; continue with --resume --name {shlex.quote(path.name)}\n")
        raise
    summarize(results)
    if results.best is None:
        errors = [trial.error for trial in results.trials if trial.error]
        parser.exit(1, f"no trial is complete; the last error: {errors[-1]}\n")


def read(parser: OneLineParser, argv: list[str]) -> tuple[Any, Path]:
    """The options and the folder; what the command line leaves open resumes as it was."""
    args = parser.parse_args(argv)
    try:
        path = Path("runs") / search_folder(to_config(args))
        if args.resume:
            saved = path / "search.yaml"
            if not saved.exists():
                raise FileNotFoundError(f"resume: no search in {path}")
            read_mapping(saved)
            args = parser.parse_args(["--config", str(saved), *argv])
    except USER_ERRORS as error:
        parser.error(describe(error))
    return args, path


if __name__ == "__main__":
    main()

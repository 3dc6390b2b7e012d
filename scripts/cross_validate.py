"""Cross-validate a configuration: the scores of k models, each on samples that it never saw.

python scripts/cross_validate.py --dataset iris                      five stratified folds
python scripts/cross_validate.py --config runs/deeper/config.yaml --folds 10 --jobs 4
python scripts/cross_validate.py --dataset wine --repeats 3 --name wine-cv
python scripts/cross_validate.py --resume --name wine-cv
python scripts/cross_validate.py --dataset csv:sales.csv --time day --method time --gap 7
"""

import os
import shlex
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from torchref.training.command_line import (
    USER_ERRORS,
    OneLineParser,
    add_config,
    describe,
    to_config,
)
from torchref.training.config import read_mapping
from torchref.training.cross_validate import CrossValidation, folder_of, is_score


def make_parser() -> OneLineParser:
    parser = OneLineParser(
        prog="cross_validate.py",
        description="Train and score a configuration on k folds of its training and validation "
        "parts; the test part is not opened. A model neither trains on its fold nor stops early by "
        "it. The torch twin (--parity) is for train.py alone.",
    )
    add_config(parser)
    group = parser.add_argument_group("cross-validation")
    group.add_argument("--folds", type=int, default=5, help="how many, >= 2")
    group.add_argument(
        "--method",
        type=str,
        default="auto",
        help="stratified, plain, time (each fold after what its model trained on; --time names a "
        "column) or grouped (--group); auto goes with --split, stratified for classes",
    )
    group.add_argument("--repeats", type=int, default=1, help="times the samples are shared out")
    parser.add_argument("--jobs", type=int, default=1, help="folds at a time, in processes")
    parser.add_argument("--resume", action="store_true", help="keep the folds that are finished")
    return parser


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        if args.resume:  # what the command line leaves open is as it was
            saved = Path("runs") / folder_of(to_config(args)) / "cross_validation.yaml"
            if not saved.exists():
                raise FileNotFoundError(f"resume: no cross-validation in {saved.parent}")
            read_mapping(saved)
            args = parser.parse_args(["--config", str(saved), *argv])
        cv = CrossValidation(to_config(args), args.folds, args.method, args.repeats)
    except USER_ERRORS as error:
        parser.error(describe(error))
    rows = []

    def report(row: dict[str, Any]) -> None:
        rows.append(row)
        tell(as_line(row, len(cv.parts)))

    try:
        result = cv.execute(args.jobs, args.resume, report)
    except (ValueError, OSError, BrokenProcessPool) as error:
        parser.error(describe(error))
    except (KeyboardInterrupt, SystemExit):  # the latter is how Lightning leaves after Ctrl-C
        name = shlex.quote(cv.path.name)
        parser.exit(130, f"interrupted; continue with --resume --name {name}\n")
    tell(f"{summary(result)}\nfiles     {cv.path}/")
    if bad := [str(row["fold"]) for row in rows if row["best_epoch"] is None]:
        parser.exit(1, f"no usable model in fold {', '.join(bad)}: val_loss was never finite\n")


def tell(text: str) -> None:
    """Print; the folds go on when a reader has enough, as `head`, for they end up in files."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # what is left, and what comes, goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def as_line(row: dict[str, Any], count: int) -> str:
    scores = [f"{short(name)} {shown(row[name])}" for name in row if is_score(name)]
    return f"fold {row['fold']:>2}/{count}  epochs {row['epochs']:>3}  {'  '.join(scores)}"


def summary(result: dict[str, Any]) -> str:
    lines = [
        f"{short(name):<9} mean {shown(score['mean'])}, deviation {shown(score['std'])}, "
        f"95% interval from {shown(score['low'])} to {shown(score['high'])}"
        for name, score in result["scores"].items()
    ]
    return "\n".join([*lines, f"the test part of {result['test_samples']} samples was not opened"])


def short(name: str) -> str:
    return name.removeprefix("test_")


def shown(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    main()

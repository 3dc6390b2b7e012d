"""Train a classifier, its torch twin beside it, and predict with it.

python scripts/train.py                               digits, about 15 seconds
python scripts/train.py --lr 0.01 --depth 3 --name deeper
python scripts/train.py --config runs/deeper/config.yaml --seed 1
python scripts/train.py --resume --name deeper --epochs 200
python scripts/train.py --accelerator cpu --devices 2 --strategy ddp
python scripts/train.py predict samples.csv --run runs/digits --threshold 0.9
"""

import csv
import os
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from math import isnan
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from torchref._printing import printing
from torchref.data import read_features, read_texts
from torchref.data.table import Column, is_number, read_table
from torchref.diagnostics import diagnose_size, majority_error, plot_size_curve
from torchref.training import (
    MLPClassifier,
    MLPRegressor,
    Run,
    coverage_curve,
    decide,
    learning_curve_over_size,
    learning_rate_range,
    log_loss,
    overfit_one_batch,
    read_checkpoint,
)
from torchref.training.command_line import (
    USER_ERRORS,
    OneLineParser,
    add_config,
    describe,
    interrupted,
    to_config,
)
from torchref.training.config import read_mapping
from torchref.training.report import write_report

UNSHOWN = ("test_loss", "test_opened")


def train_parser() -> OneLineParser:
    parser = OneLineParser(
        prog="train.py",
        description="Train a classifier, its torch twin beside it. "
        "`train.py predict --help` tells how to use the result.",
    )
    add_config(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="last",
        choices=("last", "previous"),
        help="continue the run of that name, from last.ckpt or, if that is damaged, the one before",
    )
    parser.add_argument(
        "--overfit_batch",
        action="store_true",
        help="no run: check that the network learns one batch by heart",
    )
    parser.add_argument(
        "--lr_range",
        action="store_true",
        help="no run: draw the loss while the learning rate grows, runs/<name>/lr_range.png",
    )
    parser.add_argument(
        "--size_curve",
        action="store_true",
        help="no run: errors over growing shares of the training part, runs/<name>-size/",
    )
    return parser


def train(parser: OneLineParser, argv: list[str]) -> None:
    args = parser.parse_args(argv)
    try:
        if args.resume:  # what the command line leaves open is as it was
            saved = Path("runs") / to_config(args).folder / "config.yaml"
            if not saved.exists():
                raise FileNotFoundError(f"resume: no run in {saved.parent}")
            read_mapping(saved)
            args = parser.parse_args(["--config", str(saved), *argv])
        run = Run(to_config(args), resume=args.resume)
    except USER_ERRORS as error:
        parser.error(describe(error))
    if args.overfit_batch or args.lr_range or args.size_curve:
        try:
            passed = probe(parser, run, args)
        except (ValueError, OSError) as error:
            parser.error(describe(error))
        parser.exit(0 if passed else 1)
    try:
        metrics = run.execute()
    except ConnectionError as error:
        lost(parser, f"{error}; continue with --resume --name {run.path.name}")
    except OSError as error:
        parser.error(describe(error))
    except SystemExit:  # how Lightning leaves after Ctrl-C
        if run.trainer.interrupted:
            interrupted(parser, f"interrupted; continue with --resume --name {run.path.name}\n")
        raise
    if run.trainer.is_global_zero:
        try:
            with printing(parser, "the summary"):
                summarize(run, metrics)
        finally:
            report(parser, run, metrics)
    if metrics["best_epoch"] is None:
        parser.exit(1, "no usable model: val_loss was never finite\n")


def lost(parser: OneLineParser, message: str) -> NoReturn:
    """End at once: what Python does at its end takes seconds, or waits for the lost process."""
    print(f"{parser.prog}: error: {message}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # as Python has it where the stream is closed
            stream.flush()
    os._exit(1)


def probe(parser: OneLineParser, run: Run, args: Any) -> bool:
    passed = True
    if args.overfit_batch:
        check = overfit_one_batch(run.model, next(iter(run.data.train_dataloader())))
        with printing(parser):
            print(f"overfit  {check}")
        passed = check.passed
    if args.lr_range:
        run.path.mkdir(parents=True, exist_ok=True)
        picture = run.path / "lr_range.png"
        suggestion = learning_rate_range(run.model, run.data, picture)[2]
        found = "the loss never fell" if suggestion is None else f"steepest at {suggestion:.2g}"
        with printing(parser):
            print(f"rates    {found}; {picture}")
    if args.size_curve:
        size_curve(parser, run)
    return passed


def size_curve(parser: OneLineParser, run: Run) -> None:
    rows = learning_curve_over_size(run.config, dataset=run.dataset, root=run.path.parent)
    with printing(parser):
        for row in rows:
            train_error, val_error = (_shown(row[name]) for name in ("train_error", "val_error"))
            print(
                f"samples  {row['samples']}: train error {train_error}, "
                f"validation error {val_error}"
            )
    if bad := [str(row["samples"]) for row in rows if isnan(row["val_error"])]:
        parser.exit(1, f"no usable model of {', '.join(bad)} samples: val_loss was never finite\n")
    baseline = 1.0 if run.dataset.classes is None else majority_error(run.dataset.y)
    picture = run.path.parent / f"{run.path.name}-size" / "size_curve.png"
    plot_size_curve(rows, picture)
    found = diagnose_size(rows, baseline=baseline)
    with printing(parser):
        print(f"verdict  {found.verdict}: {found.explanation}\nfiles    {picture}")


def summarize(run: Run, metrics: dict[str, Any]) -> None:
    if metrics["parity_max_loss_diff"] is not None:
        parity = (
            f"largest difference of the loss from torch's {metrics['parity_max_loss_diff']:.3g}"
        )
    elif run.parity and run.parity.off is None:
        parity = "the loss was not finite, nor its difference from torch's"
    else:
        parity = f"off: {run.parity.off if run.parity else '--no-parity'}"
    names = [name for name in metrics if name.startswith("test_") and name not in UNSHOWN]
    scores = ", ".join(f"{name.removeprefix('test_')} {_shown(metrics[name])}" for name in names)
    opened = metrics["test_opened"]
    if opened > 1 and not run.config.reopen_test:
        scores += f" (opened {opened} times: what was chosen since has seen it; --reopen_test)"
    print(
        f"test     {scores}\n"
        f"stopped  {metrics['stop_reason']}\n"
        f"parity   {parity}\n"
        f"files    {run.path}/ ({metrics['epochs']} epochs, {metrics['seconds']:.1f} s)"
    )


def _shown(value: float | None) -> str:
    return "not finite" if value is None or isnan(value) else f"{value:.4f}"


def report(parser: OneLineParser, run: Run, metrics: dict[str, Any]) -> None:
    try:
        write_report(run, metrics, run.path / "report.html")
    except OSError as error:
        parser.error(describe(error))


def predict_parser() -> OneLineParser:
    parser = OneLineParser(
        prog="train.py predict",
        description="Print class and probabilities, or value, of each sample, as CSV.",
    )
    parser.add_argument("file", type=str, help="a sample each row: .csv, .npy, of texts .csv, .txt")
    parser.add_argument("--run", type=str, default="runs/digits", help="folder of a training run")
    parser.add_argument(
        "--threshold",
        type=float | None,
        default=None,
        help="print `abstain` where the largest probability is below it, in [0, 1]",
    )
    parser.add_argument(
        "--target",
        type=str,
        default=None,
        help="column of the file with the true classes: tell log-loss, coverage and accuracy",
    )
    return parser


def load(checkpoint: Path) -> MLPClassifier | MLPRegressor:
    if not checkpoint.exists():
        raise FileNotFoundError(f"no trained run in {checkpoint.parent} ({checkpoint} is missing)")
    try:
        saved = read_checkpoint(checkpoint)
        options = saved["hyper_parameters"]
        model = (MLPClassifier if "classes" in options else MLPRegressor)(**options)
        model.load_state_dict(saved["state_dict"])
        return model
    except Exception:  # a damaged file may raise anything
        raise ValueError(f"{checkpoint}: not a checkpoint of a training run, or damaged") from None


def read(path: str, model: MLPClassifier | MLPRegressor, target: str | None = None) -> Any:
    """The samples of a file, without the column of the true classes where it has one."""
    inputs = model.hparams["inputs"]
    if inputs["kind"] == "text":
        return read_texts(path, target)
    columns, image = inputs.get("columns"), inputs.get("shape")
    samples = read_features(
        path,
        columns and [Column(*column) for column in columns],
        shape=image and tuple(image),
        missing="impute" if inputs.get("missing") else "refuse",
        target=target,
    )
    features = model.hparams["features"]
    if samples.shape[1] != features:
        shape = tuple(samples.shape)
        raise ValueError(f"{path}: expected {features} features, got shape {shape}")
    return samples


def predict(parser: OneLineParser, argv: list[str]) -> None:
    args = parser.parse_args(argv)
    try:
        rows, remarks = predictions(args)
    except USER_ERRORS as error:
        parser.error(describe(error))
    except MemoryError:
        parser.error(f"{args.file}: too large for the memory")
    write(parser, rows)
    for remark in remarks:
        print(remark, file=sys.stderr)


def predictions(args: Any) -> tuple[Iterator[list[str]], list[str]]:
    """The rows to print, and what to tell beside them."""
    model = load(Path(args.run) / "best.ckpt")
    if isinstance(model, MLPRegressor):
        if args.threshold is not None or args.target is not None:
            raise ValueError("threshold, target: expected a model of classes, not of values")
        values = model.predict(read(args.file, model)).tolist()
        return chain([["value"]], ([f"{value:.6g}"] for value in values)), []
    classes = model.hparams["classes"]
    truth = None if args.target is None else as_classes(args.file, args.target, classes)
    probabilities = model.predict_proba(read(args.file, model, args.target))
    decided, remarks = probabilities.argmax(-1), []
    if args.threshold is not None:
        decided = decide(probabilities, args.threshold)
        count = int((decided == -1).sum())
        remarks.append(f"abstained on {count} of {len(decided)}, below {args.threshold}")
    if truth is not None:
        remarks.append(judge(probabilities, truth))
    header = ["class", *(f"p({name})" for name in classes)]
    names = ["abstain" if label == -1 else classes[label] for label in decided.tolist()]
    numbered = zip(names, probabilities.tolist(), strict=True)
    return chain([header], ([name, *(f"{p:.4f}" for p in row)] for name, row in numbered)), remarks


def write(parser: OneLineParser, rows: Iterable[list[str]]) -> None:
    """Print rows as CSV."""
    if sys.stdout is None:  # as Python has it where the stream is closed
        parser.error("the predictions cannot be written: standard output is closed")
    with printing(parser, "the predictions"):
        csv.writer(sys.stdout, lineterminator="\n").writerows(rows)


def as_classes(path: str, target: str, classes: list[str]) -> Tensor:
    """The numbers of the classes in a column of a file; 1.0 is the class 1."""
    if Path(path).suffix != ".csv":
        raise ValueError(f"target: expected a .csv file, got {path}")
    table = read_table(path)
    position = table.find(target)
    index: dict[str | float, int] = {}
    for i, name in enumerate(classes):
        index[name] = i
        if is_number(name):
            index.setdefault(float(name), i)
    found = []
    for row, label in enumerate(table.cells(position)):
        i = index.get(label, index.get(float(label)) if is_number(label) else None)
        if i is None:
            raise ValueError(
                f"{table.place(row, position)}: target: sample {row + 1}: {label!r} is none of "
                f"{', '.join(classes)}"
            )
        found.append(i)
    return torch.tensor(found)


def judge(probabilities: Tensor, truth: Tensor) -> str:
    lines = [f"log-loss {log_loss(probabilities, truth):.4f}", "threshold  coverage  accuracy"]
    for row in coverage_curve(probabilities, truth):
        accuracy = f"{row.accuracy:8.4f}" if row.coverage else "       -"
        lines.append(f"{row.threshold:9.2f}  {row.coverage:8.4f}  {accuracy}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser, command = train_parser(), train
    if argv[:1] == ["predict"]:
        parser, command, argv = predict_parser(), predict, argv[1:]
    try:
        command(parser, argv)
    except KeyboardInterrupt:  # before or after training, where Lightning does not catch it
        interrupted(parser)


if __name__ == "__main__":
    main()

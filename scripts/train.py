"""Train a classifier, its torch twin beside it, and predict with it.

python scripts/train.py                               digits, about 15 seconds
python scripts/train.py --lr 0.01 --depth 3 --name deeper
python scripts/train.py --config runs/deeper/config.yaml --seed 1
python scripts/train.py --resume --name deeper --epochs 200
python scripts/train.py --accelerator cpu --devices 2 --strategy ddp
python scripts/train.py predict samples.csv --run runs/digits --threshold 0.9
"""

import csv
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ActionYesNo, ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException

from torchref.data import read_features
from torchref.training import Config, MLPClassifier, Run
from torchref.training.run import options

USER_ERRORS = (ValueError, OSError, RuntimeError, MisconfigurationException)


class OneLineParser(ArgumentParser):
    """Errors are one line on stderr and exit status 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")
        raise AssertionError("exit returned")


def one_line(message: str) -> str:
    key = re.match(r'Parser key "([\w.]+)":', message)
    value = re.search(r"(?:Got|Given) value: (.*)", message)
    if key and value:
        types = re.findall(r"Expected an? (.+?)(?:\. Got value.*)?$", message, re.MULTILINE)
        expected = " or ".join(re.sub(r"<class '(\w+)'>|typing\.Literal", r"\1", t) for t in types)
        return f"{key[1]}: expected {expected}, got {value[1]!r}"
    return " ".join(message.split())


def train_parser() -> OneLineParser:
    parser = OneLineParser(
        prog="train.py",
        description="Train a classifier, its torch twin beside it. "
        "`train.py predict --help` tells how to use the result.",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    for option in options():
        name, text = option.name, option.metadata["help"]
        flags = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        if option.type is bool:
            switch: Any = ActionYesNo(no_prefix="no-")
            parser.add_argument(f"--{name}", action=switch, default=option.default, help=text)
        else:
            parser.add_argument(*flags, type=option.type, default=option.default, help=text)
    parser.add_argument("--resume", action="store_true", help="continue the run of that name")
    return parser


def train(parser: OneLineParser, argv: list[str]) -> None:
    args = parser.parse_args(argv)
    try:
        if args.resume:  # what the command line leaves open is as it was
            saved = Path("runs") / to_config(args).folder / "config.yaml"
            if not saved.exists():
                raise FileNotFoundError(f"resume: no run in {saved.parent}")
            args = parser.parse_args(["--config", str(saved), *argv])
        run = Run(to_config(args), resume=args.resume)
    except USER_ERRORS as error:
        parser.error(describe(error))
    try:
        metrics = run.execute()
    except OSError as error:
        parser.error(describe(error))
    except SystemExit:  # how Lightning leaves after Ctrl-C
        if run.trainer.interrupted:
            parser.exit(130, f"interrupted; continue with --resume --name {run.path.name}\n")
        raise
    if run.trainer.is_global_zero:
        summarize(run, metrics)
    if metrics["best_epoch"] is None:
        parser.exit(1, "no usable model: val_loss was never finite\n")


def to_config(args: Any) -> Config:
    return Config(**{option.name: args[option.name] for option in options()})


def describe(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def summarize(run: Run, metrics: dict[str, Any]) -> None:
    if metrics["parity_max_loss_diff"] is not None:
        parity = (
            f"largest difference of the loss from torch's {metrics['parity_max_loss_diff']:.3g}"
        )
    elif run.parity and run.parity.off is None:
        parity = "the loss was not finite, nor its difference from torch's"
    else:
        parity = f"off: {run.parity.off if run.parity else '--no-parity'}"
    print(
        f"test     accuracy {metrics['test_accuracy']:.4f}, F1 {metrics['test_f1']:.4f}\n"
        f"stopped  {metrics['stop_reason']}\n"
        f"parity   {parity}\n"
        f"files    {run.path}/ ({metrics['epochs']} epochs, {metrics['seconds']:.1f} s)"
    )


def predict_parser() -> OneLineParser:
    parser = OneLineParser(
        prog="train.py predict",
        description="Print class and probabilities of each sample, as CSV.",
    )
    parser.add_argument("file", type=str, help="samples without labels, a row each: .csv or .npy")
    parser.add_argument("--run", type=str, default="runs/digits", help="folder of a training run")
    parser.add_argument(
        "--threshold",
        type=float | None,
        default=None,
        help="print `abstain` where the largest probability is below it, in [0, 1]",
    )
    return parser


def load(checkpoint: Path) -> MLPClassifier:
    try:
        return MLPClassifier.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
    except Exception:  # a damaged file may raise anything
        raise ValueError(f"{checkpoint}: not a checkpoint of a training run, or damaged") from None


def predict(parser: OneLineParser, argv: list[str]) -> None:
    args = parser.parse_args(argv)
    try:
        checkpoint = Path(args.run) / "best.ckpt"
        if not checkpoint.exists():
            raise FileNotFoundError(f"no trained run in {args.run} ({checkpoint} is missing)")
        model = load(checkpoint)
        x = read_features(args.file)
        labels = model.predict(x, args.threshold).tolist()
        probabilities = model.predict_proba(x).tolist()
    except USER_ERRORS as error:
        parser.error(describe(error))
    classes = model.hparams["classes"]
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(["class", *(f"p({name})" for name in classes)])
    for label, row in zip(labels, probabilities, strict=True):
        name = "abstain" if label == -1 else classes[label]
        out.writerow([name, *(f"{p:.4f}" for p in row)])
    if args.threshold is not None:
        count = labels.count(-1)
        print(f"abstained on {count} of {len(labels)}, below {args.threshold}", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["predict"]:
        predict(predict_parser(), argv[1:])
    else:
        train(train_parser(), argv)


if __name__ == "__main__":
    main()

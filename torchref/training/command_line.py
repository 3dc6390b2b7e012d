"""What the scripts have in common: the flags of a configuration, and errors of one line."""

import re
import signal
import warnings
from typing import Any, NoReturn, get_args

import yaml
from jsonargparse import ActionYesNo, ArgumentParser, get_loader, set_loader
from lightning.fabric.utilities.exceptions import MisconfigurationException

from torchref._printing import escape_what_cannot_be_printed
from torchref.training.config import DATA, NETWORK, Config, options, plain_yaml

LISTS = ("categories", "drop", "ratios")
USER_ERRORS = (ValueError, OSError, RuntimeError, ImportError, MisconfigurationException)
MODE = "plain YAML"

_load_yaml = get_loader("yaml")
set_loader(MODE, lambda text: _load_yaml(plain_yaml(text)), (yaml.YAMLError,))


class OneLineParser(ArgumentParser):
    """Errors are one line on stderr and exit status 2, warnings one line."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(parser_mode=MODE, **kwargs)

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        escape_what_cannot_be_printed()
        warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
        try:
            return super().parse_args(*args, **kwargs)
        except UnicodeDecodeError as error:
            self.error(f"config: not a text in UTF-8: {error}")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {_one_line(message)}\n")
        raise AssertionError("exit returned")


def add_config(parser: ArgumentParser) -> None:
    """A flag for each field of :class:`Config`, and ``--config`` for a YAML file of them."""
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    groups = {title: parser.add_argument_group(title) for title in ("data", "network", "run")}
    for option in options():
        name, text = option.name, option.metadata["help"]
        group = groups["data" if name in DATA else "network" if name in NETWORK else "run"]
        flags = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        if name == "dataset":
            flags["--data"] = None
        settings: dict[str, Any] = {"default": option.default, "help": text}
        elements = [t for t in get_args(option.type) if getattr(t, "__origin__", None) is list]
        if option.type is bool:
            group.add_argument(f"--{name}", action=ActionYesNo(no_prefix="no-"), **settings)
        elif elements:
            group.add_argument(*flags, type=get_args(elements[0])[0], nargs="+", **settings)
        elif option.type == str | None:  # None is for YAML, which reads "#2" and "~" so
            group.add_argument(*flags, type=str, **settings)
        else:
            group.add_argument(*flags, type=option.type, **settings)


def to_config(args: Any) -> Config:
    for option in options():
        if args[option.name] is None and option.default is not None:  # as YAML may have it
            raise ValueError(f"{option.name}: expected a value, got null")
    return Config(**{option.name: args[option.name] for option in options()})


def interrupted(parser: ArgumentParser, message: str = "interrupted\n") -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C while Python ends
    parser.exit(130, message)


def describe(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _one_line(message: str) -> str:
    key = re.match(r'Parser key "([\w.]+)"', message)
    value = re.search(r"(?:Got|Given) value: (.*)", message)
    if key and value:
        types = re.findall(r"Expected an? (.+?)(?:\. Got value.*)?$", message, re.MULTILINE)
        expected = " or ".join(re.sub(r"<class '(\w+)'>|typing\.Literal", r"\1", t) for t in types)
        return f"{key[1]}: expected {expected}, got {value[1]!r}"
    if "object does not support item assignment" in message or "object is not iter" in message:
        return f"config: expected a list, such as [a, b], for {', '.join(LISTS)}: {message}"
    return " ".join(message.split())

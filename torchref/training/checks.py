"""Errors that name the argument, what it may be and what it was."""

from collections.abc import Iterable
from numbers import Integral
from typing import Any


def check_range(name: str, value: Any, expected: str, holds: bool) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def check_type(name: str, value: Any, expected: str, kind: type) -> None:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")


def check_integer(name: str, value: Any, least: int) -> int:
    """The value as Python's own: not everything takes NumPy's."""
    check_type(name, value, "an integer", Integral)
    check_range(name, value, f">= {least}", value >= least)
    return int(value)


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")

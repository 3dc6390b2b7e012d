"""Errors that name the argument, what it may be and what it was."""

from collections.abc import Iterable
from typing import Any


def check_range(name: str, value: Any, expected: str, holds: bool) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")

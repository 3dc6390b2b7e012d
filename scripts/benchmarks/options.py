"""What a section is told, and a command line whose errors are one line."""

import argparse
import math
import time
from dataclasses import dataclass, field
from typing import NoReturn


@dataclass(frozen=True)
class Options:
    """What to measure. ``only`` holds names of operations, and nothing for all of them."""

    device: str = "cpu"
    quick: bool = False
    only: frozenset[str] = frozenset()
    deadline: float = math.inf  # on the clock of `time.monotonic`
    ceilings: dict[str, float] = field(default_factory=dict)

    def wants(self, name: str) -> bool:
        return not self.only or name in self.only

    def time_is_up(self) -> bool:
        return time.monotonic() > self.deadline


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")

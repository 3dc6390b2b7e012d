"""Several processes that train one network end together when one of them is lost."""

import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed

from torchref.training.checks import check_range

# Gloo's errors are plain RuntimeErrors with the place in its source, but for this one.
GLOO = re.compile(r"gloo[/\\]|Application timeout caused pair closure")

OBSERVER = "_ChildProcessObserver"  # Lightning's, by its name, which has no promise


def set_timeout(trainer: Trainer, seconds: float) -> None:
    """How long a process of DDP waits for another one before it gives up.

    Args:
        seconds: in (0, 1e9].

    Raises:
        ValueError: ``seconds`` is out of its range.
    """
    check_range("timeout", seconds, "seconds in (0, 1e9]", 0 < seconds <= 1e9)
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy):
        # Its argument is for those who make the strategy; here Lightning chose it.
        strategy._timeout = timedelta(seconds=seconds)


class EndTogether(Callback):
    """Let a process that lost another one say so, rather than be killed by Lightning.

    Lightning's launcher looks every 5 seconds whether a process that it started has failed, and
    kills all, itself included, without a word. That serves until the processes have met; from then
    on the next collective tells.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for thread in threading.enumerate():
            if type(thread).__name__ == OBSERVER:
                # among none it finds none that failed, and ends
                setattr(thread, "_child_processes", [])  # noqa: B010  an attribute of its class


@contextmanager
def told_when_lost(trainer: Trainer) -> Iterator[None]:
    """Raise where another process is lost, and kill those that this one started.

    Raises:
        ConnectionError: another process ended, or did not answer within the timeout.
    """
    try:
        yield
    except RuntimeError as error:
        if trainer.world_size == 1 or not _is_of_others(error):
            raise
        if trainer.strategy.launcher is not None:  # one that hangs would stay
            hard = signal.SIGTERM if sys.platform == "win32" else signal.SIGKILL
            trainer.strategy.launcher.kill(hard)
        raise ConnectionError(
            f"rank {trainer.global_rank}: another process of this run ended or did not answer in "
            "time"
        ) from error


def _is_of_others(error: RuntimeError) -> bool:
    return isinstance(error, distributed.DistError) or bool(GLOO.search(str(error)))

"""Time competitors in turns: all in one run, in an order drawn anew each round.

A machine's speed drifts, with its temperature and its other users. Competitors that take turns
drift together, so that the ratio of their medians holds where the medians themselves do not. How
far two medians may differ by chance is measured, too: one implementation runs under two names.

On the CPU the C library may return a freed tensor's memory to the system, and then each use of a
new one costs a page fault for every 4 KiB, up to twice the arithmetic. Whether it does depends on
what else lies on the heap, so while we time it keeps what it has, up to what it never keeps.
"""

import ctypes
import itertools
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Call = Callable[[], Any]
Sample = Callable[[], float]  # measures once: the seconds of one call

ROUNDS = 50
FEWEST = 7  # rounds, of what takes long
SHORTEST = 2e-4  # seconds of a sample: below, it would measure the clock
SPLITS = 200


def keep_memory() -> None:
    """Let malloc keep freed memory, as long training does; for tensors of up to 32 MiB."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
        if mallopt is not None:
            mallopt(_TRIM_THRESHOLD, 2**31 - 1)
            mallopt(_MMAP_THRESHOLD, 2**25)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # in malloc.h


def repeated(call: Call) -> Sample:
    """Samples on the CPU, of as many calls as it takes to time them."""
    call()  # compiles, and touches the memory
    count = 1
    while _seconds(call, count) < SHORTEST:
        count *= 2
    return lambda: _seconds(call, count) / count


def _seconds(call: Call, count: int) -> float:
    start = time.perf_counter()
    for _ in itertools.repeat(None, count):
        call()
    return time.perf_counter() - start


def in_turns(samples: Mapping[str, Sample], seconds: float) -> dict[str, list[float]]:
    """``ROUNDS`` samples of each; fewer, but ``FEWEST``, where they take more than ``seconds``."""
    taken: dict[str, list[float]] = {name: [] for name in samples}
    end = time.perf_counter() + seconds
    for number in range(ROUNDS):
        if number >= FEWEST and time.perf_counter() > end:
            break
        for name in random.sample(list(samples), len(samples)):
            taken[name].append(samples[name]())
    return taken


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """The figures of a row of results."""
    ordered, fifth = sorted(seconds), len(seconds) // 5
    return {
        "ms": statistics.median(seconds) * 1e3,
        "p20_ms": ordered[fifth] * 1e3,
        "p80_ms": ordered[-1 - fifth] * 1e3,
        "samples": len(seconds),
    }


def spread(first: Sequence[float], second: Sequence[float]) -> float:
    """How far from 1 the ratio of two medians may be by chance, 0.03 for 3 %.

    From two runs of one implementation: what their medians differ by, or, where that happens to be
    less, what they differ by in 19 of 20 random splits of all their samples into two halves.
    """
    observed = abs(_log_ratio(first, second))
    pooled, half = [*first, *second], len(first)
    draw = random.Random(0)
    splits = (draw.sample(pooled, len(pooled)) for _ in range(SPLITS))
    by_chance = sorted(abs(_log_ratio(split[:half], split[half:])) for split in splits)
    return math.expm1(max(observed, by_chance[SPLITS * 19 // 20]))


def _log_ratio(first: Sequence[float], second: Sequence[float]) -> float:
    return math.log(statistics.median(first) / statistics.median(second))


def is_tie(ratio: float, *spreads: float) -> bool:
    """Whether a ratio is as near to 1 as chance alone brings it."""
    return abs(math.log(ratio)) <= sum(map(math.log1p, spreads))


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float:
    """The k of ``time = c * size**k`` that fits best: 1 where an element's cost is constant."""
    x, y = ([math.log(value) for value in values] for values in (sizes, times))
    return statistics.linear_regression(x, y).slope

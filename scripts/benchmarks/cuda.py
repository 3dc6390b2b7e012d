"""What only a GPU has: samples without the host, ceilings, launches, peak memory."""

import math
import statistics
import time
from collections import deque
from collections.abc import Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from .timing import Call, Sample, in_turns

CALLS = 20  # in a graph
LONGEST = 0.005  # seconds that a graph of several calls may take
SLEEP = 400_000  # cycles: 0.2 ms, in which the host enqueues what is then timed without it
CEILING = 2**28  # float32 elements: 1 GiB


def eager(call: Call) -> Sample:
    """Samples of a call and of the wait for its result."""
    call()
    torch.cuda.synchronize()

    def sample() -> float:
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    return sample


def host_us(call: Call) -> float:
    """The microseconds until a call returns, the GPU's work still to be done."""
    times = []
    for _ in range(CALLS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(times) * 1e6


def replayed(calls: Sequence[Call]) -> Sample:
    """Samples of a CUDA graph of these calls, one after the other."""
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    kept = deque(maxlen=len(set(calls)))  # outputs rotate as inputs do
    with torch.cuda.graph(graph):
        for call in calls:
            kept.append(call())
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        torch.cuda._sleep(SLEEP)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(calls)

    return sample


def calls_in_a_graph(seconds: float) -> int:
    """How many calls of so many seconds: ``CALLS``, fewer of those that take long."""
    return max(1, min(CALLS, int(LONGEST / seconds)))


def sets_of_buffers(input_bytes: int, l2_bytes: int) -> int:
    """How many sets of inputs to rotate so that none is left in the L2 cache when it is next."""
    return max(2, math.ceil(4 * l2_bytes / input_bytes))


def l2_bytes() -> int:
    return torch.cuda.get_device_properties(0).L2_cache_size


def launches(call: Call) -> int | None:
    """Kernels of a call; None where the profiler sees none, as without rights to the counters."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    events = [e for e in profiled.events() or [] if e.device_type.name == "CUDA"]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in events) or None


def peak_bytes(call: Call) -> int:
    """The memory that a call takes at its peak beyond what was taken before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def poison() -> None:
    """Leave NaN in the memory that the allocator hands out next: what is not written shows."""
    torch.full((CEILING,), math.nan, device="cuda")


def ceilings() -> dict[str, float]:
    """GB/s of a copy (read and written), of reading alone and of writing alone, at 1 GiB."""
    x, y = (torch.zeros(CEILING, device="cuda") for _ in range(2))
    calls = {"copy_gbs": lambda: y.copy_(x), "read_gbs": x.sum, "write_gbs": y.zero_}
    samples = {name: replayed([call]) for name, call in calls.items()}
    moved = {"copy_gbs": 2 * x.nbytes, "read_gbs": x.nbytes, "write_gbs": x.nbytes}
    times = in_turns(samples, seconds=10.0)
    return {name: moved[name] / statistics.median(times[name]) / 1e9 for name in calls}

"""Run every test that needs a GPU, on any machine that has torch, Triton and pytest, offline.

    python scripts/check_gpu.py
    python scripts/check_gpu.py --minutes 4 --out /tmp/gpu

Nothing is downloaded: the checkout is installed without its dependencies, and a test that needs
a library which is not there is skipped. Prints what failed first, the counts last, and keeps a
record in docs/gpu/. Ends inside the minutes given: what has not run by then is killed and counts as
a failure. Exit status 0 if all passed, 1 if not, 2 where nothing could run.
"""

import contextlib
import datetime
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.options import OneLineParser

ROOT = Path(__file__).resolve().parents[1]
RECORD = "TORCHREF_CHECK_GPU_RECORD"  # where pytest, which loads this file as a plugin, writes
RESERVE = 10  # seconds kept for the report
LAST_LINES = 40  # of a failure


def main(arguments: list[str] | None = None) -> int:
    parser = OneLineParser(description="Run every test that needs a GPU.")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "gpu", metavar="DIR")
    parser.add_argument("--minutes", type=float, default=8.0, help="the most that it may take")
    options = parser.parse_args(arguments)
    end = time.monotonic() + 60 * options.minutes - RESERVE
    require_machine()
    environment = {**os.environ, **installed()}
    record = describe()
    print(", ".join(f"{key} {value}" for key, value in record.items() if value), flush=True)
    record |= run(["-m", "gpu", "tests/gpu"], end - time.monotonic(), environment, ROOT)
    path = written(record, options.out)
    return report(record, path)


def stop(reason: str) -> NoReturn:
    print(f"check_gpu: {reason}", file=sys.stderr)
    raise SystemExit(2)


def require_machine() -> None:
    for library in ("torch", "triton", "pytest"):
        if importlib.util.find_spec(library) is None:
            stop(f"{library} is not installed")
    import torch

    if not torch.cuda.is_available():
        stop("no CUDA or ROCm device")


def installed() -> dict[str, str]:
    """Make this checkout's ``torchref`` importable: what the environment needs for it."""
    if imports_checkout({}):
        return {}
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    command += ["--no-build-isolation", "--disable-pip-version-check", "-e", str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True)
    if imports_checkout({}):
        return {}
    # setuptools may be too old for pyproject.toml, or the environment not ours to write to
    print(f"check_gpu: pip could not install the checkout ({last_line(result.stderr)}), so it is")
    print("imported from where it is", flush=True)
    environment = {"PYTHONPATH": os.pathsep.join([mapped_package(), *inherited_path()])}
    if not imports_checkout(environment):
        stop("torchref cannot be imported from this checkout")
    return environment


def imports_checkout(environment: dict[str, str]) -> bool:
    code = (
        "import torchref, torchref.triton_kernels as t; print(torchref.__file__); print(t.__file__)"
    )
    with tempfile.TemporaryDirectory() as elsewhere:
        result = subprocess.run(
            [sys.executable, "-c", code],
            cwd=elsewhere,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
        )
    folders = [Path(line).resolve().parent for line in result.stdout.splitlines()]
    return folders == [ROOT / "torchref", ROOT / "triton_kernels"]


MAPPING = """\
import importlib.util, sys

class Finder:
    def find_spec(name, path=None, target=None):
        if name == "torchref.triton_kernels":
            folder = {folder!r}
            return importlib.util.spec_from_file_location(
                name, folder + "/__init__.py", submodule_search_locations=[folder])

sys.meta_path.append(Finder)
sys.path.append({root!r})
"""


def mapped_package() -> str:
    """A folder whose ``sitecustomize`` does what an editable installation would."""
    folder = tempfile.mkdtemp(prefix="check_gpu-")
    text = MAPPING.format(folder=str(ROOT / "triton_kernels"), root=str(ROOT))
    (Path(folder) / "sitecustomize.py").write_text(text)
    return folder


def inherited_path() -> list[str]:
    return [path] if (path := os.environ.get("PYTHONPATH")) else []


def describe() -> dict[str, Any]:
    import torch
    import triton

    major, minor = torch.cuda.get_device_capability()
    return {
        "device": torch.cuda.get_device_name(),
        "devices": torch.cuda.device_count(),
        "capability": f"{major}.{minor}",
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "triton": triton.__version__,
        "python": sys.version.split()[0],
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def commit() -> str:
    git = ["git", "-C", str(ROOT)]
    name = first_line(*git, "rev-parse", "--short=12", "HEAD") or "unknown"
    changed = first_line(*git, "status", "--porcelain", "--untracked-files=no")
    return f"{name}, changed since" if changed else name


def first_line(*command: str) -> str:
    with contextlib.suppress(OSError):
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode == 0:
            return (result.stdout.splitlines() or [""])[0].strip()
    return ""


def run(
    arguments: list[str], seconds: float, environment: dict[str, str], folder: Path
) -> dict[str, Any]:
    """Run pytest for at most so many seconds: outcomes, durations and failures."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        lines, output = Path(temporary) / "record", Path(temporary) / "output"
        lines.touch()
        environment = {**environment, RECORD: str(lines)}
        # Warnings are errors in this project. Versions of torch that it has not seen have new ones,
        # which would hide what the GPU does. The variable reaches the processes that tests start.
        addopts = f"{environment.get('PYTEST_ADDOPTS', '')} -W default"
        path = [str(ROOT / "scripts"), *environment.get("PYTHONPATH", "").split(os.pathsep)]
        environment |= {
            "PYTEST_ADDOPTS": addopts,
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
        }
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "check_gpu",
            "-p",
            "no:cacheprovider",
        ]
        with output.open("w") as stream:
            status = killed_after(seconds, command + arguments, environment, folder, stream)
        record = parsed([json.loads(line) for line in lines.read_text().splitlines()])
        if status is None:
            running = record["unfinished"] or "no test"
            failure = {"name": running, "lines": [f"killed after {seconds:.0f} seconds"]}
            record["failures"].insert(0, failure)
        elif not record["counts"] or (status and not record["failures"]):
            tail = output.read_text().splitlines()[-LAST_LINES:]
            record["failures"].insert(0, {"name": f"pytest (exit status {status})", "lines": tail})
    return {"seconds": round(time.monotonic() - start, 1), **record}


def killed_after(
    seconds: float, command: list[str], environment: dict[str, str], folder: Path, output: Any
) -> int | None:
    """The exit status; None where it had to be killed, with every process that it started."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def parsed(events: list[dict[str, Any]]) -> dict[str, Any]:
    """What the plugin below wrote, a line for each start and each outcome."""
    started = {event["name"]: None for event in events if "outcome" not in event}
    outcomes = [event for event in events if "outcome" in event]
    ended = {event["name"] for event in outcomes}
    seconds: Counter[str] = Counter()
    for event in outcomes:
        seconds[event["name"]] += event["seconds"]
    worst = {}
    for event in outcomes:
        if worst.get(event["name"]) != "failed":
            worst[event["name"]] = event["outcome"]
    return {
        "counts": dict(Counter(worst.values())),
        "unfinished": next((name for name in started if name not in ended), None),
        "failures": [
            {"name": event["name"], "lines": event["lines"]}
            for event in outcomes
            if event["outcome"] == "failed"
        ],
        "skipped": {e["name"]: e["lines"][-1] for e in outcomes if e["outcome"] == "skipped"},
        "cases": {e["name"]: e["cases"] for e in outcomes if "cases" in e},
        "durations": {name: round(time, 2) for name, time in seconds.items()},
    }


def written(record: dict[str, Any], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"[^a-z0-9]+", "-", record["device"].lower()).strip("-")
    path = folder / f"{device}-{record['date'][:10]}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def report(record: dict[str, Any], path: Path) -> int:
    for failure in record["failures"]:
        print(f"\nFAILED {failure['name']}")
        print("\n".join(failure["lines"]))
    counts = record["counts"]
    shown = [f"{counts.get(outcome, 0)} {outcome}" for outcome in ("passed", "failed", "skipped")]
    print(f"\n{', '.join(shown)} in {record['seconds']:.0f} s; record in {path}")
    return 0 if counts.get("passed") and not record["failures"] else 1


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


# The plugin. It writes line by line, so that what ran is known after a kill too.


def pytest_runtest_logstart(nodeid: str, location: Any) -> None:
    _write({"name": nodeid})


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        _write_outcome(report, report.duration)


def pytest_collectreport(report: Any) -> None:
    if report.outcome == "failed":
        _write_outcome(report, 0.0)


def _write_outcome(report: Any, seconds: float) -> None:
    event = {"name": report.nodeid, "outcome": report.outcome, "seconds": seconds}
    event |= dict(getattr(report, "user_properties", []))
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        event["lines"] = [str(report.longrepr[2])]
    else:
        event["lines"] = report.longreprtext.splitlines()[-LAST_LINES:]
    _write(event)


def _write(event: dict[str, Any]) -> None:
    if path := os.environ.get(RECORD):
        with Path(path).open("a") as stream:
            stream.write(json.dumps(event) + "\n")


if __name__ == "__main__":
    sys.exit(main())

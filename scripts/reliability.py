"""Try what can go wrong, and print how often it was tried and what was found.

    python scripts/reliability.py                 everything, with the soak and fuzz runs
    python scripts/reliability.py --quick         what CI tries
    python scripts/reliability.py --only kills    one row; again: --only kills --only leaks
    python scripts/reliability.py --write         put the table into docs/reliability.md

Each row is a part of the test suite. Exit status 1 where something failed.
"""

import datetime
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from benchmarks.options import OneLineParser

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"
LIMIT = 3 * 3600  # seconds for a row: several times what the longest takes on two cores
BEGIN, END = "<!-- printed by scripts/reliability.py -->\n", "<!-- end -->\n"


class Area(NamedTuple):
    """Tests that ask one question."""

    title: str
    files: tuple[str, ...]
    unit: str = "tests"
    counted: str = ""  # what tests report that they tried; else there are as many as tests


AREAS = {
    "misuses": Area(
        "wrong arguments, data, files and flags",
        ("tests/test_misuse.py",),
        "misuses",
        "misuses",
    ),
    "kills": Area(
        "processes killed and resumed bit for bit",
        ("tests/training/test_resume.py", "tests/training/test_lost_process.py"),
        "kill points",
        "kill points",
    ),
    "checkpoints": Area(
        "checkpoints that are damaged, truncated, or meet a full disk",
        ("tests/training/test_checkpoint.py",),
    ),
    "security": Area(
        "files that would execute code, or fill the memory",
        ("tests/test_security.py",),
    ),
    "fuzz": Area(
        "drawn shapes, layouts, types, values and arguments against torch in float64",
        ("tests/test_fuzz.py", "tests/test_interpreted.py::test_fuzz_through_the_kernels"),
        "cases",
        "fuzz cases",
    ),
    "nonfinite": Area(
        "NaN and infinity in training",
        ("tests/training/test_non_finite.py", "tests/training/test_early_stopping.py"),
    ),
    "determinism": Area("the same bits again", ("tests/test_determinism.py",)),
    "threads": Area("threads and processes at once", ("tests/test_concurrency.py",)),
    "leaks": Area("memory that grows, or is kept without need", ("tests/test_memory.py",)),
    "internals": Area("private names of torch that are gone", ("tests/test_internals.py",)),
}


class Found(NamedTuple):
    """What pytest said of an area."""

    tests: Counter[str]
    properties: Counter[str]
    failures: list[str]
    seconds: float


def main(arguments: list[str] | None = None) -> int:
    assert __doc__
    parser = OneLineParser(prog="reliability.py", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="without the soak and fuzz runs")
    parser.add_argument("--only", action="append", choices=AREAS, help="a row of the table")
    parser.add_argument("--write", action="store_true", help="into docs/reliability.md")
    options = parser.parse_args(arguments)
    if options.write and options.only:
        parser.error("--write takes the whole table: leave out --only")
    found = {name: run(AREAS[name], options.quick) for name in options.only or AREAS}
    text = table(found, command(options.quick))
    print(text)
    if options.write:
        PAGE.write_text(replaced(PAGE.read_text(), text))
    for name, area in found.items():
        for failure in area.failures:
            print(f"{name}: failed: {failure}", file=sys.stderr)
    return 1 if any(area.failures for area in found.values()) else 0


def command(quick: bool) -> str:
    return "python scripts/reliability.py" + (" --quick" if quick else "")


def run(area: Area, quick: bool) -> Found:
    print(f"{area.title} ...", file=sys.stderr, flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        markers = "not slow and not gpu" if quick else "not gpu"
        pytest = [sys.executable, "-m", "pytest", "-v", "-m", markers, "-p", "no:cacheprovider"]
        pytest += [f"--junitxml={report}", "-o", "junit_logging=system-out"]
        code, output = finish([*pytest, *area.files])
        seconds = time.monotonic() - start
        if code not in (0, 1):  # neither passed nor failed
            last = " ".join(output.strip().splitlines()[-1:])  # names the test that hangs
            wrong = f"not done after {LIMIT} s" if code is None else "pytest did not run"
            return Found(Counter(), Counter(), [f"{wrong}: {last}"], seconds)
        return read(report.read_text(), seconds)


def finish(command: list[str]) -> tuple[int | None, str]:
    """Exit status and output; no status where it had to be ended, with the processes it started."""
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=LIMIT)
            return process.returncode, output
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None, process.communicate()[0]
        except KeyboardInterrupt:  # Ctrl-C does not reach another session
            os.killpg(process.pid, signal.SIGKILL)
            raise


def read(xml: str, seconds: float) -> Found:
    """A JUnit report, as pytest writes it."""
    tests: Counter[str] = Counter()
    properties: Counter[str] = Counter()
    failures = []
    root = ElementTree.fromstring(xml)
    for case in root.iter("testcase"):
        outcome = outcome_of(case)
        tests[outcome] += 1
        if outcome == "failed":
            name = f"{case.get('classname')}.{case.get('name')}"
            failures.append("\n".join([name, *said_of(case)]))
    for each in root.iter("property"):
        properties[each.get("name", "")] += int(each.get("value", 0))
    return Found(tests, properties, failures, seconds)


def said_of(case: ElementTree.Element) -> list[str]:
    """What pytest marks as the error, and the seed: of what was drawn anew, all there will be."""
    texts = (each.text or "" for each in case if each.tag in ("failure", "error", "system-out"))
    lines = (line for text in texts for line in text.splitlines())
    return [line for line in lines if line.startswith(("E ", "TORCHREF_SEED"))][:40]


def outcome_of(case: ElementTree.Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    skipped = case.find("skipped")
    if skipped is None:
        return "passed"
    return "known" if skipped.get("type") == "pytest.xfail" else "skipped"


def table(found: dict[str, Found], made_by: str) -> str:
    lines = [
        "| what was tried | how often | failed | known defects | seconds |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, each in found.items():
        area = AREAS[name]
        tested = each.tests["passed"] + each.tests["failed"] + each.tests["known"]
        tried = f"{tried_in(area, each, tested):,} {area.unit}"
        failed = len(each.failures)
        lines.append(
            f"| {area.title} | {tried} | {failed} | {each.tests['known']} | {each.seconds:.0f} |"
        )
    return "\n".join([*lines, "", f"`{made_by}`, {machine()}"])


def tried_in(area: Area, found: Found, tested: int) -> int:
    if not area.counted:
        return tested
    return sum(n for name, n in found.properties.items() if name.startswith(area.counted))


def machine() -> str:
    import torch

    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    date = datetime.date.today().isoformat()
    return f"{os.cpu_count()} cores ({platform.machine()}), {versions}, {date}"


def replaced(page: str, text: str) -> str:
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    raise SystemExit(main())

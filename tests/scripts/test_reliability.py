"""The table of faults tried: what it counts, and that the page has what the script printed."""

import os
import select
from collections import Counter

import pytest
import reliability
from reliability import AREAS, ROOT, Found

XML = """\
<testsuites><testsuite>
  <properties>
    <property name="kill points survived" value="50"/>
    <property name="kill points survived with two processes" value="10"/>
    <property name="another" value="7"/>
  </properties>
  <testcase classname="a" name="passes"/>
  <testcase classname="a" name="fails"><failure message="x">
    call()
E   AssertionError: wrong
E     of: 3
</failure><system-out>TORCHREF_SEED=7
more</system-out></testcase>
  <testcase classname="a" name="breaks"><error message="x"/></testcase>
  <testcase classname="a" name="skips"><skipped type="pytest.skip"/></testcase>
  <testcase classname="a" name="known"><skipped type="pytest.xfail"/></testcase>
</testsuite></testsuites>
"""


def test_a_report_is_counted():
    found = reliability.read(XML, 12.3)
    assert found.tests == {"passed": 1, "failed": 2, "skipped": 1, "known": 1}
    failure = "a.fails\nE   AssertionError: wrong\nE     of: 3\nTORCHREF_SEED=7"
    assert found.failures == [failure, "a.breaks"]
    row = reliability.table({"kills": found}, "the command").splitlines()[2]
    assert row.endswith("| 60 kill points | 2 | 1 | 12 |")
    row = reliability.table({"leaks": found}, "the command").splitlines()[2]
    assert row.endswith("| 4 tests | 2 | 1 | 12 |")  # what was skipped was not tried


def test_the_files_are_there():
    for area in AREAS.values():
        for file in area.files:
            assert (ROOT / file.split("::")[0]).exists()


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """Areas that pass or fail without a test, and a page in a folder of its own."""

    def run(area, quick):
        failures = ["a.fails"] if area is AREAS[failing] else []
        return Found(Counter(passed=3), Counter(), failures, 1.0)

    failing = "leaks"
    page = tmp_path / "reliability.md"
    page.write_text("before\n" + reliability.BEGIN + "old\n" + reliability.END + "after\n")
    monkeypatch.setattr(reliability, "run", run)
    monkeypatch.setattr(reliability, "PAGE", page)
    return page


def test_a_failure_is_named_and_the_status_is_1(pretended, capsys):
    assert reliability.main(["--only", "leaks", "--only", "fuzz"]) == 1
    out, err = capsys.readouterr()
    assert out.count("\n| ") == 2
    assert err == "leaks: failed: a.fails\n"
    assert reliability.main(["--only", "fuzz"]) == 0
    assert "old" in pretended.read_text()


def test_the_page_gets_what_is_printed(pretended, capsys):
    reliability.main(["--write", "--quick"])
    page = pretended.read_text()
    assert capsys.readouterr().out.strip() in page
    assert "`python scripts/reliability.py --quick`" in page
    assert page.startswith("before\n")
    assert page.endswith("after\n")
    assert "old" not in page
    reliability.main(["--write"])
    assert pretended.read_text().count("| what was tried |") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "luck"], "reliability.py: argument --only: invalid choice: 'luck'"),
        (["--write", "--only", "fuzz"], "reliability.py: --write takes the whole table"),
    ],
)
def test_wrong_flags(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        reliability.main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(message)


def test_a_suite_that_cannot_run_is_a_failure(monkeypatch):
    area = AREAS["leaks"]._replace(files=("tests/no_such_file.py",))
    found = reliability.run(area, quick=True)
    assert len(found.failures) == 1


def test_of_a_failure_the_seed_is_told(tmp_path):
    lines = ["def test_fails():", "    print('TORCHREF_SEED=8')", "    assert False, 'wrong'"]
    (tmp_path / "test_fails.py").write_text("\n".join(lines) + "\n")
    area = AREAS["leaks"]._replace(files=(f"{tmp_path}/test_fails.py",))
    (failure,) = reliability.run(area, quick=True).failures
    assert failure.splitlines()[1].endswith(" AssertionError: wrong")
    assert failure.splitlines()[-1] == "TORCHREF_SEED=8"


def test_a_test_that_hangs_is_a_failure(monkeypatch, tmp_path):
    """It is named, and what it started is ended with it."""
    held = tmp_path / "held"
    os.mkfifo(held)
    reader = os.open(held, os.O_RDONLY | os.O_NONBLOCK)
    hang = f"subprocess.run(['sleep', '600'], stdout=open({str(held)!r}, 'w'))"
    (tmp_path / "test_hang.py").write_text(f"import subprocess\ndef test_hangs():\n    {hang}\n")
    monkeypatch.setattr(reliability, "LIMIT", 20)  # pytest starts in two or three
    area = AREAS["leaks"]._replace(files=(f"{tmp_path}/test_hang.py",))
    found = reliability.run(area, quick=True)
    (failure,) = found.failures
    assert failure.startswith("not done after 20 s: ")
    assert failure.endswith("test_hang.py::test_hangs")
    assert select.select([reader], [], [], 10)[0] == [reader]  # its end: nobody holds it
    os.close(reader)


def test_the_page_is_the_whole_table():
    page = (ROOT / "docs" / "reliability.md").read_text()
    printed = page.split(reliability.BEGIN)[1].split(reliability.END)[0]
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ")][1:]
    assert [row[0].removeprefix("| ") for row in rows] == [area.title for area in AREAS.values()]
    assert {row[2] for row in rows} == {"0"}
    assert "`python scripts/reliability.py`," in printed

"""Time ours beside torch's: every piece, optimizers' steps, steps of whole models.

    python scripts/benchmark.py
    python scripts/benchmark.py --quick --json quick.json
    python scripts/benchmark.py pieces --only relu softmax --device cuda
    python scripts/benchmark.py --compare before.json after.json

Every implementation is checked before it is timed, all of a case in turns, in an order drawn anew
each round, and the median counts. A ratio is torch's time over another's: above 1, that one is
faster. "torch again" is torch's against itself: what is as near to 1 is a tie, marked ~.

--compare names what moved between two runs by more than chance, and ends with status 1 where one of
ours lost more than a fifth: a guard against regressions that needs no GPU.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from benchmarks import cuda, models, optimizers, pieces, results, timing
from benchmarks.options import OneLineParser, Options

# Each has `run(options)`, which returns rows, and `NAMES`, which --only chooses from.
SECTIONS = {"pieces": pieces, "optimizers": optimizers, "models": models}
QUICK = 7 * 60  # seconds, after which nothing new is begun


def main(argv: list[str] | None = None) -> int:
    arguments = parsed(argv)
    if arguments.compare:
        lines, is_slower = results.compare(*arguments.compare)
        print(*lines, sep="\n")
        return int(is_slower)
    command = " ".join(["python scripts/benchmark.py", *(sys.argv[1:] if argv is None else argv)])
    record = {"command": command, "environment": results.environment(arguments.device)}
    print(", ".join(f"{name} {value}" for name, value in record["environment"].items()), flush=True)
    timing.keep_memory()
    ceilings = cuda.ceilings() if arguments.device == "cuda" else {}
    for name, gbs in ceilings.items():
        print(f"{name} {gbs:.0f}", flush=True)
    options = Options(
        device=arguments.device,
        quick=arguments.quick,
        only=frozenset(arguments.only),
        deadline=time.monotonic() + QUICK if arguments.quick else math.inf,
        ceilings=ceilings,
    )
    rows: list[results.Row] = []
    for name in arguments.sections:
        rows += SECTIONS[name].run(options)
        if arguments.json:  # after each, for a run is long
            results.write(arguments.json, record | {"ceilings": ceilings, "rows": rows})
    print(*summary(rows), sep="\n")
    return 0


def parsed(argv: list[str] | None) -> argparse.Namespace:
    assert __doc__
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)}: all"
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer sizes, and eight minutes at most"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="of pieces, optimizers, models"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every row to this file")
    parser.add_argument("--compare", type=Path, nargs=2, metavar="FILE", help="what moved")
    arguments = parser.parse_args(argv)
    arguments.sections = arguments.sections or list(SECTIONS)
    for section in arguments.sections:
        if section not in SECTIONS:
            parser.error(f"no section {section!r}: expected {', '.join(SECTIONS)}")
    known = {name for section in arguments.sections for name in SECTIONS[section].NAMES}
    if unknown := set(arguments.only) - known:
        parser.error(
            f"--only: none is called {min(unknown)!r}; there are {', '.join(sorted(known))}"
        )
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA or ROCm device")
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        parser.error(f"--json: there is no folder {arguments.json.parent}")
    if arguments.compare:
        try:
            arguments.compare = [results.read(path) for path in arguments.compare]
        except ValueError as error:
            parser.error(str(error))
    return arguments


def summary(rows: list[results.Row]) -> list[str]:
    """The largest sizes in a table, means over all that are large, and what is wrong."""
    lines = ["", "ratios to torch, ~ a tie:"]
    for section in dict.fromkeys(row["section"] for row in rows):
        main = results.main_mode([row for row in rows if row["section"] == section])
        lines += aligned(results.table(results.largest(main) if section == "pieces" else main))
        means = results.geometric_means(main)
        shown = [f"{name} {mean:.2f}" for name, mean in means.items() if name != "torch"]
        if shown:
            lines.append(f"geometric means from {results.LARGE:,} elements on: {', '.join(shown)}")
    for row in rows:
        if row["note"] and row["note"].startswith(("wrong", "failed")):
            described = " ".join(row[name] for name in ("op", "pass", "implementation", "shape"))
            lines.append(f"{described}: {row['note']}")
    return lines


def aligned(cells: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = ([c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in cells)
    return ["  ".join(line).rstrip() for line in padded]


if __name__ == "__main__":
    sys.exit(main())

"""Put finished runs side by side: the options that differ, the scores, the curves.

python scripts/compare.py runs/digits runs/deeper
python scripts/compare.py runs/* --picture compare.png
"""

import sys

from torchref._printing import printing
from torchref.training.command_line import USER_ERRORS, OneLineParser, describe
from torchref.training.compare import compare, plot_runs, read_run


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(prog="compare.py", description="Put finished runs side by side.")
    parser.add_argument("runs", type=str, nargs="+", help="folders of training runs")
    parser.add_argument("--picture", type=str, default=None, help="draw the losses, too")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    try:
        runs = [read_run(path) for path in args.runs]
        if args.picture is not None:
            plot_runs(runs, args.picture)
    except USER_ERRORS as error:
        parser.error(describe(error))
    table = compare(runs)
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    with printing(parser):
        for row in table:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            print("  ".join(cells).rstrip())


if __name__ == "__main__":
    main()

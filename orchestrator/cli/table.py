"""Tables on stdout: aligned for a person, tab-separated where the output goes on to another program."""

import sys
from collections.abc import Sequence

GAP = 2  # characters between columns
NARROWEST = 10  # characters of the column that gives way


def print_lines(lines: Sequence[str]) -> None:
    """Print each on a line of its own; nothing where there is nothing."""
    if lines:
        print("\n".join(lines))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], wide: int) -> None:
    """`wide` is the column that gives way when the terminal is narrow; then all others break at their spaces."""
    if not sys.stdout.isatty():
        for row in rows:
            print("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(header):
        table.add_column(name, no_wrap=i != wide, overflow="ellipsis" if i == wide else "fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console()
    widths = [max(map(len, column)) + GAP for column in zip(header, *rows, strict=True)]
    if sum(widths) - widths[wide] + NARROWEST > console.width:
        for column in table.columns:
            column.no_wrap, column.overflow = False, "fold"
    console.print(table)

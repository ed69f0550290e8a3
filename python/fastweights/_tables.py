"""Tables for the terminal and for Markdown files."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["filled_section", "markdown_table", "print_table"]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns; columns of numbers are right-aligned."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    numeric = [
        bool(rows)
        and all(row[i].lstrip("-")[:1].isdigit() or not row[i].strip("-") for row in rows)
        for i in range(len(header))
    ]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        ]
        return "| " + " | ".join(padded) + " |"

    rule = [
        "-" * (width - right) + ":" * right for width, right in zip(widths, numeric, strict=True)
    ]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print with rich where it is installed, as Markdown otherwise."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(markdown_table(header, rows))
        return
    table = Table(box=None, header_style="bold")
    for name in header:
        table.add_column(name, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # Too narrow a terminal wraps lines; rich would rather cut the numbers off.
    width = sum(2 + max(map(len, column)) for column in zip(header, *rows, strict=True))
    Console(width=max(width, Console().width)).print(table)


def filled_section(page: str, name: str, content: str) -> str:
    """A page with new content between its comments `name` and `/name`."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"expected a page with a section {name}, got none")
    return f"{before}{begin}\n{content}\n\n{end}{after}"

"""The compile gates' results as a Markdown table that a person can read."""

from __future__ import annotations

from collections.abc import Iterable

KIB = 1024


def counted(instructions: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in instructions.items() if count)


def cell(registers: int, shared: int, instructions: dict[str, int], faults: tuple[str, ...]) -> str:
    """registers / shared KiB / instructions, and in bold what does not pass."""
    text = " / ".join((str(registers), f"{shared / KIB:.3g}", counted(instructions) or "-"))
    return f"{text} **{'; '.join(faults)}**" if faults else text


def markdown(heads: tuple[str, ...], cells: Iterable[tuple[tuple[str, ...], str, str]]) -> str:
    """cells: (what names the row, one text for each of heads; the column; the text), in the order in which they shall appear."""
    table: dict[tuple[str, ...], dict[str, list[str]]] = {}
    columns: dict[str, None] = {}
    for row, column, text in cells:
        table.setdefault(row, {}).setdefault(column, []).append(text)
        columns[column] = None
    lines = [[*heads, *columns], ["---"] * (len(heads) + len(columns))]
    lines += [[*row, *(" + ".join(texts.get(column, ["-"])) for column in columns)] for row, texts in table.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

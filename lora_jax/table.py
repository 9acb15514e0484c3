"""A table of text, as `summary`, `sites` and `explain` print it."""

from __future__ import annotations

from collections.abc import Sequence


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], foot: Sequence[str] = (), numbers: Sequence[int] = ()
) -> str:
    """Lines of columns, two spaces apart, with a rule under the head and over the foot.

    Args:
      head: The names of the columns.
      rows: As many words each.
      foot: The last line, if there is one.
      numbers: Which columns are aligned to the right.

    >>> print(table(("path", "size"), [("a", "1"), ("kernel", "12")], numbers=[1]))
    path    size
    ──────  ────
    a          1
    kernel    12
    """
    lines = [head, *rows, *([foot] if foot else [])]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    rule = "  ".join("─" * width for width in widths)

    def draw(line: Sequence[str]) -> str:
        words = zip(line, widths, strict=True)
        return "  ".join(w.rjust(n) if i in numbers else w.ljust(n) for i, (w, n) in enumerate(words)).rstrip()

    return "\n".join([draw(head), rule, *map(draw, rows), *([rule, draw(foot)] if foot else [])])


def dimensions(shape: Sequence[int]) -> str:
    """A shape as a word.

    >>> dimensions((12, 512)), dimensions(())
    ('12×512', 'scalar')
    """
    return "×".join(map(str, shape)) or "scalar"


def quantity(number: float) -> str:
    """A large number in three digits.

    >>> quantity(0), quantity(999), quantity(1_048_576)
    ('0', '999', '1.05 M')
    """
    for unit in ("", " k", " M", " G", " T", " P"):
        if abs(number) < 999.5 or unit == " P":
            break
        number /= 1000
    return f"{number:.3g}{unit}"


def size(number: float) -> str:
    """Bytes for people.

    >>> size(2_660_388), size(3_688), size(900)
    ('2.66 MB', '3.69 kB', '900 B')
    """
    return f"{quantity(number)}B" if number >= 999.5 else f"{number:.0f} B"

"""The result of `kernels.run` for people: a table for the terminal, a table in Markdown, and a chart as SVG."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

HEAD = ("op", "shape", "dtype", "backend", "time", "spread", "GB/s", "GFLOP/s", "of ceiling")


def title(result: dict[str, Any]) -> str:
    """The machine and its ceilings on one line each."""
    machine = result["machine"]
    name = machine["cpu"] if machine["device"] == "cpu" else machine["device"]
    lines = [f"{name}, {machine['threads']} CPU threads, torch {machine['torch']}, {result['seconds']:.0f} s in all"]
    if machine["device"] == "cpu":
        lines.append(f"load average before the run: {result['load_average_before']:.1f}")
    for dtype, ceiling in result["ceilings"].items():
        copy, gemm = ceiling["copy_bytes_per_s"] / 1e9, ceiling["gemm_flops_per_s"] / 1e9
        lines.append(f"ceilings, {dtype}: copy {copy:.1f} GB/s, GEMM {gemm:.0f} GFLOP/s")
    return "\n".join([*lines, *result["notes"]])


def baselines(result: dict[str, Any]) -> list[str]:
    """Names of all baselines that some row was compared with, in the order of the rows."""
    return list(dict.fromkeys(name for row in result["rows"] for name in row.get("baselines", {})))


def cells(result: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """(state, one text a column) of each row; a row without numbers says why in place of its time."""
    names = baselines(result)
    for row in result["rows"]:
        start = [row[key] for key in ("op", "shape", "dtype", "backend")]
        if row["state"] != "ok":
            yield row["state"], [*start, f"{row['state']}: {row['why']}", *[""] * (len(HEAD) - 5 + len(names))]
            continue
        rounds = len(row["seconds"])
        found = row["baselines"]
        yield (
            "ok",
            [
                *start,
                duration(row["median_s"]),
                f"{row['spread']:.0%} of {rounds}" if rounds > 1 else "1 round",
                f"{row['gb_per_s']:.1f}",
                f"{row['gflops_per_s']:.1f}",
                f"{row['ceiling_share']:.0%} {row['bound']}",
                *(f"{found[name]['ratio']:.3g} x" if name in found else "-" for name in names),
            ],
        )


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def show(result: dict[str, Any], console: Any) -> None:
    """Print the table; a file or a pipe gets lines as long as the table needs."""
    from rich.table import Table
    from rich.text import Text

    if not console.is_terminal:
        console.width = 200
    console.print(Text(title(result)))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    head = [*HEAD, *(f"v {name}" for name in baselines(result))]
    for index, column in enumerate(head):
        table.add_column(column, justify="left" if index < 4 else "right", overflow="fold")
    without = []
    for state, texts in cells(result):
        if state == "ok":
            table.add_row(*map(Text, texts))
        else:
            without.append(Text("  ".join(filter(None, texts)), style="red" if state == "red" else "yellow"))
    console.print(table)
    for line in without:
        console.print(line)


def markdown(result: dict[str, Any]) -> str:
    """The same table; columns "v ..." say how many times as long the baseline takes."""
    head = [*HEAD, *(f"v {name}" for name in baselines(result))]
    lines = [*title(result).splitlines(), ""]
    lines += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [f"| {' | '.join(text.replace('|', '/') for text in texts)} |" for _, texts in cells(result)]
    return "\n".join(lines) + "\n"


BAR, GAP, LEFT, WIDTH = 14, 6, 380, 500
COLOURS = ("#4269d0", "#efb118", "#3ca951", "#a463f2", "#97bbf5")
"""One a backend."""


def svg(result: dict[str, Any]) -> str:
    """A bar for each measured row: how many times as fast as the published structure; the line is "as fast"."""
    rows = [row for row in result["rows"] if row["state"] == "ok" and "published" in row["baselines"]]
    ratios = [row["baselines"]["published"]["ratio"] for row in rows]
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    scale, height = WIDTH / max([1.0, *ratios]), 60 + len(rows) * (BAR + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 80}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="18">times as fast as the published structure</text>',
    ]
    for index, name in enumerate(backends):
        colour = COLOURS[index % len(COLOURS)]
        parts.append(f'<text x="{10 + 80 * index}" y="18" fill="{colour}">{escape(name)}</text>')
    for index, (row, ratio) in enumerate(zip(rows, ratios)):
        y = 36 + index * (BAR + GAP)
        label = escape(f"{row['op']} {row['shape']} {row['dtype']}")
        colour = COLOURS[backends.index(row["backend"]) % len(COLOURS)]
        parts += [
            f'<text x="{LEFT - 8}" y="{y + BAR - 3}" text-anchor="end">{label}</text>',
            f'<rect x="{LEFT}" y="{y}" width="{ratio * scale:.1f}" height="{BAR}" fill="{colour}"/>',
            f'<text x="{LEFT + ratio * scale + 4:.1f}" y="{y + BAR - 3}">{ratio:.3g}</text>',
        ]
    x = LEFT + scale
    parts.append(f'<line x1="{x:.1f}" y1="28" x2="{x:.1f}" y2="{height - 20}" stroke="black" stroke-dasharray="3"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"

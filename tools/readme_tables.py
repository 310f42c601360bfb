"""Write the measured tables of the documents from the records that they name.

    python -m tools.readme_tables            rewrite README.md and docs/performance.md
    python -m tools.readme_tables --check    exit 1 where one differs from its records

A table stands between ``<!-- record: results/NAME.json -->`` and ``<!-- end of record -->``; one that
compares two records between ``<!-- records: BEFORE.json AFTER.json -->`` and ``<!-- end of records -->``.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "performance.md")
COMPARED = re.compile(r"(<!-- records: (\S+) (\S+) -->\n).*?(<!-- end of records -->)", re.DOTALL)
MARKED = re.compile(r"(<!-- record: (\S+) -->\n).*?(<!-- end of record -->)", re.DOTALL)


def table(record: dict[str, Any]) -> str:
    """A record in Markdown."""
    return {"attention": _attention, "model": _models, "serving": _serving}[record["suite"]](record)


def _timed(record: dict[str, Any]) -> list[str]:
    """The columns that have a number in some row."""
    rows = record["rows"]
    return [c["name"] for c in record["columns"] if any("median_us" in r["cells"][c["name"]] for r in rows)]


def _attention(record: dict[str, Any]) -> str:
    """Times of every column that ran, and two ratios."""
    rows, names = record["rows"], _timed(record)
    is_slow = record["environment"]["device"] == "cpu"
    unit, scale = ("ms", 1e-3) if is_slow else ("us", 1.0)
    lines = [
        " | ".join(["", f"batch x length, {unit}", *names, "ours / floor", "eager / ours", ""]).strip(),
        "|---" * (len(names) + 3) + "|",
    ]
    lines += ["| " + " | ".join(_row(row, names, scale)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _row(row: dict[str, Any], names: list[str], scale: float) -> list[str]:
    cells = row["cells"]
    times = [_time(cells[name].get("median_us"), scale) for name in names]
    ours, floor, eager = (cells[name]["median_us"] for name in ("ours", "floor", "eager"))
    bold = [f"**{text}**" if name == "ours" else text for name, text in zip(names, times, strict=True)]
    return [f"{row['batch']} x {row['kv_len']}", *bold, f"{ours / floor:.2f}", f"{eager / ours:.0f}"]


def _serving(record: dict[str, Any]) -> str:
    """Each kind of work in multiples of the floor: ours, what batch invariance makes of it, the best peer."""
    titles = (
        "case",
        "floor, us",
        "ours / floor",
        "batch invariant / floor",
        "best peer / floor",
        "best peer",
    )
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for row in record["rows"]:
        ratios, best = _times_floor(record, row)
        mine = f"**{ratios['ours']:.2f}**", f"{ratios['ours, batch invariant']:.2f}"
        theirs = ("-", "-") if best is None else (f"{ratios[best]:.2f}", best)
        floor = _time(row["cells"]["floor"]["median_us"], 1.0)
        lines.append("| " + " | ".join([row["name"], floor, *mine, *theirs]) + " |")
    return "\n".join([*lines, *_host(record.get("host_us", {}))]) + "\n"


def _host(times: dict[str, Any]) -> list[str]:
    """Lines of what the host spends, case by case; none of a record that does not tell them apart."""
    told = [
        f"{case}: " + ", ".join(f"{name} {us:.1f}" for name, us in columns.items())
        for case, columns in times.items()
        if isinstance(columns, dict)
    ]
    return ["", f"Host, us per eager call, at batch x length {'; '.join(told)}."] if told else []


def _times_floor(record: dict[str, Any], row: dict[str, Any]) -> tuple[dict[str, float], str | None]:
    """Columns that have a number in a row, in multiples of its floor; and the best peer among them."""
    ratios = {name: cell["times_floor"] for name, cell in row["cells"].items() if "times_floor" in cell}
    peers = [column["name"] for column in record["columns"] if column["role"] == "peer"]
    return ratios, min((name for name in peers if name in ratios), key=ratios.__getitem__, default=None)


def compared(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Ours of two records of the attention suite, each in multiples of its own floor, and the best peer's."""
    lines = ["| batch x length | before | after | best peer | which |", "|---|---|---|---|---|"]
    for old, new in zip(before["rows"], after["rows"], strict=True):
        ratios, best = _times_floor(after, new)
        assert best is not None, "PyTorch itself is a peer"
        was, row = old["cells"]["ours"]["times_floor"], f"{new['batch']} x {new['kv_len']}"
        lines.append(f"| {row} | {was:.2f} | **{ratios['ours']:.2f}** | {ratios[best]:.2f} | {best} |")
    return "\n".join(lines) + "\n"


def _time(number: float | None, scale: float) -> str:
    if number is None:
        return "-"
    value = number * scale
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _models(record: dict[str, Any]) -> str:
    """Tokens per second of every column that ran, and what ours makes of the bound."""
    rows, names = record["rows"], _timed(record)
    batches = {row["batch"] for row in rows}
    title = "context, tokens/s" if len(batches) == 1 else "batch x context, tokens/s"
    lines = [" | ".join(["", title, *names, "ours / bound", ""]).strip(), "|---" * (len(names) + 2) + "|"]
    for row in rows:
        speeds = {name: row["cells"][name].get("tokens_per_s") for name in names}
        texts = [_time(speeds[name], 1.0) for name in names]
        bold = [f"**{text}**" if name == "ours" else text for name, text in zip(names, texts, strict=True)]
        label = str(row["context"]) if len(batches) == 1 else f"{row['batch']} x {row['context']}"
        share = f"{speeds['ours'] / speeds['bound']:.0%}" if speeds.get("ours") else "-"
        lines.append("| " + " | ".join([label, *bold, share]) + " |")
    return "\n".join(lines) + "\n"


def _read(path: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((ROOT / path).read_text())
    return record


def section(path: str) -> str:
    """The table, and where, when and with what it was measured."""
    record = _read(path)
    about, versions = record["environment"], record["environment"]["libraries"]
    better = {"attention": "lower", "serving": "lower", "model": "higher"}[record["suite"]]
    return (
        f"{record['title'].splitlines()[0]}:\n\n{table(record)}\n"
        f"Medians, {better} is better; record [`{path}`]({path}), commit {about['commit'][:8]}, "
        f"{about['date'][:10]}, torch {versions['torch']}, triton {versions.get('triton', 'none')}.\n"
    )


def rewritten(text: str) -> str:
    """A document with every marked table made anew."""
    text = COMPARED.sub(
        lambda found: found[1] + "\n" + compared(*map(_read, found.groups()[1:3])) + "\n" + found[4], text
    )
    return MARKED.sub(lambda found: found[1] + "\n" + section(found[2]) + "\n" + found[3], text)


def main(*arguments: str) -> int:
    """Rewrite or check."""
    stale = 0
    for document in DOCUMENTS:
        text = document.read_text()
        fresh = rewritten(text)
        stale += fresh != text
        if "--check" not in arguments:
            document.write_text(fresh)
    return int("--check" in arguments and stale > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

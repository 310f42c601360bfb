"""Turn what pytest or compute-sanitizer wrote into a small record with its environment.

python -m tools.summary tests JUNIT.xml... RECORD.json
python -m tools.summary sanitize TOOL-SHARD.log... RECORD.json
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from flash_decoding.bench.environment import describe
from tools import races


def of_tests(xmls: list[Path]) -> dict[str, Any]:
    """Counts of JUnit files, per file of tests and in all; and every failure and reason to skip by name."""
    outcomes: dict[str, Counter[str]] = {}
    failures: list[str] = []
    skipped: Counter[str] = Counter()
    for test in itertools.chain.from_iterable(ElementTree.parse(xml).iter("testcase") for xml in xmls):
        kinds = {child.tag for child in test}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        outcomes.setdefault(test.get("classname", ""), Counter())[outcome] += 1
        if outcome == "failed":
            failures.append(f"{test.get('classname')}::{test.get('name')}")
        if outcome == "skipped":
            skipped.update(child.get("message", "") for child in test if child.tag == "skipped")
    total = sum(outcomes.values(), Counter())
    return {"total": total, "files": outcomes, "failures": failures, "skipped": skipped}


def of_sanitizer(logs: list[Path]) -> dict[str, Any]:
    """What each tool counted in all of its logs, TOOL-SHARD.log, and the races, those apart that the control
    does not have.
    """
    tools: dict[str, Counter[str]] = {}
    found: Counter[tuple[str, str]] = Counter()
    for log in logs:
        text = log.read_text()
        counts = tools.setdefault(log.stem.partition("-")[0], Counter())
        counts["runs"] += 1
        closing = re.findall(r"={9} (?:ERROR|RACECHECK) SUMMARY: (.*)", text)
        counts["runs that ended"] += len(closing[-1:])
        for number, what in re.findall(r"(\d+) (error|warning|hazard)s?\b", " ".join(closing[-1:])):
            counts[what + "s"] += int(number)
        counts["reports"] += races.reports_of(text)
        found.update(races.races_of(text))
    by_kernel: dict[str, dict[str, int]] = {}
    for (kernel, kind), hazards in sorted(found.items()):
        by_kernel.setdefault(kernel, {})[kind] = hazards
    return {"tools": tools, "races": by_kernel, "beyond the control": races.beyond_the_control(found)}


def is_clean(content: dict[str, Any]) -> bool:
    """No failure, no error, no race unread or that the control does not have; and all of it ran."""
    if "total" in content:
        return bool(content["total"]["failed"] == 0 and content["total"]["passed"] > 0)
    tools = content["tools"]
    ended = all(counts["runs"] == counts["runs that ended"] for counts in tools.values())
    unread = tools["racecheck"]["errors"] + tools["racecheck"]["warnings"] - tools["racecheck"]["reports"]
    return ended and not (tools["memcheck"]["errors"] or unread or content["beyond the control"])


def main(kind: str, *paths: str) -> int:
    """Write the record; 1 where it is not clean."""
    *sources, record = (Path(path) for path in paths)
    content = of_tests(sources) if kind == "tests" else of_sanitizer(sources)
    environment = describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    record.write_text(json.dumps({"environment": environment, **content}, indent=1) + "\n")
    told = content.get("total") or {name: content[name] for name in ("tools", "beyond the control")}
    sys.stdout.write(json.dumps(told) + "\n")
    return 0 if is_clean(content) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

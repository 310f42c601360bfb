"""Turn what pytest or compute-sanitizer wrote into a small record with its environment.

python -m tools.summary tests JUNIT.xml RECORD.json
python -m tools.summary sanitize LOG... RECORD.json
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from flash_decoding.bench.environment import describe


def of_tests(xml: Path) -> dict[str, Any]:
    """Counts of a JUnit file, per file of tests and in all; and every failure and reason to skip by name."""
    outcomes: dict[str, Counter[str]] = {}
    failures: list[str] = []
    skipped: Counter[str] = Counter()
    for test in ElementTree.parse(xml).iter("testcase"):
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
    """The closing count of each tool."""
    found = {log.stem: re.findall(r"={9} (?:ERROR|RACECHECK) SUMMARY: (.*)", log.read_text()) for log in logs}
    return {"tools": {tool: lines[-1] if lines else "no summary" for tool, lines in found.items()}}


def is_clean(content: dict[str, Any]) -> bool:
    """No failure, no error, no hazard; and something ran."""
    if "total" in content:
        return bool(content["total"]["failed"] == 0 and content["total"]["passed"] > 0)
    return all(re.match(r"0 (errors|hazards)", line) for line in content["tools"].values())


def main(kind: str, *paths: str) -> int:
    """Write the record; 1 where it is not clean."""
    *sources, record = (Path(path) for path in paths)
    content = of_tests(sources[0]) if kind == "tests" else of_sanitizer(sources)
    environment = describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    record.write_text(json.dumps({"environment": environment, **content}, indent=1) + "\n")
    sys.stdout.write(json.dumps(content.get("total") or content.get("tools")) + "\n")
    return 0 if is_clean(content) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

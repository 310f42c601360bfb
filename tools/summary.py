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
    """What each tool counted in all of its logs, TOOL-SHARD.log, and of which kernels it reports races."""
    tools: dict[str, Counter[str]] = {}
    kernels: Counter[str] = Counter()
    for log in logs:
        text = log.read_text()
        counts = tools.setdefault(log.stem.partition("-")[0], Counter())
        counts["runs"] += 1
        closing = re.findall(r"={9} (?:ERROR|RACECHECK) SUMMARY: (.*)", text)
        counts["runs that ended"] += len(closing[-1:])
        for number, what in re.findall(r"(\d+) (error|warning|hazard)s?\b", " ".join(closing[-1:])):
            counts[what + "s"] += int(number)
        kernels.update(re.findall(r"Race reported between \w+ access at (\w+)", text))
    return {"tools": tools, "races": kernels}


def is_clean(content: dict[str, Any]) -> bool:
    """No failure, no error, no hazard; and something ran."""
    if "total" in content:
        return bool(content["total"]["failed"] == 0 and content["total"]["passed"] > 0)
    reported = sum(counts["errors"] + counts["hazards"] for counts in content["tools"].values())
    return reported == 0 and all(n["runs"] == n["runs that ended"] for n in content["tools"].values())


def main(kind: str, *paths: str) -> int:
    """Write the record; 1 where it is not clean."""
    *sources, record = (Path(path) for path in paths)
    content = of_tests(sources) if kind == "tests" else of_sanitizer(sources)
    environment = describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    record.write_text(json.dumps({"environment": environment, **content}, indent=1) + "\n")
    sys.stdout.write(json.dumps(content.get("total") or content.get("tools")) + "\n")
    return 0 if is_clean(content) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

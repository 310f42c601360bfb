"""Name the commit in records made from a copy of the source whose repository was older, or missing.

    python -m tools.stamp RECORD.json...

A record holds a digest of the package that ran. Where it is the digest of the package here, and the package
here is as committed, the commit is known; anything else is refused.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from flash_decoding.bench.environment import source, without_folders


def stamp(path: Path, here: dict[str, object]) -> str:
    """Write the commit into one record; returns what was done."""
    record = json.loads(path.read_text())
    environment = record["environment"]
    environment["command"] = without_folders(environment["command"])
    if environment["commit"] is not None and not environment["dirty"]:
        path.write_text(json.dumps(record, indent=1) + "\n")
        return f"{path}: already names {environment['commit']}"
    if environment["source_sha256"] != here["source_sha256"]:
        raise SystemExit(f"{path}: made by another version of the package than the one here")
    environment["commit"], environment["dirty"] = here["commit"], False
    path.write_text(json.dumps(record, indent=1) + "\n")
    return f"{path}: {here['commit']}"


def main(*paths: str) -> None:
    """Stamp them all."""
    here = source()
    if here["dirty"] or here["commit"] is None:
        raise SystemExit("the package here differs from its commit")
    for path in paths:
        sys.stdout.write(stamp(Path(path), here) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

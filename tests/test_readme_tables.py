"""The README's figures are those of the records that it names."""

from __future__ import annotations

from tools.readme_tables import MARKED, README, rewritten


def test_every_measured_table_is_what_its_record_says() -> None:
    text = README.read_text()
    assert MARKED.search(text), "the README shows what was measured"
    assert rewritten(text) == text, "run: python -m tools.readme_tables"

"""The documents' figures are those of the records that they name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.readme_tables import COMPARED, DOCUMENTS, MARKED, rewritten


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_measured_table_is_what_its_record_says(document: Path) -> None:
    text = document.read_text()
    assert MARKED.search(text) or COMPARED.search(text), "it shows what was measured"
    assert rewritten(text) == text, "run: python -m tools.readme_tables"

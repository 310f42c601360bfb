"""What things cost: suites of columns, each checked against the reference before it is timed.

To add a column, write one ``Column`` and name it in ``baselines/__init__.py``. To add a suite, write its
module beside ``attention.py`` and its line in ``suites.py``.
"""

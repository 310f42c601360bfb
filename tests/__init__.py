"""Tests of flash_decoding; shared parts are imported as ``from tests.helpers import ...``."""

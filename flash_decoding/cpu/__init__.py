"""The CPU path: the same calls as the kernels, in PyTorch operators."""

from flash_decoding.cpu.append import append
from flash_decoding.cpu.attend import attend
from flash_decoding.cpu.merge import merge

__all__ = ["append", "attend", "merge"]

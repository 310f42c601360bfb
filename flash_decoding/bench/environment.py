"""Where and with what a run took place, so that its numbers can be understood later."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).resolve().parents[1]

LIBRARIES = (
    "torch",
    "triton",
    "transformers",
    "flash_attn",
    "flash_attn_interface",
    "flashinfer",
    "xformers",
    "vllm",
)


def describe(device: torch.device) -> dict[str, Any]:
    """Versions, device and source of this run, in plain values."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": without_folders(" ".join([_program(), *sys.argv[1:]])),
        **source(),
        "device": device.type,
        "device_name": device_name(device),
        "driver": _driver() if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cpu": cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "libraries": versions(),
    }


def without_folders(text: str) -> str:
    """A command or an error, absolute paths cut to their last part: folders of one machine tell nothing."""
    return re.sub(r"(?<!\S)/\S*/", "", text)


def device_name(device: torch.device) -> str:
    """The model of the device that is measured."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """The CPU's model, as the system calls it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Installed versions of PyTorch, Triton and the libraries that can be compared with."""
    distributions = importlib.metadata.packages_distributions()
    installed = [name for name in LIBRARIES if importlib.util.find_spec(name) is not None]
    found = {
        name: importlib.metadata.version(distributions[name][0]) if name in distributions else "unknown"
        for name in installed
    }
    return found | {"torch": torch.__version__}  # with the build: +cpu, +cu130


def source() -> dict[str, Any]:
    """The commit of this package, whether its files differ from it, and a digest of what ran.

    The digest says which source it was where there is no repository (an installed package, a copy).
    """
    commit = _git("log", "-1", "--format=%H", "--", ".")
    status = _git("status", "--porcelain", "--", ".")
    return {
        "commit": _git("rev-parse", "HEAD") if commit else None,
        "dirty": bool(status) if commit else None,
        "source_sha256": _digest(),
    }


def _program() -> str:
    name = Path(sys.argv[0]).name
    return f"python -m {PACKAGE.name}" if name == "__main__.py" else name


def _digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(PACKAGE)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _git(*arguments: str) -> str | None:
    """Output of git in the package's folder; None without git, or where no repository holds it."""
    return _output("git", "-C", str(PACKAGE), *arguments)


def _driver() -> str | None:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else ""

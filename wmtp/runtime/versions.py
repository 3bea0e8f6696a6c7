"""Versions of the source and of the packages that a run uses."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("wmtp", "torch", "hydra-core", "numpy", "tokenizers", "safetensors", "mlflow")


def git_revision() -> str | None:
    """The commit of the source, with `+changes` if it is not clean; None where no repository tracks it."""
    source = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(source), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None  # installed: the repository around it, if there is one, is somebody else's
    revision = git("rev-parse", "HEAD")
    return f"{revision}+changes" if revision and git("status", "--porcelain", "--untracked-files=no") else revision


def versions() -> dict[str, Any]:
    """Which code this is, and of which packages."""
    packages = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"git_revision": git_revision(), "versions": packages}

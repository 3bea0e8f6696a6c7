"""Find the versions of the source code and of the packages that a run uses."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("wmtp", "torch", "hydra-core", "numpy", "tokenizers", "safetensors", "mlflow")


def git_revision() -> str | None:
    """Return the git commit of wmtp's source code, or None if the source code is not in a git repository.

    If there are uncommitted changes, `+changes` is appended to the commit.
    """
    source = Path(__file__).parent

    def _git(*arguments: str) -> str | None:
        """Return the output of a git command; None if it fails."""
        try:
            done = subprocess.run(["git", "-C", str(source), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None  # installed package: a repository around it belongs to another project
    revision = _git("rev-parse", "HEAD")
    return f"{revision}+changes" if revision and _git("status", "--porcelain", "--untracked-files=no") else revision


def version_text() -> str:
    """Return the version and the git revision of wmtp and the versions of Python and of packages, one in each line."""
    found = versions()
    packages = dict(found["versions"])
    revision = f" ({found['git_revision']})" if found["git_revision"] else ""
    lines = [f"wmtp {packages.pop('wmtp')}{revision}", *(f"{name} {version}" for name, version in packages.items())]
    return "\n".join(lines)


def versions() -> dict[str, Any]:
    """Return the git revision of wmtp's source code, and the versions of Python and of the packages in `PACKAGES`."""
    packages = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"git_revision": git_revision(), "versions": packages}

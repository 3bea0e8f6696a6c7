"""Find the versions of the source code and of the packages that a run uses."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

REVISION = "WMTP_GIT_REVISION"
"""Environment variable with the git commit from which an image was built."""
PACKAGES = ("wmtp", "torch", "hydra-core", "numpy", "tokenizers", "safetensors", "mlflow")


def git_revision() -> str | None:
    """Return the git commit of wmtp's source code. If it is not in a git repository, return the revision of its image.

    The revision of an image is in the environment variable `REVISION`. If tracked files have uncommitted changes,
    `+changes` is appended to the commit.
    """
    if not _is_tracked():
        return os.environ.get(REVISION) or None  # installed package: a repository around it is another project's
    revision = _git("rev-parse", "HEAD")
    return f"{revision}+changes" if revision and _git("status", "--porcelain", "--untracked-files=no") else revision


def version_text() -> str:
    """Return the version and the git revision of wmtp and the versions of Python and of packages, one in each line."""
    found = versions()
    packages = dict(found["versions"])
    revision = f" ({found['git_revision']})" if found["git_revision"] else ""
    lines = [f"wmtp {packages.pop('wmtp')}{revision}", *(f"{name} {version}" for name, version in packages.items())]
    return "\n".join(lines)


def untracked_files() -> dict[str, Any]:
    """Return the names of all files of wmtp and of its config that git does not track, and a hash of their contents.

    The result is empty if there are none, or if the source code is not in a git repository. Files that git ignores
    count, too, except compiled Python files, because they have an effect whether or not git ignores them.
    """
    root = _git("rev-parse", "--show-toplevel") if _is_tracked() else None
    if root is None:
        return {}
    listed = _git("ls-files", "--others", "--full-name", "-z", "--", "..", "../../conf") or ""
    names = sorted(name for name in listed.split("\0") if name and "__pycache__" not in Path(name).parts)
    digest = hashlib.sha256()
    for name in names:
        path = Path(root, name)
        content = path.read_bytes() if path.is_file() else b""
        digest.update(f"{name}\0{len(content)}\0".encode(errors="surrogateescape") + content)
    return {"untracked": {"files": names, "sha256": digest.hexdigest()}} if names else {}


def _is_tracked() -> bool:
    """Return whether the source code is in its own git repository. An installed package may be inside another one."""
    return _git("ls-files", "--error-unmatch", Path(__file__).name) is not None


def _git(*arguments: str) -> str | None:
    """Return the output of a git command in the folder of this file; None if it fails."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="surrogateescape", timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def versions() -> dict[str, Any]:
    """Return the git revision of wmtp's source code, its untracked files, and the versions of Python and `PACKAGES`."""
    packages = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"git_revision": git_revision(), **untracked_files(), "versions": packages}

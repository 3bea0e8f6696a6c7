"""Test of a helper of other tests: the fork of a process in which threads may be running."""

import gc
import os
from pathlib import Path

from tests.support.forking import fork


class Freed:
    """An object in a reference cycle, which writes a file when it is freed."""

    def __init__(self, path: Path) -> None:
        self.path, self.itself = path, self

    def __del__(self) -> None:
        self.path.touch()


def test_a_forked_process_frees_no_object_of_its_parent(tmp_path: Path) -> None:
    """The control forks without the helper."""
    freed = tmp_path / "freed"
    gc.disable()
    try:
        Freed(freed)
        os.waitpid(fork(gc.collect), 0)
        assert not freed.exists()
        if not (control := os.fork()):
            gc.collect()
            os._exit(0)
        os.waitpid(control, 0)
        assert freed.exists()
    finally:
        gc.enable()

"""Asking something that may not answer."""

import threading
from collections.abc import Callable


def answers_within(seconds: float, question: Callable[[], object]) -> bool:
    """Whether a call came to an end in time; what it raised is raised here. One that did not goes on in its thread."""
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            question()
        except BaseException as error:  # noqa: BLE001 - it is raised below, in the thread that asked
            failures.append(error)

    thread = threading.Thread(target=ask, name="question", daemon=True)
    thread.start()
    thread.join(seconds)
    if failures:
        raise failures[0]
    return not thread.is_alive()

"""A headless Chromium that checks HTML pages for faults."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser

SIZES = [(1280, "light"), (1280, "dark"), (400, "light"), (400, "dark")]
LEAST_CONTRAST, LEAST_TEXT = 4.5, 10.5
FIND_FAULTS = (Path(__file__).parent / "page_faults.js").read_text()


def faults(browser: "Browser", path: Path, width: int, scheme: Any, *, switches: tuple[str, ...] = ()) -> list[str]:
    """Return the faults of a page: console messages, requests, and text that is cut off, covered or hard to read.

    All `<details>` are opened first. `switches` are selectors of switches, which are pressed one after the other; the
    page is checked again after each.
    """
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, found = context.new_page(), []
    page.on("console", lambda message: found.append(f"console: {message.type}: {message.text}"))
    page.on("pageerror", lambda error: found.append(f"error: {error}"))
    page.on("request", lambda request: found.append(f"request: {request.url}"))
    page.on("dialog", lambda dialog: (found.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    url = path.resolve().as_uri()
    page.goto(url)
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    limits = {"contrast": LEAST_CONTRAST, "text": LEAST_TEXT}
    found += page.evaluate(FIND_FAULTS, limits)
    for switch in switches:
        page.check(switch)
        found += [f"{switch}: {fault}" for fault in page.evaluate(FIND_FAULTS, limits)]
    context.close()
    found.remove(f"request: {url}")
    return [fault for fault in found if fault != "request: data:,"]

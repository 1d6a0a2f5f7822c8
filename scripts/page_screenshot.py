"""Draws docs/do/page.png: the web page of a server with traffic on it, as an admin sees it.

    python scripts/page_screenshot.py [docs/do/page.png] [--width 1280] [--dark]

Needs a browser, as the tests of the page do (tests/browser.py says which), and Pillow. For looking at other sizes too.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.browser import Page, browser  # noqa: E402 - found by what is above
from tests.serve.page.served import Site, run_experiment, site  # noqa: E402

#: seconds of traffic before the picture is taken
TRAFFIC = 20.0
#: more are not seen, and take room
_COLOURS = 48


def sign_in(page: Page, served: Site) -> None:
    """Returns when the page shows an admin everything."""
    page.open(f"{served.address}/")
    page.wait("!document.querySelector('#login').hidden")
    page.evaluate("document.querySelector('#key').focus()")
    page.write(served.admin)
    page.press("Enter")
    page.wait("document.querySelector('#experiment-list article')")


def show_versions(page: Page, name: str) -> None:
    """Returns when the versions of an adapter are shown."""
    page.evaluate("document.querySelector('#adapter').focus()")
    page.write(name)
    page.press("Enter")
    page.wait(f"document.querySelector('#adapter-name')?.textContent === {name!r}")
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, nargs="?", default=ROOT / "docs" / "do" / "page.png")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--dark", action="store_true")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        site(Path(folder), words="maker") as served,
        browser() as page,
    ):
        page.resize(arguments.width)
        page.dark(arguments.dark)
        run_experiment(served)
        sign_in(page, served)
        until = time.monotonic() + TRAFFIC
        while time.monotonic() < until:
            for model in ("notes", "notes@1", "base"):
                served.complete(model, max_tokens=24, ignore_eos=True)
            time.sleep(0.2)
        show_versions(page, "notes")
        # to its end, without a scroll bar
        page.resize(arguments.width, page.evaluate("document.documentElement.scrollHeight"))
        page.screenshot(arguments.output)
    with Image.open(arguments.output) as picture:
        fewer = picture.convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE)
    fewer.save(arguments.output, optimize=True)


if __name__ == "__main__":
    main()

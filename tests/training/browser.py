"""A page as a real browser shows it: headless Chromium, asked with the standard library alone.

The page is laid out in frames of the asked widths (a window cannot be as narrow as a phone), and a
script beside them writes what it finds into the document, which `--dump-dom` prints.
"""

import contextlib
import html
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LOOK = """
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map((frame) => {
    const page = frame.contentDocument, root = page.documentElement;
    page.querySelectorAll("details").forEach((one) => { one.open = true; });
    const seen = [...page.querySelectorAll("svg text, p, td, small, figcaption, dd, pre")];
    const size = (one) => parseFloat(getComputedStyle(one).fontSize)
      * (one.ownerSVGElement ? one.getScreenCTM().a : 1);
    return {
      width: root.scrollWidth, room: root.clientWidth,
      images: [...page.images].map((image) => [image.alt, image.naturalWidth, image.width]),
      charts: page.querySelectorAll("svg polyline").length,
      sections: [...page.querySelectorAll("h2")].map((head) => head.textContent),
      smallest: Math.min(...seen.map(size)),
      fetched: frame.contentWindow.performance.getEntriesByType("resource").map((e) => e.name),
      mode: page.compatMode,
    };
  });
  document.getElementById("found").textContent = JSON.stringify(found);
});
"""


def find():
    """The browser, or a skip that says what would be needed."""
    for name in (os.environ.get("CHROMIUM"), *NAMES):
        path = shutil.which(name) if name else None
        # Some systems have a command of that name that only says what to install.
        if path and subprocess.run([path, "--version"], capture_output=True).returncode == 0:
            return path
    pytest.skip(f"needs a browser: {', '.join(NAMES)}, or a path in CHROMIUM")


def look(page, widths):
    """What the browser makes of a page at each width, and what it complains of."""
    browser = find()
    with tempfile.TemporaryDirectory() as folder:
        frames = "".join(
            f'<iframe src="{html.escape(Path(page).resolve().as_uri())}" '
            f'style="width:{width}px;height:800px;border:0"></iframe>'
            for width in widths
        )
        harness = Path(folder) / "harness.html"
        harness.write_text(
            f'<!DOCTYPE html><meta charset="utf-8"><body>{frames}<pre id="found"></pre>'
            f"<script>{LOOK}</script>",
            encoding="utf-8",
        )
        words = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        words += ["--allow-file-access-from-files", f"--user-data-dir={folder}/profile"]
        words += ["--disable-dev-shm-usage", "--enable-logging=stderr", "--dump-dom"]
        process = subprocess.Popen(
            [*words, harness.as_uri()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # its helpers are its group, and end with it
        )
        try:
            out, err = process.communicate(timeout=90)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found = re.search(r'<pre id="found">(.*?)</pre>', out, re.DOTALL)
    assert found, f"the browser printed no page: {err[-2000:]}"
    return json.loads(html.unescape(found[1])), [e for e in err.splitlines() if "CONSOLE" in e]

"""A page in a headless browser: what it holds after its scripts, and after what a visitor does."""

import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# A window of a phone's width around the page. VISITS: fragments of its address, or scripts here;
# LOOK: an object of what to note after each.
WINDOW = """
<iframe src="p.html" style="width: 360px; height: 800px; border: 0"></iframe>
<script>
const frame = document.querySelector("iframe");
const wait = () => new Promise((done) => setTimeout(done, 200));
const all = (selector) => [...frame.contentDocument.querySelectorAll(selector)];
const send = (selector, event) => all(selector)[0].dispatchEvent(event);
const press = (selector, key) =>
  send(selector, new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const textOf = (selector) => all(selector).map((node) => node.textContent);
onload = async () => {
  const found = [];
  for (const visit of VISITS) {
    if (visit.startsWith("#")) frame.contentWindow.location.hash = visit;
    else await eval(visit);
    await wait();
    found.push(eval(`(${LOOK})`));
  }
  document.body.dataset.found = JSON.stringify(found);
};
</script>
"""


def dump_dom(page: Path, *flags: str) -> str:
    """The page's HTML after its scripts have run, with the time that they wait for skipped."""
    with tempfile.TemporaryDirectory() as profile:
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
                   "--disable-background-networking", "--disable-component-update",
                   "--disable-sync", "--force-prefers-reduced-motion", *flags,
                   "--disable-ipc-flooding-protection",  # it ignores the 201st change of address
                   f"--user-data-dir={profile}", "--virtual-time-budget=60000", "--dump-dom",
                   page.resolve().as_uri()]
        return subprocess.run(command, capture_output=True, timeout=600, text=True).stdout


def visit(page: Path, look: str, *visits: str) -> list[dict]:
    """What the page p.html shows after each of the visits, in one browser."""
    window = page.with_name("window.html")
    constants = f"const VISITS = {json.dumps(visits)}, LOOK = {json.dumps(look)};"
    constants = constants.replace("<", "\\u003c")  # text with </script> stays in the script
    window.write_text(f"<!DOCTYPE html><body><script>{constants}</script>{WINDOW}", "utf-8")
    dom = dump_dom(window, "--allow-file-access-from-files")
    return json.loads(html.unescape(re.search(r'data-found="([^"]*)"', dom)[1]))

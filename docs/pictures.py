"""Draw the pictures of the README and of docs/ from a real sweep: `make pictures`.

It runs `train.py -m sweep=losses`, looks at the sweep in TensorBoard with Chromium, and takes the
figures of the sweep's report.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

DOCS = Path(__file__).parent
WINDOW = (1500, 900)
SECONDS = 60

# TensorBoard is made of web components: what they show is below their shadow roots.
SHOWN_TEXT = """
const found = [];
const walk = node => {
  if (["STYLE", "SCRIPT", "NOSCRIPT"].includes(node.nodeName)) return;
  if (node.nodeType === Node.TEXT_NODE && node.textContent.trim()) {
    found.push(node.textContent.trim());
  }
  if (node.shadowRoot) walk(node.shadowRoot);
  for (const child of node.childNodes) walk(child);
};
walk(document.body);
return found;
"""


@contextmanager
def tensorboard(logdir: Path) -> Iterator[str]:
    """TensorBoard on a directory while the context lasts; yields its address."""
    command = [sys.executable, "-m", "tensorboard.main", "--load_fast=false"]
    server = subprocess.Popen(
        [*command, "--logdir", logdir.name, "--host", "127.0.0.1", "--port", "0"],
        cwd=logdir.parent,  # what it shows of the path is then the sweep's name
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stderr is not None
    said = ""
    try:
        for line in server.stderr:
            said += line
            if address := re.search(r"http://\S+", line):
                yield address.group()
                return
        raise RuntimeError(f"TensorBoard did not start: {said}")
    finally:
        server.kill()
        server.wait()
        server.stderr.close()


class Browser:
    """A headless Chromium that looks at one TensorBoard.

    Args:
        address: Where TensorBoard serves.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        options = Options()
        options.binary_location = find("chromium") or ""
        width, height = WINDOW
        for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage"):
            options.add_argument(f"--{argument}")
        options.add_argument(f"--window-size={width},{height}")
        self.driver = webdriver.Chrome(options, Service(find("chromedriver")))

    def open(self, tab: str, expected: Collection[str] = ()) -> list[str]:
        """Open a tab and wait for texts, each as often as it is given; returns every text shown.

        Raises:
            TimeoutError: naming the texts that did not come.
        """
        self.driver.get("about:blank")  # another tab alone would not load the page again
        self.driver.get(f"{self.address}#{tab}")
        give_up = time.monotonic() + SECONDS
        while True:
            shown: list[str] = self.driver.execute_script(SHOWN_TEXT)
            missing = Counter(expected) - Counter(shown)
            if not missing:
                return shown
            if time.monotonic() > give_up:
                raise TimeoutError(f"TensorBoard's {tab} does not show {set(missing)}: {shown}")
            time.sleep(0.5)

    def save(self, path: Path) -> None:
        """Save what is in the window, once it no longer changes."""
        before = b""
        while (now := self.driver.get_screenshot_as_png()) != before:
            before = now
            time.sleep(2)
        path.write_bytes(now)

    def close(self) -> None:
        """End the browser."""
        self.driver.quit()


def find(program: str) -> str | None:
    """Path of Debian's `chromium` or `chromedriver` (packages chromium, chromium-driver)."""
    return shutil.which(program)


def main() -> None:
    """Run the sweep and draw everything."""
    with tempfile.TemporaryDirectory() as place:
        sweep = Path(place) / "losses"
        command = ["-m", "sweep=losses", "parity.every_n_steps=10", "callbacks=quiet"]
        subprocess.run(
            [sys.executable, "train.py", *command, f"hydra.sweep.dir={sweep}"],
            check=True,
            cwd=DOCS.parent,
        )
        with tensorboard(sweep / "report" / "tensorboard") as address:
            browser = Browser(address)
            try:
                # One seed's runs, as they are.
                view = "custom_scalars&_smoothingWeight=0&regexInput=s0"
                browser.open(view, ["loss error (nats)", "accuracy"])
                browser.save(DOCS / "tensorboard.png")
                browser.open("hparams", ["softmax_nll", "log_softmax_nll", "cross_entropy"])
                browser.save(DOCS / "hparams.png")
            finally:
                browser.close()
        (DOCS / "report").mkdir(exist_ok=True)
        for figure in (sweep / "report").glob("*.png"):
            shutil.copy(figure, DOCS / "report" / figure.name)


if __name__ == "__main__":
    main()

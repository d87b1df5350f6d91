"""The local pages as people use them: served by the command, in a window of Chromium."""

import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync"
)
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"


@contextmanager
def served(command, folder, *options):
    """The page as a command serves it: (process, address). The process is killed in the end, as a power cut would."""
    command = [sys.executable, "-m", "faceprior.human_eval", command, str(folder), *options]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": str(folder.parent)}
    )
    try:
        yield process, re.search(r"http://\S+", process.stdout.readline()).group()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


class Desk:
    """A window with the page; every step waits for what it should show."""

    def __init__(self, browser, address, width=1280, height=900):
        self.page = browser.new_page(viewport={"width": width, "height": height})
        self.page.set_default_timeout(60_000)
        self.requests, self.errors, self.address = [], [], address
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda line: self.errors.append(line.text) if line.type == "error" else None)
        self.page.goto(address)

    def enter(self, name, then):
        self.page.fill("#annotator input, #annotator textarea", name)
        self.page.keyboard.press("Enter")
        self.wait(then)

    def press(self, keys, then="", order=None):
        for key in keys.split():
            self.page.keyboard.press(key)
        self.wait(then)
        if order is not None:
            shown = "text => document.querySelector('#order').innerText.trim() === text"
            self.page.wait_for_function(shown, arg=order)

    def click(self, key):
        self.page.click(f'[id="key-{key}"]')

    def wait(self, text):
        self.page.wait_for_function("text => document.body.innerText.includes(text)", arg=text)

    def assert_narrow_enough(self):
        """Nothing is wider than the window."""
        assert self.page.evaluate("document.documentElement.scrollWidth") <= self.page.viewport_size["width"]

    def assert_local(self, process):
        """Nothing left this machine, neither from the browser nor from the page's process."""
        import psutil

        assert {url.split("/")[2] for url in self.requests if url.startswith("http")} == {self.address.split("/")[2]}
        connections = psutil.Process(process.pid).net_connections("inet")
        assert connections
        assert {end.ip for c in connections for end in (c.laddr, c.raddr) if end} == {"127.0.0.1"}

    def close(self):
        """Close the window, which must have shown no error in its console."""
        self.page.close()
        assert self.errors == []

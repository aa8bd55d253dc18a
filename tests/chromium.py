"""A browser to look at pages with, driven over a pipe: no port is opened, nothing is fetched."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess

FOUND = shutil.which("chromium") or shutil.which("chromium-browser")
KEYS = {"Tab": 9, "Enter": 13, "ArrowRight": 39}


class Chromium:
    """One page at a time; `errors` has what its console and its script complained of."""

    def __init__(self, profile):
        to_browser, self.to = os.pipe()
        self.back, from_browser = os.pipe()

        def pipes():  # Chromium reads commands from 3 and answers on 4
            os.dup2(os.dup(to_browser), 3)
            os.dup2(os.dup(from_browser), 4)

        flags = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe",
                 f"--user-data-dir={profile}", "--disable-background-networking", "--no-first-run")
        self.process = subprocess.Popen([FOUND, *flags, "about:blank"], preexec_fn=pipes, close_fds=False,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_browser)
        os.close(from_browser)
        self.count, self.left, self.session, self.errors = itertools.count(1), b"", None, []
        self.loaded = 0
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(20)
        os.close(self.to)
        os.close(self.back)

    def __call__(self, method, **params):
        """Send a command and return its result; what comes in between is noted."""
        number = next(self.count)
        session = {"sessionId": self.session} if self.session else {}
        os.write(self.to, json.dumps({"id": number, "method": method, "params": params, **session}).encode() + b"\0")
        while (message := self.message()).get("id") != number:
            self.note(message)
        assert "error" not in message, message
        return message["result"]

    def message(self):
        while b"\0" not in self.left:
            more = os.read(self.back, 1 << 20)
            assert more, "chromium ended"
            self.left += more
        first, _, self.left = self.left.partition(b"\0")
        return json.loads(first)

    def note(self, message):
        if message.get("method") == "Page.loadEventFired":
            self.loaded += 1
        elif message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded") or (
                message.get("method") == "Runtime.consoleAPICalled" and message["params"]["type"] == "error"):
            self.errors.append(message["params"])

    def open(self, path, width, height=900):
        """Open a file at this width."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        before = self.loaded
        self("Page.navigate", url=path.resolve().as_uri())
        while self.loaded == before:
            self.note(self.message())

    def press(self, key):
        how = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key], **({"text": "\r"} if key == "Enter" else {})}
        self("Input.dispatchKeyEvent", type="keyDown", **how)
        self("Input.dispatchKeyEvent", type="keyUp", **{name: value for name, value in how.items() if name != "text"})

    def click(self, x, y):
        for kind in ("mousePressed", "mouseReleased"):
            self("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def value(self, expression):
        """Return what an expression is on the page."""
        return self("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

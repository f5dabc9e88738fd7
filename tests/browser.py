"""A headless Chromium, driven over a pipe by its DevTools protocol: nothing to install but the browser."""

import json
import os
import shutil
import subprocess
from contextlib import contextmanager

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """A tab: what it asked for, and what went wrong in it, is kept."""

    def __init__(self, read, write):
        self._read, self._write, self._count, self._session = read, write, 0, None
        self.requests: list[str] = []
        self.errors: list[str] = []
        self._loaded = False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """Send a command and wait for its answer."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._write.write(json.dumps(message).encode() + b"\0")
        self._write.flush()
        while (answer := self._next()).get("id") != self._count:
            self._note(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self):
        text = bytearray()
        while (byte := self._read.read(1)) != b"\0":
            assert byte, "the browser ended"
            text += byte
        return json.loads(text)

    def _note(self, event):
        method, params = event["method"], event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])
        elif method == "Page.loadEventFired":
            self._loaded = True

    def open(self, path, width=1280, height=900, dark=False):
        """Show a file in a window of this size and wait until it is there."""
        mobile = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self._loaded = False
        self.call("Page.navigate", url=path.absolute().as_uri())
        while not self._loaded:
            self._note(self._next())

    def run(self, script):
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def key(self, name):
        """Press a key."""
        self.call("Input.dispatchKeyEvent", type="keyDown", key=name, code=name)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=name, code=name)

    def point(self, x, y):
        """Move the mouse."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)


@contextmanager
def browser(home):
    """A tab of a browser of its own, whose profile is in `home`."""
    to_child, write = os.pipe()
    read, from_child = os.pipe()

    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
    command += [f"--user-data-dir={home}", "--disable-background-networking"]
    with (home / "stderr").open("wb") as errors:
        wired = ["bash", "-c", f'exec "$@" 3<&{to_child} 4>&{from_child}', "bash", *command]
        fds = (to_child, from_child)
        process = subprocess.Popen(wired, pass_fds=fds, stdout=subprocess.DEVNULL, stderr=errors)
    os.close(to_child)
    os.close(from_child)
    try:
        with os.fdopen(read, "rb") as reader, os.fdopen(write, "wb") as writer:
            yield Page(reader, writer)
    finally:
        process.kill()
        process.wait()

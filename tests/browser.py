"""A headless Chromium, driven over WebDriver: JSON over HTTP, so the standard library will do."""

import json
import shutil
import subprocess
from contextlib import contextmanager
from urllib.request import Request, urlopen

MISSING = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]


class Browser:
    """One window.

    Args:
      session: its address.
    """

    def __init__(self, session):
        self._session = session

    def open(self, path):
        self._post("url", {"url": path.absolute().as_uri()})

    def run(self, script, *arguments):
        """What the body of a JavaScript function returns."""
        return self._post("execute/sync", {"script": script, "args": arguments})

    def command(self, name, **parameters):
        """A command of the DevTools protocol."""
        return self._post("goog/cdp/execute", {"cmd": name, "params": parameters})

    def type(self, selector, text):
        found = self._post("element", {"using": "css selector", "value": selector})
        (element,) = found.values()
        self._post(f"element/{element}/value", {"text": text})

    def console(self):
        """What the page has said, errors of the browser itself too."""
        return self._post("se/log", {"type": "browser"})

    def _post(self, command, parameters):
        return _post(f"{self._session}/{command}", parameters)


@contextmanager
def chromium():
    """A browser that keeps what the console says."""
    arguments = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
    capabilities = {
        "goog:chromeOptions": {"binary": shutil.which("chromium"), "args": arguments},
        "goog:loggingPrefs": {"browser": "ALL"},
    }
    command = ["chromedriver", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        try:
            line = next(line for line in driver.stdout if "started successfully" in line)
            port = line.rstrip(".\n").rpartition(" ")[2]
            address = f"http://127.0.0.1:{port}/session"
            started = _post(address, {"capabilities": {"alwaysMatch": capabilities}})
            session = f"{address}/{started['sessionId']}"
            yield Browser(session)
            urlopen(Request(session, method="DELETE")).close()
        finally:
            driver.terminate()


def _post(address, parameters):
    body = json.dumps(parameters).encode()
    with urlopen(Request(address, body, {"Content-Type": "application/json"})) as answer:
        return json.loads(answer.read())["value"]

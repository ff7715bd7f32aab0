"""Pages in a real headless Chromium, over its DevTools protocol."""

import asyncio
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_TIMEOUT_S = 300

# What a person would see: all that is drawn has a size, all videos play, nothing sticks out of the page.
_LOOK = """(async () => {
  const videos = [...document.querySelectorAll('video')];
  const played = [];
  for (const video of videos) {
    video.muted = true;
    await video.play();
    for (let i = 0; i < 1000 && video.currentTime === 0; i++) await new Promise(done => setTimeout(done, 50));
    played.push(video.currentTime > 0 && video.videoWidth > 0);
    video.pause();
  }
  const drawn = [...document.querySelectorAll('svg, img')].map(e => e.getBoundingClientRect());
  return {
    title: document.title,
    videos: played,
    pictures: drawn.map(box => box.width > 50 && box.height > 30),
    text: document.body.innerText,
    overflow: document.documentElement.scrollWidth - window.innerWidth,
    unreadable: [...document.querySelectorAll('svg text')].filter(e => e.getBoundingClientRect().width === 0
      && e.textContent.trim()).length,
    cut: [...document.querySelectorAll('svg text')].filter(e => {
      const text = e.getBoundingClientRect(), picture = e.ownerSVGElement.getBoundingClientRect();
      return text.left < picture.left - 2 || text.right > picture.right + 2;
    }).map(e => e.textContent),
  };
})()"""


@dataclass
class Page:
    """What was seen of a page.

    Attributes:
        seen: the result of `_LOOK`.
        complaints: errors and warnings of its console, and exceptions of its scripts.
        requests: addresses that it asked for, apart from itself and data inside it.
        screenshot: PNG.
    """

    seen: dict[str, Any] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    screenshot: bytes = b""


def look_at(path: Path, width: int = 1100, height: int = 1400) -> Page:
    """Opens a file in a browser of its own, which has no network.

    Where there is no browser, the test is skipped; with SCD_REQUIRE_BROWSER it fails.
    """
    program = next((found for name in _NAMES if (found := shutil.which(name))), None)
    if program is None:
        give_up = pytest.fail if os.environ.get("SCD_REQUIRE_BROWSER") else pytest.skip
        give_up("no Chromium: apt-get install chromium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:  # its children may still write there
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--mute-audio"]
        options += ["--remote-debugging-port=0", f"--user-data-dir={profile}", f"--window-size={width},{height}"]
        options += ["--disable-background-networking", "--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND"]
        process = subprocess.Popen([program, *options, "about:blank"], stderr=subprocess.PIPE, text=True)
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if address := re.search(r"ws://\S+", line):
                    return asyncio.run(asyncio.wait_for(_look(address[0], path), _TIMEOUT_S))
            raise AssertionError(f"{program} ended with {process.wait()}")
        finally:
            process.kill()
            process.wait()


async def _look(browser: str, path: Path) -> Page:
    import aiohttp

    page, answers, number = Page(), {}, 0
    loaded = asyncio.Event()
    origin = browser.split("/devtools")[0].replace("ws://", "http://")
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{origin}/json") as response:
            target = next(tab for tab in await response.json() if tab["type"] == "page")
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:

            async def listen() -> None:
                async for message in socket:
                    event = message.json()
                    if "id" in event:
                        answers[event["id"]].set_result(event)
                    elif event["method"] == "Page.loadEventFired":
                        loaded.set()
                    else:
                        _note(page, event, path)

            async def call(method: str, **parameters: Any) -> dict[str, Any]:
                nonlocal number
                number += 1
                answers[number] = asyncio.get_running_loop().create_future()
                await socket.send_json({"id": number, "method": method, "params": parameters})
                answer = await answers[number]
                assert "error" not in answer, answer
                return answer["result"]

            listener = asyncio.create_task(listen())
            for domain in ("Page", "Runtime", "Log", "Network"):
                await call(f"{domain}.enable")
            await call("Page.navigate", url=path.resolve().as_uri())
            await loaded.wait()
            result = await call("Runtime.evaluate", expression=_LOOK, awaitPromise=True, returnByValue=True)
            assert "exceptionDetails" not in result, result
            page.seen = result["result"]["value"]
            shot = await call("Page.captureScreenshot", captureBeyondViewport=True)
            listener.cancel()
    import base64

    page.screenshot = base64.b64decode(shot["data"])
    return page


def _note(page: Page, event: dict[str, Any], path: Path) -> None:
    parameters = event["params"]
    if event["method"] == "Runtime.exceptionThrown":
        page.complaints.append(parameters["exceptionDetails"]["text"])
    elif event["method"] == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
        page.complaints.append(parameters["entry"]["text"])
    elif event["method"] == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
        page.complaints.append(str(parameters["args"]))
    elif event["method"] == "Network.requestWillBeSent":
        url = parameters["request"]["url"]
        if not url.startswith("data:") and url != path.resolve().as_uri():
            page.requests.append(url)

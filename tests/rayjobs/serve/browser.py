"""Chromium without a window, driven through its DevTools."""

import asyncio
import base64
import itertools
import json
import os
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp

from tests.waiting import PATIENCE_S

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
FLAGS += ["--disable-component-update", "--disable-quic", "--hide-scrollbars", "--remote-debugging-port=0"]


class Tab:
    """A tab of the browser."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._numbers = socket, itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.complaints: list[str] = []
        """Errors of scripts, and of what the page may not load."""
        self._reading = asyncio.create_task(self._read())

    async def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol; return its result."""
        number = next(self._numbers)
        answered = self._waiting[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_str(json.dumps({"id": number, "method": method, "params": params}))
        answer = await asyncio.wait_for(answered, PATIENCE_S)
        assert "error" not in answer, f"{method}: {answer}"
        return answer.get("result", {})

    async def _read(self) -> None:
        async for message in self._socket:
            event = json.loads(message.data)
            if "id" in event:
                self._waiting.pop(event["id"]).set_result(event)
            elif event["method"] in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(json.dumps(event["params"]))

    async def open(self, url: str, width: int, scheme: str) -> None:
        """Open a page in a window of some width, in light or dark."""
        for domain in ("Page", "Runtime", "Log", "DOM"):
            await self.send(f"{domain}.enable")
        size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
        await self.send("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        await self.send("Emulation.setEmulatedMedia", features=features)
        await self.send("Page.navigate", url=url)

    async def value(self, expression: str) -> Any:
        """Evaluate JavaScript; return its value."""
        result = await self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def until(self, expression: str) -> Any:
        """Wait until JavaScript gives a true value; return it."""
        for _ in range(int(PATIENCE_S * 20)):
            with suppress(AssertionError):  # while the page is loading
                if value := await self.value(expression):
                    return value
            await asyncio.sleep(0.05)
        raise AssertionError(f"in vain: {expression}; {await self.value('document.body.innerText')}")

    async def press(self, key: str, code: int) -> None:
        """Press and release a key that has the focus's attention."""
        text = {"text": "\r"} if key == "Enter" else {}
        named = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        await self.send("Input.dispatchKeyEvent", type="keyDown", **named, **text)
        await self.send("Input.dispatchKeyEvent", type="keyUp", **named)

    async def type(self, text: str) -> None:
        """Type text where the focus is."""
        await self.send("Input.insertText", text=text)

    async def choose_file(self, selector: str, file: Path) -> None:
        """Choose a file in an input of the page."""
        root = (await self.send("DOM.getDocument"))["root"]["nodeId"]
        node = (await self.send("DOM.querySelector", nodeId=root, selector=selector))["nodeId"]
        await self.send("DOM.setFileInputFiles", files=[str(file)], nodeId=node)

    async def screenshot(self, file: Path) -> None:
        """Write a picture of the whole page."""
        taken = await self.send("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(taken["data"]))


@asynccontextmanager
async def browser_tab(folder: Path) -> AsyncIterator[Tab]:
    """Start the browser with its profile in a folder; yield its tab."""
    assert BROWSER
    flags = [*FLAGS, f"--user-data-dir={folder}", *["--no-sandbox"] * (os.geteuid() == 0)]
    process = await asyncio.create_subprocess_exec(
        BROWSER, *flags, "about:blank", stderr=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL
    )
    assert process.stderr
    try:
        address = None
        while not address:
            line = await asyncio.wait_for(process.stderr.readline(), PATIENCE_S)
            assert line, "the browser ended"
            address = re.search(rb"ws://([\w.:]+)/", line)
        draining = asyncio.create_task(process.stderr.read())
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://{address[1].decode()}/json/list") as answer:
                pages = [one for one in await answer.json() if one["type"] == "page"]
            async with session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                yield Tab(socket)
        draining.cancel()
    finally:
        process.terminate()
        await process.wait()

"""A real ComfyUI server in a process of its own, driven through its HTTP and websocket API as a client does."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import websocket

from .find import ROOT

Progress = Callable[[str, int, int], None]
"""Called with the node's id, steps done and steps in all."""


def _link(pack: Path, place: Path) -> None:
    """Link a folder, or copy it where links need a privilege (Windows)."""
    try:
        place.symlink_to(pack, target_is_directory=True)
    except FileExistsError:
        return
    except OSError:
        shutil.copytree(pack, place, ignore=shutil.ignore_patterns(".*", "__pycache__", "demo-output"))


class WorkflowError(RuntimeError):
    """The server refused a workflow, or a node failed."""


class Server:
    """ComfyUI with a base directory of its own; use as a context manager.

    Args:
        comfyui: the ComfyUI to run.
        base: base directory; `custom_nodes`, with this repository among them, `models`, `input` and `output` lie or are made
            in it.
    """

    def __init__(self, comfyui: Path, base: Path):
        self.comfyui, self.base = comfyui, base
        for folder in ("custom_nodes", "models", "input", "output", "user"):
            (base / folder).mkdir(parents=True, exist_ok=True)
        _link(ROOT, base / "custom_nodes" / "Personalize")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = base / "server.log"
        self.client_id = uuid.uuid4().hex

    def __enter__(self) -> "Server":
        command = [sys.executable, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--base-directory", str(self.base), "--database-url", "sqlite:///:memory:", "--disable-auto-launch"]
        # Threads that spin while they wait make a picture take a minute where anything else is running.
        env = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(command, cwd=self.comfyui, stdout=log, stderr=subprocess.STDOUT, env=env)
        try:
            self._wait_until_ready(timeout=180)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _wait_until_ready(self, timeout: float) -> None:
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)
        raise RuntimeError(f"ComfyUI did not start; its log ends:\n{self.log()[-3000:]}")

    def log(self) -> str:
        """Everything the server printed so far."""
        return self.log_path.read_text(errors="replace")

    def get(self, path: str) -> Any:
        """A GET answer: JSON decoded, anything else as bytes."""
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            body = answer.read()
            return json.loads(body) if "json" in answer.headers.get("Content-Type", "") else body

    def post(self, path: str, data: Mapping[str, Any]) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(data).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                body = answer.read()
        except urllib.error.HTTPError as error:
            raise WorkflowError(error.read().decode()) from None
        return json.loads(body) if body else None

    def run(self, prompt: Mapping[str, Any], progress: Progress | None = None, timeout: float = 900) -> dict[str, Any]:
        """Queue an API-format workflow, wait for it, and return its outputs by node id.

        Raises:
            WorkflowError: refused, or a node failed; the message is the node's.
        """
        socket_url = f"ws://127.0.0.1:{self.port}/ws?clientId={self.client_id}"
        connection = websocket.create_connection(socket_url, timeout=timeout)
        try:
            answer = self.post("/prompt", {"prompt": prompt, "client_id": self.client_id})
            if answer.get("node_errors"):  # the host runs what is left
                raise WorkflowError(json.dumps(answer["node_errors"]))
            queued = answer["prompt_id"]
            while True:
                message = connection.recv()
                if isinstance(message, bytes):
                    continue  # a preview picture
                event = json.loads(message)
                data = event["data"]
                if data.get("prompt_id") not in (None, queued):
                    continue
                if event["type"] == "execution_error":
                    raise WorkflowError(f"{data['node_type']}: {data['exception_message'].strip()}")
                if event["type"] == "execution_interrupted":
                    raise WorkflowError("cancelled")
                if event["type"] == "progress" and progress:
                    progress(str(data.get("node")), data["value"], data["max"])
                if event["type"] == "executing" and data["node"] is None:
                    break  # sent once the history has the outputs, unlike execution_success
        finally:
            connection.close()
        return self.get(f"/history/{queued}")[queued]["outputs"]

    def picture(self, reference: Mapping[str, str]) -> bytes:
        """The bytes of an output picture, as a history entry names it."""
        return self.get("/view?" + urllib.parse.urlencode(reference))

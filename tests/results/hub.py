"""A stand-in for a model hub on loopback: repositories, LFS uploads and commits over its HTTP."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "a1B2" * 8


@dataclass
class Hub:
    """What was uploaded: repository -> path -> bytes."""

    address: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)  # LFS, by hash
    messages: list[str] = field(default_factory=list)
    cards: list[str] = field(default_factory=list)  # that were asked to be checked
    fails_at: str = ""  # a part of a path that is answered with an error

    def create(self, asked: dict[str, Any]) -> dict[str, Any]:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        self.private[name] = asked.get("visibility") == "private"
        self.files.setdefault(name, {})
        return {"url": f"{self.address}/{name}", "name": name, "id": name}

    def how(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {
            "files": [
                {
                    "path": file["path"], "shouldIgnore": False,
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                }
                for file in asked["files"]
            ]
        }  # fmt: skip

    def batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.address}/store/{one['oid']}"}}}
            for one in asked["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
            elif line["key"] == "file":
                self.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[repo][value["path"]] = self.stored[value["oid"]]
        return {"commitUrl": f"{self.address}/{repo}/commit/1", "commitOid": "1" * 40}


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None: ...

        def _body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _answer(self, code: int, said: Any) -> None:
            body = json.dumps(said).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_PUT(self) -> None:
            body = self._body()
            oid = hashlib.sha256(body).hexdigest()
            assert self.path == f"/store/{oid}"
            hub.stored[oid] = body
            self._answer(200, {})

        def do_POST(self) -> None:
            body = self._body()
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self._answer(401, {"error": "Invalid username or password."})
            elif hub.fails_at and hub.fails_at in self.path:
                self._answer(403, {"error": "out of room"})
            else:
                self._answer(200, self._said(body))

        def _said(self, body: bytes) -> dict[str, Any]:
            place = self.path.split("?")[0]
            if place == "/api/repos/create":
                return hub.create(json.loads(body))
            if place == "/api/validate-yaml":
                hub.cards.append(json.loads(body)["content"])
                return {"errors": [], "warnings": []}
            if re.fullmatch(r"/api/models/.+/preupload/main", place):
                return hub.how(json.loads(body))
            if place.endswith(".git/info/lfs/objects/batch"):
                return hub.batch(json.loads(body))
            found = re.fullmatch(r"/api/models/(.+)/commit/main", place)
            assert found, place
            return hub.commit(found[1], [json.loads(line) for line in body.splitlines()])

        def do_GET(self) -> None:
            self._answer(404, {"error": "nothing to see"})

    return Handler


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that listens as long as the block lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

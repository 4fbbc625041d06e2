"""A stand-in for the Hugging Face hub on this machine: what its client asks of it to make a repo and upload files."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN, READER = "hf_writer", "hf_reader"
"""A token that may write, and one that may not."""
REGULAR_BYTES = 5000
"""Larger files go the way of large ones."""


@dataclass
class Hub:
    """Repos with their files by name, whether each is private, and the requests that came, as `METHOD path`."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    address: str = ""
    blobs: dict[str, bytes] = field(default_factory=dict)

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, Any]:
        """The status and the JSON for a request."""
        self.requests.append(f"{method} {path}")
        if path.startswith("/blobs/"):
            self.blobs[path.rpartition("/")[2]] = body
            return 200, {}
        if token not in (TOKEN, READER):
            return 401, {"error": "Invalid username or password."}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body), token)
        repo = path.removeprefix("/api/models/").removeprefix("/").removesuffix(".git/info/lfs/objects/batch")
        repo = "/".join(repo.split("/")[:2])
        if repo not in self.repos:
            return 404, {"error": "Repository not found"}
        if method == "GET":
            siblings = [{"rfilename": name} for name in self.repos[repo]]
            return 200, {"id": repo, "private": self.private[repo], "siblings": siblings, "sha": "0" * 40}
        if token != TOKEN:
            return 403, {"error": "Forbidden: the token has no right to write"}
        if path.endswith("/preupload/main"):
            files = [
                file | {"uploadMode": "lfs" if file["size"] > REGULAR_BYTES else "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        if path.endswith("/objects/batch"):
            objects = [
                wanted | {"actions": {"upload": {"href": f"{self.address}/blobs/{wanted['oid']}"}}}
                for wanted in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        return self._commit(repo, [json.loads(line) for line in body.splitlines()])

    def _create(self, wanted: dict[str, Any], token: str) -> tuple[int, Any]:
        repo = f"{wanted['organization']}/{wanted['name']}"
        if repo in self.repos:
            return 409, {"error": "You already created this model repo", "url": f"{self.address}/{repo}"}
        if token != TOKEN:
            return 403, {"error": "You don't have the rights to create a model under this namespace"}
        self.repos[repo], self.private[repo] = {}, wanted.get("visibility") == "private"
        return 200, {"url": f"{self.address}/{repo}"}

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.repos[repo][value["path"]] = self.blobs[value["oid"]]
        return 200, {"commitUrl": f"{self.address}/{repo}/commit/1", "commitOid": "1" * 40}


@contextmanager
def serving() -> Iterator[Hub]:
    """A stand-in at an address of its own."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            status, found = hub.answer(self.command, self.path.partition("?")[0], token, body)
            data = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = _do  # noqa: N815 (the names that http.server looks for)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()

"""A stand-in for the model hub on loopback: enough of its API to download models and data sets, whole or not."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serving(repositories: dict[str, Path], cut: frozenset[str] = frozenset()) -> Iterator[str]:
    """Serve folders as repositories (``models/me/tiny``, ``datasets/me/facts``); gives the address for ``HF_ENDPOINT``.

    Args:
        repositories: what is there; a name that starts with ``models/locked/`` asks for a login, others are missing.
        cut: files (``models/me/tiny/model.safetensors``) whose transfer breaks off in the middle.
    """

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def do_POST(self) -> None:  # datasets asks for information about paths this way
            length = int(self.headers.get("Content-Length", 0))
            asked = self.rfile.read(length).decode()
            self.answer(body=True, paths=asked)

        def answer(self, body: bool, paths: str = "") -> None:
            parts = self.path.partition("?")[0].strip("/").split("/")
            api = parts[0] == "api"
            parts = parts[1:] if api else parts
            if parts[0] not in ("models", "datasets"):
                parts = ["models", *parts]
            name, rest = "/".join(parts[:3]), parts[3:]
            if name.startswith("models/locked/"):
                self.refuse(401, "GatedRepo", "Access is restricted. You must have access to it and be authenticated.")
            elif name not in repositories:
                self.refuse(404 if len(parts) >= 3 else 200, "RepoNotFound", "Repository not found")
            elif api:
                self.describe(name, rest, paths)
            else:
                self.send_file(name, "/".join(rest[2:]), body)

        def describe(self, name: str, rest: list[str], paths: str) -> None:
            folder = repositories[name]
            files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
            if rest and rest[0] in ("tree", "paths-info"):
                under = "/".join(rest[2:])
                wanted = [f for f in files if (f in paths if rest[0] == "paths-info" else f.startswith(under))]
                sizes = {f: (folder / f).stat().st_size for f in wanted}
                self.send_json([{"type": "file", "path": f, "oid": etag(folder / f), "size": sizes[f]} for f in wanted])
            else:
                siblings = [{"rfilename": f} for f in files]
                self.send_json(
                    {
                        "id": name.partition("/")[2],
                        "sha": COMMIT,
                        "siblings": siblings,
                        "private": False,
                        "disabled": False,
                        "gated": False,
                        "downloads": 0,
                        "tags": [],
                    }
                )

        def send_file(self, repository: str, name: str, body: bool) -> None:
            file = repositories[repository] / name
            if not file.is_file():
                self.refuse(404, "EntryNotFound", "Entry not found")
                return
            content = file.read_bytes()
            self.send_response(200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{etag(file)}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body and f"{repository}/{name}" in cut:
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                self.close_connection = True
            elif body:
                self.wfile.write(content)

        def send_json(self, value: Any) -> None:
            content = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def refuse(self, status: int, code: str, message: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", message)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()

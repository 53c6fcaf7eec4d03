"""A small hub of models on the loopback interface: what huggingface_hub asks of the real one."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve_hub() -> Iterator[tuple[str, dict[str, bytes], list[str]]]:
    """Yield its address (HF_ENDPOINT), the files that were pushed by path, and the tokens that came."""
    files: dict[str, bytes] = {}
    tokens: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            tokens.append(self.headers.get("Authorization", ""))
            if self.path == "/api/repos/create":
                self.answer({"url": f"http://{self.headers['Host']}/me/small"})
            elif "/preupload/" in self.path:
                asked = json.loads(body)["files"]
                self.answer(
                    {"files": [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in asked]}
                )
            elif "/commit/" in self.path:
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                self.answer(
                    {"commitUrl": f"http://{self.headers['Host']}/me/small/commit/{COMMIT}", "commitOid": COMMIT}
                )
            else:
                self.answer({"status": "ok"})

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            name = unquote(self.path.partition("?")[0].rpartition(f"/resolve/{COMMIT}/")[2])
            if "/resolve/" in self.path and name in files:
                self.answer(files[name])
            elif self.path.startswith("/api/models/") and "/tree/" in self.path:
                self.answer([{"type": "file", "path": path, "size": len(files[path]), "oid": COMMIT} for path in files])
            elif self.path.startswith("/api/models/"):
                siblings = [{"rfilename": path} for path in files]
                self.answer({"id": "me/small", "modelId": "me/small", "sha": COMMIT, "siblings": siblings})
            else:
                self.send_error(404)

        def answer(self, content: Any) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("Content-Type", "application/json" if not isinstance(content, bytes) else "text/plain")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", files, tokens
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

"""A small Google Cloud Storage in memory, with the conditions on writes and reads that locks and TensorStore rely on.

It knows the requests that gcsfs and TensorStore make (the JSON API), and how a store fails: `status` makes every
request fail with that status of HTTP, `read_only` every write; `running` lets requests wait while it is not set;
`ahead` is by how many seconds its clock is. After `stop` it is as if the process were killed, until `start`.

As a program, `python object_store.py PORT BUCKET`, it serves until it is stopped.
"""

import base64
import hashlib
import json
import re
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class ObjectStore(ThreadingHTTPServer):
    """Objects by bucket and name: (content, generation, time of the last change)."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, *buckets: str, port: int = 0):
        self.buckets: dict[str, dict[str, tuple[bytes, int, float]]] = {name: {} for name in buckets}
        self.lock, self.generation, self.uploads = threading.Lock(), 1000, {}
        self.status, self.read_only, self.running = 0, False, threading.Event()
        self.running.set()
        self.ahead = 0.0
        super().__init__(("127.0.0.1", port), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.start(bound=True)

    def start(self, *, bound: bool = False) -> None:
        """Listens, again at the same port, with the objects that it has."""
        if not bound:
            self.socket = socket.socket(self.address_family, self.socket_type)
            self.server_bind()
            self.server_activate()
        self.gone = False
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Accepts no more connections and closes the open ones without an answer."""
        self.gone = True
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores clients that were killed."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet for an answer
    server: ObjectStore

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, status: int, content: Any = b"", **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD" and status != 304:
            self.wfile.write(data)

    def _act(self) -> None:
        store = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        store.running.wait()
        if store.gone:
            self.close_connection = True
            return None
        if store.status:
            return self._answer(store.status, {"error": {"code": store.status, "message": "out of order"}})
        if store.read_only and self.command != "GET":
            return self._answer(403, {"error": {"code": 403, "message": "no permission to write"}})
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        match = re.fullmatch(r"(?:/upload|/download)?/storage/v1/b/([^/]+)(/o(?:/(.*))?)?", parts.path)
        if not match or match[1] not in store.buckets:
            return self._answer(404, {"error": {"code": 404, "message": "there is no such bucket"}})
        with store.lock:
            return self._on_bucket(match[1], match[2], match[3], query, body, upload=parts.path.startswith("/upload"))

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _act

    def _on_bucket(
        self, bucket: str, below: str | None, name: str | None, query: dict[str, str], body: bytes, *, upload: bool
    ) -> None:
        objects = self.server.buckets[bucket]
        if below is None:
            return self._answer(200, {"kind": "storage#bucket", "name": bucket})
        if upload:
            return self._upload(bucket, query, body)
        if name is None:
            return self._answer(200, self._listed(bucket, query))
        source, copied, target = name.partition("/copyTo/b/") if "/copyTo/" in name else name.partition("/rewriteTo/b/")
        source = unquote(source)
        if source not in objects:
            return self._answer(404, {"error": {"code": 404, "message": "there is no such object"}})
        if copied:
            other, _, target = target.partition("/o/")
            about = self._store(other, unquote(target), objects[source][0])
            return self._answer(200, {"done": True, "resource": about, **about})
        content, generation, _ = objects[source]
        if self.command == "DELETE":
            del objects[source]
            return self._answer(204)
        if query.get("ifGenerationNotMatch") == str(generation):
            return self._answer(304)
        if query.get("ifGenerationMatch", str(generation)) != str(generation):
            return self._answer(412, {"error": {"code": 412, "message": "another generation"}})
        if query.get("alt") != "media":
            return self._answer(200, self._about(bucket, source))
        headers = {"x_goog_generation": str(generation), "Content_Type": "application/octet-stream"}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            begin, end = int(wanted[1]), int(wanted[2] or len(content) - 1)
            if begin >= len(content):
                return self._answer(416)
            end = min(end, len(content) - 1)
            span = f"bytes {begin}-{end}/{len(content)}"
            return self._answer(206, content[begin : end + 1], Content_Range=span, **headers)
        return self._answer(200, content, **headers)

    def _upload(self, bucket: str, query: dict[str, str], body: bytes) -> None:
        uploads, name = self.server.uploads, query.get("name", "")
        if query["uploadType"] == "resumable":
            if "upload_id" not in query:
                key = str(len(uploads))
                uploads[key] = (name or json.loads(body or b"{}").get("name"), b"")
                return self._answer(200, {}, Location=f"{self.server.url}{self.path}&upload_id={key}")
            name, before = uploads[query["upload_id"]]
            body = before + body
            uploads[query["upload_id"]] = name, body
            if self.headers.get("Content-Range", "").endswith("/*"):
                return self._answer(308, Range=f"bytes=0-{len(body) - 1}")
        elif query["uploadType"] == "multipart":
            border = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            end = b"\r\n" if body.startswith(b"--" + border + b"\r\n") else b"\n"  # content may end with either
            _, about, content = (end + body).split(end + b"--" + border)[:3]
            name = json.loads(about.partition(2 * end)[2])["name"]
            body = content.partition(2 * end)[2]
        there = self.server.buckets[bucket].get(name)
        if "ifGenerationMatch" in query and query["ifGenerationMatch"] != str(there[1] if there else 0):
            return self._answer(412, {"error": {"code": 412, "message": "another generation"}})
        return self._answer(200, self._store(bucket, name, body))

    def _store(self, bucket: str, name: str, content: bytes) -> dict[str, Any]:
        self.server.generation += 1
        self.server.buckets[bucket][name] = content, self.server.generation, time.time() + self.server.ahead
        return self._about(bucket, name)

    def _about(self, bucket: str, name: str) -> dict[str, Any]:
        content, generation, changed = self.server.buckets[bucket][name]
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(changed)) + f".{int(changed % 1 * 1000):03d}Z"
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": bucket,
            "generation": str(generation),
            "metageneration": "1",
            "size": str(len(content)),
            "timeCreated": when,
            "updated": when,
            "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
        }

    def _listed(self, bucket: str, query: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        items, prefixes = [], set()
        for name in sorted(self.server.buckets[bucket]):
            if not name.startswith(prefix) or name < query.get("startOffset", ""):
                continue
            if "endOffset" in query and name >= query["endOffset"]:
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.partition(delimiter)[0] + delimiter)
            else:
                items.append(self._about(bucket, name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}


if __name__ == "__main__":
    store = ObjectStore(*sys.argv[2:], port=int(sys.argv[1]))
    print(store.url, flush=True)
    threading.Event().wait()

"""A small server of the Hub's HTTP API on loopback, which can also misbehave.

It serves what the real client asks for: the description of a repository at a revision, and files by revision, with
redirects to a second server (another origin, as the real one does for large files) that must never see a token.
"""

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest

LARGE = re.compile(r".*(\.safetensors|\.model|\.bin|\.gguf|tokenizer\.json)$")
"""What is in large file storage: declared with its SHA-256 and fetched by a redirect."""


@dataclass
class Repository:
    """Commits and branches of one repository; `token` is needed where it is gated or private."""

    commits: dict[str, Path] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    disabled: bool = False
    extra_names: list[str] = field(default_factory=list)


@dataclass
class Request:
    """One request that arrived, at the hub (``hub``) or at the server behind its redirects (``cdn``)."""

    server: str
    method: str
    path: str
    headers: dict[str, str]


@dataclass
class Misbehaviour:
    """What goes wrong; counts go down with each use, and -1 means always.

    Attributes:
        flips: by path, how often a byte of its contents is flipped.
        cuts: by path, after how many bytes of a response the connection is cut, and how often.
        statuses: answers to the next requests, instead of what was asked for.
        ignore_range: always send files from their beginning.
        longer: by path, how many bytes too many are sent.
        seconds_per_chunk: a pause after every 64 KiB.
    """

    flips: dict[str, int] = field(default_factory=dict)
    cuts: dict[str, tuple[int, int]] = field(default_factory=dict)
    statuses: list[int] = field(default_factory=list)
    ignore_range: bool = False
    longer: dict[str, int] = field(default_factory=dict)
    seconds_per_chunk: float = 0.0


class HubServer:
    """The server; a context manager. `endpoint` is its address, `token` the one that opens gated repositories."""

    def __init__(self) -> None:
        self.token = "hf_right_token"
        self.repositories: dict[str, Repository] = {}
        self.misbehaviour = Misbehaviour()
        self.requests: list[Request] = []
        self.sent_bytes = 0
        self._blobs: dict[str, tuple[Path, str]] = {}
        self._lock = threading.Lock()
        self._servers = [_server(self, "hub"), _server(self, "cdn")]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._servers[0].server_address[1]}"

    @property
    def cdn(self) -> str:
        return f"http://localhost:{self._servers[1].server_address[1]}"

    def publish(self, repository: str, folder: Path, branch: str = "main") -> str:
        """Make a folder the head of a branch and return its commit; the folder must stay as it is.

        A dataset's name begins with ``datasets/``.
        """
        commit = hashlib.sha1()
        for path in _files(folder):
            commit.update(f"{path} {_git_sha1(folder / path)}\n".encode())
        repo = self.repositories.setdefault(repository, Repository())
        repo.commits[commit.hexdigest()] = folder
        repo.branches[branch] = commit.hexdigest()
        return commit.hexdigest()

    def asked_for(self, path: str) -> list[Request]:
        """The GET requests for a file, redirects not counted."""
        return [r for r in self.requests if r.server == "hub" and r.method == "GET" and r.path.endswith("/" + path)]

    def __enter__(self) -> "HubServer":
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def _server(hub: HubServer, name: str) -> ThreadingHTTPServer:
    class Handler(_Handler):
        pass

    Handler.hub, Handler.name = hub, name
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    return server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer
    name: str

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        address = urlsplit(self.path)
        path = unquote(address.path)
        with self.hub._lock:
            headers = {name.lower(): value for name, value in self.headers.items()}
            self.hub.requests.append(Request(self.name, self.command, path, headers))
            status = self.hub.misbehaviour.statuses.pop(0) if self.hub.misbehaviour.statuses else 0
        if status:
            self._refuse(status, "", "for a test")
        elif self.name == "cdn":
            self._large(path)
        elif match := re.fullmatch(r"/api/(?:models/)?((?:datasets/)?[^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._describe(match[1], match[2] or "main", "blobs" in parse_qs(address.query))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(match[1], match[2], match[3])
        else:
            self._refuse(404, "", "no such page")

    def _find(self, name: str, revision: str) -> tuple[Repository, str] | None:
        """The repository and commit, or None after a refusal was sent."""
        repo = self.hub.repositories.get(name)
        authorization = self.headers.get("Authorization")
        allowed = authorization == f"Bearer {self.hub.token}"
        if authorization and not allowed and authorization != "Bearer hf_other_account":
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif repo is None or (repo.private and not allowed):
            self._refuse(404 if authorization else 401, "RepoNotFound", "Repository not found")
        elif repo.disabled:
            self._refuse(403, "", "Access to this resource is disabled.")
        elif repo.gated and not allowed:
            self._refuse(403 if authorization else 401, "GatedRepo", "Access to this model is restricted")
        else:
            commit = repo.branches.get(revision, revision)
            if commit in repo.commits:
                return repo, commit
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return None

    def _describe(self, name: str, revision: str, with_blobs: bool) -> None:
        found = self._find(name, revision)
        if found is None:
            return
        repo, commit = found
        folder = repo.commits[commit]
        siblings: list[dict[str, Any]] = []
        for path in _files(folder):
            sibling: dict[str, Any] = {"rfilename": path}
            if with_blobs:
                size = (folder / path).stat().st_size
                sibling |= {"size": size, "blobId": _git_sha1(folder / path)}
                if LARGE.match(path):
                    sibling["lfs"] = {"size": size, "sha256": _sha256(folder / path), "pointerSize": 134}
            siblings.append(sibling)
        siblings += [{"rfilename": extra, "size": 1, "blobId": "0" * 40} for extra in repo.extra_names]
        body = {
            "id": name.removeprefix("datasets/"),
            "sha": commit,
            "private": repo.private,
            "gated": repo.gated,
            "tags": [],
        }
        self._send_json({**body, "siblings": siblings})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        found = self._find(name, revision)
        if found is None:
            return
        repo, commit = found
        file = repo.commits[commit] / path
        if not file.is_file():
            self._refuse(404, "EntryNotFound", "Entry not found")
        elif LARGE.match(path):
            digest = _sha256(file)
            self.hub._blobs[digest] = (file, path)
            self.send_response(302)
            self.send_header("X-Repo-Commit", commit)
            self.send_header("X-Linked-Etag", f'"{digest}"')
            self.send_header("X-Linked-Size", str(file.stat().st_size))
            self.send_header("Location", f"{self.hub.cdn}/{quote(digest)}?X-Signature=secret-signature")
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._send_file(file, path, {"X-Repo-Commit": commit, "ETag": f'"{_git_sha1(file)}"'})

    def _large(self, path: str) -> None:
        file, name = self.hub._blobs[path.lstrip("/")]
        self._send_file(file, name, {"ETag": f'"{path.lstrip("/")}"'})

    def _send_file(self, file: Path, name: str, headers: dict[str, str]) -> None:
        wrong = self.hub.misbehaviour
        size, start, end, status = file.stat().st_size, 0, file.stat().st_size, 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and not wrong.ignore_range:
            start, end, status = int(asked[1]), min(int(asked[2] or size - 1) + 1, size), 206
            headers = {**headers, "Content-Range": f"bytes {start}-{end - 1}/{size}"}
        longer = wrong.longer.get(name, 0)
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(end - start + longer), "Accept-Ranges": "bytes"}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        flip = self._use(wrong.flips, name)
        limit = self._cut(name)
        with file.open("rb") as stream:
            stream.seek(start)
            for position in range(start, end, 1 << 16):
                chunk = bytearray(stream.read(min(1 << 16, end - position)))
                if flip and position <= size // 2 < position + len(chunk):
                    chunk[size // 2 - position] ^= 1
                if limit is not None and position + len(chunk) - start > limit:
                    self.wfile.write(chunk[: limit - (position - start)])
                    self.close_connection = True
                    return
                self.wfile.write(chunk)
                self.hub.sent_bytes += len(chunk)
                time.sleep(wrong.seconds_per_chunk)
        self.wfile.write(b"x" * longer)

    def _use(self, counts: dict[str, int], name: str) -> bool:
        with self.hub._lock:
            left = counts.get(name, 0)
            if left > 0:
                counts[name] = left - 1
            return left != 0

    def _cut(self, name: str) -> int | None:
        with self.hub._lock:
            limit, left = self.hub.misbehaviour.cuts.get(name, (0, 0))
            if left > 0:
                self.hub.misbehaviour.cuts[name] = (limit, left - 1)
            return limit if left else None

    def _send_json(self, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _refuse(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _git_sha1(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

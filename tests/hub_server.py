"""A stand-in for the Hugging Face Hub on this machine, for tests through the real client libraries.

It answers what `huggingface_hub.snapshot_download` and `datasets.load_dataset` ask: information on
a repository, its file list, and its files. Statuses and headers are those of the real Hub: 401 for
an unknown repository, redirects from old names to new ones, information on a gated repository but
not its files.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

_API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+(?:/[^/]+)?)"
    r"(?:/(?P<action>revision|tree)/(?P<revision>[^/]+)(?:/(?P<path>.*))?)?"
)
_FILE = re.compile(
    r"/(?P<dataset>datasets/)?(?P<name>[^/]+(?:/[^/]+)?)"
    r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)"
)


class Snapshot:
    """The files of a repository at one commit."""

    def __init__(self, folder: Path) -> None:
        self.files = {
            path.relative_to(folder).as_posix(): path
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    @cached_property
    def hashes(self) -> dict[str, str]:
        return {n: hashlib.sha1(p.read_bytes()).hexdigest() for n, p in self.files.items()}

    @cached_property
    def commit(self) -> str:
        """As in git, a hash of names and contents, so that new contents are a new commit."""
        return hashlib.sha1(json.dumps(self.hashes).encode()).hexdigest()


@dataclass
class Repository:
    """A model or dataset: its branches, and whether its files are for chosen people only."""

    branches: dict[str, Snapshot]
    gated: bool = False

    def at(self, revision: str) -> Snapshot | None:
        """The snapshot of a branch or commit."""
        commits = {snapshot.commit: snapshot for snapshot in self.branches.values()}
        return self.branches.get(revision) or commits.get(revision)


@dataclass(frozen=True)
class Request:
    """What a client asked for, with the host it thought it was asking."""

    method: str
    host: str
    path: str


@dataclass
class HubServer:
    """Serves folders as repositories until the `with` block ends.

    Attributes:
        requests: Every request so far.
        failing: URLs with these endings are answered "503 Service Unavailable".
        cut: Answers for URLs with these endings break off half-way.
        silent: Accept connections and never answer.
    """

    requests: list[Request] = field(default_factory=list)
    failing: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()
    silent: bool = False

    def __post_init__(self) -> None:
        self._repositories: dict[tuple[str, str], Repository] = {}
        self._renamed: dict[tuple[str, str], str] = {}
        self._closing = threading.Event()

    def __enter__(self) -> HubServer:
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(
        self, kind: str, name: str, folder: Path, *, branch: str = "main", gated: bool = False
    ) -> str:
        """Serves a folder as a branch of the model or dataset `name`; returns its commit."""
        repository = self._repositories.setdefault((kind, name), Repository({}))
        repository.branches[branch] = snapshot = Snapshot(folder)
        repository.gated = gated
        return snapshot.commit

    def rename(self, kind: str, old: str, new: str) -> None:
        """Redirects an old name, as the Hub does for ids without an owner."""
        self._renamed[kind, old] = new

    def downloads(self, name: str) -> list[str]:
        """Paths of the files of a repository that were fetched, in order."""
        found = (_FILE.fullmatch(r.path) for r in self.requests if r.method == "GET")
        return [unquote(match["path"]) for match in found if match and match["name"] == name]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that ends closes its connections as it likes; that is no error."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            raise


class _Handler(BaseHTTPRequestHandler):
    server_hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_CONNECT = do_GET

    def _answer(self) -> None:
        hub = self.server_hub
        # A proxy is asked for whole URLs: so come requests to any other host.
        url = urlsplit(self.path)
        hub.requests.append(Request(self.command, url.netloc, url.path))
        if hub.silent:
            hub._closing.wait()
            self.close_connection = True
        elif url.path.endswith(hub.failing):
            self._error(503, "", "Service Unavailable")
        elif "expired" in self.headers.get("Authorization", ""):
            # For whatever is asked: a bad token closes public repositories too.
            self._error(401, "", "Invalid credentials in Authorization header")
        elif url.netloc or self.command == "CONNECT":
            self._error(404, "", "Not the Hub")
        elif match := _API.fullmatch(url.path):
            if repository := self._repository(match["kind"], match):
                self._api(repository, match)
        elif match := _FILE.fullmatch(url.path):
            if repository := self._repository("datasets" if match["dataset"] else "models", match):
                self._file(repository, match)
        else:
            self._error(404, "", "Not found")

    def _repository(self, kind: str, match: re.Match[str]) -> Repository | None:
        hub, name = self.server_hub, unquote(match["name"])
        if new := hub._renamed.get((kind, name)):
            start, end = match.span("name")
            query = self.path[len(match.string) :]
            location = match.string[:start] + new + match.string[end:] + query
            self._send(307, b"", {"Location": location})
            return None
        repository = hub._repositories.get((kind, name))
        if repository is None:
            # Not 404: who may not see a private repository must not learn that it exists.
            self._error(401, "RepoNotFound", "Invalid username or password.")
        return repository

    def _snapshot(self, repository: Repository, match: re.Match[str]) -> Snapshot | None:
        revision = unquote(match["revision"] or "main")
        snapshot = repository.at(revision)
        if snapshot is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return snapshot

    def _api(self, repository: Repository, match: re.Match[str]) -> None:
        snapshot = self._snapshot(repository, match)
        if snapshot is None:
            return
        if match["action"] == "tree":
            inside = unquote(match["path"] or "")
            entries = _listing(snapshot, inside, recursive="recursive=true" in self.path)
            if inside and not entries:
                self._error(404, "EntryNotFound", f"{inside} does not exist")
            else:
                self._json(entries)
        else:
            self._json(
                {
                    "id": unquote(match["name"]),
                    "sha": snapshot.commit,
                    "private": False,
                    "gated": "manual" if repository.gated else False,
                    "siblings": [{"rfilename": name} for name in snapshot.files],
                    "tags": [],
                }
            )

    def _file(self, repository: Repository, match: re.Match[str]) -> None:
        name = unquote(match["name"])
        if repository.gated:
            self._error(401, "GatedRepo", f"Access to {name} is restricted. Please log in.")
            return
        snapshot = self._snapshot(repository, match)
        if snapshot is None:
            return
        path = unquote(match["path"])
        commit = {"X-Repo-Commit": snapshot.commit}
        if path not in snapshot.files:
            self._error(404, "EntryNotFound", "Entry not found", commit)
            return
        content = snapshot.files[path].read_bytes()
        self._send(200, content, {**commit, "ETag": f'"{snapshot.hashes[path]}"'})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(
        self, status: int, code: str, message: str, headers: dict[str, str] | None = None
    ) -> None:
        codes = {"X-Error-Code": code} if code else {}
        headers = {"X-Error-Message": message, **codes, **(headers or {})}
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.path.endswith(self.server_hub.cut):
            content = content[: len(content) // 2]
            self.close_connection = True
        self.wfile.write(content)


def _listing(snapshot: Snapshot, inside: str, recursive: bool) -> list[dict[str, Any]]:
    """Files and folders below `inside`, as the Hub lists them."""
    entries: dict[str, dict[str, Any]] = {}
    prefix = f"{inside}/" if inside else ""
    for name, path in snapshot.files.items():
        if not name.startswith(prefix):
            continue
        parts = name[len(prefix) :].split("/")
        for depth in range(1, len(parts)):
            folder = prefix + "/".join(parts[:depth])
            oid = hashlib.sha1(folder.encode()).hexdigest()
            entries[folder] = {"type": "directory", "oid": oid, "size": 0, "path": folder}
        size = path.stat().st_size
        entries[name] = {"type": "file", "oid": snapshot.hashes[name], "size": size, "path": name}
    depth_of = prefix.count("/")
    return [e for e in entries.values() if recursive or e["path"].count("/") == depth_of]

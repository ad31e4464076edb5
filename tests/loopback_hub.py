"""A Hugging Face Hub on the loopback address, for the real `huggingface_hub` client: revisions, downloads, uploads."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


Files = Mapping[str, bytes]  # by their paths in the repository

REPOSITORY = r"(?P<kind>models|datasets|spaces)/(?P<repo_id>[^/]+/[^/]+)"
ROUTES = {
    rf"GET /api/{REPOSITORY}(/revision/(?P<revision>[^/]+))?": "info",
    rf"GET /api/{REPOSITORY}/tree/(?P<revision>[^/]+)": "tree",
    r"GET /((?P<kind>datasets|spaces)/)?(?P<repo_id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)": "file",
    r"GET /pypi/diffusers/json": "releases",
    r"POST /api/repos/create": "create",
    r"POST /api/validate-yaml": "validate",
    rf"POST /api/{REPOSITORY}/preupload/(?P<revision>[^/]+)": "preupload",
    rf"POST /api/{REPOSITORY}/commit/(?P<revision>[^/]+)": "commit",
    rf"POST /api/{REPOSITORY}/tag/(?P<revision>[^/]+)": "tag",
    r"POST /(spaces/)?[^/]+/[^/]+\.git/info/lfs/objects/batch": "batch",
    r"PUT /large/(?P<oid>\w+)": "large",
}


class NotFoundError(LookupError):
    """What the Hub does not have; the message is the `X-Error-Code` that tells the client what it is."""


def folder_files(folder: Path) -> dict[str, bytes]:
    """The files of a folder, by their paths in it."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def is_large(path: str, files: Files) -> bool:
    """Whether the `.gitattributes` of a repository keep a file in large file storage."""
    lines = files.get(".gitattributes", b"").decode().splitlines()
    patterns = [line.split()[0] for line in lines if "filter=lfs" in line]
    return any(fnmatch(path.rsplit("/", 1)[-1], pattern) for pattern in patterns)


class LoopbackHub:
    """
    A Hub that holds its repositories in memory, and serves them while it is entered as a context. Files that come by
    large file storage are told apart, as a clone gets them whole only where `.gitattributes` says so.

    Args:
        *releases (`str`): The versions of diffusers that the package index names; diffusers asks it for them before
            it fetches a community pipeline.
    """

    def __init__(self, *releases: str):
        self._releases = releases
        self._repositories: dict[str, dict[str, Files]] = {}  # commits in their order, so the last is main
        self._tags: dict[tuple[str, str], str] = {}
        self._large: dict[str, bytes] = {}  # by the SHA-256 of what they hold
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (RequestHandler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def clear(self) -> None:
        """Forgets all repositories and tags."""
        self._repositories.clear()
        self._tags.clear()

    def push(self, repo_id: str, files: Files, kind: str = "models") -> str:
        """Makes `files` all that a repository has on `main`, and returns the commit."""
        listing = [(path, hashlib.sha1(content).hexdigest()) for path, content in sorted(files.items())]
        commit = hashlib.sha1(repr((repo_id, listing)).encode()).hexdigest()
        self._repositories.setdefault(f"{kind}/{repo_id}", {})[commit] = dict(files)
        return commit

    def files(self, repo_id: str, revision: str | None = None, kind: str | None = None) -> tuple[str, Files]:
        """The commit that a revision names, `main` by default, and its files."""
        commits = self._repositories.get(f"{kind or 'models'}/{repo_id}")
        if commits is None:
            raise NotFoundError("RepoNotFound")
        revision = self._tags.get((f"{kind or 'models'}/{repo_id}", revision or ""), revision)
        commit = list(commits)[-1] if revision in (None, "main") else revision
        if commit not in commits:
            raise NotFoundError("RevisionNotFound")
        return commit, commits[commit]

    def large_files(self, files: Files) -> set[str]:
        """Those of `files` that came by large file storage."""
        return {path for path, content in files.items() if hashlib.sha256(content).hexdigest() in self._large}

    def clone(self, repo_id: str, folder: Path, kind: str = "models") -> Path:
        """What `git clone` makes of a repository's `main` where Git LFS is installed."""
        files = self.files(repo_id, kind=kind)[1]
        pointers = {path for path in self.large_files(files) if not is_large(path, files)}
        for path, content in files.items():
            if path in pointers:
                content = f"oid sha256:{hashlib.sha256(content).hexdigest()}\n".encode()
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        return folder

    # ---- one method per route: what it says in the address comes by name, and `body` is what was sent -------------

    def file(self, body: bytes, path: str, **address: Any) -> tuple[bytes, dict[str, str]]:
        commit, files = self.files(**address)
        if path not in files:
            raise NotFoundError("EntryNotFound")
        return files[path], {"ETag": f'"{hashlib.sha1(files[path]).hexdigest()}"', "X-Repo-Commit": commit}

    def info(self, body: bytes, repo_id: str, **address: Any) -> Any:
        commit, files = self.files(repo_id, **address)
        return {"id": repo_id, "sha": commit, "siblings": [{"rfilename": path} for path in files]}

    def tree(self, body: bytes, **address: Any) -> Any:
        return [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in self.files(**address)[1].items()
        ]

    def releases(self, body: bytes) -> Any:
        return {"releases": {version: [] for version in self._releases}}

    def create(self, body: bytes) -> Any:
        request = json.loads(body)
        repo_id, kind = f"{request['organization']}/{request['name']}", f"{request.get('type', 'model')}s"
        self.push(repo_id, {".gitattributes": b""}, kind)
        return {"url": f"{self.endpoint}/{'' if kind == 'models' else kind + '/'}{repo_id}"}

    def validate(self, body: bytes) -> Any:
        return {"errors": [], "warnings": []}

    def preupload(self, body: bytes, **address: Any) -> Any:
        stored = self.files(**address)[1]
        modes = {
            file["path"]: "lfs" if is_large(file["path"], stored) else "regular" for file in json.loads(body)["files"]
        }
        return {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]}

    def batch(self, body: bytes) -> Any:
        missing = [one for one in json.loads(body)["objects"] if one["oid"] not in self._large]
        uploads = [{"upload": {"href": f"{self.endpoint}/large/{one['oid']}"}} for one in missing]
        return {"transfer": "basic", "objects": [{**one, "actions": two} for one, two in zip(missing, uploads)]}

    def large(self, body: bytes, oid: str) -> Any:
        assert hashlib.sha256(body).hexdigest() == oid
        self._large[oid] = body
        return {}

    def commit(self, body: bytes, repo_id: str, kind: str, **address: Any) -> Any:
        files = dict(self.files(repo_id, kind=kind, **address)[1])
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self._large[value["oid"]]
        commit = self.push(repo_id, files, kind)
        return {"commitOid": commit, "commitUrl": f"{self.endpoint}/{repo_id}/commit/{commit}"}

    def tag(self, body: bytes, repo_id: str, kind: str, **address: Any) -> Any:
        commit = self.files(repo_id, kind=kind, **address)[0]
        self._tags.setdefault((f"{kind}/{repo_id}", json.loads(body)["tag"]), commit)
        return {}


class RequestHandler(BaseHTTPRequestHandler):
    """Finds the method of `hub` that answers a request."""

    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def answer(self) -> None:
        method = self.command.replace("HEAD", "GET")
        request = f"{method} {unquote(urlsplit(self.path).path)}"
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, content, headers = 404, b"", {"X-Error-Code": "EntryNotFound"}
        for route, name in ROUTES.items():
            if match := re.fullmatch(route, request):
                try:
                    status, answer = 200, getattr(self.hub, name)(body, **match.groupdict())
                except NotFoundError as error:
                    headers = {"X-Error-Code": str(error)}
                else:
                    content, headers = answer if isinstance(answer, tuple) else (json.dumps(answer).encode(), {})
                break
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def log_message(self, *message: object) -> None:
        """Says nothing: a test that fails shows what the client said."""

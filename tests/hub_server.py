"""A small server on 127.0.0.1 that speaks the Hugging Face hub's API, as far as `huggingface_hub` needs it for models
and data sets: information, file lists, downloads, creating a repository, and commits with large files beside them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

TOKEN = "hf_a_token_of_this_server"
LARGE = 1 << 10
"""Size in bytes from which a file is stored apart from the commit, as the hub does with weights."""

Files = dict[str, bytes]


@dataclass
class Commit:
    """One version of all files."""

    sha: str
    message: str
    files: Files


@dataclass
class Repo:
    """A repository: private ones are hidden without the token, gated ones list their files but give none."""

    commits: list[Commit] = field(default_factory=list)
    private: bool = False
    gated: bool = False

    def find(self, revision: str) -> Commit | None:
        """The commit of a revision: `main`, a commit's hash, or `vN` for the N-th."""
        names = {"main": self.commits[-1], **{commit.sha: commit for commit in self.commits}}
        names |= {f"v{number}": commit for number, commit in enumerate(self.commits, 1)}
        return names.get(revision)

    def commit(self, files: Mapping[str, bytes], message: str = "initial commit") -> str:
        """Add or replace files; return the new commit's hash."""
        after = {**(self.commits[-1].files if self.commits else {}), **files}
        digests = [[path, hashlib.sha1(content).hexdigest()] for path, content in sorted(after.items())]
        sha = hashlib.sha1(json.dumps([len(self.commits), digests]).encode()).hexdigest()
        self.commits.append(Commit(sha, message, after))
        return sha


class Hub:
    """All repositories of the server, by (type, id), and a log of its requests."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        """Large files by SHA-256."""
        self.requests: list[str] = []
        """Method and path of each request."""
        self.cards: list[str] = []
        """The cards whose metadata the hub was asked to check."""
        self.status = 200
        """An error of the server that all requests get instead of an answer, such as 503."""
        self.url = ""

    @property
    def objects_url(self) -> str:
        """Where large files are, on a host of another name, as on the hub."""
        return self.url.replace("127.0.0.1", "localhost") + "/objects"

    def add(self, repo_id: str, files: Mapping[str, bytes], *, kind: str = "model", **state: bool) -> str:
        """Make a repository with files; return its commit."""
        repo = self.repos[(kind, repo_id)] = Repo(**state)
        sha = repo.commit(files)
        self.objects |= {hashlib.sha256(content).hexdigest(): content for content in files.values()}
        return sha

    def fetched(self) -> list[str]:
        """The names of the files that were downloaded."""
        contents = (commit.files.items() for repo in self.repos.values() for commit in repo.commits)
        names = {sha256(content): name for files in contents for name, content in files}
        gets = [line.rsplit("/", 1)[1] for line in self.requests if re.match("GET .*/(resolve|objects)/", line)]
        return [names.get(name, name) for name in gets]


class Refusal(Exception):
    """An answer that is an error: status, and the hub's code for it."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(status, code, message)
        self.status, self.code, self.message = status, code, message


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: object) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        """Find the route of the request, and send its answer or its refusal."""
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {path}")
        try:
            if self.hub.status != 200:
                raise Refusal(self.hub.status)
            for method, pattern, route in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method:
                    return route(self, body, **match.groupdict())
            raise Refusal(404)
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            self.send(b"", refusal.status, {name: value for name, value in headers.items() if value})

    def send(self, content: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """Send an answer; one to HEAD has no content."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, value: object, status: int = 200) -> None:
        self.send(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    @property
    def logged_in(self) -> bool:
        """True if the request carries the token. Raises Refusal for a wrong one."""
        header = self.headers.get("Authorization")
        if header not in (None, f"Bearer {TOKEN}"):
            raise Refusal(401, message="Invalid credentials in Authorization header")
        return header is not None

    def repo(self, kind: str, repo_id: str) -> Repo:
        """A repository that the request may see."""
        repo = self.hub.repos.get((kind, repo_id))
        if repo is None or (repo.private and not self.logged_in):
            raise Refusal(404 if self.logged_in else 401, "RepoNotFound", "Repository not found")
        return repo

    def commit(self, kind: str, repo_id: str, revision: str) -> Commit:
        found = self.repo(kind, repo_id).find(revision)
        if found is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def info(self, body: bytes, kind: str, id: str, revision: str = "main") -> None:
        """Send information about a repository."""
        repo, commit = self.repo(kind, id), self.commit(kind, id, revision)
        names = [{"rfilename": path} for path in commit.files]
        about = {"id": id, "sha": commit.sha, "private": repo.private, "gated": "auto" if repo.gated else False}
        self.send_json({**about, "siblings": names, "tags": [], "downloads": 0, "likes": 0})

    def tree(self, body: bytes, kind: str, id: str, revision: str) -> None:
        """Send the list of a revision's files."""
        files = self.commit(kind, id, revision).files
        rows = []
        for path, content in files.items():
            row = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
            if len(content) >= LARGE:
                row["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
            rows.append(row)
        self.send_json(rows)

    def resolve(self, body: bytes, id: str, revision: str, file: str, kind: str = "model") -> None:
        """Send one file: a small one itself, a large one by a redirection."""
        commit = self.commit("dataset" if kind == "datasets/" else "model", id, revision)
        if self.repo("dataset" if kind == "datasets/" else "model", id).gated and not self.logged_in:
            raise Refusal(401, "GatedRepo", "Access to this repository is restricted")
        if file not in commit.files:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        content = commit.files[file]
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{git_hash(content)}"'}
        if len(content) < LARGE:
            return self.send(content, headers=headers)
        headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{sha256(content)}"'}
        return self.send(b"", 302, {**headers, "Location": f"{self.hub.objects_url}/{sha256(content)}"})

    def download_object(self, body: bytes, oid: str) -> None:
        """Send a large file, or the rest of it."""
        content = self.hub.objects[oid]
        first = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(first[1]) if first else 0
        headers = {"ETag": f'"{oid}"'}
        if first:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send(content[start:], 206 if first else 200, headers)

    def create(self, body: bytes) -> None:
        """Make a repository."""
        if not self.logged_in:
            raise Refusal(401, message="Invalid username or password.")
        given = json.loads(body)
        if given.get("organization") == "forbidden":
            raise Refusal(403, message="You don't have the rights to create a model under this namespace")
        repo_id, kind = f"{given['organization']}/{given['name']}", given.get("type") or "model"
        if (kind, repo_id) in self.hub.repos:
            return self.send_json({"error": "exists", "url": f"{self.hub.url}/{repo_id}"}, 409)
        private = given.get("visibility") == "private" or bool(given.get("private"))
        repo = self.hub.repos[(kind, repo_id)] = Repo(private=private)
        repo.commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        return self.send_json({"url": f"{self.hub.url}/{repo_id}", "name": repo_id})

    def validate(self, body: bytes) -> None:
        """Check a card's metadata, as far as the hub's rules are known here."""
        content = json.loads(body)["content"]
        self.hub.cards.append(content)
        match = re.match(r"---\n(.*?)---\n", content, re.DOTALL)
        if match is None:
            return self.send_json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]})
        try:
            values = YAML(typ="safe").load(match[1])
        except YAMLError:
            return self.send_json({"errors": [{"message": f"{match[1].partition(':')[0]}: not YAML"}]}, 400)
        wrong = [name for name in ("base_model", "datasets") for id in _listed(values.get(name)) if id.count("/") != 1]
        errors = [{"message": f"{name}: not the id of a repository"} for name in wrong]
        return self.send_json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, body: bytes, kind: str, id: str, revision: str) -> None:
        """Tell, for each file of a commit to come, how to upload it: within the commit, or large ones apart."""
        if not self.logged_in:
            raise Refusal(401, "RepoNotFound")
        before = self.commit(kind, id, revision).files
        rows = []
        for file in json.loads(body)["files"]:
            mode = "lfs" if file["size"] >= LARGE else "regular"
            row = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            if file["path"] in before:
                held = before[file["path"]]
                row["oid"] = sha256(held) if len(held) >= LARGE else git_hash(held)
            rows.append(row)
        self.send_json({"files": rows})

    def batch(self, body: bytes, id: str) -> None:
        """Tell where to upload large files that are not here yet."""
        objects = []
        for given in json.loads(body)["objects"]:
            upload = {"href": f"{self.hub.objects_url}/{given['oid']}"}
            actions = {} if given["oid"] in self.hub.objects else {"actions": {"upload": upload}}
            objects.append({**given, **actions})
        self.send_json({"transfer": "basic", "objects": objects})

    def upload_object(self, body: bytes, oid: str) -> None:
        """Take a large file."""
        assert sha256(body) == oid
        self.hub.objects[oid] = body
        self.send(b"")

    def new_commit(self, body: bytes, kind: str, id: str, revision: str) -> None:
        """Take a commit: a line each for its message and its files."""
        files, message = Files(), ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        sha = self.repo(kind, id).commit(files, message)
        self.send_json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{id}/commit/{sha}"})


_ID = r"(?P<id>[^/]+/[^/]+)"
_API = rf"/api/(?P<kind>model|dataset)s/{_ID}"
ROUTES = [
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/objects/(?P<oid>\w+)", Handler.upload_object),
    ("GET HEAD", r"/objects/(?P<oid>\w+)", Handler.download_object),
    ("POST", rf"{_API}/preupload/(?P<revision>.+)", Handler.preupload),
    ("POST", rf"{_API}/commit/(?P<revision>.+)", Handler.new_commit),
    ("GET", rf"{_API}/tree/(?P<revision>[^/]+)", Handler.tree),
    ("GET", rf"{_API}/revision/(?P<revision>.+)", Handler.info),
    ("GET", _API, Handler.info),
    ("GET HEAD", rf"/(?P<kind>datasets/)?{_ID}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", Handler.resolve),
]
"""Method, path and answer of what the server knows."""


def _listed(value: object) -> list[str]:
    return value if isinstance(value, list) else [str(value)] if value else []


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Run a hub without repositories."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use_hub(url: str, home: str, monkeypatch: pytest.MonkeyPatch, *, token: str | None = None) -> None:
    """Point `huggingface_hub` at a server, here, where it is imported already, and in processes that start later."""
    from huggingface_hub import constants

    for name, value in {"HF_ENDPOINT": url, "HF_HOME": home, "HF_HUB_DISABLE_XET": "1"}.items():
        monkeypatch.setenv(name, value)
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", f"{home}/hub")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", f"{home}/token")
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", f"{home}/stored_tokens")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

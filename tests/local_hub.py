"""
A small Hub: what huggingface_hub, transformers and datasets ask of the real one for models and data sets, over HTTP.

It keeps repositories, branches, commits and large files in memory, knows two owners, refuses what the real one
refuses, and can break down: `hub.break_down(...)`. It serves requests in threads of this process.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

USERS = {"hf_WriterSecret": ("writer", "write"), "hf_ReaderSecret": ("reader", "read")}
LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "other"}
LARGE = (".safetensors", ".parquet", ".bin")


@dataclass
class Commit:
    """A commit: its title and, of all files, the content and whether it is stored as a large file."""

    oid: str
    title: str
    files: dict[str, tuple[bytes, bool]]


@dataclass
class Repository:
    """A repository with its branches, the last commit of each last."""

    private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": [Commit("0" * 40, "created", {})]})

    def commit(self, revision: str) -> Commit | None:
        """The last commit of a branch, or the one with this id."""
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for branch in self.branches.values() for c in branch if c.oid == revision), None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {path: content for path, (content, _) in self.commit(revision).files.items()}

    def titles(self, revision: str = "main") -> list[str]:
        return [commit.title for commit in self.branches[revision]]

    def edit(self, path: str, content: bytes, revision: str = "main") -> None:
        """What a person does on the web page."""
        commit = self.commit(revision)
        files = commit.files | {path: (content, False)}
        oid = hashlib.sha1(commit.oid.encode() + content).hexdigest()
        self.branches[revision].append(Commit(oid, f"Update {path}", files))


class LocalHub:
    """
    The server. A context manager, in which `url` is its address.

    Attributes:
        repositories (`dict[tuple[str, str], Repository]`): By type ("models" or "datasets") and id.
        requests (`list[str]`): Method and path of all requests so far.
        uploaded (`list[str]`): Ids of the large files that were sent, in this order.
    """

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.large_files: dict[tuple[str, str], bytes] = {}  # by repository and hash
        self.requests: list[str] = []
        self.uploaded: list[str] = []
        self._broken: tuple[str, int] | None = None
        self._meanwhile: tuple[str, Callable] | None = None

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def break_down(self, pattern: str, number: int = 1) -> None:
        """Drops the connection of the `number`-th request like `pattern` half-way, and refuses all later ones."""
        self._broken = (pattern, number)

    def mend(self) -> None:
        self._broken = None

    def meanwhile(self, pattern: str, function: Callable) -> None:
        """Calls a function once, before the next request like `pattern` is answered."""
        self._meanwhile = (pattern, function)

    def is_down(self, request: str) -> str | None:
        """ "dropped", "refused", or `None` if the request is to be answered."""
        if self._broken is None:
            return None
        pattern, number = self._broken
        if number == 0:
            return "refused"
        if re.search(pattern, request):
            self._broken = (pattern, number - 1)
            return "dropped" if number == 1 else None
        return None


class Refused(Exception):
    """A status, and the error code and words that go with it."""

    def __init__(self, status: int, words: str, code: str | None = None):
        super().__init__(words)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status: int, content=None, headers: dict | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (
            {"Content-Type": "application/json", "Content-Length": len(body)} | (headers or {})
        ).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub._meanwhile and re.search(self.hub._meanwhile[0], self.hub.requests[-1]):
            function, self.hub._meanwhile = self.hub._meanwhile[1], None
            function()
        if down := self.hub.is_down(self.hub.requests[-1]):
            if down == "dropped":
                self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            else:
                with contextlib.suppress(OSError):
                    self.answer(410, {"error": "gone"})
            self.close_connection = True
            return
        self.body, self.query = self.read_body(), parse_qs(url.query)
        try:
            for pattern, method in _ROUTES:
                if found := re.fullmatch(pattern, f"{self.command} {path}"):
                    return getattr(self, method)(*found.groups())
            raise Refused(404, f"no route {self.command} {path}", "EntryNotFound")
        except Refused as refusal:
            headers = {"X-Error-Message": str(refusal)} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            self.answer(refusal.status, {"error": str(refusal)}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    # ---- who, and what ----

    def user(self) -> tuple[str, str]:
        """Name and role, without a token ("", "")."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in USERS:
            raise Refused(401, "Invalid credentials in Authorization header")
        return USERS.get(token, ("", ""))

    def repository(self, kind: str | None, name: str, write: bool = False) -> Repository:
        user, role = self.user()
        found = self.hub.repositories.get((kind or "models", name))
        if found is None or (found.private and user != name.split("/")[0]):
            # Those who are not logged in learn nothing, not even that there is none.
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and (user != name.split("/")[0] or role != "write"):
            raise Refused(403 if user else 401, f"You do not have write access to {name}")
        return found

    def commit_of(self, repository: Repository, revision: str) -> Commit:
        if (commit := repository.commit(revision)) is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # ---- routes ----

    def whoami(self) -> None:
        user, role = self.user()
        if not user:
            raise Refused(401, "Invalid username or password.")
        self.answer(200, {"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": role}}})

    def validate(self) -> None:
        content = json.loads(self.body)["content"]
        if errors := _metadata_errors(content):
            return self.answer(400, {"errors": [{"message": error} for error in errors], "warnings": []})
        self.answer(200, {"errors": [], "warnings": []})

    def create(self) -> None:
        asked = json.loads(self.body)
        user, role = self.user()
        if not user:
            raise Refused(401, "Invalid username or password.")
        owner = asked.get("organization") or user
        if owner != user or role != "write":
            raise Refused(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        kind, name = f"{asked.get('type') or 'model'}s", f"{owner}/{asked['name']}"
        url = f"{self.hub.url}/{'' if kind == 'models' else 'datasets/'}{name}"
        if (kind, name) in self.hub.repositories:
            return self.answer(409, {"error": "You already created this repo", "url": url})
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.repositories[kind, name] = Repository(private=bool(private))
        self.answer(200, {"url": url, "name": name, "id": name})

    def auth_check(self, kind: str, name: str, write: str | None) -> None:
        self.repository(kind, name, write=bool(write))
        self.answer(200, {})

    def branch(self, kind: str, name: str, branch: str) -> None:
        branches = self.repository(kind, name, write=True).branches
        if branch in branches:
            raise Refused(409, "Reference already exists")
        branches[branch] = list(branches["main"])
        self.answer(200, {})

    def preupload(self, kind: str, name: str, revision: str) -> None:
        files = self.commit_of(self.repository(kind, name, write=True), revision).files
        answers = []
        for asked in json.loads(self.body)["files"]:
            known = files.get(asked["path"])
            mode = "lfs" if asked["path"].endswith(LARGE) else "regular"
            answers.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False})
            if known:
                entry = _entry(asked["path"], *known)
                answers[-1]["oid"] = entry.get("lfs", entry)["oid"]
        self.answer(200, {"files": answers})

    def lfs_batch(self, kind: str | None, name: str) -> None:
        self.repository(kind and kind.strip("/"), name, write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if (name, wanted["oid"]) not in self.hub.large_files:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{name}/{wanted['oid']}"}}
            objects.append(entry)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, name: str, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "the content is another one")
        self.hub.large_files[name, oid] = self.body
        self.hub.uploaded.append(oid)
        self.answer(200, {})

    def commit(self, kind: str, name: str, revision: str) -> None:
        repository = self.repository(kind, name, write=True)
        last = self.commit_of(repository, revision)
        files, title = dict(last.files), ""
        for line in filter(None, self.body.split(b"\n")):
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, last.oid):
                    raise Refused(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = (base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                files[value["path"]] = (self.hub.large_files[name, value["oid"]], True)
            elif key == "deletedFile":
                del files[value["path"]]
        if errors := _metadata_errors(files.get("README.md", (b"", False))[0].decode()):
            raise Refused(400, f"Invalid metadata in README.md. {errors[0]}")
        oid = hashlib.sha1(last.oid.encode() + self.body).hexdigest()
        repository.branches[revision].append(Commit(oid, title, files))
        url = f"{self.hub.url}/{name}/commit/{oid}"
        self.answer(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def info(self, kind: str, name: str, revision: str | None = None) -> None:
        repository = self.repository(kind, name)
        commit = self.commit_of(repository, revision or "main")
        self.answer(
            200,
            {
                "_id": "0", "id": name, "author": name.split("/")[0], "sha": commit.oid, "private": repository.private,
                "disabled": False, "gated": False, "downloads": 0, "likes": 0, "tags": [],
                "lastModified": "2026-01-01T00:00:00.000Z", "createdAt": "2026-01-01T00:00:00.000Z",
                "siblings": [{"rfilename": path} for path in commit.files],
            },
        )  # fmt: skip

    def refs(self, kind: str, name: str) -> None:
        branches = self.repository(kind, name).branches
        listed = [
            {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": commits[-1].oid}
            for branch, commits in branches.items()
        ]
        self.answer(200, {"branches": listed, "converts": [], "tags": []})

    def tree(self, kind: str, name: str, revision: str, folder: str | None) -> None:
        files = self.commit_of(self.repository(kind, name), revision).files
        folder = f"{folder.strip('/')}/" if folder else ""
        found, folders = [], set()
        for path, stored in files.items():
            rest = path.removeprefix(folder)
            if not path.startswith(folder):
                continue
            if "/" in rest:
                folders |= {folder + "/".join(rest.split("/")[: n + 1]) for n in range(rest.count("/"))}
            if "/" not in rest or "true" in self.query.get("recursive", [""])[0].lower():
                found.append(_entry(path, *stored))
        if folder and not found and not folders:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound")
        found += [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)]
        self.answer(200, found)

    def paths_info(self, kind: str, name: str, revision: str) -> None:
        files = self.commit_of(self.repository(kind, name), revision).files
        fields = parse_qs(self.body.decode()) if self.body[:1] != b"{" else json.loads(self.body)
        asked = [path.strip("/") for path in fields.get("paths", [])]
        found = [_entry(path, *files[path]) for path in asked if path in files]
        for path in asked:
            if any(other.startswith(f"{path}/") for other in files):
                found.append({"type": "directory", "path": path, "size": 0, "oid": "0" * 40})
        self.answer(200, found)

    def resolve(self, kind: str | None, name: str, revision: str, path: str) -> None:
        commit = self.commit_of(self.repository(kind and kind.strip("/"), name), revision)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if path not in commit.files:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self.answer(404, {"error": "Entry not found"}, headers)
        content, is_large = commit.files[path]
        entry = _entry(path, content, is_large)
        headers["ETag"] = f'"{entry["oid"]}"'
        if is_large:
            headers |= {"X-Linked-Etag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": len(content)}
        status, asked = 200, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and self.command == "GET":
            start, stop = int(asked[1]), min(int(asked[2] or len(content)) + 1, len(content))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            status, content = 206, content[start:stop]
        self.answer(status, content, headers | {"Content-Type": "application/octet-stream"})


def _entry(path: str, content: bytes, is_large: bool) -> dict:
    """A file as the Hub lists it: git's id and, of a large file, its hash."""
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry = {"type": "file", "path": path, "size": len(content), "oid": oid}
    if is_large:
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


def _metadata_errors(card: str) -> list[str]:
    """A few of the Hub's rules for the metadata of a card."""
    head = re.match(r"\s*---\n(.*?)\n---", card, re.DOTALL)
    metadata = yaml.safe_load(head[1]) if head else {}
    errors = []
    if (license_ := metadata.get("license")) and license_ not in LICENSES:
        errors.append('"license" must be one of [apache-2.0, mit, ...]')
    for name in ("tags", "datasets"):
        if not isinstance(metadata.get(name, []), list):
            errors.append(f'"{name}" must be an array')
    for model in metadata.get("model-index", []):
        if not model.get("name") or not all(
            result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"] and result["metrics"]
            for result in model["results"]
        ):
            errors.append('"model-index" is not valid')
    return errors


_REPO = r"(models|datasets)/([^/]+/[^/]+)"
_ROUTES = [
    (r"GET /api/whoami-v2", "whoami"),
    (r"POST /api/validate-yaml", "validate"),
    (r"POST /api/repos/create", "create"),
    (rf"GET /api/{_REPO}/auth-check(/write)?", "auth_check"),
    (rf"POST /api/{_REPO}/branch/(.+)", "branch"),
    (rf"POST /api/{_REPO}/preupload/(.+)", "preupload"),
    (rf"POST /api/{_REPO}/commit/(.+)", "commit"),
    (rf"GET /api/{_REPO}(?:/revision/(.+))?", "info"),
    (rf"GET /api/{_REPO}/refs", "refs"),
    (rf"GET /api/{_REPO}/tree/([^/]+)(?:/(.+))?", "tree"),
    (rf"POST /api/{_REPO}/paths-info/(.+)", "paths_info"),
    (r"POST /(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
    (r"PUT /lfs/([^/]+/[^/]+)/([0-9a-f]{64})", "lfs_put"),
    (r"(?:GET|HEAD) /(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
]

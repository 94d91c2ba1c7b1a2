"""A stand-in for the Hugging Face Hub on this machine, for the unmodified clients.

It keeps repositories in memory, and speaks what huggingface_hub, datasets and diffusers ask for:
create, pre-upload, LFS batch and upload, commit, information, tree, paths, resolve, validate-yaml;
and collections.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.hub_parts import LFS_SUFFIXES, Collections, list_file, list_folder

TOKEN = "hf_tokenOfTheTests"


@dataclass
class Repository:
    """Its commits, oldest first: (message, {path: content} of everything there is)."""

    private: bool
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=lambda: [("start", {})])

    def sha(self, index: int = -1) -> str:
        number = index % len(self.commits)
        return hashlib.sha1(f"{id(self)} {number}".encode()).hexdigest()

    def files(self, revision: str = "main") -> dict[str, bytes] | None:
        shas = [self.sha(i) for i in range(len(self.commits))]
        if revision == "main":
            return self.commits[-1][1]
        return self.commits[shas.index(revision)][1] if revision in shas else None


class HubStandIn:
    """What was asked for (`requests`), what is there (`repositories`, by (type, id)).

    `failures` is how many commits fail, with 503, before one goes through; `upload_failures` the
    same of LFS uploads.
    """

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.collections: dict[str, dict] = {}
        self.requests: list[str] = []
        self.failures = 0
        self.upload_failures = 0
        self.lock = threading.Lock()

    def environment(self, home: Path, token: str | None = TOKEN) -> dict:
        """For a script in a process of its own that uses this Hub."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        environment |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return environment | ({"HF_TOKEN": token} if token else {})

    def put(self, kind: str, name: str, folder: Path) -> None:
        """A repository that was there before: all files of `folder`."""
        paths = [path for path in folder.rglob("*") if path.is_file()]
        files = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
        self.repositories[kind, name] = Repository(False, [("start", {}), ("put", files)])


@contextmanager
def hub_stand_in() -> Iterator[HubStandIn]:
    """A Hub, as long as the block lasts."""
    hub = HubStandIn()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(Collections, BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    ROUTES = [
        ("GET", r"/api/whoami-v2", "who"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/(model|dataset)s/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/(model|dataset)s/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
        ("POST", r"/api/(model|dataset)s/([^/]+/[^/]+)/paths-info/([^/]+)", "paths"),
        ("GET", r"/api/(model|dataset)s/([^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?", "tree"),
        ("GET", r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/revision/([^/]+))?", "information"),
        ("POST", r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/lfs/([0-9a-f]+)", "receive"),
        ("GET", r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
        ("HEAD", r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
        *Collections.ROUTES,
    ]

    def handle_request(self) -> None:
        address = urlsplit(self.path)
        self.query, path = parse_qs(address.query), unquote(address.path)
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else self._chunks()
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
            for command, pattern, work in self.ROUTES:
                match = re.fullmatch(pattern, path)
                if command == self.command and match:
                    return getattr(self, work)(*match.groups())
        self.answer(404, {"error": f"no route {self.command} {path}"})

    do_GET = do_POST = do_PUT = do_HEAD = handle_request

    def _chunks(self) -> bytes:
        body = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return body

    def answer(self, status: int, content: object = None, **headers: str) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(status)
        named = {"Content-Length": str(len(raw)), "Content-Type": "application/json"} | headers
        for name, value in named.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def log_message(self, *arguments) -> None:
        pass

    def repository(self, kind: str, name: str) -> Repository | None:
        found = self.hub.repositories.get((kind, name))
        if found is None or (found.private and not self.allowed()):
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        return found

    def files(self, kind: str, name: str, revision: str) -> dict[str, bytes] | None:
        repository = self.repository(kind, name)
        files = None if repository is None else repository.files(revision)
        if repository is not None and files is None:
            self.answer(404, {"error": "no such revision"}, X_Error_Code="RevisionNotFound")
        return files

    def allowed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def who(self) -> None:
        self.answer(200, {"name": "user", "type": "user"}) if self.allowed() else self.answer(401)

    def validate(self) -> None:
        content = json.loads(self.body)["content"]
        try:
            metadata = yaml.safe_load(content.split("---")[1])
            errors = [] if isinstance(metadata, dict) else [{"message": "no metadata"}]
        except yaml.YAMLError as error:
            errors = [{"message": str(error)}]
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def create(self) -> None:
        if not self.allowed():
            return self.answer(401, {"error": "Invalid username or password."})
        asked = json.loads(self.body)
        kind = asked.get("type") or "model"
        name = f"{asked.get('organization') or 'user'}/{asked['name']}"
        address = f"{self.hub.url}/{'datasets/' if kind == 'dataset' else ''}{name}"
        if (kind, name) in self.hub.repositories:
            return self.answer(409, {"error": "You already created this repo", "url": address})
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repositories[kind, name] = Repository(private)
        self.answer(200, {"url": address, "id": name})

    def preupload(self, kind: str, name: str, revision: str) -> None:
        if self.repository(kind, name) is None:
            return
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.answer(200, {"files": files})

    def batch(self, kind: str | None, name: str) -> None:
        objects = [
            {**o, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}"}}}
            for o in json.loads(self.body)["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def receive(self, oid: str) -> None:
        if self.hub.upload_failures:
            self.hub.upload_failures -= 1
            return self.answer(503, {"error": "try again"})
        right = hashlib.sha256(self.body).hexdigest() == oid
        self.hub.objects[oid] = self.body
        self.answer(200 if right else 400)

    def commit(self, kind: str, name: str, revision: str) -> None:
        repository = self.repository(kind, name)
        if repository is None:
            return
        if self.hub.failures:
            self.hub.failures -= 1
            return self.answer(503, {"error": "try again"})
        lines = [json.loads(line) for line in self.body.splitlines() if line]
        files = dict(repository.commits[-1][1])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        repository.commits.append((lines[0]["value"]["summary"], files))
        sha = repository.sha()
        self.answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha})

    def information(self, kind: str, name: str, revision: str | None) -> None:
        files = self.files(kind, name, revision or "main")
        if files is None:
            return
        repository = self.hub.repositories[kind, name]
        sha = repository.sha() if revision in (None, "main") else revision
        siblings = [{"rfilename": path} for path in files]
        known = {"id": name, "sha": sha, "private": repository.private, "siblings": siblings}
        self.answer(200, known | {"tags": [], "downloads": 0, "likes": 0, "gated": False})

    def tree(self, kind: str, name: str, revision: str, folder: str | None = None) -> None:
        files = self.files(kind, name, revision)
        if files is None:
            return
        inside = f"{folder}/" if folder else ""
        own = {path: raw for path, raw in files.items() if path.startswith(inside)}
        if self.query.get("recursive", ["false"])[0].lower() == "true":
            return self.answer(200, [list_file(path, raw) for path, raw in own.items()])
        deeper = {p.removeprefix(inside).split("/")[0] for p in own if "/" in p[len(inside) :]}
        entries = [list_file(p, raw) for p, raw in own.items() if "/" not in p[len(inside) :]]
        entries += [list_folder(inside + part) for part in sorted(deeper)]
        if not own:
            return self.answer(404, {"error": "no such path"}, X_Error_Code="EntryNotFound")
        self.answer(200, entries)

    def paths(self, kind: str, name: str, revision: str) -> None:
        files = self.files(kind, name, revision)
        if files is None:
            return
        kinds = self.headers.get("Content-Type", "")
        asked = json.loads(self.body) if "json" in kinds else parse_qs(self.body.decode())
        found = [list_file(path, files[path]) for path in asked["paths"] if path in files]
        folders = {str(parent) for path in files for parent in Path(path).parents}
        found += [list_folder(path) for path in asked["paths"] if path in folders and path != "."]
        self.answer(200, found)

    def resolve(self, kind: str | None, name: str, revision: str, path: str) -> None:
        kind = "dataset" if kind else "model"
        files = self.files(kind, name, revision)
        if files is None:
            return
        if path not in files:
            return self.answer(404, {"error": "no such file"}, X_Error_Code="EntryNotFound")
        repository, raw = self.hub.repositories[kind, name], files[path]
        sha = repository.sha() if revision == "main" else revision
        headers = {"ETag": f'"{hashlib.sha256(raw).hexdigest()}"', "X_Repo_Commit": sha}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if span is None:
            return self.answer(200, raw, Content_Type="application/octet-stream", **headers)
        first, last = int(span[1]), min(int(span[2] or len(raw) - 1), len(raw) - 1)
        headers["Content_Range"] = f"bytes {first}-{last}/{len(raw)}"
        self.answer(206, raw[first : last + 1], **headers)

"""A stand-in for the hub: the few endpoints that huggingface_hub creates repositories, commits and downloads with.

Small text is committed inline (base64), .safetensors and .png by LFS (a batch request, then PUT), as the hub asks for.
One login, ``TOKEN``, which may write to the repositories of ``OWNER``; anyone reads what is public.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN, OWNER = "hf_stand_in", "someone"
LFS = (".safetensors", ".png", ".bin")


@dataclass
class Repository:
    """Commits, oldest first: (id, path -> content)."""

    private: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    def commit(self, files: dict[str, bytes]) -> str:
        said = json.dumps([len(self.commits), sorted((k, hashlib.sha1(v).hexdigest()) for k, v in files.items())])
        self.commits.append((hashlib.sha1(said.encode()).hexdigest(), files))
        return self.commits[-1][0]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit of an id, or the last one as main."""
        known = dict(self.commits)
        return self.commits[-1] if revision == "main" else (revision, known[revision]) if revision in known else None


@dataclass
class Hub:
    """Repositories by OWNER/NAME; every request's method and path, in order; ``broken``: paths that answer 500."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    broken: str | None = None

    def files(self, repo: str) -> dict[str, bytes]:
        """The newest files of a repository."""
        return self.repositories[repo].commits[-1][1]


def _blob_id(content: bytes) -> str:
    """The id that git gives the content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _blob_id(content)}
    if path.endswith(LFS):
        oid = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 130}
    return entry


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, body: Any = b"", **headers: str) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            if hub.broken is not None and re.search(hub.broken, path):
                return self.answer(500, {"error": "the stand-in is broken"})
            for method, pattern, answer in (
                ("POST", r"/api/repos/create", self.create),
                ("POST", r"/api/validate-yaml", self.validate),
                ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self.info),
                ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", self.tree),
                ("POST", r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self.preupload),
                ("POST", r"/api/models/([^/]+/[^/]+)/commit/(.+)", self.commit),
                ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.batch),
                ("PUT", r"/lfs/([0-9a-f]{64})", self.put),
                ("GET|HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
            ):
                found = re.fullmatch(pattern, path)
                if found and self.command in method.split("|"):
                    return answer(body, *found.groups())
            self.answer(404, {"error": "not a path of the stand-in"})

        do_GET = do_HEAD = do_POST = do_PUT = serve

        @property
        def logged_in(self) -> bool:
            return self.headers.get("Authorization") == f"Bearer {TOKEN}"

        def refused(self, owner: str) -> bool:
            """Whether the login may not write there, which was answered."""
            if not self.logged_in:
                self.answer(401, {"error": "Invalid username or password."})
            elif owner != OWNER:
                self.answer(403, {"error": f"You don't have the rights to create a model under {owner}"})
            return not self.logged_in or owner != OWNER

        def repository(self, repo: str) -> Repository | None:
            found = hub.repositories.get(repo)
            if found is None or (found.private and not self.logged_in):
                self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
                return None
            return found

        def create(self, body: bytes) -> None:
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            if self.refused(asked["organization"]):
                return
            if repo in hub.repositories:
                return self.answer(409, {"error": "You already created this model repo", "url": f"{hub.url}/{repo}"})
            made = hub.repositories[repo] = Repository(
                asked.get("visibility") == "private" or bool(asked.get("private"))
            )
            made.commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
            self.answer(200, {"url": f"{hub.url}/{repo}"})

        def validate(self, body: bytes) -> None:
            self.answer(200, {"errors": [], "warnings": []})

        def info(self, body: bytes, repo: str, revision: str | None) -> None:
            found = self.repository(repo)
            if found is None:
                return
            at = found.at(revision or "main")
            if at is None:
                return self.answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
            siblings = [{"rfilename": path} for path in at[1]]
            self.answer(
                200, {"id": repo, "modelId": repo, "sha": at[0], "private": found.private, "siblings": siblings}
            )

        def tree(self, body: bytes, repo: str, revision: str) -> None:
            found = self.repository(repo)
            at = found and found.at(revision)
            if at:
                self.answer(200, [_entry(path, content) for path, content in at[1].items()])

        def preupload(self, body: bytes, repo: str, revision: str) -> None:
            found = self.repository(repo)
            if found is None or self.refused(repo.split("/")[0]):
                return
            kept = found.commits[-1][1]
            self.answer(200, {"files": [
                {
                    "path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LFS) else "regular",
                    "shouldIgnore": False, "oid": _blob_id(kept[f["path"]]) if f["path"] in kept else None,
                }
                for f in json.loads(body)["files"]
            ]})  # fmt: skip

        def batch(self, body: bytes, repo: str) -> None:
            if not self.refused(repo.split("/")[0]):
                self.answer(200, {"transfer": "basic", "objects": [
                    o | ({} if o["oid"] in hub.lfs else {"actions": {"upload": {"href": f"{hub.url}/lfs/{o['oid']}"}}})
                    for o in json.loads(body)["objects"]
                ]})  # fmt: skip

        def put(self, body: bytes, oid: str) -> None:
            if hashlib.sha256(body).hexdigest() != oid:
                return self.answer(400, {"error": "the content is not of that SHA-256"})
            hub.lfs[oid] = body
            self.answer(200)

        def commit(self, body: bytes, repo: str, revision: str) -> None:
            found = self.repository(repo)
            if found is None or self.refused(repo.split("/")[0]):
                return
            files = dict(found.commits[-1][1])
            for line in body.splitlines():
                what = json.loads(line)
                value = what["value"]
                if what["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif what["key"] == "lfsFile":
                    files[value["path"]] = hub.lfs[value["oid"]]
                elif what["key"] == "deletedFile":
                    del files[value["path"]]
            sha = found.commit(files)
            self.answer(200, {"commitUrl": f"{hub.url}/{repo}/commit/{sha}", "commitOid": sha})

        def resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
            found = self.repository(repo)
            at = found and found.at(revision)
            if not at:
                return
            if path not in at[1]:
                return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=at[0])
            content = at[1][path]
            entry = _entry(path, content)
            oid = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
            self.answer(200, content, ETag=f'"{oid}"', X_Repo_Commit=at[0])

    return Handler


@contextlib.contextmanager
def stand_in() -> Iterator[Hub]:
    """A stand-in at a port of this machine, until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def environment(hub: Hub, home: Path) -> dict[str, str]:
    """What makes huggingface_hub use the stand-in: its address, a home of its own, the login, plain HTTP."""
    return {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip

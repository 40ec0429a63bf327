"""A Hugging Face hub on 127.0.0.1, as much of it as huggingface_hub and datasets ask of the real one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

REFUSALS = {"RepoNotFound": 401, "RevisionNotFound": 404, "EntryNotFound": 404, "GatedRepo": 403}


class Hub:
    """Repositories in a folder. `asked`: the requests that it has answered, as "METHOD path"."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, list[str]()
        self.refs: dict[str, dict[str, str]] = {}
        self.gated: set[str] = set()
        self.silent = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_POST = do_GET

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.stopping = threading.Event()
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """Variables under which a process asks this hub, its cache being in `home`."""
        endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        given = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        hub = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        return given | hub | more

    def commit(self, repo: str, source: Path | Mapping[str, str], branch: str = "main") -> str:
        """Put files under a new commit of a repository, models/OWNER/NAME or datasets/OWNER/NAME, and move the branch
        there -> its hash."""
        refs = self.refs.setdefault(repo, {})
        commit = hashlib.sha1(f"{repo} {len(list(self.folder.glob(f'{repo}/*')))}".encode()).hexdigest()
        place = self.folder / repo / commit
        if isinstance(source, Path):
            shutil.copytree(source, place)
        else:
            for name, text in source.items():
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                (place / name).write_text(text)
        refs[branch] = refs[commit] = commit
        return commit

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        self.asked.append(f"{request.command} {path}")
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if self.silent:
            self.stopping.wait()
            return
        api = path.startswith("/api/")
        parts = path.removeprefix("/api").strip("/").split("/")
        kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
        repo, rest = f"{kind}/{'/'.join(parts[:2])}", parts[2:]
        if repo not in self.refs:
            return self._refuse(request, "RepoNotFound")
        # /api/models/OWNER/NAME/{revision,tree,paths-info}/REVISION, /OWNER/NAME/resolve/REVISION/FILE
        verb, wanted = (rest[0], rest[1:]) if rest else ("revision", ["main"])
        revision = "/".join(wanted) if verb == "revision" else wanted[0]
        commit = self.refs[repo].get(revision)
        if commit is None:
            return self._refuse(request, "RevisionNotFound")
        root = self.folder / repo / commit
        files = {str(file.relative_to(root)): file for file in sorted(root.rglob("*")) if file.is_file()}
        if not api:
            return self._file(request, repo, commit, files.get("/".join(wanted[1:])))
        sizes = {name: file.stat().st_size for name, file in files.items()}
        if verb == "revision":
            siblings = [{"rfilename": name, "size": size} for name, size in sizes.items()]
            return self._json(request, {"id": repo.split("/", 1)[1], "sha": commit, "siblings": siblings, "tags": []})
        if verb == "tree":
            below = "/".join(wanted[1:])
            listed = [name for name in files if not below or name.startswith(f"{below}/")]
            if below and not listed:
                return self._refuse(request, "EntryNotFound")
        elif verb == "paths-info":
            asked = json.loads(body)["paths"] if "json" in request.headers["Content-Type"] else []
            listed = [name for name in files if name in asked]
        else:
            return self._refuse(request, "EntryNotFound")
        return self._json(
            request,
            [{"type": "file", "path": name, "size": sizes[name], "oid": etag(files[name])} for name in listed],
        )

    def _file(self, request: BaseHTTPRequestHandler, repo: str, commit: str, file: Path | None) -> None:
        if repo in self.gated:
            return self._refuse(request, "GatedRepo")
        if file is None:
            return self._refuse(request, "EntryNotFound", commit)
        content = file.read_bytes()
        headers = {"ETag": f'"{etag(file)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        self._send(request, 200, content, headers)

    def _json(self, request: BaseHTTPRequestHandler, value: object) -> None:
        self._send(request, 200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, request: BaseHTTPRequestHandler, code: str, commit: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": code} | ({"X-Repo-Commit": commit} if commit else {})
        self._send(request, REFUSALS[code], b"{}", headers)

    def _send(self, request: BaseHTTPRequestHandler, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        request.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content)


def etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()

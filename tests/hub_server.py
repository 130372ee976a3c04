"""A stand-in for the Hub on the loopback: uploads, models and data sets, all in memory."""

import base64
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse


class Hub(ThreadingHTTPServer):
    """The server, running as soon as it is made; `with Hub() as hub:` stops it again.

    repos: {"me/model" or "datasets/me/data": {"files": {path: bytes}, "private": bool}}, to fill and to look at;
        "me/model@old" is a revision of me/model
    requests: every (method, path, headers, body), oldest first
    fail: [regex on "METHOD path", how many times, status], ...: requests to answer with an error
    env: the environment of a process that is to use this server
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos = {}
        self.requests = []
        self.fail = []
        self.env = {
            **os.environ,
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }
        self.env.pop("HF_TOKEN", None)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def __exit__(self, *exc_info):
        self.shutdown()
        self.server_close()

    def add_folder(self, name, folder):
        """Serve a folder's files as the repository `name`."""
        files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        self.repos[name] = {"files": files, "private": False}


def blob_id(data: bytes) -> str:
    """Git's id of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def send(self, status, body, headers=None):
        """Answer with bytes, or with an object as JSON; a HEAD answer has no body."""
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": len(body), **(headers or {})}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer(self):
        url = urlparse(self.path)
        path = unquote(url.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.command, path, dict(self.headers), body))
        for failure in self.server.fail:
            if failure[1] > 0 and re.search(failure[0], f"{self.command} {path}"):
                failure[1] -= 1
                return self.send(failure[2], {})
        if path == "/api/whoami-v2":
            return self.send(200, {"name": "me", "type": "user", "orgs": []})
        if path == "/api/validate-yaml":
            return self.send(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        match = re.fullmatch(r"/api/(models/|datasets/)([^/]+/[^/]+)(?:/([\w-]+)(?:/([^/]+))?(?:/(.*))?)?", path)
        if match:
            kind, name, action, revision, inner = match.groups()
            name = kind.replace("models/", "") + name
            return self.api(name, action, revision, inner or "", parse_qs(url.query), body)
        match = re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.*)", path)
        if match:
            return self.resolve(*match.groups())
        self.send(404, {})

    do_GET = do_POST = do_HEAD = answer

    def create(self, wanted):
        prefix = "datasets/" if wanted.get("type") == "dataset" else ""
        name = f"{prefix}{wanted.get('organization') or 'me'}/{wanted['name']}"
        status = 409 if name in self.server.repos else 200
        self.server.repos.setdefault(name, {"files": {}, "private": wanted.get("visibility") == "private"})
        self.send(status, {"url": f"{self.server.url}/{name}"})

    def files_of(self, name, revision=None):
        """A revision's files and its commit, which changes with them; None after answering that there is none."""
        found = {}
        for key in self.server.repos:
            if key.split("@")[0] == name:
                files = self.server.repos[key]["files"]
                ids = "".join(path + blob_id(files[path]) for path in sorted(files))
                found[key] = files, hashlib.sha1(ids.encode()).hexdigest()
        if name not in found:
            return self.send(404, {}, {"X-Error-Code": "RepoNotFound"})
        of_commit = [one for one in found.values() if one[1] == revision]
        return found.get(f"{name}@{revision}") or (of_commit or [found[name]])[0]

    def api(self, name, action, revision, inner, query, body):
        """GET (info), GET revision/REV, GET tree/REV/FOLDER; POST paths-info/REV, preupload/REV, commit/REV."""
        found = self.files_of(name, revision)
        if not found:
            return
        files, commit = found
        entries = [{"type": "file", "path": p, "size": len(d), "oid": blob_id(d)} for p, d in sorted(files.items())]
        folders = {p[: m.start()] for p in files for m in re.finditer("/", p)}
        entries += [{"type": "directory", "path": p, "size": 0, "oid": blob_id(p.encode())} for p in sorted(folders)]
        if action in (None, "revision"):
            siblings = [{"rfilename": path} for path in sorted(files)]
            private = self.server.repos[name]["private"]
            info = {"id": name.removeprefix("datasets/"), "sha": commit, "private": private, "siblings": siblings}
            return self.send(200, {**info, "tags": [], "downloads": 0, "gated": False})
        if action == "tree":
            if inner and inner not in folders:
                return self.send(404, {}, {"X-Error-Code": "EntryNotFound"})
            below = [e for e in entries if e["path"].startswith(f"{inner}/" if inner else "")]
            deep = query.get("recursive", ["false"])[0].lower() in ("true", "1")
            depth = inner.count("/") + 1 if inner else 0
            return self.send(200, [e for e in below if deep or e["path"].count("/") == depth])
        if action == "paths-info":
            is_json = body.startswith(b"{")
            wanted = json.loads(body)["paths"] if is_json else parse_qs(body.decode())["paths"]
            return self.send(200, [e for e in entries if e["path"] in wanted])
        if action == "preupload":
            wanted = [f["path"] for f in json.loads(body)["files"]]
            known = {p: {"oid": blob_id(files[p])} for p in wanted if p in files}
            answers = [{"path": p, "uploadMode": "regular", "shouldIgnore": False, **known.get(p, {})} for p in wanted]
            return self.send(200, {"files": answers})
        if action == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                if line["key"] == "deletedFile":
                    files.pop(line["value"]["path"])
            _, commit = self.files_of(name)
            return self.send(200, {"commitUrl": f"{self.server.url}/{name}/commit/{commit}", "commitOid": commit})
        self.send(404, {})

    def resolve(self, name, revision, path):
        """A file, or the range of it that was asked for."""
        found = self.files_of(name, revision)
        if not found:
            return
        files, commit = found
        if path not in files:
            return self.send(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        data = files[path]
        headers = {"ETag": f'"{blob_id(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return self.send(200, data, headers)
        start, stop = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1) + 1
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        self.send(206, data[start:stop], headers)

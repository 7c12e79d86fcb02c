"""What the servers on loopback have in common, which stand for the network in tests."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading

SHA = "89abcdef0123456789abcdef0123456789abcdef"


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers, and logs nothing."""

    def answer(self, body, status=200, length=None, **headers):
        self.send_response(status)
        for key, value in ({"Content-Length": length or len(body)} | headers).items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


class Hub(Handler):
    """Speaks the hub's protocol: descriptions, files by revision, new repositories and commits.

    Of the server it wants `repositories`, {OWNER/NAME: {file: bytes}}, and `honest`; `seen` gets
    the requests, `commits` each commit's lines; `files` are those of other URLs.
    """

    def do_GET(self):
        self.server.seen.append(self.path)
        path = self.path.partition("?")[0]
        if path.startswith("/files/"):
            body = self.server.files.get(path.removeprefix("/files/"))
            return self.answer(body or b"", 200 if body else 404)
        found = re.fullmatch(r"(?:/api/models)?/([\w.-]+/[\w.-]+)/?(.*)", path)
        repo, rest = found.groups()
        files = self.server.repositories.get(repo)
        if files is None:
            return self.answer(b"{}", 404, **{"X-Error-Code": "RepoNotFound"})
        if path.startswith("/api"):
            tree = [
                {"type": "file", "path": f, "size": len(b), "oid": "0"} for f, b in files.items()
            ]
            about = {"id": repo, "sha": SHA, "siblings": [{"rfilename": file} for file in files]}
            about["private"] = repo in self.server.private
            return self.answer(json.dumps(tree if "/tree/" in path else about).encode())
        body = files[rest.rpartition("/")[2]]
        digest = hashlib.sha256(body if self.server.honest else b"other").hexdigest()
        headers = {"X-Repo-Commit": SHA, "ETag": f'"{digest}"', "X-Linked-ETag": f'"{digest}"'}
        return self.answer(body, **headers, **{"X-Linked-Size": len(body)})

    do_HEAD = do_GET

    def do_POST(self):
        """What an upload asks for; large files go to /large/SHA-256 by PUT."""
        self.server.seen.append(self.path)
        lines = self.rfile.read(int(self.headers["Content-Length"])).splitlines()
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.answer(b"{}", 401)
        asked = [json.loads(line) for line in lines]
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            repo = "/".join((asked[0]["organization"] or "owner", asked[0]["name"]))
            self.server.repositories[repo] = {".gitattributes": b""}
            if asked[0].get("private") or asked[0].get("visibility") == "private":
                self.server.private.add(repo)
            said = {"url": f"{self.server.address}/{repo}", "id": repo}
        elif path == "/api/validate-yaml":
            said = {"errors": [], "warnings": []}
        elif "/preupload/" in path:
            names = [file["path"] for file in asked[0]["files"]]
            mode = {True: "lfs", False: "regular"}
            said = {
                "files": [
                    {"path": n, "uploadMode": mode[n.endswith("s")], "shouldIgnore": False}
                    for n in names
                ]
            }
        elif path.endswith("/objects/batch"):
            objects = asked[0]["objects"]
            place = f"{self.server.address}/large/"
            uploads = [{"upload": {"href": place + each["oid"]}} for each in objects]
            objects = [each | {"actions": up} for each, up in zip(objects, uploads, strict=True)]
            said = {"transfer": "basic", "objects": objects}
        else:
            said = self._commit("/".join(path.split("/")[3:5]), asked)
        return self.answer(json.dumps(said).encode())

    def do_PUT(self):
        body = b"".join(self._chunks())
        self.server.files[f"/large/{hashlib.sha256(body).hexdigest()}"] = body
        good = self.server.honest and self.path in self.server.files
        self.answer(b"", 200 if good else 403)

    def _chunks(self):
        if length := self.headers["Content-Length"]:
            yield self.rfile.read(int(length))
            return
        while count := int(self.rfile.readline(), 16):
            yield self.rfile.read(count)
            self.rfile.readline()

    def _commit(self, repo, lines):
        files = self.server.repositories[repo]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.files[f"/large/{value['oid']}"]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.server.commits.append(lines)
        return {"commitUrl": f"{self.server.address}/{repo}/commit/{SHA}", "commitOid": SHA}


TOKEN = "hf_" + "x" * 34


@contextlib.contextmanager
def serve_hub():
    """Starts a hub on loopback, and gives it with its `address`."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.files, server.repositories, server.seen, server.honest = {}, {}, [], True
        server.commits, server.private = [], set()
        server.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()

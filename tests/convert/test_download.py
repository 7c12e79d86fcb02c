"""Downloads against a server on loopback: whole, broken, resumed, changed, refused."""

import hashlib
import http.server
import json
import socket
import sys
import threading
import urllib.request

import pytest

from deit_jax.convert import download
from deit_jax.convert.download import fetch
from deit_jax.errors import InputError

_BODY = bytes(range(256)) * 1500
_HALF = len(_BODY) // 2
_HASHED = f"tiny-{hashlib.sha256(_BODY).hexdigest()[:8]}.pth"


class _Site:
    """What the server answers. `script` holds one step for each coming GET, then all goes well.

    A step is the number of bytes after which the connection closes, a status, or "stall".
    """

    def __init__(self):
        self.body, self.etag, self.modified = _BODY, '"one"', None
        self.ranges, self.honours_if_range, self.chunked = True, True, False
        self.script, self.seen, self.redirects = [], [], {}
        self.release = threading.Event()  # lets a stalled answer end

    def handle(self, handler):
        self.seen.append((handler.path, handler.headers["Range"], handler.headers["If-Range"]))
        step = self.script.pop(0) if self.script else None
        if handler.path in self.redirects:
            return self._head(handler, 302, {"Location": self.redirects[handler.path]})
        if isinstance(step, tuple):
            return self._head(handler, step[0], {"Content-Length": "0"})
        start, status, headers = 0, 200, {}
        same = handler.headers["If-Range"] in (self.etag, self.modified)
        if handler.headers["Range"] and self.ranges and (same or not self.honours_if_range):
            start = int(handler.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(self.body):
                return self._head(handler, 416, {"Content-Range": f"bytes */{len(self.body)}"})
            span = f"bytes {start}-{len(self.body) - 1}/{len(self.body)}"
            status, headers = 206, {"Content-Range": span}
        headers |= {"ETag": self.etag, "Last-Modified": self.modified}
        length = {"Content-Length": str(len(self.body) - start)}
        if self.chunked:
            length = {"Transfer-Encoding": "chunked"}
        self._head(handler, status, headers | length)
        rest = self.body[start:]
        if self.chunked:
            handler.wfile.write(b"%x\r\n" % len(rest) + rest[:step])
            if step is None:
                handler.wfile.write(b"\r\n0\r\n\r\n")
            return None
        if step == "stall":
            handler.wfile.write(rest[:_HALF])
            handler.wfile.flush()
            self.release.wait(10)
            step = None
            rest = rest[_HALF:]
        handler.wfile.write(rest[:step])

    @staticmethod
    def _head(handler, status, headers):
        handler.send_response(status)
        for key, value in headers.items():
            if value:
                handler.send_header(key, value)
        handler.end_headers()


@pytest.fixture
def serve():
    """Starts a server for an object with `handle(handler)`; returns its address."""
    servers = []

    def start(site):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                site.handle(self)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_):  # the client went away
                pass

        server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def site():
    site = _Site()
    yield site
    site.release.set()


@pytest.fixture
def address(serve, site):
    return serve(site)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The cache folder of every test, with no waiting between attempts."""
    monkeypatch.setattr(download, "_WAIT", 0.001)
    monkeypatch.setenv("DEIT_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _refusal(src, **options):
    with pytest.raises(InputError) as caught:
        fetch(src, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def _names(cache):
    return sorted(path.name for path in cache.rglob("*") if path.is_file())


def test_an_existing_path_is_returned(tmp_path):
    file = tmp_path / "weights.pth"
    file.touch()
    assert fetch(str(file)) == fetch(file) == file
    assert fetch(tmp_path) == tmp_path


@pytest.mark.parametrize(
    ("src", "hint"),
    [
        ("no/such/file.pth", "no/such/file.pth"),
        ("deit_tiny_patch16_224", "hf:OWNER/NAME"),
        ("facebook/deit-tiny", "hf:facebook/deit-tiny"),
        ("", "no such file"),
        ("a\nb", "no such file"),
        ("a\0b", "no such file"),
    ],
)
def test_a_missing_path(src, hint):
    assert hint in _refusal(src)


def test_a_plain_download_is_made_once(address, site, cache, capfd):
    file = fetch(f"{address}/some/tiny.pth?x=1")
    assert file.read_bytes() == _BODY
    assert file.name == "tiny.pth"
    assert cache in file.parents
    assert _names(cache) == ["tiny.pth", "tiny.pth.lock"]
    assert "tiny.pth: 100%" in capfd.readouterr().err
    assert fetch(f"{address}/some/tiny.pth?x=1") == file
    assert len(site.seen) == 1
    other = fetch(f"{address}/other/tiny.pth")
    assert other != file  # another URL of the same file name
    assert other.name == "tiny.pth"


def test_the_cache_folder(address, tmp_path, monkeypatch):
    assert tmp_path / "mine" in fetch(f"{address}/a.pth", cache=tmp_path / "mine").parents
    monkeypatch.delenv("DEIT_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tmp_path / "xdg" / "deit_jax" in fetch(f"{address}/a.pth").parents
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert tmp_path / "home" / ".cache" / "deit_jax" in fetch(f"{address}/a.pth").parents


def test_without_a_stated_length(address, site, monkeypatch):
    monkeypatch.setattr(
        _Site,
        "_head",
        lambda self, handler, status, headers, head=_Site._head: head(
            handler, status, {k: v for k, v in headers.items() if k != "Content-Length"}
        ),
    )
    assert fetch(f"{address}/a.pth").read_bytes() == _BODY


def test_the_hash_in_the_name(address, site, cache):
    assert fetch(f"{address}/{_HASHED}").read_bytes() == _BODY
    site.body = _BODY[:-1] + b"x"
    message = _refusal(f"{address}/sub/{_HASHED}")
    assert hashlib.sha256(site.body).hexdigest() in message
    assert _HASHED[5:13] in message
    assert _names(cache) == [_HASHED, f"{_HASHED}.lock", f"{_HASHED}.lock"]


def test_names_with_and_without_a_hash():
    promised = download._promised_hash
    assert promised("deit_tiny_patch16_224-a1311bcf.pth") == "a1311bcf"
    assert promised("deit-A1311BCF00.pth.tar") == "a1311bcf00"
    assert (
        promised("deit_base-224.pth") == promised("deit-a1311bcf") == promised("a1311bcf.p") == ""
    )


def test_a_damaged_file_in_the_cache_is_downloaded_again(address, site):
    file = fetch(f"{address}/{_HASHED}")
    file.write_bytes(_BODY[:1000])
    assert fetch(f"{address}/{_HASHED}").read_bytes() == _BODY
    assert len(site.seen) == 2


def test_404_is_not_tried_again(address, site, cache):
    site.script = [(404,)]
    assert f"{address}/a.pth: the server answered HTTP 404" in _refusal(f"{address}/a.pth")
    assert len(site.seen) == 1
    assert _names(cache) == ["a.pth.lock"]


def test_5xx_is_tried_again(address, site):
    site.script = [(503,), (500,)]
    assert fetch(f"{address}/a.pth").read_bytes() == _BODY
    site.script = [(503,)] * 20
    assert "HTTP 503" in _refusal(f"{address}/b.pth")
    assert len(site.seen) == 3 + download._ATTEMPTS


@pytest.mark.parametrize(("etag", "modified"), [('"one"', None), ('W/"one"', "a date")])
def test_a_broken_download_is_resumed(address, site, etag, modified):
    site.etag, site.modified, site.script = etag, modified, [_HALF]
    assert fetch(f"{address}/{_HASHED}").read_bytes() == _BODY
    validator = modified or etag
    assert [seen[1:] for seen in site.seen] == [(None, None), (f"bytes={_HALF}-", validator)]


def test_a_stalled_download_is_resumed(address, site, monkeypatch):
    monkeypatch.setattr(download, "_TIMEOUT", 0.2)
    site.script = ["stall"]
    assert fetch(f"{address}/{_HASHED}").read_bytes() == _BODY
    assert site.seen[1][1] == f"bytes={_HALF}-"


def test_a_broken_chunk_is_noticed(address, site):
    site.chunked, site.script = True, [_HALF]
    assert fetch(f"{address}/a.pth").read_bytes() == _BODY
    assert site.seen[1][1] == f"bytes={_HALF}-"


def test_without_a_validator_it_starts_anew(address, site):
    site.etag, site.script = None, [_HALF]
    assert fetch(f"{address}/a.pth").read_bytes() == _BODY
    assert [seen[1] for seen in site.seen] == [None, None]


def test_a_later_call_resumes(address, site, cache):
    site.script = [1000] * download._ATTEMPTS
    message = _refusal(f"{address}/a.pth")
    assert f"{1000 * download._ATTEMPTS:,} bytes are kept" in message
    assert "running again resumes" in message
    assert _names(cache) == ["a.pth.lock", "a.pth.part", "a.pth.part.json"]
    assert fetch(f"{address}/a.pth").read_bytes() == _BODY
    assert site.seen[-1][1] == f"bytes={1000 * download._ATTEMPTS}-"
    assert _names(cache) == ["a.pth", "a.pth.lock"]


@pytest.mark.parametrize(
    "note", [None, "{", "[]", json.dumps({"url": "https://else.where/a.pth", "validator": '"one"'})]
)
def test_a_part_with_a_useless_note_is_dropped(address, site, cache, note):
    site.script = [_HALF] + [0] * download._ATTEMPTS
    _refusal(f"{address}/a.pth")
    path = next(cache.rglob("*.part.json"))
    path.unlink() if note is None else path.write_text(note)
    site.body, site.script = _BODY[::-1], []
    assert fetch(f"{address}/a.pth").read_bytes() == _BODY[::-1]
    assert site.seen[-1][1] is None


def test_a_server_without_ranges(address, site):
    site.ranges, site.script = False, [_HALF]
    assert fetch(f"{address}/a.pth").read_bytes() == _BODY
    assert [seen[1] for seen in site.seen] == [None, f"bytes={_HALF}-"]


@pytest.mark.parametrize("honours_if_range", [True, False])
@pytest.mark.parametrize("body", [_BODY[::-1], _BODY[:100], _BODY * 2])
def test_content_that_changed_meanwhile(address, site, honours_if_range, body):
    site.script = [_HALF] + [(503,)] * download._ATTEMPTS
    _refusal(f"{address}/a.pth")
    site.body, site.etag, site.script = body, '"two"', []
    site.honours_if_range = honours_if_range
    assert fetch(f"{address}/a.pth").read_bytes() == body


def test_a_part_that_has_all_bytes_already(address, site, cache):
    site.script = [_HALF] + [(503,)] * download._ATTEMPTS
    _refusal(f"{address}/a.pth")
    next(cache.rglob("*.part")).write_bytes(_BODY)  # the server answers 416
    assert fetch(f"{address}/a.pth").read_bytes() == _BODY


def test_a_wrong_range_is_not_appended(address, site, monkeypatch):
    site.script = [_HALF]

    def shifted(handler, status, headers, head=_Site._head):
        if status == 206:
            headers["Content-Range"] = f"bytes 7-{len(_BODY) - 1}/{len(_BODY)}"
        head(handler, status, headers)

    monkeypatch.setattr(site, "_head", shifted, raising=False)
    assert fetch(f"{address}/a.pth").read_bytes() == _BODY
    assert site.seen[-1][1] is None


def test_two_at_once_download_once(address, site, capfd, monkeypatch):
    site.script = ["stall"]
    waiting, real = threading.Event(), download.fcntl.flock

    def flock(file, how):
        if how == download.fcntl.LOCK_EX:
            waiting.set()
        real(file, how)

    monkeypatch.setattr(download.fcntl, "flock", flock)
    files = []
    threads = [
        threading.Thread(target=lambda: files.append(fetch(f"{address}/a.pth"))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    assert waiting.wait(10)
    site.release.set()
    for thread in threads:
        thread.join(10)
    assert [file.read_bytes() for file in files] == [_BODY, _BODY]
    assert len(site.seen) == 1
    assert "Waiting for another download of a.pth" in capfd.readouterr().err


def test_nobody_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        message = _refusal(f"http://127.0.0.1:{free.getsockname()[1]}/a.pth")
    assert "refused" in message
    assert "run again" in message


def test_an_unknown_host(monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "Name or service not known" in _refusal("https://no-such-host.invalid/a.pth")


def test_a_full_disk(address, monkeypatch, cache):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download.os, "fsync", full)
    message = _refusal(f"{address}/a.pth")
    assert "No space left on device" in message
    assert "DEIT_JAX_CACHE" in message


def test_a_cache_that_is_no_folder(address, tmp_path, site):
    (tmp_path / "file").touch()
    assert "DEIT_JAX_CACHE" in _refusal(f"{address}/a.pth", cache=tmp_path / "file")
    assert not site.seen


@pytest.mark.parametrize(
    ("url", "part"),
    [
        ("http://example.invalid/a.pth", "use an https:// URL"),
        ("http://127.0.0.1.example.invalid/a.pth", "use an https:// URL"),
        ("http://127.0.0.1@example.invalid/a.pth", "user name"),
        ("ftp://example.invalid/a.pth", "use an https:// URL"),
        ("file:///etc/hostname", "https://HOST/FILE"),
        ("https://example.invalid/", "no file name"),
        ("https://example.invalid", "no file name"),
        ("https://example.invalid/a/..", "no file name"),
        ("https://example.invalid/%2e%2e", "no file name"),
        ("https:///a.pth", "https://HOST/FILE"),
        ("https://example.invalid:port/a.pth", "not a valid URL"),
        ("https://[::1/a.pth", "not a valid URL"),
        ("https://example.invalid/a\nb.pth", "percent-encode"),
        ("https://example.invalid/ä.pth", "percent-encode"),
    ],
)
def test_refused_without_a_request(monkeypatch, cache, url, part):
    monkeypatch.setattr(download, "_open", lambda *_: pytest.fail("a request was made"))
    assert part in _refusal(url)
    assert not cache.exists()


@pytest.mark.parametrize(
    ("last", "name"),
    [
        ("..%2f..%2fevil.pth", "evil.pth"),
        ("..%5c..%5cevil.pth", "evil.pth"),
        (".hidden.pth", "hidden.pth"),
        ("a%20b%00c%0a.pth", "a_b_c_.pth"),
        ("x" * 500 + ".pth", "x" * 124 + ".pth"),
    ],
)
def test_names_stay_inside_the_cache(address, cache, last, name):
    file = fetch(f"{address}/{last}")
    assert file.name == name
    assert file.parent.parent == cache
    assert file.read_bytes() == _BODY


def test_redirects(address, site):
    site.redirects = {
        "/a.pth": "/b.pth",
        "/c.pth": "http://example.invalid/c.pth",
        "/d.pth": "/d.pth",
    }
    assert fetch(f"{address}/a.pth").read_bytes() == _BODY
    assert "redirects to 'http://example.invalid/c.pth'" in _refusal(f"{address}/c.pth")
    assert "HTTP 302" in _refusal(f"{address}/d.pth")  # for ever to itself


@pytest.mark.parametrize("to", ["http://example.invalid/a", "http://127.0.0.1/a", "ftp://x/a"])
def test_no_redirect_leaves_https(to):
    request = urllib.request.Request("https://example.invalid/a")
    redirect = download._Redirects().redirect_request
    with pytest.raises(InputError, match="not https"):
        redirect(request, None, 302, "Found", {}, to)
    assert redirect(request, None, 302, "Found", {}, "https://example.invalid/b") is not None


def test_loopback_is_not_asked_through_a_proxy(address, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    assert fetch(f"{address}/a.pth").read_bytes() == _BODY


class _Hub:
    """As much of the Hugging Face hub as huggingface_hub asks for."""

    sha = "0123456789abcdef0123456789abcdef01234567"
    files = {  # noqa: RUF012
        "both": ["README.md", "config.json", "model.safetensors", "pytorch_model.bin"],
        "old": ["config.json", "preprocessor_config.json", "pytorch_model.bin"],
        "sharded": ["config.json", "model.safetensors.index.json"],
        "empty": ["README.md"],
    }

    def handle(self, handler):
        words = handler.path.partition("?")[0].strip("/").split("/")
        name = words[3] if words[0] == "api" else words[1]
        if name == "gated" or (name not in self.files) or "nope" in words:
            code = {"gated": "GatedRepo", "both": "RevisionNotFound"}.get(name, "RepoNotFound")
            status = 403 if name == "gated" else 404
            return self._answer(handler, {"error": "no\nentry"}, status, {"X-Error-Code": code})
        if words[0] != "api":  # OWNER/NAME/resolve/REVISION/FILE
            body = words[-1].encode()
            headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": self.sha}
            return self._answer(handler, body, 200, headers)
        if "tree" in words:
            return self._answer(
                handler,
                [
                    {"type": "file", "path": file, "size": len(file), "oid": "0" * 40}
                    for file in self.files[name]
                ],
            )
        siblings = [{"rfilename": file} for file in self.files[name]]
        repo = {"_id": "1", "id": f"owner/{name}", "sha": self.sha, "siblings": siblings}
        self._answer(handler, repo | {"private": False, "tags": [], "downloads": 0, "likes": 0})

    @staticmethod
    def _answer(handler, body, status=200, headers=()):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        for key, value in dict(headers).items():
            handler.send_header(key, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(body)


_FETCH_ALL = """
import json, sys
from deit_jax.convert.download import fetch
from deit_jax.errors import InputError
for src in sys.argv[2:]:
    try:
        folder = fetch(src, cache=sys.argv[1] or None)
        print(json.dumps([str(folder), {f.name: f.read_text() for f in folder.iterdir()}]))
    except InputError as error:
        print(json.dumps(str(error)))
"""


def test_the_hub(serve, tmp_path, run_python):
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    env = home | {"HF_ENDPOINT": serve(_Hub()), "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}
    names = ["both", "old", "old@main", "sharded", "empty", "gone", "gated", "both@nope", "a--b"]
    ran = run_python("-c", _FETCH_ALL, "", *(f"hf:owner/{name}" for name in names), env=env)
    assert ran.returncode == 0, ran.stderr
    both, old, main, *refusals = map(json.loads, ran.stdout.splitlines())
    assert {file: file for file in ("config.json", "model.safetensors")} == both[1]
    assert sorted(old[1]) == _Hub.files["old"]
    assert main == old
    assert str(tmp_path / "home") in both[0]
    parts = ["sharded", "found README.md", "no such repository", "gated", "revision 'nope'", "a--b"]
    for name, part, refusal in zip(names[3:], parts, refusals, strict=True):
        assert refusal.startswith(f"hf:owner/{name}: ")
        assert part in refusal.removeprefix(f"hf:owner/{name}")
        assert "\n" not in refusal

    with socket.socket() as free:  # nobody listens: what was downloaded once is found again
        free.bind(("127.0.0.1", 0))
        env["HF_ENDPOINT"] = f"http://127.0.0.1:{free.getsockname()[1]}"
        ran = run_python("-c", _FETCH_ALL, "", "hf:owner/old", "hf:owner/gated", env=env)
    assert ran.returncode == 0, ran.stderr
    again, refusal = map(json.loads, ran.stdout.splitlines())
    assert again == old
    assert "using the cached copy" in ran.stderr
    assert "check the name and network" in refusal
    assert "\n" not in refusal


@pytest.mark.parametrize(
    "src", ["hf:", "hf:name", "hf:a/b/c", "hf:a/b@", "hf:../b\n", "hf:a/b@x y", "hf://a/b"]
)
def test_bad_names_of_repositories(src):
    assert "expected hf:OWNER/NAME" in _refusal(src)


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'deit-jax[torch]'" in _refusal("hf:owner/name")

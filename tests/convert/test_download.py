"""Downloads from servers on loopback: whole, cut short, wrong, cached, refused."""

import hashlib
import http.server
import json
import socket
import sys
import threading

import pytest

from deit_jax.convert.download import fetch
from deit_jax.errors import InputError, TransientError
from tests import several
from tests.convert import loopback
from tests.refusal import refusal

_BODY = bytes(range(256)) * 1500
_HASHED = f"tiny-{hashlib.sha256(_BODY).hexdigest()[:8]}.pth"
_SHA = "0123456789abcdef0123456789abcdef01234567"
_HUB = {
    "both": ["README.md", "config.json", "model.safetensors", "pytorch_model.bin", "modeling.py"],
    "old": ["config.json", "preprocessor_config.json", "pytorch_model.bin"],
    "sharded": [
        *("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        *("model.safetensors.index.json", "model.fp16-00001-of-00001.safetensors"),
    ],
    "other": ["config.json", "tf_model.h5"],
}


class _Handler(loopback.Handler):
    """Answers `script[path]` (body, status, or where to redirect), else `_BODY`; and as the hub."""

    def do_GET(self):
        self.server.seen.append(self.path)
        found = self.server.script.get(self.path, _BODY)
        words = self.path.partition("?")[0].strip("/").split("/")
        if "owner" in words:
            return self._hub(words)
        if isinstance(found, str):
            return self.answer(b"", 302, Location=found)
        if isinstance(found, int):
            return self.answer(b"", found)
        return self.answer(found, length=len(_BODY))

    do_HEAD = do_GET

    def _hub(self, words):
        name = words[words.index("owner") + 1]
        if name not in _HUB or "nope" in words:
            code = "RevisionNotFound" if name in _HUB else "RepoNotFound"
            return self.answer(b'{"error": "no\\nentry"}', 404, **{"X-Error-Code": code})
        if words[0] != "api":  # owner/NAME/resolve/REVISION/FILE
            body = words[-1].encode()
            etag = f'"{hashlib.sha1(body).hexdigest()}"'
            return self.answer(body, ETag=etag, **{"X-Repo-Commit": _SHA})
        files = [{"type": "file", "path": f, "size": 1, "oid": "0" * 40} for f in _HUB[name]]
        repo = {"id": name, "sha": _SHA, "siblings": [{"rfilename": file} for file in _HUB[name]]}
        return self.answer(json.dumps(files if "tree" in words else repo).encode())


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("DEIT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("pooch.core.time.sleep", lambda _: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.seen, server.script = [], {}
        server.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def dead_address():
    """Where nobody listens."""
    return f"http://127.0.0.1:{several.free_port()}"


def test_paths(tmp_path):
    assert fetch(str(tmp_path)) == fetch(tmp_path) == tmp_path
    for src in ("no/such/file.pth", "", "a\nb", "a\0b"):
        assert "no such file" in refusal(fetch, src)
    assert "hf:facebook/deit-tiny" in refusal(fetch, "facebook/deit-tiny")


def test_a_file_is_downloaded_once(server, tmp_path, capfd):
    urls = [f"{server.address}/{path}" for path in ("a/tiny.pth?x=1", "b/tiny.pth", _HASHED)]
    files = [fetch(url) for url in urls]
    assert [file.read_bytes() for file in files] == [_BODY] * 3
    assert [file.name for file in files] == ["tiny.pth", "tiny.pth", _HASHED]
    assert all(file.parent.parent == tmp_path / "cache" for file in files)
    assert "100%" in capfd.readouterr().err
    assert [fetch(url) for url in urls] == files
    assert len(server.seen) == 3
    files[2].write_bytes(_BODY[:1000])  # damaged: the name says so
    assert fetch(urls[2]).read_bytes() == _BODY
    assert len(set(files)) == 3


@pytest.mark.parametrize(
    ("name", "answer", "kind", "words"),
    [
        (_HASHED, _BODY[:-1] + b"x", InputError, "SHA-256"),
        ("a.pth", _BODY[:1000], TransientError, "1000 bytes read"),
        ("a.pth", 404, InputError, "404"),
        ("a.pth", 503, TransientError, "503"),
        ("a.pth", "ftp://127.0.0.1/a", InputError, "ftp"),
    ],
)
def test_a_failed_download_leaves_nothing(server, tmp_path, name, answer, kind, words):
    url = f"{server.address}/{name}"
    server.script[f"/{name}"] = answer
    message = refusal(fetch, url, kind=kind)
    assert url in message
    assert words in message
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    server.script.clear()
    assert fetch(url).read_bytes() == _BODY


def test_redirects_stay_on_safe_ground(server):
    server.script["/a.pth"] = f"{server.address}/b.pth"
    assert fetch(f"{server.address}/a.pth").read_bytes() == _BODY
    # By a name that no URL may have, which leads here nevertheless.
    server.script["/c.pth"] = server.address.replace("127.0.0.1", "0.0.0.0") + "/b.pth"
    assert "0.0.0.0" in refusal(fetch, f"{server.address}/c.pth")


def test_no_network_and_no_disk(server, dead_address, tmp_path, monkeypatch):
    assert "refused" in refusal(fetch, f"{dead_address}/a.pth", kind=TransientError)
    (tmp_path / "file").touch()
    monkeypatch.setenv("DEIT_JAX_CACHE", str(tmp_path / "file"))
    assert "DEIT_JAX_CACHE" in refusal(fetch, f"{server.address}/a.pth")


@pytest.mark.parametrize(
    "url",
    [
        *("http://example.invalid/a.pth", "http://127.0.0.1@example.invalid/a.pth"),
        *("http://127.0.0.1.example.invalid/a.pth", "ftp://example.invalid/a.pth"),
        *("file:///etc/hostname", "https://example.invalid/", "https://example.invalid/%2e%2e"),
        *("https:///a.pth", "https://[::1/a.pth", "https://example.invalid:port/a.pth"),
        *("https://example.invalid/a\nb.pth", "https://example.invalid/ä.pth", "hf:", "hf:name"),
        *("hf:a/b/c", "hf:a/b@", "hf:../b\n", "hf:a/b@x y", "hf://a/b"),
    ],
)
def test_refused_without_a_request(monkeypatch, url):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("a request was made"))
    assert "expected" in refusal(fetch, url) or "URL" in refusal(fetch, url)


@pytest.mark.parametrize(
    ("last", "name"),
    [("..%2f..%5cevil.pth", "evil.pth"), (".a%20b%00.pth", "a_b_.pth"), ("x" * 500, "x" * 128)],
)
def test_names_stay_inside_the_cache(server, tmp_path, last, name):
    file = fetch(f"{server.address}/{last}")
    assert (file.name, file.parent.parent) == (name, tmp_path / "cache")


_FETCH_ALL = """
import json, sys
from deit_jax.convert.download import fetch
from deit_jax.errors import InputError
for name in sys.argv[1:]:
    try:
        print(json.dumps({f.name: f.read_text() for f in fetch(f"hf:owner/{name}").iterdir()}))
    except InputError as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


@pytest.mark.slow
def test_the_hub(server, dead_address, tmp_path, run_python):
    env = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}

    def run(address, *names):
        ran = run_python("-c", _FETCH_ALL, *names, env=env | {"HF_ENDPOINT": address})
        assert ran.returncode == 0, ran.stderr
        return [json.loads(line) for line in ran.stdout.splitlines()]

    words = {"other": "tf_model.h5", "gone": "404", "both@nope": "404", "a--b": "a--b"}
    names = ("both", "old", "old@main", "sharded")
    both, old, main, shards, *refusals = run(server.address, *names, *words)
    assert shards == {file: file for file in _HUB["sharded"][:-1]}
    assert both == {file: file for file in ("config.json", "model.safetensors")}
    assert main == old == {file: file for file in _HUB["old"]}
    for name, (kind, message) in zip(words, refusals, strict=True):
        assert kind == "InputError"
        assert message.startswith(f"hf:owner/{name}: ")
        assert words[name] in message
        assert "\n" not in message
    again, (kind, message) = run(dead_address, "old", "gone")
    assert again == old  # what was downloaded once is found offline
    assert (kind, "\n" in message) == ("TransientError", False)


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install" in refusal(fetch, "hf:owner/name")

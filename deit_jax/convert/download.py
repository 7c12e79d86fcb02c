"""Where published weights lie: from a path, an https URL or the Hugging Face hub to a file."""

import contextlib
import fcntl
import hashlib
import http.client
import json
import os
import re
import ssl
import sys
import textwrap
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from deit_jax.errors import InputError, brief

_ATTEMPTS = 5
_WAIT = 0.5  # seconds before the second attempt; doubles with each further one
_TIMEOUT = 30.0  # seconds without any byte
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_CONFIGS = ("config.json", "preprocessor_config.json")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that the repository has


class _Broken(Exception):
    """A failure that another attempt may mend; the message is one line."""


def fetch(src: str | os.PathLike, *, cache: str | os.PathLike | None = None) -> Path:
    """Returns where the weights that `src` names lie, downloading them where needed.

    Args:
      src: a path; an `https://` URL (`http://` for this machine only); or `hf:OWNER/NAME`, with
        `@REVISION` where wanted, for a repository of the Hugging Face hub.
      cache: the folder for downloads. Default: $DEIT_JAX_CACHE, else `deit_jax` in
        $XDG_CACHE_HOME or in `~/.cache`; for `hf:`, the cache of huggingface_hub.

    Returns:
      The path itself, the downloaded file (`CACHE/<digest of the URL>/<name in the URL>`), or the
      folder with the repository's weights and configuration.

    Raises:
      InputError: nothing there, a source that cannot be used, a download that failed for good, or
        a file whose SHA-256 is not the one its name ends with (`NAME-a1311bcf.pth`).
    """
    text = os.fspath(src)
    if isinstance(src, str) and src.startswith("hf:"):
        return _from_hub(src, cache)
    if isinstance(src, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", src):
        return _from_url(src, cache)
    if text and os.path.exists(text):
        return Path(text)
    hub = f"hf:{text}" if re.fullmatch(r"[\w.-]+/[\w.-]+", text, re.ASCII) else "hf:OWNER/NAME"
    raise InputError(
        f"{text!r}: no such file or folder; check the path, or write {hub} for a repository of the "
        "Hugging Face hub, or an https:// URL"
    )


def _from_url(url: str, cache: str | os.PathLike | None) -> Path:
    _check_url(url)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    cache = cache or os.environ.get("DEIT_JAX_CACHE") or os.path.join(base, "deit_jax")
    # A folder for each URL: two of the same file name are not the same file.
    folder = Path(cache).expanduser() / hashlib.sha256(url.encode()).hexdigest()[:12]
    target = folder / _file_name(url)
    try:  # errors of the network are translated where they arise: what is left is the disk's
        if _is_intact(target):  # needs no lock, for only whole files get this name
            print(f"{url}: using the copy in {target}", file=sys.stderr)
            return target
        folder.mkdir(parents=True, exist_ok=True)
        # The lock's file stays: deleting it would let two processes in.
        with target.with_name(target.name + ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"Waiting for another download of {target.name} to end.", file=sys.stderr)
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_intact(target):
                target.unlink(missing_ok=True)
                _download(url, target)
    except OSError as error:
        raise InputError(
            f"{url}: the cache {folder} cannot be used ({brief(error)}); free some space, or name "
            "another folder in DEIT_JAX_CACHE"
        ) from error
    return target


def _check_url(url: str) -> None:
    if re.search(r"[^!-~]", url):
        raise InputError(f"{url!r}: expected a URL of printable ASCII; percent-encode the rest")
    try:
        parts = urllib.parse.urlsplit(url)
        parts.port  # noqa: B018
    except ValueError as error:
        raise InputError(f"{url}: not a valid URL ({brief(error)})") from error
    if not parts.hostname or "@" in parts.netloc:
        raise InputError(f"{url}: expected https://HOST/FILE, without a user name or password")
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in _LOOPBACK):
        raise InputError(f"{url}: {parts.scheme}:// is not safe for weights; use an https:// URL")


def _file_name(url: str) -> str:
    path = urllib.parse.unquote(urllib.parse.urlsplit(url).path)
    name = re.sub(r"[^A-Za-z0-9._+-]", "_", re.split(r"[/\\]", path)[-1])[-128:].lstrip(".")
    if not name:
        raise InputError(f"{url}: no file name at the end of the URL; expected https://HOST/FILE")
    return name


def _promised_hash(name: str) -> str:
    """The leading digits of the SHA-256 in a name as torch.hub writes them, or an empty string."""
    found = re.search(r"-([0-9a-fA-F]{8,64})(\.[A-Za-z]\w*)+$", name)
    return found[1].lower() if found else ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_intact(target: Path) -> bool:
    want = _promised_hash(target.name)
    return target.is_file() and (not want or _sha256(target).startswith(want))


def _download(url: str, target: Path) -> None:
    part = target.with_name(target.name + ".part")
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            _attempt(url, part)
            break
        except _Broken as error:
            kept = _resume_point(part, url)[0]
            if attempt == _ATTEMPTS:
                then = "check the network and the URL, then run again"
                if kept:
                    then = f"{kept:,} bytes are kept, and running again resumes after them"
                raise InputError(f"{url}: {error}, in {_ATTEMPTS} attempts; {then}") from error
            wait = _WAIT * 2 ** (attempt - 1)
            print(f"{url}: {error}; trying again in {wait:g} s", file=sys.stderr)
            time.sleep(wait)
    want = _promised_hash(target.name)
    if want and not (found := _sha256(part)).startswith(want):
        _discard(part)
        raise InputError(
            f"{url}: the file has SHA-256 {found}, but its name promises {want}; it was deleted. "
            "Run again, or, if those digits are no hash, pass the path of a copy under another name"
        )
    os.replace(part, target)
    _discard(part)


def _attempt(url: str, part: Path) -> None:
    """Brings `part` to the whole file, from where it ends if that is safe."""
    from tqdm import tqdm

    have, validator = _resume_point(part, url)
    request = urllib.request.Request(url, headers={"User-Agent": "deit-jax"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", validator)  # the whole file if it is another one by now
    with _open(request, part) as response:
        start, total = _extent(response, part, have, validator)
        if start == 0:  # the note after the old bytes are gone: a kill must not pair them with it
            _discard(part)
            note = {"url": url, "validator": _validator(response.headers)}
            _note(part).write_text(json.dumps(note), encoding="utf-8")
        bar = tqdm(
            desc=part.stem, initial=start, total=total, unit="B", unit_scale=True, file=sys.stderr
        )
        with bar, part.open("ab") as file:
            while True:
                try:
                    block = response.read1(1 << 20)
                except (OSError, http.client.HTTPException) as error:
                    raise _Broken(f"the connection broke ({brief(error)})") from error
                if not block:
                    break
                file.write(block)
                bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())  # before the final name says that the file is whole
    size = part.stat().st_size
    if total is not None and size != total:
        if size > total:
            _discard(part)
        raise _Broken(f"the connection closed after {size:,} of {total:,} bytes")


def _open(request: urllib.request.Request, part: Path) -> http.client.HTTPResponse:
    # Plain http is for this machine only, and so not for a proxy.
    proxies = {name: at for name, at in urllib.request.getproxies().items() if name != "http"}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies), _Redirects)
    try:
        return opener.open(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        answer = f"the server answered HTTP {error.code} ({brief(error.reason)})"
        if error.code == 416 and request.has_header("Range"):
            _discard(part)
            raise _Broken(answer) from error
        if error.code >= 500:
            raise _Broken(answer) from error
        raise InputError(f"{request.full_url}: {answer}; check the URL") from error
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        reason = getattr(error, "reason", error)  # of a URLError: what it wraps
        if isinstance(reason, ssl.SSLCertVerificationError) or isinstance(error, UnicodeError):
            raise InputError(f"{request.full_url}: no connection ({brief(reason)})") from error
        raise _Broken(f"no connection ({brief(reason)})") from error


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects only to where a URL may point in the first place, and never off https."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # noqa: ANN001
        try:
            _check_url(newurl)
            safe = req.type == "http" or newurl.startswith("https:")
        except InputError:
            safe = False
        if not safe:
            raise InputError(
                f"{req.full_url}: redirects to {newurl!r}, which is not https; refused"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _extent(
    response: http.client.HTTPResponse, part: Path, have: int, validator: str | None
) -> tuple[int, int | None]:
    """The byte at which the body starts, and the length of the whole file where it is known."""
    if response.status == 200:
        return 0, response.length
    span = response.headers.get("Content-Range", "")
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", span)
    same = _validator(response.headers) in (None, validator)  # some servers ignore If-Range
    if response.status != 206 or not found or int(found[1]) != have or not same:
        _discard(part)
        raise _Broken(f"the server answered HTTP {response.status} with another part ({span[:80]})")
    if found[2] != "*":
        return have, int(found[2])
    return have, None if response.length is None else have + response.length


def _validator(headers: http.client.HTTPMessage) -> str | None:
    etag = headers.get("ETag", "")
    return etag if etag.startswith('"') else headers.get("Last-Modified")  # W/: not byte for byte


def _note(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _resume_point(part: Path, url: str) -> tuple[int, str | None]:
    """How many bytes of `part` can be built upon, and the validator they came with."""
    try:
        note = json.loads(_note(part).read_text(encoding="utf-8"))
        if note["url"] == url and note["validator"] and part.stat().st_size:
            return part.stat().st_size, note["validator"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # nothing there, or cut off by a kill: start anew
    return 0, None


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _note(part).unlink(missing_ok=True)


def _from_hub(src: str, cache: str | os.PathLike | None) -> Path:
    found = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", src, re.ASCII)
    if not found:
        raise InputError(f"{src!r}: expected hf:OWNER/NAME or hf:OWNER/NAME@REVISION")
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors
    except ImportError as error:
        raise InputError(f"{src}: needs huggingface_hub; pip install 'deit-jax[torch]'") from error
    where = {"repo_id": found[1], "revision": found[2], "cache_dir": cache and Path(cache) / "hub"}

    def snapshot(weights: str, **more: bool) -> Path:
        patterns = [*_CONFIGS, weights]
        return Path(hub.snapshot_download(**where, allow_patterns=patterns, **more))

    try:
        info = hub.HfApi().model_info(found[1], revision=found[2], timeout=_TIMEOUT)
        return snapshot(_choose_weights(src, {file.rfilename for file in info.siblings or ()}))
    except InputError:
        raise
    except errors.GatedRepoError as error:
        reason, why = "gated: accept its terms on the hub, then run `hf auth login`", error
    except errors.RepositoryNotFoundError as error:
        reason, why = "no such repository, or a private one: run `hf auth login`", error
    except errors.RevisionNotFoundError as error:
        reason, why = f"the repository has no revision {found[2]!r}", error
    except Exception as error:  # of httpx, requests or its own, as the version of the hub has it
        for weights in _WEIGHTS:
            with contextlib.suppress(Exception):
                if (folder := snapshot(weights, local_files_only=True)).joinpath(weights).is_file():
                    print(f"{src}: no answer from the hub; using the cached copy", file=sys.stderr)
                    return folder
        reason, why = f"the hub cannot be used ({brief(error)}); check the name and network", error
    raise InputError(f"{src}: {reason}") from why


def _choose_weights(src: str, names: set[str]) -> str:
    for name in _WEIGHTS:
        if name in names:
            return name
    if any(f"{name}.index.json" in names for name in _WEIGHTS):
        raise InputError(f"{src}: sharded weights are not supported; expected {_WEIGHTS[0]}")
    listed = textwrap.shorten(", ".join(sorted(names)), 200, placeholder=" ...") or "nothing"
    raise InputError(f"{src}: neither {' nor '.join(_WEIGHTS)} in the repository; found {listed}")

"""Finds published weights: a path, an https URL (pooch) or a Hugging Face repository."""

import contextlib
import functools
import hashlib
import os
import re
import sys
import textwrap
from pathlib import Path
from urllib.parse import unquote, urlsplit

from deit_jax import storage, trees
from deit_jax.console import log_error
from deit_jax.convert.huggingface import CONFIGS, WEIGHTS
from deit_jax.convert.shards import INDICES
from deit_jax.errors import InputError, TransientError, brief, is_bug

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_RETRIES = 2
_TIMEOUT = 30  # seconds without any byte


def fetch(src: str | os.PathLike, *, cache: str | os.PathLike | None = None) -> Path:
    """Returns the path of the weights that `src` names; downloads them where needed.

    Args:
      src: a path, also in a bucket (`gs://`); an `https://` URL (`http://` for this machine only);
        or `hf:OWNER/NAME`, with `@REVISION` where wanted, for a repository of the Hugging Face hub.
      cache: the folder for downloads. Default: $DEIT_JAX_CACHE, else `deit_jax` in the user's
        cache folder; for `hf:`, the cache of huggingface_hub.

    Returns:
      The path itself, the downloaded file (`CACHE/<digest of the URL>/<name in the URL>`), or the
      folder with the repository's weights and configuration.

    Raises:
      InputError: nothing there, a source that cannot be used, or a file whose SHA-256 is not the
        one its name ends with (`NAME-a1311bcf.pth`).
      TransientError: no answer, or a download that broke off.
    """
    text = os.fspath(src)
    if isinstance(src, str) and src.startswith("hf:"):
        return _from_hub(src, cache)
    if isinstance(src, str) and storage.is_remote(src):
        return _from_bucket(src, cache)
    if isinstance(src, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", src):
        return _from_url(src, cache)
    if text and os.path.exists(text):
        return Path(text)
    hub = f"hf:{text}" if re.fullmatch(r"[\w.-]+/[\w.-]+", text, re.ASCII) else "hf:OWNER/NAME"
    raise InputError(
        f"{text!r}: no such file or folder; check the path, or write {hub} for a repository of the "
        "Hugging Face hub, or an https:// URL"
    )


def cache_folder(cache: str | os.PathLike | None) -> Path:
    """Returns the folder of downloads: this one, or the default."""
    import pooch

    folder = cache or os.environ.get("DEIT_JAX_CACHE") or pooch.os_cache("deit_jax")
    return Path(folder).expanduser()


def _from_bucket(src: str, cache: str | os.PathLike | None) -> Path:
    path = storage.path_of(src)
    if not path.exists():
        raise InputError(f"{src!r}: no such file or folder; check the path")
    files = list(path.iterdir()) if path.is_dir() else [path]
    stats = [(str(file), stat.length, stat.mtime) for file in files for stat in (file.stat(),)]
    folder = cache_folder(cache) / trees.digest(str(stats))
    if path.is_dir():
        storage.copy_files(path, folder / path.name)
    elif not (folder / path.name).exists():
        storage.copy_files(path, folder)
    return folder / path.name


def _from_url(url: str, cache: str | os.PathLike | None) -> Path:
    import pooch
    import requests
    from tqdm import tqdm

    _check_url(url)
    name = _file_name(url)
    # A folder for each URL: two of the same file name are not the same file.
    folder = cache_folder(cache) / hashlib.sha256(url.encode()).hexdigest()[:12]

    def download(url: str, file: str, owner: object) -> None:
        """Refuses a wrong file while it has a temporary name, under which pooch deletes it."""
        headers = {"User-Agent": "deit-jax", "Accept-Encoding": "identity"}
        with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
            for answer in (*response.history, response):
                _check_url(answer.url)
            response.raise_for_status()
            size = int(response.headers.get("Content-Length", 0)) or None
            bar = tqdm(desc=name, total=size, unit="B", unit_scale=True, file=sys.stderr)
            with bar, open(file, "wb") as output:
                for block in response.iter_content(1 << 20):
                    bar.update(output.write(block))
        if found := _wrong_hash(file, name):
            raise InputError(
                f"{url}: the file has SHA-256 {found}, but its name promises another; it was "
                "deleted. Run again, or pass the path of a copy under a name without a hash"
            )

    try:
        if not (folder / name).is_file() or _wrong_hash(folder / name, name):
            (folder / name).unlink(missing_ok=True)
            store = pooch.Pooch(folder, "", {name: None}, {name: url}, retry_if_failed=_RETRIES)
            store.fetch(name, downloader=download)
        return folder / name
    except requests.RequestException as error:
        status = getattr(error.response, "status_code", 500)
        lasting = isinstance(error, (ValueError, requests.exceptions.SSLError)) or status < 500
        kind = InputError if lasting else TransientError
        raise kind(
            f"{url}: not downloaded ({brief(_root(error))}); check the URL and the network, then "
            "run again"
        ) from error
    except OSError as error:
        raise InputError(
            f"{url}: the cache {folder} cannot be used ({brief(error)}); free some space, or name "
            "another folder in DEIT_JAX_CACHE"
        ) from error


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018
    except ValueError as error:
        raise InputError(f"{url!r}: not a valid URL ({brief(error)})") from error
    if re.search(r"[^!-~]", url) or not parts.hostname or "@" in parts.netloc:
        raise InputError(
            f"{url!r}: expected https://HOST/FILE in printable ASCII, without a user name or "
            "password; percent-encode other characters"
        )
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in _LOOPBACK):
        raise InputError(f"{url}: {parts.scheme}:// is not safe for weights; use an https:// URL")


def _file_name(url: str) -> str:
    last = re.split(r"[/\\]", unquote(urlsplit(url).path))[-1]
    name = re.sub(r"[^A-Za-z0-9._+-]", "_", last)[-128:].lstrip(".")
    if not name:
        raise InputError(f"{url}: no file name at the end of the URL; expected https://HOST/FILE")
    return name


def _wrong_hash(file: str | Path, name: str) -> str:
    """Returns the file's SHA-256 where `name` promises another, as torch.hub writes it, or ""."""
    promised = re.search(r"-([0-9a-fA-F]{8,64})(\.[A-Za-z]\w*)+$", name)
    if not promised:
        return ""
    found = sha256(file)
    return "" if found.startswith(promised[1].lower()) else found


def sha256(file: str | Path) -> str:
    """Returns the SHA-256 of a file's content, in hex digits."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _root(error: BaseException) -> BaseException:
    """Returns the first error of a chain, which says in fewest words what happened."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _from_hub(src: str, cache: str | os.PathLike | None) -> Path:
    found = re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", src, re.ASCII)
    if not found:
        raise InputError(f"{src!r}: expected hf:OWNER/NAME or hf:OWNER/NAME@REVISION")
    repo, revision = found.groups()
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise InputError(f"{src}: needs huggingface_hub; pip install 'deit-jax[hub]'") from error
    snapshot = functools.partial(
        hub.snapshot_download, repo, revision=revision, cache_dir=cache and Path(cache) / "hub"
    )
    try:
        info = hub.model_info(repo, revision=revision, timeout=_TIMEOUT)
        names = [file.rfilename for file in info.siblings or ()]
        weights = [name for name in WEIGHTS if name in names]
        indices = [name for name in INDICES if name in names]
        if not weights and not indices:
            listed = textwrap.shorten(", ".join(sorted(names)), 200, placeholder=" ...")
            raise InputError(
                f"{src}: neither {' nor '.join(WEIGHTS)} in the repository, nor the index of such "
                f"in several files; found {listed or 'nothing'}"
            )
        snapshot(allow_patterns=CONFIGS)  # first: where there are weights, nothing is missing
        if not weights:
            stem, suffix = indices[0].removesuffix(".index.json").split(".")
            snapshot(allow_patterns=f"{stem}-*.{suffix}")
        folder = Path(snapshot(allow_patterns=(weights or indices)[0]))
        _check_blobs(folder, src)
        return folder
    except InputError:
        raise
    except Exception as error:  # of httpx, requests or its own, as the version of the hub has it
        if is_bug(error):
            raise
        status = getattr(getattr(error, "response", None), "status_code", 500)
        if status < 500 or isinstance(error, hub.errors.HFValidationError):
            raise InputError(
                f"{src}: refused by the hub ({brief(error)}); check the name; for a gated or "
                "private repository accept its terms there and run `hf auth login`"
            ) from error
        with contextlib.suppress(Exception):  # of any type, as above
            folder = Path(snapshot(local_files_only=True))
            if any((folder / name).is_file() for name in (*WEIGHTS, *INDICES)):
                log_error(f"{src}: no answer from the hub; using the cached copy")
                return folder
        raise TransientError(
            f"{src}: no answer from the hub ({brief(error)}); check the name and the network"
        ) from error


def _check_blobs(folder: Path, src: str) -> None:
    """Compares files with the SHA-256 that the hub gives of large ones, and names its copies by."""
    for file in folder.iterdir():
        blob = file.resolve()
        if re.fullmatch("[0-9a-f]{64}", blob.name) and blob.name != sha256(blob):
            raise InputError(
                f"{src}: {file.name} does not have the SHA-256 that the hub gave for it; remove "
                f"{blob} and run again"
            )

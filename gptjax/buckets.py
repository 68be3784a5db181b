"""Files in an object store, by URL: gs://, s3:// or another protocol of fsspec.

An object appears whole or not at all, and cannot be appended to. While the store does not answer, a request is repeated
for `PATIENCE` seconds, with a warning; a refusal (no such bucket, no permission) is a UserError.
"""

import contextlib
import fnmatch
import hashlib
import io
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from gptjax import files
from gptjax.errors import RunError, UserError

PATIENCE = 600.0  # seconds for which requests to a store that does not answer are repeated
SILENCE = 10.0  # seconds after which a request without an answer gives a warning
_PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0)  # seconds between repeated requests; after that always the last
_PARALLEL = 8  # files that are read or written at once
_PIECE = 4 << 20  # bytes of an object that are read at once
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://.*", re.DOTALL)
_NAME = re.compile(r"[a-z0-9][-a-z0-9_.]{1,220}[a-z0-9]")  # a bucket of Google Cloud Storage
_PACKAGES = {"gs": "gptjax[gcs]", "gcs": "gptjax[gcs]", "s3": "gptjax[s3]"}
_REFUSED = {
    401: "there are no credentials that it accepts",
    403: "there is no permission",
    404: "there is no such bucket or object",
}
_SIGN_IN = {
    "gs": "`gcloud auth application-default login`, or name a key file in GOOGLE_APPLICATION_CREDENTIALS",
    "s3": "`aws configure`, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
}


def cache() -> Path:
    """The directory of local copies of object stores, in $GPTJAX_CACHE or ~/.cache/gptjax."""
    return files.cache().absolute() / "buckets"


def is_url(text: str | Path) -> bool:
    return bool(_URL.fullmatch(os.fspath(text)))


class Object(NamedTuple):
    """An object in a listing.

    Attributes:
      size: bytes.
      md5: hexadecimal; "" if the store does not give it.
      modified: seconds since 1970 by the clock of the store; None if it does not give it.
    """

    size: int
    md5: str
    modified: float | None


class Bucket:
    """The objects under one URL; names are relative to it. Methods raise UserError and RunError that name the URL."""

    def __init__(self, url: str, *, patience: float | None = None):
        """`patience`: seconds for which requests without an answer are repeated; default: PATIENCE."""
        self.url, self._patience = url.rstrip("/"), PATIENCE if patience is None else patience
        self.scheme, _, self._root = url.partition("://")
        self._root = self._root.rstrip("/")
        if not self._root:
            raise UserError(f"{url!r} names no bucket; write {self.scheme}://BUCKET/PATH")
        name = self._root.partition("/")[0]
        if self.scheme in ("gs", "gcs") and not _NAME.fullmatch(name):
            raise UserError(f"{url!r}: {name!r} is not the name of a bucket: 3 or more of a-z, 0-9, -, _ and .")
        if "\0" in url or any(part in (".", "..", "") for part in self._root.split("/")):
            raise UserError(f"{url!r} is not a URL of objects: it has an empty name, '.', '..' or a character NUL")
        self._system = self._open()

    def _open(self) -> Any:
        options: dict[str, Any] = {"use_listings_cache": False}
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # its errors are reported by `_ask`
        if self.scheme in ("gs", "gcs") and os.environ.get("STORAGE_EMULATOR_HOST"):
            options["token"] = "anon"
        try:
            import fsspec

            return fsspec.filesystem(self.scheme, **options)
        except (ImportError, ValueError) as error:
            package = _PACKAGES.get(self.scheme)
            hint = f"; pip install '{package}'" if package else ""
            raise UserError(f"{self.url} cannot be opened: {_line(error)}{hint}") from None
        except Exception as error:  # each store raises its own
            raise self._refusal(error) or UserError(f"{self.url} cannot be opened: {_line(error)}") from None

    def __truediv__(self, name: str) -> str:
        return f"{self.url}/{name}"

    def list(self, below: str = "") -> dict[str, Object]:
        """All objects below a name. Raises UserError if there is no such bucket."""
        place = f"{self._root}/{below}".rstrip("/")

        def listed() -> dict[str, Any]:
            try:
                return self._system.find(place, detail=True)
            except FileNotFoundError:
                if self._system.exists(self._root.partition("/")[0]):
                    return {}
                raise

        found = self._ask(listed)
        prefix = f"{self._root}/"
        names = {name.removeprefix("/"): info for name, info in found.items()}
        return {
            name.removeprefix(prefix): _object(info)
            for name, info in sorted(names.items())
            if name.startswith(prefix) and not name.endswith("/")
        }

    def read(self, name: str) -> bytes | None:
        """The content of an object; None if it does not exist."""

        def content() -> bytes | None:
            try:
                return self._system.cat_file(f"{self._root}/{name}")
            except FileNotFoundError:
                return None

        return self._ask(content)

    def modified(self, name: str) -> float | None:
        """When an object was last written, by the clock of the store; None if it is missing or no time is given."""

        def time() -> float | None:
            try:
                return _object(self._system.info(f"{self._root}/{name}")).modified
            except FileNotFoundError:
                return None

        return self._ask(time)

    def sha256(self, name: str) -> str:
        """sha256 of an object; reads all of it."""
        with self.open(name) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def open(self, name: str) -> io.BufferedReader:
        """An object as a seekable file, read in pieces. Raises UserError if it does not exist."""
        place = f"{self._root}/{name}"
        size = int(self._ask(lambda: self._system.info(place))["size"])

        def part(begin: int, end: int) -> bytes:
            return self._ask(lambda: self._system.cat_file(place, begin, end))

        return io.BufferedReader(_Content(part, size), _PIECE)

    def glob(self, pattern: str) -> dict[str, dict[str, Any]]:
        """{name: the store's information} of the objects that match; names are relative to the URL."""
        found = self._ask(lambda: self._system.glob(f"{self._root}/{pattern}", detail=True))
        return {
            name.removeprefix("/").removeprefix(f"{self._root}/"): info
            for name, info in sorted(found.items())
            if info["type"] == "file"
        }

    def write(self, name: str, data: bytes) -> None:
        self._ask(lambda: self._system.pipe_file(f"{self._root}/{name}", data))

    def try_writing(self, name: str) -> None:
        """Raises UserError where an object of this name could not be written, before the work that makes it."""
        trial = files.beside(Path(name)).name
        self.write(trial, b"")
        self.remove([trial])

    def create(self, name: str, data: bytes) -> bool:
        """Writes an object if there is none of this name; returns whether it now has this content.

        Of several writers at once one wins: the first, or the last where an emulator ignores conditions on a write.
        """
        place = f"{self._root}/{name}"

        def made() -> bool:
            try:
                if self._system.exists(place):
                    return False
                self._system.pipe_file(place, data, mode="create")
            except FileExistsError:
                pass
            except Exception as error:
                if getattr(error, "code", None) not in (409, 412) and _status(error) not in (409, 412):
                    raise
            return self._system.cat_file(place) == data

        return self._ask(made)

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                self._ask(lambda name=name: self._system.rm_file(f"{self._root}/{name}"), missing=FileNotFoundError)

    def move(self, before: str, after: str) -> None:
        """Renames all objects below a name: they are copied, then removed."""
        names = list(self.list(before))
        for name in names:
            there = f"{self._root}/{after}{name.removeprefix(before)}"
            self._ask(lambda name=name, there=there: self._system.cp_file(f"{self._root}/{name}", there))
        self.remove(names)

    def get(self, names: Iterable[str], directory: Path) -> None:
        """Reads objects into files of the same names under a directory; each appears whole."""

        def one(name: str) -> None:
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with files.about(path):
                partial = files.beside(path)
                try:
                    self._ask(lambda: self._system.get_file(f"{self._root}/{name}", str(partial)))
                    partial.replace(path)
                finally:
                    partial.unlink(missing_ok=True)

        self._each(one, names)

    def put(self, names: Iterable[str], directory: Path) -> None:
        """Writes files under a directory to objects of the same names."""
        self._each(
            lambda name: self._ask(lambda: self._system.put_file(str(directory / name), f"{self._root}/{name}")), names
        )

    def _each(self, act: Callable[[str], None], names: Iterable[str]) -> None:
        with ThreadPoolExecutor(_PARALLEL) as pool:
            list(pool.map(act, names))

    def _ask(self, request: Callable[[], Any], *, missing: type[BaseException] | tuple = ()) -> Any:
        """The answer to a request, which is repeated while the store does not answer."""
        begin, tries, told = time.monotonic(), 0, threading.Event()

        def tell(reason: str) -> None:
            if not told.is_set():
                told.set()
                wait = f"waiting, {self._patience:.0f} s at most"
                print(f"warning: {self.url} does not answer: {reason}; {wait}", file=sys.stderr)

        while True:
            try:
                with _after(SILENCE, lambda: tell(f"nothing for {SILENCE:.0f} s")):
                    answer = request()
                if told.is_set():
                    print(f"{self.url} answers again after {time.monotonic() - begin:.0f} s", file=sys.stderr)
                return answer
            except missing:
                raise
            except Exception as error:  # each store raises its own
                if isinstance(error, OSError) and error.filename and not is_url(str(error.filename)):
                    raise  # an error of this machine's disk
                if refusal := self._refusal(error):
                    raise refusal from None
                if time.monotonic() - begin >= self._patience:
                    raise RunError(
                        f"{self.url} has not answered for {self._patience:.0f} s: {_line(error)}. Nothing that is "
                        "there is lost; the same command continues"
                    ) from error
                tell(_line(error))
                time.sleep(_PAUSES[min(tries, len(_PAUSES) - 1)])
                tries += 1

    def _refusal(self, error: BaseException) -> UserError | None:
        """The error for a request that would always be refused; None for a store that does not answer."""
        name, status = type(error).__name__, _status(error)
        if isinstance(error, FileNotFoundError):
            status = 404
        elif isinstance(error, PermissionError) or str(error).startswith("Forbidden: "):  # an OSError of gcsfs
            status = 403
        elif "Credential" in name or name in ("RefreshError", "TokenRetrievalError"):
            status = 401
        if status not in _REFUSED:
            return None
        bucket = f"{self.scheme}://{self._root.partition('/')[0]}"
        advice = {404: f"make the bucket {bucket}, or correct its name"}.get(status)
        sign_in = _SIGN_IN.get(self.scheme, "sign in")
        return UserError(f"{self.url}: {_REFUSED[status]}: {_line(error)}; {advice or sign_in}")


def copied(url: str, patterns: Sequence[str]) -> Path:
    """A directory in the cache with the objects directly under a URL whose names match a pattern.

    Its name is a hash of their listing, so a copy never changes. Raises UserError if no object matches.
    """
    bucket = Bucket(url)
    found = {
        name: there for name, there in bucket.list().items() if any(fnmatch.fnmatchcase(name, p) for p in patterns)
    }
    if not found:
        raise UserError(f"{url} has no file of a model, such as {', '.join(patterns[:3])}")
    text = repr((bucket.url, sorted(found.items())))
    directory = cache() / f"copy-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    cache().mkdir(parents=True, exist_ok=True)
    if not directory.exists():
        with files.whole_directory(directory) as partial:
            bucket.get(found, partial)
    return directory


class _Content(io.RawIOBase):
    """An object as a file. `read(begin, end)` returns these bytes of it."""

    def __init__(self, read: Callable[[int, int], bytes], size: int):
        self._read, self._size, self._at = read, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        data = self._read(self._at, end)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


@contextlib.contextmanager
def _after(seconds: float, act: Callable[[], None]) -> Iterator[None]:
    """Calls `act` if the body takes longer than `seconds`."""
    timer = threading.Timer(seconds, act)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def file_md5(path: Path) -> str:
    """md5 of a file, hexadecimal, as object stores give it for an object."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _object(info: dict[str, Any]) -> Object:
    import base64

    md5 = ""
    if encoded := info.get("md5Hash"):  # Google's
        md5 = base64.b64decode(encoded).hex()
    elif re.fullmatch(r'"?[0-9a-f]{32}"?', tag := str(info.get("ETag", ""))):  # Amazon's, of an object of one part
        md5 = tag.strip('"')
    modified = next((info[name] for name in ("mtime", "LastModified", "updated", "created") if info.get(name)), None)
    seconds = modified.timestamp() if hasattr(modified, "timestamp") else None
    return Object(int(info.get("size") or 0), md5, seconds)


def _status(error: BaseException) -> int | None:
    """The HTTP status of an error, if it has one."""
    code = getattr(error, "code", None) or getattr(error, "status", None)
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        code = response.get("ResponseMetadata", {}).get("HTTPStatusCode", code)
    return int(code) if str(code).isdigit() else None


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:200]

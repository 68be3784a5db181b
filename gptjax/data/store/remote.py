"""A token store in an object store: small files are copied when it is opened, a shard when it is first read.

Copies are kept in the cache, in a directory named after the URL and the manifest: a new store at the same URL gets
another directory.
"""

import hashlib
from pathlib import Path

from filelock import FileLock

from gptjax.buckets import Bucket, cache
from gptjax.errors import UserError

_SHARD = ".bin"  # the suffix of large files


def directory_of(url: str, manifest: bytes) -> Path:
    """The directory for copies of the store at a URL with this manifest."""
    return cache() / f"store-{hashlib.sha256(url.rstrip('/').encode() + manifest).hexdigest()[:16]}"


def mirrored(url: str, manifest: str) -> tuple[Path, dict[str, int]]:
    """(directory with copies of all files of a store but its shards, {file at the URL: bytes}).

    `manifest`: the name of its manifest. Raises UserError if there is no store.
    """
    bucket = Bucket(url)
    content = bucket.read(manifest)
    if content is None:
        bucket.list()  # raises UserError if there is no bucket
        raise UserError(f"{url} is not a token store: it has no {manifest}; make one with gptjax prepare")
    directory = directory_of(url, content)
    sizes = {name: found.size for name, found in bucket.list().items()}
    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(directory / ".lock"):
        small = [name for name in sizes if not name.endswith(_SHARD)]
        bucket.get([name for name in small if not (directory / name).is_file()], directory)
    return directory, sizes


def fetch(url: str, path: Path, sha256: str) -> None:
    """Copies a shard, the file of a URL, to `path`, unless it is there. Raises UserError if it is damaged."""
    place, _, name = url.rpartition("/")
    with FileLock(path.with_name(f".{path.name}.lock")):
        if path.is_file():
            return
        partial = path.parent / ".fetched" / name
        Bucket(place).get([name], partial.parent)
        with partial.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            partial.unlink()
            raise UserError(f"the token store is damaged at {url}: its sha256 is {found}, the manifest says {sha256}")
        partial.replace(path)


def publish(directory: Path, url: str, *, first: str, last: str) -> None:
    """Writes a store to a URL and moves it to the copies.

    Args:
      first: the file that identifies source and options, so that an interrupted upload can be continued.
      last: the manifest, without which it is not a store.
    """
    bucket = Bucket(url)
    names = [path.relative_to(directory).as_posix() for path in sorted(directory.rglob("*")) if path.is_file()]
    for part in ([first], [name for name in names if name not in (first, last)], [last]):
        bucket.put(part, directory)
    final = directory_of(url, (directory / last).read_bytes())
    if not final.exists():
        directory.replace(final)

"""Files by path, and objects by URL through fsspec: what batch inference needs of both."""

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from .io import atomic_write
from .optional import import_optional


class StorageError(OSError):
    """An object that cannot be listed, read or written: its connection, not its content."""


@contextlib.contextmanager
def _errors_named(url: str, action: str) -> Iterator[None]:
    """Raise errors of a driver, which are of every type, as StorageError with the URL."""
    try:
        yield
    except (StorageError, ImportError):  # a driver that is missing
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise StorageError(f"{url} cannot be {action}: {reason}") from error


@dataclass(frozen=True, order=True)
class RemotePath:
    """An object or a folder by URL, such as s3://bucket/photos; pickles as the URL."""

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self.url.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        return PurePosixPath(self.url.partition("://")[2]).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    def relative_to(self, folder: "RemotePath") -> str:
        """Return the rest of the URL of an object in a folder."""
        return self.url.removeprefix(f"{folder.url.rstrip('/')}/")

    def _resolve(self) -> tuple[Any, str]:
        """The file system, which fsspec keeps for each server, and the path in it."""
        return import_optional("fsspec.core", "infer", self.url).url_to_fs(self.url)

    def exists(self) -> bool:
        with _errors_named(self.url, "reached"):
            system, path = self._resolve()
            system.invalidate_cache()  # of listings, in which other processes write
            return system.exists(path)

    def size(self) -> int:
        with _errors_named(self.url, "read"):
            system, path = self._resolve()
            return int(system.size(path))

    def glob(self) -> list["RemotePath"]:
        """Return the objects that a URL with * matches, sorted."""
        with _errors_named(self.url, "listed"):
            system, path = self._resolve()
            scheme = self.url.partition("://")[0]
            paths = sorted(system.glob(path))
        return [RemotePath(p if "://" in p else f"{scheme}://{p}") for p in paths]

    def find(self) -> list["RemotePath"]:
        """Return all objects below a folder, sorted; none if there is no such folder."""
        with _errors_named(self.url, "listed"):
            system, path = self._resolve()
            system.invalidate_cache()
            root = system._strip_protocol(path).rstrip("/") + "/"
            return sorted(self / name.removeprefix(root) for name in system.find(path))

    def open(self) -> IO[bytes]:
        """Open an object for reading, and read on demand; errors name it."""
        with _errors_named(self.url, "read"):
            system, path = self._resolve()
            return io.BufferedReader(_Stream(self.url, system.open(path, "rb")), 1 << 20)

    def read_bytes(self) -> bytes:
        with _errors_named(self.url, "read"):
            system, path = self._resolve()
            return system.cat_file(path)

    def write_bytes(self, content: bytes) -> None:
        """Write an object that is complete or absent: a transaction of fsspec."""
        with _errors_named(self.url, "written"):
            system, path = self._resolve()
            system.makedirs(system._parent(path), exist_ok=True)
            with system.transaction, system.open(path, "wb") as file:
                file.write(content)


class _Stream(io.RawIOBase):
    """A remote file whose errors name its URL."""

    def __init__(self, url: str, file: IO[bytes]):
        self.url = url
        self.file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.file.tell()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        with _errors_named(self.url, "read"):
            content = self.file.read(memoryview(buffer).nbytes)
        memoryview(buffer)[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self.file.close()
        super().close()


Location = Path | RemotePath


def location(name: str) -> Location:
    """Return the path, or for a URL the remote path."""
    return RemotePath(name) if "://" in name else Path(name)


def open_binary(path: Location) -> IO[bytes]:
    """Open a file or an object for reading."""
    return path.open() if isinstance(path, RemotePath) else open(path, "rb")


def size_of(path: Location) -> int:
    """Return the size of a file or an object in bytes."""
    return path.size() if isinstance(path, RemotePath) else path.stat().st_size


def write_complete(path: Location, content: bytes) -> None:
    """Write a file or an object that is complete or absent, whatever happens."""
    if isinstance(path, RemotePath):
        path.write_bytes(content)
        return
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def names_in(folder: Location) -> set[str]:
    """Return the names of the files directly in a folder; none if there is no folder."""
    if isinstance(folder, RemotePath):
        return {path.relative_to(folder) for path in folder.find()}
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()

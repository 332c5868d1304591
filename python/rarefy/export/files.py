"""Files and folders that appear under their names whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


class Staged:
    """A hidden folder beside the files that it will become."""

    def __init__(self, folder: Path, path: Path) -> None:
        self.folder, self.path = folder, path

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def commit(self, *names: str) -> None:
        """Moves files, or a folder, to where they belong, in this order; if one cannot be moved, what was there comes back."""
        places: list[tuple[Path, Path | None]] = []  # with what was there, where it had to go aside
        try:
            for name in names:
                final, before = self.path.parent / name, None
                # The last file takes the place of another one in one step, which a folder cannot.
                if final.exists() and (final.is_dir() or name != names[-1]):
                    before = self.folder / f"{name}.before"
                    os.replace(final, before)
                places.append((final, before))
                os.replace(self.folder / name, final)
        except OSError:
            for final, before in reversed(places):
                if before is not None:
                    os.replace(before, final)
                elif final.name != names[-1]:
                    final.unlink(missing_ok=True)
            raise


def check_path(function: str, path: str | os.PathLike[str], *, folder: bool = False) -> Path:
    """The path, checked for being one that a file (or folder) can be renamed to.

    Raises:
        TypeError: it is no path.
        OSError: a folder has that name (for a folder: a file), it ends in a separator, or the folder around it is missing.
    """
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise TypeError(f"[{function}] path must be a string or a pathlib.Path, got {path!r}")
    path = Path(text)
    if folder and path.exists() and not path.is_dir():
        raise NotADirectoryError(f"[{function}] path must name a folder, got a file: {text}")
    if not folder and (path.is_dir() or text.endswith(tuple(filter(None, (os.sep, os.altsep))))):
        raise IsADirectoryError(f"[{function}] path must name a file, got a folder: {text or path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"[{function}] path must be in a folder that exists, got {path}")
    return path


@contextlib.contextmanager
def staged(function: str, path: str | os.PathLike[str], *, folder: bool = False) -> Iterator[Staged]:
    """A folder for what is being made, in the folder of `path`; removed at the end with what is left in it.

    Raises:
        TypeError, OSError: see `check_path`; or the folder cannot be written. Nothing is left then.
    """
    path = check_path(function, path, folder=folder)
    try:
        hidden = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        message = f"[{function}] path must be in a folder that can be written, got {path} ({error})"
        raise type(error)(message) from error
    try:
        yield Staged(hidden, path)
    finally:
        shutil.rmtree(hidden)

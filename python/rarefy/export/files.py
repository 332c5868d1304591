"""Files that appear under their names whole or not at all."""

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
        """Moves files to where they belong, in this order; when one cannot be moved, what was there before comes back."""
        moved: list[tuple[Path, Path | None]] = []
        try:
            for name in names[:-1]:
                final, before = self.path.parent / name, None
                if final.exists():
                    before = self.folder / f"{name}.before"
                    os.replace(final, before)
                moved.append((final, before))
                os.replace(self.folder / name, final)
            os.replace(self.folder / names[-1], self.path.parent / names[-1])
        except OSError:
            for final, before in reversed(moved):
                if before is not None:
                    os.replace(before, final)
                else:
                    final.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def staged(function: str, path: str | os.PathLike[str]) -> Iterator[Staged]:
    """A folder for files that are being made, in the folder of `path`; removed at the end with what is left in it.

    Raises:
        OSError: path names a folder, or is in one that does not exist or cannot be written. Nothing is left then.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"[{function}] path must name a file, got the folder {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"[{function}] path must be in a folder that exists, got {path}")
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        message = f"[{function}] path must be in a folder that can be written, got {path} ({error})"
        raise type(error)(message) from error
    try:
        yield Staged(folder, path)
    finally:
        shutil.rmtree(folder)

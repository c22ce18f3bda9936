"""The folder of a run: one process at a time writes to it, and a refused run leaves none behind."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from echogen.commands.output import InputError, make_folder

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]


@contextmanager
def run_folder(out: Path) -> Iterator[None]:
    """Make a run's folder and lock it within the block. Folders that were made for it are removed
    afterwards if nothing was written in them.

    Raises:
        InputError: the folder cannot be made or written to, or another process has locked it.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file; name a folder for the run")
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    make_folder(out)
    try:
        with held(out, f"--out {out}"):
            yield
    finally:
        with contextlib.suppress(OSError):  # at the first that is not empty
            for folder in made:
                folder.rmdir()


@contextmanager
def held(folder: Path, name: str) -> Iterator[None]:
    """Lock a folder against other processes. The lock ends with the process, however that ends, so
    a file ``lock`` left by a killed process blocks no one. Raises InputError, with the name."""
    if fcntl is None:
        yield
        return
    path = folder / "lock"
    with _locked(path, name) as file:
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _locked(path: Path, name: str) -> TextIO:
    """Return the file, locked."""
    while True:
        file = open(path, "a+")  # noqa: SIM115 - the caller's, for as long as it holds the lock
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, path):
                return file
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
            file.close()
            raise InputError(
                f"{name}: a run is under way there (process {holder or 'unknown'}); wait for it or "
                f"stop it, or name another"
            ) from None
        except OSError:  # a file system without locks
            return file
        file.close()


def _is_at(file: TextIO, path: Path) -> bool:
    """Whether the file still has its name: its last holder may have removed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False

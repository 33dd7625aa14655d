"""Locks that let only one program at a time write in a folder, on one machine or on several that share a disk.

The lock is one of the operating system on an open file (`flock`), which ends with its process however that ends, so a
lock is never stale. The main process takes it exclusively, then shares it with the other processes of its program, and
the folder is free when the last of them has ended. The file also says who they are, for the message to the next one.
"""

import contextlib
import errno
import fcntl
import os
import socket
import time
from pathlib import Path

from common.config import SettingsError, explained

FILE = ".lock"
PATIENCE = 30.0  # seconds until a file that was written on one node must be seen by another; NFS caches names so long

_held: dict[Path, int] = {}  # folders that this process has locked, and the descriptors of the open files


def lock(folder: Path, token: str) -> None:
    """Lock an existing folder for this program, until `release` or the end of its last process.

    Args:
        folder: the folder; if this process has locked it already, nothing happens.
        token: a text by which the other processes of this program recognize the lock.

    Raises:
        SettingsError: if another program has locked the folder, or it cannot be written.
    """
    if folder.resolve() in _held:
        return
    with explained(f"{folder} cannot be written"):
        file = os.open(folder / FILE, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            if not (_locked(file, fcntl.LOCK_EX) and _locked(file, fcntl.LOCK_SH)):  # another one may win in between
                raise SettingsError(
                    f"{folder} is in use by {_holder(folder)}: wait for its end, or give another --name"
                )
            os.ftruncate(file, 0)
            _sign(file, token)
        except BaseException:
            os.close(file)
            raise
    _held[folder.resolve()] = file


def join(folder: Path, token: str) -> None:
    """Share the lock that the main process of this program has taken with the same token.

    Raises:
        SettingsError: if this process does not see the lock in the folder within `PATIENCE`.
    """
    if folder.resolve() in _held:
        return
    deadline = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(OSError):
            if (folder / FILE).read_text().startswith(token):
                break
        if time.monotonic() > deadline:
            raise SettingsError(
                f"{folder} on {socket.gethostname()} is not the folder in which the main process writes: "
                "--runs must be on a disk that all nodes share"
            )
        time.sleep(0.2)
    with explained(f"{folder} cannot be written"):
        file = os.open(folder / FILE, os.O_RDWR | os.O_APPEND)
        _locked(file, fcntl.LOCK_SH)
        _sign(file, "")
    _held[folder.resolve()] = file


def release() -> None:
    """Unlock all folders that this process has locked."""
    while _held:
        os.close(_held.popitem()[1])


def _locked(file: int, kind: int) -> bool:
    """Lock an open file without waiting, and return whether that succeeded or the file system knows no locks."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            print(
                "this file system has no locks: nothing keeps a second program from writing to the same run", flush=True
            )
            return True
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        return False
    return True


def _sign(file: int, token: str) -> None:
    """Append the token, the process and the host, in one write, so that lines of several processes do not mix."""
    os.write(file, f"{token} {os.getpid()} {socket.gethostname()}\n".encode())
    os.fsync(file)


def _holder(folder: Path) -> str:
    """Return the processes that have signed a lock and, as far as can be seen from here, still live."""
    living = []
    for line in (folder / FILE).read_text(errors="replace").splitlines():
        *_, pid, host = ["", "", *line.split()]
        with contextlib.suppress(ProcessLookupError, ValueError, OverflowError):
            if host == socket.gethostname():
                with contextlib.suppress(PermissionError):  # it lives, and belongs to another user
                    os.kill(int(pid), 0)
            living.append(f"process {pid} on {host}")
    return ", ".join(living[:8]) or "another program"


def _forget() -> None:
    """Close the inherited files in a forked process, such as a data-loading worker, which may outlive the program."""
    release()


os.register_at_fork(after_in_child=_forget)

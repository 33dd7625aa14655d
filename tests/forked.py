"""Work in forked processes, which need no imports of their own and can be killed."""

import contextlib
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path


def fork(work: Callable[[], object], output: Path, **environment: str) -> int:
    """Start the work in a forked process that prints to a file, and return its pid."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code: object = 1
    try:
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.environ.update(environment)
        work()
        code = 0
    except SystemExit as ended:
        code = ended.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0)


def ended(pid: int) -> int:
    """Wait for a process, and return its exit code, or the negative number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def ranks(world_size: int) -> list[dict[str, str]]:
    """Return the environments by which as many processes on this machine find each other, as torchrun sets them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    own = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [own | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


def until(condition: Callable[[], object], *, of: int) -> None:
    """Wait until a condition holds while a process lives."""
    while not condition():
        assert os.waitpid(of, os.WNOHANG) == (0, 0), "the process ended before"
        time.sleep(0.005)

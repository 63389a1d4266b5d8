"""Where the ranks of one node meet: a Unix socket, in a directory that belongs to this user alone."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import stat
import struct
import sys
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path

from shardtool.errors import UsageError, reason

JOB = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_STEP_ID")
SHARED = "set TMPDIR to a short path that all ranks of this node share, or SHARDTOOL_STORE=torch"


def socket_path(environment: Mapping[str, str] = os.environ) -> Path:
    """Where this job's ranks meet: TMPDIR/shardtool-UID/, which nobody else can write to. UsageError where they can."""
    given = environment.get("TMPDIR", "")
    directory = Path(
        given if Path(given).is_absolute() and Path(given).is_dir() else "/tmp", f"shardtool-{os.getuid()}"
    )
    job = json.dumps([environment.get(name) for name in JOB]).encode()
    path = directory / f"{sha256(job).hexdigest()[:16]}.sock"
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        found = directory.lstat()
    except OSError as error:
        raise _no_socket(path, error) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise UsageError(
            "the directory of the ranks' socket is not safe",
            where=str(directory),
            expected=f"a directory of user {os.geteuid()} with mode 700: others could pose as a rank",
            found=f"user {found.st_uid}, mode {stat.S_IMODE(found.st_mode):o}"
            + ("" if stat.S_ISDIR(found.st_mode) else ", no directory"),
            hint="remove it, set TMPDIR to another directory, or SHARDTOOL_STORE=torch",
        )
    return path


@contextlib.contextmanager
def alone(directory: Path) -> Iterator[None]:
    """One process at a time makes or removes sockets here. Brief, and a process that is killed lets go of it."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def listen(path: Path) -> tuple[socket.socket, int]:
    """A new socket that listens, and its inode. What dead processes have left in its directory goes."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        with alone(path.parent):
            for other in path.parent.glob("*.sock"):
                holder = _holder(other)
                if not holder:
                    other.unlink(missing_ok=True)
                elif other == path:
                    raise UsageError(
                        "another run of the same job is under way",
                        where=str(path),
                        found=f"{holder} on {os.uname().nodename}",
                        hint="wait until it is done, or give this run another MASTER_PORT",
                    )
            listener.bind(str(path))
            listener.listen(1024)
            return listener, path.stat().st_ino
    except OSError as error:
        listener.close()
        raise _no_socket(path, error) from error
    except UsageError:
        listener.close()
        raise


def _holder(path: Path) -> str:
    """The process that listens at a socket, in words; empty where none does."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return ""
        except OSError:
            return "a process"  # that has more guests than it can greet
        if sys.platform == "linux":
            credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            return f"process {struct.unpack('3i', credentials)[0]}"
        return "a process"


def _no_socket(path: Path, error: OSError) -> UsageError:
    return UsageError("the ranks' socket cannot be made", where=str(path), found=reason(error), hint=SHARED)

"""The process that runs the commands: limited, watched, and thrown away when it misbehaves.

Reads one JSON line per run from stdin, {"arguments": [...], "directory": DIR}, and answers with one on stdout.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import traceback
from pathlib import Path

SPACE = 3 << 30  # address space; what counts is the peak of resident memory, which the campaign looks at
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "socket.connect",
             "pickle.find_class", "ctypes.dlopen", "webbrowser.open", "os.startfile", "pty.spawn")  # fmt: skip


def main() -> None:
    """Serve until stdin ends."""
    import ml_dtypes  # noqa: F401
    import numpy  # noqa: F401

    from commands import command
    from shardtool import convert, inspect  # noqa: F401 - so that imports do not count as what a file does
    from shardtool.checkpoint import huggingface  # noqa: F401

    seen: list[str] = []
    watching = False

    def hook(event: str, args: tuple[object, ...]) -> None:
        if not watching:
            return
        if event in FORBIDDEN:
            seen.append(f"{event} {args!r:.100}")
        if (
            event == "import"
            and not str(args[0]).startswith(("shardtool", "numpy", "ml_dtypes", "isal", "encodings", "_"))
            and str(args[0]).partition(".")[0] not in sys.stdlib_module_names
        ):
            seen.append(f"import {args[0]}")

    command("inspect", os.devnull)  # whatever is imported by a command is here before anything is watched
    sys.addaudithook(hook)
    resource.setrlimit(resource.RLIMIT_AS, (SPACE, SPACE))
    for line in sys.stdin:
        task = json.loads(line)
        seen.clear()
        os.chdir(task["directory"])
        Path("/proc/self/clear_refs").write_text("5")
        watching = True
        failure = ""
        try:
            result = command(*task["arguments"])
            answer = {"code": result.code, "out": result.out[-2000:], "err": result.err[-6000:]}
        except BaseException:
            failure = traceback.format_exc()
            answer = {"code": -1, "out": "", "err": failure[-6000:]}
        watching = False
        status = Path("/proc/self/status").read_text()
        peak = next(int(row.split()[1]) for row in status.splitlines() if row.startswith("VmHWM"))
        sys.stdout.write(json.dumps({**answer, "peak": peak << 10, "seen": seen}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

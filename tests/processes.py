"""Whether the processes that a test has started, and theirs, have ended: a variable marks them."""

import time
from pathlib import Path

MARK = "MAGI_TEST_FOLDER"
"""Set it to the test's folder in the environment of what is started."""


def all_ended(folder):
    """Return True once no process has this folder in its environment; a killed one takes time."""
    deadline = time.monotonic() + 60
    while found := running(folder):
        if time.monotonic() > deadline:
            return found
        time.sleep(0.02)
    return True


def running(folder):
    found = []
    for each in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={folder}".encode() in (each / "environ").read_bytes():
                found.append(int(each.name))
        except OSError:
            continue
    return found

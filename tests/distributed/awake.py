"""Keeps the processor's cores from sleeping while ranks pass messages.

A virtual machine gives an idle core back to its host; to wake it, for a message that has come, costs up to milliseconds,
many times what the message does. One process a core that never rests, at idle priority, so that it runs only where nothing
else wants to: tests on ranks then take half their time. Linux has that priority; elsewhere nothing happens.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

MOST = 8  # cores: as many as there are ranks
# Ends by itself when the process that began it is gone, however that ended.
SPIN = """\
import os, sys
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
while os.getppid() == int(sys.argv[1]):
    for _ in range(10**5):
        pass
"""


@contextlib.contextmanager
def awake() -> Iterator[None]:
    """No core sleeps inside."""
    cores = min(MOST, len(os.sched_getaffinity(0))) if hasattr(os, "SCHED_IDLE") else 0
    spinning = [subprocess.Popen([sys.executable, "-S", "-c", SPIN, str(os.getpid())]) for _ in range(cores)]
    try:
        yield
    finally:
        for one in spinning:
            one.kill()
            one.wait()

"""Processes that are forked from one that has imported everything, and killed in the middle of their work."""

import os
import signal
import sys
import time


def forked(work):
    """A process that does this silently; what it returns is the exit status."""
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w") as sys.stdout, open(os.devnull, "w") as sys.stderr:
            os._exit(work())
    return child


def waited(child):
    """What ended a process: its exit status, or less than 0 the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def ended(child, is_due, delay, pause):
    """Kill a process `delay` seconds after something is due, or before, if it ends by itself; what ended it.

    Args:
        child: of `forked`.
        is_due: asked every `pause` seconds until it is.
        delay: seconds.
        pause: seconds.
    """
    due = None
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if due is None and is_due():
            due = time.monotonic() + delay
        if due is not None and time.monotonic() >= due:
            os.kill(child, signal.SIGKILL)
            break
        time.sleep(pause)
    return waited(child)

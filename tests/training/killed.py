"""Runs one training again and again, killing it at random moments, until it has ended. Run with the pack's folder as the
working directory: python killed.py SEED KILLS STEPS LOG METHOD OPTIONS...

A moment is soon after the training has logged one of its STEPS, drawn at random, in LOG. Processes are forked from one
that has imported everything, so that the kills meet the training and not the imports. Prints a line for each process:
the signal that ended it, or its exit status.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, os.getcwd())

from training.run import main


def start(method, options, environment=None):
    """The process of a training that says nothing."""
    child = os.fork()
    if child == 0:
        os.environ |= environment or {}
        with open(os.devnull, "w") as sys.stdout, open(os.devnull, "w") as sys.stderr:
            os._exit(main(method, "", options))
    return child


def ended(child, log, step, delay):
    """Kill a process `delay` seconds after it has logged `step`, or before, if it ends by itself; what ended it."""
    due = None
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if due is None and (step == 0 or (log.exists() and log.read_text().count("\n") >= step)):
            due = time.monotonic() + delay
        if due is not None and time.monotonic() >= due:
            os.kill(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(0.005)


if __name__ == "__main__":
    seed, kills, steps, log, method, *options = sys.argv[1:]
    moments = random.Random(int(seed))
    for step in sorted(moments.sample(range(int(steps) - 6), int(kills))):
        print(ended(start(method, options), Path(log), step, moments.uniform(0.0, 0.2)), flush=True)
    print(ended(start(method, options), Path(log), int(steps) + 1, 0.0), flush=True)

"""Runs one training again and again, killing it at random moments, until it has ended. Run with the pack's folder as the
working directory: python killed.py SEED KILLS EARLIEST LATEST METHOD OPTIONS... (moments in seconds).

Processes are forked from one that has imported everything, so that the kills meet the training and not the imports.
Prints for each process what ended it (the signal, or its exit status), and the seconds of the last.
"""

import os
import random
import signal
import sys
import time

sys.path.insert(0, os.getcwd())

from training.run import main


def start(method, options):
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w") as sys.stdout, open(os.devnull, "w") as sys.stderr:
            os._exit(main(method, "", options))
    return child


def ended(child, patience):
    """Wait for a process at most so many seconds, then kill it; what ended it."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    seed, kills, earliest, latest, method, *options = sys.argv[1:]
    moments = random.Random(int(seed))
    for _ in range(int(kills)):
        print(ended(start(method, options), moments.uniform(float(earliest), float(latest))), flush=True)
    began = time.monotonic()
    print(ended(start(method, options), 600), time.monotonic() - began, flush=True)

"""Runs one training again and again, killing it at random moments, until it has ended. Run with the pack's folder as the
working directory: python killed.py SEED KILLS STEPS LOG METHOD OPTIONS...

A moment is soon after the training has logged one of its STEPS, drawn at random, in LOG. Processes are forked from one
that has imported everything, so that the kills meet the training and not the imports. Prints a line for each process:
the signal that ended it, or its exit status.
"""

import os
import random
import sys
from pathlib import Path

sys.path.insert(0, os.getcwd())

from killing import ended, forked

from training.run import main


def start(method, options, environment=None):
    """The process of a training."""

    def work():
        os.environ |= environment or {}
        return main(method, "", options)

    return forked(work)


def killed_after(step, delay, method, options, log):
    """What ended a training, which is killed after it has logged a step."""
    child = start(method, options)
    return ended(child, lambda: step == 0 or (log.exists() and log.read_text().count("\n") >= step), delay, 0.005)


if __name__ == "__main__":
    seed, kills, steps, log, method, *options = sys.argv[1:]
    moments = random.Random(int(seed))
    for step in sorted(moments.sample(range(int(steps) - 6), int(kills))):
        print(killed_after(step, moments.uniform(0.0, 0.2), method, options, Path(log)), flush=True)
    print(killed_after(int(steps) + 1, 0.0, method, options, Path(log)), flush=True)

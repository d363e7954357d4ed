"""Builds one data set again and again, killing it at random moments, until it has ended. Run with the pack's folder as the
working directory: python killed_build.py SEED KILLS FOLDER OPTIONS...

A moment is soon after FOLDER has got a certain number of lines, drawn at random from those of a whole build that goes
before in FOLDER-whole. Processes are forked from one that has imported everything. Prints a line for each process that was
to be killed: the signal that ended it, or its exit status.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, os.getcwd())

import spacy  # noqa: F401
from transformers import (  # noqa: F401
    AutoProcessor,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    GroundingDinoForObjectDetection,
    SamModel,
    SamProcessor,
)

from training.build_subject_data import main


def start(folder, options):
    """The process of a build that says nothing."""
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w") as sys.stdout, open(os.devnull, "w") as sys.stderr:
            os._exit(main([*options, "--output_dir", str(folder)]))
    return child


def lines_in(folder):
    """Of everything that was decided, or found so far."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("*.jsonl"))


def ended(child, folder, lines, delay):
    """Kill a process `delay` seconds after its folder has so many lines, or before, if it ends by itself; what ended it."""
    due = None
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if due is None and lines_in(folder) >= lines:
            due = time.monotonic() + delay
        if due is not None and time.monotonic() >= due:
            os.kill(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(0.002)


if __name__ == "__main__":
    seed, kills, where, *options = sys.argv[1:]
    folder, whole = Path(where), Path(f"{where}-whole")
    if os.waitpid(start(whole, options), 0)[1]:
        sys.exit("the whole build failed")
    moments, most = random.Random(int(seed)), lines_in(whole)
    for lines in sorted(moments.sample(range(most), int(kills))):
        print(ended(start(folder, options), folder, lines, moments.uniform(0.0, 0.03)), flush=True)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(start(folder, options), 0)[1]))

"""Builds one data set again and again, killing it at random moments, until it has ended. Run with the pack's folder as the
working directory: python killed_build.py SEED KILLS FOLDER OPTIONS...

A moment is soon after FOLDER has got a certain number of lines, drawn at random from those of a whole build that goes
before in FOLDER-whole. Processes are forked from one that has imported everything. Prints a line for each process that was
to be killed: the signal that ended it, or its exit status.
"""

import os
import random
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, os.getcwd())

import spacy  # noqa: F401
from killing import ended, forked, waited
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
    """The process of a build."""
    return forked(lambda: main([*options, "--output_dir", str(folder)]))


def lines_in(folder):
    """Of everything that was decided, or found so far."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("*.jsonl"))


def reached(folder, lines):
    """Whether there are so many of them."""
    return lines_in(folder) >= lines


if __name__ == "__main__":
    seed, kills, where, *options = sys.argv[1:]
    folder, whole = Path(where), Path(f"{where}-whole")
    if waited(start(whole, options)):
        sys.exit("the whole build failed")
    moments, most = random.Random(int(seed)), lines_in(whole)
    for lines in sorted(moments.sample(range(most), int(kills))):
        child, delay = start(folder, options), moments.uniform(0.0, 0.03)
        print(ended(child, partial(reached, folder, lines), delay, 0.002), flush=True)
    sys.exit(waited(start(folder, options)))

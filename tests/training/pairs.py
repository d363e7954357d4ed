"""Runs a training in two processes, whole and killed. Run with the pack's folder as the working directory:
python pairs.py WHOLE KILLED METHOD OPTIONS...

First to the end in the folder WHOLE. Then in the folder KILLED, where both processes are killed as soon as the first
checkpoint is there, and once more to the end. The processes are forked from one that has imported everything. Prints a
line for each pair: what ended the two of them.
"""

import os
import signal
import socket
import sys
import time
from pathlib import Path

from killed import start
from killing import waited


def run(method, options, until=None):
    """Both, to the end or until a file exists."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"} for rank in range(2)]
    children = [start(method, options, shared | rank) for rank in ranks]
    if until is not None:
        while not until.exists() and os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.002)
        for child in children:
            os.kill(child, signal.SIGKILL)
    print(*map(waited, children), flush=True)


if __name__ == "__main__":
    whole, killed, method, *options = sys.argv[1:]
    run(method, [*options, "--output_dir", whole])
    options += ["--output_dir", killed]
    run(method, options, Path(killed) / "checkpoints" / "step-0000002")
    run(method, options)

"""How the tests are started."""

import os

import pytest
from pack.training import bootstrap


@pytest.mark.parametrize(("cores", "threads"), [(1, None), (2, "1"), (3, "1"), (8, "4")])
def test_two_processes_share_the_cores_if_there_are_two(monkeypatch, cores, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    options, env = bootstrap.workers(cores)
    assert env.get("OMP_NUM_THREADS") == threads
    assert ("loadfile" in options) == (threads is not None)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert bootstrap.workers(cores)[1].get("OMP_NUM_THREADS", "7") == "7"


def test_all_checks_are_run_and_any_failure_is_one(monkeypatch):
    ran = []

    def run(*command, env=None, **rest):
        ran.append((os.path.basename(command[0]), command[1:], env))
        return int(command[0] == bootstrap.BIN / "pytest" and "-k" in command)

    monkeypatch.setattr(bootstrap, "run", run)
    monkeypatch.setattr(bootstrap, "check_types", lambda: 0)
    assert bootstrap.test([]) == 0
    assert bootstrap.test(["-k", "no"]) == 1
    name, arguments, env = ran[-1]
    assert name == "pytest"
    assert arguments[-2:] == ("-k", "no")
    assert ("-n" in arguments) == ("OMP_NUM_THREADS" in env)

"""The cage: what a program may not do, and that nothing but tests that went through counts as passed."""

from __future__ import annotations

import os
import socket
import sys
import threading

import pytest

from peftcli.config.errors import UserError
from peftcli.tasks.scoring import cage, inside
from peftcli.tasks.scoring.cage import Job, Limits

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the cage is made for Linux")
ROOMY = Limits(cpu_seconds=5, wall_seconds=60.0, memory_bytes=256 << 20)
TIGHT = Limits(cpu_seconds=1, wall_seconds=2.0, memory_bytes=256 << 20)


def ended(program: str, tests: str = "pass", limits: Limits = ROOMY) -> cage.Result:
    return cage.run([Job(program, tests)], limits)[0]


def test_a_right_program_passes_and_a_wrong_one_tells_its_line():
    assert ended("def f(x): return x + 1", "assert f(1) == 2") == cage.Result("passed")
    wrong = ended("def f(x): return x", "x = 1\nassert f(x) == 2\nassert True")
    assert wrong == cage.Result("failed", "AssertionError: assert f(x) == 2")
    assert ended("def f(x):\nreturn", "pass").error.startswith("IndentationError")
    assert ended("def f(x): return y", "f(1)").error == "NameError: name 'y' is not defined"
    assert ended("", "assert False, 'why\\nnot'").error == "AssertionError: why"


@pytest.mark.parametrize(
    "program",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "raise SystemExit",
        "raise KeyboardInterrupt",
        "import builtins; builtins.exec = lambda *a: None; builtins.compile = None",
        "import os; os.write = lambda *a: 0; os._exit = lambda *a: None; os.closerange(0, 64)",
        "import os\nfor file in range(32):\n    try: os.write(file, b'0' * 32 + b'\\n')\n    except OSError: pass",
        "import sys; sys.modules.clear()",
        "class E(Exception):\n    def __str__(self): raise SystemExit\nraise E",
        "print('passed')\n1/0",
        "\x00",
        "'\ud800'",
    ],
)
def test_only_tests_that_went_through_count(program):
    found = ended(program, "assert False")
    assert found.outcome in ("failed", "killed")
    assert found.error


def test_a_program_that_forges_an_answer_cannot_know_the_secret():
    forged = (
        "import os\nfor file in range(32):\n    try: os.write(file, b'passed')\n    except OSError: pass\nos._exit(0)"
    )
    assert ended(forged).outcome == "failed"


def test_time_runs_out():
    loop, sleeps = cage.run([Job("while True: pass", ""), Job("import time; time.sleep(60)", "")], TIGHT)
    assert (loop.outcome, sleeps.outcome) == ("timed out", "timed out")
    deaf = ended("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", limits=TIGHT)
    assert deaf.outcome in ("killed", "timed out")


def test_memory_runs_out():
    assert ended("x = bytes(1 << 30)").outcome == "killed"
    assert ended("x = []\nwhile True: x.append(bytes(1 << 20))").outcome == "killed"


def test_a_deep_recursion_ends_the_program_alone():
    deep = "import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1)\nf(0)"
    assert ended(deep, limits=TIGHT).outcome != "passed"


@pytest.mark.parametrize(
    "program",
    [
        "import os\nwhile True: os.fork()",
        "import subprocess; subprocess.run(['/bin/true'])",
        "import os; os.execv('/bin/true', ['true'])",
        "import multiprocessing as m; p = m.Process(target=print); p.start()",
        "import ctypes\nif ctypes.CDLL(None).syscall(435, 0, 0) < 0: raise PermissionError",
        "import os; os.kill(os.getppid(), 9)",
        "import os; os.kill(-1, 9)",
        "import os, signal; os.killpg(0, 9)",
        "import os; os.setsid()",
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (60, 60))",
        "import ctypes\nif ctypes.CDLL(None).ptrace(16, __import__('os').getppid(), 0, 0) < 0: raise PermissionError",
    ],
)
def test_no_other_process_is_started_or_touched(program):
    found = ended(program)
    assert found.outcome == "failed", found
    assert "Error" in found.error


def test_threads_are_the_programs_own():
    program = "import threading\nl = []\nt = threading.Thread(target=l.append, args=(1,))\nt.start()\nt.join()"
    assert ended(program, "assert l == [1]").outcome == "passed"


def test_files_cannot_be_written_nor_removed_nor_read(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("x")
    for program in (
        f"open({str(tmp_path / 'new')!r}, 'w')",
        "open('here', 'w').write('x' * 10**9)",
        f"open({str(secret)!r}, 'a')",
        f"open({str(secret)!r})",
        f"import os; os.open({str(secret)!r}, os.O_RDONLY | os.O_TRUNC)",
        f"import os; os.truncate({str(secret)!r}, 0)",
        f"import os; os.remove({str(secret)!r})",
        f"import os; os.rename({str(secret)!r}, 'x')",
        f"import os; os.chmod({str(secret)!r}, 0)",
        f"import os; os.symlink({str(secret)!r}, 'x')",
        "import os; os.mkdir('x')",
        "import os; os.memfd_create('x')",
        "import os; os.listdir('/')",
        "open('/etc/passwd')",
        "open('/proc/self/environ')",
    ):
        found = ended(program)
        assert found.outcome == "failed", (program, found)
        assert found.error.startswith(("PermissionError", "OSError")), (program, found)
    assert secret.read_text() == "x"
    assert sorted(tmp_path.iterdir()) == [secret]


def test_the_working_directory_is_empty_and_gone_afterwards():
    where = ended("import os", "assert os.listdir() == []\nassert False, os.getcwd()").error
    path = where.removeprefix("AssertionError: ")
    assert "peft-cage-" in path
    assert not os.path.exists(path)


def test_the_environment_and_open_files_stay_outside(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "secret")
    file = os.open(tmp_path, os.O_RDONLY)
    os.set_inheritable(file, True)
    try:
        assert (
            ended("import os", "assert 'HF_TOKEN' not in os.environ and 'HOME' not in os.environ").outcome == "passed"
        )
        theirs = ended("import os", f"os.fstat({max(file, 20)})").error
        assert theirs.startswith("OSError: [Errno 9]")
    finally:
        os.close(file)
    parent = ended("import os; open(f'/proc/{os.getppid()}/environ').read()")
    assert parent.error.startswith("PermissionError")


def test_no_network_not_even_to_this_machine():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5)
        heard = []
        listener = threading.Thread(target=lambda: heard.append(_accepts(server)))
        listener.start()
        port = server.getsockname()[1]
        found = ended(f"import socket; socket.create_connection(('127.0.0.1', {port}))")
        assert found.error.startswith("PermissionError")
        socket.create_connection(("127.0.0.1", port)).close()  # the server can be reached
        listener.join()
    assert heard == [True]
    for family in ("AF_UNIX", "AF_INET6", "AF_NETLINK"):
        assert ended(f"import socket; socket.socket(socket.{family})").error.startswith("PermissionError")


def _accepts(server: socket.socket) -> bool:
    """Whether the first that connects is this process."""
    connection, _ = server.accept()
    connection.close()
    return True


def test_output_is_thrown_away():
    talks = "import sys\nfor _ in range(2000): print('x' * 10000); print('y' * 10000, file=sys.stderr)"
    assert ended(talks).outcome == "passed"
    floods = "import os\nwhile True:\n for file in range(3, 32):\n  try: os.write(file, b'x' * 99)\n  except OSError: 0"
    assert ended(floods, limits=TIGHT).outcome in ("failed", "timed out", "killed")


def test_the_standard_library_is_there_and_packages_are_not():
    modules = "math, re, heapq, collections, itertools, functools, hashlib, json, datetime, decimal, fractions, typing"
    assert ended(f"import {modules}, statistics, random, bisect, dataclasses, sqlite3, ssl, ctypes").outcome == "passed"
    assert ended("import torch").error == "ModuleNotFoundError: No module named 'torch'"
    annotated = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int"
    )
    assert ended(annotated, "assert A(1) == A(1)\nassert __name__ != '__main__'").outcome == "passed"


def test_results_come_in_order_and_are_the_same_each_time():
    jobs = [Job(f"n = {n}", "assert n % 2") for n in range(9)]
    assert [found.outcome for found in cage.run(jobs)] == ["failed" if n % 2 == 0 else "passed" for n in range(9)]
    order = "assert False, list({'a', 'b', 'c', 'd', 'e'})"
    assert ended("", order) == ended("", order)


def test_other_systems_are_told(monkeypatch):
    cage.check()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UserError, match="made for Linux on x86_64 or aarch64, not darwin"):
        cage.check()


def test_a_fence_that_does_not_stand_is_a_mistake_and_no_failed_program(monkeypatch):
    monkeypatch.setattr(Limits, "rlimits", lambda self: {"NONSENSE": 1})
    with pytest.raises(UserError, match="cannot be run safely here"):
        ended("pass")


@pytest.mark.parametrize("machine", sorted(inside.ARCHITECTURES))
def test_the_filter_lets_nothing_else_through(machine):
    rules = inside.seccomp_rules(machine)
    assert len(rules) < 4096
    assert rules[-1] == (inside.RETURN, 0, 0, 0x50001)
    for at, (code, yes, no, _) in enumerate(rules):
        if code in (inside.EQUAL, inside.ANY_BIT):
            assert at + 1 + max(yes, no) < len(rules)

"""Runs alone in the process that `cage.py` starts: puts up the fence, runs a program and its tests, tells the outcome.

Only the standard library is imported here, and nothing of this package. Protocol: standard input holds a JSON line
with `program`, `tests` and `limits`, then a secret line; standard output gets `READY` once the fence stands, then the
secret (the tests went through) or a line that begins with `failed` or `killed`.

The fence has two parts, and neither needs a privilege. Seccomp lets through the system calls that computing needs, and
no others: no socket, no process, no signal to others, no file opened for writing or removed. Landlock leaves only
Python's own files and the empty working directory to read.
"""

import ctypes
import errno
import json
import os
import platform
import resource
import signal
import struct
import sys
import traceback
import types

READY = b"ready\n"
LONGEST = 300
"""Characters of an error that are told."""

# Each system call that may be made, by its number on x86_64 and on aarch64 (None: there is no such call).
CALLS = {
    "read": (0, 63), "readv": (19, 65), "pread64": (17, 67), "write": (1, 64), "writev": (20, 66), "close": (3, 57),
    "fstat": (5, 80), "newfstatat": (262, 79), "statx": (332, 291), "stat": (4, None), "lstat": (6, None),
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "readlink": (89, None),
    "readlinkat": (267, 78), "lseek": (8, 62), "getcwd": (79, 17), "getdents64": (217, 61), "mmap": (9, 222),
    "mprotect": (10, 226), "munmap": (11, 215), "mremap": (25, 216), "madvise": (28, 233), "brk": (12, 214),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132),
    "restart_syscall": (219, 128), "futex": (202, 98), "sched_yield": (24, 124), "sched_getaffinity": (204, 123),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "nanosleep": (35, 101),
    "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153), "getrusage": (98, 165), "uname": (63, 160),
    "sysinfo": (99, 179), "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174),
    "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "getrandom": (318, 278),
    "set_robust_list": (273, 99), "rseq": (334, 293), "membarrier": (324, 283), "exit": (60, 93),
    "exit_group": (231, 94),
}  # fmt: skip
OPEN, OPENAT, CLONE, CLONE3 = (2, None), (257, 56), (56, 220), (435, 435)
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of the numbers above, and the kernel's own number of the architecture."""

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CLONE_THREAD = 0x10000
ALLOW, KILL = 0x7FFF0000, 0x80000000
LOAD, EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06  # instructions of classic BPF
NO_NEW_PRIVS, SECCOMP, DUMPABLE, PARENT_DEATH = 38, 22, 4, 1  # options of prctl
READ_FILE, READ_DIR, ALL_OF_ABI_1 = 1 << 2, 1 << 3, (1 << 13) - 1  # rights of Landlock
LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache")
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # the same on all architectures

libc = ctypes.CDLL(None, use_errno=True)
libc.prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong)


def seccomp_rules(machine: str) -> list[tuple[int, int, int, int]]:
    """The filter: for each call a comparison that skips what belongs to it; what matches nothing fails."""
    column, architecture = ARCHITECTURES[machine]
    rules = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    for numbers in CALLS.values():
        if (number := numbers[column]) is not None:
            rules += [(EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    for numbers, flags, bits, met, unmet in (
        (OPEN, 1, WRITING, _error(errno.EACCES), ALLOW),
        (OPENAT, 2, WRITING, _error(errno.EACCES), ALLOW),
        (CLONE, 0, CLONE_THREAD, ALLOW, _error(errno.EPERM)),
    ):
        if (number := numbers[column]) is not None:
            argument = 16 + 8 * flags  # the lower half, little-endian
            rules += [(EQUAL, 0, 4, number), (LOAD, 0, 0, argument), (ANY_BIT, 0, 1, bits)]
            rules += [(RETURN, 0, 0, met), (RETURN, 0, 0, unmet)]
    # clone3 hides its flags behind a pointer; told that there is none, the C library takes clone.
    rules += [(EQUAL, 0, 1, CLONE3[column]), (RETURN, 0, 0, _error(errno.ENOSYS))]
    return [*rules, (RETURN, 0, 0, _error(errno.EPERM))]


def _error(number: int) -> int:
    return 0x50000 | number


def _called(result: int, what: str) -> int:
    if result < 0:
        raise OSError(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def restrict_files(readable: list[str]) -> None:
    """Landlock: only these files and folders can be opened, and only for reading."""
    what = "Landlock (Linux 5.13 or newer, built in and switched on)"
    handled = struct.pack("=Q", ALL_OF_ABI_1)
    ruleset = _called(libc.syscall(LANDLOCK_CREATE, handled, ctypes.c_size_t(8), 0), what)
    for path in readable:
        if os.path.exists(path):
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rights = READ_FILE | (READ_DIR if os.path.isdir(path) else 0)
            _called(libc.syscall(LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", rights, place), 0), what)
            os.close(place)
    _called(libc.syscall(LANDLOCK_RESTRICT, ruleset, 0), what)
    os.close(ruleset)


def restrict_calls() -> None:
    """Seccomp: the calls of the table, for all threads that there will be."""
    rules = seccomp_rules(platform.machine())
    packed = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *rule) for rule in rules))
    program = struct.pack("@HP", len(rules), ctypes.addressof(packed))
    _called(libc.prctl(SECCOMP, 2, program, 0, 0), "seccomp")


def fence(limits: dict[str, int]) -> None:
    """Limits, files, calls: in this order, since the last forbids the others."""
    for name, most in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        # A program that ignores the signal at the softer limit of time is killed at the harder one.
        resource.setrlimit(kind, (most, most + 1 if name == "CPU" and most != hard else most))
    _called(libc.prctl(PARENT_DEATH, signal.SIGKILL, 0, 0, 0), "prctl")
    _called(libc.prctl(DUMPABLE, 0, 0, 0, 0), "prctl")
    _called(libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    restrict_files([*sys.path, f"{sys.base_prefix}/lib", *LIBRARIES, os.getcwd()])
    restrict_calls()


def describe(error: BaseException, tests: str) -> str:
    """The outcome and the last line of an error; a bare assertion is told with its line."""
    line = traceback.format_exception_only(error)[-1].strip() or type(error).__name__
    if isinstance(error, AssertionError) and not str(error):
        at = [frame.lineno or 1 for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<tests>"]
        line += f": {tests.splitlines()[at[-1] - 1].strip()}" if at else ""
    if isinstance(error, SystemExit):
        line = f"SystemExit before the tests had ended: {line}"
    kind = "killed" if isinstance(error, MemoryError) else "failed"
    return f"{kind} {line.splitlines()[0][:LONGEST]}"


def main() -> None:
    """Run the job on standard input; the secret stays unread in its pipe until the tests are through."""
    asked, told = os.fdopen(os.dup(0), "rb", buffering=0), os.dup(1)
    job = json.loads(_line(asked))
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    os.close(nothing)
    try:
        fence(job["limits"])
    except (OSError, KeyError, ValueError) as error:
        os.write(told, str(error).encode())
        os._exit(1)
    # Kept here, since the program may put others in their places.
    run, write, leave, tell, tests = exec, os.write, os._exit, describe, job["tests"]
    write(told, READY)
    try:
        module = types.ModuleType("program")
        sys.modules["program"] = module
        checks = compile(tests, "<tests>", "exec")
        run(compile(job["program"], "<program>", "exec"), module.__dict__)
        run(checks, module.__dict__)
        answer = _line(asked)
    except BaseException as error:
        answer = tell(error, tests).encode(errors="replace")
    write(told, answer)
    leave(0)


def _line(stream) -> bytes:
    """A line, and not a byte more."""
    found = bytearray()
    while not found.endswith(b"\n") and (byte := stream.read(1)):
        found += byte
    return bytes(found)


if __name__ == "__main__":
    main()

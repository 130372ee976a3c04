"""Runs of a script as processes of their own, without its seconds of imports: a server that has them forks each run.

Its processes import this file, so it imports neither conftest nor a heavy library.
"""

import contextlib
import ctypes
import faulthandler
import importlib
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import forkserver
from pathlib import Path

import psutil


ROOT = Path(__file__).resolve().parent.parent
CHANGES = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree"}  # of Python's audit events
context = multiprocessing.get_context("forkserver")


def start_server(*modules: str) -> None:
    """Starts the server; its processes have the modules imported."""
    before = dict(os.environ)
    os.environ.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    context.set_forkserver_preload(list(modules))
    forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(before)


class Run:
    """A running process, whose output goes to a file."""

    def __init__(self, process, log: Path):
        self.process, self.pid, self.log = process, process.pid, log

    def wait(self, timeout: float = 120) -> int:
        """Waits for the end, and returns the exit code, or minus the signal that killed it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            (getattr(self.process, "join", None) or self.process.wait)(timeout)
        code = self.process.exitcode if hasattr(self.process, "exitcode") else self.process.returncode
        if code is None and hasattr(self.process, "exitcode"):
            os.kill(self.pid, signal.SIGUSR2)  # says where it is
            time.sleep(0.2)
        assert code is not None, f"still runs after {timeout} s:\n{self.output()}"
        return code

    def ended(self) -> bool:
        """Whether the process has ended."""
        return not self.process.is_alive() if hasattr(self.process, "is_alive") else self.process.poll() is not None

    def output(self) -> str:
        """What was printed so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def until(self, condition, timeout: float = 120):
        """Waits until the condition holds while the process runs; returns what it gave."""
        end = time.monotonic() + timeout
        while not (found := condition()):
            assert not self.ended(), f"ended too early:\n{self.output()}"
            assert time.monotonic() < end, f"not so after {timeout} s:\n{self.output()}"
            time.sleep(0.01)
        return found

    def end(self) -> None:
        """Kills the process, its group and what it has started, if they still run."""
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            started = psutil.Process(self.pid).children(recursive=True)  # torchrun's have sessions of their own
            os.killpg(self.pid, signal.SIGKILL)
            for process in started:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def fork(script: str, argv: list, log: Path, **options) -> Run:
    """Starts a run of a script in a session of its own; see run_script for the options."""
    process = context.Process(target=run_script, args=(script, [str(word) for word in argv], log), kwargs=options)
    process.start()
    return Run(process, log)


def run_script(script, argv, log, environment=None, namespace=None, watched=None, trigger=None) -> None:
    """The life of a forked process.

    environment: variables to set; namespace: pid of a process whose mounts to see; watched: a folder whose changes
    are listed in the file <log>.changes; trigger: (pattern, count, action) does kill(seconds) or limit(bytes) before
    the count-th change that matches.
    """
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # the platform's own for what the run starts
    out = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(out, 2)
    faulthandler.register(signal.SIGUSR2)
    os.environ.update(environment or {})
    for kind in ("user", "mnt") if namespace else ():
        if os.readlink(f"/proc/{namespace}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}"):
            descriptor = os.open(f"/proc/{namespace}/ns/{kind}", os.O_RDONLY)
            assert ctypes.CDLL(None).setns(descriptor, 0) == 0, "setns"
            os.close(descriptor)
    module = importlib.import_module(script)
    sys.argv = [script, *argv]
    if watched:
        watch(str(watched), f"{log}.changes", *(trigger or ("$^", 1, ("kill", 0))))
    code = 0
    try:
        module.main(module.parse_args(argv))
    except SystemExit as end:
        code = end.code
    sys.exit(code)  # here, as at a script's top level, nothing holds the frames of the run any more


def watch(folder, journal, pattern, count, action):
    """Lists this process's changes under a folder, each before it is made, and acts before the one that is meant."""
    descriptor = os.open(journal, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    process = os.getpid()
    met = 0

    def note(line):
        nonlocal met
        if folder not in line or os.getpid() != process:
            return
        os.write(descriptor, f"{line}\n".encode())
        met += bool(re.search(pattern, line))
        if met == count:
            met += 1
            act(*action)

    def hook(event, arguments):
        if event not in CHANGES or isinstance(arguments[0], int):
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        paths = arguments[:2] if event == "os.rename" else arguments[:1]
        place = arguments[-1] if event in ("os.mkdir", "os.remove", "os.rmdir") else -1
        base = os.readlink(f"/proc/self/fd/{place}") if place >= 0 else os.getcwd()
        note(" ".join([event, *(os.path.join(base, os.fsdecode(path)) for path in paths)]))

    def fsync(file):
        note(f"os.fsync {os.readlink(f'/proc/self/fd/{file}')}")
        real_fsync(file)

    real_fsync, os.fsync = os.fsync, fsync
    sys.addaudithook(hook)


def act(what, amount):
    """Kills this process in so many seconds, or lets no file grow beyond so many bytes."""
    if what == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (amount, amount))
    elif amount:
        threading.Timer(amount, os.kill, (os.getpid(), signal.SIGKILL)).start()
    else:
        os.kill(os.getpid(), signal.SIGKILL)

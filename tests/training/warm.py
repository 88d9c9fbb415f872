"""Processes for tests that need one each, forked from one that has imported everything.

Importing torch, Lightning and the package takes seconds of every process that a test starts. Here
one process a session imports them, computes nothing (neither threads nor autograd survive a fork),
and forks. `run` and `Popen` stand in for those of `subprocess` where the program is this Python. A
test of imports, start-up or interpreter options starts a Python of its own with `subprocess`.
"""

import atexit
import contextlib
import functools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

IMPORTS = ["lit_diffusion.training.cli", "datasets", "matplotlib.backends.backend_agg"]


# In the test's process --------------------------------------------------------------------------


@functools.cache
def _server():
    """Start the process from which others are forked; returns the path of its socket."""
    folder = tempfile.TemporaryDirectory(prefix="warm_")
    path = Path(folder.name, "socket")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    # It ends when its standard input does, so it cannot outlive this process.
    process = subprocess.Popen([sys.executable, __file__, path], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, env=environment)  # fmt: skip
    assert process.stdout.readline() == b"ready\n"

    @atexit.register
    def end():
        process.stdin.close()
        process.wait()
        process.stdout.close()
        folder.cleanup()

    return str(path)


class Popen:
    """A forked process, with what tests use of `subprocess.Popen`.

    Args:
        words: This Python; then `-m` and a module, `-c` and code, or a script; then arguments.
        cwd: Its working directory.
        env: Its environment.
        stdout: A file for its output.
        stderr: A file for its errors.
        start_new_session: Whether it leads a process group.
    """

    def __init__(
        self, words, cwd=None, env=None, stdout=None, stderr=None, start_new_session=False
    ):
        program, *words = map(str, words)
        assert program == sys.executable, "only this Python can be forked"
        request = {
            "words": words,
            "cwd": str(cwd or Path.cwd()),
            "env": dict(os.environ if env is None else env),
            "session": start_new_session,
        }
        self.returncode = None
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(_server())
            files = [sys.stdout if file is None else file for file in (stdout, stderr)]
            message = json.dumps(request).encode()
            socket.send_fds(
                connection, [len(message).to_bytes(4, "big")], [file.fileno() for file in files]
            )
            connection.sendall(message)
            self._answers = connection.makefile("r")
        self.pid = int(self._answers.readline())

    def poll(self):
        """The exit status once it has ended, else None."""
        if self.returncode is None and not alive(self.pid):
            self._end()
        return self.returncode

    def wait(self, timeout=None):
        """Wait for its end; returns the exit status, negative for a signal."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while deadline is not None and self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a forked process", timeout)
            time.sleep(0.01)
        if self.returncode is None:
            self._end()
        return self.returncode

    def _end(self):
        self.returncode = int(self._answers.readline())
        self._answers.close()

    def send_signal(self, number):
        """Send it a signal, if it has not ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self):
        """End it by SIGKILL."""
        self.send_signal(signal.SIGKILL)


def alive(pid):
    """Whether a process runs: one that has ended may still be in the table."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def run(words, cwd=None, env=None, timeout=300, check=False, capture_output=True, text=True):
    """Like `subprocess.run` of this Python; what it prints is captured as text."""
    assert capture_output
    assert text
    if not Path("/proc").is_dir():  # where forking is not safe, or not there
        return subprocess.run(list(map(str, words)), cwd=cwd, env=env, timeout=timeout,
                              check=check, capture_output=True, text=True)  # fmt: skip
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = Popen(words, cwd, env, out, err)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        out.seek(0)
        err.seek(0)
        done = subprocess.CompletedProcess(list(map(str, words)), code, out.read(), err.read())
    if check:
        done.check_returncode()
    return done


# In the process from which others are forked ----------------------------------------------------


def serve(path):
    """Fork for each request until standard input ends; returns the request, in a fork only.

    Between this process and the one asked for stands another, which waits for its end.
    """
    import select

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while True:
            readable, _, _ = select.select([listener, sys.stdin], [], [])
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            if sys.stdin in readable:
                os._exit(0)
            connection, _ = listener.accept()
            if os.fork():
                connection.close()
                continue
            listener.close()
            size, files, _, _ = socket.recv_fds(connection, 4, 2)
            with connection.makefile("rb") as stream:
                request = json.loads(stream.read(int.from_bytes(size, "big")))
            pid = os.fork()
            if not pid:
                connection.close()
                return request, files
            for file in files:
                os.close(file)
            connection.sendall(b"%d\n" % pid)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with contextlib.suppress(OSError):  # nobody may want to know
                connection.sendall(b"%d\n" % code)
            os._exit(0)


def become(request, files):
    """Make this process the one that was asked for: directory, environment, paths and files."""
    if request["session"]:
        os.setsid()
    # A job in the foreground, even if the tests are one in the background, which ignores Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    before = os.environ.get("PYTHONPATH", "")
    os.environ.clear()
    os.environ.update(request["env"])
    after = os.environ.get("PYTHONPATH", "")
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, file in enumerate([nothing, *files]):
        os.dup2(file, number)
        os.close(file)
    old = before.split(os.pathsep)
    sys.path[:1] = ["", *(p for p in after.split(os.pathsep) if p and p not in old)]


def execute(words):
    """Run what follows `python` on a command line."""
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        sys.path[0] = str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


def leave(function, *arguments):
    """Call a function and end as an interpreter does, but for taking all modules apart.

    That would touch, and so copy, all the memory that is shared with the process forked from.
    """
    code = 0
    try:
        function(*arguments)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if code and not isinstance(stop.code, int):
            print(stop.code, file=sys.stderr)
    except BaseException:
        code = 1
        sys.excepthook(*sys.exc_info())
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    import gc
    import importlib

    for module in IMPORTS:
        importlib.import_module(module)
    gc.freeze()  # a collection in a fork would copy what it looks at
    request, files = serve(sys.argv[1])
    become(request, files)
    leave(execute, request["words"])

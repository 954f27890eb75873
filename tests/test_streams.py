"""The `chipmunk` command and what surrounds it: streams that nobody reads, signals; without JAX, in processes that take 0.1 s."""

import os
import signal
import subprocess
import sys

import pytest

COMMAND = """
import os, signal, sys, time
from types import SimpleNamespace
from chipmunk_jax.cli import commands, signals
from chipmunk_jax.cli.main import main
from chipmunk_jax.whole import whole

def run(words):
    with whole("a.txt") as partial:
        partial.write_text("whole")
        {during}
    print("a.txt" * 9999)
    print("done", file=sys.stderr)
    return 0

def import_module(name):
    {importing}
    return SimpleNamespace(parse=list, run=run)

commands.import_module = import_module
sys.exit(main(["sample"]))
"""


def start(folder, *, during="pass", importing="pass", shell="", **variables):
    """The exit status of a command that writes a.txt and prints, and its stderr where that is a pipe."""
    words = [sys.executable, "-c", COMMAND.format(during=during, importing=importing)]
    words = ["bash", "-c", f'"$@" {shell}', "bash", *words]
    env = os.environ | variables
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "shell",
    [
        ">&-",
        "2>&-",
        "<&- >&- 2>&-",
        "| true; exit ${PIPESTATUS[0]}",
        "2> >(true)",
        "2> /dev/full",
        "2>&1 | head -c1; exit ${PIPESTATUS[0]}",
    ],
)
def test_a_stream_that_nobody_reads_loses_nothing_and_is_no_error(tmp_path, shell):
    status, told = start(tmp_path, shell=shell, during="time.sleep(0.2)")
    assert status == 0 and told in ("", "done\n")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.txt", "whole")]


def test_an_error_that_cannot_be_told_keeps_its_status(tmp_path):
    failing = "raise OSError('no')"
    assert start(tmp_path, during=failing, shell="2> /dev/full")[0] == 2
    assert start(tmp_path, shell="> /dev/full 2> /dev/full")[0] == 2


def test_what_an_encoding_lacks_is_escaped(tmp_path):
    words = "print('sch\\xf6n \\udcff')"
    status, told = start(
        tmp_path, during=words, shell="| head -c 15 >&2; exit ${PIPESTATUS[0]}", PYTHONIOENCODING="ascii"
    )
    assert status == 0 and r"sch\xf6n \udcff" in told


def test_a_full_disk_under_stdout_is_one_sentence(tmp_path):
    status, told = start(tmp_path, shell="> /dev/full")
    assert status == 2 and told.splitlines()[-1].startswith("chipmunk: ") and "No space left on device" in told
    assert "Traceback" not in told and "Exception ignored" not in told


SIGNALS = [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated"), (signal.SIGHUP, 129, "hung up")]


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("number", "status", "word"), SIGNALS)
@pytest.mark.parametrize("moment", ["during", "importing"])
def test_a_signal_leaves_nothing_half_written_and_is_one_line(tmp_path, number, status, word, moment):
    kill = f"os.kill(os.getpid(), {int(number)}); time.sleep(60)"
    assert start(tmp_path, **{moment: kill}) == (status, f"chipmunk: {word}\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("interruptible")
def test_a_signal_in_the_middle_of_a_print_is_one_line(tmp_path):
    """Python's buffers are not reentrant."""
    busy = "\n    def flush(): raise RuntimeError('reentrant call inside BufferedWriter')"
    kill = f"{busy}\n    sys.stdout.flush = flush; os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)"
    assert start(tmp_path, importing=kill) == (143, "chipmunk: terminated\n")


@pytest.mark.usefixtures("interruptible")
def test_a_second_ctrl_c_does_not_wait(tmp_path):
    kill = "os.kill(os.getpid(), signal.SIGINT)"
    stubborn = f"\n        try: {kill}\n        finally: {kill}; time.sleep(60)"
    assert start(tmp_path, during=stubborn) == (130, "chipmunk: interrupted\n")


@pytest.mark.usefixtures("interruptible")
def test_a_signal_whose_exception_is_swallowed_ends_the_process_all_the_same(tmp_path):
    """As in a callback of a library, or in __del__."""
    kill = "signals.PATIENCE = 1; os.kill(os.getpid(), signal.SIGTERM)"
    swallowed = f"\n        try: {kill}\n        except KeyboardInterrupt: time.sleep(60)"
    assert start(tmp_path, during=swallowed) == (143, "chipmunk: terminated\n")


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    """As under nohup."""
    kill = "os.kill(os.getpid(), signal.SIGHUP)"
    words = [sys.executable, "-c", COMMAND.format(during=kill, importing="pass")]
    done = subprocess.run(["nohup", *words], cwd=tmp_path, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0

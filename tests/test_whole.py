"""A file or a folder is written whole or not at all; a process may be killed at any moment, and the next one needs no hand."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from chipmunk_jax import whole as module
from chipmunk_jax.errors import InputError
from chipmunk_jax.report import records
from chipmunk_jax.whole import check_space, exchange, restore, whole

WRITER = """
import os, shutil, signal, sys
from pathlib import Path
from chipmunk_jax import whole as module
from chipmunk_jax.whole import whole

target, moment = Path(sys.argv[1]), sys.argv[2]

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

with whole(target) as partial:
    partial.mkdir()
    if moment == "while it writes":
        kill()
    (partial / "new").touch()
    if moment == "before it swaps":
        module.exchange = kill
    if moment == "between the two renames":
        module.exchange = lambda *_: False
        rename, Path.rename = Path.rename, lambda self, to: kill() if to == target else rename(self, to)
    if moment == "before it removes the old one":
        shutil.rmtree = kill
"""


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder that holds a file "old"."""
    place = tmp_path / "place"
    place.mkdir()
    (place / "old").touch()
    return place


def write(place):
    with whole(place) as partial:
        partial.mkdir()
        (partial / "newest").touch()


@pytest.mark.parametrize(
    ("moment", "held"),
    [
        ("while it writes", "old"),
        ("before it swaps", "old"),
        ("between the two renames", "new"),
        ("before it removes the old one", "new"),
    ],
)
@pytest.mark.parametrize("read", [True, False])
def test_a_kill_leaves_the_old_or_the_new_one_and_nothing_for_the_hand(moment, held, read, place):
    done = subprocess.run([sys.executable, "-c", WRITER, str(place), moment], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    if read:
        restore(place)
        assert os.listdir(place) == [held]
    write(place)
    assert os.listdir(place) == ["newest"] and os.listdir(place.parent) == ["place"]


def test_what_a_living_process_writes_is_left_to_it(place):
    with whole(place) as partial:
        partial.mkdir()
        (partial / "new").touch()
        with pytest.raises(InputError, match=r"place: another process is writing it$"), whole(place, wait=False):
            pass
        restore(place)
        waiting = threading.Thread(target=write, args=[place])
        waiting.start()
        assert os.listdir(partial) == ["new"] and os.listdir(place) == ["old"]
    waiting.join(timeout=60)
    assert os.listdir(place) == ["newest"] and os.listdir(place.parent) == ["place"]


def test_a_folder_is_in_its_place_at_every_moment(place, monkeypatch):
    other = place.with_name("other")
    other.mkdir()
    if not exchange(place, other):
        pytest.skip("this file system exchanges no folders")
    assert os.listdir(place) == [] and os.listdir(other) == ["old"]
    monkeypatch.setattr(Path, "rename", lambda self, to: pytest.fail(f"{self} was renamed"))
    write(place)
    assert os.listdir(place) == ["newest"]


def test_a_link_in_the_place_of_what_is_half_written_is_removed_and_what_it_points_at_is_not(place):
    module.beside(place, "partial").symlink_to(place)
    module.beside(place, "replaced").symlink_to("nothing")
    with whole(place) as partial:
        partial.mkdir()
        assert os.listdir(place) == ["old"]
    assert os.listdir(place.parent) == ["place"]


def test_a_part_of_a_folder_between_the_old_and_the_new_one_brings_it_back(place):
    (place / "part").mkdir()
    module.beside(place, "replaced").mkdir()
    os.rename(place, module.beside(place, "partial"))
    restore(place / "part")
    assert sorted(os.listdir(place)) == ["old", "part"] and os.listdir(place.parent) == ["place"]


def test_what_was_replaced_never_comes_back(place):
    """Half of it may be gone."""
    module.beside(place, "replaced").mkdir()
    os.rename(place, place.with_name("elsewhere"))
    restore(place)
    assert not place.exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "gone"), KeyboardInterrupt(), ValueError("a")])
def test_an_error_leaves_the_old_one(error, place):
    with pytest.raises(type(error)) as raised, whole(place) as partial:
        partial.mkdir()
        raise error
    assert raised.value is error
    assert os.listdir(place) == ["old"] and os.listdir(place.parent) == ["place"]


def test_ctrl_c_while_the_old_one_is_removed_removes_it(place, monkeypatch):
    rmtree, interrupts = module.shutil.rmtree, [KeyboardInterrupt]

    def interrupted(path, **options):
        if interrupts:
            raise interrupts.pop()
        rmtree(path, **options)

    monkeypatch.setattr(module.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(place)
    assert os.listdir(place) == ["newest"] and os.listdir(place.parent) == ["place"]


def test_what_takes_a_place_is_on_the_disk_before(place, monkeypatch):
    """A power cut may keep a rename and lose what was written before it."""
    events, fsync, rename = [], os.fsync, Path.rename
    monkeypatch.setattr(module, "exchange", lambda *_: False)
    monkeypatch.setattr(os, "fsync", lambda file: events.append(os.fstat(file).st_ino) or fsync(file))
    monkeypatch.setattr(Path, "rename", lambda self, to: events.append(to.name) or rename(self, to))
    write(place)
    folder, file, parent = (path.stat().st_ino for path in (place, place / "newest", place.parent))
    assert events == [folder, file, "place.chipmunk-replaced", "place", parent]


@pytest.mark.parametrize("kind", ["partial", "replaced"])
def test_what_cannot_be_removed_is_told_before_anything_is_written(kind, place, monkeypatch):
    """Beside a replaced folder that stayed, a half-written one would pass for whole."""
    left = module.beside(place, kind)
    left.mkdir()
    monkeypatch.setattr(module.shutil, "rmtree", lambda path, **options: None)
    with pytest.raises(InputError, match=rf"chipmunk-{kind}: left by an earlier write, cannot be removed"):
        write(place)
    assert os.listdir(place) == ["old"]


def test_the_root_is_no_place():
    with pytest.raises(InputError, match="/: expected a file or a folder to write, with a name"), whole("/"):
        pass


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"a.png: cannot be written: No space left on device$"), whole("a.png"):
        raise OSError(errno.ENOSPC, "whatever a library says")
    usage = module.shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    check_space(tmp_path / "a.png", 10**6)
    with pytest.raises(InputError, match=r"a.png: 2,000.0 MB needed and 1.0 MB free on its disk"):
        check_space(tmp_path / "a.png", 2 * 10**9)


def test_a_device_or_a_pipe_is_written_to_and_what_a_link_points_at_is_replaced(tmp_path):
    with whole("/dev/null") as partial:
        assert partial == Path("/dev/null")
    read, written = os.pipe()
    with whole(f"/dev/fd/{written}") as partial:  # a link that resolves to no path
        partial.write_text("piped")
    check_space(f"/dev/fd/{written}", 10**18)
    os.close(written)
    assert os.read(read, 99) == b"piped"
    os.close(read)
    (tmp_path / "a").write_text("old")
    (tmp_path / "link").symlink_to("a")
    with whole(tmp_path / "link") as partial:
        partial.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "a").read_text() == "new"


def test_records_are_appended_all_or_none(tmp_path, monkeypatch):
    file = tmp_path / "a.jsonl"
    entries = [{"benchmark": "step", "variant": name} for name in "abc"]
    records.append(file, entries[:1])
    with pytest.raises(ValueError):
        records.append(file, [entries[1], {"ms": float("nan")}])
    records.append(file, entries[1:])
    assert records.read(file, timed=False) == entries and os.listdir(tmp_path) == ["a.jsonl"]

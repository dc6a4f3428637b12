"""Files are whole or not there, and a folder has one process at a time."""

import fcntl
import json
import threading
import time

import pytest

from lmx.data.whole import PART, alone, placed, whole, write_json


def test_what_fails_leaves_nothing(tmp_path):
    (tmp_path / "a").write_text("old")

    def fail() -> None:
        with whole(tmp_path / "a") as file:
            file.write(b"new")
            assert (tmp_path / "a").read_text() == "old"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    with placed(tmp_path / "a") as part:
        part.write_text("new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "new")]


def test_any_file_name_can_be_written_down(tmp_path):
    write_json(tmp_path / "a.json", ["\udcff", "\u00e9"])
    assert json.loads((tmp_path / "a.json").read_bytes()) == ["\udcff", "\u00e9"]


def test_one_at_a_time_and_what_was_killed_is_swept(tmp_path):
    (tmp_path / "below").mkdir()
    for name in ("b", f".b.123{PART}", f"below/.c.456{PART}"):
        (tmp_path / name).touch()
    inside, crowds = [], []

    def work(number: int) -> None:
        with alone(tmp_path):
            inside.append(number)
            crowds.append(len(inside))
            time.sleep(0.05)
            inside.remove(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert crowds == [1, 1, 1, 1]
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".lock", "b", "below"]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ValueError, match="its file system has no locks"), alone(tmp_path):
        pass

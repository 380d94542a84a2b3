"""The lock of a run's folder, if a file system refuses one. Two real trainers: tests/test_faults_runs.py."""

import errno
import os

import pytest

from gpt_jax.errors import RunError, UserError
from gpt_jax.storage import run_folder as module
from gpt_jax.storage.run_folder import locked


def refusing(error):
    def acquire(self, timeout):
        raise error

    return acquire


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("flock")])
def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys, error):
    monkeypatch.setattr(module.FileLock, "acquire", refusing(error))
    with locked(tmp_path / "run"):
        pass
    assert f"WARNING: {tmp_path / 'run'} cannot be locked" in capsys.readouterr().out


@pytest.mark.parametrize("number", [errno.EACCES, errno.EISDIR, errno.ELOOP])
def test_a_lock_that_cannot_be_opened_is_an_error(tmp_path, monkeypatch, number):
    monkeypatch.setattr(module.FileLock, "acquire", refusing(OSError(number, os.strerror(number))))
    with (
        pytest.raises(UserError, match=f"cannot be written .{os.strerror(number)}.: choose another"),
        locked(tmp_path / "run"),
    ):
        pass


def test_a_failing_disk_does_not_hide_the_error_that_ended_the_run(tmp_path, monkeypatch):
    def fail(self, missing_ok):
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(RunError, match="the disk is full"), locked(tmp_path / "run"):
        monkeypatch.setattr(type(tmp_path), "unlink", fail)
        raise RunError("the disk is full")
    monkeypatch.undo()
    with locked(tmp_path / "run"):  # it was unlocked all the same
        pass


def test_the_holder_is_named_and_forgotten(tmp_path):
    with locked(tmp_path):
        assert f"process {os.getpid()} on " in (tmp_path / "lock.holder").read_text(encoding="utf-8")
        with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on"), locked(tmp_path):
            pass
        assert (tmp_path / "lock.holder").exists()
    assert not (tmp_path / "lock.holder").exists()

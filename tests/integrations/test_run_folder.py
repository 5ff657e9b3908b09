"""What a run's folder survives. The disk is full at a file-size limit, which needs no rights and no mount."""

import errno
import os
import resource
import signal
import stat
import subprocess
import sys
import threading

import pytest
import torch

from popsd_integrations.run_folder import LOCK_FILE, exclusive, finishing_on_sigterm, write_whole


@pytest.fixture
def full_disk():
    """Files end at 64 KiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "write", [lambda file: file.write(bytes(1 << 17)), lambda f: torch.save(torch.ones(1 << 15), f)]
)
def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path, full_disk, write):
    path = tmp_path / "file"
    write_whole(path, lambda file: file.write(b"old"))
    with pytest.raises(OSError, match=r"output_dir: expected to write .*file; .*too large.*resume the run") as raised:
        write_whole(path, write)
    assert raised.value.errno == errno.EFBIG
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_an_error_that_is_not_the_disks_passes(tmp_path):
    with pytest.raises(RuntimeError, match="mine"):
        write_whole(tmp_path / "file", lambda file: (_ for _ in ()).throw(RuntimeError("mine")))
    assert not os.listdir(tmp_path)


def test_a_file_is_synced_before_it_takes_the_name_and_its_folder_after(tmp_path, monkeypatch):
    done = []
    kind = lambda handle: "folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file"  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(f"sync {kind(handle)}"))
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("rename"), real(*paths)))
    write_whole(tmp_path / "file", lambda file: file.write(b"new"))
    assert done == ["sync file", "rename", "sync folder"]


def test_a_file_has_the_mode_of_any_other(tmp_path):
    write_whole(tmp_path / "file", lambda file: None)
    (tmp_path / "other").touch()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path):
    with exclusive(tmp_path), pytest.raises(ValueError, match=rf"no other run.*\(process {os.getpid()} on .*end it"):
        exclusive(tmp_path).__enter__()
    (tmp_path / "checkpoint.pt.popsd-tmp").touch()
    (tmp_path / "mine.tmp").touch()
    with exclusive(tmp_path):
        assert sorted(os.listdir(tmp_path)) == [LOCK_FILE, "mine.tmp"]


def test_the_lock_ends_with_a_killed_process_though_a_worker_of_it_lives(tmp_path):
    script = (
        "import os, sys, time\n"
        "from popsd_integrations.run_folder import exclusive\n"
        "with exclusive(sys.argv[1]):\n"
        "    if not os.fork():\n"
        "        print(os.getpid(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    worker = int(holder.stdout.readline())
    try:
        with pytest.raises(ValueError, match=rf"process {holder.pid} on"):
            exclusive(tmp_path).__enter__()
        holder.kill()
        holder.wait()
        os.kill(worker, 0)  # is alive
        with exclusive(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match=r"output_dir: expected a folder that can be written to; got .*another output_dir"
    ):
        exclusive(tmp_path / "file" / "runs").__enter__()


def test_sigterm_is_answered_at_the_end(caplog):
    calls = []
    before = signal.signal(signal.SIGTERM, lambda *_: calls.append("theirs"))
    try:
        with pytest.raises(SystemExit) as ended:  # noqa: PT012, SIM117
            with finishing_on_sigterm() as asked:
                assert not asked()
                os.kill(os.getpid(), signal.SIGTERM)
                assert asked() and not calls
        assert ended.value.code == 143 and calls == ["theirs"] and "can be resumed" in caplog.text
        with finishing_on_sigterm():
            pass
        with pytest.raises(ZeroDivisionError), finishing_on_sigterm():
            1 / bool(os.kill(os.getpid(), signal.SIGTERM))
        os.kill(os.getpid(), signal.SIGTERM)
        assert calls == ["theirs", "theirs"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_outside_the_main_thread_no_handler_is_set():
    before, found = signal.getsignal(signal.SIGTERM), []

    def work():
        with finishing_on_sigterm() as asked:
            found.extend([asked(), signal.getsignal(signal.SIGTERM)])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False, before]

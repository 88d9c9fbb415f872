"""What falls silent is named after a while: a server that sends nothing, a stopped worker."""

import contextlib
import os
import signal
import socket
import threading
import time

import pytest
from image_files import PARDONS, encode, module, pixels, take, write_parquet

from lit_diffusion.training.data.batching import workers
from lit_diffusion.training.data.reading import retry

pytestmark = [pytest.mark.usefixtures("alone")]
pytestmark += [pytest.mark.filterwarnings(pardon) for pardon in PARDONS]


@pytest.mark.slow
def test_a_stopped_worker_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "SILENCE", 2.0)
    monkeypatch.setattr(workers, "BEAT", 0.2)
    write_parquet(tmp_path / "x.parquet", [encode(image) for image in pixels(60)])
    loader = module(tmp_path / "x.parquet", val_split=None, num_workers=2).train_dataloader()
    take(loader, 1)
    _, other = loader._workers.processes
    os.kill(other.pid, signal.SIGSTOP)
    with pytest.raises(OSError, match=rf"data worker 1 \(process {other.pid}\), got no sign"):
        take(loader, 30)
    assert not other.is_alive()


@pytest.mark.slow
def test_a_killed_worker_is_named(tmp_path):
    write_parquet(tmp_path / "x.parquet", [encode(image) for image in pixels(60)])
    loader = module(tmp_path / "x.parquet", val_split=None, num_workers=2).train_dataloader()
    take(loader, 1)
    _, other = loader._workers.processes
    os.kill(other.pid, signal.SIGKILL)
    with pytest.raises(OSError, match=rf"worker 1 \(process {other.pid}\), which has ended"):
        take(loader, 30)


# --- servers


@pytest.fixture
def impatient(monkeypatch):
    """No wait lasts longer than a moment, and no file system is left over from another test."""
    import fsspec

    monkeypatch.setattr(retry, "SILENCE", 0.5)
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(retry, "ATTEMPTS", 2)
    monkeypatch.setattr(fsspec.config, "conf", {})
    monkeypatch.setattr(fsspec.config.apply_config, "__defaults__", (None,))
    retry.close_connections()
    yield
    retry.close_connections()


@pytest.fixture
def slow(tmp_path):
    """A server of one file: silent from its `quiet`-th answer on, slow in each before it."""
    write_parquet(tmp_path / "x.parquet", [encode(image) for image in pixels(60)])
    whole = (tmp_path / "x.parquet").read_bytes()
    server = socket.create_server(("127.0.0.1", 0))
    state = {"answers": 0, "quiet": 10**9, "pause": 0.0}

    def answer(client):
        with client, contextlib.suppress(OSError):
            while request := client.recv(65536).decode():
                state["answers"] += 1
                if state["answers"] > state["quiet"]:
                    time.sleep(30)
                    return
                begin, end = 0, len(whole)
                for line in request.splitlines():
                    if line.lower().startswith("range:"):
                        first, last = line.partition("=")[2].split("-")
                        begin, end = int(first), min(int(last) + 1, len(whole))
                head = "206 Partial Content" if end - begin < len(whole) else "200 OK"
                lines = [f"HTTP/1.1 {head}", f"Content-Length: {end - begin}"]
                lines += ["Accept-Ranges: bytes"]
                lines += [f"Content-Range: bytes {begin}-{end - 1}/{len(whole)}"]
                client.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
                if request.startswith("GET"):
                    middle = (begin + end) // 2
                    for part in (whole[begin:middle], whole[middle:end]):
                        time.sleep(state["pause"])
                        client.sendall(part)

    def serve():
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(client,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}/x.parquet", state
    server.close()


def test_a_server_that_falls_silent_is_named(slow, impatient):
    url, state = slow
    data = module(url, val_split=None, shuffle_window=8)
    state["quiet"] = state["answers"]
    with pytest.raises(ConnectionError, match=f"{url} over the network, got 2 failures") as caught:
        take(data.train_dataloader(), 1)
    assert "\n" not in str(caught.value)


def test_a_server_that_sends_slowly_is_waited_for(slow, impatient):
    url, state = slow
    data = module(url, val_split=None, shuffle_window=8)
    state["pause"] = 0.3  # less than the silence that is allowed, more in all
    assert len(take(data.train_dataloader(), 1)) == 1

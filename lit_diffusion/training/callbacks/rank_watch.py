"""All ranks end when one of them does."""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import sys
import threading
import time
import warnings
from typing import Any

import lightning as L

__all__ = ["RankWatch"]

#: Seconds that a rank has for failing by itself when another one has failed.
GRACE = 1.0
#: Seconds that the others wait for it to put its things away and say what went wrong.
LINGER = 5.0
#: Seconds until a machine that is gone, or cut off, counts as dead: 30 idle, then 3 calls.
KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}


class RankWatch(L.Callback):
    """Ends every rank, with a message, as soon as one has died or failed.

    Otherwise the others may wait in their next collective for as long as the process group does,
    half an hour, or stay behind as orphans. Within 5 seconds of a death, however it comes, every
    other rank says which one it was and leaves with code 1; after an error on one rank within 10
    seconds, and after the loss of a whole machine within a minute. On one rank it does nothing.
    """

    # Each rank holds a connection to rank 0 for as long as it lives, and a thread sleeps on it.
    # The kernel closes the connection of a process that is gone, so nobody has to ask, and a rank
    # that is only slow, or stopped by a debugger, is not taken for dead.

    def __init__(self) -> None:
        self._watch: _Watch | None = None  # what is in it cannot be sent to a spawned process

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Connect every rank to rank 0."""
        if trainer.world_size == 1 or self._watch is not None:
            return
        strategy: Any = trainer.strategy
        server, place = None, None
        if trainer.is_global_zero:
            server = _serve()
            port, token = server.getsockname()[1], secrets.token_bytes(16)
            place = (strategy.cluster_environment.main_address, port, token)
        host, port, token = strategy.broadcast(place)
        try:
            if server is not None:
                peers = _accept(server, token, trainer.world_size - 1)
            else:
                peer = socket.create_connection((host, port), timeout=60)
                peer.sendall(token + trainer.global_rank.to_bytes(4, "big"))
                peers = {peer: 0}
        except OSError as error:
            warnings.warn(
                f"RankWatch: rank {trainer.global_rank} does not reach rank 0 at {host}:{port} "
                f"({error}): if a rank dies, the others may wait for it.",
                stacklevel=2,
            )
            return
        self._watch = _Watch(trainer.global_rank, peers)
        self._watch.start()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Tell the others; or, if this is only what another's death does here, leave."""
        if self._watch is not None:
            self._watch.fail(exception)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take leave of the others."""
        if self._watch is not None:
            self._watch.finish()
            self._watch = None


class _Watch(threading.Thread):
    """Sleeps until another rank is heard of."""

    def __init__(self, rank: int, peers: dict[socket.socket, int]) -> None:
        super().__init__(name="rank-watch", daemon=True)
        self.rank = rank
        self.peers = peers
        self.heard = threading.Event()
        self.ending = threading.Event()  # this rank is about to end by itself
        for peer in peers:
            peer.settimeout(None)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in KEEPALIVE.items():
                if hasattr(socket, name):  # elsewhere than on Linux the system's own times hold
                    peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def run(self) -> None:
        waiting = dict(self.peers)
        with selectors.DefaultSelector() as selector:
            for peer in waiting:
                selector.register(peer, selectors.EVENT_READ)
            while waiting:
                for key, _ in selector.select():
                    peer: Any = key.fileobj
                    try:
                        heard = peer.recv(4096).decode(errors="replace")
                    except OSError:  # reset, or a minute without an answer
                        heard = ""
                    rank = waiting.pop(peer)
                    selector.unregister(peer)
                    if heard != "done":
                        self.end(heard, rank, peer)
        self.ending.wait()
        for peer in self.peers:
            peer.close()

    def end(self, heard: str, rank: int, peer: socket.socket) -> None:
        """Pass it on, and leave unless this rank is leaving by itself."""
        news = heard or f"rank {rank} died without a word"
        self.tell(news)
        self.heard.set()
        # A mistake is made on all ranks alike, and then each can speak for itself.
        if self.ending.wait(GRACE if heard else 0):
            return
        sys.stderr.write(f"lit-diffusion: {news}; rank {self.rank} ends, too.\n")
        sys.stderr.flush()
        with contextlib.suppress(OSError):  # the failed one first: what it has to say says more
            peer.settimeout(LINGER)
            while peer.recv(4096):
                pass
        time.sleep(0.5)  # a launcher should see first who was first
        os._exit(1)  # the main thread may wait for the dead one for ever

    def fail(self, exception: BaseException) -> None:
        """This rank has failed, or runs into the failure of another."""
        if isinstance(exception, RuntimeError) and self.heard.wait(2):
            self.join(LINGER + 5)  # which ends the process
        reason = " ".join(f"{type(exception).__name__}: {exception}".split())
        self.tell(f"rank {self.rank} failed with {reason[:300]}")
        self.ending.set()

    def finish(self) -> None:
        """This rank has done its part."""
        self.tell("done")
        self.ending.set()

    def tell(self, what: str) -> None:
        """Send a word to everyone who still listens."""
        for peer in self.peers:
            with contextlib.suppress(OSError):
                peer.sendall(what.encode())


def _serve() -> socket.socket:
    """A port of any number, for both kinds of address if there are two."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _accept(server: socket.socket, token: bytes, n: int) -> dict[socket.socket, int]:
    """The connections of n ranks; who does not know the token is none of them."""
    peers = {}
    server.settimeout(60)
    with server:
        while len(peers) < n:
            peer, _ = server.accept()
            peer.settimeout(60)
            with contextlib.suppress(OSError):
                greeting = peer.recv(20, socket.MSG_WAITALL)
                if greeting[:16] == token:
                    peers[peer] = int.from_bytes(greeting[16:], "big")
                    continue
            peer.close()
    return peers

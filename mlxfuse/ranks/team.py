"""The connection of each rank with rank 0: what they tell each other, and who is still there.

MLX's own connections carry sums only, keep a core busy while they wait, and say nothing where a
machine hangs or is cut off. So rank 0 listens at the address that it has for MLX, and every other
rank connects. Both sides say once a second that they are there. A rank that ends says so, with its
exit code; one that is gone, or silent for `SILENCE` seconds, ends all the others with one line.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from .. import env
from ..errors import RanksError, UnsupportedError
from ..process import INTERRUPTED, errors, fail
from .agreement import all_values, group

if TYPE_CHECKING:
    import mlx.core as mx

T = TypeVar("T")
BEAT = 1.0  # seconds between two signs of life
SILENCE = 20.0  # seconds after which a rank that gives none is lost
GRACE = 0.5  # seconds in which a rank tells its own error before that of another ends it
_NOISE = 0.1  # seconds in which MLX's ring writes that a socket was closed
_CONNECT = 60.0
_LONGEST = 1 << 30  # bytes of a line


class Peer:
    """A connected rank.

    Args:
        on_end: is called with (rank, exit code) once, when it has ended; the code is None where it
            did not say so, and then a reason is given.
        silence: seconds after which it is lost.
    """

    def __init__(
        self,
        rank: int,
        connection: socket.socket,
        on_end: Callable[[int, int | None, str], None],
        silence: float = SILENCE,
    ) -> None:
        self.rank, self._connection, self._on_end = rank, connection, on_end
        self._silence = silence
        connection.settimeout(silence)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._lines = connection.makefile("rb")
        self._sending = threading.Lock()
        self._values: SimpleQueue[Any] = SimpleQueue()
        self._over = False
        for work in (self._listen, self._beat):
            threading.Thread(target=work, daemon=True).start()

    def tell(self, kind: str, value: Any = None) -> None:
        """Send a ``value``, a ``beat`` or the ``end``; nothing where the rank is gone."""
        line = json.dumps([kind, value]).encode() + b"\n"
        try:
            with self._sending:
                self._connection.sendall(line)
        except OSError:
            pass  # `_listen` notices

    def told(self) -> Any:
        """The next value that it sends.

        Raises:
            RanksError: it has ended.
        """
        kind, value = self._values.get()
        if kind == "end":
            self._values.put((kind, value))
            raise RanksError(f"rank {self.rank} has ended")
        return value

    def _beat(self) -> None:
        while not self._over:
            self.tell("beat")
            time.sleep(min(BEAT, self._silence / 3))

    def _listen(self) -> None:
        code, why = None, "it has gone"
        try:
            while line := self._lines.readline(_LONGEST):
                kind, value = json.loads(line)
                if kind == "end":
                    code = int(value)
                    break
                if kind == "value":
                    self._values.put((kind, value))
        except TimeoutError:
            why = f"it has been silent for {self._silence:.0f} seconds"
        except (OSError, ValueError):
            pass
        self._over = True
        self._values.put(("end", code))
        self._on_end(self.rank, code, why)


class Ranks:
    """All ranks of this run, from where this one stands.

    Args:
        of: MLX's group of them. All ranks must make theirs.

    Raises:
        UnsupportedError: MLX's back end is one of which rank 0's address is not known.
        RanksError: the ranks cannot be connected.
    """

    def __init__(self, of: mx.distributed.Group) -> None:
        self.group, self.rank, self.size = of, of.rank(), of.size()
        self._left = False
        try:
            self._peers = dict(self._accepted() if self.rank == 0 else self._connected())
        except OSError as error:
            raise RanksError(
                f"the ranks cannot be connected at rank 0's address, {_address()}: {error}; beside "
                "MLX's ports they need a free one there, which a firewall may refuse"
            ) from None

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def share(self, value: T) -> T:
        """Rank 0's ``value``, which goes through JSON; the others' does not matter."""
        if not self.first:
            told: T = self._peers[0].told()
            return told
        for peer in self._peers.values():
            peer.tell("value", value)
        return value

    def of_first(self, make: Callable[[], T]) -> T:
        """What ``make`` gives on rank 0, where alone it is called."""
        if not self.first:
            told: T = self._peers[0].told()
            return told
        return self.share(make())

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.first:
            for peer in self._peers.values():
                peer.told()
            self.share(None)
        else:
            self._peers[0].tell("value")
            self._peers[0].told()

    def leave(self, code: int) -> None:
        """Say that this rank ends, with its exit code; if it is not 0 all others end too."""
        self._left = True
        for peer in self._peers.values():
            peer.tell("end", code)

    def settle(self) -> None:
        """Wait some seconds, in which this rank is ended where another is lost or has failed."""
        time.sleep(10 * GRACE)

    def _accepted(self) -> list[tuple[int, Peer]]:
        host, key = _address(), secrets.token_hex(16)
        with socket.create_server((host, 0)) as listener:
            listener.settimeout(_CONNECT)
            all_values([listener.getsockname()[1], key], self.group)
            found: dict[int, socket.socket] = {}
            while len(found) < self.size - 1:
                connection, _ = listener.accept()
                connection.settimeout(_CONNECT)
                rank = _introduced(connection, key)
                if rank is None or rank in found or not 0 < rank < self.size:
                    connection.close()
                else:
                    found[rank] = connection
        return [(rank, Peer(rank, found[rank], self._ended)) for rank in found]

    def _connected(self) -> list[tuple[int, Peer]]:
        port, key = all_values(None, self.group)[0]
        connection = socket.create_connection((_address(), port), _CONNECT)
        connection.sendall(f"{key} {self.rank:8}".encode())
        return [(0, Peer(0, connection, self._ended))]

    def _ended(self, rank: int, code: int | None, why: str) -> None:
        """A rank has ended; called in its peer's thread."""
        if code == 0 or self._left:
            return
        if code is None:
            time.sleep(_NOISE)
            self._end(1, f"rank {rank} is lost ({why}), which ends all ranks")
        time.sleep(GRACE)
        told = self.first and code != INTERRUPTED
        self._end(code, f"rank {rank} has failed, which ends all ranks" if told else "")

    def _end(self, code: int, message: str) -> NoReturn:
        if message:
            fail(message, errors())
        self.leave(code)
        sys.stdout.flush()
        os._exit(code)


def _introduced(connection: socket.socket, key: str) -> int | None:
    """The rank that has just connected; None if it is no rank of this run."""
    said = b""
    try:
        while len(said) < len(key) + 9 and (more := connection.recv(len(key) + 9 - len(said))):
            said += more
        told, rank = said.decode("ascii").split()
        return int(rank) if secrets.compare_digest(told, key) else None
    except (OSError, ValueError):
        return None


def _address() -> str:
    """Where MLX reaches rank 0: the first address of the ring's hosts, or JACCL's coordinator."""
    found = env.first_rank_address()
    if found is None:
        raise UnsupportedError(
            "mlxfuse runs on several ranks over the back ends ring and jaccl; start it with "
            "mlx.launch --backend ring or --backend jaccl"
        )
    return found


@cache
def join() -> Ranks | None:
    """The ranks of this run, connected by the first call; None if this process is the only one."""
    found = group()
    return None if found is None else Ranks(found)

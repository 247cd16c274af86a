"""Waiting for other ranks, of which any may die or hang: the run ends then, and says which.

All messages are non-blocking and polled. A rank that waits answers the others' roll call; one that
was stopped, or computes for ever, does not.
"""

import os
import platform
import secrets
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from . import sentinel

VARIABLE, SECONDS = "GRU_ANY_RANK_TIMEOUT", 300.0
START = 10.0  # seconds in which the sentinel begins to watch
GRACE = 3.0  # seconds for the answers to a roll call, and for the others to fail likewise
CALL, ANSWER, GREETING = 1, 2, 3  # tags


class Watch:
    """A communicator, and a second one for what is said about the first.

    Parameters
    ----------
    comm : communicator of mpi4py
    last_good : callable
        Returns words about the last checkpoint, for the message at an early end.

    Attributes
    ----------
    seconds : float
        How long a rank is waited for.
    places : list of (str, int)
        The host and the process of each rank.
    give_up : callable
        Ends what a device does with other ranks, before this process leaves them.
    """

    give_up: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, comm: Any, last_good: Callable[[], str]) -> None:
        from mpi4py import MPI

        self._mpi, self._last_good = MPI, last_good
        self.in_place, self.seconds = MPI.IN_PLACE, timeout()
        self.places: list[tuple[str, int]] = []
        self._looked = 0.0
        self._sentinel: socket.socket | None = None
        self.comm, self._token = comm, secrets.token_hex(8)
        self._alarm = comm  # until there is another one
        self._meet()
        (own, first), (alarm, second) = comm.Idup(), comm.Idup()
        self.wait([first, second])
        self.comm, self._alarm = own, alarm

    def _meet(self) -> None:
        """Wait for all ranks, and exchange their places and the first one's token."""
        comm, own = self.comm, (platform.node(), os.getpid())
        if comm.rank:
            greeting = comm.isend(own, 0, GREETING)
            # the first one speaks for those that are missing, unless it is the one
            self._receive([0], self.seconds + GRACE)
            self.places, self._token = comm.recv(source=0, tag=GREETING)
            greeting.wait()
            return
        others = range(1, comm.size)
        self._receive(list(others), self.seconds)
        places = [own, *(comm.recv(source=rank, tag=GREETING) for rank in others)]
        for request in [comm.isend((places, self._token), rank, GREETING) for rank in others]:
            request.wait()
        self.places = places

    def _receive(self, ranks: list[int], seconds: float) -> None:
        """Wait until a greeting of each of these ranks can be received."""
        began = time.monotonic()
        while ranks := [r for r in ranks if not self.comm.Iprobe(r, GREETING)]:
            time.sleep(1e-4)
            if time.monotonic() - began > seconds:
                names = ", ".join(f"rank {rank}" for rank in ranks)
                self._say(f"{names} did not come to the work that all share for {seconds:g} s")
                self._abort()

    def post_sentinel(self, checkpoints: Sequence[str]) -> None:
        """Start a process on each machine that says which of its ranks was killed, on Linux."""
        if sys.platform != "linux":
            return
        own, (host, _) = self._alarm.rank, self.places[self._alarm.rank]
        here = [rank for rank, (other, _) in enumerate(self.places) if other == host]
        address = f"\0gru_any.{self._token}"
        with socket.socket(socket.AF_UNIX) as listener:
            if here[0] == own:
                listener.bind(address)
                listener.listen(len(here))
                command = [sys.executable, "-S", "-E", sentinel.__file__, str(listener.fileno())]
                subprocess.Popen(
                    [*command, str(len(here)), str(os.getpid()), *checkpoints],
                    pass_fds=[listener.fileno()],
                    start_new_session=True,  # or the launcher would kill it too
                )
            self.wait([self.comm.Ibarrier()])
        line = socket.socket(socket.AF_UNIX)
        line.connect(address)
        line.sendall(f"{self.name(own)}\n".encode())
        self.wait([self.comm.Ibarrier()])
        line.settimeout(START)
        with suppress(TimeoutError):
            line.recv(1)  # it watches now
        line.settimeout(None)
        self._sentinel = line

    def dismiss_sentinel(self) -> None:
        """Say that this process ends in another way."""
        if self._sentinel is not None:
            with self._sentinel, suppress(OSError):  # another rank has ended it already
                self._sentinel.sendall(b"end\n")
            self._sentinel = None

    def wait(self, requests: Sequence[Any]) -> None:
        """Wait until all requests are done; end all ranks after `seconds` without that."""
        began = time.monotonic()
        while not self._done(requests):
            passed = time.monotonic() - began
            if passed > 0.002:
                time.sleep(5e-5)
            if passed > 0.2:
                self._answer()
                self._look()
            if passed > self.seconds:
                self._end(f"did not answer for {self.seconds:g} s", self._silent())

    def _done(self, requests: Sequence[Any]) -> bool:
        try:
            return all([request.Test() for request in requests])  # each, for its errors
        except RuntimeError as e:  # of a device, perhaps since another rank is gone
            if silent := self._silent():
                self._end(f"did not answer ({type(e).__name__}: {e})", silent)
            raise

    def _answer(self) -> None:
        """Tell every rank that asks that this one is there."""
        status = self._mpi.Status()
        while self._alarm.Iprobe(tag=CALL, status=status):
            self._alarm.recv(source=status.source, tag=CALL)
            self._alarm.isend(None, status.source, ANSWER)

    def _silent(self) -> list[int]:
        """Call the roll; return the ranks that do not answer."""
        others = [r for r in range(self._alarm.size) if r != self._alarm.rank]
        for rank in others:
            self._alarm.isend(None, rank, CALL)
        there: set[int] = set()
        began = time.monotonic()
        while time.monotonic() - began < GRACE and len(there) < len(others):
            self._answer()
            for rank in others:
                if self._alarm.Iprobe(rank, ANSWER):
                    self._alarm.recv(source=rank, tag=ANSWER)
                    there.add(rank)
            time.sleep(0.01)
        return [rank for rank in others if rank not in there]

    def _look(self) -> None:
        """End all ranks if a process on this machine is gone."""
        now = time.monotonic()
        if now - self._looked < 1 or os.name != "posix":
            return
        self._looked = now
        here = self.places[self._alarm.rank][0]
        gone = [
            rank for rank, (host, pid) in enumerate(self.places) if host == here and not _alive(pid)
        ]
        if gone:
            self._end("died", gone)

    def _end(self, what: str, ranks: list[int]) -> NoReturn:
        """Print which ranks fail, and end all."""
        speaker = min({*range(self._alarm.size)} - {*ranks})
        if speaker != self._alarm.rank:
            time.sleep(GRACE)  # it ends this one too
        names = ", ".join(self.name(rank) for rank in ranks)
        if not ranks:
            names, what = "the ranks", "wait for different things"
        self._say(f"{names} {what}; {self._last_good()}")
        self._abort()

    def name(self, rank: int) -> str:
        """Return a rank with its host and process."""
        host, pid = self.places[rank]
        return f"rank {rank} (process {pid} on {host})"

    def _say(self, text: str) -> None:
        print(f"gru_any: {text}", file=sys.stderr, flush=True)

    def _abort(self) -> NoReturn:
        self.dismiss_sentinel()
        self.give_up()
        time.sleep(0.1)  # the launcher may drop what it has not yet read of our last words
        self.comm.Abort(1)
        raise SystemExit(1)  # Abort does not return

    @contextmanager
    def guard(self) -> Iterator[None]:
        """End all ranks if one of them fails alone; if all fail, each raises its error."""
        try:
            yield
        except BaseException as e:
            self.dismiss_sentinel()
            if not self._all_fail():
                traceback.print_exc()
                own = self.name(self._alarm.rank)
                self._say(f"{own} failed, {type(e).__name__}: {e}; {self._last_good()}")
                self._abort()
            self.give_up()
            raise
        self.wait([self.comm.Ibarrier()])  # all have got what they wait for
        self.dismiss_sentinel()
        self.give_up()
        self.comm.Free()
        self._alarm.Free()

    def _all_fail(self) -> bool:
        request, began = self._alarm.Ibarrier(), time.monotonic()
        while not request.Test():
            if time.monotonic() - began > GRACE:
                return False
            self._answer()
            time.sleep(0.001)
        return True


def timeout() -> float:
    """Return how many seconds a rank is waited for, from the environment or by default."""
    text = os.environ.get(VARIABLE, "")
    try:
        seconds = float(text or SECONDS)
        if seconds > 0:
            return seconds
    except ValueError:
        pass
    raise ValueError(f"{VARIABLE} is {text!r}, expected a number of seconds above 0")


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        pass
    return True

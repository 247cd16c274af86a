"""A small process that outlives the ranks of its machine, and says which of them was killed.

A launcher that sees one process die kills the others at once, before they could say anything. Each
rank keeps a connection to this process, which the system closes when the rank ends, and sends a
line before it ends in another way. This file is run by itself, as `python sentinel.py SOCKET COUNT
PARENT CHECKPOINT...`, with the newest checkpoint first, and imports nothing of the package.
"""

import os
import select
import socket
import sys


def main() -> None:
    """Accept so many ranks, and print which one ends first, unless it says that it will."""
    if not (ranks := accepted(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))):
        return
    files = {rank.fileno(): rank.makefile("r", encoding="utf-8") for rank in ranks}
    names = {number: file.readline().strip() for number, file in files.items()}
    with select.epoll() as poll:
        for number in files:
            poll.register(number, select.EPOLLIN)
        if poll.poll(0):  # some have ended, and which was the first is not known
            return
        for rank in ranks:
            rank.send(b".")
        number, _ = poll.poll()[0]  # they are in the order in which they became ready
    if not files[number].readline():
        # the newest is not there for a moment while it is replaced
        newest = next(filter(os.path.exists, sys.argv[4:]), None)
        kept = f"the last good checkpoint is {newest}" if newest else "there is no checkpoint"
        print(f"gru_any: {names[number]} was killed; {kept}", file=sys.stderr, flush=True)


def accepted(number: int, count: int, parent: int) -> list[socket.socket]:
    """Return the connections of so many ranks, or none if the rank that started this has ended."""
    ranks: list[socket.socket] = []
    with socket.socket(fileno=number) as listener:
        listener.settimeout(0.1)
        while len(ranks) < count:
            try:
                ranks.append(listener.accept()[0])
            except TimeoutError:
                if os.getppid() != parent:
                    return []
    for rank in ranks:
        rank.setblocking(True)
    return ranks


if __name__ == "__main__":
    main()

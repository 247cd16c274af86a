"""A small process that outlives the ranks of its machine, and says which of them was killed.

A launcher that sees one process die kills the others at once, before they could say anything. Each
rank keeps a connection to this process, which the system closes when the rank ends, and sends a
line before it ends in another way. This file is run by itself, as `python sentinel.py SOCKET COUNT
CHECKPOINT`, and imports nothing of the package.
"""

import os
import select
import socket
import sys


def main() -> None:
    """Accept so many ranks, and print which one ends first, unless it says that it will."""
    with socket.socket(fileno=int(sys.argv[1])) as listener:
        ranks = [listener.accept()[0] for _ in range(int(sys.argv[2]))]
    files = {rank.fileno(): rank.makefile("r", encoding="utf-8") for rank in ranks}
    names = {number: file.readline().strip() for number, file in files.items()}
    with select.epoll() as poll:
        for number in files:
            poll.register(number, select.EPOLLIN)
        number, _ = poll.poll()[0]  # they are in the order in which they became ready
    if not files[number].readline():
        kept = "there is no checkpoint"
        if os.path.exists(sys.argv[3]):
            kept = f"the last good checkpoint is {sys.argv[3]}"
        print(f"gru_any: {names[number]} was killed; {kept}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

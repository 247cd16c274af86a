"""What others make of the text of train_text.py: xz, and PyTorch's GRU by the same recipe.

xz is measured in bits per character on the last 5 % of the text: alone, and when it may look back
at the training part (the text repeats itself). PyTorch's GRU has the reset gate after the product.
"""

import argparse
import lzma
import math
import time
from typing import Any

from train_text import parse, read, split

from gru_any.schedules import cosine, warm_up


def xz(before: str, part: str) -> float:
    """Bits per character that the part adds."""

    def bits(text: str) -> int:
        return 8 * len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))

    return (bits(before + part) - (bits(before) if before else 0)) / len(part)


def torch_gru(text: Any, args: argparse.Namespace) -> tuple[float, float, float]:
    """Bits per character on the validation and the test part, and the seconds of training."""
    import torch

    torch.manual_seed(args.seed)
    size = len(text.characters)
    parts = [
        torch.nn.Embedding(size, args.embedding),
        torch.nn.GRU(args.embedding, args.hidden),
        torch.nn.Linear(args.hidden, size),
    ]
    loss_of = torch.nn.CrossEntropyLoss()
    parameters = [p for part in parts for p in part.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=args.rate)
    length = len(text.train) // args.batch
    streams = torch.tensor(text.train[: length * args.batch].reshape(args.batch, -1).T.copy())

    def run(x: Any, state: Any) -> tuple[Any, Any]:
        y, state = parts[1](parts[0](x), state)
        return parts[2](y).flatten(0, 1), state

    schedule = warm_up(args.steps // 50, cosine(args.rate, args.steps))
    start, state, at = time.monotonic(), None, 0
    for step in range(args.steps):
        if at + args.chunk >= length:
            state, at = None, 0
        for group in optimiser.param_groups:
            group["lr"] = schedule(step)
        y, state = run(streams[at : at + args.chunk], None if state is None else state.detach())
        loss = loss_of(y, streams[at + 1 : at + args.chunk + 1].flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, args.clip)
        optimiser.step()
        at += args.chunk
    seconds = time.monotonic() - start
    found = []
    for data in (text.valid, text.test):
        tensor = torch.tensor(data)[:, None]
        with torch.inference_mode():
            y, _ = run(tensor[:-1], None)
            found.append(loss_of(y, tensor[1:, 0]).item() / math.log(2))
    return found[0], found[1], seconds


def main() -> None:
    args = parse(None)
    whole = read(args.data)
    text = split(whole)
    n = len(whole)
    train, test = whole[: n * 90 // 100], whole[n * 95 // 100 :]
    print(f"xz -9e on the test part alone: {xz('', test):.2f} bits per character")
    print(f"xz -9e after the training part: {xz(train, test):.2f} bits per character")
    try:
        valid, tested, seconds = torch_gru(text, args)
    except ImportError:
        print("PyTorch: not installed")
    else:
        print(f"PyTorch: test {tested:.3f}, validation {valid:.3f}, trained {seconds:.0f} s")


if __name__ == "__main__":
    main()

"""A translator in PyTorch, character by character: the example of docs/convert.md.

It is written as such models are: an encoder over packed sequences in two directions, a decoder that
is told the right characters in training, attention over the encoder's outputs (Luong et al. 2015),
cross entropy, Adam, clipped gradients. Nothing in the model knows of gru_any.

    python scripts/benchmarks/translate_torch.py                 learns to spell numbers by digits
    python scripts/benchmarks/translate_torch.py --accelerated   the same, with one line more

From "four hundred twelve" it makes "four one two".
"""

import argparse
import random
import time

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

LETTERS = "\0\n abcdefghijklmnopqrstuvwxyz"  # padding, the end and the beginning, text
ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
        "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
        "nineteen"]  # fmt: skip
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


class Translator(nn.Module):
    """From characters to characters."""

    def __init__(self, letters: int = len(LETTERS), size: int = 64, hidden: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(letters, size, padding_idx=0)
        self.encoder = nn.GRU(size, hidden, batch_first=True, bidirectional=True)
        self.bridge = nn.Linear(2 * hidden, hidden)
        self.decoder = nn.GRU(size, hidden, num_layers=2, batch_first=True, dropout=0.1)
        self.keys = nn.Linear(2 * hidden, hidden)
        self.combine = nn.Linear(3 * hidden, hidden)
        self.out = nn.Linear(hidden, letters)

    def forward(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        """Return scores (B, T, letters) of the characters after each of the target."""
        x = self.embedding(source)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        outputs, h_n = self.encoder(packed)
        outputs, _ = pad_packed_sequence(outputs, batch_first=True)
        state = torch.tanh(self.bridge(torch.cat([h_n[0], h_n[1]], dim=-1)))
        y, _ = self.decoder(self.embedding(target), hx=state.expand(2, -1, -1).contiguous())
        scores = y @ self.keys(outputs).transpose(1, 2)
        scores = scores.masked_fill(source[:, None, : outputs.shape[1]] == 0, -torch.inf)
        context = scores.softmax(-1) @ outputs
        return self.out(torch.tanh(self.combine(torch.cat([y, context], dim=-1))))


def words(n: int) -> str:
    """Return a number below a billion in English."""
    for size, name in ((10**6, "million"), (1000, "thousand"), (100, "hundred")):
        if n >= size:
            return f"{words(n // size)} {name}" + (f" {words(n % size)}" if n % size else "")
    if n >= 20:
        return TENS[n // 10 - 2] + (f" {ONES[n % 10]}" if n % 10 else "")
    return ONES[n]


def batch(rng: random.Random, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return numbers in words, their lengths, and their digits in words, between two ends."""
    numbers = [rng.randrange(10 ** rng.randrange(1, 10)) for _ in range(size)]
    digits = [" ".join(words(int(d)) for d in str(n)) for n in numbers]
    sources = [torch.tensor([LETTERS.index(c) for c in words(n)]) for n in numbers]
    targets = [torch.tensor([LETTERS.index(c) for c in f"\n{text}\n"]) for text in digits]
    return (
        pad_sequence(sources, batch_first=True),
        torch.tensor([len(s) for s in sources]),
        pad_sequence(targets, batch_first=True),
    )


def update(model: Translator, optimiser: torch.optim.Optimizer, data: tuple[Tensor, ...]) -> Tensor:
    """Take a step of training; return the loss."""
    source, lengths, target = data
    scores = model(source, lengths, target[:, :-1])
    loss = cross_entropy(scores.flatten(0, 1), target[:, 1:].flatten(), ignore_index=0)
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    return loss.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--accelerated", action="store_true", help="with gru_any's GRU")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rng, model = random.Random(0), Translator()
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3, fused=True)
    if args.accelerated:
        from gru_any.convert.torch import accelerate

        print(accelerate(model))
    start = time.perf_counter()
    for i in range(1, args.steps + 1):
        loss = update(model, optimiser, batch(rng, 64))
        if i % 50 == 0 or i == args.steps:
            print(f"step {i}: {float(loss):.3f} nats, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()

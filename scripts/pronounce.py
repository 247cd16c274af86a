"""Deploy a GRU that others have trained: g2p-en, which says how English words are pronounced.

    pip install g2p-en "gru-any[fast]"
    export OMP_NUM_THREADS=1
    python scripts/pronounce.py               # the words that the package has two ways to say
    python scripts/pronounce.py activationist gruyere

The package (Apache 2.0) ships an encoder and a decoder as NumPy arrays, and runs them with NumPy.
This script brings them in through a converter, runs them as streams, frozen streams and C, and
compares answers and speed with the package's own. Its dictionary is left out: every word goes to
the network.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from gru_any import Chain, convert
from gru_any.deploy import c, freeze
from gru_any.stream import Stream

START, END, LONGEST = 2, 3, 20  # of the package's decoder: two symbols, and when it gives up
CORTEX_M7 = "-mcpu=cortex-m7 -mthumb -mfpu=fpv5-sp-d16 -mfloat-abi=hard"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("words", nargs="*", help="without any, those of the package's list")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(arguments)
    package = theirs()
    words = args.words or sorted({word for word in package.homograph2features if word.isalpha()})
    with tempfile.TemporaryDirectory() as folder:
        compare(package, words, args.rounds, Path(folder))


def theirs() -> Any:
    """The package's own model, without the files that it would download."""
    try:
        import nltk

        nltk.download = lambda *_, **__: False
        from g2p_en import g2p
    except ImportError as e:
        sys.exit(f"{e}: pip install g2p-en")
    g2p.cmudict = SimpleNamespace(dict=dict)
    return g2p.G2p()


def models(variables: Any) -> tuple[Chain, Chain]:
    """The encoder, an Embedding and a GRU, and the decoder, with a Linear behind them."""

    def named(side: str) -> dict[str, Any]:
        gru = {f"gru.{kind}_{at}_l0": variables[f"{side}_{kind[0]}_{at}"]
               for kind in ("weight", "bias") for at in ("ih", "hh")}  # fmt: skip
        return {"embedding.weight": variables[f"{side}_emb"], **gru}

    linear = {"out.weight": variables["fc_w"], "out.bias": variables["fc_b"]}
    encoder = convert.torch.from_arrays(named("enc"), ["embedding", "gru"])
    decoder = convert.torch.from_arrays(named("dec") | linear, ["embedding", "gru", "out"])
    return encoder, decoder


def pronounced(encoder: Any, decoder: Any, letters: list[int]) -> list[int]:
    """Return the sounds that the decoder gives for letters; both are streams, in Python or C."""
    encoder.reset()
    for letter in letters:
        encoder.step(np.array([letter]))
    decoder.state = encoder.state
    said, last = [], START
    while len(said) < LONGEST:
        last = int(decoder.step(np.array([last])).argmax())
        if last == END:
            break
        said.append(last)
    return said


def contenders(encoder: Chain, decoder: Chain, folder: Path) -> dict[str, tuple[Any, Any]]:
    """Pairs of streams by name; what this machine lacks is left out, and said."""
    pair = encoder, decoder
    found = {"stream": (Stream(encoder), Stream(decoder))}
    for name, weights in (("frozen", "float32"), ("frozen int8", "int8")):
        options = {} if weights == "float32" else {"weights": weights}
        try:
            found[name] = tuple(Stream(freeze(model, **options)) for model in pair)
        except TypeError as e:
            print(f"{name} is missing: {e}")
    for name, weights in (("C", "float32"), ("C int8", "int8")):
        try:
            for side, model in zip(("encoder", "decoder"), pair, strict=True):
                c.build(model, folder / f"{side}_{weights}.so", weights)
            found[name] = tuple(
                c.load(folder / f"{side}_{weights}.so") for side in ("encoder", "decoder")
            )
        except RuntimeError as e:
            print(f"{name} is missing: {e}")
    return found


def compare(package: Any, words: list[str], rounds: int, folder: Path) -> None:
    """Print how far the answers agree, how long a word takes, and how large the C program is."""
    encoder, decoder = models(package.variables)
    worst = max(difference(package, encoder, word) for word in words)
    print(f"largest difference of the encoder's states to the package's: {worst:.1e}")
    asked = {word: [package.g2idx.get(v, 1) for v in [*word, "</s>"]] for word in words}
    own = {word: package.predict(word) for word in words}
    ways: dict[str, Callable[[str], Any]] = {"the package": package.predict}
    for name, pair in contenders(encoder, decoder, folder).items():
        ways[name] = lambda word, pair=pair: [
            package.idx2p[i] for i in pronounced(*pair, asked[word])
        ]
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.process_time()  # which other programs change little
            for word in words:
                way(word)
            times[name].append(1e6 * (time.process_time() - start) / len(words))
    print(f"\n| {len(words)} words | us of a processor a word | speed | same phonemes |")
    print("|---|---|---|---|")
    for name, way in ways.items():
        pairs = zip(times["the package"], times[name], strict=True)
        ratio, same = (
            statistics.median(a / b for a, b in pairs),
            sum(way(w) == own[w] for w in words),
        )
        print(f"| {name} | {statistics.median(times[name]):.0f} | {ratio:.1f} | {same} |")
    for word in words[:: max(1, len(words) // 4)]:
        print(f"{word}: {' '.join(own[word])}")
    for side, model in (("encoder", encoder), ("decoder", decoder)):
        size(model, side, folder / side)


def difference(package: Any, encoder: Chain, word: str) -> float:
    """The largest difference of the encoder's states over a word."""
    weights = [getattr(package, f"enc_{name}") for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
    expected = package.gru(package.encode(word), len(word) + 1, *weights)[0]
    letters = [package.g2idx.get(v, 1) for v in [*word, "</s>"]]
    return float(np.abs(encoder(np.array(letters)[:, None])[0][:, 0] - expected).max())


def size(model: Chain, name: str, folder: Path) -> None:
    """Print flash and RAM of the C program with int8 weights, for a microcontroller."""
    compiler = "arm-none-eabi-gcc"
    if not (shutil.which(compiler) and shutil.which("make")):
        print(f"the size on a microcontroller is missing: there is no {compiler} or no make")
        return
    c.write(model, folder, "int8", name=name)
    command = ["make", "-s", "size", f"CC={compiler}", "CFLAGS=-Os", f"MACHINE={CORTEX_M7}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    print(f"{name}, int8, Cortex-M7: " + "; ".join(done.stdout.splitlines()))


if __name__ == "__main__":
    main()

"""Measure how far `xz -9e` compresses the text of train_text.py, in bits per character.

It is measured on the last 5 % of the text: alone, and after the training part, to which `xz` can
then refer. compare_torch.py runs the same recipe on PyTorch.
"""

import lzma
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # the scripts of the folder above

from train_text import parse, read


def xz(before: str, part: str) -> float:
    """Return the bits per character that the part adds."""

    def bits(text: str) -> int:
        return 8 * len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))

    return (bits(before + part) - (bits(before) if before else 0)) / len(part)


def main() -> None:
    text = read(parse(None).data)
    train, test = text[: len(text) * 90 // 100], text[len(text) * 95 // 100 :]
    print(f"xz -9e on the test part alone: {xz('', test):.2f} bits per character")
    print(f"xz -9e after the training part: {xz(train, test):.2f} bits per character")


if __name__ == "__main__":
    main()

"""Write an HTML file in which one types and watches a trained GRU read.

    python scripts/train_text.py --hidden 64 --embedding 32 --steps 8000 --out out/small
    python scripts/interactive.py --load out/small --out docs/interactive.html

The file contains the weights, and a step in JavaScript that is generated from the equations.
"""

import argparse
import base64
import json
import string
import sys
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from look_inside import load

from gru_any import GRU, Chain, Embedding, Linear, equations
from gru_any.codegen.javascript_source import javascript
from gru_any.codegen.schedule import HOST, Schedule, forward_schedule
from gru_any.inspect.values import activity, half_life

TEMPLATE = Path(__file__).with_name("interactive.html")
TEXT = 'The "for" statement is used to iterate over the elements of a '


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--load", metavar="DIR", required=True, help="what train_text.py saved")
    parser.add_argument("--out", type=Path, default=Path("out/interactive.html"))
    parser.add_argument("--text", default=TEXT, help="what stands in the page at first")
    args = parser.parse_args(arguments)
    text = page(*load(args.load), args.text)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text, "utf-8")
    print(f"{args.out}: {len(text.encode()) / 1000:,.0f} kB; open it in a browser")


def page(characters: str, model: Chain, text: str) -> str:
    """Return the HTML of a model, with a text to begin with."""
    embedding, gru, out = parts(model)
    known = "".join(c for c in text if c in characters)
    if not known:
        sys.exit(f"--text holds nothing that the model knows, which is {characters!r}")
    x = np.array([characters.index(c) for c in known])[:, None]
    z = activity(model, x)[0]["z"][-1]
    data = {
        "characters": characters,
        "H": gru.hidden_size,
        "order": np.argsort(half_life(z)).tolist(),
        "embedding": encoded(embedding.params["weight"]),
        "layers": [list(map(encoded, layer(gru, i))) for i in range(gru.num_layers)],
        "out": [encoded(out.params["weight"]), encoded(out.params["bias"])],
    }
    filled = {
        "H": str(gru.hidden_size),
        "TEXT": escape(known),
        "DATA": json.dumps(data).replace("<", "\\u003c"),
        "STEP": javascript(forward(gru.reset_after)),
    }
    return Page(TEMPLATE.read_text("utf-8")).substitute(filled)


class Page(string.Template):
    """A template in which only names in capitals are replaced: the page has $ and ${ of its own."""

    pattern = r"\$(?:(?P<named>[A-Z]+)|(?P<escaped>(?!))|(?P<braced>(?!))|(?P<invalid>(?!)))"


def parts(model: Chain) -> tuple[Embedding, GRU, Linear]:
    """Return the layers of a model as train_text.py builds it."""
    kinds = (Embedding, GRU, Linear)
    found: list[Any] = [layer for layer in model.layers if isinstance(layer, kinds)]
    if tuple(map(type, found)) != kinds or "_reverse" in found[1].suffixes:
        sys.exit("the page takes an Embedding, a GRU that reads forward alone and a Linear layer")
    if found[1].zoneout:
        sys.exit("the page shows the equations as they are, without zoneout")
    if found[1].layer_norm:
        sys.exit("the page shows the equations as they are, without layer normalisation")
    return found[0], found[1], found[2]


def layer(gru: GRU, number: int) -> Iterable[np.ndarray]:
    """Return W, b, U and, with reset after, c, as the library's sweep takes them."""
    W, b, recurrent = gru._stack(gru._runner).weights(gru.params, number, "")
    return W, np.zeros(len(W), W.dtype) if b is None else b, *recurrent


def encoded(array: np.ndarray) -> str:
    """Encode an array as little-endian float32 in base64."""
    return base64.b64encode(np.ascontiguousarray(array, "<f4").tobytes()).decode()


def forward(after: bool) -> Schedule:
    """Return a step that saves r, z and n first."""
    return forward_schedule(equations.variant(after).step, int(after), True, HOST)


if __name__ == "__main__":
    main()

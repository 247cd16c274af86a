"""Write one HTML file in which a person types and watches a trained GRU read.

    python scripts/train_text.py --hidden 64 --embedding 32 --steps 8000 --out out/small
    python scripts/interactive.py --load out/small --out docs/interactive.html

The weights are in the file, and the step is JavaScript generated from the traced equations.
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
from gru_any.codegen.trace import MATRIX, Op, Product, Program, trace
from gru_any.inspect.values import activity, half_life

TEMPLATE = Path(__file__).with_name("interactive.html")
TEXT = 'The "for" statement is used to iterate over the elements of a '
SIGNS = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}


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
    """The HTML file of a model and a text to begin with."""
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
    """Only names in capitals are filled in: the page's own $ and ${ stay."""

    pattern = r"\$(?:(?P<named>[A-Z]+)|(?P<escaped>(?!))|(?P<braced>(?!))|(?P<invalid>(?!)))"


def parts(model: Chain) -> tuple[Embedding, GRU, Linear]:
    """The layers of a model as train_text.py builds it."""
    kinds = (Embedding, GRU, Linear)
    found: list[Any] = [layer for layer in model.layers if isinstance(layer, kinds)]
    if tuple(map(type, found)) != kinds or "_reverse" in found[1].suffixes:
        sys.exit("the page takes an Embedding, a GRU that reads forward alone and a Linear layer")
    return found[0], found[1], found[2]


def layer(gru: GRU, number: int) -> Iterable[np.ndarray]:
    """W, b, U and, for reset after, c: as the library's own sweep takes them."""
    W, b, recurrent = gru._stack(gru._runner).weights(gru.params, number, "")
    return W, np.zeros(len(W), W.dtype) if b is None else b, *recurrent


def encoded(array: np.ndarray) -> str:
    """float32, little-endian, as base64."""
    return base64.b64encode(np.ascontiguousarray(array, "<f4").tobytes()).decode()


# from the traced operations to JavaScript --------------------------------------------------------


def forward(after: bool) -> Program:
    """The operations of a step, of which the first three saved arrays are r, z and n."""
    return trace(equations.variant(after).step, 3, 1, MATRIX, *[1] * after)


def javascript(program: Program) -> str:
    """A function `step(a, h, U, c)` that returns {h, r, z, n}."""
    (a, (h,), _, *vectors) = program.inputs
    lines = [f"const v{i} = a.subarray({n} * H, {n + 1} * H);" for n, i in enumerate(a)]
    lines += [f"const v{h} = h;", *(f"const v{c} = c;" for (c,) in vectors)]
    loop: list[str] = []
    for op in program.ops:
        if isinstance(op, Product):
            lines += [*looped(loop), *product(op)]
            loop = []
        else:
            lines.append(f"const v{op.output} = new Float64Array(H);")
            loop.append(f"v{op.output}[j] = {value(op)};")
    results = zip("rzn", program.extras[:3], strict=True)
    named = [f"h: v{program.result}", *(f"{name}: v{ids[0]}" for name, ids in results)]
    lines += [*looped(loop), f"return {{ {', '.join(named)} }};"]
    body = "\n".join(f"  {line}" for line in lines)
    return f"function step(a, h, U, c) {{\n  const H = h.length;\n{body}\n}}"


def product(op: Product) -> list[str]:
    """The product of one column with rows of U, and the columns it gives."""
    if not op.transposed or len(op.inputs) != 1:
        raise NotImplementedError(f"{op} is no product of the state with rows of U")
    first, last, name = op.rows.start, op.rows.stop, f"q{op.outputs[0]}"
    parts = [
        f"const v{i} = {name}.subarray({n} * H, {n + 1} * H);" for n, i in enumerate(op.outputs)
    ]
    return [f"const {name} = product(U, v{op.inputs[0]}, {first} * H, {last} * H);", *parts]


def value(op: Op) -> str:
    """One operation on the entries of unit j."""
    x = [repr(i) if isinstance(i, float) else f"v{i}[j]" for i in op.inputs]
    return f" {SIGNS[op.name]} ".join(x) if op.name in SIGNS else f"Math.{op.name}({x[0]})"


def looped(lines: list[str]) -> list[str]:
    """The lines for each unit."""
    return ["for (let j = 0; j < H; j++) {", *(f"  {v}" for v in lines), "}"] if lines else []


if __name__ == "__main__":
    main()

"""The files of a C program for a model."""

from collections.abc import Iterable
from textwrap import indent

from ...codegen.c_source import helpers, product
from .parts import Part, Parts
from .selftest import makefile, self_test
from .weights import binary_weights, constant_weights, identity, weight_members

CONSTANTS = "extern const {0}_weights {0}_constants;\n"
FITS = """\
/* 1 if what was read from {0}_weights.bin is this model's, else 0 */
int {0}_fits(const {0}_weights *weights);
"""
IS_THIS = """\
int {0}_fits(const {0}_weights *weights)
{{
    return weights->id[0] == {1}u && weights->id[1] == {2}u;
}}

"""


def sources(parts: Parts, name: str, constants: bool) -> dict[str, bytes]:
    """Return the content of each file; name: what they and all that they declare begin with."""
    files = {
        f"{name}.h": header(parts, name, constants),
        f"{name}.c": program(parts, name, constants),
        f"{name}_selftest.c": self_test(parts, name, constants),
        "Makefile": makefile(parts, name, constants),
    }
    found = {file: text.encode() for file, text in files.items()}
    if constants:
        return found | {f"{name}_weights.c": constant_weights(parts, name).encode()}
    return found | {f"{name}_weights.bin": binary_weights(parts)}


def file_names(name: str) -> set[str]:
    """Return the names of all files that a folder may hold, after `make` too."""
    ends = [".c", ".h", ".o", "_weights.c", "_weights.o", "_weights.bin", "_selftest.c"]
    ends += ["_selftest.o", "_selftest", "_sanitized"]
    return {"Makefile", *(name + end for end in ends)}


def state_members(parts: Parts) -> list[tuple[str, int]]:
    """Return the name and length of each float array of a state, those of the GRUs first."""
    states = [(f"{p.name}_h", p.outputs) for p in parts.parts if p.source]
    inner = [(f"{p.name}_y", p.outputs) for p in parts.parts[:-1] if not p.source]
    work = max(p.source.columns * p.outputs for p in parts.parts if p.source)
    return [*states, *inner, ("work", work)]


def header(parts: Parts, name: str, constants: bool) -> str:
    """Print the file that a program includes."""
    members, big = state_members(parts), name.upper()
    total, kept = sum(n for _, n in members), sum(n for key, n in members if key.endswith("_h"))
    weights = sum(field.array.nbytes for field in parts.fields)
    index = f", an index of 0 to {parts.inputs - 1}" if parts.embeds else ""
    return f"""\
/* Written by gru_any.deploy.c.write. The model:

{indent(parts.about, "       ")}

   Weights: {weights:,} bytes ({parts.weights}), in {name}_weights.{"c" if constants else "bin"}.
   RAM: {4 * total:,} bytes for each stream, {4 * kept:,} of them its state, the others to work in.
   A step: {_multiplications(parts):,} multiplications and additions of weights. No memory is
   allocated, nothing is static but the weights, and the stack holds no array. */
#ifndef {big}_H
#define {big}_H

#include <stdint.h>

#define {big}_INPUTS {parts.inputs} /* {"what x is below" if parts.embeds else "numbers in x"} */
#define {big}_OUTPUTS {parts.outputs} /* numbers in y */

typedef struct {{
{_lines(weight_members(parts, identified=not constants))}
}} {name}_weights;

typedef struct {{
{_lines(f"float {key}[{n}];" for key, n in members)}
}} {name}_state;

{CONSTANTS.format(name) if constants else FITS.format(name)}
/* Begin a sequence: all states are 0. */
void {name}_reset({name}_state *state);

/* Read x{index}, change the state, write y. x, y and the state must not overlap.
   Returns 0{", or 1 where x is no such index: nothing is done then" if parts.embeds else ""}. */
int {name}_step(const {name}_weights *weights, {name}_state *state, {_x(parts)}, float *y);

#endif
"""


def program(parts: Parts, name: str, constants: bool) -> str:
    """Print the functions."""
    int8 = parts.weights == "int8"
    functions = [p.source.function(p.inputs, p.outputs, p.bias) for p in parts.parts if p.source]
    members = state_members(parts)
    reset = [
        f"for (size_t j = 0; j < {n}; j++)\n    state->{key}[j] = 0.0f;"
        for key, n in members
        if key.endswith("_h")
    ]
    one, two = identity(parts)
    return f"""\
#include <math.h>
#include <stddef.h>

#include "{name}.h"

#define WEIGHTS {name}_weights

{helpers(int8)}
{chr(10).join(functions)}
{"" if constants else IS_THIS.format(name, one, two)}\
void {name}_reset({name}_state *state)
{{
{_lines(reset)}
}}

int {name}_step(const {name}_weights *weights, {name}_state *state, {_x(parts)}, float *y)
{{
{_lines(_body(parts, int8))}
    return 0;
}}
"""


def _body(parts: Parts, int8: bool) -> Iterable[str]:
    """The lines that take x through all parts to y."""
    x, last = "x", parts.parts[-1]
    for part in parts.parts:
        y = "y" if part is last else f"state->{part.name}_{'h' if part.source else 'y'}"
        if part.embeds:
            yield f"if (x < 0 || x >= {part.inputs})\n    return 1;"
            yield _row(part, y, int8)
        elif part.source:
            h = f"state->{part.name}_h"
            yield f"step_{part.name}(weights, {x}, {h}, state->work);"
            if part is last:
                yield f"for (size_t j = 0; j < {part.outputs}; j++)\n    y[j] = {h}[j];"
        else:
            W, b = (f"weights->{part.name}_{letter}" for letter in "Wb")
            sizes = str(part.inputs), str(part.outputs)
            yield product(sizes, x, W, b if part.bias else "", y, int8)
        x = y


def _row(part: Part, y: str, int8: bool) -> str:
    """The lines that read a row of a table."""
    W = f"weights->{part.name}_W"
    entry = f"{W}[(size_t)x * {part.outputs} + j]"
    value = f"{W}_scale[x] * (float){entry}" if int8 else entry
    return f"for (size_t j = 0; j < {part.outputs}; j++)\n    {y}[j] = {value};"


def _multiplications(parts: Parts) -> int:
    matrices = [f for part in parts.parts if not part.embeds for f in part.fields]
    return sum(f.array.size for f in matrices if f.array.ndim == 2)


def _x(parts: Parts) -> str:
    return "int32_t x" if parts.embeds else "const float *x"


def _lines(lines: Iterable[str]) -> str:
    return "\n".join(indent(line, "    ") for line in lines)

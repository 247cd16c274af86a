"""Print a page that follows one equation to each target: python -m gru_any.codegen."""

from inspect import getsource

from .. import equations
from .c_source import IN_PLACE, CSource
from .cuda_source import forward_scan
from .javascript_source import javascript
from .numba_source import NumbaSource
from .numpy_source import NumPySource
from .schedule import HOST, forward_program, forward_schedule

PAGE = """\
<!-- fmt: off -->

# One equation becoming each target's code

`python -m gru_any.codegen` prints this page from the code, and a test checks that the two agree. It
follows one step, the GRU with the reset gate before the product, from
[`gru_any/equations.py`](../gru_any/equations.py) to NumPy, Numba, CUDA, C and JavaScript. The
backward step goes through the same stages, but not to C and JavaScript, which are for inference.

## The equation

{equation}

## The program

`gru_any/codegen/trace.py` calls the function once with stand-ins for its arrays and records each
operation. Each `v` is a column: an array (B, H). `v0, v1, v2` are the thirds of `a`, and `v3` is
`h`. Rows of U are counted in units of H, so `U[0:2]` is the first 2H rows. The residuals are left
out here, as in a call without a gradient.

{program}

## The schedule

`gru_any/codegen/schedule.py` cuts the program at its products. Between two products is a group of
element-wise operations, which loads columns, computes, and stores results. Which buffers there are,
and where each column is stored, is decided here, once for all targets. A buffer `q` holds the
output of a product, `x` the operand of one, and `t` a column that a later group needs. `a(3)` means
that `a` is three columns wide, and `a.0` is the first of them. On the host, `path` holds the states
of all steps: `path[before]` is the state before the step, `path[after]` the one after it.

{host}

On a CUDA device the state has one place, which each step overwrites; a second store keeps it in
`path`:

{device}

On a device, a product can also add to the state, which saves a buffer in the backward pass.

## NumPy

`gru_any/codegen/numpy_source.py` prints a call for each operation. Results overwrite memory whose
contents no later operation needs. The gates r and z are side by side, so one call computes both
(`q0_0_1`).

{numpy}

## Numba

`gru_any/codegen/numba_source.py` prints a loop for each group, in which intermediate results stay
in registers. Below is the function for few rows; its imports, products and `tanh` are left out. For
many rows the same loops are used, with packed weights and several threads.

{numba}

## CUDA

`gru_any/codegen/cuda_source.py` prints a kernel for each group; cuBLAS does the products. The
`table` holds the addresses and strides of the arrays, so that a captured graph can be replayed over
other arrays. `cuda_persistent.py` and `cuda_cooperative.py` print kernels that run all steps, from
the same schedule. Here is the kernel of the first group:

{cuda}

## C

`gru_any/codegen/c_source.py` prints a C99 function for each layer of a model that is [written as
C](c.md). One array holds the state before and after the step, and all buffers lie in `work`, which
the caller owns. `gemv` is a loop over the inputs that adds to all outputs. For I = 64, H = 128:

{c}

## JavaScript

`gru_any/codegen/javascript_source.py` prints the step of the [live page](interactive.html).

{javascript}
"""


def page() -> str:
    """Return the page as Markdown."""
    step = equations.reset_before
    host = forward_schedule(step, 0, False, HOST)
    scan = forward_scan(step, 0, False, "float32")
    in_place = forward_schedule(step, 0, False, IN_PLACE)
    numba, cuda = NumbaSource(host, "float32").stored(), scan.set_table.source
    return PAGE.format(
        equation=_box("py", getsource(step)),
        program=_box("text", str(forward_program(step, 0, False))),
        host=_box("text", str(host)),
        device=_box("text", str(scan.schedule)),
        numpy=_box("py", NumPySource(host).source()),
        numba=_box("py", numba[numba.index("@inner\ndef fused") :]),
        cuda=_box("cpp", cuda[cuda.index('extern "C"') : cuda.index("\n\nextern")]),
        c=_box("c", CSource(in_place, "gru0", int8=False).function(64, 128, bias=True)),
        javascript=_box("js", javascript(host)),
    )


def _box(language: str, text: str) -> str:
    return f"```{language}\n{text.strip()}\n```"


if __name__ == "__main__":
    print(page(), end="")

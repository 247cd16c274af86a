"""A model as a shared library of this machine."""

import json
import os
import platform
import re
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ... import arguments
from ...files import write_atomically
from ...nn.chain import Chain
from ...nn.gru import GRU
from ...typing import HostArray
from ...typing import Path as PathLike
from .library import FORMAT, CStream, load, processor

if TYPE_CHECKING:
    from .parts import Parts

FLAGS = ["-std=c99", "-O3", "-ffp-contract=fast", "-shared", "-fPIC"]


def build(
    model: GRU | Chain, path: PathLike, weights: str = "float32", *, native: bool = True
) -> None:
    """Compile a model into a shared library, which `load` runs with NumPy alone.

    Parameters
    ----------
    model, weights
        As in `write`.
    path : str or path
        Of the library, such as "model.so". It is written whole or not at all.
    native : bool
        True: for the processor of this machine (-march=native), and `load` refuses it where the
        processor lacks what was used. False: for every machine of this architecture, which is
        slower.

    Raises
    ------
    ValueError, TypeError
        The model cannot be written as C.
    RuntimeError
        There is no compiler (the environment variable CC, cc, gcc or clang), it fails, or what it
        made computes something else than the model. CFLAGS may add flags.
    OSError
        The library cannot be written.
    """
    from .parts import parts_of  # not with this module: a program that only loads needs none
    from .selftest import STEPS
    from .sources import sources

    arguments.flag("native", native)
    parts, command = parts_of(model, weights), [*compiler(), *FLAGS]
    command += ["-march=native"] if native else []
    command += shlex.split(os.environ.get("CFLAGS", ""))
    with tempfile.TemporaryDirectory() as folder:
        files = sources(parts, "gru", constants=False)
        files["gru_library.c"] = library(parts, features(command) if native else [])
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        run([*command, "gru.c", "gru_library.c", "-lm", "-o", "library.so"], folder)
        made = Path(folder) / "library.so"
        _check(load(made), *parts.example(STEPS))
        write_atomically(path, made.read_bytes())


def compiler() -> list[str]:
    """Return the command of the C compiler."""
    given = shlex.split(os.environ.get("CC", ""))
    for command in [given] if given else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]):
            return command
    raise RuntimeError(
        f"no C compiler: {given[0] + ', which CC names,' if given else 'cc, gcc and clang'} cannot "
        "be found. Install one, or build on a machine like this one that has one"
    )


def run(command: list[str], folder: PathLike) -> str:
    """Run the compiler, and return what it prints."""
    import subprocess

    done = subprocess.run(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        said = done.stdout.strip() or f"it returned {done.returncode}"
        raise RuntimeError(f"the C compiler failed: {shlex.join(command)}\n{said}")
    return done.stdout


def features(command: list[str]) -> list[str]:
    """Return the features of this processor that the compiler uses."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "empty.c").touch()
        macros = run([*command, "-dM", "-E", "empty.c"], folder)
    used = {name.lower().replace("_", "") for name in re.findall(r"#define __(\w+?)__ 1", macros)}
    has = processor()
    # macros of other architectures have other names: there, all that this processor has
    return sorted({flag for flag in has if flag.replace("_", "") in used} or has)


def library(parts: "Parts", needed: list[str]) -> bytes:
    """The file of the library beside the model's: what it is, and a loop over steps."""
    from .sources import state_members
    from .weights import binary_weights

    about = {
        "format": FORMAT,
        "machine": [platform.system(), platform.machine()],
        "needs": needed,
        "fingerprint": parts.fingerprint,
        "weights": parts.weights,
        "embeds": parts.embeds,
        "inputs": parts.inputs,
        "outputs": parts.outputs,
        "states": parts.states,
        "chain": parts.chain,
        "batch_first": parts.batch_first,
        "floats": sum(n for _, n in state_members(parts)),
    }
    image = binary_weights(parts, "=")
    octal = np.array([f"\\{byte:03o}" for byte in range(256)], "S4")  # which compiles much faster
    text = octal[np.frombuffer(image, "u1")].tobytes().decode()  # than numbers do
    kind, x = ("int64_t", "(int32_t)x[t]") if parts.embeds else ("float", "x + t * GRU_INPUTS")
    wrong = "x[t] < 0 || x[t] >= GRU_INPUTS || " if parts.embeds else ""
    return f"""\
#include <stddef.h>

#include "gru.h"

const char gru_any_about[] = {json.dumps(json.dumps(about))};

static const union {{ char image[{len(image)}]; gru_weights weights; }} stored = {{
    "{text}"
}};

int gru_any_steps(gru_state *state, size_t steps, const {kind} *x, float *y);

int gru_any_steps(gru_state *state, size_t steps, const {kind} *x, float *y)
{{
    for (size_t t = 0; t < steps; t++)
        if ({wrong}gru_step(&stored.weights, state, {x}, y + t * GRU_OUTPUTS))
            return 1;
    return 0;
}}
""".encode()


def _check(stream: CStream, x: HostArray, y: HostArray) -> None:
    """Raise where the compiled step does not give what float64 gives."""
    worst, limit = np.abs(stream(x) - y).max(), 1e-5 * max(1.0, np.abs(y).max())
    if not worst <= limit:
        raise RuntimeError(
            f"the compiled step is off by {worst:.2g}, expected at most {limit:.2g}: the compiler "
            "or its flags (the environment variable CC) change what floating-point numbers mean"
        )

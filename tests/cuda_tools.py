"""What the tests of the CUDA path need: NVRTC without a driver, and kernels run by a program."""

import ctypes
import re
from functools import cache

import numpy as np
from conftest import finished, require

from gru_any.testing.fake_cuda import shim

ARCHITECTURES = (75, 80, 90, 100, 120)
KIND_NUMBER, KIND_ARRAY, KIND_TABLE = range(3)


@cache
def nvrtc():
    pathfinder = require("cuda.pathfinder")
    try:
        path = pathfinder.load_nvidia_dynamic_lib("nvrtc").abs_path
    except RuntimeError as e:
        from conftest import refuse

        refuse("nvrtc", str(e).splitlines()[0])
    return ctypes.CDLL(path)


def compiled(source, architecture):
    """A cubin of the source, and what ptxas says: kernel -> (registers, bytes spilled)."""
    lib, program = nvrtc(), ctypes.c_void_p()
    lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"gru.cu", 0, None, None)
    options = [f"--gpu-architecture=sm_{architecture}", "--std=c++17", "-ftz=true"]
    options += ["--ptxas-options=-v"]
    encoded = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
    status = lib.nvrtcCompileProgram(program, len(options), encoded)
    log = _text(lib.nvrtcGetProgramLogSize, lib.nvrtcGetProgramLog, program).decode()
    assert status == 0, log
    cubin = _text(lib.nvrtcGetCUBINSize, lib.nvrtcGetCUBIN, program)
    lib.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin, _usage(log)


def _text(size, get, program):
    count = ctypes.c_size_t()
    size(program, ctypes.byref(count))
    buffer = ctypes.create_string_buffer(count.value)
    get(program, buffer)
    return buffer.raw


def _usage(log):
    found, name, spilled = {}, "", 0
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            name = match[1]
        if match := re.search(r"(\d+) bytes spill stores", line):
            spilled = int(match[1])
        if match := re.search(r"Used (\d+) registers", line):
            found[name] = (int(match[1]), spilled)
    return found


def problem(after, B, H, dtype, K=1, seed=0):
    """Of a block of K steps: a, h, (U, c), dy and dh, c with the reset gate after the product."""
    rng = np.random.default_rng(seed)
    a, dy = (rng.standard_normal((K, B, n * H)).astype(dtype) for n in (3, 1))
    h, dh = (rng.uniform(-1, 1, (B, H)).astype(dtype) for _ in range(2))
    bound = min(0.4, H**-0.5)  # as weights begin; BLAS sums in another order for each layout
    U = rng.uniform(-bound, bound, (3 * H, H)).astype(dtype)
    c = rng.standard_normal(H).astype(dtype)
    return a, h, (U, c) if after else (U,), dy, dh


def run_program(folder, source, launches, sanitizer):
    """Run kernels of the source one after the other in a program that a sanitizer watches.

    launches: (name, shape, arguments), an argument being a number, an array, or a list of both.
    """
    names, arrays = shim.kernels(source), {}

    def flat(v):
        if isinstance(v, list):
            return [KIND_TABLE, len(v), *(n for w in v for n in flat(w))]
        if isinstance(v, np.ndarray):
            arrays.setdefault(id(v), (len(arrays), v))
            return [KIND_ARRAY, arrays[id(v)][0]]
        return [KIND_NUMBER, int(v)]

    words = [len(launches)]
    for name, shape, arguments in launches:
        words += [
            names.index(name),
            *shape,
            len(arguments),
            *(n for v in arguments for n in flat(v)),
        ]
    file = folder / "job"
    data = b"".join(np.int64(v.nbytes).tobytes() + v.tobytes() for _, v in arrays.values())
    file.write_bytes(np.int64(len(arrays)).tobytes() + data + np.array(words, np.int64).tobytes())
    flags = f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-O0"  # -O0 compiles faster
    command = [str(shim.program(source, *flags)), str(file)]
    done = finished(command)
    assert done.returncode == 0, done.stderr[-3000:]
    content, at = file.read_bytes(), 8
    for _, v in arrays.values():
        at += 8
        v[...] = np.frombuffer(content, v.dtype, v.size, at).reshape(v.shape)
        at += v.nbytes

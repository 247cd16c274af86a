"""Models as C: compiled strictly, watched by sanitizers, held to the equations and to NumPy."""

import ctypes
import os
import platform
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import THOROUGH, finished, refuse, running
from replaced import replaced
from test_schedule import EVERY_STEP, H, problem

from gru_any import GRU, Chain, Dropout, Embedding, GRUCell, Last, Linear, equations, files
from gru_any.codegen.c_source import IN_PLACE, CSource, helpers
from gru_any.codegen.schedule import Kind, forward_schedule
from gru_any.deploy import c, freeze
from gru_any.deploy.c import compiler, library, parts
from gru_any.stream import Stream

VARIANTS = pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
STRICT = ["-std=c99", "-Wall", "-Wextra", "-Wconversion", "-pedantic", "-Werror"]
# where a compiler puts a loop; all else is written out
LIBC = {"memset", "memcpy", "memmove"}
RNG = np.random.default_rng(0)
CORTEX_M4 = "-mcpu=cortex-m4 -mthumb -mfpu=fpv4-sp-d16 -mfloat-abi=hard"
STARTUP = """\
extern void _start(void);
static void reset(void)
{
    *(volatile unsigned *)0xE000ED88 |= 0xFu << 20; /* turn the floating-point unit on */
    _start();
}
__attribute__((section(".vectors"), used)) void (*const vectors[])(void) = {
    (void (*)(void))0x00300000, reset};
"""

if shutil.which("cc") is None or shutil.which("make") is None:
    refuse("cc", "no C compiler or no make")


def chain(after=False, layers=2):
    gru = GRU(6, 9, layers, reset_after=after, dropout=0.2 * (layers > 1), seed=1)
    return Chain(Embedding(11, 6, seed=0), gru, Dropout(0.5), Linear(9, 5, seed=2))


def mixed(after=False):
    """A Linear first, two GRUs, one without a bias, and a GRU last."""
    first = GRU(8, 12, reset_after=after, bias=False, seed=1)
    return Chain(Linear(3, 8, bias=False, seed=0), first, GRU(12, 4, reset_after=after, seed=2))


def make(folder, *arguments):
    command = ["make", "-s", "CFLAGS=-O1 -Werror -ffp-contract=fast", *arguments]
    done = finished(command, code=0, cwd=folder)
    assert not done.stderr
    return done.stdout


@pytest.fixture(autouse=True)
def quickly_compiled(monkeypatch):
    monkeypatch.setenv("CFLAGS", "-O1")


@pytest.fixture(scope="module")
def gru_library(tmp_path_factory):
    path = tmp_path_factory.mktemp("library") / "gru.so"
    gru = GRU(3, 5, reset_after=True, seed=0)
    c.build(gru, path)
    return path, gru


def stepped(model, x):
    """What the library makes of x (T, ...), step by step, on NumPy without Numba."""
    with running("traced"):
        stream = Stream(model)
        return np.stack([stream.step(v) for v in x])


# the program -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "weights", "constants"),
    [
        (chain(), "float32", True),
        (chain(True), "int8", False),
        (mixed(), "int8", True),
        (mixed(True), "float32", False),
    ],
    ids=["chain", "chain-after-int8-file", "mixed-int8", "mixed-after-file"],
)
def test_the_folder_compiles_strictly_and_passes_its_own_test(tmp_path, model, weights, constants):
    folder = tmp_path / "out"
    c.write(model, folder, weights, constants=constants)
    for said in (make(folder), make(folder, "sanitize")):
        assert float(said.split("steps: ")[1].split()[0]) < 1e-6
    c.write(model, folder, weights, constants=constants)  # over what make has left
    assert not (folder / "gru.o").exists()


def test_the_self_test_notices_other_weights(tmp_path):
    for model, name in ((chain(), "one"), (chain(True), "two")):
        c.write(model, tmp_path / name, constants=False)
    make(tmp_path / "one", "gru_selftest")
    shutil.copy(tmp_path / "two/gru_weights.bin", tmp_path / "one")
    done = finished(["./gru_selftest"], cwd=tmp_path / "one")
    assert (done.returncode, "another model's" in done.stdout) == (1, True)
    c.write(chain(), tmp_path / "one")
    source = tmp_path / "one/gru.c"
    source.write_text(source.read_text().replace("0.5f", "0.501f"))
    make(tmp_path / "one", "gru_selftest")
    done = finished(["./gru_selftest"], cwd=tmp_path / "one")
    assert done.returncode == 1
    assert "largest difference" in done.stdout


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_on_a_microcontroller(tmp_path, weights):
    """Compiled for a Cortex-M4, measured, and run where there is an emulator."""
    if shutil.which("arm-none-eabi-gcc") is None:
        refuse("arm-none-eabi-gcc", "not installed")
    c.write(chain(), tmp_path / "out", weights)
    said = make(tmp_path / "out", "size", "CC=arm-none-eabi-gcc", f"MACHINE={CORTEX_M4}")
    code, flash, ram = (int(line.split(": ")[1].split()[0]) for line in said.splitlines())
    found = parts.parts_of(chain(), weights)
    assert 0 <= flash - sum(array.nbytes for _, array in found.fields) < 4
    assert ram == 4 * (2 * 9 + 6 + 8 * 9)
    assert 500 < code < 4000
    if shutil.which("qemu-system-arm") is None:
        refuse("qemu-system-arm", "not installed")
    (tmp_path / "startup.c").write_text(STARTUP)
    sources = [str(v) for v in (tmp_path / "out").glob("*.c")] + [str(tmp_path / "startup.c")]
    link = ["--specs=rdimon.specs", "-Wl,--section-start=.vectors=0", "-lm", "-o", "m4.elf"]
    command = ["arm-none-eabi-gcc", "-O2", *CORTEX_M4.split(), *sources, *link]
    finished(command, code=0, cwd=tmp_path)
    command = ["qemu-system-arm", "-M", "mps2-an386", "-nographic", "-monitor", "none"]
    command += ["-serial", "none", "-semihosting", "-kernel", "m4.elf"]
    done = finished(command, cwd=tmp_path)
    assert (done.returncode, "largest difference" in done.stdout + done.stderr) == (0, True)


def test_two_models_in_one_program_that_allocates_nothing(tmp_path):
    for name, model in (("ear", chain()), ("gru1", mixed())):  # a layer of its own name
        c.write(model, tmp_path / name, name=name)
        make(tmp_path / name, f"{name}.o")
        command = ["nm", "-u", f"{name}.o"]
        done = finished(command, cwd=tmp_path / name)
        assert set(done.stdout.split()) - {"U"} <= LIBC
    main = '#include "ear/ear.h"\n#include "gru1/gru1.h"\nint main(void) { return 0; }\n'
    (tmp_path / "main.c").write_text(main)
    files = ["main.c", *(f"{n}/{n}{end}.c" for n in ("ear", "gru1") for end in ("", "_weights"))]
    finished(["cc", *STRICT, *files, "-lm", "-o", "main"], code=0, cwd=tmp_path)


def test_the_program_of_the_documentation(tmp_path):
    page = (Path(__file__).parent.parent / "docs" / "c.md").read_text("utf-8")
    model = Chain(Embedding(30, 16, seed=0), GRU(16, 32, seed=1), Linear(32, 30, seed=2))
    c.write(model, tmp_path / "typist", weights="int8")
    (tmp_path / "main.c").write_text(page.split("```c\n")[1].split("```")[0])
    sources = ["main.c", "typist/gru.c", "typist/gru_weights.c"]
    command = ["cc", *STRICT, "-Itypist", *sources, "-lm", "-o", "main"]
    finished(command, code=0, cwd=tmp_path)
    finished(["./main"], code=0, cwd=tmp_path)


@EVERY_STEP
def test_every_step_becomes_c(step, tmp_path):
    """What it prints computes what the step does; products with columns of U are refused."""
    schedule = forward_schedule(step, 1, False, IN_PLACE)
    if not all(gemm.product.transposed for gemm in schedule.gemms):
        with pytest.raises(NotImplementedError, match="columns of U"):
            CSource(schedule, "it", False)
        return
    a, h, U, vector = (v[0] if v.shape[0] == 3 else v for v in problem())
    printed = CSource(schedule, "it", False)
    products = [
        U[g.product.rows.start * H : g.product.rows.stop * H].T for g in printed.schedule.gemms
    ]
    given = {f"it_U{n}": np.ascontiguousarray(M) for n, M in enumerate(products)}
    given |= {"it_W": np.eye(3 * H), "it_c0": vector}
    members = "".join(f"float {name}[{v.size}];" for name, v in given.items())
    source = f"#include <math.h>\n#include <stddef.h>\ntypedef struct {{ {members} }} weights_;\n"
    source += f"#define WEIGHTS weights_\n{helpers(False)}\n{printed.function(3 * H, H, False)}"
    source += "void go(const weights_ *, const float *, float *, float *);\n"
    source += "void go(const weights_ *w, const float *x, float *h, float *work)"
    source += "{ step_it(w, x, h, work); }\n"
    (tmp_path / "it.c").write_text(source)
    flags = [flag for flag in STRICT if flag != "-Werror"]
    command = ["cc", *flags, "-O1", "-shared", "-fPIC", "it.c", "-o", "it.so"]
    finished(command, code=0, cwd=tmp_path)
    arrays = [np.concatenate([v.ravel() for v in given.values()]), a, h, np.zeros(20 * H)]
    arrays = [v.astype("float32") for v in arrays]
    ctypes.CDLL(str(tmp_path / "it.so")).go(*(ctypes.c_void_p(v.ctypes.data) for v in arrays))
    np.testing.assert_allclose(arrays[2], step(np, a, h, U, vector)[0], rtol=0, atol=3e-6)


# the library -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "weights"),
    [(chain(), "int8"), (chain(True), "float32"), (mixed(), "float32"), (mixed(True), "int8")],
    ids=["chain-int8", "chain-after", "mixed", "mixed-after-int8"],
)
def test_a_library_computes_what_numpy_does(tmp_path, model, weights):
    """int8: what the frozen model does, whose weights are off by half a step at most."""
    c.build(model, tmp_path / "model.so", weights)
    stream = c.load(tmp_path / "model.so", model)
    with running("traced"):
        frozen = freeze(model, weights)
    for name, w in model.params.items():
        step = np.abs(w).max(axis=-1, keepdims=True) / 127 if w.ndim == 2 else 0
        bound = 0.5001 * step if weights == "int8" else 0
        assert (np.abs(frozen.params[name] - w) <= bound).all()
    c.load(tmp_path / "model.so", frozen)  # to round again changes nothing
    model = frozen
    x = RNG.standard_normal((50, 1, 3)).astype("float32")
    if stream.about["embeds"]:
        x = RNG.integers(0, 11, (50, 1))
    found = np.stack([stream.step(v) for v in x])
    assert found.dtype == "float32"
    np.testing.assert_allclose(found, stepped(model, x), rtol=0, atol=2e-6)


@VARIANTS
def test_ten_thousand_steps(tmp_path, after, monkeypatch):
    monkeypatch.delenv("CFLAGS")
    gru = GRU(16, 32, reset_after=after, seed=0)
    c.build(gru, tmp_path / "gru.so")
    x = RNG.standard_normal((10_000, 1, 16)).astype("float32")
    with running("traced"):
        y, h = gru(x)
    stream = c.load(tmp_path / "gru.so")
    assert np.abs(stream(x) - y).max() < 1e-6
    assert np.abs(stream.state - h).max() < 1e-6


def test_inputs_beyond_all_bounds(gru_library):
    """As in NumPy: what overflows saturates, NaN stays NaN, in the step at hand and for good."""
    path, gru = gru_library
    x = np.zeros((6, 1, 3), "float32")
    x[0], x[1], x[2, 0, 1], x[4, 0, 2] = 1e30, -1e30, np.inf, np.nan
    with running("traced"), np.errstate(all="ignore"):
        y, _ = gru(x)
    found = c.load(path)(x)
    np.testing.assert_allclose(found, y, rtol=0, atol=1e-6)
    assert np.isfinite(found[:4]).all()
    assert np.isnan(found[4:]).all()


@VARIANTS
def test_it_follows_the_equations(tmp_path, after, monkeypatch):
    gru = GRU(3, 5, reset_after=after, seed=0)
    before = parts.parts_of(gru, "float32").fingerprint
    name, step = replaced(after)[0]
    monkeypatch.setattr(equations, name, step)
    assert parts.parts_of(gru, "float32").fingerprint != before
    c.build(gru, tmp_path / "gru.so")
    x = RNG.standard_normal((20, 1, 3)).astype("float32")
    with running("plain"):
        y, _ = gru(x)
    np.testing.assert_allclose(c.load(tmp_path / "gru.so")(x), y, rtol=0, atol=1e-6)


def test_steps_chunks_and_states(tmp_path):
    for first in (False, True):
        gru = GRU(3, 5, 2, batch_first=first, seed=0)
        c.build(gru, tmp_path / "gru.so", native=False)
        x = RNG.standard_normal((9, 3)).astype("float32")
        one, other = c.load(tmp_path / "gru.so"), c.load(tmp_path / "gru.so")
        y = one(x)
        assert np.array_equal(np.stack([other.step(v) for v in x]), y)
        assert np.array_equal(one.state, other.state)
        assert one.state.shape == (2, 1, 5)
        axis = int(not first)
        one.reset()
        assert not one.state.any()
        assert np.array_equal(one(np.expand_dims(x[:4], axis)), np.expand_dims(y[:4], axis))
        kept = one.state
        for state in (kept, kept[:, 0]):
            one.state = state
            assert np.array_equal(one.step(x[4][None]), y[4][None])
        assert not np.array_equal(kept, one.state)
        one.state = None
        assert np.array_equal(one(x[:0]), y[:0])
        assert np.array_equal(one(np.asfortranarray(x)), y)


def test_the_states_of_a_chain(tmp_path):
    model = mixed()
    c.build(model, tmp_path / "model.so")
    x = RNG.standard_normal((6, 1, 3)).astype("float32")
    with running("traced"):
        _, states = model(x)
        y, _ = model(x[:2], states)
    stream = c.load(tmp_path / "model.so")
    stream(x)
    for ours, theirs in zip(stream.state, states, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    stream.state = states
    np.testing.assert_allclose(stream(x[:2]), y, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="state holds 1, expected 2"):
        stream.state = states[:1]
    with pytest.raises(ValueError, match=r"state is \(1, 2, 12\)"):
        stream.state = [np.zeros((1, 2, 12)), states[1]]


def test_what_is_built_again_is_loaded_anew(tmp_path):
    """The system's loader would return what it has opened under this name before."""
    x, kept = np.ones(3, "float32"), []
    for seed in (0, 1):
        gru = GRU(3, 5, seed=seed)
        c.build(gru, tmp_path / "gru.so")
        kept.append(c.load(tmp_path / "gru.so", gru))
        np.testing.assert_allclose(kept[-1].step(x), stepped(gru, x[None])[0], atol=1e-6)
    assert not np.array_equal(kept[0].step(x), kept[1].step(x))


def test_many_steps_take_no_memory(gru_library):
    """A million where GRU_ANY_THOROUGH is set."""
    resource = pytest.importorskip("resource")
    stream, x = c.load(gru_library[0]), np.ones(3, "float32")
    count = 1_000_000 if THOROUGH else 50_000
    peaks = []  # what something else in this process needs, it needs once
    for _ in range(4):
        for _ in range(count // 4):
            stream.step(x)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert min(np.diff(peaks)) <= 256  # KB


def test_rows_of_zeros_and_frozen_models(tmp_path):
    gru = GRU(3, 5, seed=0)
    gru.params["weight_hh_l0"][4] = 0
    gru.params["weight_ih_l0"][[1, 2]] = 0
    with running("traced"):
        c.build(freeze(gru), tmp_path / "gru.so", "int8")
    x = RNG.standard_normal((20, 3)).astype("float32")
    assert np.abs(c.load(tmp_path / "gru.so", gru)(x) - stepped(gru, x)).max() < 0.02


# bad input ---------------------------------------------------------------------------------------

REFUSED = [
    (lambda: GRU(3, 4, bidirectional=True), {}, "reads from the end"),
    (lambda: Chain(GRU(3, 4, reverse=True)), {}, "reads from the end"),
    (lambda: Chain(GRU(3, 4), Last(), Linear(4, 2)), {}, "Last cannot be written as C"),
    (lambda: Chain(Embedding(3, 4), Linear(4, 2)), {}, "has no GRU"),
    (lambda: Chain(Linear(3, 4), Dropout(0.5)), {}, "has no GRU"),
    (lambda: GRU(3, 4, dtype="float64"), {}, r'float64, .*model.to\(dtype="float32"\)'),
    (lambda: GRUCell(3, 4), {}, "a GRUCell, expected a GRU or a Chain"),
    (lambda: GRU(3, 4), {"weights": "int4"}, "weights is 'int4', expected one of float32, int8"),
    (lambda: GRU(3, 4), {"name": "My model"}, "name is 'My model', expected small letters"),
    (lambda: GRU(3, 4), {"constants": "no"}, "constants is 'no', expected True or False"),
]


@pytest.mark.parametrize(("model", "options", "text"), REFUSED)
def test_what_cannot_be_written(tmp_path, model, options, text):
    with pytest.raises((ValueError, TypeError), match=text):
        c.write(model(), tmp_path / "out", **options)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("weights", ["float32", "int8"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_weights_that_are_no_numbers(tmp_path, weights, wrong):
    gru = GRU(3, 4)
    gru.params["weight_hh_l0"][2, 1] = wrong
    with pytest.raises(ValueError, match=r"weight_hh_l0 of GRU.* holds NaN or infinity.* row 2"):
        c.write(gru, tmp_path / "out", weights)
    assert not os.listdir(tmp_path)


def test_a_setting_that_c_does_not_know(tmp_path):
    gru = GRU(3, 4)
    gru.settings["unheard_of"] = 1
    with pytest.raises(ValueError, match="C does not follow unheard_of=1"):
        c.write(gru, tmp_path / "out")


def test_sizes_that_overflow(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "LIMIT", 400)
    for weights in ("float32", "int8"):
        big = GRU(4, 4) if weights == "float32" else GRU(20, 12)
        with pytest.raises(ValueError, match=r"weights, which are more than 400 bytes"):
            c.write(big, tmp_path / "out", weights)
    assert not os.listdir(tmp_path)
    c.write(GRU(3, 4), tmp_path / "out", "int8")


def test_a_folder_is_never_there_in_part(tmp_path, monkeypatch):
    model, written = GRU(3, 4, seed=0), files.write_atomically

    def failing(path, content):
        if Path(path).name == "gru.c":
            raise OSError(28, "No space left on device")
        written(path, content)

    monkeypatch.setattr(files, "write_atomically", failing)
    with pytest.raises(OSError, match=r"was not written .No space left"):
        c.write(model, tmp_path / "out")
    assert not os.listdir(tmp_path)
    monkeypatch.undo()
    c.write(model, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(files, "write_atomically", failing)
    with pytest.raises(OSError, match="was not written"):
        c.write(GRU(3, 9), tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_with_other_files(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"holds thesis.tex, which would be lost"):
        c.write(GRU(3, 4), tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("no-such-compiler -O2", "no C compiler: no-such-compiler, which CC names"),
        ("cc --no-such-flag", "failed: cc --no-such-flag .*\n.*no-such-flag"),
    ],
)
def test_a_compiler_that_is_missing_or_fails(tmp_path, monkeypatch, command, text):
    monkeypatch.setenv("CC", command)
    with pytest.raises(RuntimeError, match=text):
        c.build(GRU(3, 4), tmp_path / "gru.so")
    assert not os.listdir(tmp_path)


def test_a_compiler_that_computes_something_else(tmp_path, monkeypatch):
    wrong = tmp_path / "wrong"
    wrong.write_text('#!/bin/sh\nsed -i s/0.5f/0.501f/ gru.c 2>/dev/null\nexec cc "$@"\n')
    wrong.chmod(0o755)
    monkeypatch.setenv("CC", str(wrong))
    with pytest.raises(RuntimeError, match="the compiled step is off by"):
        c.build(GRU(3, 4, seed=0), tmp_path / "gru.so")
    assert os.listdir(tmp_path) == ["wrong"]


def test_no_compiler_at_all(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="no C compiler: cc, gcc and clang cannot be found"):
        compiler.compiler()


def test_libraries_that_are_something_else(tmp_path, gru_library, monkeypatch):
    path, gru = gru_library
    with pytest.raises(FileNotFoundError, match="there is no library"):
        c.load(tmp_path / "gru.so")
    (tmp_path / "text.so").write_text("int main")
    with pytest.raises(ValueError, match="is no library of this machine"):
        c.load(tmp_path / "text.so")
    (tmp_path / "other.c").write_text("int other;")
    command = ["cc", "-shared", "-fPIC", "other.c", "-o", "other.so"]
    finished(command, code=0, cwd=tmp_path)
    with pytest.raises(ValueError, match=r"none that gru_any\.deploy\.c built"):
        c.load(tmp_path / "other.so")
    for other in (GRU(3, 5, reset_after=True, seed=1), GRU(3, 5, seed=0)):
        with pytest.raises(ValueError, match="of another model, or of other weights"):
            c.load(path, other)
    monkeypatch.setattr(library, "FORMAT", 2)
    with pytest.raises(ValueError, match="has format 1, and this version of gru_any reads 2"):
        c.load(path, gru)


def test_libraries_of_other_machines(tmp_path, gru_library, monkeypatch):
    path, gru = gru_library
    needs = c.load(path, gru).about["needs"]
    with monkeypatch.context() as patch:
        patch.setattr(platform, "machine", lambda: "riscv64")
        with pytest.raises(ValueError, match=r"built for another machine.*this one is a riscv64"):
            c.load(path)
    if not needs:
        pytest.skip("the system does not say what the processor has")
    monkeypatch.setattr(library, "processor", set)
    with pytest.raises(ValueError, match=f"this one lacks {', '.join(needs)}. Build it here"):
        c.load(path)
    c.build(gru, tmp_path / "gru.so", native=False)
    c.load(tmp_path / "gru.so")


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (np.ones(3), r'float64, expected float32: x_t.astype\("float32"\)'),
        (np.ones(4, "float32"), r"x_t is \(4,\), expected \(I,\) with I = 3"),
        (np.ones((2, 3), "float32"), r"x_t is \(2, 3\), expected \(B, I\).*axis 0 is 2, B is 1"),
        ([1.0, 2.0, 3.0], "x_t is a list, expected an array of NumPy"),
    ],
)
def test_inputs_that_do_not_fit(gru_library, x, text):
    with pytest.raises((TypeError, ValueError), match=text):
        c.load(gru_library[0]).step(x)


def test_indices(tmp_path):
    model = chain()
    c.build(model, tmp_path / "model.so")
    stream, x = c.load(tmp_path / "model.so"), np.array([3, 10, 0])
    y = stream(x)
    stream.reset()
    assert np.array_equal([stream.step(np.array(3)), stream.step(np.array([10]))[0]], y[:2])
    assert np.array_equal(stream.step(x[2]), y[2])
    kept = stream.state
    for wrong in (-1, 11, 2**32 + 3):
        with pytest.raises(IndexError, match=f"x_t holds {wrong} to {wrong}, expected 0 to 10"):
            stream.step(np.array([wrong]))
    with pytest.raises(TypeError, match="has dtype float64, expected integers"):
        stream.step(np.array([1.0]))
    with pytest.raises(ValueError, match=r"x is \(2, 2\), expected \(T, B\)"):
        stream(np.zeros((2, 2), int))
    assert all(np.array_equal(a, b) for a, b in zip(stream.state, kept, strict=True))


def test_copies_are_refused(gru_library):
    import copy

    with pytest.raises(TypeError, match=r"load\(path\) gives another stream"):
        copy.copy(c.load(gru_library[0]))


def test_the_in_place_schedule_reads_no_state_of_other_steps():
    for after in (False, True):
        step = equations.variant(after).step
        schedule = forward_schedule(step, int(after), False, IN_PLACE)
        loads = [load.place.array.kind for group in schedule.groups for load in group.loads]
        assert Kind.STATE in loads
        assert Kind.AFTER not in loads

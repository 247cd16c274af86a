"""The ways to run a block (plain, traced, compiled) against each other."""

import math
import os
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from conftest import PATHS, THOROUGH, at_once, finished, is_rounding, running, tuned
from replaced import replaced

from gru_any import GRU, equations, gradcheck
from gru_any.backend import NUMPY, runner
from gru_any.backend.cpu import threads
from gru_any.backend.cpu.numpy_runner import NumPy
from gru_any.backend.modes import forget
from gru_any.backend.reference import Plain
from gru_any.codegen.exponential import by_exp
from gru_any.codegen.numpy_source import NumPySource
from gru_any.codegen.schedule import HOST, forward_schedule
from gru_any.nn.sweep import StepMask
from gru_any.stream import Stream

VARIANTS = pytest.mark.parametrize("reset_after", [False, True], ids=["before", "after"])
WAYS = [*PATHS[1:], *(["packed"] if "compiled" in PATHS else [])]
FAST = pytest.mark.parametrize("path", WAYS)
EVERY = pytest.mark.parametrize("path", PATHS)
FROM_PROGRAMS = pytest.mark.parametrize("path", PATHS[1:])  # whose memory is planned
ROWS = pytest.mark.parametrize("B", [1, 5, 100])  # compiled whole, and step by step


def block(reset_after, B, dtype, K=7, H=6, seed=0, scale=1.0):
    """What a sweep hands down for one block."""
    rng = np.random.default_rng(seed)
    a, dy = (rng.standard_normal((K, B, n * H)).astype(dtype) * scale for n in (3, 1))
    h, dh = (rng.uniform(-1, 1, (B, H)).astype(dtype) for _ in range(2))
    U, c = rng.uniform(-0.4, 0.4, (3 * H, H)).astype(dtype), rng.standard_normal(H).astype(dtype)
    return equations.variant(reset_after), a, h, (U, c) if reset_after else (U,), dy, dh


def forward(path, problem, alive=None, reverse=False):
    """States and saved arrays; the states are the same bits whether anything is saved or not."""
    variant, a, h, recurrent, _, _ = problem
    with running(path):
        run = runner(NUMPY)
        U = recurrent[0]
        recurrent = (run.pack_weights(U, U, a.shape[1] * a.shape[0])[1], *recurrent[1:])
        states, saved = run.forward(variant.step, a, h, recurrent, alive, reverse, True)
        short, _ = run.forward(variant.step, a, h, recurrent, alive, reverse, False)
    assert np.array_equal(states, short, equal_nan=True)
    return [states, *saved]


def backward(path, problem, states, saved, alive=None, reverse=False):
    """Gradients of the pre-activations, dh, and g; the same bits whether g is wanted or not."""
    variant, _, _, recurrent, dy, dh = problem
    before = states[1:] if reverse else states[:-1]
    with running(path):
        run = runner(NUMPY)
        U = run.pack_weights(recurrent[0], recurrent[0], before.shape[1] * before.shape[0])[1]
        back = (before, saved, U, alive, reverse)
        parts, first, g = run.backward(variant.backward, dy, dh, *back, True)
        _, again, none = run.backward(variant.backward, dy, dh, *back, False)
    assert np.array_equal(first, again, equal_nan=True)
    assert none is None
    return [*parts, first, g]


@FAST
@VARIANTS
@ROWS
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_single_step(path, reset_after, B, dtype, reverse):
    problem = block(reset_after, B, dtype, K=1, H=37)
    limit = 4e-7 if dtype == "float32" else 4 * np.finfo(dtype).eps
    expected = forward("plain", exactly(problem), reverse=reverse)
    pairs = list(zip(forward(path, problem, reverse=reverse), expected, strict=True))
    states, *saved = (v.astype(dtype) for v in expected)
    ours = backward(path, problem, states, saved, None, reverse)
    states, *saved = (v.astype("float64") for v in (states, *saved))
    exact = backward("plain", exactly(problem), states, saved, None, reverse)
    for a, b in [*pairs, *zip(ours, exact, strict=True)]:
        assert a.dtype == dtype
        assert np.abs(a - b).max() <= limit * max(1.0, np.abs(b).max())


def exactly(problem):
    """The same numbers in float64, in which the plain evaluation rounds so much less."""
    variant, a, h, recurrent, *others = problem
    a, h, *others = (v.astype("float64") for v in (a, h, *others))
    return variant, a, h, tuple(v.astype("float64") for v in recurrent), *others


@FAST
@VARIANTS
@ROWS
@pytest.mark.parametrize("reverse", [False, True])
def test_a_block_with_rows_that_end(path, reset_after, B, reverse):
    problem = block(reset_after, B, "float64")
    rng = np.random.default_rng(1)
    steps = rng.random((7, B, 1)) < 0.5
    steps[:2] = True
    alive = StepMask(steps, 2)
    ours, expected = (forward(p, problem, alive, reverse) for p in (path, "plain"))
    back = (problem, expected[0], expected[1:], alive, reverse)
    ours, expected = (
        found + backward(p, *back) for p, found in ((path, ours), ("plain", expected))
    )
    for a, b in zip(ours, expected, strict=True):
        assert np.allclose(a, b, rtol=1e-12, atol=1e-13)


@EVERY
@VARIANTS
@ROWS
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_extreme_values(path, reset_after, B, dtype):
    variant, a, h, recurrent, _, _ = block(reset_after, B, dtype, K=1)
    H = h.shape[1]
    for gate, size, expected in ((1, np.inf, h), (2, np.inf, 1.0), (2, -np.inf, -1.0)):
        extreme = np.zeros_like(a)
        extreme[..., H : 2 * H] = -np.inf  # z = 0: h' = n
        extreme[..., gate * H : (gate + 1) * H] = size
        with running(path):
            run = runner(NUMPY)
            states, _ = run.forward(variant.step, extreme, h, recurrent, None, False, False)
        assert np.allclose(states[1], expected, rtol=0, atol=3e-7)
        assert np.abs(states[1]).max() <= 1 + 3e-7
    a[0, 0, 2 * H] = np.nan
    with running(path):
        states, _ = runner(NUMPY).forward(variant.step, a, h, recurrent, None, False, False)
    assert np.isnan(states[1, 0]).tolist() == [True] + [False] * (H - 1)
    a[...] = np.linspace(-30, 30, a.size).reshape(a.shape)
    with running(path):
        states, _ = runner(NUMPY).forward(variant.step, a, h, recurrent, None, False, False)
    assert np.abs(states).max() <= 1 + 3e-7


@pytest.mark.parametrize(
    ("path", "reset_after", "B"),
    [(path, after, B) for path in PATHS for after in (False, True) for B in (1, 5, 100)
     if path != "compiled" or (B == 100) == after or THOROUGH],  # which takes long
)  # fmt: skip
def test_replace_an_equation_and_every_path_follows(path, reset_after, B, monkeypatch):
    """The equations are written once: whatever stands there is what runs, forward and back."""
    rng = np.random.default_rng(0)
    gru = GRU(3, 4, reset_after=reset_after, dtype="float64", seed=0)
    x = rng.standard_normal((5, B, 3))
    with running("plain"):
        usual = gru(x)[0]
    (name, step), (name_back, back) = replaced(reset_after)
    monkeypatch.setattr(equations, name, step)
    with running("plain"):
        expected = gru(x)[0]
    assert np.abs(expected - usual).max() > 1e-2
    with running(path):
        assert np.allclose(gru(x)[0], expected, rtol=1e-13)
        monkeypatch.setattr(equations, name_back, back)
        gradcheck(gru, x, directions=1, vanishing=[])


def by_rows_and_columns(xp, a, h, U):
    """A step that multiplies by a matrix, and by another turned."""
    H, (u, v, w) = h.shape[-1], equations.thirds(a)
    return xp.tanh(u + v * (h @ U[:H, :])) + w * (h @ U[H : 2 * H, :].T), ()


@EVERY
@pytest.mark.parametrize("B", [1, 9])
def test_replace_an_equation_and_a_stream_follows(path, B, monkeypatch):
    monkeypatch.setattr(equations, "reset_before", by_rows_and_columns)
    gru, rng = GRU(3, 4, dtype="float64", seed=0), np.random.default_rng(0)
    x, state = rng.standard_normal((B, 3)), rng.standard_normal((1, B, 4))
    found = []
    for way in ("plain", path):
        with running(way):
            stream = Stream(gru)
            stream.state = state
            found.append([stream.step(x), stream.state[0], gru.step(x, state)[0]])
    for v in (*found[0][1:], *found[1]):
        assert np.allclose(v, found[0][0], rtol=1e-13)


def doubled(xp, h, saved, da, dq=None):
    """Twice the gradient, by a sum of products and a concat of what is not a product alone."""
    H, (left, s) = h.shape[-1], (da, saved[3]) if dq is None else (dq, h)
    upper = left[:, : 2 * H].T @ h
    dU = xp.concat((upper + upper, 2.0 * (left[:, 2 * H :].T @ s)), axis=0)
    return (dU,) if dq is None else (dU, 2.0 * xp.sum(dq, axis=0))


@EVERY
@VARIANTS
@pytest.mark.parametrize("T", [1, 5])
def test_replace_the_gradient_of_the_weights_and_every_path_follows(
    path, reset_after, T, monkeypatch
):
    gru, rng = GRU(3, 4, reset_after=reset_after, dtype="float64", seed=0), np.random.default_rng(0)
    x, dy = rng.standard_normal((T, 1, 3)), rng.standard_normal((T, 1, 4))
    with running("plain"):
        expected, _, _ = gru.vjp(x)[1](dy)
    name = "reset_after_weights" if reset_after else "reset_before_weights"
    monkeypatch.setattr(equations, name, doubled)
    with running(path):
        grads, _, _ = gru.vjp(x)[1](dy)
    for name, grad in grads.items():
        assert np.allclose(grad, expected[name] * (2 if "_hh" in name else 1), rtol=1e-13)


@FAST
@VARIANTS
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rows", [(1, 1), (1, 3), (3, 1)])
def test_a_few_rows(path, reset_after, dtype, rows):
    """Products with a single row go a way of their own; arrays may be laid out in any way."""
    gru, rng = GRU(7, 5, reset_after=reset_after, dtype=dtype, seed=0), np.random.default_rng(0)
    x, dy, h0 = (rng.standard_normal((*rows, 2 * n)).astype(dtype)[..., ::2] for n in (7, 5, 5))
    h0 = h0[:1]
    h0.flags.writeable = x.flags.writeable = False

    def everything():
        (y, h_n), pullback = gru.vjp(x, h0)
        grads, dx, dh0 = pullback(dy)
        return [y, h_n, dx, dh0, *grads.values()]

    with running("plain"):
        expected = everything()
    for name in ("weight_ih_l0", "weight_hh_l0"):
        gru.params[name] = np.asfortranarray(gru.params[name])
        gru.params[name].flags.writeable = False
    with running(path):
        found = everything()
        kept = [v.copy() for v in found]
        again = everything()
    eps = 8 * np.finfo(dtype).eps
    for a, b, c, v in zip(found, kept, again, expected, strict=True):
        assert np.allclose(a, v, rtol=eps, atol=eps)
        assert np.array_equal(a, b)
        assert np.array_equal(a, c)
        assert not np.shares_memory(a, c)


@FAST
@pytest.mark.parametrize("rows", [(1, 1), (4, 20)])
def test_large_arrays_that_are_read_only(path, rows):
    """Weights that must not be written give the same bits as those that may be."""
    I, H = 70, 190
    gru, rng = GRU(I, H, seed=0), np.random.default_rng(0)
    x, dy = (rng.standard_normal((*rows, n)).astype("float32") for n in (I, H))
    found = []
    with running(path):
        for writeable in (True, False):
            for v in (x, dy, *gru.params.values()):
                v.flags.writeable = writeable
            (y, h_n), pullback = gru.vjp(x)
            grads, dx, dh0 = pullback(dy)
            found.append([y, h_n, dx, dh0, *grads.values()])
    for a, b in zip(*found, strict=True):
        assert np.array_equal(a, b)
        assert b.flags.writeable
        assert not any(np.shares_memory(b, v) for v in (x, dy, *gru.params.values()))


@pytest.mark.parametrize("reset_after", [False, True])
def test_gates_side_by_side_are_one_call(reset_after):
    """Two calls of tanh, since r and z stand side by side."""
    step = equations.variant(reset_after).step
    for name, of in (("tanh(", step), ("exp(", by_exp(step))):
        source = NumPySource(forward_schedule(of, int(reset_after), False, HOST)).source()
        assert source.count(name) == 2
    assert "tanh(" not in source


@VARIANTS
def test_large_states_at_extreme_values(reset_after):
    """Where exp overflows, gates are at their ends, and nobody is warned, whatever is asked for."""
    problem = block(reset_after, 64, "float32", K=3, H=16, scale=1e3)
    with np.errstate(all="raise"):
        found = forward("traced", problem)
    assert max(np.abs(v).max() for v in found[1:4]) == 1.0
    for mine, exact in zip(found, forward("plain", exactly(problem)), strict=True):
        assert np.allclose(mine, exact, rtol=1e-4, atol=1e-4)


def shows_its_input(xp, a, h, U):
    """With a state of zeros, what it saves is a."""
    return 0.5 * h, tuple(part + h for part in equations.thirds(a))


@FAST
@pytest.mark.parametrize("I", [1, 2, 9])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [(1, 1), (4, 3), (4, 9)])
def test_input_products(path, I, bias, rows):
    rng = np.random.default_rng(0)
    x, W, b = (rng.standard_normal(n) for n in ((*rows, I), (6, I), 6))
    expected = x @ W.T + (b if bias else 0)
    x[0, 0] = np.nan
    with running(path):
        run = runner(NUMPY)
        W, U = run.pack_weights(W, np.zeros((6, 2)), math.prod(rows))
        a = run.affine(x, W, b if bias else None)
        state = np.zeros((rows[1], 2))
        found = run.forward(shows_its_input, a, state, (U,), None, False, True)[1]
        found = np.concatenate(found, axis=-1)
    assert np.isnan(found[0, 0]).all()
    assert np.allclose(found.reshape(-1, 6)[1:], expected.reshape(-1, 6)[1:], rtol=1e-12)


def needs_its_products_again(xp, a, h, U):
    """The same operations on neighbours, whose inputs are needed again."""
    r, z, n = equations.thirds(h @ U.T)
    u, v = xp.tanh(r), xp.tanh(z)
    return u * v + r * z * n * equations.thirds(a)[0], (u, v)


@pytest.mark.parametrize(
    ("path", "keep"),
    [(path, keep) for path in WAYS for keep in (False, True)
     if path == "traced" or keep == (path == "packed") or THOROUGH],
)  # fmt: skip
def test_what_is_needed_again_is_not_written_over(path, keep):
    _, a, h, (U,), _, _ = block(False, 3, "float64")
    found = []
    for way in ("plain", path):
        with running(way):
            run = runner(NUMPY)
            ready = run.pack_weights(U, U, 3 * len(a))[1]
            states, saved = run.forward(needs_its_products_again, a, h, (ready,), None, False, keep)
            found.append([states, *(saved if keep else ())])
    for mine, plain in zip(*found[::-1], strict=True):
        assert np.allclose(mine, plain, rtol=1e-12)


@EVERY
@pytest.mark.parametrize("after", [False, True])
def test_taps_of_a_loss_on_the_last_state_alone(path, after):
    """The gradient arrives at the last step as it was given; at the first it leads to dh0."""
    gru, rng = GRU(3, 4, reset_after=after, seed=0), np.random.default_rng(0)
    x, dh_n = rng.standard_normal((9, 2, 3), "float32"), rng.standard_normal((1, 2, 4), "float32")
    with running(path):
        _, pullback = gru.vjp(x)
        taps = pullback.taps(None, dh_n)
    assert np.array_equal(taps[:, -1], dh_n)
    with running("plain"):
        _, pullback = gru.vjp(x[5:], gru.last(x[:5]))
        assert np.allclose(taps[:, 4], pullback(None, dh_n)[2], rtol=1e-5, atol=1e-7)


@pytest.mark.skipif("compiled" not in PATHS, reason="numba: not installed")
def test_each_kind_of_tile_has_a_name_of_its_own():
    """Numba calls cached code by name and a count: of one name, that of two processes mixes."""
    from gru_any.backend.cpu.gemm import BITS, macro_kernel, shapes, tiles

    kinds = [(gates, stored) for gates in (1, 2, 3) for stored in BITS]
    made = [macro_kernel(*kind) for kind in kinds]
    made += [tiles(*shape, *kind) for kind in kinds for shape in shapes(*kind)]
    assert len({f.py_func.__qualname__ for f in made}) == 4 * len(kinds)


@pytest.mark.skipif("compiled" not in PATHS, reason="numba: not installed")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(("R", "K", "N"), [(1, 1, 1), (3, 5, 17), (23, 800, 70), (151, 40, 139)])
def test_our_products(dtype, order, R, K, N, monkeypatch):
    """Right, and the same bits whatever the other rows are and however many threads."""
    from gru_any.backend.cpu.packed import PackedMatrix

    with running("compiled"):
        run = runner(NUMPY)
    rng = np.random.default_rng(0)
    x, M = np.asarray(rng.standard_normal((R, K)), dtype, order), rng.standard_normal((K, N))
    M = M.astype(dtype)

    def product(v):
        found = run.product(v, PackedMatrix(M))
        assert type(found) is np.ndarray
        return found

    whole = product(x)
    scale = np.abs(x).astype("float64") @ np.abs(M)
    assert np.all(np.abs(whole - x.astype("float64") @ M) <= K * np.finfo(dtype).eps * scale)
    parts = np.split(x, [R // 3, R // 2])
    assert np.array_equal(
        np.concatenate([product(np.asarray(p, order=order)) for p in parts]), whole
    )
    monkeypatch.setattr(threads, "count", lambda: 3)
    with tuned(thread_work=1):
        assert np.array_equal(product(x), whole)


@pytest.mark.skipif("compiled" not in PATHS, reason="numba: not installed")
@pytest.mark.parametrize("N", [1, 2, 3])
@pytest.mark.parametrize("layout", ["rows", "columns", "every other"])
def test_large_products_with_few_columns_are_our_own(N, layout, monkeypatch):
    """BLAS would wake threads, which keep ours off the processors for a while."""
    monkeypatch.setattr(NumPy, "multiply", None)
    with running("compiled"):
        run = runner(NUMPY)
    rng = np.random.default_rng(N)
    left = rng.standard_normal((900, 310))
    left = {
        "rows": left,
        "columns": np.asfortranarray(left),
        "every other": np.repeat(left, 2, axis=1)[:, ::2],
    }[layout]
    right = rng.standard_normal((310, N))
    expected = np.einsum("ik,kj->ij", left, right)
    for dtype, limit in (("float64", 1e-12), ("float32", 1e-4)):
        found = run.product(left.astype(dtype), right.astype(dtype))
        assert found.dtype == dtype
        np.testing.assert_allclose(found, expected, rtol=0, atol=limit)


@pytest.mark.skipif("compiled" not in PATHS, reason="numba: not installed")
def test_products_own_the_memory_they_use():
    """What was let go of leaves the process at once here, so that using it ends that."""
    code = (
        "import numpy as np\n"
        "from gru_any.backend.cpu.packed import PackedMatrix, gemm\n"
        "x, y = np.ones((512, 400), 'float32').T, np.empty((400, 8), 'float32')\n"
        "M = PackedMatrix(np.ones((8, 512), 'float32'))\n"
        "gemm(x, M.panels(slice(0, 8), True, 1), None, y)\n"
        "assert (y == 512).all()\n"
    )
    at_once = {"MALLOC_MMAP_THRESHOLD_": "4096", "OMP_NUM_THREADS": "1"}  # of glibc
    finished([sys.executable, "-c", code], code=0, env={**os.environ, **at_once})


LAYOUTS = {
    "strides of 0": lambda v: np.broadcast_to(v[:1, :1, :1], v.shape),
    "axes turned": lambda v: np.ascontiguousarray(v.swapaxes(0, 1)).swapaxes(0, 1),
    "time reversed": lambda v: v[::-1],
    "channels reversed": lambda v: v[..., ::-1],
    "every other channel": lambda v: np.repeat(v, 2, axis=2)[..., ::2],
    "some of the channels": lambda v: np.concat([v, v], axis=2)[..., : v.shape[2]],
    "read-only": lambda v: np.frombuffer(v.tobytes(), v.dtype).reshape(v.shape),
    "unaligned": lambda v: (
        np.frombuffer(b" " + v.tobytes(), np.uint8)[1:].view(v.dtype).reshape(v.shape)
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("B", [1, 3, 40])
@pytest.mark.parametrize("path", [*PATHS, *WAYS[2:]])
def test_the_layout_of_what_comes_in_changes_nothing(path, B, layout):
    """The same as of contiguous arrays, but for the rounding of BLAS."""
    gru, rng = GRU(5, 6, reset_after=True, seed=0), np.random.default_rng(0)
    shapes = [(4, B, 5), (1, B, 6), (4, B, 6), (1, B, 6)]
    given = [LAYOUTS[layout](rng.standard_normal(shape).astype("float32")) for shape in shapes]

    def everything(gru, x, h0, dy, dh_n):
        (y, h_n), pullback = gru.vjp(x, h0)
        grads, dx, dh0 = pullback(dy, dh_n)
        return [y, h_n, dx, dh0, *grads.values(), gru(x, h0)[0], Stream(gru).step(x[0])]

    with running(path):
        found = everything(gru, *given)
        usual = everything(gru, *(np.array(v, order="C") for v in given))
    with running("plain"):
        exact = everything(gru.to(dtype="float64"), *(v.astype("float64") for v in given))
    assert len(found) == len(usual) == len(exact)
    assert all(map(is_rounding, found, usual, exact))


@FROM_PROGRAMS
@VARIANTS
def test_inference_needs_no_more_memory_for_a_longer_sequence(path, reset_after):
    gru, peaks = GRU(4, 32, reset_after=reset_after, seed=0), []
    with running(path):
        for T in (500, 5000):
            x = np.zeros((T, 2, 4), "float32")
            gru(x)
            forget(NUMPY)
            tracemalloc.start()
            y, _ = gru(x)
            peaks.append(tracemalloc.get_traced_memory()[1] - y.nbytes)
            tracemalloc.stop()
    assert peaks[1] <= 1.05 * peaks[0] + 4096


@EVERY
def test_inference_needs_no_more_memory_for_more_layers(path):
    x, peaks = np.zeros((500, 2, 32), "float32"), []
    with running(path):
        for layers in (2, 5):
            gru = GRU(32, 32, layers, seed=0)
            gru(x)
            forget(NUMPY)
            tracemalloc.start()
            gru(x)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert peaks[1] - peaks[0] < x.nbytes  # as many as the outputs of one


@FROM_PROGRAMS
def test_recomputing_needs_less_memory(path):
    x, dy = np.zeros((5000, 2, 4), "float32"), np.zeros((5000, 2, 32), "float32")
    peaks = []
    with running(path):
        for recompute in (None, "sqrt"):
            gru = GRU(4, 32, seed=0, recompute=recompute)
            gru.vjp(x[:100])[1](dy[:100])
            forget(NUMPY)
            tracemalloc.start()
            (y, _), pullback = gru.vjp(x)
            dx = pullback(dy)[1]
            peaks.append(tracemalloc.get_traced_memory()[1] - y.nbytes - dx.nbytes)
            tracemalloc.stop()
    assert peaks[1] < 0.15 * peaks[0]


@EVERY
@pytest.mark.parametrize("B", [1, 40])
def test_threads(path, B):
    gru, rng = GRU(3, 16, seed=0), np.random.default_rng(0)
    inputs = [rng.standard_normal((30, B, 3)).astype("float32") for _ in range(8)]
    dy = np.ones((30, B, 16), "float32")

    def work(i):
        for _ in range(20):
            (y, _), pullback = gru.vjp(inputs[i])
            assert np.array_equal(pullback(dy)[1], expected[i])
            assert not np.isnan(y).any()

    with running(path):
        expected = [gru.vjp(x)[1](dy)[1] for x in inputs]
        at_once(work, 8)


@EVERY
def test_after_a_fork(path):
    code = (
        "import os, numpy as np\n"
        "from gru_any import GRU\n"
        "gru = GRU(3, 4, seed=0)\n"
        "x = np.ones((5, 3, 3), 'float32')\n"
        "y = gru(x)[0]\n"
        "pid = os.fork()\n"
        "if not pid: os._exit(0 if np.array_equal(gru(x)[0], y) else 1)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    with running(path):
        finished([sys.executable, "-W", "ignore", "-c", code], code=0)


RUN = (
    "import sys, numpy as np; from gru_any import GRU\n"
    "print(GRU(3, 4, seed=0)(np.ones((int(sys.argv[1]), 3, 3), 'float32'))[0].sum())"
)


def result(T=50, **environment):
    environment = {**os.environ, **environment}
    done = finished([sys.executable, "-c", RUN, T], code=0, env=environment)
    return float(done.stdout), done.stderr


@pytest.mark.skipif("compiled" not in PATHS, reason="numba: not installed")
def test_the_cache(tmp_path):
    first, told = result(GRU_ANY_CACHE=str(tmp_path))
    assert "compiling" in told
    assert len(list(tmp_path.glob("gru_any_*.py"))) == 5  # the walk, its 3 products, what packs
    again, told = result(GRU_ANY_CACHE=str(tmp_path))
    assert "compiling" not in told
    assert first == again
    (tmp_path / "file").touch()
    no_folder, _ = result(2, GRU_ANY_CACHE=str(tmp_path / "file"))  # too few for a packed product
    for T, found in ((50, first), (2, no_folder)):
        assert result(T, GRU_ANY_NO_NUMBA="1")[0] == pytest.approx(found, rel=1e-5)


def test_no_file_is_written_without_numba(tmp_path):
    result(GRU_ANY_NO_NUMBA="1", GRU_ANY_CACHE=str(tmp_path / "cache"))
    assert not Path(tmp_path / "cache").exists()


def test_the_path_in_words(monkeypatch):
    from gru_any.backend import modes as run
    from gru_any.backend.cpu import jit_cache as compiled

    assert run.path(NUMPY, 8, "complex128")[0] == "plain"
    assert type(runner(NUMPY, dtype="complex128")) is Plain
    for way, reason in (("plain", "GRU_ANY_PLAIN"), ("traced", "GRU_ANY_NO_NUMBA")):
        monkeypatch.setattr(run, "chosen", way)
        assert run.path(NUMPY, 8) == (way, f"{reason} is set")
    monkeypatch.setattr(run, "chosen", "compiled")
    assert run.path(NUMPY, 8)[0] == PATHS[-1]
    monkeypatch.setattr("gru_any.backend.cpu.jit_cache.find_spec", lambda name: None)
    monkeypatch.setattr(run, "problem", compiled._import_problem.__wrapped__)
    assert run.path(NUMPY, 8)[0] == "traced"
    assert "gru-any[fast]" in run.path(NUMPY, 8)[1]


def words(code, **variables):
    """What a new process with these variables prints."""
    found = finished([sys.executable, "-c", code], code=0, env=os.environ | variables)
    return found.stdout.strip()


PATH = "from gru_any.backend import path, select; print(*path(select('numpy'), 8))"


@pytest.mark.parametrize("off", ["", "0", "false", "False", "off"])
def test_a_switch_that_is_off(off):
    assert words(PATH, GRU_ANY_PLAIN=off, GRU_ANY_NO_NUMBA="1").startswith("traced ")
    assert words(PATH, GRU_ANY_PLAIN="true", GRU_ANY_NO_NUMBA=off).startswith("plain ")


def test_an_unknown_value_is_an_error_of_the_call_that_needs_it():
    code = """
import gru_any, numpy as np
gru = gru_any.GRU(2, 3)
try:
    gru(np.ones((2, 1, 2), "float32"))
except ValueError as e:
    print(e)
"""
    assert not words(code, GRU_ANY_CUDA="foo")  # which NumPy does not ask for
    told = words(code, GRU_ANY_PLAIN="maybe")
    assert told == "the environment variable GRU_ANY_PLAIN is 'maybe', expected 1 or 0"

"""Whole GRUs on a device that the host emulates: recorded, replayed, and stricter than a device."""

import warnings
from functools import partial

import numpy as np
import pytest
from conftest import THOROUGH, at_once, require, running
from replaced import replaced

import gru_any
from gru_any import GRU, Adam, Chain, Dropout, Embedding, Linear, asarray, equations, to_numpy
from gru_any.backend import NUMPY, runner, select
from gru_any.backend import modes as run
from gru_any.backend.cuda import tuning
from gru_any.backend.reference import Plain
from gru_any.codegen import cuda_source
from gru_any.codegen.schedule import Gemm
from gru_any.testing.fake_cuda import array as fake
from gru_any.testing.fake_cuda.memory import StreamError, count, enqueue
from gru_any.testing.fake_cuda.ops import Ops, gemm
from gru_any.train.data import Batch
from gru_any.train.loop import fit
from gru_any.train.optim import clip_by_global_norm

pytestmark = pytest.mark.usefixtures("compiler")
HOST = fake.__name__
VARIANTS = pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
LIMIT = {"float32": 2e-6, "float64": 1e-13}
EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Each test records anew, and records where it does not say otherwise."""
    monkeypatch.setattr(run, "chosen_on_cuda", "graph")
    run._runner.cache_clear()
    run._on_cuda.cache_clear()
    yield
    run._runner.cache_clear()
    run._on_cuda.cache_clear()


@pytest.fixture
def take(monkeypatch):
    return lambda way: monkeypatch.setattr(run, "chosen_on_cuda", way)


def pair(**settings):
    """The same GRU on NumPy and on the device."""
    gru = GRU(**settings, seed=0)
    return gru, gru.to(HOST)


def batch(gru, T, B, seed):
    rng = np.random.default_rng(seed)
    D, H = len(gru.suffixes), gru.hidden_size
    shapes = [(T, B, gru.input_size), (gru.num_layers * D, B, H)]
    shapes += [(T, B, D * H), (gru.num_layers * D, B, H)]
    return [rng.standard_normal(shape).astype(gru.dtype) for shape in shapes]


def everything(gru, x, h0, dy, dh, **options):
    x, h0, dy, dh = (asarray(v, like=gru) for v in (x, h0, dy, dh))
    (y, h_n), pullback = gru.vjp(x, h0, **options)
    grads, dx, dh0 = pullback(dy, dh)
    short = gru(x, h0, **options)
    return [to_numpy(v) for v in (y, h_n, *short, dx, dh0, *grads.values())]


def assert_same(found, expected, limit):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert np.abs(ours - theirs).max() <= limit * np.abs(theirs).max()


RAGGED = [20, 0, 7, 13, 1]
# one row, and float64 on the whole device, would be more for g++ to compile
CALLS = [
    (way, dtype, B, lengths)
    for way in ("eager", "blocks", "graph", "persistent", "whole")
    for dtype in ("float32", "float64")
    for B, lengths in ((1, None), *([(5, None)] if THOROUGH else []), (5, RAGGED))
    if (way in ("eager", "graph") or B > 1)
    and not (way in ("blocks", "whole") and dtype[-1] == "4")
]


@VARIANTS
@pytest.mark.parametrize(("way", "dtype", "B", "lengths"), CALLS)
def test_a_whole_gru(take, way, after, dtype, B, lengths):
    """Three calls with other inputs: launched, recorded, and replayed."""
    T = 6 if way == "whole" else 20  # its threads are many
    take(way)
    host, device = pair(input_size=3, hidden_size=5, num_layers=2, bidirectional=True,
                        reset_after=after, dtype=dtype)  # fmt: skip
    before = count["replays"]
    for seed in range(3):
        arrays = batch(host, T, B, seed)
        lengths = lengths and [min(n, T) for n in lengths]
        found = everything(device, *arrays, lengths=lengths)
        assert_same(found, everything(host, *arrays, lengths=lengths), LIMIT[dtype])
    assert (count["replays"] > before) == (way != "eager")


def gap_of_halves(after, T, lengths=None, dtype="float16", z=0.0):
    """The largest difference from float64 on the same rounded numbers, in eps of the half type.

    z: what is added to the bias of the update gates.
    """
    usual = GRU(3, 5, 2, bidirectional=True, reset_after=after, seed=0)
    for name in (n for n in usual.params if n.startswith("bias_ih")):
        usual.params[name][5:10] += z
    device, host, worst = usual.to(HOST, dtype=dtype), usual.to(dtype="float64"), 0.0
    host.load_params({name: to_numpy(v).astype("f8") for name, v in device.params.items()})
    for seed in range(3):
        arrays = [v.astype(dtype).astype("f4") for v in batch(usual, T, 5, seed)]
        found = everything(device, *arrays, lengths=lengths)
        expected = everything(host, *(v.astype("f8") for v in arrays), lengths=lengths)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == dtype
            gap = np.abs(ours.astype("f8") - theirs).max() / np.abs(theirs).max()
            worst = max(worst, gap / EPS[dtype])
    return worst


# the other kernels over bfloat16 are in test_cuda_persistent.py; g++ takes long
IN_HALF = [(way, "float16") for way in ("graph", "persistent", "whole")] + [("graph", "bfloat16")]
if THOROUGH:
    IN_HALF += [("persistent", "bfloat16"), ("whole", "bfloat16")]


@pytest.mark.parametrize(("way", "dtype"), IN_HALF)
@VARIANTS
def test_a_whole_gru_in_half_precision(take, monkeypatch, way, after, dtype):
    if dtype == "bfloat16":  # which CuPy has no name for
        monkeypatch.setattr(fake, dtype, require("ml_dtypes").bfloat16, raising=False)
    take(way)
    T = 6 if way == "whole" else 20
    assert gap_of_halves(after, T, None, dtype) <= 8
    assert gap_of_halves(after, T, [T, 0, 4, T - 1, 1], dtype) <= 8


@pytest.mark.parametrize("way", ["graph", "persistent", "whole"])
@VARIANTS
def test_a_gate_near_one_is_no_half(take, way, after):
    """As float16 most of these would be 1, and a state could neither change nor learn."""
    take(way)
    assert gap_of_halves(after, 6 if way == "whole" else 20, z=8.0) <= 8


def test_a_state_that_products_do_not_see_is_noticed(monkeypatch):
    """The copy of the state in half precision that stays as it was before the block."""
    right = cuda_source.narrowed

    def wrong(stages):
        return right(stages)._replace(stages=[
            part if isinstance(part, Gemm) else group
            for part, group in zip(right(stages).stages, stages.stages, strict=True)
        ])  # fmt: skip

    assert gap_of_halves(False, 3) <= 8
    monkeypatch.setattr(cuda_source, "narrowed", wrong)
    cuda_source.typed.cache_clear()
    run._runner.cache_clear()
    run._on_cuda.cache_clear()
    assert gap_of_halves(False, 3) > 8
    cuda_source.typed.cache_clear()


@VARIANTS
@pytest.mark.parametrize("precision", ["full", "tf32"])
def test_halves_stay_halves_and_sums_are_float32(after, precision, monkeypatch):
    """Every product reads halves; states and gates are none."""
    asked = []

    def products(self, precision):
        def call(*arguments):
            asked.append(arguments[-1])
            enqueue(partial(gemm, *arguments))

        return call

    monkeypatch.setattr(Ops, "blas", products)
    monkeypatch.setattr(fake.Array, "__matmul__", None)
    gru = GRU(3, 5, reset_after=after, seed=0, dtype="float16", backend=HOST, precision=precision)
    x, h0, dy, dh = batch(gru, 9, 4, 0)
    everything(gru, x, h0, dy, dh, lengths=[9, 2, 0, 5])
    assert set(asked) == {"float16"}
    sweep = gru._stack(gru._runner).sweep(gru.params, 0, "", None, None)
    h = fake.asarray(h0[0].astype("f4"))
    y, last, [segment] = sweep.forward(fake.asarray(x), h, keep=True)
    assert (y.dtype, last.dtype, segment.residuals[0].states.dtype) == (
        "float16",
        "float32",
        "float32",
    )
    assert {str(v.dtype) for v in segment.residuals[0].saved} == {"float32"}
    _, dh, grads = sweep.backward(fake.asarray(x), [segment], fake.asarray(dy), h)
    assert {str(v.dtype) for v in (dh, *grads)} == {"float32"}


@VARIANTS
def test_several_blocks_and_recomputing(after):
    """The gradients are the same bits whether states are kept or computed again."""
    host, device = pair(input_size=2, hidden_size=4, reset_after=after)
    again = GRU(2, 4, reset_after=after, seed=0, recompute="sqrt", backend=HOST)
    arrays = batch(host, 150, 3, 0)
    found = everything(device, *arrays)
    for a, b in zip(found, everything(again, *arrays), strict=True):
        assert np.array_equal(a, b)
    assert_same(found, everything(host, *arrays), 4e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_no_steps_no_rows_and_no_batch(dtype):
    _, device = pair(input_size=3, hidden_size=4, dtype=dtype)
    for T, B in ((0, 2), (3, 0), (0, 0)):
        x = asarray(np.zeros((T, B, 3), dtype), like=device)
        (y, h_n), pullback = device.vjp(x)
        grads, dx, _ = pullback(y)
        assert (y.shape, h_n.shape, dx.shape) == ((T, B, 4), (1, B, 4), (T, B, 3))
        assert all(np.all(to_numpy(g) == 0) for g in grads.values())
    x = asarray(np.zeros((5, 3), dtype), like=device)
    assert device(x)[0].shape == (5, 4)
    assert np.allclose(to_numpy(device.step(x)[0]), 0, atol=0.5)


@VARIANTS
def test_a_nan_stays_in_its_row(after):
    host, device = pair(input_size=3, hidden_size=4, reset_after=after)
    x, h0, dy, dh = batch(host, 6, 3, 0)
    clean = everything(device, x, h0, dy, dh)
    x[2, 1] = np.nan
    found = everything(device, x, h0, dy, dh)
    for a, b in zip(found[:6], clean[:6], strict=True):
        assert np.array_equal(a[:, ::2], b[:, ::2])
    assert np.isnan(found[0][2:, 1]).all()


@pytest.mark.parametrize("way", ["blocks", "graph"])
@VARIANTS
def test_what_a_pullback_saved_is_its_own(take, way, after):
    """Three forwards, then their pullbacks in the other order; and a pullback dropped unused."""
    take(way)
    host, device = pair(input_size=3, hidden_size=5, reset_after=after)
    arrays = [batch(host, 9, 4, seed) for seed in range(3)]
    expected = [everything(host, *a)[4:] for a in arrays]
    device.vjp(asarray(arrays[0][0], like=device))
    results = [device.vjp(*(asarray(v, like=device) for v in a[:2])) for a in arrays]
    kept = [to_numpy(y).copy() for (y, _), _ in results]
    for (_, pullback), a, wanted in reversed(list(zip(results, arrays, expected, strict=True))):
        grads, dx, dh0 = pullback(*(asarray(v, like=device) for v in a[2:]))
        assert_same([to_numpy(v) for v in (dx, dh0, *grads.values())], wanted, 2e-6)
    for ((y, _), _), before in zip(results, kept, strict=True):
        assert np.array_equal(to_numpy(y), before)


@pytest.mark.parametrize("way", ["blocks", "graph"])
def test_weights_written_or_replaced_between_two_calls(take, way):
    take(way)
    host, device = pair(input_size=3, hidden_size=5)
    arrays = batch(host, 9, 4, 0)
    for turn in range(4):
        for gru in (host, device):
            if turn % 2:
                gru.params["weight_hh_l0"] *= 0.5
            else:
                gru.params["weight_hh_l0"] = gru.params["weight_hh_l0"] + 0.1
        assert_same(everything(device, *arrays), everything(host, *arrays), 2e-6)


@pytest.mark.parametrize("way", ["graph", "persistent", *(["whole"] if THOROUGH else [])])
@VARIANTS
def test_replace_an_equation_and_the_kernels_follow(take, way, after, monkeypatch):
    """Forward and back: launched, recorded and replayed."""
    take(way)
    host, device = pair(input_size=3, hidden_size=4, reset_after=after, dtype="float64")
    arrays, before = batch(host, 5, 3, 0), count["replays"]
    with running("plain"):
        usual = everything(host, *arrays)
        for name, function in replaced(after):
            monkeypatch.setattr(equations, name, function)
        expected = everything(host, *arrays)
    assert all(np.abs(a - b).max() > 1e-2 for a, b in zip(usual, expected, strict=True))
    for _ in range(3):
        assert_same(everything(device, *arrays), expected, 1e-13)
    assert count["replays"] > before


def test_shapes_of_steps_that_ours_do_not_have():
    """A result that is a product, or a sum with one; one that two use; a state that goes on."""

    def product(xp, a, h, U):
        return h @ U[: h.shape[1], :].T, (h,)

    def twice(xp, a, h, U):
        H = h.shape[1]
        q = h @ U[:H, :].T
        return a[:, :H] + q, (q * 2.0,)

    def added(xp, a, h, U):
        H = h.shape[1]
        return 0.5 * a[:, :H] + h @ U[:H, :].T, (h,)

    gru, rng = GRU(3, 4, backend=HOST), np.random.default_rng(0)
    a, h, U = (rng.standard_normal(s).astype("f4") for s in ((3, 2, 12), (2, 4), (12, 4)))
    for step in (product, twice, added):
        plain = Plain(NUMPY.xp, "cpu")
        expected, extra = plain.forward(step, a, h, (U,), None, False, True)
        arrays = (fake.asarray(v) for v in (a, h))
        found, more = runner(gru.backend).forward(
            step, *arrays, (fake.asarray(U),), None, False, True
        )
        assert_same([found.get(), more[0].get()], [expected, extra[0]], 2e-6)


# streams, threads, memory ------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["blocks", "graph"])
def test_streams_take_turns(take, way):
    """What one stream recorded another may replay; nothing is read before it is there."""
    take(way)
    host, device = pair(input_size=3, hidden_size=5, bidirectional=True)
    arrays, ops = batch(host, 9, 4, 0), Ops()
    expected = everything(host, *arrays)
    everything(device, *arrays)  # and the host waits, so all streams know the weights
    for number in (8, 9, 8, 9):
        with ops.on(number):
            assert_same(everything(device, *arrays), expected, 2e-6)


def test_a_stream_that_did_not_wait_is_found():
    ops = Ops()
    with ops.on(1):
        x = fake.asarray(np.ones(3, "f4"))
        done = ops.event()
    with pytest.raises(StreamError, match="did not wait"):
        x + 1.0
    ops.wait(done)
    assert (x + 1.0).get().tolist() == [2, 2, 2]


@pytest.mark.parametrize("way", ["blocks", "graph"])
def test_threads(take, way):
    take(way)
    host, device = pair(input_size=3, hidden_size=5, bidirectional=True)
    inputs = [batch(host, 9, 4, seed) for seed in range(3)]
    expected = [everything(host, *a) for a in inputs]

    def work(n):
        with Ops().on(10 + n):
            for _ in range(4):
                assert_same(everything(device, *inputs[n]), expected[n], 2e-6)

    everything(device, *inputs[0])
    at_once(work, 3)


def test_memory_that_was_let_go_of_is_nan_and_nothing_is_made_while_recording():
    x = fake.asarray(np.ones(3, "f4"))
    address = Ops().pointer(x)
    del x
    y = fake.empty(3, dtype="f4")
    assert Ops().pointer(y) == address
    assert np.isnan(y.get()).all()
    for call in (lambda: fake.empty(3, dtype="f4"), lambda: y + 1.0, y.get):
        with pytest.raises(RuntimeError, match="while launches are recorded"):
            Ops().capture(call)


def test_plans_are_few_and_can_be_let_go_of(take, monkeypatch):
    take("blocks")
    monkeypatch.setattr(tuning, "current", tuning.current._replace(plans=3))
    _, device = pair(input_size=3, hidden_size=4)
    for B in (1, 2, 3, 4, 5, 1):
        device(asarray(np.zeros((3, B, 3), "f4"), like=device))
    workspace = runner(device.backend).workspaces[0]
    assert len(workspace.plans) == 3
    run.forget(device.backend)
    assert not workspace.plans
    run.forget(NUMPY)


def test_a_device_that_refuses_to_record(monkeypatch):
    """The right numbers all the same; each kind of recording is told once."""
    monkeypatch.setattr(Ops, "capture", refuse)
    host, device = pair(input_size=3, hidden_size=5)
    arrays = batch(host, 9, 4, 0)
    everything(device, *arrays)
    with pytest.warns(RuntimeWarning) as told:
        found = [everything(device, *arrays) for _ in range(2)]
    assert ["a whole call" in str(w.message) for w in told] == [True, False]
    assert all("refused to record" in str(w.message) for w in told)
    for v in (*found, everything(device, *arrays)):
        assert_same(v, everything(host, *arrays), 2e-6)
    assert run.path(device.backend, 5)[0] == "eager"


def refuse(self, launches):
    raise RuntimeError("cudaErrorStreamCaptureUnsupported")


# what waits for the device -----------------------------------------------------------------------


def test_a_training_step_waits_for_nothing(take):
    take("graph")
    model = Chain(
        Embedding(11, 4, backend=HOST, seed=0),
        GRU(4, 5, 2, dropout=0.3, bidirectional=True, backend=HOST, seed=0),
        Dropout(0.2, backend=HOST),
        Linear(10, 11, backend=HOST, seed=0),
    )
    optimiser, rng = Adam(model.params), np.random.default_rng(0)
    x = fake.asarray(rng.integers(0, 11, (7, 3)))
    waits, losses = count["waits"], []
    for _ in range(3):
        (y, _), pullback = model.vjp(x, rng=rng, lengths=[7, 2, 5])
        loss, dy = gru_any.softmax_cross_entropy(y, x)
        grads, _, _ = pullback(dy)
        clip_by_global_norm(grads, 1.0)
        optimiser.step(model.params, grads)
        losses.append(loss)
    assert count["waits"] == waits
    assert np.isfinite(float(losses[-1]))
    assert count["waits"] == waits + 1


def waits_of_training(steps, log_every):
    """How often the host waits in a run with dropout, clipping, a state carried on, an average."""
    model = Chain(GRU(3, 5, seed=0), Dropout(0.3), Linear(5, 2, seed=1)).to(HOST)
    rng, before = np.random.default_rng(0), count["waits"]
    x, target = (rng.standard_normal((8, 4, n)).astype("f4") for n in (3, 2))
    batches, optimiser = (lambda epoch: [Batch(x, target)]), Adam(model.params)
    fit(model, gru_any.squared_error, batches, optimiser, steps=steps, tbptt=(4, 4), clip=1.0,
        average=0.9, log_every=log_every, bar=False)  # fmt: skip
    return count["waits"] - before


def test_a_run_waits_for_its_log_alone():
    """Every so many steps, and at the end: as often for 12 steps as for 4."""
    assert waits_of_training(12, 100) == waits_of_training(4, 100)
    logged = [waits_of_training(steps, 4) for steps in (4, 8, 12)]
    assert logged[2] - logged[1] == logged[1] - logged[0] == 5  # numbers of a line of the log


def test_a_dropout_mask_is_a_byte_for_each_number():
    layer, x = Dropout(0.5, backend=HOST), fake.asarray(np.ones((7, 9), "f4"))
    before = count["bytes copied"]
    y, _ = layer.vjp(x, rng=np.random.default_rng(0))
    assert count["bytes copied"] - before == 63
    assert set(y.get().ravel()) == {0, 2}


@VARIANTS
def test_tf32_is_asked_for_in_every_product(after, monkeypatch):
    asked = []

    def products(self, precision):
        def call(*arguments):
            asked.append(precision)
            enqueue(partial(gemm, *arguments))

        return call

    monkeypatch.setattr(Ops, "blas", products)
    monkeypatch.setattr(fake.Array, "__matmul__", None)
    host = GRU(3, 5, reset_after=after, seed=0, bidirectional=True)
    device = GRU(3, 5, reset_after=after, bidirectional=True, backend=HOST, precision="tf32")
    device.load_params(host.params)
    arrays = batch(host, 9, 4, 0)
    for lengths in (None, [9, 3, 0, 5]):
        found = everything(device, *arrays, lengths=lengths)
        assert_same(found, everything(host, *arrays, lengths=lengths), 2e-6)
    assert set(asked) == {"tf32"}
    with pytest.raises(ValueError, match="expected"):
        GRU(3, 5, precision="half")


# which way ---------------------------------------------------------------------------------------


def test_the_path_in_words(take, monkeypatch):
    backend = select(HOST)
    take("persistent")
    assert run.path(backend, 128)[0] == "persistent"
    assert run.path(backend, 128, "float64")[0] == "graph"
    assert run.path(backend, 1000)[0] == "graph"
    assert "1000 units" in run.path(backend, 1000)[1]
    for way in ("plain", "eager", "blocks", "graph", "whole"):
        take(way)
        assert run.path(backend, 1000) == (way, run.path(backend, 1000)[1])
        assert "GRU_ANY_CUDA" in run.path(backend, 1000)[1]
    assert run.path(backend, 8, "complex128")[0] == "plain"
    monkeypatch.setenv("GRU_ANY_CUDA", "fastest")
    with pytest.raises(ValueError, match="expected one of plain, eager, blocks, graph"):
        run._asked_on_cuda()
    monkeypatch.setenv("GRU_ANY_PLAIN", "1")
    assert run._asked_on_cuda() == "plain"


def test_no_warning_where_all_is_well():
    host, device = pair(input_size=3, hidden_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(3):
            everything(device, *batch(host, 4, 2, seed))

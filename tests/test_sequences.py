"""What a sequence layer promises: lengths, padding, directions, states, layouts, backends."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gru_any import GRU, Chain, Dropout, Linear

VARIANTS = pytest.mark.parametrize("reset_after", [False, True], ids=["before", "after"])


def make(reset_after=False, I=3, H=4, layers=2, dtype="float64", **options):
    return GRU(I, H, layers, reset_after=reset_after, dtype=dtype, seed=1, **options)


def close(a, b, tolerance=1e-13):
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    assert np.linalg.norm(a - b) <= tolerance * (np.linalg.norm(b) + 1e-300)


def test_one_step_by_hand():
    """H = 1, all weights 1, no bias, x = 0, h = 1: r = z = sigmoid(1), n = tanh(...)."""
    s = 1 / (1 + np.exp(-1.0))
    for reset_after, n in ((False, np.tanh(s * 1.0)), (True, np.tanh(s * 1.0))):
        gru = GRU(1, 1, bias=False, reset_after=reset_after, dtype="float64")
        gru.load_params({"weight_ih_l0": np.ones((3, 1)), "weight_hh_l0": np.ones((3, 1))})
        y, _ = gru(np.zeros((1, 1, 1)), np.ones((1, 1, 1)))
        close(y, [[[s * 1 + (1 - s) * n]]])


def test_the_two_variants_by_hand_where_they_differ():
    """H = 2 with a candidate that mixes the units, and r different for each: z = 1/2."""
    h, U_n = np.array([1.0, -2.0]), np.array([[0.5, 1.0], [2.0, -1.0]])
    r = 1 / (1 + np.exp(-np.array([1.0, 3.0])))
    before = np.tanh(U_n @ (r * h))
    after = np.tanh(r * (U_n @ h + 0.25))
    for reset_after, n in ((False, before), (True, after)):
        gru = GRU(1, 2, reset_after=reset_after, dtype="float64")
        params = {
            "weight_ih_l0": np.zeros((6, 1)),
            "weight_hh_l0": np.concatenate([np.zeros((4, 2)), U_n]),
            "bias_ih_l0": np.array([1.0, 3.0, 0, 0, 0, 0]),
        }
        if reset_after:
            params["bias_hh_l0"] = np.array([0, 0, 0, 0, 0.25, 0.25])
        gru.load_params(params)
        y, _ = gru(np.zeros((1, 1, 1)), h[None, None, :])
        close(y[0, 0], 0.5 * h + 0.5 * n)


@VARIANTS
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    bidirectional=st.booleans(),
    seed=st.integers(0, 9999),
)
def test_a_ragged_batch_is_its_rows(reset_after, lengths, bidirectional, seed):
    gru, rng = make(reset_after, bidirectional=bidirectional), np.random.default_rng(seed)
    x = rng.standard_normal((9, len(lengths), 3))
    h0 = rng.standard_normal((2 * (1 + bidirectional), len(lengths), 4))
    dy = rng.standard_normal((9, len(lengths), 4 * (1 + bidirectional)))
    dh = rng.standard_normal(h0.shape)
    dirty_x, dirty_dy = x.copy(), dy.copy()
    for b, n in enumerate(lengths):
        dirty_x[n:, b], dirty_dy[n:, b] = np.nan, np.inf
    (y, h_n), pullback = gru.vjp(dirty_x, h0, lengths)
    grads, dx, dh0 = pullback(dirty_dy, dh)
    total = {k: 0.0 for k in grads}
    for b, n in enumerate(lengths):
        (row_y, row_h), row_back = gru.vjp(x[:n, b : b + 1], h0[:, b : b + 1])
        row_grads, row_dx, row_dh0 = row_back(dy[:n, b : b + 1], dh[:, b : b + 1])
        close(y[:n, b : b + 1], row_y)
        close(h_n[:, b : b + 1], row_h)
        close(dx[:n, b : b + 1], row_dx)
        close(dh0[:, b : b + 1], row_dh0)
        assert not y[n:, b].any()
        assert not dx[n:, b].any()
        total = {k: total[k] + row_grads[k] for k in total}
    for name in grads:
        close(grads[name], np.broadcast_to(total[name], grads[name].shape), 1e-12)


@VARIANTS
def test_padding_changes_no_bit(reset_after):
    gru, rng = make(reset_after, bidirectional=True), np.random.default_rng(0)
    x, dy = rng.standard_normal((9, 3, 3)), rng.standard_normal((9, 3, 8))
    results = []
    for rubbish in (0.0, np.nan, 1e300):
        X, DY = x.copy(), dy.copy()
        X[4:, 1], DY[4:, 1] = rubbish, rubbish
        (y, h_n), pullback = gru.vjp(X, None, [9, 4, 9])
        grads, dx, dh0 = pullback(DY)
        results.append([y, h_n, dx, dh0, *grads.values()])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert np.array_equal(a, b)


@VARIANTS
def test_a_nan_stays_in_its_row(reset_after):
    gru, rng = make(reset_after, bidirectional=True), np.random.default_rng(0)
    x, dy = rng.standard_normal((9, 3, 3)), rng.standard_normal((9, 3, 8))
    (y, h_n), pullback = gru.vjp(x)
    dx = pullback(dy)[1]
    x[2, 1, 0] = np.nan
    (bad_y, bad_h), bad_pullback = gru.vjp(x)
    bad_dx = bad_pullback(dy)[1]
    for good, bad in ((y, bad_y), (h_n, bad_h), (dx, bad_dx)):
        assert np.isnan(bad[:, 1]).any()
        assert np.array_equal(good[:, [0, 2]], bad[:, [0, 2]])


@VARIANTS
def test_reverse_is_forward_on_the_flipped_input(reset_after):
    both = make(reset_after, layers=1, bidirectional=True)
    alone = make(reset_after, layers=1)
    alone.load_params(
        {k.removesuffix("_reverse"): v for k, v in both.params.items() if k.endswith("_reverse")}
    )
    x = np.random.default_rng(0).standard_normal((150, 2, 3))
    y, h_n = both(x)
    flipped, last = alone(x[::-1].copy())
    close(y[..., 4:], flipped[::-1])
    close(h_n[1:], last)


@VARIANTS
@pytest.mark.parametrize("cuts", [[1], [64], [3, 64, 65, 149]])
def test_chunks_give_the_whole(reset_after, cuts):
    gru, x = make(reset_after), np.random.default_rng(0).standard_normal((150, 2, 3))
    whole, last = gru(x)
    h, parts = None, []
    for piece in np.split(x, cuts):
        y, h = gru(piece, h)
        parts.append(y)
    close(np.concatenate(parts), whole)
    close(h, last)
    close(gru.last(x), last)


@VARIANTS
def test_steps_give_the_whole(reset_after):
    gru, x = (
        make(reset_after, batch_first=True),
        np.random.default_rng(0).standard_normal((2, 7, 3)),
    )
    whole, last = gru(x)
    state, first = None, None
    for t in range(7):
        y, state = gru.step(x[:, t], state)
        first = state if first is None else first
        close(y, whole[:, t])
    close(state, last)
    kept = first.copy()
    gru.step(x[:, 0], first)
    assert np.array_equal(first, kept)
    single, h = gru.step(x[0, 0])
    close(single, whole[0, 0])
    assert h.shape == (2, 4)


def test_step_of_a_bidirectional_gru_is_refused():
    with pytest.raises(ValueError, match="bidirectional"):
        make(bidirectional=True).step(np.zeros((1, 3)))


@VARIANTS
def test_layouts_agree(reset_after):
    gru = make(reset_after, bidirectional=True)
    other = make(reset_after, bidirectional=True, batch_first=True)
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((6, 2, 3)), rng.standard_normal((6, 2, 8))
    (y, h), pullback = gru.vjp(x)
    (y2, h2), pullback2 = other.vjp(x.swapaxes(0, 1))
    assert np.array_equal(y, y2.swapaxes(0, 1))
    assert np.array_equal(h, h2)
    dx, dx2 = pullback(dy)[1], pullback2(dy.swapaxes(0, 1))[1]
    assert np.array_equal(dx, dx2.swapaxes(0, 1))
    y1, h1 = gru(x[:, 0])
    close(y1, y[:, 0])
    close(h1, h[:, 0])


@pytest.mark.parametrize("shape", [(0, 2), (5, 0), (0, 0)], ids=["T=0", "B=0", "T=B=0"])
@VARIANTS
def test_nothing_is_legal(backend, reset_after, shape):
    gru = make(
        reset_after,
        bidirectional=True,
        backend=backend.name,
        device=backend.device,
        dtype="float32",
    )
    h0 = np.random.default_rng(0).standard_normal((4, shape[1], 4)).astype("float32")
    (y, h_n), pullback = gru.vjp(backend.put(np.zeros((*shape, 3), "float32")), backend.put(h0))
    assert y.shape == (*shape, 8)
    assert np.array_equal(backend.host(h_n), h0) or shape[1] == 0
    dy = backend.put(np.ones((*shape, 8), "float32"))
    grads, dx, dh0 = pullback(dy, backend.put(h0 + 1))
    assert dx.shape == (*shape, 3)
    assert np.array_equal(backend.host(dh0), h0 + 1)
    for name, g in grads.items():
        assert g.shape == gru.params[name].shape
        assert not backend.host(g).any()
    assert pullback.taps(dy).shape == (4, *shape, 4)
    assert gru.taps(backend.put(np.zeros((*shape, 3), "float32")))["z"].shape == (4, *shape, 4)


@VARIANTS
def test_either_cotangent_may_be_none(reset_after):
    gru, rng = make(reset_after), np.random.default_rng(0)
    x = rng.standard_normal((5, 2, 3))
    dy, dh = rng.standard_normal((5, 2, 4)), rng.standard_normal((2, 2, 4))
    _, pullback = gru.vjp(x)
    both, one, other = pullback(dy, dh), pullback(dy), pullback(None, dh)
    close(both[1], one[1] + other[1])
    for name in both[0]:
        close(both[0][name], one[0][name] + other[0][name])
    zero = pullback(np.zeros_like(dy), dh)
    close(zero[1], other[1])
    with pytest.raises(ValueError, match="neither dy nor dh_n"):
        pullback(None)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@VARIANTS
def test_every_backend_gives_the_numbers_of_numpy(backend, reset_after, dtype):
    if "jax" in backend.name and reset_after != (dtype == "float32"):
        pytest.skip("JAX compiles each operation for each shape: half of the pairs will do")
    options = {"bidirectional": True, "dropout": 0.4, "dtype": dtype}
    here = make(reset_after, **options)
    there = make(reset_after, backend=backend.name, device=backend.device, **options)
    rng = np.random.default_rng(0)
    x, h0 = rng.standard_normal((70, 3, 3)), rng.standard_normal((4, 3, 4))
    dy, dh = rng.standard_normal((70, 3, 8)), rng.standard_normal((4, 3, 4))
    lengths = [70, 0, 65]
    arrays = [v.astype(dtype) for v in (x, h0, dy, dh)]
    far = [backend.put(v) for v in arrays]
    (y, h), pullback = here.vjp(arrays[0], arrays[1], lengths, np.random.default_rng(5))
    (y2, h2), pullback2 = there.vjp(far[0], far[1], lengths, np.random.default_rng(5))
    grads, dx, dh0 = pullback(arrays[2], arrays[3])
    grads2, dx2, dh02 = pullback2(far[2], far[3])
    pairs = [(y, y2), (h, h2), (dx, dx2), (dh0, dh02), *((grads[k], grads2[k]) for k in grads)]
    for a, b in pairs:
        b = backend.host(b)
        assert b.dtype == a.dtype
        close(b, a, 5e-6 if dtype == "float32" else 1e-13)


@VARIANTS
def test_what_was_returned_stays_on_every_backend(backend, reset_after):
    """And replaced weights take effect at the next call."""
    home = {"backend": backend.name, "device": backend.device}
    if backend.name == "jax.numpy":
        pytest.skip("jax.numpy: its arrays cannot be written")
    gru, rng = make(reset_after, **home), np.random.default_rng(0)
    x, dy = (backend.put(rng.standard_normal((5, 2, n))) for n in (3, 4))

    def host(*arrays):
        return [backend.host(v).copy() for v in arrays]

    outputs, first = gru.vjp(x)
    kept = host(*outputs)
    _, second = gru.vjp(x * 2)
    dx = host(first(dy)[1])
    assert not np.array_equal(host(second(dy)[1]), dx)
    assert np.array_equal(host(first(dy)[1]), dx)
    for name in gru.params:
        gru.params[name] = gru.params[name] * 2
    after = host(*gru(x))
    assert all(map(np.array_equal, host(*outputs), kept))
    fresh = make(reset_after, **home)
    fresh.load_params({k: backend.host(v) for k, v in gru.params.items()})
    assert all(map(np.array_equal, host(*fresh(x)), after))
    assert not np.array_equal(after[0], kept[0])


@VARIANTS
def test_one_seed_gives_the_same_weights_everywhere(backend, reset_after):
    there = make(reset_after, backend=backend.name, device=backend.device, dtype="float32")
    for name, array in make(reset_after, dtype="float32").params.items():
        assert np.array_equal(backend.host(there.params[name]), array)


@pytest.mark.parametrize("kind", ["list", "host", "device"])
def test_lengths_in_any_form(backend, kind):
    gru = make(backend=backend.name, device=backend.device)
    lengths = [3, 0, 5]
    x = backend.put(np.random.default_rng(0).standard_normal((5, 3, 3)))
    given_as = {
        "list": lengths,
        "host": np.array(lengths, np.uint8),
        "device": backend.put(np.array(lengths, np.int32)),
    }
    y, _ = gru(x, None, given_as[kind])
    y = backend.host(y)
    assert [int((y[:, b] != 0).any(axis=-1).sum()) for b in range(3)] == lengths


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@VARIANTS
def test_half_storage_has_float32_sums(backend, dtype, reset_after):
    try:
        gru = make(
            reset_after, H=16, backend=backend.name, device=backend.device, dtype=dtype, layers=1
        )
    except ValueError as e:
        pytest.skip(f"{backend.name}: {e}")
    exact = make(reset_after, H=16, layers=1, dtype="float64")
    exact.load_params(gru.params)
    rng = np.random.default_rng(0)
    xp, like = gru.backend.xp, gru.backend.dtype(dtype)
    x = xp.astype(backend.put(rng.standard_normal((20, 3, 3)).astype("float32")), like)
    dy = xp.astype(backend.put(rng.standard_normal((20, 3, 16)).astype("float32")), like)

    def wide(v):
        return backend.host(xp.astype(v, gru.backend.dtype("float32"))).astype("float64")

    (y, _), pullback = gru.vjp(x)
    (y64, _), pullback64 = exact.vjp(wide(x))
    grads, dx, _ = pullback(dy)
    grads64, dx64, _ = pullback64(wide(dy))
    assert y.dtype == dx.dtype == like
    eps = 2.0**-10 if dtype == "float16" else 2.0**-7
    for a, b in [(y, y64), (dx, dx64), *((grads[k], grads64[k]) for k in grads)]:
        assert np.abs(wide(a) - b).max() <= eps * np.abs(b).max()


def test_dropout_between_layers():
    gru = make(layers=3, H=50, dropout=0.5)
    x = np.random.default_rng(0).standard_normal((5, 2, 3))
    plain, _ = gru(x)
    (same, _), _ = gru.vjp(x)
    assert np.array_equal(plain, same)
    (one, _), _ = gru.vjp(x, rng=np.random.default_rng(1))
    (two, _), _ = gru.vjp(x, rng=np.random.default_rng(1))
    (three, _), _ = gru.vjp(x, rng=np.random.default_rng(2))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, three)
    assert not np.array_equal(one, plain)


def test_dropout_gradient_uses_the_mask_of_its_forward_call():
    chain = Chain(Linear(3, 50, dtype="float64"), Dropout(0.5, dtype="float64"))
    x = np.random.default_rng(0).standard_normal((4, 3))
    (y, _), pullback = chain.vjp(x, rng=np.random.default_rng(0))
    dropped = y == 0
    assert 0.3 < dropped.mean() < 0.7
    whole, _ = chain(x)
    close(y[~dropped], 2 * whole[~dropped])
    grads, _, _ = pullback(np.ones_like(y))
    close(grads["0.bias"], 2.0 * (~dropped).sum(axis=0))


@VARIANTS
@pytest.mark.parametrize("recompute", ["sqrt", 1, 100, 10_000])
def test_recomputing_gives_the_same_bits(reset_after, recompute):
    options = {"bidirectional": True, "dropout": 0.3, "dtype": "float32"}
    keep, again = make(reset_after, **options), make(reset_after, recompute=recompute, **options)
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((300, 2, n)).astype("float32") for n in (3, 8))
    lengths = [300, 130]
    (y, h), pullback = keep.vjp(x, None, lengths, np.random.default_rng(1))
    (y2, h2), pullback2 = again.vjp(x, None, lengths, np.random.default_rng(1))
    results, results2 = pullback(dy), pullback2(dy)
    assert np.array_equal(y, y2)
    assert np.array_equal(h, h2)
    assert np.array_equal(results[1], results2[1])
    assert np.array_equal(results[2], results2[2])
    for name in results[0]:
        assert np.array_equal(results[0][name], results2[0][name])


def test_recomputing_no_steps():
    gru = make(False, recompute="sqrt")
    (y, h), pullback = gru.vjp(np.zeros((0, 2, 3)))
    assert y.shape == (0, 2, 4)
    assert not h.any()
    assert not pullback(y)[0]["weight_hh_l0"].any()


@VARIANTS
def test_taps(reset_after):
    gru, rng = make(reset_after, bidirectional=True), np.random.default_rng(0)
    x, dy = rng.standard_normal((70, 2, 3)), rng.standard_normal((70, 2, 8))
    taps = gru.taps(x, None, [70, 66])
    (y, _), pullback = gru.vjp(x, None, [70, 66])
    assert taps["h"].shape == (4, 70, 2, 4)
    close(taps["h"][2], y[..., :4])
    close(taps["h"][3], y[..., 4:])
    z, n, h = taps["z"][0, 1:, 0], taps["n"][0, 1:, 0], taps["h"][0, :, 0]
    close(h[1:], z * h[:-1] + (1 - z) * n)
    assert not taps["r"][:, 66:, 1].any()
    g = pullback.taps(dy)
    assert g.shape == (4, 70, 2, 4)
    close(g[2, -1, 0], dy[-1, 0, :4])
    close(g[3, 0], dy[0, :, 4:])
    assert not g[:, 66:, 1].any()
    moved = 1e-6 * rng.standard_normal((2, 2, 4))
    dh0 = pullback(dy)[2]
    h0 = np.zeros((4, 2, 4))
    h0[2:] = moved
    up, down = (np.sum(dy * gru(x, s * h0, [70, 66])[0]) for s in (1, -1))
    assert abs((up - down) / 2 - np.sum(dh0[2:] * moved)) < 1e-8 * abs(up - down) + 1e-13

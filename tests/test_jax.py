"""Models inside of jax.jit, jax.grad and jax.vmap; their gradient by JAX against the pullback."""

import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import THOROUGH, at_once, require, running

from gru_any import GRU, Chain, Dropout, Embedding, GRUCell, Linear
from gru_any.backend import Mode

jax = require("jax")
from gru_any.backend import jax_host, jax_scan  # noqa: E402

jnp = jax.numpy
SIZES = {"T": 6, "B": 3, "I": 2, "H": 4}
KINDS = {
    "one layer": {},
    "after": {"reset_after": True, "num_layers": 2},
    "both ways": {"bidirectional": True, "num_layers": 2},
    "reverse": {"reverse": True, "reset_after": True, "batch_first": True},
    "no bias": {"bias": False, "reset_after": True},
}
LENGTHS = [6, 0, 4]


def numbers(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def model(**options):
    return GRU(2, 4, backend="jax.numpy", dtype="float64", seed=0, **options)


def inputs(gru):
    """x, h0 and the cotangents of y and h_n."""
    D = len(gru.suffixes)
    x, dy = numbers(6, 3, 2), numbers(6, 3, 4 * D, seed=1)
    if gru.batch_first:
        x, dy = x.swapaxes(0, 1), dy.swapaxes(0, 1)
    states = numbers(gru.num_layers * D, 3, 4, seed=2), numbers(gru.num_layers * D, 3, 4, seed=3)
    return x, states[0], dy, states[1]


def close(found, expected, error=1e-10):
    """Trees of arrays are equal, relative to the largest number of each array."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        scale = max(float(np.abs(b).max(initial=0)), 1e-3)
        assert float(np.abs(np.asarray(a) - np.asarray(b)).max(initial=0)) <= error * scale


def cases():
    """Each kind of GRU with one kind of lengths, or GRU_ANY_THOROUGH=1 with all."""
    if THOROUGH:
        return [(kind, lengths) for kind in KINDS for lengths in (None, "known", "traced")]
    return list(zip(KINDS, [None, "traced", "known", "traced", None], strict=True))


PLACES = ["at once", "in the scan", "for derivatives in the scan", "on the host"]


@pytest.fixture(params=PLACES)
def products(request, monkeypatch):
    """Where calls of any size run: in a scan, which multiplies the inputs or not; on the host."""
    on_host = request.param == "on the host"
    monkeypatch.setattr(jax_host, "FEW", 0 if on_host else 10**9)
    monkeypatch.setattr(jax_host, "LITTLE", 0)
    monkeypatch.setattr(jax_scan, "MANY", 10**9 if request.param == "at once" else 1)
    monkeypatch.setattr(jax_scan, "WIDE", 1 if request.param == "in the scan" else 10**9)


def places(*few):
    """Run a test in a few of these places, or with GRU_ANY_THOROUGH=1 in all."""
    chosen = PLACES if THOROUGH else few
    mark = pytest.mark.parametrize("products", chosen, indirect=True)
    return lambda test: pytest.mark.usefixtures("products")(mark(test))


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize(("kind", "lengths"), cases())
def test_outputs_and_gradients_are_those_of_the_pullback(kind, lengths):
    gru = model(**KINDS[kind])
    x, h0, dy, dh = inputs(gru)
    known = None if lengths is None else LENGTHS
    traced = jnp.asarray(LENGTHS) if lengths == "traced" else None
    (y, h_n), pullback = gru.vjp(x, h0, known)

    def total(params, x, h0, n):
        y, h_n = gru.apply(params, x, h0, lengths=known if n is None else n)
        return (y * dy).sum() + (h_n * dh).sum(), (y, h_n)

    both = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))
    (_, found), gradient = both(dict(gru.params), x, h0, traced)
    close(found, (y, h_n))
    close(gradient, pullback(dy, dh))


@places("at once", "on the host")
@pytest.mark.parametrize("kind", ["one layer", "both ways"])
def test_skipped_steps_and_resets_inside_of_jit(kind):
    gru = model(**KINDS[kind])
    x, h0, dy, dh = inputs(gru)
    rng = np.random.default_rng(0)
    flags = {"mask": rng.random((6, 3)) < 0.7, "resets": rng.random((6, 3)) < 0.4}

    def loss(params, x, h0):
        y, h = gru.apply(params, x, h0, **flags, skipped="repeat")
        return (y * dy).sum() + (h * dh).sum()

    grads, dx, dh0 = gru.vjp(x, h0, **flags, skipped="repeat")[1](dy, dh)
    found = jax.jit(jax.grad(loss, (0, 1, 2)))(dict(gru.params), x, h0)
    close(found, (grads, dx, dh0))

    @jax.jit
    def own(x, h0):
        return gru.vjp(x, h0, **flags, skipped="repeat")[1](dy, dh)

    close(own(x, h0), (grads, dx, dh0))
    with pytest.raises(TypeError, match="traced by JAX; with mask or resets"):
        jax.jit(lambda x, resets: gru(x, resets=resets)[0])(x, flags["resets"])


@places("in the scan", "on the host")
def test_a_checkpoint_and_our_own_pullback_inside_of_jit():
    gru = model(bidirectional=True, reset_after=True)
    x, h0, dy, dh = inputs(gru)
    pullback = gru.vjp(x, h0, LENGTHS)[1]

    @jax.checkpoint
    def total(params, x, h0, n):
        y, h_n = gru.apply(params, x, h0, n)
        return (y * dy).sum() + (h_n * dh).sum()

    @jax.jit
    def every(params, x, h0, n, dy, dh):
        own = gru.vjp(x, h0, n)[1]
        return jax.grad(total, (0, 1, 2))(params, x, h0, n), own(dy, dh), own.taps(dy, dh)

    by_jax, own, taps = every(dict(gru.params), x, h0, jnp.asarray(LENGTHS), dy, dh)
    close(by_jax, pullback(dy, dh))
    close(own, pullback(dy, dh))
    close(taps, pullback.taps(dy, dh))


@places("at once", "on the host")
def test_vmap_over_calls_and_for_gradients_of_each_example():
    gru = model(num_layers=2)
    xs, params = numbers(2, 6, 3, 2), dict(gru.params)
    models = {name: jnp.stack([v, 2 * v]) for name, v in params.items()}

    def loss(params, x):  # of one sequence (T, I)
        return (gru.apply(params, x)[0] ** 2).sum()

    @jax.jit
    def every(params, models, xs):
        many = jax.vmap(gru.apply, (None, 0))(params, xs)
        two = jax.vmap(gru.apply, (0, None))(models, xs[0])
        return many, two, jax.vmap(jax.grad(loss), (None, 1))(params, xs[0])

    many, two, each = every(params, models, xs)
    close(many, tuple(jnp.stack(v) for v in zip(*map(gru, xs), strict=True)))
    close(two[0][1], gru.apply({name: v[1] for name, v in models.items()}, xs[0])[0])
    host = gru.to("numpy")
    for n in range(3):
        y, pullback = host.vjp(np.asarray(xs[0, :, n, :]))
        close({name: np.asarray(g[n]) for name, g in each.items()}, pullback(2 * y[0])[0])
    close(jax.vmap(lambda x: gru(x)[0])(xs), many[0])  # without jit


@pytest.mark.parametrize(
    ("products", "options"),
    [
        ("in the scan", {"reset_after": True, "layer_norm": True}),
        ("for derivatives in the scan", {}),
        ("on the host", {"reset_after": True}),
    ],
    indirect=["products"],
)
@pytest.mark.usefixtures("products")
def test_directional_derivatives_and_the_product_of_a_hessian(options):
    """With the numbers that differences give."""
    gru = model(**options)
    x, start = numbers(5, 3, 2), numbers(1, 3, 4, seed=1)
    resets = np.random.default_rng(0).random((5, 3)) < 0.3
    params = dict(gru.params)
    along = {name: numbers(*p.shape, seed=2) for name, p in params.items()}

    @jax.jit
    def loss(params, start):
        return jnp.mean(gru.apply(params, x, resets=resets, start=start)[0] ** 2)

    def both(params, start):
        return jax.grad(loss, (0, 1))(params, start)

    def moved(e):
        return {name: p + e * along[name] for name, p in params.items()}

    gradient, step = both(params, start), 1e-5
    (difference,) = jax.tree.leaves((loss(moved(step), start) - loss(moved(-step), start)) / 2e-5)
    value = jax.jvp(lambda p: loss(p, start), (params,), (along,))[1]
    close(value, difference, 1e-6)
    close(sum((gradient[0][name] * along[name]).sum() for name in along), value)
    pair = both(moved(step), start), both(moved(-step), start)
    differences = jax.tree.map(lambda a, b: (a - b) / 2e-5, *pair)
    product = jax.jvp(lambda p: both(p, start), (params,), (along,))[1]
    close(product, differences, 1e-5)


def test_what_runs_on_the_host():
    """Large calls, with the bits of a call outside of jit; small ones and half precision do not."""
    gru = GRU(64, 64, backend="jax.numpy", dtype="float64", seed=0, reset_after=True)
    x, params = numbers(40, 8, 64), dict(gru.params)

    def loss(params, x):
        return (gru.apply(params, x)[0] ** 2).sum()

    gradient = jax.grad(loss, (0, 1))
    (y, _), pullback = gru.vjp(x)
    grads, dx, _ = pullback(2 * y)
    for found in (jax.jit(gradient)(params, x), gradient(params, x)):
        jax.tree.map(np.testing.assert_array_equal, found, (grads, dx))
    with jax.disable_jit():
        jax.tree.map(np.testing.assert_array_equal, gradient(params, x), (grads, dx))
    program = str(jax.make_jaxpr(gradient)(params, x))
    assert "gru_any_pullback[" in program
    assert "scan[" not in program
    half = gru.to(dtype="float16")
    for other, v in ((gru, x[:16]), (gru, x[:, :1]), (half, x.astype("float16"))):
        assert "gru_any" not in str(jax.make_jaxpr(other.apply)(dict(other.params), v))
    with running(Mode.TRACED):  # without Numba
        assert "gru_any" not in str(jax.make_jaxpr(gru.apply)(params, x))


@places("on the host")
def test_calls_on_the_host_in_threads():
    gru = model(num_layers=2, bidirectional=True)
    x, params = numbers(6, 3, 2), dict(gru.params)
    gradient = jax.jit(jax.grad(lambda p, x: (gru.apply(p, x)[0] ** 2).sum()))
    expected = gradient(params, x)

    def work(_):
        for _ in range(20):
            jax.tree.map(np.testing.assert_array_equal, gradient(params, x), expected)

    at_once(work, 4)


@places("on the host")
def test_jacobians_and_linear_maps_on_the_host():
    gru = model()
    x, h0, *_ = inputs(gru)

    def last(x):
        return gru(x, h0)[1]

    backward, forward = jax.jit(jax.jacrev(last))(x), jax.jit(jax.jacfwd(last))(x)
    close(backward, forward)
    close(jax.linearize(last, x)[1](x), jnp.tensordot(backward, x, 3))

    y, pullback = jax.vjp(last, x)
    close(jax.linear_transpose(lambda c: pullback(c)[0], y)(x)[0], jnp.tensordot(backward, x, 3))

    @jax.jit
    def squares(x):
        return (jax.grad(lambda x: (last(x) ** 3).sum())(x) ** 2).sum()

    step = 1e-5 * numbers(*x.shape, seed=5)
    twice = jax.jit(jax.grad(squares))(x)  # backward through the backward pass
    close((twice * step).sum(), (squares(x + step) - squares(x - step)) / 2, 1e-6)


@places("on the host")
def test_an_exported_function_does_not_need_the_host():
    from jax import export

    gru = model()
    x, params = numbers(6, 3, 2), dict(gru.params)
    exported = export.export(jax.jit(lambda p, x: gru.apply(p, x)[0]))(params, x)
    assert "callback" not in exported.mlir_module()
    close(export.deserialize(exported.serialize()).call(params, x), gru(x)[0])


def test_several_devices():
    """A batch over two devices, by jit and by shard_map: each gradient once, in whole."""
    program = """
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from gru_any import GRU
from gru_any.backend import jax_host
jax.config.update("jax_enable_x64", True)
jax_host.FEW = jax_host.LITTLE = 0
gru = GRU(2, 4, num_layers=2, backend="jax.numpy", dtype="float64", seed=0)
mesh, split = Mesh(np.array(jax.devices()), "d"), P(None, "d")
x = jax.numpy.asarray(np.random.default_rng(0).standard_normal((6, 4, 2)))
def loss(params, x):
    y, h = gru.apply(params, x)
    return (y**2).sum() + (h**3).sum()
def total(params, x):
    return jax.lax.psum(loss(params, x), "d")
params = dict(gru.params)
expected = jax.grad(loss, (0, 1))(params, x)
there = [jax.device_put(v, NamedSharding(mesh, p)) for v, p in ((params, P()), (x, split))]
for checked in (True, False):
    specs = {"mesh": mesh, "in_specs": (P(), split), "out_specs": P()}
    spread = jax.shard_map(total, **specs, check_vma=checked)
    for f in (loss, spread)[: 2 if checked else 1]:
        found = jax.jit(jax.grad(f, (0, 1)))(*there)
        for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            assert len(a.devices()) == 2
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(float(jax.jit(spread)(*there)), float(loss(params, x)), rtol=1e-12)
"""
    flags = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    subprocess.run([sys.executable, "-c", program], env=flags, check=True, timeout=300)


def test_compiling_takes_as_long_for_many_steps_as_for_few():
    gru = model(num_layers=2, bidirectional=True)
    x = numbers(2, 3, 2)
    program = str(jax.make_jaxpr(gru.apply)(dict(gru.params), x[:2]))
    gradient = jax.make_jaxpr(jax.grad(lambda p, x: gru.apply(p, x)[0].sum()))
    few, many = (str(gradient(dict(gru.params), jnp.zeros((T, 3, 2)))) for T in (10, 1000))
    assert few.count(" = ") == many.count(" = ")  # equations of the program
    assert program.count("scan[") == 4  # one for each layer and direction
    exact = program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)")
    assert exact == program.count("dot_general[") > 0


@places("at once", "on the host")
def test_other_calls_of_a_model_inside_of_jit():
    gru = model(num_layers=2, reset_after=True)
    x, h0, *_ = inputs(gru)
    shapes = [(0, 3, 2), (1, 3, 2), (6, 0, 2), (6, 2)]

    @jax.jit
    def every(x, h0, n):
        calls = gru(x, h0), gru.last(x, h0, n), gru.taps(x), gru.step(x[0], h0)
        return calls, [gru(jnp.ones(shape)) for shape in shapes]

    with jax.check_tracer_leaks():
        calls, odd = every(x, h0, jnp.asarray(LENGTHS))
    close(calls, (gru(x, h0), gru.last(x, h0, LENGTHS), gru.taps(x), gru.step(x[0], h0)))
    close(odd, [gru(jnp.ones(shape)) for shape in shapes])
    close(jax.grad(lambda x: gru(x)[0].sum())(x), gru.vjp(x)[1](jnp.ones((6, 3, 4)))[1])


def test_a_replaced_equation_is_followed(monkeypatch):
    from gru_any import equations

    gru = model()
    x, *_ = inputs(gru)
    before = gru(x)[0]
    step = equations.reset_before
    monkeypatch.setattr(equations, "reset_before", lambda xp, a, h, U: step(xp, 2.0 * a, h, U))
    after = jax.jit(lambda x: gru(x)[0])(x)
    assert float(np.abs(after - before).max()) > 0.01
    close(after, gru(x)[0])
    with running(Mode.PLAIN):  # unrolled
        close(jax.jit(lambda x: gru(x)[0])(x), after)


def test_layers_cells_and_chains_with_parameters_as_an_argument():
    options = {"backend": "jax.numpy", "dtype": "float64"}
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 5, (6, 3)))
    chain = Chain(
        Embedding(5, 4, seed=0, **options),
        GRU(4, 4, seed=1, **options),
        Dropout(0.5, **options),
        Linear(4, 5, seed=2, **options),
        tied={"3.weight": "0.weight"},
    )
    (y, state), pullback = chain.vjp(tokens)
    params = dict(chain.params)
    assert "3.weight" not in params

    @jax.jit
    def every(params, tokens, state):
        def total(params):
            found = chain.apply(params, tokens)
            return (found[0] ** 2).sum(), found

        gradient, found = jax.grad(total, has_aux=True)(params)
        return found, gradient, chain(tokens, state)

    close(every(params, tokens, state), ((y, state), pullback(2 * y)[0], chain(tokens, state)))
    linear, x = Linear(2, 3, seed=0, **options), numbers(6, 2)
    y, pullback = linear.vjp(x)
    total = jax.jit(jax.grad(lambda p, x: (linear.apply(p, x) ** 2).sum(), (0, 1)))
    close(total(dict(linear.params), x), pullback(2 * y))
    cell, h0 = GRUCell(2, 4, seed=0, reset_after=True, **options), numbers(3, 4)
    xs, cell_params = numbers(6, 3, 2), dict(cell.params)

    def run(params, xs):  # a loop of the user's own
        def step(h, x):
            h = cell.apply(params, x, h)
            return h, h

        return jax.lax.scan(step, h0, xs)[1]

    gru = GRU(2, 4, reset_after=True, **options)
    gru.load_params({f"{name}_l0": v for name, v in cell_params.items()})
    y, pullback = gru.vjp(xs, h0[None])
    total = jax.jit(jax.value_and_grad(lambda *v: (run(*v) ** 2).sum(), (0, 1)))
    value, found = total(cell_params, xs)
    grads, dx, _ = pullback(2 * y[0])
    close(value, (y[0] ** 2).sum())
    close(found, ({name.removesuffix("_l0"): g for name, g in grads.items()}, dx))


@pytest.mark.parametrize("library", ["numpy", "torch", "array_api_strict"])
def test_parameters_as_an_argument_on_every_library(library):
    require(library)
    gru = GRU(2, 4, num_layers=2, backend=library, seed=0)
    host, x = gru.to("numpy"), np.random.default_rng(0).standard_normal((6, 3, 2))
    other = GRU(2, 4, num_layers=2, seed=1)
    before = {name: gru.backend.to_numpy(v).copy() for name, v in gru.params.items()}
    put = gru.backend.put
    y, h_n = gru.apply({k: put(v) for k, v in other.params.items()}, put(x, "float32"))
    Y, H_n = other(x.astype("float32"))
    np.testing.assert_allclose(gru.backend.to_numpy(y), Y, atol=1e-6)
    np.testing.assert_allclose(gru.backend.to_numpy(h_n), H_n, atol=1e-6)
    for name, v in gru.params.items():
        np.testing.assert_array_equal(gru.backend.to_numpy(v), before[name])
    wide = {k: v.astype("float64") for k, v in other.params.items()}
    assert host.apply(wide, x)[0].dtype == np.float64  # the dtype of the call is theirs


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_half_precision_inside_of_jit(half):
    gru = GRU(2, 4, num_layers=2, backend="jax.numpy", dtype=half, seed=0)
    x = numbers(6, 3, 2).astype(half)
    y, h_n = jax.jit(gru.apply)(dict(gru.params), x)
    assert y.dtype == h_n.dtype == half
    expected = gru.to(dtype="float32")(x.astype("float32"))[0]
    np.testing.assert_allclose(np.asarray(y, "float32"), expected, atol=2e-2)


def test_what_is_refused():
    gru, x = model(), numbers(6, 3, 2)
    params = dict(gru.params)
    less = {name: v for name, v in params.items() if "bias" not in name}
    with pytest.raises(KeyError, match=r"missing \['bias_ih_l0'\]"):
        gru.apply(less, x)
    with pytest.raises(KeyError, match=r"unused \['bias_hh_l0'\]"):
        jax.jit(gru.apply)({**params, "bias_hh_l0": x}, x)
    with pytest.raises(ValueError, match="weight_hh_l0 is "):
        gru.apply({**params, "weight_hh_l0": params["weight_ih_l0"]}, x)
    with pytest.raises(TypeError, match="in one call"):
        gru.apply({**params, "bias_ih_l0": np.zeros(12)}, x)
    with pytest.raises(TypeError, match="bias_ih_l0 has dtype float32, expected float64"):
        gru.apply({**params, "bias_ih_l0": jnp.zeros(12, "float32")}, x)
    with pytest.raises(TypeError, match="parameters are a list, expected a mapping"):
        gru.apply([params], x)
    with pytest.raises(TypeError, match="x has dtype float32, expected float64"):
        jax.jit(gru)(x.astype("float32"))
    with pytest.raises(ValueError, match="lengths is "):
        jax.jit(gru)(x, None, jnp.asarray([1, 2]))
    with pytest.raises(TypeError, match="lengths has dtype float64, expected integers"):
        jax.jit(gru)(x, None, jnp.asarray([1.0, 2, 3]))

    def assign(x):
        gru.params["bias_ih_l0"] = x

    with pytest.raises(TypeError, match="would outlive the function"):
        jax.jit(assign)(jnp.zeros(12))
    dropping = model(num_layers=2, dropout=0.5)
    with pytest.raises(TypeError, match="rng would draw the mask once"):
        jax.jit(lambda x: dropping.vjp(x, rng=np.random.default_rng(0))[0])(x)
    with pytest.raises(TypeError, match=r"is an array of jax\.numpy, expected an array of numpy"):
        jax.jit(GRU(2, 4))(x)


@pytest.mark.parametrize("reset_after", [False, True])
def test_a_single_row_of_a_single_step(reset_after):
    """Whose products are written otherwise: the same values and gradients as our pullback's."""
    gru = GRU(3, 4, 2, reset_after=reset_after, seed=0)
    x = np.linspace(-1, 1, 3, dtype="float32").reshape(1, 1, 3)
    (y, h_n), pullback = gru.vjp(x)
    grads, dx, _ = pullback(np.ones_like(y), np.ones_like(h_n))
    there = gru.to("jax.numpy")

    def total(params, x):
        return sum(v.sum() for v in there.apply(params, x))

    found = jax.jit(jax.grad(total, (0, 1)))(dict(there.params), jax.numpy.asarray(x))
    assert np.allclose(found[1], dx, rtol=1e-5, atol=1e-6)
    for name, v in grads.items():
        assert np.allclose(found[0][name], v, rtol=1e-5, atol=1e-6)

"""Converted weights in the other libraries: their own outputs and gradients, all in float64."""

import functools

import numpy as np
import pytest
from conftest import require

from gru_any import GRU, Chain, Dropout, Embedding, Linear, convert

# Keras' own use of NumPy
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

T, B, I, H = 6, 4, 3, 5
LENGTHS = [6, 2, 5, 1]
RNG = np.random.default_rng(0)
X = RNG.standard_normal((B, T, I))


def random_gru(reset_after, layers=1, bidirectional=False, bias=True, batch_first=True, c_n=True):
    """Float64, biases random and not zero; without c_n where a library lacks it."""
    gru = GRU(
        I, H, layers, bidirectional=bidirectional, bias=bias, batch_first=batch_first,
        reset_after=reset_after, dtype="float64", seed=1,
    )  # fmt: skip
    if not c_n:
        for name, array in gru.params.items():
            if "bias_hh" in name:
                array[2 * H :] = 0
    return gru


def gradients(gru, lengths=None):
    """Y with 0 at padding, and the gradients of sum(y^2) / 2."""
    x = X if gru.batch_first else X.transpose(1, 0, 2)
    (y, _), pullback = gru.vjp(np.ascontiguousarray(x), lengths=lengths)
    grads, dx, _ = pullback(y)
    back = (lambda v: v) if gru.batch_first else (lambda v: v.transpose(1, 0, 2))
    return back(y), back(dx), grads


def close(found, expected, tolerance=1e-12):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


def same_gradients(of_ours, of_theirs, tolerance=1e-12):
    """Their gradients, read like weights, are ours, but for c_r and c_z where these are in b."""
    for name, grad in of_ours.items():
        found = of_theirs.params[name]
        if "bias_hh" in name and not found[: 2 * H].any():
            grad, found = grad[2 * H :], found[2 * H :]
        if found.any() or "bias_hh" not in name:
            close(found, grad, tolerance)


def both_ways(run, x, cells, flip, concat):
    """Two directions from a function that runs one, for libraries that have one."""
    pairs = [cells[i : i + 2] for i in range(0, len(cells), 2)]
    for forward, reverse in pairs:
        x = concat([run(forward, x), flip(run(reverse, flip(x)))])
    return x


# JAX's libraries ---------------------------------------------------------------------------------


def held(module, ours, run, read, tolerance=1e-12, lengths=None, with_x=True):
    """Compare with run(arrays, x) -> y (B, T, .) of a library on JAX."""
    jax = require("jax")
    keep = np.arange(T)[None, :, None] < np.array(lengths or [T] * B)[:, None, None]

    def loss(arrays, x):
        y = jax.numpy.where(keep, run(arrays, x), 0.0)
        return (y**2).sum() / 2, y

    grad = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (of_arrays, dx), y = grad(jax.tree.map(jax.numpy.asarray, module), jax.numpy.asarray(X))
    ours_y, ours_dx, grads = gradients(ours, lengths)
    close(y, ours_y, tolerance)
    close(dx, ours_dx, tolerance)
    same_gradients(grads, read(of_arrays), tolerance)


def test_flax_linen():
    nn = require("flax.linen")
    ours = random_gru(True, 2, True)
    one, two = (nn.RNN(nn.GRUCell(H, param_dtype="float64")) for _ in range(2))
    layer = nn.Bidirectional(one, two)

    def run(arrays, x):
        for params in arrays:
            x = layer.apply({"params": params}, x, seq_lengths=np.array(LENGTHS))
        return x

    held(convert.flax.to_arrays(ours), ours, run, convert.flax.from_arrays, lengths=LENGTHS)


def test_flax_nnx():
    nnx = require("flax.nnx")
    ours = random_gru(True, 1, True, c_n=False)

    def layer(params, width):
        def rnn():
            cell = nnx.GRUCell(width, H, param_dtype="float64", rngs=nnx.Rngs(0))
            return nnx.RNN(cell, rngs=nnx.Rngs(0))

        made = nnx.Bidirectional(rnn(), rnn(), rngs=nnx.Rngs(0))
        nnx.update(made, params)
        return made

    def run(arrays, x):
        for params in arrays:
            x = layer(params, x.shape[-1])(x, seq_lengths=np.array(LENGTHS))
        return x

    arrays = convert.flax.to_arrays(ours, "nnx")
    held(arrays, ours, run, convert.flax.from_arrays, lengths=LENGTHS)


@pytest.mark.parametrize("two", [False, True])
def test_what_flax_keeps_beside_the_weights_is_passed_over(two):
    nnx, nn, jax = require("flax.nnx"), require("flax.linen"), require("jax")
    ways = [nnx.RNN(nnx.GRUCell(I, H, rngs=nnx.Rngs(i)), rngs=nnx.Rngs(0)) for i in range(1 + two)]
    rnn = nnx.Bidirectional(*ways, rngs=nnx.Rngs(0)) if two else ways[0]
    state = nnx.state(rnn)
    x = X.astype("float32")
    expected = np.asarray(rnn(x))
    whole = nnx.to_pure_dict(state)
    for given in (whole, state, dict(nnx.to_flat_state(state))):
        y, _ = convert.flax.from_arrays(given)(x)
        assert np.abs(y - expected).max() < 1e-6
    assert "rngs" in whole
    name = "forward_rnn" if two else "cell"
    with pytest.raises(KeyError, match="unused"):  # what is not known is named
        convert.flax.from_arrays({**whole, name: {**whole[name], "odd": np.ones(3)}})
    variables = nn.RNN(nn.GRUCell(H)).init(jax.random.key(0), x)
    beside = {**variables, "batch_stats": {"mean": np.ones(3)}}
    y, _ = convert.flax.from_arrays(beside)(x)
    assert np.abs(y - np.asarray(nn.RNN(nn.GRUCell(H)).apply(variables, x))).max() < 1e-6


def test_flax_states_are_read_as_they_are():
    nnx, nn, jax = require("flax.nnx"), require("flax.linen"), require("jax")
    rnn = nnx.RNN(nnx.GRUCell(I, H, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    of_nnx = nnx.to_pure_dict(nnx.state(rnn, nnx.Param))
    both = nn.Bidirectional(nn.RNN(nn.GRUCell(H)), nn.RNN(nn.GRUCell(H)))
    of_linen = jax.eval_shape(both.init, jax.random.key(0), X.astype("float32"))
    of_linen = jax.tree.map(lambda a: RNG.standard_normal(a.shape), of_linen)
    for api, state in (("nnx", of_nnx), ("linen", of_linen)):
        again = convert.flax.to_arrays(convert.flax.from_arrays(state), api)[0]
        expected = state.get("params", state)
        assert jax.tree.structure(again) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(expected), strict=True):
            assert np.array_equal(a, b)


def test_equinox():
    equinox, jax = require("equinox"), require("jax")
    ours = random_gru(True, 2)
    like = {width: equinox.nn.GRUCell(width, H, key=jax.random.key(0)) for width in (I, H)}

    def run_one(arrays, x):
        cell = like[x.shape[-1]]
        for name, array in arrays.items():
            cell = equinox.tree_at(lambda c, n=name: getattr(c, n), cell, array)

        def step(h, x_t):
            h = jax.vmap(cell)(x_t, h)
            return h, h

        zeros = jax.numpy.zeros((x.shape[0], H))
        return jax.lax.scan(step, zeros, x.swapaxes(0, 1))[1].swapaxes(0, 1)

    def run(arrays, x):
        for cell in arrays:
            x = run_one(cell, x)
        return x

    read = functools.partial(convert.equinox.from_arrays, batch_first=True)
    held(convert.equinox.to_arrays(ours), ours, run, read)


def test_haiku():
    haiku = require("haiku")
    ours = random_gru(False, 2)

    def unroll(x):
        core = haiku.GRU(H)
        state = core.initial_state(x.shape[0]).astype(x.dtype)
        return haiku.dynamic_unroll(core, x.swapaxes(0, 1), state)[0].swapaxes(0, 1)

    pure = haiku.without_apply_rng(haiku.transform(unroll))

    def run(arrays, x):
        for cell in arrays:
            x = pure.apply({"gru": cell}, x)
        return x

    read = functools.partial(convert.haiku.from_arrays, batch_first=True)
    held(convert.haiku.to_arrays(ours), ours, run, read)
    params = {"gru": convert.haiku.to_arrays(ours)[0]}  # as init returns them
    found = convert.haiku.from_arrays(params, batch_first=True)
    assert repr(found).startswith(f"GRU(input_size={I}, hidden_size={H}, batch_first=True")


# MLX, and libraries that do not install here: their formula ---------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_mlx(bias):
    mx, nn = require("mlx.core"), require("mlx.nn")
    ours = random_gru(True, 2, True, bias).to(dtype="float32")
    cells = convert.mlx.to_arrays(ours)
    layers = [nn.GRU(c["Wx"].shape[1], H, bias=bias) for c in cells]

    def run(arrays, x):
        for layer, cell in zip(layers, arrays, strict=True):
            layer.update(cell)
        flip = lambda v: v[:, ::-1]  # noqa: E731
        concat = functools.partial(mx.concatenate, axis=-1)
        return both_ways(lambda layer, x: layer(x), x, layers, flip, concat)

    def loss(arrays, x):
        return (run(arrays, x) ** 2).sum() / 2

    arrays = [{name: mx.array(a) for name, a in cell.items()} for cell in cells]
    x = mx.array(X.astype("float32"))
    of_arrays, dx = mx.value_and_grad(loss, argnums=(0, 1))(arrays, x)[1]
    y, ours_dx, grads = gradients(random_gru(True, 2, True, bias))
    close(run(arrays, x), y, 1e-6)
    close(dx, ours_dx, 1e-5)
    same_gradients(grads, convert.mlx.from_arrays(of_arrays, bidirectional=True), 1e-5)


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def chainer_link(p, x, h):
    """The documented step of chainer.links.StatelessGRU: h' = (1 - z) h + z h_bar."""

    def linear(name, v):
        return v @ p[name + "/W"].T + p[name + "/b"]

    r = sigmoid(linear("W_r", x) + linear("U_r", h))
    z = sigmoid(linear("W_z", x) + linear("U_z", h))
    h_bar = np.tanh(linear("W", x) + linear("U", r * h))
    return (1 - z) * h + z * h_bar


def chainer_n_step(p, x, h):
    """The documented step of chainer.functions.n_step_gru."""
    a = [(x if i < 3 else h) @ p[f"w{i}"].T + p[f"b{i}"] for i in range(6)]
    r, z = sigmoid(a[0] + a[3]), sigmoid(a[1] + a[4])
    return (1 - z) * np.tanh(a[2] + r * a[5]) + z * h


def haste_step(p, x, h):
    """The documented step of haste's GRU, whose gates are z, r, h."""
    a, q = x @ p["kernel"] + p["bias"], h @ p["recurrent_kernel"] + p["recurrent_bias"]
    z, r = sigmoid(a[:, :H] + q[:, :H]), sigmoid(a[:, H : 2 * H] + q[:, H : 2 * H])
    return z * h + (1 - z) * np.tanh(a[:, 2 * H :] + r * q[:, 2 * H :])


def scanned(step, p, x, lengths=None):
    """Steps over time; a row stops at its length."""
    h, ys = np.zeros((B, H)), []
    for t in range(T):
        alive = np.ones((B, 1), bool) if lengths is None else t < np.array(lengths)[:, None]
        h = np.where(alive, step(p, x[:, t], h), h)
        ys.append(np.where(alive, h, 0))
    return np.stack(ys, 1)


def flipped(x, lengths):
    """Each row's own steps in reverse order."""
    out = x.copy()
    for row, n in enumerate(lengths):
        out[row, :n] = x[row, :n][::-1]
    return out


def test_chainer_n_step_formula():
    ours, flat, x = random_gru(True, 2, True), None, X
    flat = convert.chainer.to_arrays(ours)
    cells = [{k[2:]: v for k, v in flat.items() if k[0] == str(i)} for i in range(4)]
    run = functools.partial(scanned, chainer_n_step, lengths=LENGTHS)
    y = both_ways(run, x, cells, lambda v: flipped(v, LENGTHS), lambda v: np.concatenate(v, -1))
    close(y, ours(X, lengths=LENGTHS)[0])


def test_chainer_links_formula():
    rng = np.random.default_rng(2)
    shapes = {"W_r": (H, I), "W_z": (H, I), "W": (H, I), "U_r": (H, H), "U_z": (H, H), "U": (H, H)}
    link = {f"{k}/W": rng.standard_normal(s) for k, s in shapes.items()}
    link |= {f"{k}/b": rng.standard_normal(H) for k in shapes}
    ours = convert.chainer.from_arrays(link, batch_first=True)
    assert not ours.reset_after
    close(ours(X)[0], scanned(chainer_link, link, X))


def test_haste_formula():
    ours = random_gru(True)
    (cell,) = convert.haste.to_arrays(ours)
    close(ours(X)[0], scanned(haste_step, cell, X))


# PyTorch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_torch(bias):
    torch = require("torch")
    ours = random_gru(True, 2, True, bias)
    theirs = torch.nn.GRU(I, H, 2, bias=bias, bidirectional=True, batch_first=True).double()
    arrays = convert.torch.to_arrays(ours)
    theirs.load_state_dict({k: torch.tensor(a) for k, a in arrays.items()})
    x = torch.tensor(X, requires_grad=True)
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        x, LENGTHS, batch_first=True, enforce_sorted=False
    )
    y, _ = torch.nn.utils.rnn.pad_packed_sequence(theirs(packed)[0], batch_first=True)
    (y**2).sum().div(2).backward()
    ours_y, dx, grads = gradients(ours, LENGTHS)
    close(y.detach(), ours_y)
    close(x.grad, dx)
    for name, parameter in theirs.named_parameters():
        close(parameter.grad, grads[name])
    again = convert.torch.from_arrays(theirs.state_dict(), batch_first=True)
    assert all(np.array_equal(again.params[k], a) for k, a in ours.params.items())


def test_a_torch_model_becomes_a_chain_and_goes_back():
    torch = require("torch")
    nn = torch.nn
    model = nn.ModuleDict(
        {"embed": nn.Embedding(7, I), "rnn": nn.GRU(I, H, 2), "head": nn.Linear(H, 2)}
    )
    chain = convert.torch.from_arrays(model.state_dict(), ["embed.", "rnn.", "head."])
    x = np.array([[1, 2], [3, 4], [5, 6]])
    expected = model["head"](model["rnn"](model["embed"](torch.tensor(x)))[0])
    close(chain(x)[0], expected.detach(), 1e-6)
    sequence = nn.Sequential(nn.Embedding(7, I), nn.GRU(I, H, 2), nn.Linear(H, 2))
    arrays = {k: torch.tensor(a) for k, a in convert.torch.to_arrays(chain).items()}
    sequence.load_state_dict(arrays)
    close(sequence[2](sequence[1](sequence[0](torch.tensor(x)))[0]).detach(), expected.detach())


# Keras -----------------------------------------------------------------------------------------


KERAS = 1e-6  # keras.ops.matmul on PyTorch rounds to float32, whatever the dtype


@pytest.fixture
def keras():
    keras = require("keras")
    keras.utils.set_random_seed(0)
    before = keras.config.floatx()
    keras.config.set_floatx("float64")
    yield keras
    keras.config.set_floatx(before)


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize(("reset_after", "bias"), [(True, True), (False, True), (True, False)])
def test_keras(keras, reset_after, bias, lengths):
    torch = require("torch")
    ours = random_gru(reset_after, 2, True, bias)
    settings = {"reset_after": reset_after, "use_bias": bias, "return_sequences": True}
    layers = [keras.layers.Bidirectional(keras.layers.GRU(H, **settings)) for _ in range(2)]
    model = keras.Sequential([keras.Input((T, I)), *layers])
    model.set_weights(convert.keras.to_arrays(ours))
    x = torch.tensor(X, requires_grad=True)
    keep = torch.tensor(np.arange(T)[None] < np.array(lengths or [T] * B)[:, None])
    mask = None if lengths is None else keep
    y = layers[1](layers[0](x, mask=mask), mask=mask)
    (y[keep] ** 2).sum().div(2).backward()
    ours_y, dx, grads = gradients(ours, lengths)
    close(host(y * keep[..., None]), ours_y, KERAS)
    close(x.grad, dx, KERAS)
    of_weights = [v.value.grad for v in model.trainable_variables]
    read = functools.partial(
        convert.keras.from_arrays, bidirectional=True, reset_after=reset_after, use_bias=bias
    )
    same_gradients(grads, read(of_weights), KERAS)


def host(tensor):
    return tensor.detach().numpy()


def keras_model(keras, **settings):
    layers = keras.layers
    settings = {"return_sequences": True} | settings
    model = keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            layers.Embedding(7, I),
            layers.GRU(H, **settings),
            layers.GRU(H, **settings),
            layers.Dropout(0.2),
            layers.Bidirectional(layers.GRU(4, **settings)),
            layers.Dense(2),
        ]
    )
    rng = np.random.default_rng(0)
    model.set_weights([rng.standard_normal(w.shape) for w in model.get_weights()])
    return model


@pytest.mark.parametrize("settings", [{}, {"reset_after": False}, {"use_bias": False}])
def test_keras_files_both_ways(keras, tmp_path, settings):
    require("h5py")
    model, x = keras_model(keras, **settings), np.array([[1, 2, 3], [6, 5, 4]])
    model.save(tmp_path / "model.keras")
    ours = convert.keras.load(tmp_path / "model.keras")
    kinds = [type(layer) for layer in ours.layers]
    assert kinds == [Embedding, GRU, Dropout, GRU, Linear]
    assert ours.layers[1].num_layers == 2
    close(ours(x)[0], host(model(x)), KERAS)
    for array, expected in zip(convert.keras.to_arrays(ours), model.get_weights(), strict=True):
        assert np.array_equal(array, expected)
    convert.keras.save(tmp_path / "again.keras", ours)
    again = keras.saving.load_model(tmp_path / "again.keras")
    close(host(again(x)), host(model(x)), KERAS)
    convert.keras.save(tmp_path / "again.weights.h5", ours)
    other = keras_model(keras, **settings)
    other.set_weights([np.zeros_like(w) for w in other.get_weights()])
    other.load_weights(tmp_path / "again.weights.h5")
    close(host(other(x)), host(model(x)), KERAS)


def test_keras_one_gru_out_of_a_model(keras, tmp_path):
    require("h5py")
    x = keras.Input((None, I))
    y = keras.layers.GRU(H, name="mine", return_sequences=True)(x)
    y = keras.layers.Bidirectional(keras.layers.GRU(H), name="last")(y)
    model = keras.Model(x, keras.layers.Dense(2, activation="softmax")(y))
    model.save(tmp_path / "m.keras")
    model.save_weights(tmp_path / "m.weights.h5")
    for name, place in (("mine", "gru"), ("last", "bidirectional")):
        one = convert.keras.load(tmp_path / "m.keras", name)
        two = convert.keras.load(tmp_path / "m.weights.h5", place)
        expected = model.get_layer(name).get_weights()
        for ours in (one, two):
            for a, b in zip(convert.keras.to_arrays(ours), expected, strict=True):
                assert np.array_equal(a, b)
    with pytest.raises(ValueError, match="'activation': 'softmax'} has no counterpart"):
        convert.keras.load(tmp_path / "m.keras")
    with pytest.raises(ValueError, match="name a GRU with layer"):
        convert.keras.load(tmp_path / "m.weights.h5")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": "gelu"}, r"tanh in n = tanh\(W_n x \+ b_n \+ r \* \(U_n h \+ c_n\)\)"),
        ({"recurrent_activation": "softmax"}, "sigmoid in z = sigmoid"),
        ({"go_backwards": True, "return_sequences": True}, "the last step first"),
    ],
)
def test_keras_variants_without_a_counterpart(keras, tmp_path, settings, message):
    require("h5py")
    model = keras.Sequential([keras.Input((None, I)), keras.layers.GRU(H, **settings)])
    model.save(tmp_path / "m.keras")
    with pytest.raises(ValueError, match=message):
        convert.keras.load(tmp_path / "m.keras")


def test_keras_models_that_branch_are_refused(keras, tmp_path):
    require("h5py")
    x = keras.Input((None, I))
    y = keras.layers.GRU(I, return_sequences=True, name="gru")(x)
    keras.Model(x, keras.layers.Dense(2)(keras.layers.GRU(I, return_sequences=True)(x))).save(
        tmp_path / "row.keras"
    )
    assert isinstance(convert.keras.load(tmp_path / "row.keras"), Chain)
    keras.Model(x, [y, keras.layers.Dense(2)(y)]).save(tmp_path / "two.keras")
    keras.Model(x, keras.layers.Dense(2)(x + y)).save(tmp_path / "sum.keras")
    for name in ("two", "sum"):
        with pytest.raises(ValueError, match=r"several outputs|alone"):
            convert.keras.load(tmp_path / f"{name}.keras")
        assert convert.keras.load(tmp_path / f"{name}.keras", "gru").hidden_size == I

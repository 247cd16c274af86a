"""Traps for users of recurrent networks, whichever library they use: right here, or refused."""

import numpy as np
import pytest
from conftest import require

from gru_any import (
    GRU,
    SGD,
    Adam,
    Chain,
    Embedding,
    Linear,
    RMSprop,
    asarray,
    sigmoid_cross_entropy,
    softmax_cross_entropy,
    squared_error,
    to_numpy,
)
from gru_any.train.data import buckets, side_by_side, streams
from gru_any.train.loop import evaluate, fit
from gru_any.train.schedules import constant, cosine, plateau, stepwise, warm_up

LIBRARIES = ["numpy", "torch", "jax.numpy", "array_api_strict"]


@pytest.fixture(autouse=True)
def installed(request):
    """Skip where the library of a test is not installed."""
    library = getattr(request.node, "callspec", None) and request.node.callspec.params.get(
        "library"
    )
    if library:
        require(library)


def model(backend="numpy"):
    home = {"backend": backend}
    return Chain(GRU(2, 8, seed=0, **home), Linear(8, 1, seed=1, **home))


def batch(T=7, B=3, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal((T, B, n), dtype="float32") for n in (2, 1))


# integers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(("dtype", "C"), [("uint8", 300), ("int8", 200), ("int16", 40000)])
def test_targets_of_a_dtype_that_cannot_count_the_classes(library, dtype, C):
    """uint8 has no 256; a table of classes in it would begin again at 0."""
    torch = require("torch")
    like = Linear(1, 1, backend=library)
    y = np.random.default_rng(0).standard_normal((4, C), dtype="float32")
    target = np.array([0, 44, 3, 100])
    scores = torch.tensor(y, requires_grad=True)
    expected = torch.nn.functional.cross_entropy(scores, torch.tensor(target))
    expected.backward()
    value, dy = softmax_cross_entropy(like.backend.put(y), like.backend.put(target.astype(dtype)))
    assert float(value) == pytest.approx(expected.item(), rel=1e-5)
    assert np.allclose(to_numpy(dy), scores.grad.numpy(), atol=1e-6)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16", "uint32", "int64"])
def test_indices_of_any_integer_dtype(library, dtype):
    layer = Embedding(300, 2, seed=0, backend=library)
    x = np.array([1, 44, 100, 1])
    y, pullback = layer.vjp(layer.backend.put(x.astype(dtype)))
    grads, _ = pullback(layer.backend.xp.ones_like(y))
    assert np.array_equal(to_numpy(y), to_numpy(layer.params["weight"])[x])
    assert to_numpy(grads["weight"])[:, 0].tolist() == np.bincount(x, minlength=300).tolist()


def test_integers_that_jax_would_cut():
    """2^40 would become 0 without a word."""
    jax = require("jax")
    like = Embedding(3, 2, backend="jax.numpy")
    with jax.enable_x64(False):
        with pytest.raises(ValueError, match="holds 1 to 1099511627776, which int32 does not"):
            asarray(np.array([1, 2**40]), like=like)
        assert to_numpy(asarray(np.array([1, 2**30]), like=like)).tolist() == [1, 2**30]
    assert to_numpy(asarray(np.array([1, 2**40]), like=like)).tolist() == [1, 2**40]


# masks of NumPy ----------------------------------------------------------------------------------


def test_a_masked_array_is_refused_wherever_its_mask_would_be_lost():
    x, target = batch()
    hidden = np.ma.masked_array(target, target > 0)
    m, told = model(), "MaskedArray, expected .*, since the mask would be lost"
    weights = dict(m.params)
    weights["1.bias"] = np.ma.masked_array(weights["1.bias"], [True])
    for call in (
        lambda: m(np.ma.masked_array(x, x > 0)),
        lambda: m(x, lengths=np.ma.masked_array([7, 7, 7], [True, False, False])),
        lambda: squared_error(target, hidden),
        lambda: squared_error(target, target, mask=np.ma.masked_array(target > 0)),
        lambda: asarray(hidden, like=m),
        lambda: to_numpy(hidden),
        lambda: m.load_params(weights),
        lambda: evaluate(m, squared_error, [(x, hidden)]),
        lambda: fit(m, squared_error, lambda epoch: [(x, hidden)], SGD(m.params), steps=1),
        lambda: side_by_side([hidden[:, 0]]),
        lambda: streams(hidden[:, 0], 2),
    ):
        with pytest.raises(TypeError, match=told):
            call()


# padding -----------------------------------------------------------------------------------------


def test_padding_keeps_the_numbers_of_every_sequence():
    """The dtype of the first one would cut the fractions off the others."""
    x, mask = side_by_side([np.array([1, 2]), np.array([0.5, 0.7, 0.9])])
    assert x.T.tolist() == [[1.0, 2.0, 0.0], [0.5, 0.7, 0.9]]
    assert mask.sum(axis=0).tolist() == [2, 3]
    x, _ = side_by_side([np.array([1, 2])], dtype="float32")
    assert x.dtype == "float32"


def test_sequences_that_do_not_go_side_by_side():
    with pytest.raises(TypeError, match="dtype is int32, which cannot hold sequences of float64"):
        side_by_side([np.array([0.2])], dtype="int32")
    with pytest.raises(ValueError, match=r"are \[\(2, 3\), \(2, 1\)\], expected one or more"):
        side_by_side([np.ones((2, 3)), np.ones((2, 1))])  # would be repeated three times
    with pytest.raises(ValueError, match=r"are \[\], expected one or more"):
        side_by_side([])
    with pytest.raises(ValueError, match="rows is 0, expected an integer of at least 1"):
        buckets([1, 2], 0)


# means -------------------------------------------------------------------------------------------


def test_a_mean_over_nothing_is_no_loss():
    """0 from an iterator that was used up would stand as the lowest validation loss for good."""
    x, target = batch()
    used = iter([(x, target)])
    assert evaluate(model(), squared_error, used) > 0
    for batches in (used, [], [(x, target, np.zeros((7, 3), bool))]):
        with pytest.raises(ValueError, match="a mean over nothing is no number"):
            evaluate(model(), squared_error, batches)


@pytest.mark.parametrize("mixed", [None, "float16"])
def test_accumulated_gradients_weigh_as_many_targets_as_they_have(mixed):
    """The mean of means would give a short sequence's targets the weight of a long one's."""
    parts = [batch(seed=s) for s in range(3)]
    masks = np.zeros((3, 7, 3), bool)
    masks[0, :1], masks[1] = True, True  # and none in the third
    items = [(*part, mask) for part, mask in zip(parts, masks, strict=True)]
    whole = tuple(np.concatenate(v, axis=1) for v in zip(*items, strict=True))
    found = []
    for data, n in ((items, 3), ([whole], 1), (items[::-1], 3)):
        m = model()
        history = fit(m, squared_error, lambda epoch, d=data: d, SGD(m.params, lr=0.1), steps=2,
                      accumulate=n, mixed=mixed, bar=False, log_every=1)  # fmt: skip
        found.append((m.params, [record["loss"] for record in history.records]))
    tolerance = 1e-3 if mixed else 1e-6
    for params, losses in found[::2]:
        assert losses == pytest.approx(found[1][1], rel=tolerance)
        for name, w in found[1][0].items():
            assert np.allclose(params[name], w, atol=tolerance), name


def test_gradients_that_came_to_no_update_are_told(capfd, tmp_path):
    """With more of them for an update than the run has, nothing would be learned without a word."""
    for out in (None, tmp_path):
        m = model()
        fit(m, squared_error, lambda epoch: [batch()] * 5, SGD(m.params), epochs=1, accumulate=8,
            bar=False, out=out)  # fmt: skip
        told = capfd.readouterr().err
        assert "the last 5 gradients came to no update, which takes 8" in told
        assert ("a run that goes on in this folder has them" in told) == (out is not None)
    fit(m, squared_error, lambda epoch: [batch()] * 5, SGD(m.params), epochs=1, accumulate=5,
        bar=False)  # fmt: skip
    assert "came to no update" not in capfd.readouterr().err


def test_a_piece_of_which_less_than_one_target_counts():
    """A mask over single numbers of a target (T, B, C) counts in parts."""
    rng = np.random.default_rng(0)
    x, target = (rng.standard_normal((4, 1, n), dtype="float32") for n in (2, 8))
    mask = np.zeros((2, 4, 1, 8), bool)
    mask[0, 0, 0, :1] = mask[1, 1, 0, :3] = True
    items = [(x, target, part) for part in mask]
    whole = tuple(np.concatenate(v, axis=1) for v in zip(*items, strict=True))
    found = []
    for data, n in ((items, 2), ([whole], 1)):
        m = Chain(GRU(2, 8, seed=0))
        history = fit(m, squared_error, lambda epoch, d=data: d, SGD(m.params, lr=0.1), steps=1,
                      accumulate=n, bar=False, log_every=1)  # fmt: skip
        found.append((m.params, history.records[0]["loss"]))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6)
    for name, w in found[1][0].items():
        assert np.allclose(found[0][0][name], w, atol=1e-6), name


def test_the_loss_of_the_log_is_the_mean_over_the_targets():
    items = [(*batch(T), None, [T, T, T]) for T in (2, 9)]
    m = model()
    expected = evaluate(m, squared_error, items)
    history = fit(m, squared_error, lambda epoch: items, SGD(m.params, lr=0.0), steps=2, bar=False,
                  log_every=2)  # fmt: skip
    assert history.records[0]["loss"] == pytest.approx(expected, rel=1e-6)


def test_a_generator_that_writes_the_next_batch_over_the_last():
    """The next batch is made while the last is in use."""
    data = [batch(seed=s) for s in range(6)]

    def reused(epoch):
        x, target = (np.empty_like(v) for v in data[0])
        for new in data:
            x[:], target[:] = new
            yield x, target

    found = []
    for batches in (lambda epoch: data, reused):
        m = model()
        fit(m, squared_error, batches, SGD(m.params, lr=0.1), steps=12, bar=False)
        found.append(m.params)
    assert all(np.array_equal(found[0][name], found[1][name]) for name in found[0])


# targets that are no probabilities ---------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, 2, 255])
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_target_of_the_sigmoid_outside_of_0_to_1(library, bad):
    put = Linear(1, 1, backend=library).backend.put
    y, target = put(np.zeros((3, 1), "float32")), np.array([[0], [1], [bad]])
    if library == "numpy":
        with pytest.raises(ValueError, match=f"target holds {bad}.0, expected 0 to 1; leave out"):
            sigmoid_cross_entropy(y, put(target))
    else:
        assert np.isnan(float(sigmoid_cross_entropy(y, put(target))[0]))
    value, dy = sigmoid_cross_entropy(y, put(target), mask=put(target != bad))
    assert float(value) == pytest.approx(np.log(2))
    assert to_numpy(dy).ravel().tolist() == [0.25, -0.25, 0.0]


# optimisers and schedules ------------------------------------------------------------------------


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("kind", [Adam, RMSprop, lambda p: SGD(p, momentum=0.9)])
def test_a_state_that_was_kept_does_not_go_on(kind, library):
    """It is a copy, so that setting it takes the optimiser back."""
    put = Linear(1, 1, backend=library).backend.put
    params, again = ({"w": put(np.ones(3, "float32"))} for _ in range(2))
    optimiser, other = kind(params), kind(again)
    grads = [put(np.full(3, g, "float32")) for g in (1.0, -2.0, 0.5)]
    optimiser.step(params, {"w": grads[0]})
    other.step(again, {"w": grads[0]})
    kept = optimiser.state
    before = {name: np.array(to_numpy(v)) for name, v in kept.items() if name != "count"}
    optimiser.step({"w": put(np.ones(3, "float32"))}, {"w": grads[1]})
    assert before
    assert all(np.array_equal(to_numpy(kept[name]), v) for name, v in before.items())
    optimiser.state = kept
    for o, p in ((optimiser, params), (other, again)):
        o.step(p, {"w": grads[2]})
    assert np.array_equal(to_numpy(params["w"]), to_numpy(again["w"]))


@pytest.mark.parametrize("g", [0.1, 1e-3])
def test_a_variance_that_rounding_brings_below_0(g):
    """Where the gradient stays the same, v - m^2 is 0 but for rounding; its root would be NaN."""
    params = {"w": np.ones(2)}
    optimiser = RMSprop(params, lr=1e-12, centered=True)
    below = False
    for _ in range(5000):
        optimiser.step(params, {"w": np.full(2, g)})
        kept = optimiser.state
        below |= bool((kept["v.w"] < kept["m.w"] ** 2).any())
    assert below
    assert np.isfinite(params["w"]).all()


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: cosine(0.1, 0), "steps is 0, expected an integer of at least 1"),
        (lambda: cosine(0.1, 10, -1.0), "last is -1.0, expected a number of at least 0"),
        (lambda: stepwise(0.1, 0), "every is 0, expected an integer of at least 1"),
        (lambda: stepwise(0.1, 2.5), "every is 2.5, expected an integer of at least 1"),
        (lambda: plateau(0.1, -1), "patience is -1, expected an integer of at least 0"),
        (lambda: plateau(0.1, 2, factor=2.0), "factor is 2.0, expected 0 <= factor < 1"),
        (lambda: constant(-0.1), "rate is -0.1, expected a number of at least 0"),
        (lambda: cosine("0.1", 10), "rate is '0.1', expected a number of at least 0"),
        (lambda: warm_up(-3, constant(0.1)), "steps is -3, expected an integer of at least 0"),
        (lambda: warm_up(3, 0.1), r"then is 0.1, expected a schedule: constant\(0.1\)"),
    ],
)
def test_schedules_check_their_numbers_when_they_are_made(make, told):
    with pytest.raises((ValueError, TypeError), match=told):
        make()


def test_schedules_are_those_of_pytorch():
    torch = require("torch")
    schedulers = torch.optim.lr_scheduler

    def sgd():
        return torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)

    losses = [5, 4, 4.5, 4.4, 4.3, 4.2, 3, 3, 3, 3, 3, 2, 9, 9, 9, 9]
    for ours, make in (
        (stepwise(0.1, 3, 0.5), lambda o: schedulers.StepLR(o, 3, 0.5)),
        (cosine(0.1, 10, 0.01), lambda o: schedulers.CosineAnnealingLR(o, 10, 0.01)),
    ):
        optimiser = sgd()
        scheduler = make(optimiser)
        for step in range(10):
            assert ours(step) == pytest.approx(optimiser.param_groups[0]["lr"], rel=1e-12)
            optimiser.step()
            scheduler.step()
    optimiser, ours = sgd(), plateau(0.1, 2)
    scheduler = schedulers.ReduceLROnPlateau(optimiser, factor=0.5, patience=2, threshold=0)
    for i, loss in enumerate(losses):
        scheduler.step(loss)
        assert ours(0, losses[: i + 1]) == pytest.approx(optimiser.param_groups[0]["lr"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"loss": "mse"}, "loss is str, expected a function"),
        ({"batches": [batch()]}, "batches is list, expected a function"),
        ({"schedule": 0.1}, "schedule is float, expected a function"),
        ({"valid": 0.5}, "valid is float, expected a function"),
        ({"patience": 3}, "patience is 3, but valid, which gives the loss to judge, is None"),
        ({"validate_every": 3}, "validate_every is 3, but valid"),
    ],
)
def test_what_would_not_be_called_or_never_act(arguments, told):
    m = model()
    given = {"loss": squared_error, "batches": lambda epoch: [batch()], "steps": 1, **arguments}
    with pytest.raises((ValueError, TypeError), match=told):
        fit(m, optimiser=SGD(m.params), bar=False, **given)


def test_a_module_in_place_of_its_state_dict():
    torch = require("torch")
    theirs = torch.nn.GRU(2, 3)
    for ours in (GRU(2, 3, reset_after=True), Chain(GRU(2, 3, reset_after=True))):
        with pytest.raises(TypeError, match="are a GRU, expected a mapping name -> array"):
            ours.load_params(theirs)

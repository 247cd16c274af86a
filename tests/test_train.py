"""The training loop: what it computes, and that a run that was killed goes on bit for bit."""

import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import finished, require, running, started

from gru_any import (
    GRU,
    SGD,
    Adam,
    AdamW,
    Chain,
    Dropout,
    Linear,
    clip_by_global_norm,
    squared_error,
)
from gru_any.train.data import Batch, ahead, buckets, cut, side_by_side, streams, waste
from gru_any.train.loop import evaluate, fit
from gru_any.train.schedules import constant, cosine, plateau, stepwise, warm_up


@pytest.fixture
def traced():
    """Without a compiler, for what does not depend on the path."""
    with running("traced"):
        yield


def chain(seed=0, p=0.0):
    return Chain(GRU(3, 5, seed=seed), Dropout(p), Linear(5, 2, seed=seed + 1))


def batch(T=12, B=4, seed=0):
    rng = np.random.default_rng(seed)
    x, target = (rng.standard_normal((T, B, n)).astype("float32") for n in (3, 2))
    return Batch(x, target)


def batches(epoch):
    return [batch(seed=10 * epoch), batch(seed=10 * epoch + 1)]


def error(y, target, mask=None):
    return squared_error(y, target, mask=None if mask is None else mask[..., None])


def same(a, b):
    return all(np.array_equal(a[name], b[name]) for name in b)


# the data ----------------------------------------------------------------------------------------


def packed(episodes, rows, batch_first):
    """Pack episodes (x, target) one after the other into rows of the same length."""

    def row(i):
        return [np.concatenate([episodes[k][i] for k in some]) for some in rows]

    x, target = (np.stack(row(i), axis=0 if batch_first else 1) for i in (0, 1))
    begins = [np.concatenate([np.arange(len(episodes[k][0])) == 0 for k in some]) for some in rows]
    return Batch(x, target, resets=np.stack(begins, axis=0 if batch_first else 1))


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_episodes_in_a_row_train_as_rows_of_their_own(batch_first, bidirectional):
    rng = np.random.default_rng(0)
    lengths = [5, 7, 3, 4, 5]
    episodes = [[rng.standard_normal((n, k)) for k in (3, 2)] for n in lengths]
    in_rows = packed(episodes, [[0, 1], [2, 3, 4]], batch_first)
    assert in_rows.resets.sum() == 5
    x, target = (side_by_side([e[i] for e in episodes], batch_first=batch_first)[0] for i in (0, 1))
    results = []
    for given in (in_rows, Batch(x, target, lengths=lengths), in_rows._replace(resets=None)):
        options = {"bidirectional": bidirectional, "batch_first": batch_first, "dtype": "float64"}
        model = Chain(
            GRU(3, 5, seed=0, **options),
            Linear(10 if bidirectional else 5, 2, dtype="float64", seed=1),
        )
        optimiser = SGD(model.params, lr=0.1, momentum=0.9)
        fit(model, error, lambda epoch, b=given: [b], optimiser, steps=8, bar=False)
        found = [evaluate(model, error, [given])]
        if not bidirectional:  # which reads from the end of each chunk
            found.append(evaluate(model, error, [given], chunk=4))
        results.append([*model.params.values(), *found])
    for own, apart, joined in zip(*results, strict=True):
        assert np.allclose(own, apart, rtol=0, atol=1e-12)
        assert not np.allclose(own, joined, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("mixed", [None, "float16"])
@pytest.mark.parametrize(("k1", "k2"), [(4, 4), (3, 8)])
def test_resets_are_cut_in_time(k1, k2, mixed):
    """As a loop by hand, with `vjp` and a state carried over."""
    T, dtype = 14, "float32" if mixed else "float64"
    x, target = (v.astype(dtype) for v in batch(T)[:2])
    resets = np.random.default_rng(1).random((T, 4)) < 0.3

    def model():
        home = {"dtype": dtype, "seed": 0}
        return Chain(GRU(3, 5, **home), Linear(5, 2, **home))

    trained = model()
    given = Batch(x, target, resets=resets)
    fit(trained, error, lambda epoch: [given], SGD(trained.params, lr=0.1), epochs=2,
        tbptt=(k1, k2), mixed=mixed, bar=False)  # fmt: skip
    expected = model()
    optimiser = SGD(expected.params, lr=0.1)
    for _ in range(2):
        state, start = None, 0
        for at in range(0, T, k1):
            part = slice(start, min(at + k1, T))
            (y, _), pullback = expected.vjp(x[part], state, resets=resets[part])
            counts = np.broadcast_to((np.arange(start, part.stop) >= at)[:, None], y.shape[:2])
            grads, *_ = pullback(error(y, target[part], counts)[1])
            following = max(0, at + 2 * k1 - k2)
            begun = slice(start, min(following, T))
            _, state = expected(x[begun], state, resets=resets[begun])
            start = following
            optimiser.step(expected.params, grads)
    near = 2e-3 if mixed else 1e-12
    for name, w in expected.params.items():
        assert np.allclose(trained.params[name], w, rtol=0, atol=near)


@pytest.mark.usefixtures("traced")
def test_nan_before_a_reset_reaches_nothing_after_it():
    model = chain()
    x, target, *_ = batch(T=9)
    resets, counts = np.zeros((9, 4), bool), np.ones((9, 4), bool)
    resets[6, 1], counts[:6, 1] = True, False
    given = Batch(x, target, counts, resets=resets)
    for chunk in (None, 2, 5):  # a state that is not a number is carried over
        expected = evaluate(model, error, [given], chunk)
        spoiled = x.copy()
        spoiled[2, 1] = np.nan
        assert evaluate(model, error, [given._replace(x=spoiled)], chunk) == expected
        joined = given._replace(x=spoiled, resets=None)
        assert math.isnan(evaluate(model, error, [joined], chunk))


@pytest.mark.usefixtures("traced")
def test_episodes_are_resumed_bit_for_bit(tmp_path):
    resets = np.random.default_rng(0).random((12, 4)) < 0.2

    def run(steps, out, resets=resets):
        model = chain(p=0.2)
        fit(model, error, lambda epoch: [b._replace(resets=resets) for b in batches(epoch)],
            Adam(model.params), steps=steps, tbptt=(3, 5), accumulate=2, out=out, save_every=2,
            bar=False)  # fmt: skip
        return model.params

    run(3, tmp_path / "parts")
    whole = run(7, tmp_path / "whole")
    assert same(run(7, tmp_path / "parts"), whole)
    assert not same(run(7, tmp_path / "none", None), whole)


@pytest.mark.parametrize("tbptt", [None, (1, 1), (4, 4), (5, 5), (2, 6), (3, 4), (20, 30)])
def test_pieces_count_every_target_once(tbptt):
    whole = batch(T=13)
    pieces = list(cut(whole, tbptt))
    at = 0
    for piece in pieces:
        x, _, mask, *_ = piece.batch
        counting = np.ones(x.shape[:2], bool) if mask is None else mask
        steps = np.flatnonzero(counting[:, 0])
        assert np.array_equal(x[steps], whole.x[at : at + len(steps)])
        assert piece.counted == counting.sum()
        at += len(steps)
    assert at == 13
    assert [p.first for p in pieces] == [True] + [False] * (len(pieces) - 1)


def test_the_next_piece_begins_where_the_state_is_taken():
    pieces = list(cut(batch(T=13), (2, 6)))
    start = 0
    for piece, following in itertools.pairwise(pieces):
        start += piece.advance
        assert np.array_equal(following.batch.x[0], batch(T=13).x[start])


@pytest.mark.parametrize("tbptt", [(0, 1), (3, 2), (-1, 4)])
def test_impossible_cuts_are_refused(tbptt):
    with pytest.raises(ValueError, match="tbptt is"):
        next(cut(batch(), tbptt))


def test_streams_predict_their_next():
    x, target, mask, lengths, batch_first, resets = streams(np.arange(21), 4)
    assert x.shape == (5, 4)
    assert np.array_equal(x + 1, target)
    assert np.array_equal(x[:, 1], np.arange(5, 10))
    assert mask is lengths is resets is None
    assert batch_first is False
    with pytest.raises(ValueError, match="4 rows are too many for a sequence of 4"):
        streams(np.arange(4), 4)


def test_buckets():
    lengths = [5, 1, 4, 0, 9, 5]
    assert buckets(lengths, 2) == [[1, 2], [0, 5], [4]]
    assert waste(lengths, buckets(lengths, 2)) == pytest.approx(3 / 27)
    x, mask = side_by_side([np.ones((2, 3)), np.ones((4, 3))], "float32")
    assert x.shape == (4, 2, 3)
    assert mask.sum(axis=0).tolist() == [2, 4]
    assert x[2:, 0].sum() == 0


def test_ahead_gives_all_and_passes_errors_on():
    assert list(ahead(iter(range(1, 5)))) == [1, 2, 3, 4]

    def failing():
        yield 1
        raise OSError("no more")

    items = ahead(failing())
    assert next(items) == 1
    with pytest.raises(OSError, match="no more"):
        next(items)


def test_schedules():
    assert [constant(2.0)(s) for s in (0, 9)] == [2, 2]
    assert [cosine(2.0, 10, 1.0)(s) for s in (0, 5, 10, 99)] == pytest.approx([2, 1.5, 1, 1])
    assert [stepwise(8.0, 3)(s) for s in (0, 2, 3, 6)] == [8, 8, 4, 2]
    assert [warm_up(4, constant(8.0))(s) for s in (0, 1, 3, 9)] == [2, 4, 8, 8]
    down = plateau(8.0, patience=1)
    assert [down(0, losses) for losses in ([], [3.0, 2.0], [3.0, 3.0], [3.0] * 3, [3.0] * 5)] == [
        8, 8, 8, 4, 2,
    ]  # fmt: skip


# the loop ----------------------------------------------------------------------------------------


def test_it_is_the_loop_one_would_write():
    model, other = chain(), chain()
    fit(model, error, batches, Adam(model.params, lr=0.1), steps=6, tbptt=(4, 4),
        clip=0.5, schedule=cosine(0.1, 6), bar=False)  # fmt: skip
    optimiser, step = Adam(other.params, lr=0.1), 0
    for whole in batches(0):
        state = None
        for at in (0, 4, 8):
            optimiser.lr = cosine(0.1, 6)(step)
            (y, state), pullback = other.vjp(whole.x[at : at + 4], state)
            _, dy = squared_error(y, whole.target[at : at + 4])
            grads, _, _ = pullback(dy)
            clip_by_global_norm(grads, 0.5)
            optimiser.step(other.params, grads)
            step += 1
    assert same(model.params, other.params)


def test_accumulated_gradients_are_those_of_the_larger_batch():
    model, other = chain(), chain()
    parts = [batch(seed=s) for s in range(3)]
    whole = Batch(*(np.concatenate([p[i] for p in parts], axis=1) for i in (0, 1)))
    for m, data, n in ((model, parts, 3), (other, [whole], 1)):
        fit(m, error, lambda epoch, d=data: d, SGD(m.params, lr=0.1), steps=2,
            accumulate=n, bar=False)  # fmt: skip
    for name, w in other.params.items():
        assert np.allclose(model.params[name], w, atol=1e-6)


def test_a_longer_reach_back_gives_the_gradient_of_the_whole():
    """The last piece's gradient reaches over all the steps before it."""
    data, model, other = batch(T=4), chain(), chain()
    frozen = SGD(model.params, lr=0.0)
    seen = []
    frozen.step = lambda params, grads: seen.append(grads)
    fit(model, error, lambda epoch: [data], frozen, steps=2, tbptt=(2, 4), bar=False)
    (y, _), pullback = other.vjp(data.x)
    _, dy = squared_error(y[2:], data.target[2:])
    grads, _, _ = pullback(np.concatenate([np.zeros_like(dy), dy]))
    for name, g in grads.items():
        assert np.allclose(seen[1][name], g, atol=1e-6)


def test_the_best_weights_come_back_and_patience_ends():
    model, losses, kept = chain(), iter([3.0, 1.0, 2.0, 2.5, 9.0]), []

    def valid():
        kept.append({k: v.copy() for k, v in model.params.items()})
        return next(losses)

    history = fit(model, error, batches, Adam(model.params), steps=100, valid=valid,
                  validate_every=2, patience=1, bar=False)  # fmt: skip
    assert (history.reason, history.best, len(kept)) == ("patience", 1.0, 4)
    assert same(model.params, kept[1])


def test_averaged_weights():
    model, raw = chain(), []
    optimiser = SGD(model.params, lr=0.1)
    step = optimiser.step

    def spy(params, grads):
        step(params, grads)
        raw.append({k: v.copy() for k, v in params.items()})

    optimiser.step = spy
    first = {k: v.copy() for k, v in model.params.items()}
    fit(model, error, batches, optimiser, steps=3, average=0.25, bar=False)
    for name in first:
        expected = first[name]
        for n, weights in enumerate(raw, 1):
            decay = min(0.25, (1 + n) / (10 + n))
            expected = decay * expected + (1 - decay) * weights[name]
        assert np.allclose(model.params[name], expected, atol=1e-6)


def test_evaluate_is_the_mean_over_what_counts():
    model, data = chain(), batch()
    mask = np.random.default_rng(0).random((12, 4)) < 0.5
    whole = evaluate(model, error, [data._replace(mask=mask)])
    y, _ = model(data.x)
    assert whole == pytest.approx(((y - data.target) ** 2)[mask].mean(), rel=1e-5)
    assert evaluate(model, error, [data._replace(mask=mask)], chunk=5) == pytest.approx(whole)


def test_the_end_must_be_given():
    model = chain()
    with pytest.raises(ValueError, match="steps, epochs and minutes"):
        fit(model, error, batches, Adam(model.params), bar=False)
    with pytest.raises(TypeError, match="model is GRU, expected a Chain"):
        fit(GRU(3, 5), error, batches, Adam(model.params), steps=1, bar=False)
    with pytest.raises(ValueError, match="nothing to learn"):
        fit(model, error, lambda e: [], Adam(model.params), steps=1, bar=False)


def test_epochs_and_minutes():
    model = chain()
    history = fit(model, error, batches, Adam(model.params), epochs=2, log_every=1,
                  valid=lambda: 1.0, bar=False)  # fmt: skip
    assert [r["step"] for r in history.records if "valid" in r] == [2, 4]
    assert history.records[-1]["epoch"] == 2
    history = fit(model, error, batches, Adam(model.params), minutes=1e-3, bar=False)
    assert history.reason == "minutes"


def test_what_is_not_finite_is_named():
    model = chain()
    whole = batch()
    whole.x[3, 1, 2] = math.inf

    def spoil(epoch):
        return [batch(), whole]

    before = {}
    optimiser = Adam(model.params)
    step = optimiser.step

    def spy(params, grads):
        step(params, grads)
        before.update({k: v.copy() for k, v in params.items()})

    optimiser.step = spy
    told = pytest.raises(FloatingPointError, match=r"step 2: first in 0.weight_ih_l0, gate r and")
    with np.errstate(invalid="ignore"), told:
        fit(model, error, spoil, optimiser, steps=9, bar=False)
    assert same(model.params, before)


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    model = chain()
    history = fit(model, error, batches, Adam(model.params), steps=4, log_every=1,
                  valid=lambda: 1.0, bar=False)  # fmt: skip
    history.draw(tmp_path / "history.png")
    assert (tmp_path / "history.png").read_bytes()[:4] == b"\x89PNG"


# resuming ----------------------------------------------------------------------------------------


def training(out, steps=12, lr=0.05, stop_at=None, model=None):
    """Dropout, averaging, accumulation, validation: all that has a state."""
    model = model or chain(p=0.3)
    if stop_at is not None:
        wait = iter(range(10**6))

        def valid():
            if next(wait) == stop_at:
                raise RuntimeError("the plug is pulled")
            return float(np.abs(model.params["2.bias"]).sum())

    else:

        def valid():
            return float(np.abs(model.params["2.bias"]).sum())

    optimiser = AdamW(model.params, lr=lr)
    history = fit(model, error, batches, optimiser, steps=steps, tbptt=(3, 5), clip=0.5,
                  accumulate=2, schedule=warm_up(3, cosine(lr, steps)), valid=valid,
                  validate_every=3, average=0.9, out=out, save_every=2, log_every=2,
                  bar=False)  # fmt: skip
    return model, optimiser, history


def without_time(records):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


@pytest.mark.parametrize("stop_at", [0, 1, 2, 3])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, stop_at):
    model, optimiser, history = training(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="plug"):
        training(tmp_path / "cut", stop_at=stop_at)
    again, other, resumed = training(tmp_path / "cut")
    assert same(again.params, model.params)
    assert same(other.state, optimiser.state)
    assert without_time(resumed.records) == without_time(history.records)
    lines = (tmp_path / "cut" / "log.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == resumed.records


def test_ctrl_c_waits_for_the_update_and_loses_nothing(tmp_path):
    """Pressed between two of the gradients that one update adds up."""
    model, _, history = training(tmp_path / "whole")
    first, calls = chain(p=0.3), iter(range(10**6))
    real = first.vjp

    def vjp(*arguments, **named):
        if next(calls) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments, **named)

    first.vjp = vjp
    assert training(tmp_path / "cut", model=first)[2].reason == "interrupted"
    again, _, resumed = training(tmp_path / "cut")
    assert same(again.params, model.params)
    assert without_time(resumed.records) == without_time(history.records)


def test_a_finished_run_is_left_alone(tmp_path, capfd):
    model, _, history = training(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    again, _, resumed = training(tmp_path)
    assert "is finished (12 steps); nothing is changed" in capfd.readouterr().err
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert same(again.params, model.params)
    assert resumed.records == history.records


def test_changed_settings_are_refused_by_name(tmp_path):
    training(tmp_path)
    with pytest.raises(ValueError, match=r"lr was 0\.05 and is now 0\.1"):
        training(tmp_path, lr=0.1)
    with pytest.raises(ValueError, match="model was"):
        training(tmp_path, model=Chain(GRU(3, 7), Dropout(0.3), Linear(7, 2)))


@pytest.mark.parametrize("damage", ["cut short", "flipped", "emptied", "foreign"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, damage, capfd):
    model, _, _ = training(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="plug"):
        training(tmp_path / "cut", stop_at=2)
    newest = tmp_path / "cut" / "checkpoint.safetensors"
    content = bytearray(newest.read_bytes())
    if damage == "flipped":
        content[-5] ^= 1
    kept = {"cut short": content[:-50], "flipped": content, "emptied": b"", "foreign": b"{}" * 99}
    newest.write_bytes(kept[damage])
    again, _, _ = training(tmp_path / "cut")
    assert "going on from" in capfd.readouterr().err
    assert same(again.params, model.params)
    newest.write_bytes(b"")
    (tmp_path / "cut" / "checkpoint.before.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="no checkpoint can be used"):
        training(tmp_path / "cut")


def test_a_full_disk_keeps_the_earlier_checkpoint(tmp_path, monkeypatch):
    from gru_any.train import resume

    def full(path, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as first:
        first.setattr(resume, "write_atomically", full)
        with pytest.raises(OSError, match=r"No space left on device; there is no earlier one"):
            training(tmp_path)
    with pytest.raises(RuntimeError, match="plug"):
        training(tmp_path, stop_at=1)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    monkeypatch.setattr(resume, "write_atomically", full)
    with pytest.raises(OSError, match="the last good checkpoint is"):
        training(tmp_path)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


def test_a_newer_checkpoint_is_refused(tmp_path, monkeypatch):
    from gru_any.train import resume

    with monkeypatch.context() as newer:
        newer.setattr(resume, "FORMAT", 3)
        training(tmp_path)
    with pytest.raises(ValueError, match="has format 3, this version reads up to 2"):
        training(tmp_path)


def test_another_environment_is_told(tmp_path, monkeypatch, capfd):
    from gru_any.train import run

    real = run.environment
    with monkeypatch.context() as older:
        older.setattr(run, "environment", lambda b: {**real(b), "numpy": "1.0"})
        training(tmp_path)
    training(tmp_path)
    assert "numpy 1.0, now it is" in capfd.readouterr().err


def test_the_environment_holds_the_version_of_the_backends_library(backend):
    from gru_any.backend import environment

    library = backend.name.partition(".")[0]
    assert environment(backend.backend)[library] == require(library).__version__


# going on with another end -----------------------------------------------------------------------


STEADY = constant(0.05)


def longer(out, schedule=STEADY, losses=None, **given):
    """A run whose numbers do not depend on its end."""
    model = chain(p=0.3)
    calls = iter(losses or itertools.repeat(None))

    def valid():
        found = next(calls)
        return float(np.abs(model.params["2.bias"]).sum()) if found is None else found

    optimiser = AdamW(model.params, lr=0.05)
    given = {"tbptt": (3, 5), "clip": 0.5, "validate_every": 5, "average": 0.9} | given
    history = fit(model, error, batches, optimiser, schedule=schedule, valid=valid, out=out,
                  save_every=2, log_every=2, bar=False, **given)  # fmt: skip
    return model, optimiser, history


def kept(folder):
    from gru_any.train import resume

    header, arrays = resume.restore(folder)
    for name in ("seconds", "settings"):
        del header[name]
    header["records"] = without_time([*header["records"], header["closing"] or {}])
    del header["closing"]
    return header, arrays


@pytest.mark.parametrize(
    ("first", "then", "more"),
    [
        ({"steps": 7}, {"steps": 12}, {}),
        ({"steps": 7}, {"steps": 12}, {"average": None, "accumulate": 3}),
        ({"steps": 5}, {"steps": 12}, {"validate_every": 4, "mixed": "float16"}),
        ({"steps": 3}, {"epochs": 2}, {"validate_every": None}),
        ({"epochs": 1}, {"epochs": 3}, {"accumulate": 3}),  # ends between two updates
        ({"epochs": 1}, {"epochs": 3}, {"accumulate": 3, "validate_every": None}),
        ({"steps": 12, "patience": 0}, {"steps": 12, "patience": 1}, {"validate_every": 2}),
        ({"steps": 12, "minutes": 1e-9}, {"steps": 12}, {}),
    ],
)
def test_a_run_with_a_later_end_is_the_one_that_had_it_at_once(tmp_path, capfd, first, then, more):
    model, optimiser, history = longer(tmp_path / "whole", **then, **more)
    _, _, early = longer(tmp_path / "parts", **first, **more)
    again, other, resumed = longer(tmp_path / "parts", **then, **more)
    assert early.records[-1]["step"] < history.records[-1]["step"]
    assert "goes on after step" in capfd.readouterr().err
    assert same(again.params, model.params)
    assert same(other.state, optimiser.state)
    assert without_time(resumed.records) == without_time(history.records)
    assert (resumed.reason, resumed.best) == (history.reason, history.best)
    (header, arrays), (whole, expected) = kept(tmp_path / "parts"), kept(tmp_path / "whole")
    assert header == whole
    assert same(arrays, expected)
    assert same(expected, arrays)
    lines = (tmp_path / "parts" / "log.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == resumed.records


def test_training_goes_on_from_the_last_weights_and_not_from_the_lowest(tmp_path):
    """The validation at the first end finds the lowest loss, and does not count afterwards."""
    model, _, history = longer(tmp_path, steps=7, losses=[3.0, 1.0])
    assert history.best == 1.0
    again, _, found = longer(tmp_path, steps=7)
    assert (found.reason, found.best) == ("finished", 1.0)
    assert same(again.params, model.params)
    whole, _, _ = longer(None, steps=12, losses=[3.0, 2.0, 5.0])
    again, _, found = longer(tmp_path, steps=12, losses=[2.0, 5.0])
    assert found.best == 2.0
    assert same(again.params, whole.params)


def test_an_earlier_end_changes_nothing(tmp_path, capfd):
    model, _, history = longer(tmp_path, steps=12)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for other in ({"steps": 5}, {"steps": 5, "epochs": 9}, {"epochs": 1}):
        again, _, found = longer(tmp_path, **other)
        told = capfd.readouterr().err
        assert "is finished (12 steps) (steps was 12 and is now" in told
        assert told.endswith("; nothing is changed\n")
        assert found.reason == "finished"
        assert found.records == history.records
        assert same(again.params, model.params)
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("steps", [4, 9, 20])
def test_a_run_that_was_cut_short_may_get_another_end(tmp_path, steps, capfd):
    with pytest.raises(ZeroDivisionError):
        longer(tmp_path, steps=12, schedule=lambda step, losses: 0.05 if step < 8 else 1 / 0)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    model, _, history = longer(tmp_path, steps=steps)
    if steps > 8:
        assert same(model.params, longer(None, steps=steps)[0].params)
        assert history.reason == "done"
        return
    assert "has 8 steps (steps was 12 and is now 4); nothing is changed" in capfd.readouterr().err
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert history.reason == "finished"


def test_a_schedule_up_to_the_end_is_told_of_and_another_one_refused(tmp_path, capfd):
    longer(tmp_path, steps=6, schedule=cosine(0.05, 6))
    with pytest.raises(ValueError, match="another schedule"):
        longer(tmp_path, steps=6, schedule=cosine(0.05, 9))
    with pytest.raises(ValueError, match="another schedule"):
        longer(tmp_path, steps=9, schedule=None)
    capfd.readouterr()
    longer(tmp_path, steps=9, schedule=cosine(0.05, 9))
    assert "the schedule would have given other rates so far" in capfd.readouterr().err
    longer(tmp_path, steps=9, schedule=cosine(0.05, 9))
    assert "other rates" not in capfd.readouterr().err
    with pytest.raises(ValueError, match=r"clip was 0\.5 and is now 0\.1\. Take"):
        longer(tmp_path, steps=20, clip=0.1, schedule=cosine(0.05, 9))


def test_settings_may_not_hide_an_argument(tmp_path):
    with pytest.raises(ValueError, match=r"settings has \['lr', 'steps'\]"):
        longer(tmp_path, steps=3, settings={"steps": 5, "lr": 1.0, "data": "x"})


def test_the_same_optimiser_may_go_on(tmp_path):
    """In one process, where the schedule has changed its rate meanwhile."""
    model = chain()
    optimiser = Adam(model.params, lr=0.01)
    for steps in (4, 8):
        fit(model, error, batches, optimiser, steps=steps, schedule=stepwise(0.05, 3), out=tmp_path,
            bar=False)  # fmt: skip
    whole = chain()
    fit(whole, error, batches, Adam(whole.params), steps=8, schedule=stepwise(0.05, 3), bar=False)
    assert same(model.params, whole.params)


# a part of the parameters ------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"average": 0.5}, {"mixed": "float16"}])
def test_frozen_parameters_stay(tmp_path, capfd, more):
    model, other = chain(), chain()
    part = {k: v for k, v in model.params.items() if k.startswith("2.")}
    optimiser = SGD(part, lr=0.5)
    fit(model, error, batches, optimiser, steps=5, clip=0.05, out=tmp_path, bar=False,
        valid=lambda: float(np.abs(model.params["2.bias"]).sum()), **more)  # fmt: skip
    told = "3 of 5 parameters are frozen, since the optimiser does not hold them: 0.weight_ih_l0, "
    assert capfd.readouterr().err.count(told) == 1
    for k, v in other.params.items():
        assert np.array_equal(model.params[k], v) == (k not in part)
    _, arrays = kept(tmp_path)
    assert not [k for k in arrays if k.startswith(("averaged/0", "lowest/0", "optimiser"))]


def test_groups_in_a_run_are_torchs():
    """With a schedule, clipping over all groups and a part that is frozen."""
    torch = require("torch")
    model = Chain(GRU(3, 5, reset_after=True, seed=0, dtype="float64"), Linear(5, 2, seed=1,
                  dtype="float64"))  # fmt: skip
    rnn, head = torch.nn.GRU(3, 5).double(), torch.nn.Linear(5, 2).double()
    for module, layer in ((rnn, model.layers[0]), (head, model.layers[1])):
        module.load_state_dict({k: torch.tensor(v) for k, v in layer.params.items()})
    rnn.weight_hh_l0.requires_grad_(False)
    matrices, biases = (
        {k: v for k, v in model.params.items() if ("bias" in k) == wanted and "weight_hh" not in k}
        for wanted in (False, True)
    )
    optimiser = AdamW(
        [{"params": matrices}, {"params": biases, "lr": 0.1, "weight_decay": 0.0}],
        lr=0.02, weight_decay=0.1,
    )  # fmt: skip
    named = {f"0.{k}": v for k, v in rnn.named_parameters()}
    named |= {f"1.{k}": v for k, v in head.named_parameters()}
    theirs = torch.optim.AdamW(
        [{"params": [named[k] for k in matrices]},
         {"params": [named[k] for k in biases], "lr": 0.1, "weight_decay": 0.0}],
        lr=0.02, weight_decay=0.1,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(theirs, lambda step: 0.9**step)

    def data(epoch):
        return [Batch(*(v.astype(float) for v in (b.x, b.target))) for b in batches(epoch)]

    fit(model, error, data, optimiser, steps=20, clip=0.1, bar=False,
        schedule=lambda step, losses: 0.02 * 0.9**step)  # fmt: skip
    for step in range(20):
        x, target, *_ = (None if v is None else torch.tensor(v) for v in data(step // 2)[step % 2])
        theirs.zero_grad()
        torch.nn.functional.mse_loss(head(rnn(x)[0]), target).backward()
        torch.nn.utils.clip_grad_norm_([*rnn.parameters(), *head.parameters()], 0.1)
        theirs.step()
        schedule.step()
    for name, w in named.items():
        assert np.abs(model.params[name] - w.detach().numpy()).max() < 1e-10, name


def test_groups_are_among_the_settings_of_a_run(tmp_path):
    def run(groups, steps=2):
        model = chain()
        given = [{"params": {k: model.params[k] for k in names}, **own} for names, own in groups]
        fit(model, error, batches, Adam(given), steps=steps, out=tmp_path, bar=False)

    one, two = ["2.weight", "0.weight_ih_l0"], ["2.bias"]
    run([(one, {}), (two, {"lr": 0.1, "betas": (0.5, 0.9)})])
    run([(one, {}), (two, {"lr": 0.1, "betas": (0.5, 0.9)})], steps=4)
    for other in ([(one, {}), (two, {"lr": 0.2})], [(one, {})], [([*one, *two], {})]):
        with pytest.raises(ValueError, match="groups was"):
            run(other)


def test_an_optimiser_of_something_else_is_refused():
    model = chain()
    with pytest.raises(KeyError, match=r"holds \['3.weight'\], which the model does not have"):
        fit(model, error, batches, Adam({"3.weight": np.zeros(3, np.float32)}), steps=1, bar=False)
    with pytest.raises(TypeError, match="optimiser is dict, expected one such as Adam"):
        fit(model, error, batches, {}, steps=1, bar=False)


# killed ------------------------------------------------------------------------------------------

KILLED = """
import sys
import numpy as np
from gru_any import GRU, Adam, Chain, Dropout, Embedding, Linear, save, softmax_cross_entropy
from gru_any.train.data import streams
from gru_any.train import fit
data = np.random.default_rng(0).integers(0, 9, 4000)
model = Chain(Embedding(9, 8, seed=0), GRU(8, 16, seed=1), Dropout(0.2), Linear(16, 9, seed=2))
fit(model, softmax_cross_entropy, lambda epoch: [streams(data, 8)], Adam(model.params),
    steps=int(sys.argv[2]), tbptt=(10, 10), clip=1.0, out=sys.argv[1], save_every=7, log_every=5,
    bar=False)
save(sys.argv[1] + "/model.safetensors", model)
"""


def written(path):
    """When a file was written; 0 where there is none, as for a moment while it is replaced."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def run_killed(folder, steps, kills, rng):
    """Kill the run so many times at random moments, and then let it end."""
    command = [sys.executable, "-c", KILLED, str(folder), str(steps)]
    newest = folder / "checkpoint.safetensors"
    environment = {**os.environ, "GRU_ANY_NO_NUMBA": "1"}  # it starts sooner
    for _ in range(kills):
        began = written(newest)
        with started(command, stderr=subprocess.DEVNULL, env=environment) as process:
            while written(newest) in (0, began):
                assert process.poll() is None
                time.sleep(0.001)
            time.sleep(rng.random() * 0.05)
        assert process.returncode == -signal.SIGKILL  # it had not ended before
    finished(command, code=0, env=environment)


def test_killed_at_random_moments(tmp_path):
    """GRU_ANY_KILLS=20 does it twenty times."""
    kills = int(os.environ.get("GRU_ANY_KILLS", "2"))
    steps = 100 + 300 * kills
    run_killed(tmp_path / "whole", steps, 0, random)
    run_killed(tmp_path / "killed", steps, kills, random.Random(time.time()))
    whole, killed = ((tmp_path / k / "model.safetensors").read_bytes() for k in ("whole", "killed"))
    assert killed == whole
    logs = [(tmp_path / k / "log.jsonl").read_text("utf-8") for k in ("whole", "killed")]
    whole, killed = ([json.loads(line) for line in log.splitlines()] for log in logs)
    assert without_time(killed) == without_time(whole)
    from gru_any.train import resume

    (h, a), (other, b) = (resume.restore(tmp_path / k) for k in ("whole", "killed"))
    assert same(a, b)
    assert same(b, a)
    assert h["rng"] == other["rng"]

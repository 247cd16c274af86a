"""Training with bad input, on a full disk, with damaged files; data that is not held twice."""

import itertools
import math
import platform
import random
import re
import signal
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from conftest import finished, require, started

from gru_any import GRU, SGD, Chain, Embedding, Linear, save, softmax_cross_entropy
from gru_any.train import resume
from gru_any.train.data import ahead, cut, streams
from gru_any.train.loop import evaluate, fit
from gru_any.train.run import Run
from gru_any.train.schedules import constant, cosine, plateau

TEXT = np.random.default_rng(0).integers(0, 9, 400)


def writer(n=9, backend="numpy"):
    home = {"backend": backend}
    return Chain(
        Embedding(n, 3, seed=0, **home), GRU(3, 4, seed=1, **home), Linear(4, 9, seed=2, **home)
    )


def train(model=None, data=TEXT, steps=8, loss=softmax_cross_entropy, **options):
    model = model or writer()
    return fit(model, loss, lambda epoch: [streams(data, 4)], SGD(model.params, lr=0.1),
               steps=steps, tbptt=(10, 10), bar=False, **options)  # fmt: skip


# what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "steps",
        "epochs",
        "minutes",
        "accumulate",
        "clip",
        "validate_every",
        "save_every",
        "log_every",
    ],
)
@pytest.mark.parametrize("bad", [0, -1, math.nan])
def test_a_number_that_is_not_above_0(name, bad):
    with pytest.raises(
        ValueError, match=f"{name} is {bad}, expected an? (number above 0|integer of at least 1)"
    ):
        train(**{name: bad})


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_an_index_that_the_model_does_not_have(library):
    """On a device too: the data is looked at while it is on the host."""
    require(library)
    with pytest.raises(IndexError, match="x holds 0 to 8, expected 0 to n - 1 = 4"):
        train(writer(5, library))
    with pytest.raises(IndexError, match="x holds 0 to 8"):
        evaluate(writer(5, library), softmax_cross_entropy, [streams(TEXT, 4)])


@pytest.mark.parametrize("save_every", [1, 100])
def test_what_is_not_finite_on_a_device_is_named_and_not_kept(save_every, tmp_path):
    """Step, parameter and gate are those of the first wrong gradient, though it is seen later."""
    require("torch")
    model, calls = writer(backend="torch"), itertools.count(1)
    real = model.vjp

    def vjp(*arguments, **named):
        outputs, pullback = real(*arguments, **named)

        def spoiled(dy, **options):
            grads, *rest = pullback(dy)
            if calls_now == 3:
                grads["1.weight_hh_l0"][5, 1] = math.inf  # H = 4: a row of gate z
            return grads, *rest

        calls_now = next(calls)
        return outputs, spoiled

    model.vjp = vjp
    with pytest.raises(FloatingPointError, match=r"step 3: first in 1.weight_hh_l0, gate z\. "):
        train(model, clip=1.0, out=tmp_path, log_every=8, save_every=save_every)
    if save_every == 1:
        header, arrays = resume.restore(tmp_path)
        assert header["step"] == 2
        assert all(np.isfinite(a).all() for a in arrays.values())


def test_a_loss_that_is_not_finite(tmp_path):
    def wrong(y, target, mask=None):
        value, dy = softmax_cross_entropy(y, target, mask=mask)
        return value + math.inf, dy

    with pytest.raises(FloatingPointError, match="the loss is not finite in step 1, though"):
        train(loss=wrong)
    with pytest.raises(FloatingPointError, match="the validation loss is nan after step 2"):
        train(valid=lambda: math.nan, validate_every=2, out=tmp_path)


def test_another_schedule_is_refused(tmp_path):
    def stopped(schedule, stop=False):
        wait = itertools.count()

        def valid():
            if stop and next(wait) == 2:
                raise RuntimeError("the plug is pulled")
            return 1.0

        options = {"valid": valid, "validate_every": 2, "save_every": 2, "out": tmp_path}
        return train(schedule=schedule, **options)

    with pytest.raises(RuntimeError, match="plug"):
        stopped(plateau(0.1, 0), stop=True)
    for other in (cosine(0.1, 8), constant(0.2), None):
        with pytest.raises(ValueError, match=r"another schedule: the rate was 0.1 in step 4 and"):
            stopped(other)
    assert stopped(plateau(0.1, 0)).reason == "done"


def test_a_schedule_that_there_was_not(tmp_path):
    train(out=tmp_path)
    with pytest.raises(ValueError, match="another schedule"):
        train(out=tmp_path, schedule=constant(0.1))


def test_what_is_no_checkpoint(tmp_path):
    train(out=tmp_path)
    (tmp_path / resume.NAMES[1]).unlink(missing_ok=True)
    save(tmp_path / resume.NAMES[0], writer())
    with pytest.raises(ValueError, match="is no checkpoint of a training run"):
        train(out=tmp_path)


def test_a_newer_checkpoint_is_left_as_it_is(tmp_path, monkeypatch):
    """And not taken for a damaged one, though the one before could be read."""
    with pytest.raises(RuntimeError, match="plug"):
        train(out=tmp_path, save_every=2, loss=pulled(5))
    with monkeypatch.context() as newer:
        newer.setattr(resume, "FORMAT", 3)
        with pytest.raises(RuntimeError, match="plug"):
            train(out=tmp_path, save_every=2, loss=pulled(3))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="has format 3, this version reads up to 2"):
        train(out=tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_damaged_checkpoint_never_takes_the_place_of_a_good_one(tmp_path, monkeypatch):
    """Killed in the first save after falling back, between its two renames."""
    with pytest.raises(RuntimeError, match="plug"):
        train(out=tmp_path, save_every=2, loss=pulled(6))
    (tmp_path / resume.NAMES[0]).write_bytes(b"damaged")
    real = resume.os.replace

    def killed(source, target):
        if str(source).endswith("checkpoint.new.safetensors"):
            raise RuntimeError("the plug is pulled")
        real(source, target)

    with monkeypatch.context() as unlucky:
        unlucky.setattr(resume.os, "replace", killed)
        with pytest.raises(RuntimeError, match="plug"):
            train(out=tmp_path, save_every=1)
    assert resume.restore(tmp_path)[0]["step"] == 2


@pytest.mark.parametrize("step", [1, 6, 7, 12, 13, 17])
def test_epochs_go_on_bit_for_bit(tmp_path, step):
    """Validation at the ends of epochs of five pieces, two to an update."""
    models, histories = [], []
    for loss in (softmax_cross_entropy, pulled(step), softmax_cross_entropy):
        model, folder = writer(), tmp_path / ("whole" if not models else "cut")

        def valid(model=model):
            return float(np.abs(model.params["2.bias"]).sum())

        def go(model=model, loss=loss, folder=folder, valid=valid):
            return fit(model, loss, lambda epoch: [streams(TEXT[epoch : epoch + 201], 4)],
                       SGD(model.params, lr=0.1, momentum=0.9), epochs=4, tbptt=(10, 10),
                       accumulate=2, valid=valid, average=0.9, out=folder, save_every=1,
                       log_every=1, bar=False)  # fmt: skip

        if loss is not softmax_cross_entropy:
            with pytest.raises(RuntimeError, match="plug"):
                go()
            continue
        histories.append([r | {"seconds": 0} for r in go().records])
        models.append(model.params)
    assert len([r for r in histories[0] if "valid" in r]) == 4
    assert histories[0] == histories[1]
    assert all(np.array_equal(models[1][k], v) for k, v in models[0].items())


# files -------------------------------------------------------------------------------------------


def test_a_bit_that_flipped_anywhere_is_noticed(tmp_path):
    train(out=tmp_path)
    path, rng = tmp_path / resume.NAMES[0], random.Random(0)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(8), *(rng.randrange(8, header) for _ in range(60))]
    places += [rng.randrange(header, len(whole)) for _ in range(20)]
    for place in places:
        content = bytearray(whole)
        content[place] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"no checkpoint can be used"):
            resume.restore(tmp_path)
    path.write_bytes(whole)
    assert resume.restore(tmp_path)[0]["step"] == 8


FULL = """
import resource, signal, sys
import test_train_input as t
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
t.train(steps=12, out=sys.argv[1], save_every=2, log_every=1)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs a limit on the size of files")
@pytest.mark.parametrize(
    ("room", "message"),
    [
        (300, r"log.jsonl was not written \(File too large"),
        (3000, r"was not written \(File .* the last good checkpoint is"),
    ],
)
def test_no_room_on_the_disk(tmp_path, room, message):
    """A real limit: neither the checkpoint that was there nor the run is lost."""
    kept, whole, again = tmp_path / "kept", writer(), writer()
    with pytest.raises(RuntimeError, match="plug"):
        train(steps=12, out=kept, save_every=2, log_every=1, loss=pulled(5))
    before = (kept / resume.NAMES[0]).read_bytes()
    command = [sys.executable, "-c", FULL, str(kept), str(room)]
    done = finished(command, code=1, cwd=Path(__file__).parent)
    assert re.search(message, done.stderr.splitlines()[-1]), done.stderr
    assert (kept / resume.NAMES[0]).read_bytes() == before
    assert not list(kept.glob(".*"))
    train(again, steps=12, out=kept, save_every=2, log_every=1)
    train(whole, steps=12, save_every=2, log_every=1)
    assert all(np.array_equal(again.params[k], v) for k, v in whole.params.items())


def pulled(step):
    """A loss that fails in its so many-th call."""
    calls = itertools.count(1)

    def loss(y, target, mask=None):
        if next(calls) == step:
            raise RuntimeError("the plug is pulled")
        return softmax_cross_entropy(y, target, mask=mask)

    return loss


def test_what_a_killed_run_left_half_written_is_cleared_away(tmp_path):
    with started([sys.executable, "-c", ""]) as killed:
        pass
    left = tmp_path / f".checkpoint.new.safetensors.{platform.node()}.{killed.pid}.part"
    left.write_bytes(b"half")
    train(out=tmp_path)
    assert not left.exists()


# the data, and the time left ---------------------------------------------------------------------


def test_the_next_item_is_made_while_the_present_one_is_in_use():
    made = threading.Event()

    def items():
        yield 1
        made.set()
        yield 2

    for item in ahead(items()):
        assert item == 2 or made.wait(10)


def test_pieces_are_views_of_the_data():
    data = np.arange(4001)
    batch = streams(data, 4)
    assert np.shares_memory(batch.x, data)
    assert np.shares_memory(batch.target, data)
    for piece in cut(batch, (10, 10)):
        assert np.shares_memory(piece.batch.x, data)


def test_training_holds_the_data_once():
    data = np.random.default_rng(0).integers(0, 9, 1_000_000)
    model = writer()
    train(model, data, steps=2)  # whatever is loaded or compiled once
    tracemalloc.start()
    train(model, data, steps=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < data.nbytes / 4


class Stand:
    """The state of a run after 30 seconds."""

    def __init__(self, step, epoch, *ends):
        self.step, self.epoch, self.plan = step, epoch, ends

    def elapsed(self):
        return 30.0


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ((100, None, None), 100),
        ((None, 5, None), 50),
        ((None, None, 2.0), 80),
        ((60, 5, 2.0), 50),
        ((None, 1, None), 20),
    ],
)
def test_the_bar_knows_how_many_steps_are_to_come(ends, expected):
    assert Run.expected(Stand(20, 2, *ends)) == expected
    assert Run.expected(Stand(3, 0, None, 5, None)) is None

"""Laws that hold whatever the numbers: on every path and backend, over all options.

GRU_ANY_EXAMPLES=100 tries 100 times as many examples, drawn anew in each run.
"""

import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import HOST, PATHS, Home, refuse, require, running, tuned
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from gru_any import GRU
from gru_any.backend.cpu import threads

TIMES = int(os.environ.get("GRU_ANY_EXAMPLES", "1"))
EXAMPLES = {
    **dict.fromkeys(map(str, PATHS), 6),
    **({"packed": 6, "shared": 6} if "compiled" in PATHS else {}),
    **{"array_api_strict": 4, "torch": 4, HOST: 4},
    **({"jax.numpy": 3} if TIMES > 1 else {}),  # which compiles each operation for each size
}  # of each law; the first is the simplest, of no steps


class Case(NamedTuple):
    """A model and its numbers; gradients come from dy and dh."""

    T: int
    B: int
    I: int
    H: int
    layers: int
    way: str  # forward, reverse or both
    ragged: bool
    options: dict[str, Any]
    seed: int
    home: Any

    def model(self, way: str = "", layers: int = 0, I: int = 0, **options: Any) -> GRU:
        """A GRU with the case's options and random parameters; some of them replaced."""
        way = way or self.way
        directions = {"bidirectional": way == "both", "reverse": way == "reverse"}
        home = {"backend": self.home.name, "device": self.home.device}
        given = {**self.options, **directions, **home, **options}
        layers = layers or self.layers
        return GRU(I or self.I, self.H, layers, seed=self.seed, **given)

    def arrays(self) -> tuple[Any, ...]:
        """x, h0, lengths, dy, dh: on the host, time first."""
        rng, D = np.random.default_rng(self.seed), 1 + (self.way == "both")
        shapes = [(self.T, self.B, self.I), (self.layers * D, self.B, self.H),
                  (self.T, self.B, D * self.H), (self.layers * D, self.B, self.H)]  # fmt: skip
        drawn = [rng.standard_normal(shape).astype(self.options["dtype"]) for shape in shapes]
        lengths = rng.integers(0, self.T + 1, self.B).tolist() if self.ragged else None
        return drawn[0], drawn[1], lengths, drawn[2], drawn[3]

    def run(self, gru: GRU, x: Any, h0: Any, lengths: Any, dy: Any, dh: Any) -> dict[str, Any]:
        """Outputs and gradients by name, on the host, time first."""
        turn = (lambda v: v.swapaxes(0, 1)) if gru.batch_first else (lambda v: v)
        put, host = self.home.put, self.home.host
        X, DY = (put(np.ascontiguousarray(turn(v))) for v in (x, dy))
        (y, h_n), pullback = gru.vjp(X, put(h0), lengths)
        grads, dx, dh0 = pullback(DY, put(dh))
        named = {k: host(v) for k, v in grads.items()}
        assert {k: v.shape for k, v in named.items()} == {k: v.shape for k, v in gru.params.items()}
        return {"y": turn(host(y)), "h_n": host(h_n), "dx": turn(host(dx)), "dh0": host(dh0),
                **named}  # fmt: skip

    def close(self, a: Any, b: Any) -> None:
        """The same but for rounding."""
        assert a.shape == b.shape
        scale = 1 + np.abs(b).max(initial=0)
        assert np.abs(a - b).max(initial=0) <= 100 * np.finfo(self.options["dtype"]).eps * scale


def cases(home: Any) -> Any:
    """Cases of a backend; of few sizes where each size is compiled, unless there is time."""
    everything, flag = home.name == "numpy" or TIMES > 1, st.booleans()
    size = st.integers(1, 9) if everything else st.sampled_from([1, 3])
    steps = [0, 1, 2, 3, 7, 70] if everything else [0, 3]
    options = st.fixed_dictionaries({
        "reset_after": flag, "bias": flag, "batch_first": flag,
        "recompute": st.sampled_from([None, "sqrt", 1]),
        "dtype": st.sampled_from(["float64", "float32"]),
    })  # fmt: skip
    return st.builds(
        Case, T=st.sampled_from(steps), B=st.integers(0, 9) if everything else st.just(2),
        I=size, H=size, layers=st.integers(1, 3 if everything else 2),
        way=st.sampled_from(["forward", "reverse", "both"]), ragged=flag, options=options,
        seed=st.integers(0, 2**32 - 1), home=st.just(home),
    )  # fmt: skip


@cache
def home(name: str) -> Any:
    if name != "numpy":
        require(name)
    if name == HOST and shutil.which("g++") is None:
        refuse("g++", "not installed")
    return Home(name)


def law(check: Callable[[Case], None]) -> Any:
    """Make a test of a function that checks a case: on every path and backend."""

    @pytest.mark.parametrize("place", EXAMPLES)
    def test(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
        path = place if place in (*PATHS, "packed", "shared") else ""
        if place == "shared":  # two threads share rows or units wherever they can
            from gru_any.backend.cpu import numba_runner

            for module in (threads, numba_runner):
                monkeypatch.setattr(module, "count", lambda: 2)
            monkeypatch.setattr(threads.crowd, "present", lambda: False)
        at = home("numpy" if path else place)

        @settings(max_examples=TIMES * EXAMPLES[place], database=None, derandomize=TIMES == 1,
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(case=cases(at))
        def hold(case: Case) -> None:
            event(f"{check.__name__} {place}")
            check(case)

        few = {"thread_work": 1, "team_step_work": 1, "team_units": 4, "packed_rows": 0}
        mode = running({"shared": "packed"}.get(path, path)) if path else nullcontext()
        with mode, tuned(**few) if place == "shared" else nullcontext(), at.strictly():
            hold()

    test.__doc__ = check.__doc__
    return test


def ended(lengths: Any, T: int) -> Any:
    """Which steps (T, B) are padding."""
    return np.arange(T)[:, None] >= np.asarray(lengths)


@law
def test_chunks_equal_the_whole(case):
    """Also their gradients, chained from the last chunk to the first."""
    case = case._replace(way="forward", ragged=False)
    gru, (x, h0, _, dy, dh) = case.model(), case.arrays()
    whole, cut = case.run(gru, x, h0, None, dy, dh), case.T // 3
    first = case.run(gru, x[:cut], h0, None, dy[:cut], dh)
    second = case.run(gru, x[cut:], first["h_n"], None, dy[cut:], dh)
    first = case.run(gru, x[:cut], h0, None, dy[:cut], second["dh0"])
    for name in ("y", "dx"):
        case.close(np.concatenate([first[name], second[name]]), whole[name])
    case.close(second["h_n"], whole["h_n"])
    case.close(first["dh0"], whole["dh0"])
    for name in gru.params:
        case.close(first[name] + second[name], whole[name])


def flipped(v, lengths):
    """Each sequence read from its own end; the padding stays where it is."""
    if lengths is None:
        return v[::-1].copy()
    found = v.copy()
    for b, n in enumerate(lengths):
        found[:n, b] = v[:n, b][::-1]
    return found


@law
def test_reverse_equals_forward_on_the_reversed_input(case):
    case = case._replace(way="reverse", layers=1)
    x, h0, lengths, dy, dh = case.arrays()
    reverse, forward = case.model(), case.model("forward")
    forward.load_params({k: reverse.params[f"{k}_reverse"] for k in forward.params})
    found = case.run(reverse, x, h0, lengths, dy, dh)
    expected = case.run(forward, flipped(x, lengths), h0, lengths, flipped(dy, lengths), dh)
    for name, value in expected.items():
        other = found[f"{name}_reverse" if name in forward.params else name]
        case.close(other, flipped(value, lengths) if name in ("y", "dx") else value)


@law
def test_rows_are_independent(case):
    """Each row alone gives what it gives in the batch, and the gradients of all add up."""
    gru, (x, h0, lengths, dy, dh) = case.model(), case.arrays()
    whole = case.run(gru, x, h0, lengths, dy, dh)
    total = {k: np.zeros_like(whole[k]) for k in gru.params}
    for b in range(case.B):
        row = slice(b, b + 1)
        alone = case.run(gru, x[:, row], h0[:, row], lengths and lengths[row], dy[:, row],
                         dh[:, row])  # fmt: skip
        for name in ("y", "h_n", "dx", "dh0"):
            case.close(alone[name], whole[name][:, row])
        total = {k: total[k] + alone[k] for k in total}
    for name, value in total.items():
        case.close(value, whole[name])


@law
def test_padding_is_invisible(case):
    """Not a bit depends on it; outputs and gradients are 0 there."""
    case = case._replace(ragged=True)
    gru, (x, h0, lengths, dy, dh) = case.model(), case.arrays()
    clean, padding = case.run(gru, x, h0, lengths, dy, dh), ended(lengths, case.T)
    x[padding], dy[padding] = np.nan, np.inf
    dirty = case.run(gru, x, h0, lengths, dy, dh)
    for name, value in clean.items():
        assert np.array_equal(dirty[name], value), name
    assert not clean["y"][padding].any()
    assert not clean["dx"][padding].any()
    if lengths:  # nor does it matter how much of it there is
        T = max(lengths)
        cut = case.run(gru, x[:T], h0, lengths, dy[:T], dh)
        for name, value in cut.items():
            case.close(value, clean[name][:T] if name in ("y", "dx") else clean[name])


@law
def test_permuting_the_batch_permutes_the_answer(case):
    gru, (x, h0, lengths, dy, dh) = case.model(), case.arrays()
    order = np.random.default_rng(case.seed).permutation(case.B)
    whole = case.run(gru, x, h0, lengths, dy, dh)
    moved = lengths and [lengths[b] for b in order]
    found = case.run(gru, x[:, order], h0[:, order], moved, dy[:, order], dh[:, order])
    for name, value in found.items():
        case.close(value, whole[name] if name in gru.params else whole[name][:, order])


@law
def test_two_directions_equal_two_runs(case):
    case = case._replace(way="both", layers=1)
    both, (x, h0, lengths, dy, dh) = case.model(), case.arrays()
    H, whole, dx = case.H, case.run(both, x, h0, lengths, dy, dh), 0.0
    for d, (way, end) in enumerate((("forward", ""), ("reverse", "_reverse"))):
        one = case.model(way)
        one.load_params({k: both.params[k] for k in one.params})
        half, part = slice(d * H, d * H + H), slice(d, d + 1)
        found = case.run(one, x, h0[part], lengths, dy[..., half], dh[part])
        case.close(found["y"], whole["y"][..., half])
        case.close(found["h_n"], whole["h_n"][part])
        case.close(found["dh0"], whole["dh0"][part])
        for name in one.params:
            assert name.endswith(end)
            case.close(found[name], whole[name])
        dx = dx + found["dx"]
    case.close(dx, whole["dx"])


@law
def test_two_layers_equal_one_after_the_other(case):
    case = case._replace(layers=2)
    both, (x, h0, lengths, dy, dh) = case.model(), case.arrays()
    D = len(both.suffixes)
    ones = [case.model(layers=1), case.model(layers=1, I=D * case.H)]
    for n, one in enumerate(ones):
        one.load_params({k: both.params[k.replace("_l0", f"_l{n}")] for k in one.params})
    whole = case.run(both, x, h0, lengths, dy, dh)
    first = case.run(ones[0], x, h0[:D], lengths, dy, dh[:D])
    second = case.run(ones[1], first["y"], h0[D:], lengths, dy, dh[D:])
    first = case.run(ones[0], x, h0[:D], lengths, second["dx"], dh[:D])
    case.close(second["y"], whole["y"])
    case.close(first["dx"], whole["dx"])
    for name in ("h_n", "dh0"):
        case.close(np.concatenate([first[name], second[name]]), whole[name])
    for n, (one, found) in enumerate(zip(ones, (first, second), strict=True)):
        for name in one.params:
            case.close(found[name], whole[name.replace("_l0", f"_l{n}")])


@law
def test_inference_equals_the_forward_pass_of_training(case):
    """Without dropout not a bit differs, and `last` and the taps are the same states."""
    gru, (x, h0, lengths, dy, dh) = case.model(), case.arrays()
    if case.layers > 1:
        gru = case.model(dropout=0.5)  # which acts with a generator alone
    turn = (lambda v: v.swapaxes(0, 1)) if gru.batch_first else (lambda v: v)
    X, h = case.home.put(np.ascontiguousarray(turn(x))), case.home.put(h0)
    y, h_n = gru(X, h, lengths)
    trained = case.run(gru, x, h0, lengths, dy, dh)
    assert np.array_equal(turn(case.home.host(y)), trained["y"])
    assert np.array_equal(case.home.host(h_n), trained["h_n"])
    assert np.array_equal(case.home.host(gru.last(X, h, lengths)), trained["h_n"])
    taps = case.home.host(gru.taps(X, h, lengths)["h"])
    case.close(np.concatenate(list(taps[-len(gru.suffixes) :]), axis=-1), trained["y"])


@law
def test_the_pullback_is_linear(case):
    """Also where one of its arguments is left out, which means zeros."""
    gru, (x, h0, lengths, dy, dh) = case.model(), case.arrays()
    turn = (lambda v: v.swapaxes(0, 1)) if gru.batch_first else (lambda v: v)
    put, host = case.home.put, case.home.host
    X, DY, DH = (put(np.ascontiguousarray(v)) for v in (turn(x), turn(dy), dh))
    _, pullback = gru.vjp(X, put(h0), lengths)

    def parts(*cotangents):
        grads, dx, dh0 = pullback(*cotangents)
        return {**grads, "dx": dx, "dh0": dh0}

    both, ys, hs = parts(DY, DH), parts(DY), parts(None, DH)
    twice = parts(2 * DY, 2 * DH)
    for name, value in both.items():
        case.close(host(ys[name]) + host(hs[name]), host(value))
        case.close(host(twice[name]), 2 * host(value))

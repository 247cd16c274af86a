"""Random models on random arrays: every path against plain, and plain against other libraries.

    python scripts/maintenance/fuzz_results.py --cases 10000
    python scripts/maintenance/fuzz_results.py --seed 123    one case, shrunk, as code to run

A case is a configuration (sizes, layers, directions, variant, lengths, layout ...) and a kind of
data: ordinary, saturated, huge, tiny, denormal, with infinities or NaN. Each path computes outputs,
states and gradients, which are compared with those of the plain path in float64. PyTorch (reset
after) and onnxruntime (both variants, one layer) are compared where they can run the case.

Two results agree where they hold the same NaN and infinities, and differ by no more than some
roundings of the inputs and of each sum explain (`rounding`), in float32 and in float64. The exit
code is 1 where something is off.
"""

import argparse
import dataclasses
import itertools
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gru_any import GRU
from gru_any.backend import Mode, modes
from gru_any.backend.cpu import threads, tuning
from gru_any.deploy import freeze
from gru_any.stream import Stream

NUDGES = 64  # roundings of each input, and
EPSILONS = 8  # roundings of each term of a sum, by which results may differ
OUTPUTS = ("y", "h_n", "dx", "dh0")  # those of each row; the others are sums over all steps
KINDS = ("ordinary", "saturated", "large", "tiny", "denormal", "infinite", "nan", "zeros")
LAYOUTS = ("contiguous", "strided", "transposed", "reversed", "read-only", "unaligned")
ABSOLUTE = {"traced": 64.0}  # roundings at size 1: NumPy's tanh may be made of exp
PATHS = ("traced", "compiled", "packed", "team", "frozen", "recompute")


@dataclass(frozen=True)
class Case:
    """What is computed; `data` seeds the numbers."""

    T: int
    B: int
    I: int
    H: int
    layers: int = 1
    bidirectional: bool = False
    reset_after: bool = False
    bias: bool = True
    dtype: str = "float32"
    kind: str = "ordinary"
    layout: str = "contiguous"
    ragged: bool = False
    h0: bool = True
    dy: bool = True
    dh: bool = True
    masked: bool = False  # steps in the middle are skipped
    resets: bool = False
    repeat: bool = False  # what y holds at skipped steps
    other: bool = False  # activations, bounded
    layer_norm: bool = False
    merge: str = "concat"
    data: int = 0


OTHER = {"activation": "softsign", "gate_activation": ("hard_sigmoid", 0.2, 0.5), "clip": 2.4}
OPTIONS = ("masked", "resets", "repeat", "other", "layer_norm")  # those that are on or off
SIMPLER: dict[str, tuple[Any, ...]] = {
    "T": (1, 2, 3), "B": (1, 2, 3), "I": (1, 2), "H": (1, 2, 3), "layers": (1,),
    "bidirectional": (False,), "ragged": (False,), "h0": (False,), "bias": (False,),
    "dtype": ("float32",), "layout": ("contiguous",), "kind": ("ordinary",), "dh": (False,),
    "merge": ("concat",), "data": (0, 1, 2), **dict.fromkeys(OPTIONS, (False,)),
}  # fmt: skip


def random_case(seed: int) -> Case:
    """The case of a seed."""
    rng = np.random.default_rng(seed)

    def one(*values: Any) -> Any:
        return values[rng.integers(len(values))]

    dy = bool(rng.random() < 0.85)
    case = Case(
        T=one(0, 1, 1, 2, 2, 3, 3, 5, 5, 8, 12, 70), B=one(0, 1, 1, 2, 3, 7, 9, 17, 33),
        I=one(1, 2, 3, 8, 17), H=one(1, 2, 3, 4, 7, 16, 33, 64), layers=one(1, 1, 2, 3),
        bidirectional=one(False, True), reset_after=one(False, True), bias=one(True, True, False),
        dtype=one("float32", "float32", "float64"), kind=one(*KINDS[:1], *KINDS),
        layout=one(*LAYOUTS[:1], *LAYOUTS), ragged=one(False, True), h0=one(False, True), dy=dy,
        dh=not dy or one(False, True), data=int(rng.integers(2**31)),
    )  # fmt: skip
    if rng.random() < 0.5:
        return case
    merge = one("concat", "sum", "mean", "mul") if case.bidirectional else "concat"
    chosen = {name: bool(rng.random() < 0.4) for name in OPTIONS}
    chosen["repeat"] = chosen["repeat"] and merge == "concat"
    chosen["layer_norm"] = chosen["layer_norm"] and case.reset_after
    return dataclasses.replace(case, merge=merge, **chosen)


# the numbers of a case ----------------------------------------------------------------------------


def draw(case: Case, rng: Any, shape: tuple[int, ...]) -> Any:
    """An array of the case's kind."""
    v = rng.standard_normal(shape)
    tiny = float(np.finfo(case.dtype).tiny)
    if case.kind == "saturated":
        v = v * 100
    elif case.kind == "large":
        # the mean of squares that layer normalisation takes must not overflow
        v = v * 10.0 ** rng.integers(2, 15 if case.layer_norm else 30, shape)
    elif case.kind == "tiny":
        v = v * 10.0 ** rng.integers(-30, -2, shape)
    elif case.kind == "denormal":
        v = v * tiny * 0.1
    elif case.kind == "zeros":
        v = np.where(rng.random(shape) < 0.5, 0.0, -0.0) * v
    elif case.kind in ("infinite", "nan"):
        bad = np.nan if case.kind == "nan" else np.inf
        v = np.where(rng.random(shape) < 0.02, bad * np.sign(v), v)
    return v.astype(case.dtype)


def with_layout(v: Any, layout: str) -> Any:
    """Return the array (T, B, n) with other strides, unaligned, or read-only."""
    if layout == "strided":
        return np.repeat(v, 2, axis=-1)[..., ::2]
    if layout == "transposed":
        return np.ascontiguousarray(v.swapaxes(0, 1)).swapaxes(0, 1)
    if layout == "reversed":
        return np.ascontiguousarray(v[::-1, :, ::-1])[::-1, :, ::-1]
    if layout == "read-only":
        return np.frombuffer(v.tobytes(), v.dtype).reshape(v.shape)
    if layout == "unaligned":
        raw = np.frombuffer(b" " + v.tobytes(), np.uint8)[1:]
        return raw.view(v.dtype).reshape(v.shape)
    return v


@dataclass(frozen=True)
class Numbers:
    """The arrays of a case."""

    x: Any
    h0: Any
    dy: Any
    dh: Any
    steps: dict[str, Any]  # lengths, mask, resets and skipped, as a call takes them
    weights: dict[str, Any]


def numbers(case: Case) -> Numbers:
    """Draw them: extremes stand in x and h0, in the weights where these stay finite sums."""
    rng, D = np.random.default_rng(case.data), 1 + case.bidirectional
    states = (case.layers * D, case.B, case.H)
    mild = dataclasses.replace(case, kind="ordinary")
    x = draw(case, rng, (case.T, case.B, case.I))
    h0 = draw(case if case.kind != "large" else mild, rng, states) if case.h0 else None
    gentle = case if case.kind in ("tiny", "denormal", "zeros") else mild
    width = D * case.H if case.merge == "concat" else case.H
    dy = draw(gentle, rng, (case.T, case.B, width)) if case.dy else None
    dh = draw(gentle, rng, states) if case.dh else None
    steps = {"lengths": rng.integers(0, case.T + 1, case.B) if case.ragged else None,
             "mask": rng.random((case.T, case.B)) < 0.7 if case.masked else None,
             "resets": rng.random((case.T, case.B)) < 0.2 if case.resets else None,
             "skipped": "repeat" if case.repeat else "zero"}  # fmt: skip
    gru = model(case, case.dtype)
    scale = 1.5 / np.sqrt(case.H)  # of weights that do not make the recurrence chaotic
    weights = {k: draw(mild, rng, v.shape) * scale for k, v in gru.params.items()}
    if case.kind in ("tiny", "denormal"):
        weights = {k: draw(case, rng, v.shape) if rng.random() < 0.3 else v
                   for k, v in weights.items()}  # fmt: skip
    arrays = (v if v is None else with_layout(v, case.layout) for v in (x, h0, dy, dh))
    return Numbers(*arrays, steps, {k: v.astype(case.dtype) for k, v in weights.items()})


def model(case: Case, dtype: str, **options: Any) -> GRU:
    """A GRU as the case says."""
    options |= OTHER if case.other else {}
    return GRU(case.I, case.H, case.layers, bias=case.bias, bidirectional=case.bidirectional,
               reset_after=case.reset_after, merge=case.merge, layer_norm=case.layer_norm,
               dtype=dtype, seed=0, **options)  # fmt: skip


# every way to compute it --------------------------------------------------------------------------


def ours(case: Case, given: Numbers, path: str, dtype: str = "") -> dict[str, Any]:
    """What this library computes in one way, by name."""
    dtype, usual = dtype or case.dtype, tuning.current
    special = {"packed": {"packed_rows": 0, "stored_elements": 0},
               "team": {"thread_work": 1, "team_step_work": 1, "team_units": 8,
                        "packed_rows": 0}}  # fmt: skip
    mode = Mode(path) if path in ("plain", "traced") else Mode.COMPILED
    kept = modes.chosen, threads.count
    try:
        modes.chosen = mode
        tuning.current = usual._replace(**special.get(path, {}))
        if path == "team":
            threads.count = counted_by_runner(2)
        gru = model(case, dtype, recompute=1 if path == "recompute" else None)
        gru.load_params({k: v.astype(dtype) for k, v in given.weights.items()})
        arrays = given.x, given.h0, given.dy, given.dh
        cast = [v if v is None or v.dtype == dtype else v.astype(dtype) for v in arrays]
        return results(case, gru, *cast, given.steps, path)
    finally:
        tuning.current, modes.chosen = usual, kept[0]
        threads.count = counted_by_runner(kept[1])


def counted_by_runner(how: Any) -> Any:
    """Set how many threads the runner uses: a number, or the usual function."""
    from gru_any.backend.cpu import numba_runner

    count = how if callable(how) else lambda: how
    numba_runner.count = count
    return count


def results(
    case: Case, gru: GRU, x: Any, h0: Any, dy: Any, dh: Any, steps: Any, path: str
) -> dict[str, Any]:
    """Outputs, states and gradients by name."""
    if path == "frozen":
        y, h_n = freeze(gru)(x, h0, **steps)
        return {"y": y, "h_n": h_n}
    (y, h_n), pullback = gru.vjp(x, h0, **steps)
    grads, dx, dh0 = pullback(dy, dh)
    found = {"y": y, "h_n": h_n, "dx": dx, "dh0": dh0, **grads}
    again = gru(x, h0, **steps)
    same(f"{path}: inference", again, (y, h_n))
    of_last = {name: v for name, v in steps.items() if name != "skipped"}
    same(f"{path}: last", (gru.last(x, h0, **of_last),), (h_n,))
    whole = not (case.bidirectional or case.ragged or case.masked or case.resets)
    if path == "compiled" and whole and 0 < case.T < 9:
        stream = Stream(gru)
        stream.state = h0
        found["stream"] = np.stack([stream.step(x_t) for x_t in x])
    return found


class DifferenceError(Exception):
    """Two ways that do not agree; the text says which."""


def same(name: str, found: Any, expected: Any) -> None:
    """Raise where the bits are not the same."""
    for a, b in zip(found, expected, strict=True):
        if not np.array_equal(a, b, equal_nan=True):
            raise DifferenceError(f"{name}: other bits than vjp")


# comparisons --------------------------------------------------------------------------------------


def compare(
    case: Case, name: str, found: dict[str, Any], exact: dict[str, Any], limits: dict[str, float]
) -> None:
    """Raise where a result is further from the exact one than rounding explains."""
    for key, value in found.items():
        key = "y" if key == "stream" else key
        value, right = np.asarray(value), exact[key]
        if value.shape != right.shape:
            raise DifferenceError(f"{name}: {key} is {value.shape}, expected {right.shape}")
        if case.kind == "infinite" and key not in OUTPUTS and value.dtype == np.float32:
            continue  # a derivative that is 0 in float32 alone makes NaN of infinity
        right = right.astype(value.dtype).astype("float64")  # which may overflow
        finite = np.isfinite(right)
        if not np.array_equal(np.isnan(value), np.isnan(right)):
            raise DifferenceError(f"{name}: {key} has other NaN")
        if not np.array_equal(value[~finite], right[~finite], equal_nan=True):
            raise DifferenceError(f"{name}: {key} has other infinities")
        limit = max(limits[key], ABSOLUTE.get(name, 0.0) * float(np.finfo(value.dtype).eps))
        error = float(np.abs(value[finite] - right[finite]).max(initial=0.0))
        if error > limit:
            raise DifferenceError(f"{name}: {key} is off by {error:.3g}, allowed {limit:.3g}")


def rounding(case: Case, given: Numbers, exact: dict[str, Any]) -> dict[str, float]:
    """How far a result may be from the exact one, by name.

    As far as it moves where each input is changed by some roundings, and by those of its own sums.
    """
    eps, found = float(np.finfo(case.dtype).eps), {}
    moved = [ours(case, nudged(given, eps, seed), "plain", "float64") for seed in range(2)]
    terms = 8 + case.I + case.H
    x, dy = (float(np.abs(v[np.isfinite(v)]).max(initial=0.0)) if v is not None else 1.0
             for v in (given.x, given.dy))  # fmt: skip
    relative = case.kind in ("tiny", "denormal")
    for key, right in exact.items():
        finite = np.isfinite(right)
        size = float(np.abs(right[finite]).max(initial=0.0))
        far = max(float(np.abs(v[key] - right)[finite].max(initial=0.0)) for v in moved)
        if not relative:
            size = max(1.0, size)
        if key not in OUTPUTS:  # a sum over steps, of x times what was rounded at size 1
            size = max(size, x * max(dy, 1.0) * case.T * case.B) if not relative else size
        least = float(np.finfo(case.dtype).smallest_subnormal)
        found[key] = NUDGES * far + EPSILONS * terms * (eps * size + least)
    return found


def nudged(given: Numbers, eps: float, seed: int) -> Numbers:
    """The numbers, each changed by one rounding up or down."""
    rng = np.random.default_rng(seed)

    def nudge(v: Any) -> Any:
        if v is None:
            return None
        return v.astype("float64") * (1 + eps * rng.choice([-1.0, 1.0], v.shape))

    weights = {k: nudge(v) for k, v in given.weights.items()}
    arrays = map(nudge, (given.x, given.h0, given.dy, given.dh))
    return Numbers(*arrays, given.steps, weights)


def check(case: Case, only: str | None = None) -> list[str]:
    """Run a case in every way; return what does not agree."""
    given, found = numbers(case), []
    try:
        exact = ours(case, given, "plain", "float64")
    except DifferenceError as e:
        return [str(e)]
    limits = rounding(case, given, exact)
    ways = [(path, lambda path=path: ours(case, given, path)) for path in ("plain", *PATHS)]
    if case == plain(case):
        ways += [(name, lambda run=run: run(case, given)) for name, run in OTHERS.items()]
    for name, run in ways:
        if only is None or name == only:
            try:
                other = run()
                if other is not None:
                    compare(case, name, other, exact, limits)
            except DifferenceError as e:
                found.append(str(e))
            except Exception as e:
                found.append(f"{name}: {type(e).__name__}: {e}")
    return found


# other libraries ----------------------------------------------------------------------------------


def plain(case: Case) -> Case:
    """The case without what other libraries do not have."""
    return dataclasses.replace(case, merge="concat", **dict.fromkeys(OPTIONS, False))


def by_torch(case: Case, given: Numbers) -> dict[str, Any] | None:
    """PyTorch's GRU and its gradients, in the case's dtype; None where it cannot."""
    import torch

    lengths = given.steps["lengths"]
    if not case.reset_after or not case.T * case.B or (lengths is not None and not lengths.all()):
        return None
    gru = torch.nn.GRU(case.I, case.H, case.layers, bias=case.bias,
                       bidirectional=case.bidirectional)  # fmt: skip
    gru = gru.to(getattr(torch, case.dtype))
    gru.load_state_dict({k: torch.tensor(v) for k, v in given.weights.items()})
    D = 1 + case.bidirectional
    h0 = np.zeros((case.layers * D, case.B, case.H), case.dtype) if given.h0 is None else given.h0
    x, h0 = (torch.tensor(np.array(v), requires_grad=True) for v in (given.x, h0))
    if lengths is None:
        y, h_n = gru(x, h0)
    else:
        rnn = torch.nn.utils.rnn
        packed = rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        y, h_n = gru(packed, h0)
        y, _ = rnn.pad_packed_sequence(y, total_length=case.T)
    pairs = [(y, given.dy), (h_n, given.dh)]
    pairs = [(v, torch.tensor(np.array(d))) for v, d in pairs if d is not None]
    torch.autograd.backward([v for v, _ in pairs], [d for _, d in pairs])
    found = {"y": y.detach(), "h_n": h_n.detach(), "dx": x.grad, "dh0": h0.grad}
    found |= {k: v.grad for k, v in gru.named_parameters()}
    return {k: v.numpy() for k, v in found.items() if v is not None}


def by_onnx(case: Case, given: Numbers) -> dict[str, Any] | None:
    """The model as an ONNX file, run by onnxruntime; None where it cannot.

    It is not asked about NaN, nor about infinities, whose differences are NaN: its activations make
    numbers of them. A quarter of the cases will do, since a file takes time.
    """
    defined = case.kind not in ("nan", "infinite")
    if case.dtype != "float32" or not (case.T and case.B and defined) or case.data % 4:
        return None
    import onnxruntime

    from gru_any.convert import onnx

    gru = model(case, case.dtype)
    gru.load_params(given.weights)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(path, gru)
        file = path.read_bytes()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(file, options)
    wanted = {v.name: v for v in session.get_inputs()}
    return run_session(case, given, session, wanted)


def run_session(case: Case, given: Numbers, session: Any, wanted: Any) -> dict[str, Any] | None:
    """Feed what the file asks for."""
    D = 1 + case.bidirectional
    zeros = np.zeros((case.layers * D, case.B, case.H), "float32")
    lengths = given.steps["lengths"]
    lengths = np.full(case.B, case.T) if lengths is None else lengths
    feeds = {"x": np.array(given.x), "h0": zeros if given.h0 is None else np.array(given.h0),
             "lengths": lengths.astype("int32")}  # fmt: skip
    y, h_n = session.run(["y", "h_n"], {k: v for k, v in feeds.items() if k in wanted})
    return {"y": y, "h_n": h_n}


OTHERS = {"torch": by_torch, "onnxruntime": by_onnx}


# shrinking ----------------------------------------------------------------------------------------


def shrunk(case: Case, name: str) -> Case:
    """A case as simple as can be found in which the same way still differs."""
    while True:
        for simpler in candidates(case):
            if any(text.startswith(f"{name}:") for text in check(simpler, name)):
                case = simpler
                break
        else:
            return case


def candidates(case: Case) -> Iterator[Case]:
    """Cases with one thing simpler."""
    for field, values in SIMPLER.items():
        now = getattr(case, field)
        if field == "dh" and not case.dy:
            continue
        for value in itertools.takewhile(lambda v: v != now, values):  # noqa: B023
            merge = {} if field != "bidirectional" else {"merge": "concat"}
            yield dataclasses.replace(case, **{field: value}, **merge)


def report(seed: int) -> list[str]:
    """Check the case of a seed, and print what is needed to see a difference again."""
    case = random_case(seed)
    found = check(case)
    for text in found:
        small = shrunk(case, text.partition(":")[0])
        again = check(small, text.partition(":")[0])
        print(f"seed {seed}: {text}\n  {case}\n  shrunk: {again}\n  check({small})", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--start", type=int, default=0, help="the first seed (0)")
    parser.add_argument("--seed", type=int, help="this case alone")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    seeds = [args.seed] if args.seed is not None else range(args.start, args.start + args.cases)
    begun = time.perf_counter()
    bad = sum(bool(report(seed)) for seed in tqdm(seeds, mininterval=20))
    minutes = (time.perf_counter() - begun) / 60
    print(f"{len(seeds) - bad} of {len(seeds)} cases agree in every way; {minutes:.1f} minutes")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

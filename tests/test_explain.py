"""What `explain` says, held against what the model does."""

import ast
import re

import numpy as np
import pytest
from conftest import require, running

import gru_any
from gru_any import GRU, Chain, Dropout, Embedding, GRUCell, Linear, equations, explain
from gru_any.backend import Mode


def block(text, heading):
    """The indented lines after a heading."""
    lines = text[text.index(heading) :].splitlines()[1:]
    return [line.strip() for line in lines[: next(i for i, v in enumerate(lines) if v[0] != " ")]]


def thirds(v, n=3):
    return np.split(v, n, axis=-1)


@pytest.mark.parametrize("after", [False, True])
def test_the_printed_equations_compute_what_the_model_does(after):
    """The lines run as Python, with sigmoid and tanh in their own words."""
    H, rng = 4, np.random.default_rng(0)
    gru = GRU(3, H, reset_after=after, dtype="float64", seed=1)
    x, h = rng.standard_normal((1, 2, 3)), rng.standard_normal((2, H))
    p = gru.params
    names = {
        "sigmoid": lambda v: 1 / (1 + np.exp(-v)), "tanh": np.tanh, "thirds": thirds,
        "halves": lambda v: thirds(v, 2), "concat": np.concatenate,
        "x": x[0], "h": h, "W": p["weight_ih_l0"], "U": p["weight_hh_l0"], "b": p["bias_ih_l0"],
    }  # fmt: skip
    if after:
        extra = p["bias_hh_l0"].copy()
        names["c"], extra[2 * H :] = extra[2 * H :].copy(), 0
        names["b"] = names["b"] + extra
    text = explain(gru)
    lines = block(text, "For all steps") + block(text, "Each step")
    exec("\n".join(lines).replace("h'", "new"), names)
    assert np.allclose(names["new"], gru(x, h[None])[0][0], rtol=1e-12, atol=1e-14)

    (_, _), pullback = gru.vjp(x, h[None])
    names["g"] = rng.standard_normal((2, H))
    names["saved"] = [names[k] for k in ("r", "z", "n", "m" if after else "s")]
    exec("\n".join(block(text, "Its gradient")), names)
    assert np.allclose(names["dh"], pullback(names["g"][None])[2][0], rtol=1e-12, atol=1e-14)


def test_another_equation_is_another_text(monkeypatch):
    def step(xp, a, h, U):
        return h + a[..., :3], (h, h, h, h)

    other = equations.Variant(step, equations.reset_before_backward, None)
    monkeypatch.setattr(equations, "variant", lambda after, f: other)
    assert block(explain(GRU(2, 3)), "Each step") == ["h' = h + a[..., :3]"]


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (GRU(8, 16), None, ["x (T, B, 8) -> y (T, B, 16), h_n (1, B, 16)"]),
        (GRU(8, 16, 2, bidirectional=True), (5, 3, 8), ["y (5, 3, 32), h_n (4, 3, 16)"]),
        (GRU(8, 16, batch_first=True), (5, 3, 8), ["y (5, 3, 16), h_n (1, 5, 16)"]),
        (GRU(8, 16, reverse=True), (5, 3, 8), ["end.\n", "weight_hh_l0_reverse"]),
        (GRU(8, 16), (5, 8), ["x (5, 8) -> y (5, 16), h_n (1, 16)"]),
        (GRUCell(8, 16), (8,), ["x (8,) -> (16,)"]),
        (
            Chain(Embedding(9, 4), Dropout(0.5), GRU(4, 6), Linear(6, 9)),
            (7, 2),
            ["x (7, 2) -> (7, 2, 4)", "y (7, 2, 6), h_n (1, 2, 6)", "x (7, 2, 6) -> (7, 2, 9)"],
        ),
    ],
)
def test_shapes(model, shape, expected):
    text = explain(model, shape)
    for part in expected:
        assert part in text
    if shape:
        x = np.zeros(shape, int if isinstance(model, Chain) else "float32")
        y = model(x)
        y = y[0] if isinstance(y, tuple) else y
        assert str(y.shape) in text


def test_every_parameter_is_listed_with_its_count():
    model = Chain(GRU(3, 5, 2, bidirectional=True, reset_after=True), Linear(10, 2))
    for name, array in model.params.items():
        row = rf"^{name.partition('.')[2]} +{re.escape(str(array.shape))} +{array.size}$"
        assert re.search(row, explain(model), re.MULTILINE)


@pytest.mark.parametrize(
    ("way", "why"),
    [
        ("plain", "GRU_ANY_PLAIN is set."),
        ("traced", "GRU_ANY_NO_NUMBA is set."),
        ("compiled", "this is the fastest way on NumPy."),
    ],
)
def test_the_way_of_a_call(way, why):
    if way == "compiled":
        require("numba")
    with running(way):
        line = next(v for v in explain(GRU(2, 3)).splitlines() if v.startswith("A call runs"))
    assert line.startswith(f"A call runs {way}: ")
    assert line.endswith(f"Why not faster: {why}")


def test_every_way_has_words():
    from gru_any.backend import modes as run

    assert set(Mode) == {"traced", "compiled", "scan", *run.CUDA_MODES}
    assert all(mode.words for mode in Mode)
    assert "A call runs plain" in explain(GRU(2, 3, dtype="complex128"))


def test_latex_is_readable_by_another_program():
    """Each line goes through matplotlib's parser of formulas."""
    from matplotlib.mathtext import MathTextParser

    parser = MathTextParser("path")
    for after in (False, True):
        text = explain(GRU(8, 16, reset_after=after), format="latex")
        assert text.count(r"\begin{align*}") == text.count(r"\end{align*}") == 3
        lines = re.findall(r"^(.* &= .*?)(?: \\\\)?$", text, re.MULTILINE)
        assert len(lines) == 15 + after
        for line in lines:
            parser.parse(f"${line.replace('&', '')}$")
    assert r"h' &= z \odot h + (1 - z) \odot n" in text
    assert r"weight\_ih\_l0" in text


def test_formulas_keep_their_parentheses():
    from gru_any.inspect.formulas import latex

    cases = {"a - (b - c)": "a - (b - c)", "(a + b) @ U.T": r"(a + b)\, U^{\top}",
             "a - b + c": "a - b + c", "(a * b) * c": r"a \odot b \odot c"}  # fmt: skip
    for python, expected in cases.items():
        assert latex(ast.parse(python).body[0].value) == expected


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"format is 'html', expected \"text\" or \"latex\""):
        explain(GRU(2, 3), format="html")
    with pytest.raises(ValueError, match=r"shape is \(5, 3, 9\), expected \(T, B, I\)"):
        explain(GRU(8, 3), (5, 3, 9))
    with pytest.raises(TypeError, match="explain takes a layer or a Chain, not a Params"):
        explain(gru_any.GRU(2, 3).params)

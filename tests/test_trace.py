"""The list of operations of a step, against the step."""

import numpy as np
import pytest

from gru_any import equations
from gru_any.backend.reductions import program_of
from gru_any.codegen.trace import MATRIX, Op, Product, trace, trace_reductions


def run(program, arrays, U):
    """Carry out a list of operations, each as it says."""
    H, columns = U.shape[1], {}
    for ids, array in zip(program.inputs, arrays, strict=True):
        for i, column in enumerate(ids):
            columns[column] = array[..., i * H : (i + 1) * H]
    for op in program.ops:
        if isinstance(op, Product):
            rows = U[op.rows.start * H : op.rows.stop * H]
            left = np.concatenate([columns[i] for i in op.inputs], axis=-1)
            result = left @ (rows.T if op.transposed else rows)
            for i, column in enumerate(op.outputs):
                columns[column] = result[..., i * H : (i + 1) * H]
        else:
            values = [i if isinstance(i, float) else columns[i] for i in op.inputs]
            columns[op.output] = getattr(np, op.name)(*values)
    extras = [np.concatenate([columns[i] for i in ids], axis=-1) for ids in program.extras]
    return columns[program.result], extras


def arrays(*widths, B=3, H=5, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((B, n * H)) for n in widths], rng.standard_normal((3 * H, H))


CASES = {
    "after": (equations.reset_after, (3, 1, MATRIX, 1)),
    "before": (equations.reset_before, (3, 1, MATRIX)),
    "after_backward": (equations.reset_after_backward, (1, 1, (1, 1, 1, 1), MATRIX)),
    "before_backward": (equations.reset_before_backward, (1, 1, (1, 1, 1, 1), MATRIX)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_list_does_what_the_step_does(name):
    step, arguments = CASES[name]
    widths = [n for a in arguments for n in (a if isinstance(a, tuple) else (a,))]
    values, U = arrays(*(n for n in widths if n != MATRIX))
    if name == "after":
        values[2] = values[2][0]
    found, extras = run(trace(step, *arguments), _with_matrix(values, widths, U), U)
    flat = iter(_with_matrix(values, widths, U))
    filled = [tuple(next(flat) for _ in a) if isinstance(a, tuple) else next(flat)
              for a in arguments]  # fmt: skip
    expected, expected_extras = step(np, *filled)
    assert np.allclose(found, expected, rtol=1e-14, atol=1e-15)
    assert len(extras) == len(expected_extras)
    for a, b in zip(extras, expected_extras, strict=True):
        assert np.allclose(a, b, rtol=1e-14, atol=1e-15)


def _with_matrix(values, widths, U):
    flat = iter(values)
    return [U if n == MATRIX else next(flat) for n in widths]


def test_without_extras_only_what_is_needed_remains():
    program = trace(equations.reset_after, 3, 1, MATRIX, 1)
    short = program.without_extras()
    assert short.extras == []
    assert short.ops == program.ops  # all that is saved is used for the result as well

    def step(xp, h, U):
        return h + h, (xp.tanh(h), h @ U.T)

    program = trace(step, 1, MATRIX)
    assert [type(op) for op in program.ops] == [Op, Op, Product]
    assert program.without_extras().ops == [Op("add", (0, 0), 1)]


def test_what_was_done_before_is_not_done_again():
    program = trace(lambda xp, h, U: (xp.tanh(h) * xp.tanh(h), (1.0 - h, 1.0 - h)), 1, MATRIX)
    assert [op.name for op in program.ops] == ["tanh", "multiply", "subtract"]


def test_numbers_that_follow_one_another_are_joined():
    program = trace(lambda xp, h: (0.5 + 0.5 * (1.0 - 2.0 / (0.5 * (4.0 * h))), ()), 1)
    found = [(op.name, op.inputs[0]) for op in program.ops]
    assert found == [("multiply", 2.0), ("divide", 1.0), ("subtract", 1.0)]
    assert run(program, [np.array([[0.25, 8.0]])], np.empty((6, 2)))[0].tolist() == [[-1.0, 0.9375]]


def test_an_input_times_one_is_a_result_of_its_own():
    """Results are written somewhere, and an input is not."""
    program = trace(lambda xp, h: (2.0 * (0.5 * h), ()), 1)
    assert [op[:2] for op in program.ops] == [("multiply", (1.0, 0))]


def test_what_cannot_be_traced_is_said():
    with pytest.raises(AttributeError, match=r"xp\.cos cannot be traced"):
        trace(lambda xp, h: (xp.cos(h), ()), 1)


def test_a_program_prints_as_it_is_read():
    def step(xp, a, h, U):
        q = h @ U[:2, :].T
        n = xp.tanh(a + q[..., :1])
        return 0.5 - n * q[..., 1:], (n,)

    assert str(trace(step, 1, 1, MATRIX)).splitlines() == [
        "inputs v0; v1; U",
        "  v2, v3 = (v1) @ U[0:2].T",
        "  v4 = v0 + v2",
        "  v5 = tanh(v4)",
        "  v6 = v5 * v3",
        "  v7 = 0.5 - v6",
        "return v7; v5",
    ]


def test_the_gradients_to_the_weights_are_listed():
    before = trace_reductions(equations.reset_before_weights, 1, (1, 1, 1, 1), 3)
    assert str(before).splitlines() == [
        "inputs v0; v1; v2; v3; v4; v5, v6, v7",
        "  (v5, v6).T @ (v0) | (v7).T @ (v4)",
    ]
    after = trace_reductions(equations.reset_after_weights, 1, (1, 1, 1, 1), 3, 3)
    assert str(after).splitlines()[1:] == ["  (v8, v9, v10).T @ (v0)", "  sum(v8, v9, v10)"]


def test_gradients_to_the_weights_of_other_operations_are_refused():
    with pytest.raises(ValueError, match="before it sums over the rows"):
        program_of(lambda xp, h, saved, da: (da.T @ (2.0 * h),), 1, (3,))

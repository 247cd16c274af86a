"""The schedule, carried out as it says, against the step; and what the printers make of it."""

from pathlib import Path

import numpy as np
import pytest
from conftest import PATHS
from replaced import replaced

from gru_any import equations
from gru_any.backend.cpu.numpy_runner import columns_of, executed, steps_over, transposed
from gru_any.codegen import (
    c_source,
    cuda_source,
    javascript_source,
    numba_source,
    numpy_source,
    trace,
)
from gru_any.codegen.__main__ import page
from gru_any.codegen.javascript_source import javascript
from gru_any.codegen.numba_source import NumbaSource
from gru_any.codegen.numpy_source import NumPySource
from gru_any.codegen.schedule import (
    DEVICE,
    HOST,
    Finished,
    Gemm,
    Kind,
    backward_schedule,
    forward_schedule,
)

TARGETS = pytest.mark.parametrize("target", [HOST, DEVICE], ids=["host", "device"])
B, H = 3, 4


def carried_out(schedule, arrays, before, U, on):
    """Do what the stages of one step say, in place; arrays: by name and kind."""
    before = before.copy()
    made = {(v.name, v.kind): np.full((B, v.columns * H), np.nan) for v in schedule.buffers}
    memory = {**arrays, **made}

    def part(place, count=1):
        (name, kind, _), n = place
        return memory[name, kind][..., n * H : (n + count) * H]

    for stage in schedule.stages:
        if isinstance(stage, Gemm):
            rows = U[stage.product.rows.start * H : stage.product.rows.stop * H]
            product = part(stage.operand, stage.width) @ (
                rows.T if stage.product.transposed else rows
            )
            out = memory[stage.out.name, stage.out.kind]
            out[...] = out + product if stage.add else product
            continue
        values = {column: part(place).copy() for column, place in stage.loads}
        for op in stage.ops:
            inputs = [i if isinstance(i, float) else values[i] for i in op.inputs]
            values[op.output] = getattr(np, op.name)(*inputs)
        for column, place, finished in stage.stores:
            other = {Finished.KEPT: before, Finished.ZERO: 0 * before}.get(finished)
            value = values[column]
            part(place)[...] = value if other is None else np.where(on, value, other)


def beside_an_input(xp, a, h, U, c):
    """A product of columns of which no operation makes one."""
    H = h.shape[-1]
    both = xp.concat((h, xp.tanh(h)), axis=-1)
    return both @ U[: 2 * H, :] + equations.thirds(a)[2] * c, (h,)


def products_as_results(xp, a, h, U, c):
    """What no operation makes is returned, and is multiplied again."""
    H = h.shape[-1]
    q = h @ U[:H, :].T
    return q, (q, q @ U[H : 2 * H, :], h, q * c)


def state_read_late(xp, a, h, U, c):
    """The state before the step is needed when the state after it is there."""
    H = h.shape[-1]
    new = xp.tanh(equations.thirds(a)[0] + h)
    return new, (h * (new @ U[:H, :].T), h @ U[H : 2 * H, :].T, h + c)


def product_of_a_vector(xp, a, h, U, c):
    """A product of what is the same for all rows."""
    return h * (c @ U[: h.shape[-1], :].T), (h + c,)


def adds_to_the_state(xp, a, h, U, c):
    """The last product may be added where a device keeps the state."""
    v = xp.tanh(h) * c
    return v + (v * h) @ U[: h.shape[-1], :].T, (h,)


def a_number_like_a_column(xp, a, h, U, c):
    """1.0 is a number, and 1 the number of a column."""
    z = equations.thirds(a)[1]
    return (z - h) * (1.0 - h), (z * c, 1.0 * c)


def reset_before(xp, a, h, U, c):
    return equations.reset_before(xp, a, h, U)


STEPS = [
    equations.reset_after, reset_before, replaced(True)[0][1], beside_an_input,
    products_as_results, state_read_late, product_of_a_vector, adds_to_the_state,
    a_number_like_a_column,
]  # fmt: skip
EVERY_STEP = pytest.mark.parametrize("step", STEPS, ids=[step.__name__ for step in STEPS])


def problem(seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((B, 3 * H), (B, H), (3 * H, H), (H,))
    return [rng.standard_normal(shape) for shape in shapes]


@EVERY_STEP
@TARGETS
def test_the_stages_do_what_the_step_does(step, target):
    """Of a sequence that has finished the state stays."""
    a, h, U, c = problem()
    result, extras = step(np, a, h, U, c)
    schedule, on = forward_schedule(step, 1, True, target), np.array([True, False, True])[:, None]
    arrays = {("a", Kind.PROJECTION): a, ("c0", Kind.VECTOR): np.tile(c, (B, 1))}
    before = ("state", Kind.STATE) if target is DEVICE else ("path", Kind.BEFORE)
    arrays |= {before: h.copy(), ("path", Kind.AFTER): np.empty((B, H))}
    arrays |= {(v.name, v.kind): np.empty((B, H)) for v in schedule.extras}
    carried_out(schedule, arrays, arrays[before], U, on)
    for kind in {Kind.AFTER, *([Kind.STATE] if target is DEVICE else [])}:
        found = arrays["state" if kind is Kind.STATE else "path", kind]
        np.testing.assert_allclose(found, np.where(on, result, h), rtol=1e-13)
    for array, value in zip(schedule.extras, extras, strict=True):
        value = np.broadcast_to(value, (B, H))
        found = arrays[array.name, array.kind]
        np.testing.assert_allclose(found[on[:, 0]], value[on[:, 0]], rtol=1e-13)


def run_on_numpy(source, schedule):
    """Run a printed scan of one step -> the state and the extras."""
    a, h, U, c = problem()
    path = np.empty((2, H, B)).swapaxes(1, 2)
    path[0] = h
    extras = [np.empty((1, H, B)).swapaxes(1, 2) for _ in schedule.extras]
    a = np.ascontiguousarray(a[None].swapaxes(1, 2)).swapaxes(1, 2)
    arrays = [*columns_of(a, 3), transposed(a)[:, : 2 * H]]
    arrays += map(transposed, (path[:1], path[1:], *extras))
    scan = executed(source)
    scan(steps_over(arrays, None, False), U, [c[:, None].repeat(B, axis=1)], (H, B), a.dtype)
    return path[1], *(v[0] for v in extras)


@EVERY_STEP
def test_numpy_does_what_the_step_does(step):
    schedule = forward_schedule(step, 1, True, HOST)
    result, extras = step(np, *problem())
    found = run_on_numpy(NumPySource(schedule), schedule)
    for ours, value in zip(found, (result, *extras), strict=True):
        np.testing.assert_allclose(ours, np.broadcast_to(value, (B, H)), rtol=1e-13)


@pytest.mark.skipif("compiled" not in PATHS, reason="numba: not installed")
@pytest.mark.parametrize("step", [beside_an_input, products_as_results])
def test_numba_does_what_the_step_does(step):
    from gru_any.backend.cpu import unpacked
    from gru_any.backend.cpu.jit_cache import compiled

    schedule, (a, h, U, c) = forward_schedule(step, 1, True, HOST), problem()
    result, extras = step(np, a, h, U, c)
    steps = (np.array([n]) for n in (0, 0, 1))
    none = np.zeros((0, 0), bool), np.zeros((1, B, 0)), np.zeros((3 * H, 0)), np.zeros(3 * H)
    few = compiled(NumbaSource(schedule, "float64").stored()).few
    functions = unpacked.addresses(np.dtype("float64"), frozenset((False, True)))
    path, kept = np.stack((h, h)), [np.empty((1, *v.shape)) for v in extras]
    few(functions, *steps, none[0], U, a[None], c, *none[1:], path, *kept)
    for ours, value in zip((path[1], *(v[0] for v in kept)), (result, *extras), strict=True):
        np.testing.assert_allclose(ours, np.broadcast_to(value, (B, H)), rtol=1e-12)


def test_a_backward_scan_reads_what_stands_side_by_side():
    """The parts that a step returns are operands of its products on the host, copies elsewhere."""
    for target, names in ((HOST, ["p0", "p0"]), (DEVICE, ["x1", "x3"])):
        schedule = backward_schedule(equations.reset_before_backward, 4, True, False, target)
        assert [gemm.operand.array.name for gemm in schedule.gemms] == names
        assert [gemm.add for gemm in schedule.gemms] == [False, target.adds]


def test_a_new_operation_is_one_entry_for_each_target(monkeypatch):
    """abs, for example, and one in the tracer."""
    monkeypatch.setattr(trace, "FUNCTIONS", [*trace.FUNCTIONS, "abs"])
    monkeypatch.setitem(numpy_source.FUNCTIONS, "abs", "absolute")
    monkeypatch.setitem(numba_source.OPERATIONS, "abs", "abs({})")
    monkeypatch.setitem(cuda_source.OPERATIONS, "abs", "fabs{f}({})")
    monkeypatch.setitem(javascript_source.OPERATIONS, "abs", "Math.abs({})")
    monkeypatch.setitem(c_source.OPERATIONS, "abs", "fabsf({})")

    def step(xp, a, h, U, c):
        return xp.abs(h) + c, (h, h, h)

    schedule, (_, h, _, c) = forward_schedule(step, 1, True, HOST), problem()
    printer = NumPySource(schedule)
    assert "absolute(before, " in printer.source()
    np.testing.assert_array_equal(run_on_numpy(printer, schedule)[0], np.abs(h) + c)
    assert "= abs(v3)" in NumbaSource(schedule, "float32").scan()
    for number, name in (("float32", "fabsf"), ("float64", "fabs")):
        scan = cuda_source.forward_scan(step, 1, True, number)
        assert f"= {name}(v3);" in scan.set_table.source
    assert "= Math.abs(v3);" in javascript(schedule)
    in_place = forward_schedule(step, 1, False, c_source.IN_PLACE)
    assert "= fabsf(v3);" in c_source.CSource(in_place, "it", False).function(2, 3, False)


def test_the_page_of_the_documentation_is_what_the_command_prints():
    text = (Path(__file__).parent.parent / "docs" / "targets.md").read_text("utf-8")
    assert text == page(), "python -m gru_any.codegen > docs/targets.md"

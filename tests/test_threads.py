"""Threads on the CPU: the same bits however many, and none where others hold the processors."""

import math
import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import numpy as np
import pytest
from conftest import PATHS, require, running, started, tuned

from gru_any import GRU
from gru_any.backend.cpu import cores, openmp, threads, tuning

VARIANTS = pytest.mark.parametrize("reset_after", [False, True], ids=["before", "after"])
EVERY = pytest.mark.parametrize("path", PATHS)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells")


@EVERY
@VARIANTS
@pytest.mark.parametrize("B", [13, 64])
def test_threads_change_nothing(path, reset_after, B, monkeypatch):
    """The same bits however the rows are split."""
    gru, rng = GRU(7, 20, reset_after=reset_after, seed=0), np.random.default_rng(0)
    x, dy = (rng.standard_normal((70, B, n)).astype("float32") for n in (7, 20))

    def everything():
        (y, h), pullback = gru.vjp(x, lengths=np.arange(B) % 71)
        grads, dx, dh0 = pullback(dy)
        return [y, h, dx, dh0, *grads.values()]

    with running(path):
        expected = everything()
        monkeypatch.setattr(threads, "count", lambda: 3)
        for crowded in (False, True):
            monkeypatch.setattr(threads.crowd, "present", lambda: crowded)  # noqa: B023
            with tuned(thread_work=1):
                found = everything()
            assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.skipif("compiled" not in PATHS, reason="numba: not installed")
@VARIANTS
@pytest.mark.parametrize("B", [1, 3])
def test_threads_that_share_the_units_change_nothing(reset_after, B, monkeypatch):
    """With few rows the threads wait for each other at each product; a busy pool is left out."""
    gru, rng = GRU(7, 192, reset_after=reset_after, seed=0), np.random.default_rng(0)
    x, dy = (rng.standard_normal((20, B, n)).astype("float32") for n in (7, 192))
    called = []

    def run_team(call, rows, most, original=threads.run_team):
        called.append(most)
        original(call, rows, most)

    def everything():
        (y, h), pullback = gru.vjp(x)
        grads, dx, dh0 = pullback(dy)
        return [y, h, dx, dh0, *grads.values()]

    with running("packed"):
        import gru_any.backend.cpu.numba_runner as runner_of_numba

        monkeypatch.setattr(runner_of_numba, "count", lambda: 1)
        expected = everything()
        monkeypatch.setattr(runner_of_numba, "count", lambda: 3)
        monkeypatch.setattr(runner_of_numba, "run_team", run_team)
        monkeypatch.setattr(threads, "count", lambda: 3)
        for crowded in (False, True):
            monkeypatch.setattr(threads.crowd, "present", lambda: crowded)  # noqa: B023
            for polls in (10**10, 0):  # until all have come; those that are late are left out
                with tuned(thread_work=1, wake_polls=polls):
                    found = everything()
                assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert called == [3] * 8


# work is handed over ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mark():
    """A call that adds (1, number of the thread) to its rows of `marks`, after some work."""
    pytest.importorskip("numba", reason="numba: not installed")
    from numba import njit

    from gru_any.backend.cpu import handoff

    @njit(nogil=True)
    def some(first, last, me, marks, work):
        for row in range(first, last):
            x = 1.0
            for _ in range(work):
                x = 1 / (1 + x)
            marks[row, 0] += 1 + 0 * int(x)
            marks[row, 1] += me

    entry = handoff.entry_of(some)

    @njit(nogil=True)
    def shared(boxes, hired, edges, sync, polls, marks, work):
        return handoff.share(boxes, hired, edges, sync, polls, *entry((marks, work)))

    return shared


def test_each_row_is_done_once_whoever_comes(mark):
    """By those who come at once, by one who never comes, and by one who comes late."""
    from gru_any.backend.cpu import handoff

    workers = threads._Workers(3)
    for hired in ([], [0], [2, 0, 1]):  # none of them has been started
        for _ in range(200):
            marks = np.zeros((24, 2), np.int64)
            edges = np.linspace(0, 24, len(hired) + 2).astype(np.int64)
            mark(workers.boxes, np.array(hired, np.int64), edges, threads.NO_TEAM, 0, marks, 10)
            assert (marks[:, 0] == 1).all()
    called = workers.hire(2, [])
    assert len(called) == 2
    helped, tickets = 0, handoff.TICKET
    for n in range(300):
        marks = np.zeros((24, 2), np.int64)
        hands = workers.boxes, np.array(called, np.int64), np.array([0, 8, 16, 24])
        mark(*hands, threads.NO_TEAM, 0, marks, 100 * (n % 40))
        assert (marks[:, 0] == 1).all()
        helped += sum(box[handoff.DONE] == box[tickets] for box in workers.boxes[called])
    assert helped or len(os.sched_getaffinity(0)) == 1


@pytest.fixture
def three_of_openmp():
    """PyTorch's OpenMP, with three threads."""
    torch = require("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    if openmp._openmp() is None:
        pytest.skip("no OpenMP with GNU's interface in this process")
    yield
    torch.set_num_threads(before)


def test_threads_of_openmp_do_each_row_once(mark, three_of_openmp, monkeypatch):
    """As many as there are parts, more, and fewer."""
    assert openmp.region(1) is None, "outside of `lent`"
    with openmp.lent:
        regions = [openmp.region(2), openmp.region(1), openmp.Region(openmp._openmp().region, 5)]
        assert openmp.region(3) is None
        monkeypatch.setattr(openmp.Lent, "forked", True)
        with openmp.lent:
            assert openmp.region(1) is None, "a forked child has no threads of OpenMP"
    for region in regions:
        helped = 0
        for n in range(200):
            hired = region.hire(len(region.boxes), [])
            edges = np.linspace(0, 24, len(hired) + 2).astype(np.int64)
            marks = np.zeros((24, 2), np.int64)
            hands = region.boxes, np.array(hired, np.int64), edges, threads.NO_TEAM, 0
            mark(*hands, marks, 100 * (n % 40))
            assert (marks[:, 0] == 1).all()
            helped += (marks[:, 1] > 0).any()
        assert helped


@pytest.mark.parametrize("B", [2, 24])
def test_threads_of_openmp_compute_the_same_bits(B, three_of_openmp, monkeypatch):
    """As a team (2 rows) and with rows of their own (24)."""
    pytest.importorskip("numba", reason="numba: not installed")
    import gru_any.backend.cpu.numba_runner as runner_of_numba

    gru, rng = GRU(7, 192, seed=0), np.random.default_rng(0)
    x, dy = (rng.standard_normal((20, B, n)).astype("float32") for n in (7, 192))
    made = []

    def everything():
        (y, h), pullback = gru.vjp(x)
        grads, dx, dh0 = pullback(dy)
        return [y, h, dx, dh0, *grads.values()]

    def region(wanted, original=openmp.region):
        made.append(original(wanted))
        return made[-1]

    with running("packed"):
        monkeypatch.setattr(runner_of_numba, "count", lambda: 1)
        expected = everything()
        for module in (runner_of_numba, threads):
            monkeypatch.setattr(module, "count", lambda: 3)
        monkeypatch.setattr(threads.crowd, "present", lambda: False)
        monkeypatch.setattr(openmp, "region", region)
        with tuned(thread_work=1, wake_polls=10**6), openmp.lent:
            found = everything()
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert made
    assert None not in made


def test_workers_are_hired_by_one_at_a_time(mark):
    workers = threads._Workers(2)
    mine, others = [], []
    first, second = workers.hire(1, mine), workers.hire(5, others)
    assert sorted(first + second) == [0, 1]
    assert workers.hire(1, []) == []
    workers.free.extend(others)
    assert workers.hire(1, []) == second


def test_many_callers_share_the_workers(mark, monkeypatch):
    monkeypatch.setattr(threads, "count", lambda: 3)
    monkeypatch.setattr(threads, "crowd", cores.Crowd())
    wrong = []

    def caller():
        for n in range(200):
            marks = np.zeros((64, 2), np.int64)
            threads.parallel_for(lambda hands: mark(*hands, marks, 10 * n), 64, 10**9)  # noqa: B023
            if not (marks[:, 0] == 1).all():
                wrong.append(n)

    callers = [threading.Thread(target=caller) for _ in range(4)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert wrong == []


def test_no_thread_compiles(mark, monkeypatch):
    """A process may fork at any time after the workers are there."""
    compiled = []

    def note(source, original=threads.compiled):
        compiled.append(threading.current_thread())
        return original(source)

    monkeypatch.setattr(threads, "compiled", note)
    workers = threads._Workers(2)
    assert len(workers.hire(2, [])) == 2
    time.sleep(0.05)
    assert compiled == [threading.main_thread()]


@LINUX
def test_workers_keep_off_the_processor_of_the_caller(mark):
    workers, allowed = threads._Workers(1), os.sched_getaffinity(0)
    workers.hire(1, [])
    for processor in allowed:
        workers.keep_off(processor)
        found = os.sched_getaffinity(workers._started[0].native_id)
        assert found == (allowed - {processor} or allowed)
    assert os.sched_getaffinity(0) == allowed


def test_a_thread_that_cannot_be_had_is_done_without(mark, monkeypatch):
    def start(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    workers = threads._Workers(2)
    monkeypatch.setattr(threads, "_workers", lambda: workers)
    monkeypatch.setattr(threads, "count", lambda: 2)
    monkeypatch.setattr(threads, "crowd", cores.Crowd())
    threads._warn.cache_clear()
    marks = np.zeros((64, 2), np.int64)
    with pytest.warns(RuntimeWarning, match="can't start new thread"):
        threads.parallel_for(lambda hands: mark(*hands, marks, 10), 64, 10**9)
    threads.run_team(lambda hands: mark(*hands, marks, 10), 64, 2)
    assert (marks == (2, 0)).all()


def test_rows_are_split_only_where_each_thread_multiplies_its_own_inputs():
    """Below `few_rows` the inputs of all steps are one product, whose rows are not the batch's."""
    v = tuning.current
    assert not tuning.inputs_at_once(v.few_rows)
    assert tuning.pieces(v.few_rows - 1, 10**12, 64) < 2


# how many ---------------------------------------------------------------------------------------


def group(root, line, **files):
    """A made-up system with one control group and these files, whose names have slashes."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"1:name=systemd:/\n{line}\n")
    for name, text in files.items():
        file = root / "sys/fs/cgroup" / name.replace("__", "/").replace("_max", ".max")
        file = file.with_name(file.name.replace("cfs", "cpu.cfs"))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


@pytest.mark.parametrize(
    ("line", "files", "expected"),
    [
        ("0::/", {"cpu_max": "150000 100000\n"}, 1.5),  # in a container's own name space
        ("0::/", {"cpu_max": "max 100000\n"}, math.inf),
        ("0::/pod/box", {"pod__box__cpu_max": "max 100000", "pod__cpu_max": "400000 100000"}, 4),
        ("0::/gone", {"cpu_max": "300000 100000"}, 3),  # a path that is the host's
        ("0::/", {"unified__cpu_max": "50000 100000"}, 0.5),
        ("4:cpu,cpuacct:/box", {"cpu,cpuacct__box__cfs_quota_us": "250000",
                                "cpu,cpuacct__box__cfs_period_us": "100000"}, 2.5),
        ("1:cpu:/", {"cpu__cfs_quota_us": "-1", "cpu__cfs_period_us": "100000"}, math.inf),
        ("1:cpu:/", {"cpu__cfs_quota_us": "100000", "cpu__cfs_period_us": "0"}, math.inf),
        ("2:cpuset:/", {"cpu__cfs_quota_us": "100000", "cpu__cfs_period_us": "50000"}, math.inf),
        ("0::/", {"cpu_max": "what is this"}, math.inf),
        ("what is this", {"cpu_max": "100000 100000"}, math.inf),
    ],
)  # fmt: skip
def test_the_quota_of_a_container(tmp_path, line, files, expected):
    group(tmp_path, line, **files)
    assert cores.quota(tmp_path) == expected


def test_no_quota_where_there_are_no_control_groups(tmp_path):
    assert cores.quota(tmp_path) == math.inf


@pytest.mark.parametrize(("quota", "expected"), [(math.inf, 6), (2.9, 2), (0.4, 1), (64, 6)])
def test_the_least_of_affinity_and_quota_counts(monkeypatch, quota, expected):
    monkeypatch.setattr(cores, "_answer", cores._Answer())
    monkeypatch.setattr(cores, "_affinity", lambda: 6)
    monkeypatch.setattr(cores, "quota", lambda: quota)
    assert cores.available() == expected
    monkeypatch.setattr(threads, "_asked", lambda: 2)
    assert threads.count() == min(2, expected)
    monkeypatch.setattr(threads, "_asked", lambda: 100)
    assert threads.count() == expected


@LINUX
def test_an_affinity_that_is_narrowed_after_the_start(monkeypatch):
    monkeypatch.setattr(threads, "_asked", lambda: 7)

    def narrow():
        counts.append(threads.count())
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])  # of this thread
        time.sleep(1.5 * cores.FRESH)
        counts.append(threads.count())

    counts = []
    thread = threading.Thread(target=narrow)
    thread.start()
    thread.join()
    assert counts == [cores.available(), 1]
    assert counts[0] <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize(("asked", "expected"), [("3", 3), ("3,2", 3), ("0", None), ("x", None)])
def test_what_is_asked_for(monkeypatch, asked, expected):
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert threads._asked.__wrapped__() == (expected or sys.maxsize)


# others hold the processors ---------------------------------------------------------------------


def test_a_crowd_costs_a_bounded_share(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    crowd = cores.Crowd()
    crowd.note(0.0)
    assert not crowd.present()
    lost = spent = 0.0
    while spent < 60:  # every call that is tried on several threads loses 10 ms
        if crowd.present():
            now, spent = now + 0.001, spent + 0.001
        else:
            crowd.note(0.01)
            now, spent, lost = now + 0.01, spent + 0.01, lost + 0.01
    assert 0.1 < lost < 0.02 * spent
    now += cores.LONGEST_PAUSE
    for _ in range(10):  # they have gone
        assert not crowd.present()
        crowd.note(0.0)
    crowd.note(0.001)  # and are there again for a moment
    now += 0.02
    assert not crowd.present()


@LINUX
def test_time_lost_to_others_is_seen(mark):
    """In the caller's part, and in a worker's."""
    from gru_any.backend.cpu import handoff

    home, nobody = os.sched_getaffinity(0), (np.zeros((0, 24), np.int64), threads.NOBODY)
    one, marks = np.array([0, 1]), np.zeros((2, 2), np.int64)
    code = f"import os; os.sched_setaffinity(0, {{{min(home)}}})\nprint(1, flush=True)\nwhile 1: 0"

    def lost():
        wall, own = time.perf_counter(), time.thread_time()
        found, _ = mark(*nobody, one, threads.NO_TEAM, 0, marks, work)
        ran = time.thread_time() - own
        return found * 1e-9, time.perf_counter() - wall - ran, ran

    work = 10**6
    lost()  # it may be compiled now
    while lost()[2] < 0.1:
        work *= 2
    workers, hired = threads._Workers(1), np.array([0])
    workers.hire(1, [])
    command = [sys.executable, "-c", code]
    with started(command, stdout=subprocess.PIPE) as neighbour, ExitStack() as end:
        neighbour.stdout.readline()
        end.callback(os.sched_setaffinity, 0, home)
        os.sched_setaffinity(0, {min(home)})
        found, waited, _ = lost()
        assert waited > 0.02
        assert found == pytest.approx(waited, rel=0.1)
        os.sched_setaffinity(workers._started[0].native_id, {min(home)})
        os.sched_setaffinity(0, home)
        edges, box = np.array([0, 1, 2]), workers.boxes[0]
        for _ in range(20):  # it may come too late, or have waited before it began
            workers.free.extend(hired)
            workers.hire(1, [])
            found, _ = mark(workers.boxes, hired, edges, threads.NO_TEAM, 0, marks, work)
            if found and box[handoff.DONE] == box[handoff.TICKET]:
                break
        assert found > 0


@pytest.mark.skipif("compiled" not in PATHS, reason="numba: not installed")
def test_threads_are_given_up_after_a_call_that_lost_time(monkeypatch):
    """By rows and by units; what could not be shared is done by the caller."""
    monkeypatch.setattr(threads, "count", lambda: 2)
    monkeypatch.setattr(threads, "crowd", cores.Crowd())
    sizes = []

    def call(hands):
        sizes.append((len(hands.hired), len(hands.sync), *hands.edges))
        return 30 * 10**9, -1

    with tuned(thread_work=1):
        threads.run_team(call, 64, 2)
        assert threads.crowd.present()
        threads.run_team(call, 64, 2)
        threads.parallel_for(call, 64, 10**9)
        assert sizes == [(1, 24, 0, 64), (0, 0, 0, 64), (0, 0, 0, 64)]
        monkeypatch.setattr(threads, "crowd", cores.Crowd())
        threads.parallel_for(call, 64, 10**9)
        assert sizes[-1] == (1, 0, 0, 32, 64)
        assert threads.crowd.present()

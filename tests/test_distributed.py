"""Training on several ranks of MPI: the same numbers, the same checkpoints, and no silent end."""

import json
import os
import platform
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import on_ranks
import pytest
from conftest import finished, refuse, require, running, started

from gru_any import Chain, Linear, softmax_cross_entropy
from gru_any.train import compress, distributed, fit, sentinel
from gru_any.train.data import Batch, Piece
from gru_any.train.shard import Sharded
from gru_any.train.share import SharedGenerator, digest, rows_of, take

HERE = Path(__file__).parent
SCRIPTS = HERE.parent / "scripts"


def start(size, *command, **environment):
    """Start a command on so many ranks."""
    require("mpi4py")
    launcher = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if launcher is None:
        refuse("mpi4py", "there is no mpiexec: pip install mpich")
    usual = {"PYTHONPATH": str(HERE.parent), "GRU_ANY_NO_NUMBA": "1", "OMP_NUM_THREADS": "1"}
    return started(
        [launcher, "-n", size, sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **usual, **environment},
    )


def run(size, *command, code=0, **environment):
    """Run a command on so many ranks to its end; return what it prints."""
    with start(size, *command, **environment) as process:
        out, err = process.communicate(timeout=100)
    assert (process.returncode == 0) == (code == 0), out + err
    return out + err


@pytest.fixture(scope="module")
def whole():
    """The runs in this process alone, on the path that the ranks take."""
    with running("traced"):
        return {name: on_ranks.train(name) for name in on_ranks.RECIPES}


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    run(3, HERE / "on_ranks.py", "equal", folder)
    return folder


def same(found, expected):
    """As far as another order of the sums allows, after 100 steps."""
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert np.abs(found[name] - array).max() < 1e-12, name


@pytest.mark.parametrize("name", on_ranks.RECIPES)
def test_three_ranks_train_as_one(three, whole, name):
    """Shares of unequal size and of no row, dropout, masks, lengths, validation, accumulation."""
    same(np.load(three / f"{name}.npz"), whole[name])


@pytest.mark.parametrize("name", ["cut in time", "not on the host"])
def test_a_sharded_optimiser_trains_as_a_whole_one(three, whole, name):
    """With clipping by the norm of all shares, averaged weights, and the state whole at the end."""
    same(np.load(three / f"{name}, sharded.npz"), whole[name])


def test_an_optimiser_that_a_failed_run_left_in_parts_says_so():
    class Second(distributed.Alone):
        def share(self, arrays):
            return {name: array.reshape(-1)[array.size // 2 :] for name, array in arrays.items()}

    params = on_ranks.chain().params
    optimiser = on_ranks.Adam(params)
    Sharded(optimiser, Second(), params)
    with pytest.raises(ValueError, match=r"expected \(23,\): a run that failed left one"):
        optimiser.step(params, {name: 0 * w for name, w in params.items()})


def test_gradients_are_summed_in_device_memory_where_mpi_reads_it(whole, tmp_path):
    """Sent when they are there, and not by way of the host. MPI's part is played."""
    text = run(3, HERE / "on_ranks.py", "on_device", tmp_path, GRU_ANY_PLAIN="1")
    assert text.count("gradients are summed in device memory, by MPI") == 2
    for shard in (False, True):
        same(np.load(tmp_path / f"device{shard}.npz"), whole["not on the host"])


def test_gradients_are_summed_by_nccl(whole, tmp_path):
    """In the memory of devices, without a wait of the host. The device and NCCL are played."""
    text = run(3, HERE / "on_ranks.py", "by_nccl", tmp_path, GRU_ANY_PLAIN="1")
    assert text.count("gradients are summed in device memory, by NCCL") == 2
    for shard in (False, True):
        same(np.load(tmp_path / f"nccl{shard}.npz"), whole["not on the host"])


def test_where_nccl_cannot_be_used_all_ranks_go_on_without_it(whole, tmp_path):
    text = run(3, HERE / "on_ranks.py", "without_nccl", tmp_path, GRU_ANY_PLAIN="1")
    told = [line.partition("NCCL cannot sum gradients: ")[2] for line in text.splitlines()]
    assert list(filter(None, told)) == [
        f"ranks 0 and 1 share device 0000:01:00.0 of {platform.node()}",
        "the fake device has no NCCL, on rank 1",
        "RuntimeError: NCCL_ERROR_SYSTEM_ERROR: unhandled system error, on rank 1",
        "it did not start within 1 s",
    ]
    assert text.count("gradients are summed on the host, by MPI") == 5
    for name in ("shared", "missing", "broken", "hanging"):
        same(np.load(tmp_path / f"{name}.npz"), whole["not on the host"])


@pytest.mark.parametrize(
    ("job", "words"),
    [
        ("killed_in_a_sum", "was killed; "),
        ("hanging_in_a_sum", "did not answer for 2 s; "),
        ("lost_in_a_sum", "did not answer (RuntimeError: NCCL_ERROR_REMOTE_ERROR: remote"),
    ],
)
def test_a_rank_that_dies_in_a_sum_of_nccl_ends_the_run_and_is_named(tmp_path, job, words):
    if job == "killed_in_a_sum" and sys.platform != "linux":
        pytest.skip("needs Linux")
    seconds = "2" if job == "hanging_in_a_sum" else "300"
    given = {"GRU_ANY_PLAIN": "1", "GRU_ANY_RANK_TIMEOUT": seconds}
    began = time.monotonic()
    text = run(3, HERE / "on_ranks.py", job, tmp_path, code=1, **given)
    assert time.monotonic() - began < 60
    told = [line for line in text.splitlines() if words in line]
    assert told
    assert all(line.startswith("gru_any: rank 1 (process ") for line in told)
    assert all("the last good checkpoint is" in line for line in told)
    assert job == "killed_in_a_sum" or "NCCL gives up" in text


def test_a_sharded_optimiser_on_two_ranks_gives_the_same_bits(two):
    """Two numbers have one sum, so all is equal: parameters, optimiser, and the checkpoints."""
    for rank in range(2):
        found = json.loads((two / f"sharded.{rank}.json").read_text())
        assert len(found) == 5
        assert all(found[name] == [True, True] for name in found), found


def test_an_optimiser_that_needs_whole_parameters_is_not_sharded():
    class Lamb(on_ranks.Adam):
        def _update(self, xp, name, p, g, group):
            update = super()._update(xp, name, p, g, group)
            return update * np.linalg.norm(p) / np.linalg.norm(update)

    class Mine(on_ranks.Adam):
        lr_of_biases = 0.1

    params = on_ranks.chain().params
    with pytest.raises(ValueError, match="the update of Lamb may need whole ones"):
        Sharded(Lamb(params), distributed.Alone(), params)
    Sharded(Mine(params), distributed.Alone(), params)


def test_compressed_gradients(three):
    """Each number is rounded on its way to the sum, and the sum once more; all ranks get it."""
    ranks = [np.load(three / f"sums.{rank}.npz") for rank in range(3)]
    for name in ranks[0].files:
        for other in ranks:
            assert np.array_equal(ranks[0][name], other[name], equal_nan=True)
    sums = dict(ranks[0])
    for dtype, unit in (("float16", 2.0**-11), ("bfloat16", 2.0**-8)):
        error = np.abs(sums[f"{dtype} a"] - sums["None a"])
        assert 0 < error.max() < unit * 3 * 4  # three numbers of less than 4
    assert not np.isfinite(sums["float16 b"]).all()  # 1e5 is too large
    assert np.isfinite(sums["bfloat16 b"]).all()


def test_half_precision_is_what_the_libraries_mean_by_it():
    ml_dtypes = require("ml_dtypes")
    values = np.random.default_rng(0).standard_normal(10000).astype("float32")
    values *= 10.0 ** np.random.default_rng(1).uniform(-40, 38, 10000).astype("float32")
    values = np.concatenate([values, np.float32([0, -0.0, np.inf, -np.inf, np.nan, 3.4e38])])
    ours = compress.decode(compress.encode(values, "bfloat16"), "bfloat16")
    with np.errstate(over="ignore"):
        theirs = values.astype(ml_dtypes.bfloat16).astype("float32")
    assert np.array_equal(ours, theirs, equal_nan=True)


@pytest.fixture(scope="module")
def two(three, tmp_path_factory):
    """What three ranks left, and two go on with."""
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(three / "stopped", folder / "stopped")
    text = run(2, HERE / "on_ranks.py", "resumed", folder)
    assert "goes on after step 47 (steps was 47 and is now 100)" in text
    assert text.count("goes on after step 47") == 1
    assert "2 ranks on" in text
    return folder


def test_a_run_of_three_ranks_goes_on_with_two_or_one(three, two, whole, tmp_path):
    same(np.load(two / "resumed.npz"), whole["cut in time"])
    shutil.copytree(three / "stopped", tmp_path, dirs_exist_ok=True)
    same(on_ranks.train("cut in time", out=tmp_path, save_every=20), whole["cut in time"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("settings", "the ranks have different settings: lr is 0.1 on rank 0, 0.2 on rank 1"),
        ("seed", "different weights, so give each layer a seed: 0.weight_ih_l0 is"),
        ("dropout", "the ranks have different settings: x is 1 on rank 0, 2 on rank 1"),
        ("version", "the ranks have different versions: numpy is '"),
        ("items", "the ranks have different items: their number is 2 on rank 0, 3 on rank 1"),
        ("data", "the ranks read different data: the first piece of the data is"),
        ("late data", "apart by step 4: the data read so far is"),
        ("weights", "come apart by step"),
        ("weights", ": 1.bias is"),
        ("loss", "the gradient of this rank's rows is 2 times what it must be"),
        ("folder", "is another folder for rank 1 (process"),
        ("shard", "the ranks have different settings: shard is False on rank 0, True on rank 1"),
        ("disk", "No space left on device; there is no earlier one"),
    ],
)
def test_what_all_ranks_refuse(two, name, message):
    told = [json.loads((two / f"told.{rank}.json").read_text())[name] for rank in range(2)]
    assert told[0] == told[1].replace(str(two / "b"), str(two / "a"))
    assert message in told[0]


def test_a_rank_that_hangs_ends_the_run_and_is_named(tmp_path):
    began = time.monotonic()
    text = run(3, HERE / "on_ranks.py", "stopped", tmp_path, code=1, GRU_ANY_RANK_TIMEOUT="1")
    assert time.monotonic() - began < 60  # and not the usual 300
    told = [line for line in text.splitlines() if "did not answer for 1 s" in line]
    assert len(told) == 1
    assert told[0].startswith("gru_any: rank 1 (process ")
    assert told[0].endswith(f"the last good checkpoint is {tmp_path}/out/checkpoint.safetensors")


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_ranks_that_are_killed_are_named_and_the_run_goes_on(whole, tmp_path):
    """Though the launcher kills the others too. GRU_ANY_KILLS=20 does it twenty times."""
    rng, newest = random.Random(time.time()), tmp_path / "out" / "checkpoint.safetensors"
    for kill in range(int(os.environ.get("GRU_ANY_KILLS", "1"))):
        began = newest.stat().st_mtime_ns if newest.exists() else 0
        with start(2, HERE / "on_ranks.py", "killed", tmp_path) as process:
            while not newest.exists() or newest.stat().st_mtime_ns == began:
                assert process.poll() is None
                time.sleep(0.001)
            time.sleep(rng.random() * 0.05)
            pid = int((tmp_path / f"pid.{kill % 2}").read_text())
            os.kill(pid, signal.SIGKILL)
            _, err = process.communicate(timeout=60)
        told = f"gru_any: rank {kill % 2} (process {pid} on {platform.node()}) was killed; the last"
        assert err.count("was killed") == err.count(told) == 1, err
    run(3, HERE / "on_ranks.py", "killed", tmp_path)
    same(np.load(tmp_path / "end.npz"), whole["cut in time"])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_does_not_come_ends_the_run_and_is_named(tmp_path, rank):
    """It has failed before its call of fit, or does something else for ever."""
    text = run(2, HERE / "on_ranks.py", f"late{rank}", tmp_path, code=1, GRU_ANY_RANK_TIMEOUT="0.5")
    assert f"gru_any: rank {rank} did not come to the work that all share for" in text


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_the_table_of_faults(monkeypatch, capsys):
    """A few of its lines; scripts/maintenance/faults.py makes all."""
    require("mpi4py")
    monkeypatch.syspath_prepend(SCRIPTS / "maintenance")
    monkeypatch.setenv("PYTHONPATH", str(HERE.parent))
    import faults

    code = faults.main(["--ranks=2", "--kills=1", "--steps=30", "--faults", "kill"])
    lines = capsys.readouterr()
    rows = [line.split(" | ") for line in lines.out.splitlines()[2:]]
    assert code == 0, lines
    assert [row[0] for row in rows] == ["| SIGKILL to rank 0 of 2", "| SIGKILL to rank 1 of 2"]
    assert all(row[3:] == ["1", "1", "1", "1", "1", "1 |"] for row in rows)


def test_the_checkpoint_before_is_named_while_the_newest_is_replaced(tmp_path):
    """By the process that outlives the ranks."""
    if sys.platform != "linux":
        pytest.skip("needs Linux")
    paths = [tmp_path / name for name in ("checkpoint", "checkpoint.before")]
    paths[1].touch()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0gru_any.{os.getpid()}")
        listener.listen(1)
        with started(
            [sys.executable, sentinel.__file__, listener.fileno(), 1, os.getpid(), *paths],
            pass_fds=[listener.fileno()], stderr=subprocess.PIPE,
        ) as process, socket.socket(socket.AF_UNIX) as rank:  # fmt: skip
            rank.connect(listener.getsockname())
            rank.sendall(b"rank 7\n")
            assert rank.recv(1) == b"."
            rank.close()
            _, err = process.communicate(timeout=60)
    assert err == f"gru_any: rank 7 was killed; the last good checkpoint is {paths[1]}\n"


def test_a_rank_that_fails_alone_ends_the_run_and_is_named(tmp_path):
    text = run(2, HERE / "on_ranks.py", "failing", tmp_path, code=1)
    assert "failed, ZeroDivisionError: division by zero; the last good checkpoint is" in text
    assert "gru_any: rank 1 (process " in text


def test_the_script_on_two_ranks_and_ctrl_c(tmp_path):
    """The launcher passes the signal on; all stop after the same step, and one of them writes."""
    (tmp_path / "data.txt").write_text("to be or not to be " * 500, "utf-8")
    command = [SCRIPTS / "train_text.py", "--data", tmp_path / "data.txt", "--hidden", 16]
    command += ["--chunk", 16, "--backend", "numpy", "--out", tmp_path / "out", "--sample", 9]
    command += ["--distributed", "--steps", 1000000]
    with start(2, *command, PYTHONUNBUFFERED="1") as process:
        while not (tmp_path / "out" / "checkpoint.safetensors").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert "the weights so far are kept" in err
    assert "char/s" in err
    assert out.count("test: ") == out.count("characters, SHA-256") == 1
    lines = (tmp_path / "out" / "log.jsonl").read_text("utf-8").splitlines()
    assert all(json.loads(b)["step"] - json.loads(a)["step"] == 20 for a, b in pairwise(lines))


def test_ranks_share_the_prompts(tmp_path):
    """Texts from saved weights are those of one process, in order."""
    (tmp_path / "data.txt").write_text("to be or not to be " * 500, "utf-8")
    prompts = ["to", "be or", "n", "not to", "o"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), "utf-8")
    small = ["--hidden", 8, "--embedding", 4, "--backend", "numpy", "--chunk", 16, "--steps", 3]
    alone = [SCRIPTS / "train_text.py", "--data", tmp_path / "data.txt", *small, "--out", tmp_path]
    rest = ["--prompts", tmp_path / "prompts.txt", "--sample", 12]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "GRU_ANY_NO_NUMBA": "1"}
    done = finished([sys.executable, *alone, *rest], env=environment)
    texts = done.stdout.splitlines()[-5:]
    assert [text[:-12] for text in texts] == prompts
    load = [SCRIPTS / "train_text.py", "--load", tmp_path, "--backend", "numpy", "--distributed"]
    assert run(3, *load, *rest).splitlines() == texts


def test_nccl_works_in_the_order_of_the_streams(monkeypatch):
    """After what is asked for before it; what is asked for next comes after a look at its end."""
    mpi = require("mpi4py.MPI")
    from gru_any import backend
    from gru_any.backend.cuda.nccl import Communicator, Offer, obstacle
    from gru_any.testing.fake_cuda import array, memory, ops

    monkeypatch.setattr(ops.Ops, "nccl", None)
    monkeypatch.setattr(ops.Ops, "device", None)
    monkeypatch.setattr(memory, "PENDING", {})
    on_ranks.play(mpi.COMM_SELF)
    home = backend.select(on_ranks.DEVICE)
    made = Communicator(home, [Offer("", "", b"here")], 0, 60)
    while not made.state():
        time.sleep(0.001)
    assert made.state() == "ready"
    buffer = array.asarray(np.arange(4.0))
    sums = made.all_reduce(buffer)
    with pytest.raises(memory.StreamError, match="did not wait for stream"):
        buffer[...] = 0.0  # it is still being summed
    while not sums.Test():
        pass
    buffer[...] = 1.0
    monkeypatch.setattr(ops.Ops, "wait", lambda self, event: None)
    with pytest.raises(memory.StreamError, match="did not wait for stream"):
        made.all_reduce(buffer)
    made.abort()
    assert obstacle([Offer("", "0 of a"), Offer("", "0 of b")]) == ""


def test_cupy_has_nccl_or_says_what_to_install():
    cupy = require("cupy")
    from gru_any.backend.cuda.ops import Ops

    nccl, told = None, ""
    try:
        nccl = Ops(cupy).nccl()
    except ImportError as e:
        told = str(e)
    if nccl is None:
        assert told == "CuPy finds no NCCL (pip install nvidia-nccl-cu13, or -cu12)"
        return
    asked = {name for name in vars(on_ranks.Nccl) if name.startswith("NCCL_")}
    assert asked | {"NcclCommunicator", "get_unique_id"} <= set(dir(nccl))
    calls = {"allReduce", "reduceScatter", "allGather", "check_async_error", "abort"}
    assert calls <= set(dir(nccl.NcclCommunicator)) & set(dir(on_ranks.Nccl))


# without MPI -------------------------------------------------------------------------------------


def test_copies_of_one_run_are_refused(monkeypatch):
    """Those of a launcher whose processes do not know of each other."""
    monkeypatch.setenv("PMI_SIZE", "3")
    model = on_ranks.chain()
    with pytest.raises(RuntimeError, match="started 3 processes, and each would train the same"):
        fit(model, softmax_cross_entropy, on_ranks.ragged, on_ranks.Adam(model.params), steps=1)
    monkeypatch.setenv("PMI_SIZE", "1")
    assert distributed.launched() == 1
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    done = finished([sys.executable, SCRIPTS / "train_long.py"], code=1, env=environment)
    assert "2 processes were started: give --distributed to share one run" in done.stderr


def test_two_mpis_are_told_apart(monkeypatch):
    require("mpi4py")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(RuntimeError, match=r"started 4 processes, but mpi4py's MPI \(.*sees 1"):
        distributed.world()


def test_without_mpi4py(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(RuntimeError, match=r"needs mpi4py: pip install \"gru-any\[mpi\]\""):
        distributed.world()


def test_what_is_no_communicator():
    model = on_ranks.chain()
    with pytest.raises(TypeError, match="comm is int, expected a communicator of mpi4py"):
        fit(model, softmax_cross_entropy, on_ranks.ragged, on_ranks.Adam(model.params), steps=1,
            comm=2)  # fmt: skip


@pytest.mark.parametrize("timeout", ["0", "soon", "nan"])
def test_a_timeout_that_is_none(monkeypatch, timeout):
    from gru_any.train import watch

    monkeypatch.setenv(watch.VARIABLE, timeout)
    with pytest.raises(ValueError, match="expected a number of seconds above 0"):
        watch.timeout()


@pytest.mark.parametrize("size", range(1, 6))
@pytest.mark.parametrize("rows", range(8))
def test_shares_are_all_rows_once_and_even(size, rows):
    shares = [rows_of(rank, size, rows) for rank in range(size)]
    assert [i for s in shares for i in range(rows)[s]] == list(range(rows))
    lengths = [s.stop - s.start for s in shares]
    assert max(lengths) - min(lengths) <= 1


def test_a_share_of_a_piece():
    x, target = np.arange(24.0).reshape(2, 4, 3), np.zeros((2, 4))
    mask = np.array([[1, 1, 0, 1], [0, 1, 0, 1]], bool)
    resets = np.arange(8).reshape(2, 4) % 3 == 0
    batch = Batch(x, target, mask, np.array([1, 2, 0, 2]), False, resets)
    piece = Piece(batch, True, 2, 5.0)
    own, share = take(piece, lambda rows: slice(1, rows - 1), True, "targets")
    assert own.batch.x.tolist() == x[:, 1:3].tolist()
    assert own.batch.lengths.tolist() == [2, 0]
    assert own.batch.resets.tolist() == resets[:, 1:3].tolist()
    assert digest(batch) != digest(batch._replace(resets=~resets))  # which ranks would not share
    assert (own.counted, share.weight, share.of) == (5.0, 2 / 5, 4)


def test_random_numbers_that_cannot_be_shared_are_refused():
    model = Chain(Linear(2, 2))
    _, share = take(Piece(Batch(np.zeros((1, 4, 2)), np.zeros((1, 4))), True, 1, 4.0),
                    lambda rows: slice(0, 2), True, "targets")  # fmt: skip
    with pytest.raises(RuntimeError, match=r"random numbers of shape \(1, 2, 2\)"):
        SharedGenerator(np.random.default_rng(0), share, model).random((1, 2, 2))

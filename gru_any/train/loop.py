"""The training loop: `fit` reads like a recipe, and a run that was killed goes on bit for bit."""

import json
import math
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from .. import arguments
from ..nn.chain import Chain
from ..nn.layers import Embedding, Last
from .data import Batch, Piece, ahead, arranged, cut, pair, whole
from .history import History
from .optim import Optimizer
from .run import Run
from .schedules import Schedule

Batches = Callable[[int], Iterable[Any]]


def fit(
    model: Any,
    loss: Callable[..., Any],
    batches: Batches,
    optimiser: Optimizer,
    *,
    steps: int | None = None,
    epochs: int | None = None,
    minutes: float | None = None,
    tbptt: tuple[int, int] | None = None,
    accumulate: int = 1,
    clip: float | None = None,
    schedule: Schedule | None = None,
    valid: Callable[[], float] | None = None,
    validate_every: int | None = None,
    patience: int | None = None,
    average: float | None = None,
    mixed: str | None = None,
    seed: int = 0,
    out: Any = None,
    settings: dict[str, Any] | None = None,
    save_every: int = 200,
    log_every: int = 20,
    bar: bool | Callable[[dict[str, Any]], dict[str, Any]] = True,
) -> History:
    """Train a model; with `out`, so that the same call goes on where it was stopped.

    Parameters
    ----------
    model : Chain
    loss : callable
        `value, dy = loss(y, target, mask=None)`; arrays are laid out as the model has it, and the
        mask is (T, B), (B, T) with `batch_first`, or what the batch gives.
    batches : callable
        `batches(epoch)` gives the batches of an epoch, on the host; the same for the same epoch.
        Each a `data.Batch`, or a tuple (x, target[, mask[, lengths]]) laid out as the model has it.
    optimiser : Optimizer
        Of `model.params`, or of a part of them: the others are frozen, which is said on stderr.
        Only its own are clipped, averaged and changed.
    steps, epochs, minutes : int, int, float
        The run ends where the first of those given is reached. A step is an update. A run in
        `out` may be given a later end, also after it ended, and goes on to it.
    tbptt : (k1, k2) or None
        A gradient every k1 steps of time over the last k2, the state carried over; see `data.cut`.
    accumulate : int
        So many gradients are averaged for one update, by how many targets count in each piece: the
        gradient of one batch that holds them all, where the loss is a mean over these.
    clip : float or None
        Largest norm of the gradient.
    schedule : callable or None
        `schedule(step, losses)` is the learning rate; losses are those of validation so far.
        Groups of the optimiser with a rate of their own keep their proportion to it.
    valid : callable or None
        Returns the validation loss; called every `validate_every` steps or else each epoch, and at
        the end. The weights with the lowest are given back.
    patience : int or None
        End after more than so many validations without a new lowest loss.
    average : float or None
        Validate, and give back, a running average of the weights with this decay.
    mixed : "float16", "bfloat16" or None
        Store the residuals in half precision; the weights stay in float32. See `mixed`.
    seed : int
        Of dropout.
    out : path or None
        Folder of the log (log.jsonl) and the checkpoints, one every `save_every` steps.
    settings : dict or None
        What else decides the numbers, such as a digest of the data; a run that goes on must have
        the same, as it must have the same arguments but for its end. JSON must be able to write it.
    log_every : int
        Steps between two records; making one waits for the device.
    bar : bool or callable
        Whether to show a progress bar (needs tqdm), or what it shows of a record.

    Returns
    -------
    History

    Raises
    ------
    TypeError
        The model is no Chain, the optimiser none of this library, or an argument or a batch is of
        a wrong type.
    KeyError
        The optimiser holds a name that the model does not have.
    FloatingPointError
        Loss or gradient is not finite; on the host before it changed the weights, on a device with
        the next record.
    IndexError
        x holds indices that the model's first layer, an Embedding, does not have.
    ValueError
        A number is out of its range, patience or validate_every came without valid, which gives
        the loss they go by, the parts of a batch do not belong together or do not fit the
        model, `settings` has the name of an argument, settings differ from the checkpoint's, or no
        checkpoint can be used.
    OSError
        A checkpoint cannot be written; the last good one is kept.
    """
    _check_chain(model)
    if not isinstance(optimiser, Optimizer):
        name = type(optimiser).__name__
        raise TypeError(f"optimiser is {name}, expected one such as Adam(model.params)")
    functions = {"loss": loss, "batches": batches, "schedule": schedule, "valid": valid}
    for name, function in functions.items():
        if not (callable(function) or (function is None and name in ("schedule", "valid"))):
            raise TypeError(f"{name} is {type(function).__name__}, expected a function: see fit")
    if steps is epochs is minutes is None:
        raise ValueError("give at least one of steps, epochs and minutes")
    count, real = _given(arguments.size), _given(arguments.number)
    steps, epochs = count("steps", steps), count("epochs", epochs)
    minutes, clip = real("minutes", minutes, above=True), real("clip", clip, above=True)
    accumulate = arguments.size("accumulate", accumulate)
    validate_every = count("validate_every", validate_every)
    save_every = arguments.size("save_every", save_every)
    log_every = arguments.size("log_every", log_every)
    patience, seed = count("patience", patience, 0), arguments.size("seed", seed, 0)
    for name, given in (("patience", patience), ("validate_every", validate_every)):
        if given is not None and valid is None:
            raise ValueError(
                f"{name} is {given}, but valid, which gives the loss to judge, is None"
            )
    average, tbptt = real("average", average, below=1), pair(tbptt)
    bar = bar if callable(bar) else arguments.flag("bar", bar)
    kept = dict(steps=steps, epochs=epochs, minutes=minutes, tbptt=tbptt, accumulate=accumulate,
                clip=clip, validate_every=validate_every, patience=patience, average=average,
                mixed=mixed, seed=seed, log_every=log_every)  # fmt: skip
    settings = _writable(settings or {})
    run = Run(model, optimiser, seed, average, mixed)
    run.open(out, kept, settings, schedule)
    ends = steps, epochs, minutes
    with _interrupts() as stop, _bar(bar, ends, run) as show, run.quiet():
        for epoch, number, piece in _pieces(run.working, batches, tbptt, run):
            if epoch > run.epoch:
                run.epoch, run.piece = epoch, 0
                if valid and not validate_every:
                    run.validate(valid)
            run.reason = run.ended(*ends, patience)
            if not run.pending:  # between two updates, so that nothing is lost
                run.reason = run.reason or stop()
            if run.reason:
                break
            run.rate(schedule)
            run.add_gradient(loss, piece)
            run.piece = number + 1
            if run.pending < accumulate:
                continue
            run.update(clip)
            if run.step % log_every == 0:
                run.record()
            if valid and validate_every and run.step % validate_every == 0:
                run.validate(valid)
            if run.step % save_every == 0:
                run.save()
            show()
    return run.close(valid)


def _check_chain(model: Any) -> None:
    if not isinstance(model, Chain):
        raise TypeError(f"model is {type(model).__name__}, expected a Chain: Chain({model!r})")


def _given(check: Callable[..., Any]) -> Callable[..., Any]:
    """The same check, which lets None pass."""
    return lambda name, value, *more, **named: (
        None if value is None else check(name, value, *more, **named)
    )


def _writable(settings: Any) -> dict[str, Any]:
    """The settings, where JSON can write each."""
    if not isinstance(settings, dict):
        raise TypeError(f"settings is {type(settings).__name__}, expected a dict")
    for name, value in settings.items():
        if not isinstance(name, str):
            raise TypeError(f"settings has the name {name!r}, expected a string")
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as e:
            raise TypeError(
                f"settings[{name!r}] is {value!r}, which JSON cannot write ({e}): give a plain "
                "number, string, list or dict"
            ) from e
    return settings


def evaluate(
    model: Any, loss: Callable[..., Any], batches: Iterable[Any], chunk: int | None = None
) -> float:
    """The mean loss over all targets that count, read in chunks of so many steps of time.

    The mean over the pieces goes by how many targets count in each, so a loss that weighs its
    classes has its weighted mean within each piece alone.

    Parameters
    ----------
    model : Chain
    loss, batches
        As in `fit`; here `batches` are the batches themselves.
    chunk : int or None
        None reads each batch at once.

    Raises
    ------
    TypeError, ValueError
        As in `fit`; or no target counts.
    """
    _check_chain(model)
    tbptt = None if chunk is None else (arguments.size("chunk", chunk),) * 2
    total, count, state = 0.0, 0.0, None
    for batch in batches:
        for piece in _cut(model, batch, tbptt):
            x, target, mask, lengths, _ = _put(model, piece).batch
            y, state = model(x, None if piece.first else state, lengths)
            if piece.counted:
                total += float(loss(y, target, mask=mask)[0]) * piece.counted
                count += piece.counted
    if not count:
        raise ValueError(
            "no target counts in the batches: a mean over nothing is no number. An iterator gives "
            "its batches once: give a list, or make it anew"
        )
    return total / count


def _pieces(
    model: Any, batches: Batches, tbptt: tuple[int, int] | None, run: Run
) -> Iterator[tuple[int, int, Piece]]:
    """Epoch, number in it, and piece, from where the run stands on, without end."""

    def made() -> Iterator[tuple[int, int, Piece]]:
        epoch, skip = run.epoch, run.piece
        while not run.reason:
            number = 0
            for batch in batches(epoch):
                for piece in _cut(model, batch, tbptt):
                    if number >= skip:
                        yield epoch, number, _put(model, piece)
                    number += 1
            if not number:
                raise ValueError(f"batches({epoch}) gave nothing to learn from")
            epoch, skip = epoch + 1, 0

    return ahead(made())


def _cut(model: Any, item: Any, tbptt: tuple[int, int] | None) -> Iterable[Piece]:
    """The pieces of a batch in the layout of the model; one where it has one result a row."""
    each_step = not any(isinstance(layer, Last) for layer in model.layers)
    rank = 2 if isinstance(model.layers[0], Embedding) else 3
    batch = arranged(item, model.batch_first, rank, each_step)
    if each_step:
        return cut(batch, tbptt)
    if tbptt is not None:
        raise ValueError(
            f"the batches are to be cut by {tbptt}, but the model has a Last, whose one result a "
            "row needs all steps: leave out tbptt, or chunk"
        )
    return [whole(batch)]


def _put(model: Any, piece: Piece) -> Piece:
    """The piece on the model's device; its indices are looked at while they are on the host."""
    x, target, mask, lengths, batch_first = piece.batch
    put, first = model.backend.put, model.layers[0]
    if isinstance(first, Embedding):
        first.check_range(x)
    half = model.dtype in ("float16", "bfloat16") and x.dtype.kind == "f"
    on_device = Batch(
        put(x, model.dtype if half else None),
        put(target),
        None if mask is None else put(mask),
        lengths,
        batch_first,
    )
    return piece._replace(batch=on_device)


@contextmanager
def _interrupts() -> Iterator[Callable[[], str]]:
    """What returns "interrupted" after Ctrl-C, so that a step is never left half done."""
    pressed: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: ""
        return

    def handle(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: "interrupted" if pressed else ""
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _bar(bar: Any, ends: tuple[Any, Any, Any], run: Run) -> Iterator[Callable[[], None]]:
    if not bar:
        yield lambda: None
        return
    try:
        from tqdm import tqdm
    except ImportError as e:
        raise ImportError('the progress bar needs tqdm: pip install "gru-any[train]"') from e
    text = bar if callable(bar) else lambda record: {"loss": f"{record['loss']:.4g}"}
    with tqdm(total=ends[0], initial=run.step, unit="step", mininterval=0.5) as shown:

        def show() -> None:
            if run.news:
                shown.set_postfix(text(run.news), refresh=False)
            shown.total = _expected(run, *ends)
            shown.update()

        yield show


def _expected(run: Run, steps: int | None, epochs: int | None, minutes: float | None) -> int | None:
    """How many steps the run will have, judged by how far it is; None where that is not known."""
    done = max(
        run.step / (steps or math.inf),
        run.epoch / (epochs or math.inf),
        run.elapsed() / (60 * (minutes or math.inf)),
    )
    return max(run.step, round(run.step / done)) if done else None

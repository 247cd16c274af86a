"""The training loop: `fit`, and `evaluate` for the loss on other data."""

import json
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from .. import arguments
from ..backend import NUMPY
from ..nn.chain import Chain
from ..nn.layers import Embedding, Last
from ..nn.params import Layer
from ..typing import Loss
from ..typing import Path as PathLike
from .compress import DTYPES
from .data import Batch, Piece, ahead, arranged, cut, pair, whole
from .distributed import Alone, Communicator, ranks_of
from .history import History, Record
from .lock import alone_in
from .optim import Optimizer
from .run import Plan, Run
from .schedules import Schedule
from .share import REDUCTIONS, Share, take

Number = TypeVar("Number", int, float)
Item = TypeVar("Item")
Result = TypeVar("Result")
Batches: TypeAlias = Callable[[int], Iterable[Any]]
Shown: TypeAlias = Callable[[Record], dict[str, str]]


def fit(
    model: Chain,
    loss: Loss,
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
    out: PathLike | None = None,
    settings: dict[str, object] | None = None,
    save_every: int = 200,
    log_every: int = 20,
    bar: bool | Shown = True,
    reduction: str = "targets",
    comm: Communicator | None = None,
    compress: str | None = None,
    shard: bool = False,
) -> History:
    """Train a model; with `out`, the same call resumes a run that was stopped, bit for bit.

    Parameters
    ----------
    model : Chain
    loss : callable
        `value, dy = loss(y, target, mask=None)`. Arrays have the layout of the model; the mask is
        (T, B), or (B, T) with `batch_first`, or as the batch gives it.
    batches : callable
        `batches(epoch)` returns the batches of an epoch, on the host; the same ones for the same
        epoch. Each is a `data.Batch`, or a tuple (x, target[, mask[, lengths]]) in the layout of
        the model. `Batch(..., resets=...)` packs episodes into rows.
    optimiser : Optimizer
        Of `model.params`, or of a part of them: the others are frozen, which is reported on stderr.
        Only its own are clipped, averaged and updated.
    steps, epochs, minutes : int, int, float
        The run ends when the first of those given is reached. A step is an update. A run in `out`
        may be given a later end, even after it has ended, and goes on to it.
    tbptt : (k1, k2) or None
        A gradient every k1 steps of time over the last k2, the state carried over; see `data.cut`.
    accumulate : int
        How many gradients are averaged for one update, weighted by how many targets count in each:
        the gradient of one batch that holds them all, if the loss is a mean over targets.
    clip : float or None
        Largest norm of the gradient.
    schedule : callable or None
        `schedule(step, losses)` returns the learning rate; losses are the validation losses so far.
        Groups of the optimiser with a rate of their own keep their proportion to it.
    valid : callable or None
        Returns the validation loss; called every `validate_every` steps or else each epoch, and at
        the end. The model ends with the weights that had the lowest.
    patience : int or None
        End after more than this number of validations without a new lowest loss.
    average : float or None
        Validate, and end with, a running average of the weights with this decay.
    mixed : "float16", "bfloat16" or None
        Store the residuals in half precision; the weights stay in float32. See `mixed`.
    seed : int
        Of dropout.
    out : path or None
        Folder of the log (log.jsonl) and of the checkpoints, one every `save_every` steps.
    settings : dict or None
        What else decides the numbers, such as a digest of the data; anything that JSON can write.
        A run can be resumed only with the same settings, and the same arguments except its end.
    log_every : int
        Steps between two records; making one waits for the device.
    bar : bool or callable
        Whether to show a progress bar (needs tqdm), or a function from a record to what the bar
        shows.
    reduction : "targets" or "sequences"
        What the loss is a mean over: all targets that count, or the sequences of a batch. By it
        `accumulate` and `comm` weigh the parts of a batch.
    comm : communicator of mpi4py or None
        The ranks that share the work; all call `fit` with the same arguments. Each computes its
        share of the rows of every batch, and the result is that of one process up to rounding. The
        first one writes to `out` and shows the bar.
    compress : "float16", "bfloat16" or None
        What the ranks send gradients as. It halves the messages and rounds the gradients; they are
        added in float32.
    shard : bool
        Let each rank keep its share of the optimiser's state alone, which takes less memory. The
        checkpoints, and the optimiser after the run, hold all of it.

    Returns
    -------
    History

    Raises
    ------
    TypeError
        The model is not a Chain, the optimiser is not one of this library, or an argument or a
        batch is of a wrong type.
    KeyError
        The optimiser holds a name that the model does not have.
    FloatingPointError
        The loss or a gradient is not finite; raised before it changes the weights on the host, and
        with the next record on a device.
    IndexError
        x holds indices that the model's first layer, an Embedding, does not have.
    ValueError
        A number is out of its range; patience or validate_every is given without valid, which
        gives the loss to judge; the parts of a batch do not match each other or the model;
        `settings` has the name of an argument, or differs from the checkpoint's; no checkpoint
        can be used; or another run writes to `out`.
    OSError
        A checkpoint cannot be written; the last good one is kept, if there is one.
    RuntimeError
        An MPI launcher started several processes, and comm is None.

    Notes
    -----
    With comm, ValueError is raised on all ranks where their arguments, data, versions or weights
    differ. If a rank fails alone, dies, or does not answer for `GRU_ANY_RANK_TIMEOUT` seconds (by
    default 300), the others print which one, and end.
    """
    _check_chain(model)
    _check_optimiser(optimiser)
    _check_functions(loss=loss, batches=batches)
    _check_functions(optional=True, schedule=schedule, valid=valid)
    plan = Plan(steps, epochs, minutes, tbptt, accumulate, clip, validate_every, patience, average,
                mixed, seed, log_every, reduction, compress)  # fmt: skip
    plan = _checked(plan, valid is not None)
    save_every, shard = arguments.size("save_every", save_every), arguments.flag("shard", shard)
    bar = bar if callable(bar) else arguments.flag("bar", bar)
    settings = _writable(settings or {})
    ranks = ranks_of(comm, model.backend, compress)
    with ranks.guard(), ExitStack() as stack:
        ranks.begin(None if out is None else Path(out))
        run = Run(model, optimiser, plan, ranks)
        if out is not None:
            ranks.lead(lambda: stack.enter_context(alone_in(Path(out))))
            ranks.refuse_unshared(Path(out))
        run.open(out, settings, schedule, shard)
        _train(run, loss, batches, schedule, valid, save_every, bar)
        return run.close(valid)


def _train(
    run: Run,
    loss: Loss,
    batches: Batches,
    schedule: Schedule | None,
    valid: Callable[[], float] | None,
    save_every: int,
    bar: bool | Shown,
) -> None:
    """Run piece after piece, until the run has a reason to end."""
    with interrupts() as run.interrupted, _progress(bar, run) as show, run.quiet():
        for epoch, number, piece, share in _pieces(run, batches):
            if epoch > run.epoch:
                run.epoch, run.piece = epoch, 0
                if valid and not run.plan.validate_every:
                    run.validate(valid)
            run.reason = run.ended() or run.stopped()
            if run.reason:
                break
            run.rate(schedule)
            run.add_gradient(loss, piece, share)
            run.piece = number + 1
            if run.pending >= run.plan.accumulate:
                run.update()
                _follow_up(run, valid, save_every)
                show()


def _follow_up(run: Run, valid: Callable[[], float] | None, save_every: int) -> None:
    """Record, validate and save after an update, where it is time to."""
    every = run.plan.validate_every
    if run.step % run.plan.log_every == 0:
        run.check()
        run.record()
    if valid and every and run.step % every == 0:
        run.validate(valid)
    if run.step % save_every == 0:
        run.save()


CALLS = {  # what each function of fit takes and returns
    "loss": "loss(y, target, mask=None) -> value, dy",
    "batches": "batches(epoch) -> the batches of an epoch, such as lambda epoch: [(x, target)]",
    "schedule": "schedule(step, losses) -> the learning rate",
    "valid": "valid() -> the validation loss",
}


def _check_chain(model: object) -> None:
    if not isinstance(model, Chain):
        way = ": Chain(model)" if isinstance(model, Layer) else ""
        raise TypeError(f"model is {type(model).__name__}, expected a Chain{way}")


def _check_optimiser(optimiser: object) -> None:
    if not isinstance(optimiser, Optimizer):
        name = type(optimiser).__name__
        raise TypeError(f"optimiser is {name}, expected one such as Adam(model.params)")


def _check_functions(optional: bool = False, **functions: object) -> None:
    for name, function in functions.items():
        if not (callable(function) or (optional and function is None)):
            raise TypeError(
                f"{name} is {type(function).__name__}, expected a function, {CALLS[name]}"
            )


def _checked(plan: Plan, valid: bool) -> Plan:
    """Check the numbers of a plan, and convert them to Python's own."""
    if plan.steps is plan.epochs is plan.minutes is None:
        raise ValueError("give at least one of steps, epochs and minutes")
    count, real = _optional(arguments.size), _optional(arguments.number)
    plan = plan._replace(
        steps=count("steps", plan.steps),
        epochs=count("epochs", plan.epochs),
        minutes=real("minutes", plan.minutes, above=True),
        clip=real("clip", plan.clip, above=True),
        accumulate=arguments.size("accumulate", plan.accumulate),
        validate_every=count("validate_every", plan.validate_every),
        log_every=arguments.size("log_every", plan.log_every),
        patience=count("patience", plan.patience, 0),
        seed=arguments.size("seed", plan.seed, 0),
        average=real("average", plan.average, below=1),
        tbptt=pair(plan.tbptt),
    )
    for argument, known in (("reduction", REDUCTIONS), ("compress", (None, *DTYPES))):
        if (given := getattr(plan, argument)) not in known:
            raise ValueError(f"{argument} is {given!r}, expected one of {known}")
    for name in ("patience", "validate_every"):
        given = getattr(plan, name)
        if given is not None and not valid:
            raise ValueError(
                f"{name} is {given}, but valid, which gives the loss to judge, is None"
            )
    return plan


def _optional(check: Callable[..., Number]) -> Callable[..., Number | None]:
    """Return a check that lets None pass, too."""
    return lambda name, value, *more, **named: (
        None if value is None else check(name, value, *more, **named)
    )


def _writable(settings: object) -> dict[str, object]:
    """Return the settings, after a check that JSON can write each."""
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
    model: Chain,
    loss: Loss,
    batches: Iterable[Any],
    chunk: int | None = None,
    comm: Communicator | None = None,
) -> float:
    """Return the mean loss over all targets that count.

    The mean over the pieces is weighted by how many targets count in each, so a loss that weighs
    its classes has its weighted mean within each piece only.

    Parameters
    ----------
    model : Chain
    loss, batches
        As in `fit`, except that `batches` are the batches themselves.
    chunk : int or None
        The number of steps of time to run at once; None means all steps of a batch.
    comm : communicator of mpi4py or None
        The ranks that share the batches, each batch computed by one of them. All get the result,
        which is the same bit for bit.

    Raises
    ------
    TypeError, ValueError
        As in `fit`; or no target counts.
    """
    _check_chain(model)
    tbptt = None if chunk is None else (arguments.size("chunk", chunk),) * 2
    ranks = Alone() if comm is None else ranks_of(comm, model.backend)
    own: dict[int, list[tuple[float, float]]] = {}
    state = None
    with ranks.guard():
        for number, batch in enumerate(batches):
            if number % ranks.size != ranks.rank:
                continue
            parts = own[number] = []
            for piece in _cut(model, batch, tbptt):
                x, target, mask, lengths, _, resets = _put(model, piece).batch
                y, state = model(x, None if piece.first else state, lengths, resets=resets)
                if piece.counted:
                    parts.append((float(loss(y, target, mask=mask)[0]), piece.counted))
        found = {number: parts for each in ranks.every(own) for number, parts in each.items()}
    pairs = [pair for number in sorted(found) for pair in found[number]]
    total, count = 0.0, sum(counted for _, counted in pairs)
    for value, counted in pairs:
        total += value * counted
    if not count:
        raise ValueError(
            "no target counts in the batches: a mean over nothing is no number. An iterator gives "
            "its batches once: give a list, or make it anew"
        )
    return total / count


def spread(
    function: Callable[[Item], Result], items: Sequence[Item], comm: Communicator | None = None
) -> list[Result]:
    """Return function(item) of each item, computed on one of the ranks each; all get all, in order.

    Such as texts that one model writes from many prompts.

    Parameters
    ----------
    function : callable
        Its result should depend on the item alone, so that the number of ranks does not matter:
        random numbers are drawn from a seed and the item, say. It is sent to the other ranks, so it
        can be pickled.
    items : sequence
        The same on all ranks.
    comm : communicator of mpi4py or None
        The ranks that share the items; all call this.

    Raises
    ------
    ValueError
        The ranks have different numbers of items.
    """
    ranks = Alone() if comm is None else ranks_of(comm, NUMPY)
    with ranks.guard():
        ranks.refuse_differences("the ranks have different items", {"their number": len(items)})
        own = {i: function(items[i]) for i in range(ranks.rank, len(items), ranks.size)}
        found = {i: result for each in ranks.every(own) for i, result in each.items()}
    return [found[i] for i in range(len(items))]


def _pieces(run: Run, batches: Batches) -> Iterator[tuple[int, int, Piece, Share | None]]:
    """Yield epoch, number in it, piece and share, from the position of the run on, without end."""
    model, plan, ranks = run.working, run.plan, run.ranks
    each_step = _each_step(model)

    def made() -> Iterator[tuple[int, int, Piece, Share | None]]:
        epoch, skip = run.epoch, run.piece
        while not run.reason:
            number = 0
            for batch in batches(epoch):
                for piece in _cut(model, batch, plan.tbptt):
                    if number >= skip:
                        share = None
                        if plan.reduction == "sequences":
                            B = piece.batch.x.shape[0 if piece.batch.batch_first else 1]
                            piece = piece._replace(counted=float(B))
                        if ranks.size > 1:
                            piece, share = take(piece, ranks.rows, each_step, plan.reduction)
                        yield epoch, number, _put(model, piece), share
                    number += 1
            if not number:
                raise ValueError(f"batches({epoch}) gave nothing to learn from")
            epoch, skip = epoch + 1, 0

    return ahead(made())


def _cut(model: Chain, item: object, tbptt: tuple[int, int] | None) -> Iterable[Piece]:
    """Cut a batch in the layout of the model; it is one piece if a sequence has one result."""
    each_step = _each_step(model)
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


def _each_step(model: Chain) -> bool:
    """Whether there is a result for each step, and not only for each sequence."""
    return not any(isinstance(layer, Last) for layer in model.layers)


def _put(model: Chain, piece: Piece) -> Piece:
    """Copy a piece to the model's device; indices are checked while they are on the host.

    Lengths and resets stay there: calls read them on the host.
    """
    x, target, mask, lengths, batch_first, resets = piece.batch
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
        resets,
    )
    return piece._replace(batch=on_device)


@contextmanager
def interrupts() -> Iterator[Callable[[], str]]:
    """Give a function that returns "interrupted" after Ctrl-C, which ends no step half done."""
    pressed: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: ""
        return

    def handle(number: int, frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: "interrupted" if pressed else ""
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _progress(bar: bool | Shown, run: Run) -> Iterator[Callable[[], None]]:
    """Give a function that shows the progress after an update."""
    if not bar or not run.ranks.first:
        yield lambda: None
        return
    try:
        from tqdm import tqdm
    except ImportError as e:
        raise ImportError('the progress bar needs tqdm: pip install "gru-any[train]"') from e
    text = bar if callable(bar) else lambda record: {"loss": f"{record['loss']:.4g}"}
    steps = run.plan.steps
    with tqdm(total=steps, initial=run.step, unit="step", mininterval=0.5) as shown:

        def show() -> None:
            if run.news:
                shown.set_postfix(text(run.news), refresh=False)
            shown.total = run.expected()
            shown.update()

        yield show

"""The state of a training run, and how it is saved and resumed."""

import math
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..backend import environment, to_numpy
from ..checkpoint import describe
from ..nn.chain import Chain
from ..nn.params import refuse_shared
from ..typing import Array, Arrays, HostArray, Loss
from ..typing import Path as PathLike
from . import resume
from .data import Piece, in_time
from .distributed import Alone, Wishes
from .history import History, Log, Record
from .mixed import Mixed
from .optim import Optimizer, clip_by_total_norm
from .schedules import Schedule
from .shard import Sharded
from .share import Share, SharedGenerator, checksum, digest, misfit, weighted

GATES = ("r", "z", "n")
NUMBERS = (
    "step", "epoch", "piece", "seconds", "best", "since", "validated", "reason", "losses", "rated",
    "pending", "counted",
)  # fmt: skip
ENDS = ("steps", "epochs", "minutes", "patience")  # a run may go on with other ones


class Plan(NamedTuple):
    """The arguments of `fit` that decide how a run goes."""

    steps: int | None
    epochs: int | None
    minutes: float | None
    tbptt: tuple[int, int] | None
    accumulate: int
    clip: float | None
    validate_every: int | None
    patience: int | None
    average: float | None
    mixed: str | None
    seed: int
    log_every: int
    reduction: str = "targets"
    compress: str | None = None


class Run:
    """The state of a run. See `train.fit` for the terms."""

    def __init__(self, model: Chain, optimiser: Optimizer, plan: Plan, ranks: Alone) -> None:
        self.model, self.optimiser, self.plan, self.ranks = model, optimiser, plan, ranks
        self.stepper: Optimizer | Sharded = optimiser  # what updates the weights
        self._tell_frozen()
        self.mixed = Mixed(model, plan.mixed) if plan.mixed else None
        self.working: Chain = self.mixed.twin if self.mixed else model
        self.rng = np.random.default_rng(plan.seed)
        self.step = self.epoch = self.piece = self.since = 0
        self.validated, self.seconds, self.reason = -1, 0.0, ""
        self.best: float | None = None
        self.losses: list[float] = []  # of validation
        self.state: list[Array] = []
        self.averaged = self._copy() if plan.average else {}
        self.lowest: dict[str, Array] = {}  # the weights with the lowest validation loss
        self.closing: Record | None = None  # of the validation at the end
        self.grads: dict[str, Array] = {}  # the mean of `pending` gradients,
        self.pending, self.counted = 0, 0.0  # over `counted` targets
        self.sums: list[Array] = [0.0, 0.0]  # of loss (of this rank) and norm since the last record
        self.counts: list[Array] = [0, 0]  # of targets and norms in these sums
        self.total: Array = 0.0  # the sum of the loss, of all ranks
        self.data = 0  # the checksum of all pieces that this process has read
        self.interrupted: Callable[[], str] = lambda: ""
        self.rated: list[Any] | None = None  # the last arguments of the schedule, and its rate
        self.spoiled: dict[str, Array] = {}  # on a device: the first gradient that is not finite,
        self.spoiled_at = model.backend.put(np.zeros((), "float32"))  # and its step
        self.news: Record = {}  # the last record
        self.folder: Path | None = None
        self.settings: dict[str, Any] = {}
        self.log = Log(None, [])
        self.clock = time.monotonic()

    # one step ------------------------------------------------------------------------------------

    def rate(self, schedule: Schedule | None) -> None:
        """Set the learning rate of the next step."""
        if schedule:
            self.optimiser.lr = schedule(self.step, self.losses)
            self.rated = [self.step, len(self.losses), self.optimiser.lr]

    def add_gradient(self, loss: Loss, piece: Piece, share: Share | None = None) -> None:
        """Run one piece forward and backward, from the final state of the piece before.

        share : which rows of the whole piece these are; None for all
        """
        x, target, mask, lengths, batch_first, resets = piece.batch
        state = None if piece.first else self.state
        rng = self.rng if share is None else SharedGenerator(self.rng, share, self.working)
        (y, after), pullback = self.working.vjp(x, state, lengths, rng=rng, resets=resets)
        if share is not None:
            self._check_share(loss, piece, share, y)
            loss = weighted(loss, share, self.model.backend.xp)
        self.counted += piece.counted

        def mean(grads: Arrays) -> dict[str, Array]:
            """Return the mean over all targets of the pending gradients and of these."""
            if not self.pending:
                return dict(grads)
            part = piece.counted / (self.counted or 1.0)
            return {k: self.grads[k] + part * (g - self.grads[k]) for k, g in grads.items()}

        if self.mixed:
            value, grads = self.mixed.gradient(loss, y, target, mask, pullback)
        else:
            value, dy = loss(y, target, mask=mask)
            last = share is not None and self.pending + 1 == self.plan.accumulate
            ready = (lambda grads: self.ranks.start_sum(mean(grads))) if last else None
            grads, _, _ = pullback(dy, ready=ready)
        if piece.advance < x.shape[1 if batch_first else 0]:
            shorter = None if lengths is None else np.minimum(lengths, piece.advance)
            part = in_time(slice(piece.advance), batch_first)
            begins = None if resets is None else resets[part]
            _, after = self.working(x[part], state, shorter, resets=begins)
        self.state = after
        self.grads = mean(grads)
        self.pending += 1
        self._add(0, value * piece.counted, piece.counted)

    def _check_share(self, loss: Loss, piece: Piece, share: Share, y: Array) -> None:
        """Before the first gradient, check that the ranks read the same and fit together."""
        if not self.data:
            items = {"the first piece of the data": f"{digest(share.whole):08x}"}
            self.ranks.refuse_differences("the ranks read different data", items)
            axis = 0 if piece.batch.batch_first or y.ndim < 3 else 1
            found = self.ranks.every(misfit(self.model, loss, piece, share, y, axis))
            if problem := next(filter(None, found), ""):
                raise ValueError(problem)
        self.data = digest(share.whole, self.data or 1)

    def wishes(self) -> Wishes:
        """Return whether this process was interrupted, and whether its time is over."""
        minutes = self.plan.minutes
        return bool(self.interrupted()), minutes is not None and self.elapsed() >= 60 * minutes

    def update(self) -> None:
        """Update the weights that are not frozen by the mean of the gradients."""
        grads = {name: self.grads[name] for name in self.optimiser.names}
        grads, self.total = self.ranks.sum(grads, self.sums[0], self.wishes())
        limit = math.inf if self.plan.clip is None else self.plan.clip
        norm = clip_by_total_norm(grads, limit, self.ranks.total)
        if self.mixed:
            done = self.mixed.update(self.stepper, grads, norm)
            norm = self.model.backend.xp.where(done > 0, norm, 0 * done)
        else:
            self._watch(grads, norm)
            self.stepper.step(self.model.params, grads)
            done = 1
        self.grads, self.pending, self.counted, self.news = {}, 0, 0.0, {}
        self.step += 1
        self._add(1, norm, done)
        if self.plan.average:
            decay = min(self.plan.average, (1 + self.step) / (10 + self.step))
            for name, average in self.averaged.items():
                self.averaged[name] = average * decay + (1 - decay) * self.model.params[name]

    def quiet(self) -> AbstractContextManager[object]:
        """Silence NumPy's warnings in mixed precision, where the scale is found by overflows."""
        return np.errstate(all="ignore") if self.mixed else nullcontext()

    def _watch(self, grads: dict[str, Array], norm: Array) -> None:
        """Stop where a gradient is not finite; on a device keep the first one for `_check`."""
        backend, step = self.model.backend, self.step + 1
        if backend.host:
            for what, number in (("gradient", norm), ("loss", self.total)):
                if not math.isfinite(number):
                    raise FloatingPointError(_not_finite(step, what, self.ranks.gather(grads)))
            return
        xp, kept = backend.xp, self.spoiled or grads
        first = xp.logical_not(xp.isfinite(norm)) & (self.spoiled_at == 0)
        self.spoiled = {name: xp.where(first, g, kept[name]) for name, g in grads.items()}
        self.spoiled_at = xp.where(first, xp.full_like(self.spoiled_at, step), self.spoiled_at)

    def _check(self) -> None:
        """Stop if anything was not finite since the last record. Waits for the device."""
        if step := int(self.spoiled_at):
            raise FloatingPointError(_not_finite(step, "gradient", self.ranks.gather(self.spoiled)))
        if not all(math.isfinite(float(s)) for s in (self.total, self.sums[1])):
            raise FloatingPointError(_not_finite(self.step, "loss", dict(self.model.params)))
        if self.mixed and float(self.mixed.scale) < 1:
            raise FloatingPointError(
                f"the gradient overflows {self.working.dtype} in step {self.step}, whatever the "
                "loss scale: lower the learning rate, or train without mixed"
            )

    def _add(self, i: int, value: Array, count: Array) -> None:
        self.sums[i], self.counts[i] = self.sums[i] + value, self.counts[i] + count

    def record(self) -> None:
        """Write a record with the means since the last one. Waits for the device."""
        self._check()
        sums = (self.total, self.sums[1])
        loss, norm = (float(s) / (float(n) or 1.0) for s, n in zip(sums, self.counts, strict=True))
        self.sums, self.counts, self.total = [0.0, 0.0], [0, 0], 0.0
        more = {"scale": float(self.mixed.scale)} if self.mixed else {}
        self.news = self._write(loss=loss, rate=self.optimiser.lr, norm=norm, **more)

    def _write(self, **values: float) -> Record:
        line = {"step": self.step, "epoch": self.epoch, **values, "seconds": self.elapsed()}
        self.log.write(line)
        return line

    # validation and the end ----------------------------------------------------------------------

    def validate(self, valid: Callable[[], float]) -> None:
        """Compute and record the validation loss, with the averaged weights if there are some."""
        loss = self._validation(valid)
        self._judge(loss)
        self._write(valid=loss)

    def _validation(self, valid: Callable[[], float]) -> float:
        own = dict(self.model.params)
        self._put_in(self.averaged)
        try:
            loss = float(valid())
        finally:
            self._put_in(own)
        loss = self.ranks.lead(float, loss)  # a difference in the last bit would split the ranks
        if not math.isfinite(loss):
            raise FloatingPointError(f"the validation loss is {loss} after step {self.step}")
        return loss

    def _judge(self, loss: float) -> None:
        """Take a validation loss of the current weights into account."""
        if self.best is None or loss < self.best:
            self.best, self.since = loss, 0
            self.lowest = {k: self._fresh(w) for k, w in self.averaged.items()} or self._copy()
        else:
            self.since += 1
        self.losses.append(loss)
        self.validated = self.step

    def ended(self) -> str:
        """Return why the run is at its end, or an empty string."""
        plan = self.plan
        if (plan.steps or math.inf) <= self.step or (plan.epochs or math.inf) <= self.epoch:
            return "done"
        if plan.patience is not None and self.since > plan.patience:
            return "patience"
        return "minutes" if self.ranks.wishes(self.wishes())[1] else ""

    def stopped(self) -> str:
        """Return "interrupted" if the run is to end early, or an empty string.

        It is not, between gradients that are accumulated for one update, so that none is lost.
        """
        return "interrupted" if not self.pending and self.ranks.wishes(self.wishes())[0] else ""

    def expected(self) -> int | None:
        """Estimate how many steps the run will have, from its progress; None if that is unknown."""
        steps, epochs, minutes = self.plan[:3]
        done = max(
            self.step / (steps or math.inf),
            self.epoch / (epochs or math.inf),
            self.elapsed() / (60 * (minutes or math.inf)),
        )
        return max(self.step, round(self.step / done)) if done else None

    def close(self, valid: Callable[[], float] | None) -> History:
        """Save the run, and put the best weights into the model.

        The record of a validation at the end is stored apart from the others, since a run that goes
        on with another end would not have had it.
        """
        if self.reason != "finished":
            if valid and self.reason != "interrupted" and self.validated < self.step:
                self.closing = self._write(valid=self._validation(valid))
            self.save()
            self._tell_pending()
        if isinstance(self.stepper, Sharded):
            self.stepper.release(self.model.params)
        if self.closing:
            self._judge(self.closing["valid"])
        self._put_in(self.lowest or self.averaged)
        return History(self.log.records, self.reason, self.best)

    def _tell_pending(self) -> None:
        """Report gradients that were computed, and not used before the run ended."""
        if self.pending:
            kept = "" if self.folder is None else "; a run that goes on in this folder has them"
            self._say(
                f"the last {self.pending} gradients came to no update, which takes "
                f"{self.plan.accumulate}{kept}"
            )

    def elapsed(self) -> float:
        """Return the seconds of training, including those before an interruption."""
        return self.seconds + time.monotonic() - self.clock

    def _copy(self) -> dict[str, Array]:
        """Copy the weights that the optimiser changes."""
        return {name: self._fresh(self.model.params[name]) for name in self.optimiser.names}

    def _fresh(self, w: Array) -> Array:
        return self.model.backend.xp.asarray(w, copy=True)

    def _put_in(self, weights: Arrays) -> None:
        for name, w in weights.items():
            self.model.params[name] = w

    # saved, and resumed --------------------------------------------------------------------------

    def open(
        self,
        out: PathLike | None,
        settings: dict[str, object],
        schedule: Schedule | None,
        shard: bool = False,
    ) -> None:
        """Resume the run that is in the folder `out`, which exists, or start one there.

        settings : what decides the numbers beside the plan
        shard : whether the ranks share the optimiser's state; it decides nothing
        """
        self._restore(out, settings, schedule, shard)
        if shard and self.ranks.size > 1:
            self.stepper = Sharded(self.optimiser, self.ranks, self.model.params)

    def _restore(
        self,
        out: PathLike | None,
        settings: dict[str, object],
        schedule: Schedule | None,
        shard: bool,
    ) -> None:
        numbers = self.optimiser.settings
        if schedule:  # which has changed lr, where this optimiser has been in a run before
            numbers["lr"] = self.optimiser.first_rate
        if numbers["groups"] == [[list(self.model.params), {}]]:
            del numbers["groups"]
        name = type(self.optimiser).__name__
        arguments = {"model": repr(self.model), "optimiser": name, **numbers}
        arguments |= self.plan._asdict()
        for name, usual in Plan._field_defaults.items():  # which earlier versions did not write
            if arguments[name] == usual:
                del arguments[name]
        if twice := set(arguments) & set(settings):
            raise ValueError(f"settings has {sorted(twice)}, which are kept anyway: rename them")
        self.settings = {**arguments, **settings}
        self._check_ranks(shard)
        if out is None:
            return
        self.folder = Path(out)
        found = self.ranks.lead(resume.restore, self.folder)
        if found is not None:
            header, arrays = found
            kept, now = header["settings"], {name: self.settings[name] for name in ENDS}
            resume.refuse_changes({**kept, **now}, self.settings)
            if self.ranks.first:
                resume.tell_differences(header["environment"], environment(self.model.backend))
            self._resume({"closing": None, "pending": 0, "counted": 0.0, **header}, arrays)
            changes = [f"{k} was {kept.get(k)} and is now {v}" for k, v in now.items()
                       if kept.get(k) != v]  # fmt: skip
            self._tell(changes)
            self._same_schedule(schedule, bool(changes))
        self.log = Log(self.folder / "log.jsonl" if self.ranks.first else None, self.log.records)

    def _check_ranks(self, shard: bool) -> None:
        """Raise ValueError if the ranks are not about to train the same."""
        if self.ranks.size == 1:
            return
        here = environment(self.model.backend)
        here = {name: version for name, version in here.items() if name != "threads"}
        here["backend"] = self.model.backend.name  # the device may be another one
        self.ranks.refuse_differences("the ranks have different versions", here)
        settings = {**self.settings, "shard": shard}
        self.ranks.refuse_differences("the ranks have different settings", settings)
        self.ranks.refuse_differences(
            "the ranks begin with different weights, so give each layer a seed", self._checksums()
        )

    def check(self) -> None:
        """Raise ValueError if weights, optimiser or data differ on some ranks."""
        if self.ranks.size > 1:
            items = {**self._checksums(), "the data read so far": f"{self.data:08x}"}
            told = f"the ranks have come apart by step {self.step}"
            self.ranks.refuse_differences(told, items)

    def _checksums(self) -> dict[str, str]:
        slots = {} if self.ranks.sharded else self.optimiser.slots
        arrays = {**self.model.params, **{f"the optimiser's {k}": v for k, v in slots.items()}}
        return {name: f"{checksum(to_numpy(v)):08x}" for name, v in arrays.items()}

    def _tell(self, changes: list[str]) -> None:
        """Decide whether the run goes on, and report it."""
        over = self.reason not in ("", "interrupted")
        beyond = self.step > (self.plan.steps or math.inf)
        beyond |= (self.epoch, self.piece) > (self.plan.epochs or math.inf, 0)
        why = f" ({'; '.join(changes)})" if changes else ""
        if beyond or (over and self.ended()):
            told = f"is finished ({self.step} steps)" if over else f"has {self.step} steps"
            self.reason, told = "finished", f"{told}{why}; nothing is changed"
            self.log.records = [*self.log.records, *([self.closing] if self.closing else [])]
        else:
            self.reason, self.closing = "", None
            told = f"goes on after step {self.step}{why}"
        self._say(f"the run in {self.folder} {told}")

    def _say(self, text: str) -> None:
        if self.ranks.first:
            print(f"gru_any: {text}", file=sys.stderr)

    def _same_schedule(self, schedule: Schedule | None, other_end: bool) -> None:
        """Check that the schedule still gives the last rate, since functions cannot be compared.

        Where the run has another end, a schedule that depends on the end is reported, not refused.
        """
        step, count, rate = self.rated or (0, 0, None)
        now = float(schedule(step, self.losses[:count])) if schedule and self.rated else None
        if now == rate and not (schedule and self.step and not self.rated):
            return
        told = f"the rate was {rate} in step {step + 1} and is now {now}"
        if not other_end or now is None or rate is None:
            raise ValueError(
                f"this folder holds a run with another schedule: {told}. Take it back, or give "
                "another folder"
            )
        if self.reason != "finished":
            self._say(
                f"the schedule would have given other rates so far: {told}; the run is not the "
                "one that had this end from the start"
            )

    def save(self) -> None:
        """Write a checkpoint, if there is a folder."""
        self._check()  # weights that are not finite are never saved
        if self.folder is None:
            return
        state, grads, loss = self._of_all_ranks()
        self.seconds, self.clock = self.elapsed(), time.monotonic()
        header, slots = {name: getattr(self, name) for name in NUMBERS}, self._whole_state()
        header |= {
            "settings": self.settings,
            "environment": environment(self.model.backend),
            "rng": self.rng.bit_generator.state,
            "lr": self.optimiser.lr,
            "count": slots.pop("count"),
            "sums": [float(loss), float(self.sums[1])],
            "counts": [float(n) for n in self.counts],
            "mixed": [float(v) for v in (self.mixed.scale, self.mixed.good)] if self.mixed else [],
            "records": self.log.records[:-1] if self.closing else self.log.records,
            "closing": self.closing,
            "description": describe(self.model),
        }
        groups = {"weights": self.model.params, "optimiser": slots,
                  "state": {str(i): h for i, h in enumerate(state)},
                  "averaged": self.averaged, "lowest": self.lowest, "grads": grads}  # fmt: skip
        arrays = {f"{g}/{k}": to_numpy(v) for g, part in groups.items() for k, v in part.items()}
        self.ranks.lead(resume.store, self.folder, header, arrays)

    def _of_all_ranks(self) -> tuple[list[Array], dict[str, Array], Array]:
        """Return the state of all rows, and the pending gradients and loss of all ranks."""
        if self.ranks.size == 1:
            return self.state, self.grads, self.sums[0]
        parts = self.ranks.every([to_numpy(h) for h in self.state])
        state = [np.concatenate(rows, axis=1) for rows in zip(*parts, strict=True)]
        if not self.pending:
            return state, {}, self.total
        return state, *self.ranks.sum_whole(self.grads, self.sums[0], self.wishes())

    def _whole_state(self) -> dict[str, Any]:
        """Return the optimiser's state; if it is sharded, on the first rank alone."""
        if isinstance(self.stepper, Sharded):
            return self.stepper.state()
        return self.optimiser.state

    def _resume(self, header: resume.Header, arrays: dict[str, HostArray]) -> None:
        backend = self.model.backend
        groups: dict[str, dict[str, Array]] = {}
        for name, array in arrays.items():
            group, _, key = name.partition("/")
            dtype = (self.working if group == "state" else self.model).dtype
            groups.setdefault(group, {})[key] = backend.put(array, dtype)
        for name in NUMBERS:
            setattr(self, name, header[name])
        self._put_in(groups["weights"])
        if self.mixed:
            self.mixed.put(*header["mixed"])
        self.optimiser.state = {"count": header["count"], **groups.get("optimiser", {})}
        self.optimiser.lr = header["lr"]
        self.rng.bit_generator.state = header["rng"]
        self.sums, self.counts, self.total = header["sums"], header["counts"], header["sums"][0]
        state = groups.get("state", {})
        self.state = [state[str(i)] for i in range(len(state))]
        self.state = [h[:, self.ranks.rows(h.shape[1]), ...] for h in self.state]
        self.averaged, self.lowest = groups.get("averaged", {}), groups.get("lowest", {})
        self.grads, self.closing = groups.get("grads", {}), header["closing"]
        self.log.records = header["records"]
        if not self.ranks.first:  # the sums of all ranks are the first one's
            self.grads = {name: 0 * g for name, g in self.grads.items()}
            self.sums = [0.0, self.sums[1]]

    def _tell_frozen(self) -> None:
        """Report which parameters the optimiser does not hold, so that none is forgotten."""
        params, names = self.model.params, self.optimiser.names
        refuse_shared(params)
        if unknown := set(names) - set(params):
            raise KeyError(f"the optimiser holds {sorted(unknown)}, which the model does not have")
        if frozen := [name for name in params if name not in names]:
            self._say(
                f"{len(frozen)} of {len(params)} parameters are frozen, since the optimiser does "
                f"not hold them: {', '.join(frozen)}"
            )


def _not_finite(step: int, what: str, arrays: dict[str, Array]) -> str:
    """Describe the first array that is not finite, and which gates' part of it."""
    where = ", though parameters and gradients are"
    for name, array in arrays.items():
        wrong = ~np.isfinite(to_numpy(array))
        if wrong.any():
            where = f": first in {name}"
            if "_ih" in name or "_hh" in name:  # (3H, .): the rows of r, z and n
                parts = zip(GATES, np.split(wrong, 3), strict=True)
                where += f", gate {' and '.join(gate for gate, part in parts if part.any())}"
            break
    return (
        f"the {what} is not finite in step {step}{where}. A lower learning rate or a smaller "
        "clip may mend it"
    )

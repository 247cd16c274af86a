"""An optimiser whose state is cut into shares, one a rank, as stage 1 of ZeRO does.

Each rank keeps the running averages of its shares alone, updates these parts of the parameters, and
gets the other parts from the other ranks. That is the same training if an update of an element
depends on that element alone, as in all optimisers here.
"""

from collections.abc import Mapping, MutableMapping
from typing import Any

import numpy as np

from ..backend import of, to_numpy
from ..typing import Array, Arrays
from .distributed import Alone
from .optim import Optimizer, is_elementwise


class Sharded:
    """An optimiser of which each rank keeps its shares.

    Parameters
    ----------
    optimiser : Optimizer
        It holds nothing but the shares until `release`.
    ranks : Alone
    params : mapping
        The parameters of the model, whole on every rank.

    Raises
    ------
    ValueError
        The update of an element may depend on others.
    """

    def __init__(self, optimiser: Optimizer, ranks: Alone, params: Arrays) -> None:
        if not is_elementwise(optimiser):
            name = type(optimiser).__name__
            raise ValueError(
                f"shard=True cuts parameters into parts, and the update of {name} may need whole "
                "ones, such as their norm: train without shard, or, if each element is updated by "
                f"itself, say elementwise = True in the class {name}"
            )
        self._optimiser, self._ranks = optimiser, ranks
        ours = {name: params[name] for name in optimiser.names}
        ranks.shard(ours)
        kinds = {
            kind: {name: _copy(share) for name, share in ranks.share(slots).items()}
            for kind, slots in _by_kind(optimiser.slots).items()
        }
        optimiser.rebase(ranks.share(ours), _by_name(kinds), in_parts=True)

    def step(
        self, params: MutableMapping[str, Array], grads: Arrays, finite: Array | None = None
    ) -> None:
        """Update the parameters on all ranks by this rank's shares of the gradients."""
        shares = self._ranks.share({name: params[name] for name in self._optimiser.names})
        self._optimiser.step(shares, grads, finite)
        for name, found in self._ranks.gather(shares).items():
            whole = params[name]
            try:
                whole[...] = found
            except TypeError:  # an array that cannot be written to
                whole = _copy(found)
            params[name] = whole

    def state(self) -> dict[str, Any]:
        """Return the whole state on the first rank, as `Optimizer.state`; nothing on the others."""
        kept: dict[str, dict[str, Array]] = {}
        for kind, shares in _by_kind(self._optimiser.slots).items():
            found = self._ranks.gather(shares)
            if self._ranks.first:
                kept[kind] = {name: np.array(to_numpy(whole)) for name, whole in found.items()}
        return {"count": int(self._optimiser.count), **_by_name(kept)}

    def release(self, params: Arrays) -> None:
        """Give the optimiser its whole state back, on every rank."""
        kinds = {
            kind: {name: _copy(whole) for name, whole in self._ranks.gather(shares).items()}
            for kind, shares in _by_kind(self._optimiser.slots).items()
        }
        ours = {name: params[name] for name in self._optimiser.names}
        self._optimiser.rebase(ours, _by_name(kinds))


def _by_kind(slots: Arrays) -> dict[str, dict[str, Array]]:
    """{"m.weight": array} -> {"m": {"weight": array}}."""
    kinds: dict[str, dict[str, Array]] = {}
    for key, array in slots.items():
        kind, _, name = key.partition(".")
        kinds.setdefault(kind, {})[name] = array
    return kinds


def _by_name(kinds: Mapping[str, Arrays]) -> dict[str, Array]:
    return {f"{kind}.{name}": a for kind, arrays in kinds.items() for name, a in arrays.items()}


def _copy(array: Array) -> Array:
    return of(array).xp.asarray(array, copy=True)

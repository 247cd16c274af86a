"""Models whose weights are copied, and laid out for the processor, once and for all."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NoReturn

from .. import equations
from ..nn.chain import Chain
from ..nn.gru import GRU
from ..nn.stack import Stack
from ..nn.sweep import Weights

REFUSAL = (
    "the weights of a frozen model never change and have no gradients: work on the model that it "
    "was made from, and freeze that again"
)


def freeze(model: Any) -> Any:
    """Return the model with private weights that never change, which makes calls cheaper.

    It is called like the model: whole sequences with h0 and lengths, `last`, `step`, `taps`, and a
    `Stream` takes it. On NumPy with Numba the weights are packed once, and not in each call; on
    other backends the frozen model is a private copy. Many threads may call it at once.

    Parameters
    ----------
    model : GRU or Chain
        Of any backend and dtype. What is done to its parameters later does not show. The Linear and
        Embedding layers of a frozen Chain are private copies.

    Returns
    -------
    frozen : GRU or Chain
        `frozen.params` holds copies. `frozen.to(...)`, copy and pickle give frozen models again.
        `repr` tells the memory of the weights, packed copies included.

    Raises
    ------
    TypeError
        The model is neither a GRU nor a Chain. Later, by `frozen.vjp`, `frozen.load_params` and by
        an assignment to `frozen.params`.

    Examples
    --------
    >>> import numpy as np
    >>> from gru_any import GRU
    >>> from gru_any.deploy import freeze
    >>> gru = GRU(3, 4, seed=0)
    >>> frozen = freeze(gru)
    >>> x = np.ones((5, 2, 3), dtype="float32")
    >>> before, _ = gru(x)
    >>> gru.params["weight_ih_l0"][...] = 0
    >>> bool(np.allclose(frozen(x)[0], before, atol=1e-6))
    True
    """
    if isinstance(model, Chain):
        return FrozenChain(model)
    if isinstance(model, GRU):
        return FrozenGRU(model)
    raise TypeError(f"the model is a {type(model).__name__}, expected a GRU or a Chain")


class Copies(Mapping[str, Any]):
    """Parameters to be read: each entry is a copy."""

    def __init__(self, params: Mapping[str, Any], xp: Any) -> None:
        self._params, self._xp = params, xp

    def __getitem__(self, name: str) -> Any:
        return self._xp.asarray(self._params[name], copy=True)

    def __setitem__(self, name: str, array: Any) -> NoReturn:
        raise TypeError(REFUSAL)

    def refuse_untied(self) -> None:
        """Do nothing: no entry can have been replaced."""

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)


class FrozenGRU(GRU):
    """A GRU that `freeze` has made."""

    def __init__(self, gru: GRU) -> None:
        self._own = gru.to()
        self.__dict__.update({k: v for k, v in vars(self._own).items() if k != "params"})
        self._weights: tuple[Any, Any] = (None, {})  # made for which runner, and they
        self._single: tuple[Any, Any] = (None, [])  # likewise, for `step`
        self._packed()

    @property
    def params(self) -> Any:
        """Copies of the parameters."""
        return Copies(self._own.params, self.backend.xp)

    @params.setter
    def params(self, value: Any) -> NoReturn:
        raise TypeError(REFUSAL)

    def _packed(self) -> dict[Any, Weights]:
        """The weights by layer and direction, as the runner takes them; none on a device."""
        made_for, weights = self._weights
        run, stack = self._run, self._own._stack
        if run is not made_for:
            step = equations.variant(self.reset_after).step
            keys = [(n, suffix) for n in range(self.num_layers) for suffix in self.suffixes]
            weights = {
                key: Weights(*run.frozen_weights(step, *stack.weights(self._own.params, *key)))
                for key in (keys if self.backend.host else [])
            }
            self._weights = run, weights
        return weights

    def _stack_on(self, run: Any) -> Stack:
        stack = self._own._stack_on(run)
        return LaidOut(*stack) if self.backend.host else stack

    def _given(self, entry: Any, rng: Any) -> Any:
        given, full = self._own._given(entry, rng)
        return (given._replace(params=self._packed()) if self.backend.host else given), full

    def step(self, x_t: Any, state: Any = None) -> tuple[Any, Any]:
        """Advance by one step, as `GRU.step` does."""
        if state is not None:
            self.backend.check("state", state, self.dtype)
        return self._prepared()(x_t, state)

    def _prepared(self) -> Any:
        made_for, steps = self._single
        if made_for is not self._run:
            steps = self._own._steps(self._run.prepare_step)
            self._single = self._run, steps
        return partial(self._step, steps)

    def vjp(self, *arguments: Any, **options: Any) -> NoReturn:
        """Refuse: there are no gradients."""
        raise TypeError(REFUSAL)

    def load_params(self, mapping: Any) -> NoReturn:
        """Refuse: the weights never change."""
        raise TypeError(REFUSAL)

    def to(self, backend: Any = None, device: Any = None, dtype: str | None = None) -> Any:
        """Return a frozen model on another backend, device or dtype."""
        return FrozenGRU(self._own.to(backend, device, dtype))

    def __repr__(self) -> str:
        text, _, note = repr(self._own).partition("  # ")
        held = [*self._own.params.values()]
        for W, b, rest in self._packed().values():
            for v in (W, b, *rest):
                held += getattr(v, "arrays", [v])
        size = sum(getattr(v, "nbytes", 0) for v in {id(v): v for v in held}.values())
        return f"freeze({text})  # {note}, {size / 1e6:.1f} MB"

    def __reduce__(self) -> Any:
        return freeze, (self._own,)


class LaidOut(Stack):
    """A stack that is given weights in place of the parameters."""

    def weights(self, params: Any, layer: int, suffix: str) -> Weights:
        """Of one layer in one direction."""
        return params[layer, suffix]


class FrozenChain(Chain):
    """A Chain that `freeze` has made."""

    def __init__(self, chain: Chain) -> None:
        super().__init__(*(FrozenGRU(v) if isinstance(v, GRU) else v.to() for v in chain.layers))
        self.params: Any = Copies(self.params, self.backend.xp)

    def vjp(self, *arguments: Any, **options: Any) -> NoReturn:
        """Refuse: there are no gradients."""
        raise TypeError(REFUSAL)

    def load_params(self, mapping: Any) -> NoReturn:
        """Refuse: the weights never change."""
        raise TypeError(REFUSAL)

    def _thawed(self) -> Chain:
        return Chain(*(v._own if isinstance(v, FrozenGRU) else v for v in self.layers))

    def to(self, backend: Any = None, device: Any = None, dtype: str | None = None) -> Chain:
        """Return a frozen model on another backend, device or dtype."""
        return FrozenChain(self._thawed().to(backend, device, dtype))

    def __repr__(self) -> str:
        return f"freeze({super().__repr__()})"

    def __reduce__(self) -> Any:
        return freeze, (self._thawed(),)

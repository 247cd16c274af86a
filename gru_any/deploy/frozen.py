"""Models whose weights are copied and packed once and for all."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NoReturn

from ..backend import Backend, by_place
from ..backend.contract import Runner
from ..equations import Variant
from ..nn.chain import Chain
from ..nn.gru import GRU, LayerStep
from ..nn.params import BackendLike
from ..nn.stack import Stack
from ..nn.sweep import Weights
from ..typing import Array, Arrays, Device, Namespace

REFUSAL = (
    "the weights of a frozen model never change and have no gradients: work on the model that it "
    "was made from, and freeze that again"
)


def freeze(model: GRU | Chain) -> Any:
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


class Copies(Mapping[str, Array]):
    """Parameters to be read: each entry is a copy."""

    def __init__(self, params: Arrays, xp: Namespace) -> None:
        self._params, self._xp = params, xp

    def __getitem__(self, name: str) -> Array:
        return self._xp.asarray(self._params[name], copy=True)

    def __setitem__(self, name: str, array: Array) -> NoReturn:
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
        # the runner that they were packed for; the weights by layer and suffix
        self._weights: tuple[Runner | None, dict[tuple[int, str], Weights]] = None, {}
        # the same for `step`
        self._layer_steps: tuple[Runner | None, list[LayerStep]] = None, []
        self._packed()

    @property
    def params(self) -> Any:
        """Copies of the parameters."""
        return Copies(self._own.params, self.backend.xp)

    @params.setter
    def params(self, value: object) -> NoReturn:
        raise TypeError(REFUSAL)

    def _packed(self) -> dict[tuple[int, str], Weights]:
        """Return the packed weights by layer and suffix; none on a device."""
        packed_for, weights = self._weights
        run = self._runner
        if run is not packed_for:
            stack = self._own._stack(run)
            keys = [(n, suffix) for n in range(self.num_layers) for suffix in self.suffixes]
            weights = {
                key: Weights(
                    *run.frozen_weights(stack.variant.step, *stack.weights(self._own.params, *key))
                )
                for key in (keys if self.backend.host else [])
            }
            self._weights = run, weights
        return weights

    def _new_stack(self, run: Runner, variant: Variant) -> Stack:
        stack = super()._new_stack(run, variant)
        return PackedStack(*stack) if self.backend.host else stack

    def _arrays(self) -> Mapping[Any, Any]:
        return self._packed() if self.backend.host else self._own._arrays()

    @by_place
    def step(self, x_t: Array, state: Array | None = None) -> tuple[Array, Array]:
        """Advance by one step, as `GRU.step` does."""
        if state is not None:
            self.backend.check("state", state, self.dtype)
        return self._prepared_step()(x_t, state)

    @by_place
    def _prepared_step(self) -> Callable[[Array, Array | None], tuple[Array, Array]]:
        packed_for, steps = self._layer_steps
        if packed_for is not self._runner:
            steps = self._own._steps(self._runner.prepare_step)
            self._layer_steps = self._runner, steps
        return partial(self._step, steps)

    def vjp(self, *arguments: object, **options: object) -> NoReturn:
        """Refuse: there are no gradients."""
        raise TypeError(REFUSAL)

    def load_params(self, mapping: Arrays) -> NoReturn:
        """Refuse: the weights never change."""
        raise TypeError(REFUSAL)

    def to(
        self,
        backend: BackendLike | None = None,
        device: Device = None,
        dtype: str | None = None,
    ) -> "FrozenGRU":
        """Return a frozen model on another backend, device or dtype."""
        return FrozenGRU(self._own.to(backend, device, dtype))

    def twin(self, backend: Backend, dtype: str) -> "FrozenGRU":
        """Return a frozen model on another backend, whose weights are copies, packed there."""
        return self.to(backend, dtype=dtype)

    def follow(self, twin: "FrozenGRU", views: object) -> None:
        """Do nothing: nothing changes."""

    def __repr__(self) -> str:
        text, _, note = repr(self._own).partition("  # ")
        held = [*self._own.params.values()]
        for W, b, rest in self._packed().values():
            for v in (W, b, *rest):
                held += getattr(v, "arrays", [v])
        size = sum(getattr(v, "nbytes", 0) for v in {id(v): v for v in held}.values())
        return f"freeze({text})  # {note}, {size / 1e6:.1f} MB"

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return freeze, (self._own,)


class PackedStack(Stack):
    """A stack that reads packed weights in place of parameters."""

    def weights(self, params: Mapping[Any, Any], layer: int, suffix: str) -> Weights:
        """Return those of one layer in one direction."""
        packed: Weights = params[layer, suffix]
        return packed


class FrozenChain(Chain):
    """A Chain that `freeze` has made."""

    def __init__(self, chain: Chain) -> None:
        super().__init__(*(FrozenGRU(v) if isinstance(v, GRU) else v.to() for v in chain.layers))
        self.params: Any = Copies(self.params, self.backend.xp)

    def vjp(self, *arguments: object, **options: object) -> NoReturn:
        """Refuse: there are no gradients."""
        raise TypeError(REFUSAL)

    def load_params(self, mapping: Arrays) -> NoReturn:
        """Refuse: the weights never change."""
        raise TypeError(REFUSAL)

    def _thawed(self) -> Chain:
        return Chain(*(v._own if isinstance(v, FrozenGRU) else v for v in self.layers))

    def to(
        self,
        backend: BackendLike | None = None,
        device: Device = None,
        dtype: str | None = None,
    ) -> "FrozenChain":
        """Return a frozen model on another backend, device or dtype."""
        return FrozenChain(self._thawed().to(backend, device, dtype))

    def __repr__(self) -> str:
        return f"freeze({super().__repr__()})"

    def __reduce__(self) -> tuple[Callable[..., Chain], tuple[object, ...]]:
        return freeze, (self._thawed(),)

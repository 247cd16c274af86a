"""Models whose weights are copied and packed once and for all."""

from collections.abc import Callable
from typing import Any, NoReturn

from ..backend.rounding import SMALL
from ..nn.chain import Chain
from ..nn.gru import GRU
from ..nn.layers import Embedding, Linear
from ..nn.params import BackendLike, Layer
from ..typing import Arrays, Device
from .frozen_layers import REFUSAL, Copies, Frozen, FrozenEmbedding, FrozenGRU, FrozenLinear

WEIGHTS = ("float32", *SMALL)
KINDS: dict[type, Any] = {GRU: FrozenGRU, Linear: FrozenLinear, Embedding: FrozenEmbedding}


def freeze(model: GRU | Chain, weights: str = "float32") -> Any:
    """Return the model with private weights that never change, which makes calls cheaper.

    It is called like the model: whole sequences with h0 and lengths, `last`, `step`, `taps`, and a
    `Stream` takes it. On NumPy with Numba the weights are packed once, and not in each call; on
    other backends the frozen model is a private copy. Many threads may call it at once.

    Parameters
    ----------
    model : GRU or Chain
        Of any backend and dtype. Later changes of its parameters have no effect.
    weights : str
        "float32": as they are, in the model's own dtype, whichever that is. "bfloat16" rounds each
        matrix of a float32 model to 8 significant bits, and "int8" each of its rows to 127 steps on
        either side of zero, with a scale of its own. Biases, states and sums stay float32. With
        Numba only the small weights are stored, so that a model takes a half or a quarter of the
        memory, and steps of few rows of a large model take less time. There a single row is
        multiplied by int8 in integers: it is rounded to 16 bits first, for this product alone,
        which changes less than the rounding of the weights. Without Numba, and on other backends,
        the rounded weights are stored in float32: the results are the same up to rounding, without
        these savings.

    Returns
    -------
    frozen : GRU or Chain
        `frozen.params` holds copies of the rounded weights, and `frozen.nbytes` is the memory that
        the weights take, packed copies included. `frozen.to(...)`, copy and pickle give
        frozen models again.

    Raises
    ------
    TypeError
        The model is neither a GRU nor a Chain. Later, by `frozen.vjp`, `frozen.load_params` and by
        an assignment to `frozen.params`.
    ValueError
        `weights` is none of the three, or a small form is asked for and the model is not float32;
        or for int8 a matrix holds NaN or infinity.

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
    if not isinstance(model, GRU | Chain):
        raise TypeError(f"the model is a {type(model).__name__}, expected a GRU or a Chain")
    if weights not in WEIGHTS:
        raise ValueError(f"weights is {weights!r}, expected one of {', '.join(map(repr, WEIGHTS))}")
    if isinstance(model, Frozen | FrozenChain):
        model = model._thawed()
    return FrozenChain(model, weights) if isinstance(model, Chain) else FrozenGRU(model, weights)


class FrozenChain(Chain):
    """A Chain that `freeze` has made."""

    def __init__(self, chain: Chain, weights: str) -> None:
        self.weights = weights
        super().__init__(*(_frozen(v, weights, f"{i}.") for i, v in enumerate(chain.layers)))
        self.params: Any = Copies(self.params, self.backend.xp)

    @property
    def nbytes(self) -> int:
        """The memory of the weights in bytes, packed copies included."""
        return sum(v.nbytes for v in self.layers if isinstance(v, Frozen))

    def vjp(self, *arguments: object, **options: object) -> NoReturn:
        """Refuse: there are no gradients."""
        raise TypeError(REFUSAL)

    def load_params(self, mapping: Arrays) -> NoReturn:
        """Refuse: the weights never change."""
        raise TypeError(REFUSAL)

    def _thawed(self) -> Chain:
        return Chain(*(v._thawed() if isinstance(v, Frozen) else v for v in self.layers))

    def to(
        self,
        backend: BackendLike | None = None,
        device: Device = None,
        dtype: str | None = None,
    ) -> "FrozenChain":
        """Return a frozen model on another backend, device or dtype."""
        return FrozenChain(self._thawed().to(backend, device, dtype), self.weights)

    def __repr__(self) -> str:
        return f"freeze({super().__repr__()})"

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return freeze, (self._thawed(), self.weights)


def _frozen(layer: Layer, weights: str, name: str) -> Layer:
    """Return a layer frozen; one without parameters is copied."""
    kind = KINDS.get(type(layer))
    frozen: Layer = layer.to() if kind is None else kind(layer, weights, name)
    return frozen

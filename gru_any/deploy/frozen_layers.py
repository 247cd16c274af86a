"""Layers whose weights are copied, rounded and packed once and for all."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

from ..backend import Backend, runner, to_numpy
from ..backend.contract import Matrix, OneBlock, Runner
from ..backend.rounding import SMALL, RoundedTable, restore, round_weights
from ..equations import Variant
from ..nn.gru import GRU, LayerStep
from ..nn.layers import Embedding, Linear
from ..nn.params import BackendLike, Layer
from ..nn.stack import Stack
from ..nn.sweep import Weights
from ..typing import Array, Arrays, Device, Namespace

REFUSAL = (
    "the weights of a frozen model never change and have no gradients: work on the model that it "
    "was made from, and freeze that again"
)


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


class Frozen(Layer):
    """The base of frozen layers, which holds weights in the form that a runner reads.

    name: what an error calls the layer's parameters, such as "2." in a Chain.
    """

    def __init__(self, layer: Layer, weights: str, name: str = "") -> None:
        own = layer.to()
        if weights in SMALL:
            own.load_params(_rounded(own, weights, name))
        self.__dict__.update({k: v for k, v in vars(own).items() if k != "params"})
        self.weights, self._names = weights, list(own.params)
        self._small = weights if weights in SMALL else ""
        self._empty: Layer = own.over(own.backend, own.dtype, [])
        # the runner that the form is for, the form, and the parameters that stand beside it
        self._held: tuple[Runner | None, Any, dict[str, Array]] = None, {}, dict(own.params)
        self._form()

    def _pack(self, run: Runner, own: Any) -> Any:
        """Return the weights of a layer in the form in which a runner reads them."""
        raise NotImplementedError

    def _matrices(self, form: Any) -> dict[str, Matrix]:
        """Return the parameters that a form holds."""
        raise NotImplementedError

    def _runs(self) -> Runner:
        return runner(self.backend, dtype=self.dtype)

    def _form(self) -> Any:
        made_for, form, _ = self._held
        run = self._runs()
        if run is not made_for:
            own = self._thawed()
            form = self._pack(run, own)
            held = self._matrices(form)
            self._held = run, form, {k: v for k, v in own.params.items() if k not in held}
        return form

    def _thawed(self) -> Any:
        """Return the layer that this would be if it were not frozen."""
        _, form, beside = self._held
        whole = beside | {k: getattr(M, "matrix", M) for k, M in self._matrices(form).items()}
        arrays = [(name, self._to_storage(whole[name])) for name in self._names]
        return self._empty.over(self.backend, self.dtype, arrays)

    @property
    def params(self) -> Any:
        """Copies of the parameters, as they were rounded."""
        return Copies(self._thawed().params, self.backend.xp)

    @params.setter
    def params(self, value: object) -> NoReturn:
        raise TypeError(REFUSAL)

    @property
    def nbytes(self) -> int:
        """The memory of the weights in bytes, packed copies included."""
        form = self._form()
        return total_bytes([self._held[2].values(), self._matrices(form).values()])

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
    ) -> Any:
        """Return a frozen layer on another backend, device or dtype."""
        return type(self)(self._thawed().to(backend, device, dtype), self.weights)

    def twin(self, backend: Backend, dtype: str) -> Any:
        """Return a frozen layer on another backend, whose weights are copies, packed there."""
        return self.to(backend, dtype=dtype)

    def follow(self, twin: object, views: object) -> None:
        """Do nothing: nothing changes."""

    def __repr__(self) -> str:
        text, _, note = repr(self._thawed()).partition("  # ")
        return f"freeze({text})  # {note}, {self.weights}, {self.nbytes / 1e6:.1f} MB"

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return type(self), (self._thawed(), self.weights)


class FrozenGRU(Frozen, GRU):
    """A GRU that `freeze` has made."""

    def __init__(self, layer: GRU, weights: str, name: str = "") -> None:
        # the runner that the functions of `step` are for, and these; those of calls likewise
        self._layer_steps: tuple[Runner | None, list[LayerStep]] = None, []
        self._layer_blocks: tuple[Runner | None, list[list[OneBlock]]] = None, []
        super().__init__(layer, weights, name)

    def _runs(self) -> Runner:
        return self._runner

    def _pack(self, run: Runner, own: GRU) -> Any:
        if not self.backend.host:
            return dict(own.params)
        stack = own._stack(run)
        keys = [(n, suffix) for n in range(self.num_layers) for suffix in self.suffixes]
        taken = {key: stack.weights(own.params, *key) for key in keys}
        return {
            key: Weights(*run.frozen_weights(stack.variant.step, *of_layer, self._small))
            for key, of_layer in taken.items()
        }

    def _matrices(self, form: Any) -> dict[str, Matrix]:
        if not self.backend.host:
            return dict(form)
        found: dict[str, Matrix] = {}
        for (n, suffix), (W, _, (U, *_)) in form.items():
            found |= {f"weight_ih_l{n}{suffix}": W, f"weight_hh_l{n}{suffix}": U}
        return found

    def _new_stack(self, run: Runner, variant: Variant) -> Stack:
        stack = super()._new_stack(run, variant)
        return PackedStack(*stack) if self.backend.host else stack

    def _arrays(self) -> Mapping[Any, Any]:
        found: Mapping[Any, Any] = self._form()
        return found

    def _blocks(self) -> list[list[OneBlock]]:
        """Return the prepared layers, made once for each runner because small calls are many."""
        (made_for, layers), run = self._layer_blocks, self._runner
        if made_for is not run:
            layers = [
                [self._block(run, n, s) for s in self.suffixes] for n in range(self.num_layers)
            ]
            self._layer_blocks = run, layers
        return layers

    def _block(self, run: Runner, layer: int, suffix: str) -> OneBlock:
        W, b, recurrent = self._form()[layer, suffix]
        return run.prepare_block(self.variant.step, W, b, recurrent, suffix == "_reverse")

    def _layer_functions(self, prepared: bool) -> list[LayerStep]:
        made_for, steps = self._layer_steps
        if made_for is not self._runner:
            steps = self._steps(self._runner.prepare_step)
            self._layer_steps = self._runner, steps
        return steps


class PackedStack(Stack):
    """A stack that reads packed weights in place of parameters."""

    def weights(self, params: Mapping[Any, Any], layer: int, suffix: str) -> Weights:
        """Return the packed weights of one layer in one direction."""
        packed: Weights = params[layer, suffix]
        return packed


class FrozenLinear(Frozen, Linear):
    """A Linear that `freeze` has made."""

    def _pack(self, run: Runner, own: Linear) -> Matrix:
        weight = self._to_arithmetic(own.params["weight"])
        return run.frozen_matrix(weight, self._small) if self.backend.host else weight

    def _matrices(self, form: Matrix) -> dict[str, Matrix]:
        return {} if isinstance(form, dict) else {"weight": form}

    def _affine(self, rows: Array) -> Array:
        W, b = self._form(), self._held[2].get("bias")
        b = None if b is None else self._to_arithmetic(b)
        return self._runs().frozen_affine(rows, W, b)


class FrozenEmbedding(Frozen, Embedding):
    """An Embedding that `freeze` has made."""

    def _pack(self, run: Runner, own: Embedding) -> Any:
        table = own.params["weight"]
        return RoundedTable(table, self._small) if self._small and self.backend.host else table

    def _matrices(self, form: Any) -> dict[str, Matrix]:
        return {} if isinstance(form, dict) else {"weight": form}

    def _take(self, rows: Array) -> Array:
        table = self._form()
        if isinstance(table, RoundedTable):
            return table.take(rows)
        return self.backend.xp.take(table, rows, axis=0)


def total_bytes(groups: Iterable[Iterable[Any]]) -> int:
    """Return the bytes of all arrays and matrices, each array counted once."""
    arrays = [a for group in groups for v in group for a in getattr(v, "arrays", [v])]
    return sum(getattr(a, "nbytes", 0) for a in {id(a): a for a in arrays}.values())


def _rounded(layer: Layer, weights: str, name: str) -> dict[str, Array]:
    """Return the parameters, of which the matrices are rounded."""
    if layer.dtype != "float32":
        raise ValueError(
            f"weights={weights!r} needs a model of float32, this one is {layer.dtype}: freeze "
            'model.to(dtype="float32")'
        )
    host = {key: to_numpy(v) for key, v in layer.params.items()}
    return {
        key: restore(*round_weights(name + key, v, weights)) if v.ndim == 2 else v
        for key, v in host.items()
    }

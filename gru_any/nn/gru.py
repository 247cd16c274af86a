"""The GRU over whole sequences: layers, directions, lengths, dropout between layers."""

import math
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any, TypeAlias

from .. import arguments, equations
from ..backend import by_place, runner
from ..backend.contract import OneBlock, Runner
from ..equations import Variant
from ..errors import check_shape
from ..normalisation import with_layer_norm
from ..regularisation import expected_zoneout, recurrent_dropout, zoneout
from ..typing import Array, Arrays, Device, Lengths, Rng, Shape
from . import options
from .init import initial
from .layout import NO_RESTARTS, Call, SequenceLayout
from .masks import NO_MASKS, Masks, draw
from .merge import merge
from .params import BackendLike, Layer
from .pullback import BlockPullback, Pullback
from .stack import ForwardInputs, LayerResiduals, Stack
from .sweep import Segment, steps_of_block
from .tangents import (
    DualPullback,
    check_params_dot,
    dual_layer,
    lift,
    refuse_no_direction,
    split_duals,
)
from .weights import parameter_shapes, variant_advice

LayerStep: TypeAlias = Callable[[Array, Array], tuple[Array, Array]]  # x_t, h -> y_t, h
# settings that files contain only where they differ from these
LATER = {
    "reverse": False, "weight_dropout": 0.0, "recurrent_dropout": 0.0, "zoneout": 0.0,
    "layer_norm": False,
}  # fmt: skip


class GRU(Layer):
    """A gated recurrent unit over sequences, with the conventions of `torch.nn.GRU`.

    Letters: T time, B batch, I input size, H hidden size, L layers, D directions (1 or 2).

    Parameters
    ----------
    input_size, hidden_size : int
        I and H.
    num_layers : int
        L. Layer l > 0 reads the outputs of layer l - 1.
    bias : bool
        Whether the layers have biases.
    batch_first : bool
        x and y are (B, T, .) in place of (T, B, .). States keep their shape.
    dropout : float
        Probability with which an element that passes from one layer to the next is set to 0; the
        others are divided by 1 - dropout. Acts only in `vjp` with `rng`; needs num_layers > 1.
    bidirectional : bool
        A second GRU reads from each sequence's end; y holds both, as `merge` says.
    reverse : bool
        A single direction, which reads from each sequence's end; the names of its parameters end in
        `_reverse`. y_t still belongs to x_t. Not together with bidirectional.
    weight_dropout : float
        Probability with which an entry of weight_hh becomes 0 for a whole call of `vjp` with `rng`;
        what is left is divided by 1 - weight_dropout (DropConnect, as AWD-LSTM uses it).
    recurrent_dropout : float
        Probability with which a unit of the state is 0, through a whole call of `vjp` with `rng`,
        in what the products with weight_hh read; what is left is divided by 1 - recurrent_dropout
        (Gal and Ghahramani 2016; `gru_any.regularisation` has the formulas).
    zoneout : float
        Probability with which a unit keeps its state in a step of `vjp` with `rng`; in all other
        calls each unit keeps this share of its old state (Krueger et al. 2016).
    reset_after : bool
        Reset gate after the matrix product (PyTorch, cuDNN, Keras' default) or before it
        (Cho et al. 2014, ONNX's default; the default here).
    backend : str, module or None
        "numpy", "cupy", "auto", or any array-API library by name or module. None means the
        environment variable GRU_ANY_BACKEND, else "numpy".
    device : str, int or None
        Such as "cuda:1" or 1.
    dtype : str
        Of parameters, inputs and outputs: "float32", "float64", and "float16" or "bfloat16" where
        the backend has them (their arithmetic is float32). "complex128" serves complex-step
        differentiation, for the forward call alone.
    seed : int or None
        Of the weights, uniform in +-1/sqrt(H) as in PyTorch; the same on every backend.
    precision : str
        "full": products of float32 are computed in float32. "tf32": on CuPy their factors may be
        rounded to 10 bits, for speed; elsewhere it changes nothing. PyTorch's default for a GRU on
        CUDA is TF32 (`torch.backends.cudnn.allow_tf32`).
    recompute : None, "sqrt" or int
        What is stored for the backward pass. None: about 5 values per step and unit. "sqrt": one
        state every sqrt(T) steps; an int: one every that many steps (rounded up to whole blocks).
        The pullback computes the rest again, and the gradients are the same bit for bit.
    activation, gate_activation : str or tuple
        The functions that make the candidate n and the gates r and z: "tanh", "sigmoid", "relu",
        "softsign", "softplus", or with their numbers ("leaky_relu", alpha), ("elu", alpha),
        ("thresholded_relu", alpha), ("hard_sigmoid", alpha, beta), ("affine", alpha, beta) and
        ("scaled_tanh", alpha, beta), as ONNX defines them; see `gru_any.activations`.
    merge : "concat", "sum", "mean", "mul" or None
        How the outputs of two directions become one, in every layer: side by side, or their sum,
        mean or product. With None y is a pair (forward, reverse), and so is dy; a layer above reads
        them side by side.
    outputs : "top" or "all"
        Whose outputs y holds: those of the last layer; or a tuple, one of each layer from the first
        on, before dropout. Then dy is such a tuple, of which any may be None.
    clip : float or None
        What goes into these functions is bounded by -clip and clip; where that changes it, its
        gradient is 0.
    layer_norm : bool
        Layer normalisation inside the gates, as haste's LayerNormGRU has it: x W^T and h U^T are
        normalised over their 3H columns and multiplied by gains, before the biases are added
        (`gru_any.normalisation` has the formulas). Needs reset_after=True.

    Attributes
    ----------
    params : dict
        `weight_ih_l0` (3H, I), `weight_hh_l0` (3H, H), `bias_ih_l0` (3H,) and, with reset_after,
        `bias_hh_l0` (3H,); then `_l1`... and `_reverse`. The thirds are r, z, n. With layer_norm
        also `gain_ih_l0` and `gain_hh_l0` (3H,), which are 1 at first.

    Notes
    -----
    The equations and their source are in `gru_any.equations`. Do not write into x, h0 or the
    parameters between `vjp` and the call of its pullback.

    Examples
    --------
    >>> import numpy as np
    >>> from gru_any import GRU
    >>> gru = GRU(3, 4, num_layers=2, seed=0)
    >>> x = np.ones((5, 2, 3), dtype="float32")  # (T, B, I)
    >>> y, h_n = gru(x, lengths=[5, 2])
    >>> y.shape, h_n.shape
    ((5, 2, 4), (2, 2, 4))
    >>> (y, h_n), pullback = gru.vjp(x)
    >>> grads, dx, dh0 = pullback(np.ones_like(y))
    >>> grads["weight_hh_l1"].shape, dx.shape
    ((12, 4), (5, 2, 3))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        reset_after: bool = False,
        backend: BackendLike | None = None,
        device: Device = None,
        dtype: str = "float32",
        seed: int | None = None,
        precision: str = "full",
        recompute: str | int | None = None,
        reverse: bool = False,
        activation: options.Named = "tanh",
        gate_activation: options.Named = "sigmoid",
        clip: float | None = None,
        merge: str | None = "concat",
        outputs: str = "top",
        weight_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        layer_norm: bool = False,
    ) -> None:
        self.input_size = arguments.size("input_size", input_size)
        self.hidden_size = arguments.size("hidden_size", hidden_size)
        self.num_layers = arguments.size("num_layers", num_layers)
        self.bias = arguments.flag("bias", bias)
        self.batch_first = arguments.flag("batch_first", batch_first)
        self.bidirectional = arguments.flag("bidirectional", bidirectional)
        self.reset_after = arguments.flag("reset_after", reset_after)
        self.reverse = arguments.flag("reverse", reverse)
        self.dropout = _dropout(dropout, self.num_layers)
        self.weight_dropout = arguments.number("weight_dropout", weight_dropout, below=1)
        self.recurrent_dropout = arguments.number("recurrent_dropout", recurrent_dropout, below=1)
        self.zoneout = arguments.number("zoneout", zoneout, below=1)
        self.recompute = _recompute(recompute)
        self.precision = _precision(precision)
        self.activation = options.activation("activation", activation)
        self.gate_activation = options.activation("gate_activation", gate_activation)
        self.clip = options.clip(clip)
        self.merge = options.merge(merge, self.bidirectional)
        self.outputs = arguments.choice("outputs", outputs, ("top", "all"))
        self.functions = options.activations(self.gate_activation, self.activation, self.clip)
        self.layer_norm = options.layer_norm(layer_norm, self.reset_after)
        if self.reverse and self.bidirectional:
            raise ValueError("reverse and bidirectional are both True, expected one of them")
        self.suffixes = (
            ["", "_reverse"] if self.bidirectional else ["_reverse" if self.reverse else ""]
        )
        self._create(
            GRU, backend, device, dtype, self._shapes(), seed,
            lambda rng, name, shape: initial(rng, name, shape, self.hidden_size),
        )  # fmt: skip
        self._leave_out({**options.DEFAULTS, **options.MERGE, **options.OUTPUTS, **LATER})

    @property
    def output_size(self) -> int:
        """The width of y: D*H, or H where the directions are merged into one."""
        return self.hidden_size * (len(self.suffixes) if self.merge in ("concat", None) else 1)

    def _shapes(self) -> Iterator[tuple[str, Shape]]:
        """Name and shape of each parameter, in the order they are drawn."""
        H = self.hidden_size
        for layer in range(self.num_layers):
            width = self.output_size if layer else self.input_size
            for suffix in self.suffixes:
                shapes = parameter_shapes(width, H, self.bias, self.reset_after, self.layer_norm)
                for name, shape in shapes.items():
                    yield f"{name}_l{layer}{suffix}", shape

    def _advice(self, missing: set[str], unused: set[str]) -> str:
        return variant_advice(missing, unused)

    # the public calls ----------------------------------------------------------------------------

    @by_place
    def __call__(
        self,
        x: Array,
        h0: Array | None = None,
        lengths: Lengths | None = None,
        *,
        mask: Array | None = None,
        resets: Array | None = None,
        start: Array | None = None,
        skipped: str = "zero",
    ) -> tuple[Array, Array]:
        """Run the sequences without keeping residuals; no dropout.

        Parameters
        ----------
        x : array (T, B, I), (B, T, I) with `batch_first`, or (T, I) without a batch
        h0 : array (L*D, B, H), or (L*D, H) without a batch; zeros if None
        lengths : B integers in 0..T, as a list, a host array or a device array, in any order
            Steps from a row's length on are padding: whatever x holds there changes nothing, and y
            is 0. A device array is read once, which waits for the device.
        mask : (T, B) of bool, laid out like x without its last axis
            Where it is false, the row skips the step: its state stays, whatever x holds there.
        resets : (T, B) of bool, likewise
            Where it is true, an episode begins: the row's state is set to 0, or to `start`, before
            the step, and no gradient passes. A direction that reads from the end is reset where it
            leaves the episode. A reset at a skipped or padded step has no effect.
        start : array (L*D, H), the same for all rows, or (L*D, B, H)
            The state that a reset sets. It needs resets, and leaves the first state, h0, alone.
        skipped : "zero" or "repeat"
            What y holds at skipped and padded steps: 0, or the output of the row's last step that
            was read (0 if there is none), as in Keras.

        Returns
        -------
        y : array (T, B, D*H), laid out like x: the states of the last layer, forward then reverse.
            (T, B, H) where `merge` makes one of them, a pair of such arrays where it is None. A
            tuple of what it would be for each layer with outputs="all".
        h_n : array (L*D, B, H): each row's own last state, forward before reverse, layer by layer.

        Raises
        ------
        ValueError, TypeError
            An argument of wrong shape, dtype, library or device; the text says what to do.
        """
        return self._forward(True, x, h0, lengths, mask, resets, start, skipped)

    @by_place
    def last(
        self,
        x: Array,
        h0: Array | None = None,
        lengths: Lengths | None = None,
        *,
        mask: Array | None = None,
        resets: Array | None = None,
        start: Array | None = None,
    ) -> Array:
        """Return h_n alone; the outputs of the last layer are not kept."""
        return self._forward(False, x, h0, lengths, mask, resets, start, "zero")[1]

    @by_place
    def vjp(
        self,
        x: Array,
        h0: Array | None = None,
        lengths: Lengths | None = None,
        rng: Rng | None = None,
        *,
        mask: Array | None = None,
        resets: Array | None = None,
        start: Array | None = None,
        skipped: str = "zero",
    ) -> tuple[tuple[Array, Array], Pullback]:
        """Run the sequences and keep the residuals for the backward pass.

        Parameters are those of a plain call, and

        rng : numpy.random.Generator or None
            If given, the model's dropouts act. Their masks are drawn on the host.

        Returns
        -------
        (y, h_n) : as in a plain call.
        pullback : callable
            `grads, dx, dh0 = pullback(dy, dh_n=None)`: given dL/dy and dL/dh_n, one of which may be
            None, it returns dL/d of the parameters (a dict), of x and of h0. It may be called
            again. Where `start` is given, it returns (grads, dx, dh0, dstart).
            `pullback.taps(dy, dh_n)` returns dL/dh (L*D, T, B, H) of every step.
        """
        self._refuse_complex()
        if rng is not None:
            arguments.generator("rng", rng)
        elif self.num_layers == len(self.suffixes) == 1 and self.recompute is None:
            block = self._one_block(x, h0, lengths, mask, resets, start, skipped)
            if block is not None:
                return self._vjp_of_block(*block)
        call = self._layout.enter(x, h0, lengths, mask, resets, start, skipped)
        stack = self._stack(self._runner)
        masks = NO_MASKS if rng is None else draw(self, rng, *call.x.shape[:2])
        stack = stack if masks.steps is None else self._stack(stack.run, self._regularised())
        (y, h_n), residuals = self._run(stack, call, keep=True, masks=masks)
        pullback = Pullback(self.params, self._layout, stack, call, residuals, masks)
        return self._layout.outputs(call, y, h_n), pullback

    @by_place
    def jvp(
        self,
        x: Array,
        h0: Array | None = None,
        lengths: Lengths | None = None,
        *,
        x_dot: Array | None = None,
        h0_dot: Array | None = None,
        start_dot: Array | None = None,
        params_dot: Arrays | None = None,
        mask: Array | None = None,
        resets: Array | None = None,
        start: Array | None = None,
        skipped: str = "zero",
    ) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        """Run the sequences, and differentiate the outputs along a direction: forward mode.

        Parameters are those of a plain call, and

        x_dot, h0_dot, start_dot : arrays of the shapes of x, h0 and start, or None for 0
        params_dot : mapping of names to arrays of the shapes of the parameters
            Where a name is missing it is 0.

        Returns
        -------
        (y, h_n) : as in a plain call.
        (y_dot, h_n_dot) : their derivatives by s at 0 where x is x + s x_dot, and so on.

        Raises
        ------
        ValueError, TypeError, KeyError
            As in a plain call; or no direction is given, or it does not fit.
        """
        twin, x, h0, start = self._along(x, h0, start, x_dot, h0_dot, start_dot, params_dot)
        options = {"mask": mask, "resets": resets, "start": start, "skipped": skipped}
        found = twin(x, h0, lengths, **options)
        values, dots = split_duals(twin.backend, found)
        return values, dots

    @by_place
    def forward_over_reverse(
        self,
        x: Array,
        h0: Array | None = None,
        lengths: Lengths | None = None,
        rng: Rng | None = None,
        *,
        x_dot: Array | None = None,
        h0_dot: Array | None = None,
        start_dot: Array | None = None,
        params_dot: Arrays | None = None,
        mask: Array | None = None,
        resets: Array | None = None,
        start: Array | None = None,
        skipped: str = "zero",
    ) -> tuple[tuple[Array, Array], tuple[Array, Array], DualPullback]:
        """Run the sequences for a backward pass and its derivative along a direction.

        Parameters are those of `vjp` and `jvp`.

        Returns
        -------
        (y, h_n), (y_dot, h_n_dot) : as of `jvp`.
        pullback : callable
            `(grads, dx, dh0), (grads_dot, dx_dot, dh0_dot) = pullback(dy, dh_n=None, dy_dot=None,
            dh_n_dot=None)`: the first three as of `vjp`, and their derivatives along the direction,
            along which dy and dh_n change by dy_dot and dh_n_dot: with those of a loss, a product
            of its Hessian with the direction. `gru_any.hvp` does all of it. With a start each
            triple has dstart as a fourth.
        """
        twin, x, h0, start = self._along(x, h0, start, x_dot, h0_dot, start_dot, params_dot)
        options = {"mask": mask, "resets": resets, "start": start, "skipped": skipped}
        found, back = twin.vjp(x, h0, lengths, rng, **options)
        return *split_duals(twin.backend, found), DualPullback(twin.backend, self.dtype, back)

    def _along(
        self,
        x: Array,
        h0: Array | None,
        start: Array | None,
        x_dot: Array | None,
        h0_dot: Array | None,
        start_dot: Array | None,
        params_dot: Arrays | None,
    ) -> tuple[Any, Array, Array | None, Array | None]:
        """Return this GRU over dual numbers, and x, h0 and start as such."""
        dots = x_dot, h0_dot, start_dot, params_dot
        refuse_no_direction("x_dot, h0_dot, start_dot and params_dot", *dots)
        if h0 is None and h0_dot is not None:
            self.backend.check("x", x, self.dtype)
            rows = (x.shape[0 if self.batch_first else 1],) if x.ndim == 3 else ()
            shape = (self.num_layers * len(self.suffixes), *rows, self.hidden_size)
            h0 = self.backend.zeros(shape, self.dtype)
        home = self.backend, self.dtype
        named = {"x": (x, x_dot), "h0": (h0, h0_dot), "start": (start, start_dot)}
        x, h0, start = (lift(*home, name, *pair) for name, pair in named.items())
        return dual_layer(self, check_params_dot(self, params_dot)), x, h0, start

    @by_place
    def step(
        self,
        x_t: Array,
        state: Array | None = None,
        *,
        resets: Array | bool | None = None,
        start: Array | None = None,
    ) -> tuple[Array, Array]:
        """Advance by one step, for streams.

        x_t (B, I) or (I,), state (L, B, H) or (L, H), zeros if None -> y_t (B, H) or (H,), and the
        new state; the one given is not written. y_t is a tuple of such with outputs="all".

        resets : B booleans, or one without a batch
            Where it is true, the row's state is set to 0, or to `start`, before the step.
        start : array (L, H), the same for all rows, or (L, B, H)
        """
        if state is not None:
            self.backend.check("state", state, self.dtype)
        return self._step(self._layer_functions(False), x_t, state, resets, start)

    @by_place
    def _prepared_step(self) -> Callable[..., tuple[Array, Array]]:
        """Return `step` with the parameters as they are now, perhaps copies: cheaper to call."""
        return partial(self._step, self._layer_functions(True))

    def _layer_functions(self, prepared: bool) -> list[LayerStep]:
        """Return a step function for each layer; prepared: it may keep copies of the weights."""
        return self._steps(self._runner.prepare_step if prepared else self._runner.single_step)

    def _steps(self, make: Callable[..., LayerStep]) -> list[LayerStep]:
        """Return a step function for each layer; make: a method of the runner that makes one."""
        if "_reverse" in self.suffixes:
            way = "bidirectional" if self.bidirectional else "reverse"
            raise ValueError(f"a {way} GRU cannot run step by step: it reads from the end")
        stack = self._stack(self._runner)
        arrays = self._arrays()
        taken = [stack.weights(arrays, layer, "") for layer in range(self.num_layers)]
        steps = [make(stack.variant.step, *of_layer) for of_layer in taken]
        return self._for_storage(steps)

    def _for_storage(self, steps: list[LayerStep]) -> list[LayerStep]:
        """Return step functions that take and return arrays of the layer's dtype."""
        return steps if self.arithmetic == self.dtype else [self._half(step) for step in steps]

    def _half(self, step: LayerStep) -> LayerStep:
        """Wrap a step function of float32 arrays into one of arrays in half precision."""

        def half(x: Array, h: Array) -> tuple[Array, Array]:
            x = self._runner.upcast(x, self.backend.dtype(self.arithmetic))
            y, h = step(x, self._to_arithmetic(h))
            return self._to_storage(y), self._to_storage(h)

        return half

    def _step(
        self,
        steps: list[LayerStep],
        x_t: Array,
        state: Array | None = None,
        resets: Array | bool | None = None,
        start: Array | None = None,
    ) -> tuple[Any, Array]:
        self.backend.check("x_t", x_t, self.dtype)
        rows = x_t.shape[:-1]
        if len(rows) > 1 or x_t.shape[-1:] != (self.input_size,):
            check_shape("x_t", x_t, "(B, I)", {"I": self.input_size})
        shape = (self.num_layers, *rows, self.hidden_size)
        if state is None:
            state = self.backend.zeros(shape, self.dtype)
        if state.shape != shape:
            sizes = {"L": shape[0], "B": rows[0] if rows else 1, "H": shape[-1]}
            check_shape("state", state, "(L, B, H)" if rows else "(L, H)", sizes)
        y, state = (x_t, state) if rows else (x_t[None, :], state[:, None, :])
        if resets is not None or start is not None:
            state = self._layout.restart(state, resets, start, not rows)
        states, ys = [], []
        for layer, step in enumerate(steps):
            y, h = step(y, state[layer, ...])
            states.append(h)
            ys.append(y if rows else y[0, :])
        state = h[None, ...] if len(states) == 1 else self.backend.xp.stack(states)
        state = state if rows else state[:, 0, :]
        return (ys[-1] if self.outputs == "top" else tuple(ys)), state

    @by_place
    def taps(
        self,
        x: Array,
        h0: Array | None = None,
        lengths: Lengths | None = None,
        *,
        mask: Array | None = None,
        resets: Array | None = None,
        start: Array | None = None,
    ) -> dict[str, Array]:
        """Return the gates r and z, the candidate n and the state h of every step.

        Each is (L*D, T, B, H), time first whatever `batch_first` says; at skipped steps 0.
        """
        call = self._layout.enter(x, h0, lengths, mask, resets, start)
        stack = self._stack(self._runner)
        unmasked, given = self._inputs(stack, call, NO_MASKS)
        _, residuals = stack.forward(unmasked, True, None, True, given)
        rows = [
            sweep.gates(layer.x, segments)
            for layer in residuals
            for sweep, segments in layer.sweeps
        ]
        stacked = [self.backend.xp.stack(columns) for columns in zip(*rows, strict=True)]
        return {name: self._to_storage(v) for name, v in zip("rznh", stacked, strict=True)}

    # the stack of layers -------------------------------------------------------------------------

    @cached_property
    def _layout(self) -> SequenceLayout:
        return SequenceLayout(
            self.backend,
            self.dtype,
            self.arithmetic,
            self.batch_first,
            self.input_size,
            self.hidden_size,
            self.num_layers,
            tuple(suffix == "_reverse" for suffix in self.suffixes),
            self.merge,
            self.outputs == "all",
        )

    @property
    def _runner(self) -> Runner:
        return runner(self.backend, self.precision, self.dtype)

    @cached_property
    def _stacks(self) -> dict[tuple[Runner, Variant], Stack]:
        return {}

    @property
    def variant(self) -> Variant:
        """The equations of inference: a step of this GRU and its gradient, as functions."""
        variant = equations.variant(self.reset_after, self.functions)
        variant = with_layer_norm(variant) if self.layer_norm else variant
        return expected_zoneout(variant, self.zoneout) if self.zoneout else variant

    def _regularised(self) -> Variant:
        """Return the equations of training, whose steps take the masks of the model's dropouts."""
        variant = equations.variant(self.reset_after, self.functions)
        variant = with_layer_norm(variant) if self.layer_norm else variant
        variant = recurrent_dropout(variant) if self.recurrent_dropout else variant
        return zoneout(variant) if self.zoneout else variant

    def _stack(self, run: Runner, variant: Variant | None = None) -> Stack:
        """Return the layers on this runner; variant: the equations, None for those of inference."""
        key = run, self.variant if variant is None else variant
        stack = self._stacks.get(key)
        if stack is None:
            stack = self._stacks[key] = self._new_stack(*key)
        return stack

    def _new_stack(self, run: Runner, variant: Variant) -> Stack:
        return Stack(
            run,
            variant,
            self.bias,
            self.reset_after,
            self.num_layers,
            tuple(self.suffixes),
            self.backend.dtype(self.arithmetic),
            self.backend.dtype(self.dtype),
            self.merge or "concat",
            self.layer_norm,
            self.outputs == "all",
        )

    def _forward(self, outputs: bool, x: Array, h0: Array | None, *steps: Any) -> tuple[Any, Array]:
        """Run a call as a user gives it; steps: `lengths` and the arguments after it."""
        block = self._one_block(x, h0, *steps)
        if block is not None:
            return self._by_block(outputs, *block)
        call = self._layout.enter(x, h0, *steps)
        (y, h_n), _ = self._run(self._stack(self._runner), call, keep=False, outputs=outputs)
        return self._layout.outputs(call, y, h_n)

    # calls of a single block, many of which are small --------------------------------------------

    def _one_block(
        self,
        x: Array,
        h0: Array | None,
        lengths: Lengths | None,
        mask: Array | None,
        resets: Array | None,
        start: Array | None,
        skipped: str,
    ) -> tuple[Array, Array] | None:
        """Return x (T, B, I) and h0 (L*D, B, H) of a call that the short way serves, else None.

        That is a call on NumPy's arrays, without masks or resets, whose steps are one block. None
        is returned for wrong arguments too, which the long way reports.
        """
        home, states = self.backend, self.num_layers * len(self.suffixes)
        if not (lengths is mask is resets is start is None and skipped == "zero"):
            return None
        if self.merge is None or self.outputs == "all":
            return None
        if self.arithmetic != self.dtype or not home.plain(x, self.dtype):
            return None
        x = x.swapaxes(0, 1) if self.batch_first and x.ndim == 3 else x
        T, B, I = x.shape if x.ndim == 3 else (0, 0, 0)
        if self.input_size != I or not T or not B or (T > 1 and steps_of_block(B) < T):
            return None
        shape = states, B, self.hidden_size
        if h0 is None:
            return x, home.zeros(shape, self.dtype)
        if not home.plain(h0, self.dtype) or h0.shape != shape:
            return None
        # the long way copies it, and products of other layouts may be rounded in another way
        return (x, h0) if h0.flags.c_contiguous and h0.flags.aligned else None

    def _by_block(self, outputs: bool, x: Array, h0: Array) -> tuple[Any, Array]:
        """Return y and h_n of a call of one block, through all layers."""
        xp, states = self.backend.xp, list[Array]()
        for layer in self._blocks():
            ys = []
            for block in layer:
                y, h = block(x, h0[len(states)])
                ys.append(y)
                states.append(h)
            x = ys[0] if len(ys) == 1 else merge(xp, self.merge or "concat", ys)
        h_n = states[0][None] if len(states) == 1 else xp.stack(states)
        y = x.swapaxes(0, 1) if self.batch_first else x
        return (y if outputs else None), h_n

    def _blocks(self) -> list[list[OneBlock]]:
        """Return for each layer the functions that run its directions."""
        stack = self._stack(self._runner)
        if stack.layers == len(stack.suffixes) == 1:  # the same at less cost
            return [[stack.sweep(self.params, 0, stack.suffixes[0]).one_block]]
        return [
            [stack.sweep(self.params, n, suffix).one_block for suffix in stack.suffixes]
            for n in range(stack.layers)
        ]

    def _vjp_of_block(self, x: Array, h0: Array) -> tuple[tuple[Array, Array], Pullback]:
        """Run `vjp` on one block through a GRU of one layer and one direction."""
        stack = self._stack(self._runner)
        sweep = stack.sweep(self.params, 0, stack.suffixes[0])
        found, h = sweep.one_block_kept(x, h0[0])
        call = Call(x, h0, None, NO_RESTARTS, False, False)
        block = Segment((slice(0, x.shape[0]),), h0[0], [found])
        kept = [LayerResiduals(x, None, [(sweep, [block])])]
        pullback = BlockPullback(self.params, self._layout, stack, call, kept, NO_MASKS)
        y = stack.run.as_contiguous(found.outputs)
        return (y.swapaxes(0, 1) if self.batch_first else y, h[None]), pullback

    # calls of any kind ---------------------------------------------------------------------------

    def _run(
        self,
        stack: Stack,
        call: Call,
        keep: bool,
        masks: Masks = NO_MASKS,
        outputs: bool = True,
    ) -> Any:
        """Return (y, h_n), and the residuals as the runner keeps them."""
        unmasked, given = self._inputs(stack, call, masks)
        segment = self.recompute
        if segment == "sqrt":
            segment = max(1, math.isqrt(call.x.shape[0]))
        static, steps = (unmasked, keep, segment, outputs), stack.steps(call.x)
        gradients = None if keep else Stack.gradients
        return stack.run.run_graph(Stack.forward, stack, static, given, steps, gradients=gradients)

    def _inputs(self, stack: Stack, call: Call, masks: Masks) -> tuple[int, ForwardInputs]:
        """Return the first step at which a mask is needed, and the arrays of a forward pass."""
        x, h0, mask, restarts, *_ = call
        alive, unmasked = (None, 0) if mask is None else mask
        unmasked = unmasked and stack.run.unmasked_prefix(unmasked)
        arrays = self._arrays()
        if masks.weights:
            arrays |= {name: arrays[name] * kept for name, kept in masks.weights.items()}
        (cuts, _, start, _), (_, steps, between) = restarts, masks
        start = start if cuts else None
        return unmasked, ForwardInputs(x, h0, arrays, alive, cuts, between, steps, start)

    def _arrays(self) -> Any:
        """Return the parameters as the stack reads them, a mapping."""
        return dict(self.params)


def _dropout(dropout: float, num_layers: int) -> float:
    p = arguments.number("dropout", dropout, below=1)
    if p and num_layers == 1:
        raise ValueError(
            "dropout acts between layers, and num_layers is 1: set dropout=0, or put a Dropout "
            "layer after this one in a Chain"
        )
    return p


def _precision(precision: str) -> str:
    if precision not in ("full", "tf32"):
        raise ValueError(f'precision is {precision!r}, expected "full" or "tf32"')
    return precision


def _recompute(recompute: str | int | None) -> str | int | None:
    if recompute is None or (isinstance(recompute, str) and recompute == "sqrt"):
        return recompute
    try:
        return arguments.size("recompute", recompute)
    except ValueError:
        raise ValueError(
            f"recompute is {recompute!r}, expected None, 'sqrt' or a number of steps"
        ) from None

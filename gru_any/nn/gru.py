"""The GRU over whole sequences: layers, directions, lengths, dropout between layers."""

from __future__ import annotations  # numpy.random is loaded on first need

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from .. import arguments, equations
from ..backend import runner, to_numpy
from ..errors import check_shape
from .init import uniform
from .params import Layer
from .pullback import Call, Pullback
from .stack import ForwardInputs, Stack
from .sweep import Padding
from .weights import parameter_shapes, variant_advice


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
        With bias or without.
    batch_first : bool
        x and y are (B, T, .) in place of (T, B, .). States keep their shape.
    dropout : float
        Probability with which an output between two layers becomes 0 in `vjp` with `rng`; what is
        left is divided by 1 - dropout. Needs num_layers > 1.
    bidirectional : bool
        A second GRU reads from each sequence's end; y holds both, side by side.
    reverse : bool
        The one that reads from the end alone; its parameters end in `_reverse`. y_t still belongs
        to x_t. Not together with bidirectional.
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
        "full": float32 products are float32. "tf32": on CuPy they may round their factors to 10
        bits, which is several times as fast on large sizes; elsewhere it changes nothing. PyTorch's
        default for a GRU on CUDA is TF32 (`torch.backends.cudnn.allow_tf32`).
    recompute : None, "sqrt" or int
        None keeps about 5 elements a step and unit for the backward pass. "sqrt" keeps a state
        every sqrt(T) steps, an int one every so many (rounded up to whole blocks), and computes
        the rest again in the pullback, with the same gradients bit for bit.

    Attributes
    ----------
    params : dict
        `weight_ih_l0` (3H, I), `weight_hh_l0` (3H, H), `bias_ih_l0` (3H,) and, with reset_after,
        `bias_hh_l0` (3H,); then `_l1`... and `_reverse`. The thirds are r, z, n.

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
        backend: Any = None,
        device: Any = None,
        dtype: str = "float32",
        seed: int | None = None,
        precision: str = "full",
        recompute: str | int | None = None,
        reverse: bool = False,
    ) -> None:
        input_size = arguments.size("input_size", input_size)
        hidden_size = arguments.size("hidden_size", hidden_size)
        num_layers = arguments.size("num_layers", num_layers)
        bias, batch_first, bidirectional, reset_after, reverse = (
            arguments.flag(name, value)
            for name, value in (
                ("bias", bias),
                ("batch_first", batch_first),
                ("bidirectional", bidirectional),
                ("reset_after", reset_after),
                ("reverse", reverse),
            )
        )
        dropout = _dropout(dropout, num_layers)
        recompute = _recompute(recompute)
        _check_precision(precision)
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, dropout
        self.reset_after, self.precision, self.recompute = reset_after, precision, recompute
        if reverse and bidirectional:
            raise ValueError("reverse and bidirectional are both True, expected one of them")
        self.suffixes = ["_reverse"] if reverse else ["", "_reverse"] if bidirectional else [""]
        self._create(
            {
                "input_size": input_size,
                "hidden_size": hidden_size,
                "num_layers": num_layers,
                "bias": bias,
                "batch_first": batch_first,
                "dropout": dropout,
                "bidirectional": bidirectional,
                "reset_after": reset_after,
                "precision": precision,
                "recompute": recompute,
                **({"reverse": True} if reverse else {}),
            },
            backend,
            device,
            dtype,
            self._initial(arguments.seed(seed)),
        )

    def _initial(self, rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
        """Name and first value of each parameter, in the order they are drawn."""
        H, bound = self.hidden_size, 1 / math.sqrt(self.hidden_size)
        for layer in range(self.num_layers):
            width = H * len(self.suffixes) if layer else self.input_size
            for suffix in self.suffixes:
                shapes = parameter_shapes(width, H, self.bias, self.reset_after)
                for name, shape in shapes.items():
                    yield f"{name}_l{layer}{suffix}", uniform(rng, shape, bound)

    def _advice(self, missing: set[str], unused: set[str]) -> str:
        return variant_advice(missing, unused)

    # the public calls ----------------------------------------------------------------------------

    def __call__(self, x: Any, h0: Any = None, lengths: Any = None) -> tuple[Any, Any]:
        """Run the sequences without keeping residuals; no dropout.

        Parameters
        ----------
        x : array (T, B, I), (B, T, I) with `batch_first`, or (T, I) without a batch
        h0 : array (L*D, B, H), or (L*D, H) without a batch; zeros if None
        lengths : B integers in 0..T, as a list, a host array or a device array, in any order
            Steps from a row's length on are padding: whatever x holds there changes nothing, and y
            is 0. A device array is read once, which waits for the device.

        Returns
        -------
        y : array (T, B, D*H), laid out like x: the states of the last layer, forward then reverse.
        h_n : array (L*D, B, H): each row's own last state, forward before reverse, layer by layer.

        Raises
        ------
        ValueError, TypeError
            An argument of wrong shape, dtype, library or device; the text says what to do.
        """
        return self._forward(x, h0, lengths, outputs=True)

    def last(self, x: Any, h0: Any = None, lengths: Any = None) -> Any:
        """Return h_n alone; the outputs of the last layer are not kept."""
        return self._forward(x, h0, lengths, outputs=False)[1]

    def vjp(self, x: Any, h0: Any = None, lengths: Any = None, rng: Any = None) -> Any:
        """Run the sequences and keep the residuals for the backward pass.

        Parameters are those of a plain call, and

        rng : numpy.random.Generator or None
            Given, dropout acts between the layers. Its numbers are drawn on the host.

        Returns
        -------
        (y, h_n) : as in a plain call.
        pullback : callable
            `grads, dx, dh0 = pullback(dy, dh_n=None)`: given dL/dy and dL/dh_n, one of which may be
            None, it returns dL/d of the parameters (a dict), of x and of h0. It may be called
            again. `pullback.taps(dy, dh_n)` returns dL/dh (L*D, T, B, H) of every step.
        """
        arguments.generator("rng", rng)
        self._refuse_complex()
        entry = self._enter(x, h0, lengths)
        (y, h_n), tapes = self._call(entry, keep=True, rng=rng)
        return self._leave(entry, y, h_n), Pullback(self, entry, tapes, self.params.version)

    def step(self, x_t: Any, state: Any = None) -> tuple[Any, Any]:
        """Advance by one step, for streams.

        x_t (B, I) or (I,), state (L, B, H) or (L, H), zeros if None -> y_t (B, H) or (H,), and the
        new state; the one given is not written.
        """
        if state is not None:
            self.backend.check("state", state, self.dtype)
        return self._step(self._steps(self._run.single_step), x_t, state)

    def _prepared(self) -> Any:
        """`step` with the parameters taken as they are now, for a stream: less to do in each."""
        return partial(self._step, self._steps(self._run.prepare_step))

    def _steps(self, make: Any) -> list[Any]:
        if "_reverse" in self.suffixes:
            way = "bidirectional" if len(self.suffixes) == 2 else "reverse"
            raise ValueError(f"a {way} GRU cannot run step by step: it reads from the end")
        step = equations.variant(self.reset_after).step
        layers = range(self.num_layers)
        taken = [self._stack.weights(self.params, layer, "") for layer in layers]
        steps = [make(step, *of_layer) for of_layer in taken]
        return steps if self.arithmetic == self.dtype else [self._half(step) for step in steps]

    def _half(self, step: Any) -> Any:
        """A step between arrays that are stored as halves."""

        def wide(x: Any, h: Any) -> Any:
            return [self._stored(v) for v in step(self._upcast(x), self._compute(h))]

        return wide

    def _step(self, steps: list[Any], x_t: Any, state: Any = None) -> tuple[Any, Any]:
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
        states = []
        for layer, step in enumerate(steps):
            y, h = step(y, state[layer, ...])
            states.append(h)
        state = h[None, ...] if len(states) == 1 else self.backend.xp.stack(states)
        return (y, state) if rows else (y[0, :], state[:, 0, :])

    def taps(self, x: Any, h0: Any = None, lengths: Any = None) -> dict[str, Any]:
        """Return the gates r and z, the candidate n and the state h of every step.

        Each is (L*D, T, B, H), time first whatever `batch_first` says; at padded steps 0.
        """
        entry = self._enter(x, h0, lengths)
        given, full = self._given(entry, None)
        _, tapes = self._stack_for(entry).forward(full, True, None, True, given)
        xp = self.backend.xp
        rows = [sweep.gates(layer.x, tape) for layer in tapes for sweep, tape in layer.sweeps]
        names = ("r", "z", "n", "h")
        return {k: self._stored(xp.stack([row[i] for row in rows])) for i, k in enumerate(names)}

    # from the user's arrays to time-major ones, and back -----------------------------------------

    def _enter(self, x: Any, h0: Any, lengths: Any) -> Call:
        xp, rank = self.backend.xp, getattr(x, "ndim", 3)
        self.backend.check("x", x, self.dtype)
        letters = "(T, I)" if rank == 2 else "(B, T, I)" if self.batch_first else "(T, B, I)"
        check_shape("x", x, letters, {"I": self.input_size})
        x = self._time_major(x, rank == 2)
        B, states = x.shape[1], self.num_layers * len(self.suffixes)
        if h0 is None:
            h0 = self.backend.zeros((states, B, self.hidden_size), self.arithmetic)
        else:
            self.backend.check("h0", h0, self.dtype)
            sizes = {"L*D": states, "B": B, "H": self.hidden_size}
            check_shape("h0", h0, "(L*D, H)" if rank == 2 else "(L*D, B, H)", sizes)
            h0 = self._compute(xp.reshape(h0, (states, B, self.hidden_size)), copy=True)
        if lengths is not None and rank == 2:
            raise ValueError("lengths were given, but x (T, I) has no batch; cut x instead")
        return Call(x, h0, self._padding(lengths, x.shape[0], B), rank == 2)

    def _time_major(self, v: Any, single: bool) -> Any:
        if single:
            return self.backend.xp.expand_dims(v, axis=1)
        return self.backend.xp.permute_dims(v, (1, 0, 2)) if self.batch_first else v

    def _leave(self, entry: Call, y: Any, h_n: Any) -> tuple[Any, Any]:
        if entry.single:
            return (None if y is None else y[:, 0, :]), h_n[:, 0, :]
        if self.batch_first and y is not None:
            y = self.backend.xp.permute_dims(y, (1, 0, 2))
        return y, h_n

    def _padding(self, lengths: Any, T: int, B: int) -> Padding | None:
        """Read lengths on the host; None where there is nothing to pad."""
        if lengths is None:
            return None
        n = arguments.lengths(to_numpy(lengths, "lengths"), T, B)
        if isinstance(lengths, (list, tuple)) and any(isinstance(v, bool) for v in lengths):
            raise TypeError(f"lengths is {lengths!r}, expected integers")
        if (n == T).all():
            return None
        alive = np.arange(T)[:, None, None] < n[None, :, None]
        return Padding(self.backend.put(alive, "bool"), int(n.min()))

    @property
    def _run(self) -> Any:
        return runner(self.backend, self.precision, self.dtype)

    def _upcast(self, v: Any) -> Any:
        if self.arithmetic == self.dtype:
            return v
        return self._run.upcast(v, self.backend.dtype(self.arithmetic))

    # the stack of layers -------------------------------------------------------------------------

    @property
    def _stack(self) -> Stack:
        return self._stack_on(self._run)

    def _stack_on(self, run: Any) -> Stack:
        return Stack(
            run,
            equations.variant(self.reset_after),
            self.bias,
            self.reset_after,
            self.num_layers,
            tuple(self.suffixes),
            self.backend.dtype(self.arithmetic),
            self.backend.dtype(self.dtype),
        )

    def _stack_for(self, entry: Call) -> Stack:
        """The stack, with the runner for a call of this size."""
        T, B, _ = entry.x.shape
        return self._stack_on(self._run.for_call(T, B, self.hidden_size))

    def _forward(self, x: Any, h0: Any, lengths: Any, outputs: bool) -> tuple[Any, Any]:
        entry = self._enter(x, h0, lengths)
        (y, h_n), _ = self._call(entry, keep=False, rng=None, outputs=outputs)
        return self._leave(entry, y, h_n)

    def _call(self, entry: Call, keep: bool, rng: Any, outputs: bool = True) -> Any:
        """Return (y, h_n), and the residuals as the backend keeps them."""
        stack, T = self._stack_for(entry), entry.x.shape[0]
        given, full = self._given(entry, rng)
        static = (full, keep, self._segment(T), outputs)
        return stack.run.run_graph(Stack.forward, stack, static, given, self._steps_of(entry))

    def _steps_of(self, entry: Call) -> int:
        """How many steps a call has, all layers and directions together."""
        return entry.x.shape[0] * self.num_layers * len(self.suffixes)

    def _given(self, entry: Call, rng: Any) -> tuple[ForwardInputs, int]:
        """The arrays of a call, and the step before which all rows are alive."""
        x, h0, padding, _ = entry
        shape = (*x.shape[:2], self.hidden_size * len(self.suffixes))
        masks = [self._mask(rng, shape, self.dropout) for _ in range(self.num_layers - 1)]
        alive, full = padding or (None, 0)
        given = ForwardInputs(x, h0, dict(self.params), alive, (None, *masks))
        return given, full and self._run.unmasked_prefix(full)

    def _segment(self, T: int) -> int | None:
        return max(1, math.isqrt(T)) if self.recompute == "sqrt" else self.recompute  # type: ignore[return-value]


def _dropout(dropout: Any, num_layers: int) -> float:
    dropout = arguments.number("dropout", dropout, below=1)
    if dropout and num_layers == 1:
        raise ValueError(
            "dropout acts between layers, and num_layers is 1: set dropout=0, or put a Dropout "
            "layer after this one in a Chain"
        )
    return dropout


def _check_precision(precision: str) -> None:
    if precision not in ("full", "tf32"):
        raise ValueError(f'precision is {precision!r}, expected "full" or "tf32"')


def _recompute(recompute: Any) -> str | int | None:
    if recompute is None or (isinstance(recompute, str) and recompute == "sqrt"):
        return recompute
    try:
        return arguments.size("recompute", recompute)
    except ValueError:
        raise ValueError(
            f"recompute is {recompute!r}, expected None, 'sqrt' or a number of steps"
        ) from None

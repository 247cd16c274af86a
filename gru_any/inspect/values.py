"""Measurements inside a GRU: gates, memory, gradients over time, spectra.

All of them are made from values that the model itself computes (`GRU.taps` and `pullback.taps`).
Results are NumPy arrays on every backend. Letters: T time, B batch, H hidden, L layers,
D directions.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from .. import arguments
from ..backend import to_numpy
from ..errors import check_shape
from ..nn.cell import GRUCell
from ..nn.chain import Chain
from ..nn.gru import GRU
from ..nn.layers import Last
from ..typing import Array, HostArray

Lengths: TypeAlias = Sequence[int] | Array | None


def activity(
    model: GRU | Chain,
    x: Array,
    lengths: Lengths = None,
    *,
    mask: Array | None = None,
    resets: Array | None = None,
    start: Array | Sequence[Array | None] | None = None,
) -> list[dict[str, HostArray]]:
    """Return the gates r and z, candidate n and state h of every step, for each GRU of a model.

    Parameters
    ----------
    model : GRU or Chain
    x : array
        The input of the model; the initial states are zeros.
    lengths, mask, resets, start
        As in a call of the model.

    Returns
    -------
    list of dict
        For each GRU "r", "z", "n" and "h", each (L*D, T, B, H) even with `batch_first`, as
        `GRU.taps` returns them.

    Examples
    --------
    >>> import numpy as np
    >>> from gru_any import GRU
    >>> from gru_any.inspect import activity
    >>> seen = activity(GRU(3, 4, num_layers=2, seed=0), np.ones((5, 1, 3), "float32"))
    >>> seen[0]["z"].shape
    (2, 5, 1, 4)
    """
    found: list[dict[str, HostArray]] = []
    options: dict[str, Any] = {"lengths": lengths, "mask": mask, "resets": resets}
    starts = model._states(start, "start") if isinstance(model, Chain) else iter((start,))
    for layer in model.layers if isinstance(model, Chain) else (model,):
        if isinstance(layer, GRU):
            options["start"] = next(starts)
            taps = layer.taps(x, **options)
            found.append({name: to_numpy(array) for name, array in taps.items()})
            x, _ = layer(x, **options)
        elif isinstance(layer, Last):
            break  # no GRU comes after it
        else:
            x = layer(x)
    return found


def half_life(z: Array) -> HostArray:
    """Return after how many steps half of each unit's state is left, by its update gate alone.

    A step keeps the share z of the state (h' = z * h + ...), k steps the product of k gates. The
    mean of that product over all runs of k steps is what is left after k steps; between two k it is
    taken to fall exponentially. What returns to a unit through the other units (r, n and U) is not
    counted.

    Parameters
    ----------
    z : array (T, ..., H)
        Update gates, time first, without padded steps.

    Returns
    -------
    array (H,) of float64, in steps; infinite if more than half is left after all T

    Examples
    --------
    >>> import numpy as np
    >>> from gru_any.inspect import half_life
    >>> half_life(np.array([[0.25, 0.5], [0.25, 1.0]])).tolist()
    [0.5, 2.0]
    """
    z = to_numpy(z).astype(np.float64).reshape(z.shape[0], -1, z.shape[-1])
    steps, before, kept = np.full(z.shape[-1], np.inf), np.ones(z.shape[-1]), np.ones_like(z)
    for k in range(len(z)):
        kept = kept[: len(z) - k] * z[k:]
        left = kept.mean(axis=(0, 1))
        now = np.isinf(steps) & (left <= 0.5)
        with np.errstate(divide="ignore"):  # log(0), where nothing is left
            whole, half = np.log(before[now]) - np.log(left[now]), np.log(2 * before[now])
        steps[now], before = k + half / whole, left
    return steps


def saturation(gate: Array, low: float = 0.1, high: float = 0.9) -> tuple[HostArray, HostArray]:
    """Return the share of steps at which each unit's gate is below `low`, and above `high`.

    Parameters
    ----------
    gate : array (..., H)
        r or z; the share is over all axes but the last.
    low, high : float

    Returns
    -------
    below, above : arrays (H,) of float64, between 0 and 1

    Examples
    --------
    >>> import numpy as np
    >>> from gru_any.inspect import saturation
    >>> below, above = saturation(np.array([[0.05, 0.5], [0.95, 0.5]]))
    >>> below.tolist(), above.tolist()
    ([0.5, 0.0], [0.5, 0.0])
    """
    gate = to_numpy(gate).reshape(-1, gate.shape[-1])
    return (gate < low).mean(axis=0), (gate > high).mean(axis=0)


def fading(gru: GRU, x: Array, seed: int = 0) -> HostArray:
    """Return how much of the gradient of a loss at the last step is left at each step before it.

    The loss is a random projection of the last layer's last state. The norm of its gradient to the
    state of a step, dL/dh_t, relative to the norm at the last step, is what is left.

    Parameters
    ----------
    gru : GRU
        With one direction; of dtype float32 or float64.
    x : array (T, B, I), or (B, T, I) with `batch_first`
    seed : int
        Of the projection, which is another one for each sequence.

    Returns
    -------
    array (L, T) of float64
        |dL/dh| at 0, 1, ... steps before the loss, layer by layer: the root of the mean square over
        the batch, in units of the last layer's at distance 0.

    Raises
    ------
    ValueError
        The GRU is bidirectional: its loss would be at both ends. x has no batch.

    Examples
    --------
    >>> import numpy as np
    >>> from gru_any import GRU
    >>> from gru_any.inspect import fading
    >>> left = fading(GRU(3, 16, seed=0), np.ones((20, 8, 3), "float32"))
    >>> left.shape, float(left[0, 0])
    ((1, 20), 1.0)
    """
    if len(gru.suffixes) == 2:
        raise ValueError("fading takes a GRU in one direction, this one is bidirectional")
    check_shape("x", x, "(B, T, I)" if gru.batch_first else "(T, B, I)", {"I": gru.input_size})
    (_, h_n), pullback = gru.vjp(x)
    L, B, H = h_n.shape[0], h_n.shape[-2], gru.hidden_size
    direction = np.zeros((L, B, H))
    direction[-1] = arguments.seed(seed).standard_normal((B, H))
    taps = to_numpy(pullback.taps(None, gru.backend.put(direction, gru.dtype)))
    taps = taps if "_reverse" in gru.suffixes else taps[:, ::-1]  # the last step that it read first
    squares = np.square(taps, dtype=np.float64).sum(axis=-1).mean(axis=-1)
    left: HostArray = np.sqrt(squares / squares[-1, 0])
    return left


def spectrum(gru: GRU | GRUCell) -> dict[str, dict[str, HostArray]]:
    """Return the eigenvalues of the recurrent weights, for each third of each `weight_hh`.

    Parameters
    ----------
    gru : GRU or GRUCell

    Returns
    -------
    dict
        name of the parameter -> {"r", "z", "n"}, each (H,) of complex128, in descending order of
        absolute value; that of the first is the spectral radius.

    Examples
    --------
    >>> import numpy as np
    >>> from gru_any import GRU
    >>> from gru_any.inspect import spectrum
    >>> gru = GRU(2, 3, seed=0)
    >>> gru.params["weight_hh_l0"][:] = np.tile(np.diag([0.5, -2.0, 1.0]), (3, 1))
    >>> [complex(v) for v in spectrum(gru)["weight_hh_l0"]["n"]]
    [(-2+0j), (1+0j), (0.5+0j)]
    """
    found = {}
    for name, array in gru.params.items():
        if name.startswith("weight_hh"):
            thirds = np.split(to_numpy(array).astype(np.float64), 3)
            values = [np.linalg.eigvals(U).astype(np.complex128) for U in thirds]
            ordered = [v[np.argsort(-np.abs(v), kind="stable")] for v in values]
            found[name] = dict(zip("rzn", ordered, strict=True))
    return found

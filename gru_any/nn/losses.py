"""Losses: the value and its gradient together, `value, grad = loss(y, target)`.

value is a mean, a scalar on the device of y (reading it waits for the device); grad has the shape
and dtype of y. Half precision is summed in float32. What `mask` leaves out counts for nothing,
whatever stands there; where it leaves out everything, value and gradient are 0.
"""

import math

from ..backend import Backend, of
from ..errors import ShapeError
from ..typing import Array, DType, Namespace, Shape


def softmax_cross_entropy(
    y: Array, target: Array, weight: Array | None = None, mask: Array | None = None
) -> tuple[Array, Array]:
    """Cross entropy of softmax(y) and the target, a mean as in `torch.nn.CrossEntropyLoss`.

        p = exp(y) / sum(exp(y));  L = -sum(t * log p);  dL/dy = p * sum(t) - t

    Parameters
    ----------
    y : array (..., C), scores before the softmax
    target : array (...) of integers in 0..C-1, or (..., C) of probabilities, of floating dtype
    weight : array (C,) or None, of the classes; with integer targets the mean is weighted too
    mask : array (...) of bool or None, of y's leading axes: True where a row counts

    Raises
    ------
    ValueError, TypeError
        Shapes, libraries, devices or dtypes do not fit.
    IndexError
        A target in a NumPy array is out of range. On a device, where checking would wait for it,
        the value becomes NaN instead.

    Examples
    --------
    >>> import numpy as np
    >>> from gru_any import softmax_cross_entropy
    >>> value, dy = softmax_cross_entropy(np.zeros((1, 4)), np.array([2]))
    >>> round(float(value), 4), dy.tolist()  # log 4, and p - t
    (1.3863, [[0.25, 0.25, -0.75, 0.25]])
    """
    backend, xp, z, keep = _enter(y, target, weight, mask, axes=-1)
    if not z.ndim or not z.shape[-1]:
        raise ShapeError(f"y is {tuple(z.shape)}, expected (..., C), scores of C classes")
    hard = tuple(target.shape) == tuple(y.shape[:-1])
    if hard:
        t = _one_hot(backend, target, y.shape[-1], z.dtype, mask)
    else:
        if tuple(target.shape) != tuple(y.shape):
            raise ShapeError(
                f"target is {tuple(target.shape)}, expected {tuple(y.shape[:-1])} of integers, the "
                f"classes, or {tuple(y.shape)} of probabilities"
            )
        if not xp.isdtype(target.dtype, "real floating"):
            raise TypeError(
                f"target has dtype {target.dtype} and the shape of y, expected probabilities of "
                f"floating dtype, or integers {tuple(y.shape[:-1])}"
            )
        t = xp.astype(target, z.dtype, copy=False)
    if weight is not None:
        _same("weight", weight, y.shape[-1:])
        t = t * xp.astype(weight, z.dtype, copy=False)
    if keep is not None:
        rows = xp.expand_dims(keep, axis=-1)
        z, t = xp.where(rows, z, xp.zeros_like(z)), xp.where(rows, t, xp.zeros_like(t))
    z = z - xp.max(z, axis=-1, keepdims=True)
    e = xp.exp(z)
    sums = xp.sum(e, axis=-1, keepdims=True)
    mass = xp.sum(t, axis=-1, keepdims=True)
    count = _count(xp, xp.sum(mass) if hard else _number(xp, keep, math.prod(y.shape[:-1]), z))
    value = xp.sum(mass * xp.log(sums) - xp.sum(_times(xp, t, z), axis=-1, keepdims=True)) / count
    return value, xp.astype((e * (mass / sums) - t) / count, y.dtype, copy=False)


def sigmoid_cross_entropy(
    y: Array, target: Array, weight: Array | None = None, mask: Array | None = None
) -> tuple[Array, Array]:
    """Cross entropy of sigmoid(y) and a target of 0 to 1, element by element.

        L = max(y, 0) - y t + log(1 + exp(-|y|));  dL/dy = sigmoid(y) - t

    The mean over all elements that count, as in `torch.nn.BCEWithLogitsLoss`.

    Parameters
    ----------
    y, target : arrays of one shape; the target is taken as y's dtype
    weight : array or None
        (C,), for the last axis of y, or the shape of y, where axes may be 1.
    mask : array of bool or None
        True where an element counts. It has the shape of y, where axes may be 1, or that of y
        without its last axis. The mean is over the elements that count, channels included.

    Raises
    ------
    ValueError, TypeError
        Shapes, libraries, devices or dtypes do not fit; or, in a NumPy array, a target that counts
        is outside of 0 to 1, such as a -1 for what is unknown. On a device the value becomes NaN.
    """
    backend, xp, z, keep = _enter(y, target, weight, mask)
    _same("target", target, y.shape)
    z, t = _cleaned(xp, keep, z, xp.astype(target, z.dtype, copy=False))
    t = _probabilities(backend, t)
    e = xp.exp(-xp.abs(z))
    positive = xp.where(z > 0, z, xp.zeros_like(z))
    loss = positive - z * t + xp.log1p(e)
    slope = xp.where(z > 0, 1 / (1 + e), e / (1 + e)) - t
    return _mean(xp, loss, slope, weight, keep, y)


def squared_error(
    y: Array, target: Array, weight: Array | None = None, mask: Array | None = None
) -> tuple[Array, Array]:
    """The mean of (y - t)^2, as in `torch.nn.MSELoss`; dL/dy = 2 (y - t) / count.

    Parameters and errors as in `sigmoid_cross_entropy`; the target may be any number.

    Examples
    --------
    >>> import numpy as np
    >>> from gru_any import squared_error
    >>> value, dy = squared_error(np.array([1.0, 3.0]), np.array([1.0, 1.0]))
    >>> float(value), dy.tolist()
    (2.0, [0.0, 2.0])
    """
    _, xp, z, keep = _enter(y, target, weight, mask)
    _same("target", target, y.shape)
    z, t = _cleaned(xp, keep, z, xp.astype(target, z.dtype, copy=False))
    return _mean(xp, (z - t) * (z - t), 2 * (z - t), weight, keep, y)


def _mean(
    xp: Namespace, loss: Array, slope: Array, weight: Array | None, keep: Array | None, y: Array
) -> tuple[Array, Array]:
    if weight is not None:
        if weight.ndim not in (1, loss.ndim):
            raise ShapeError(
                f"weight is {tuple(weight.shape)}, expected {tuple(loss.shape)}, where axes may be "
                f"1, or {tuple(loss.shape[-1:])}, of the last axis"
            )
        w = _spread(xp, "weight", xp.astype(weight, loss.dtype, copy=False), loss.shape)
        loss, slope = loss * w, slope * w
    if keep is not None:  # once more, since the weight may be NaN there, and the loss not 0
        loss, slope = _cleaned(xp, keep, loss, slope)
    count = _count(xp, _number(xp, keep, math.prod(y.shape), loss))
    return xp.sum(loss) / count, xp.astype(slope / count, y.dtype, copy=False)


def _enter(
    y: Array, target: Array, weight: Array | None, mask: Array | None, axes: int | None = None
) -> tuple[Backend, Namespace, Array, Array | None]:
    """Return the backend, its namespace, y for the arithmetic, and the mask over y[:axes]."""
    given = {"y": y, "target": target, "weight": weight, "mask": mask}
    try:
        backend = of(*(v for v in given.values() if v is not None))
    except TypeError as e:
        raise _named(given, e) from None
    xp = backend.xp
    if not xp.isdtype(y.dtype, "real floating"):
        raise TypeError(f"y has dtype {y.dtype}, expected a real floating dtype")
    z = xp.astype(y, xp.float32) if xp.finfo(y.dtype).bits == 16 else y
    if mask is not None:
        if not xp.isdtype(mask.dtype, "bool"):
            raise TypeError(f"mask has dtype {mask.dtype}, expected bool: mask != 0")
        if axes is None and y.ndim and tuple(mask.shape) == tuple(y.shape[:-1]):
            mask = xp.expand_dims(mask, axis=-1)
        if mask.ndim != len(y.shape[:axes]):
            whole = "" if axes else f" or {tuple(y.shape)}"
            raise ShapeError(f"mask is {tuple(mask.shape)}, expected {tuple(y.shape[:-1])}{whole}")
        mask = _spread(xp, "mask", mask, y.shape[:axes])
    return backend, xp, z, mask


def _named(given: dict[str, Array | None], error: TypeError) -> TypeError:
    """Return an error that names the argument that is no array; `error` if all are."""
    for name, v in given.items():
        if v is not None and not (hasattr(v, "shape") and hasattr(v, "dtype")):
            return TypeError(
                f"{name}: {type(v).__name__} is no array; convert it, for example with "
                f"numpy.asarray({name})"
            )
    return error


def _spread(xp: Namespace, name: str, v: Array, shape: Shape) -> Array:
    """Broadcast an array to the shape; ShapeError names the array."""
    try:
        return xp.broadcast_to(v, tuple(shape))
    except (ValueError, RuntimeError):
        raise ShapeError(f"{name} is {tuple(v.shape)}, expected {tuple(shape)}") from None


def _one_hot(
    backend: Backend, target: Array, classes: int, dtype: DType, mask: Array | None
) -> Array:
    """Return (..., C) of targets (...): 1 at the target; NaN in the row of one out of range."""
    xp = backend.xp
    target = backend.integers("target", target)
    numbers = xp.arange(classes, dtype=target.dtype, device=backend.device)
    hot = xp.astype(xp.expand_dims(target, axis=-1) == numbers, dtype)
    wrong = (target < 0) | (target >= classes)
    if backend.host and (wrong & mask if mask is not None else wrong).any():
        bad = target[wrong][0]
        way = "; leave out by a mask what does not count" if bad < 0 else ""
        raise IndexError(f"target holds {bad}, expected 0 to C - 1 = {classes - 1}{way}")
    if backend.host:
        return hot
    return xp.where(xp.expand_dims(wrong, axis=-1), xp.full_like(hot, math.nan), hot)


def _probabilities(backend: Backend, t: Array) -> Array:
    """Refuse targets outside of 0 to 1; on a device return them as NaN."""
    wrong = (t < 0) | (t > 1)
    if not backend.host:
        return backend.xp.where(wrong, backend.xp.full_like(t, math.nan), t)
    if wrong.any():
        raise ValueError(
            f"target holds {t[wrong][0]}, expected 0 to 1; leave out by a mask what does not count"
        )
    return t


def _times(xp: Namespace, t: Array, z: Array) -> Array:
    """Return t * z, but 0 where t is 0: a score of minus infinity may have no probability."""
    return t * xp.where(t == 0, xp.zeros_like(z), z)


def _cleaned(xp: Namespace, keep: Array | None, *arrays: Array) -> list[Array]:
    """Return the arrays with 0 in place of what does not count."""
    if keep is None:
        return list(arrays)
    return [xp.where(keep, v, xp.zeros_like(v)) for v in arrays]


def _number(xp: Namespace, keep: Array | None, size: int, like: Array) -> int | Array:
    """Return how many of `size` elements count: all without a mask."""
    return size if keep is None else xp.sum(xp.astype(keep, like.dtype))


def _count(xp: Namespace, n: int | Array) -> int | Array:
    """Return the divisor of a mean: 1 in place of 0, where the sum is 0 too."""
    if isinstance(n, int):
        return max(n, 1)
    return xp.where(n == 0, xp.ones_like(n), n)


def _same(name: str, array: Array, shape: Shape) -> None:
    if tuple(array.shape) != tuple(shape):
        raise ShapeError(f"{name} is {tuple(array.shape)}, expected {tuple(shape)}")

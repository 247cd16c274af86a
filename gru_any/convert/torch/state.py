"""One layer's weights out of a state_dict of PyTorch, or what they are computed from."""

import re
from collections.abc import Callable, Mapping

import numpy as np

from ...backend import to_numpy
from ...errors import ShapeError
from ...typing import Array, Arrays, HostArray
from ..cells import shown
from ..table import floating

BASE = r"((?:weight|bias)(?:_[ih]h(?:_l[0-9]{1,4}(?:_reverse)?)?)?)"
# what stands in a weight's place: torch.nn.utils.NAME, and torch.nn.utils.parametrizations.NAME
OLD = re.compile(BASE + r"_(g|v|u|orig|mask)")
NEW = re.compile(r"parametrizations\." + BASE + r"\.(.+)")
RECURRENT = re.compile(r"(.*?)(?:parametrizations\.)?weight_hh(?:_l0)?(?:[._].*)?")


def part(arrays: Arrays, prefix: str) -> dict[str, Array]:
    """Return the weights under a prefix, without it; the dot after "rnn" may be left out.

    Raises
    ------
    TypeError, KeyError, ValueError
        It is no mapping of names; nothing is there; or a weight cannot be computed.
    """
    if not isinstance(arrays, Mapping):
        raise TypeError(
            f"arrays is a {type(arrays).__name__}, expected a mapping name -> array, such as "
            "model.state_dict()"
        )
    for name in arrays:
        if not isinstance(name, str):
            raise TypeError(f"a name is {name!r}, expected a string such as 'weight_ih_l0'")
    if not isinstance(prefix, str):
        raise TypeError(f"prefix is {prefix!r}, expected a string such as 'rnn.'")
    under = {k.removeprefix(prefix): a for k, a in arrays.items() if k.startswith(prefix)}
    if not any(re.match(f"{BASE}|parametrizations", name) for name in under):
        dotted = {k.removeprefix("."): a for k, a in under.items() if k.startswith(".")}
        under = dotted or under
    if not under:
        there = shown(arrays) or "no names at all"
        raise KeyError(f"no name begins with {prefix!r}; there are {there}{_where(arrays)}")
    return _computed(under)


def refuse_others(arrays: Arrays, others: list[str]) -> None:
    """Raise KeyError where there are names that are no GRU's."""
    if others:
        raise KeyError(
            f"no names of torch.nn.GRU or GRUCell: {shown(others)}; there are {shown(arrays)}. Of "
            f'a larger model take one layer with prefix="..."{_where(arrays)}'
        )


def _where(arrays: Arrays) -> str:
    """Return the prefixes under which recurrent weights stand, for an error."""
    found = {match[1] for name in arrays if (match := RECURRENT.fullmatch(name))} - {""}
    return f"; weight_hh stands under {', '.join(map(repr, sorted(found)[:20]))}" if found else ""


def weight(name: str, array: Array) -> HostArray:
    """Return a dense floating tensor as an array on the host; TypeError for other kinds."""
    kinds = {
        "quantised": getattr(array, "is_quantized", False),
        "nested": getattr(array, "is_nested", False),
        "on meta, without numbers": getattr(array, "is_meta", False),
        "sparse": "sparse" in str(getattr(array, "layout", "")),
    }
    for kind, true in kinds.items():
        if true:
            raise TypeError(f"{name} is {kind}, expected a dense tensor of real floating numbers")
    return floating(name, array)


def _computed(arrays: dict[str, Array]) -> dict[str, Array]:
    """Return the arrays, with the weights that PyTorch computes in place of what they come from."""
    plain: dict[str, Array] = {}
    parts: dict[str, dict[str, Array]] = {}
    for name, array in arrays.items():
        if match := NEW.fullmatch(name) or OLD.fullmatch(name):
            parts.setdefault(match[1], {})[match[2]] = array
        else:
            plain[name] = array
    for name, found in parts.items():
        if name in plain:
            raise KeyError(f"{name} stands beside {sorted(found)}, from which it would be computed")
        plain[name] = _compute(name, found)
    return plain


def _compute(name: str, found: dict[str, Array]) -> HostArray:
    for endings, compute in RECIPES.items():
        if set(endings) == set(found):
            return compute(name, *(found[ending] for ending in endings))
    raise KeyError(
        f"{name} is computed from {sorted(found)}, which is not read: weight_norm, spectral_norm "
        "and pruning are. In PyTorch, torch.nn.utils.parametrize.remove_parametrizations (or "
        "remove_weight_norm, prune.remove) leaves the weight alone: save the state_dict after it"
    )


def _as_float64(name: str, *arrays: Array) -> list[HostArray]:
    """Return the arrays as float64; TypeError where they have several dtypes."""
    host = [weight(name, array) for array in arrays]
    if len({array.dtype for array in host}) > 1:
        raise TypeError(f"{name} is computed from {' and '.join(str(a.dtype) for a in host)}")
    return [array.astype(np.float64) for array in host]


def _weight_norm(name: str, magnitude: Array, direction: Array) -> HostArray:
    """Return g v / |v|, the norm over all axes but the one that g has, or over all."""
    dtype = weight(name, direction).dtype
    g, v = _as_float64(name, magnitude, direction)
    kept = [tuple(n if i == axis else 1 for i, n in enumerate(v.shape)) for axis in range(v.ndim)]
    if g.shape not in (*kept, ()):
        raise ShapeError(
            f"{name} is computed by weight_norm from g {g.shape} and v {v.shape}, expected g "
            f"{kept[0] if kept else ()}"
        )
    axes = [i for i in range(v.ndim) if g.shape == () or i != kept.index(g.shape)]
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0 is nan there too
        scaled: HostArray = v * (g / np.sqrt((v * v).sum(tuple(axes), keepdims=True)))
    return scaled.astype(dtype)


def _pruned(name: str, original: Array, mask: Array) -> HostArray:
    """Return the weights that a mask leaves."""
    host, kept = weight(f"{name}_orig", original), to_numpy(mask)
    if kept.shape != host.shape or kept.dtype.kind not in "biuf":
        raise ShapeError(f"{name}_mask is {kept.shape} of {kept.dtype}, expected {host.shape}")
    pruned: HostArray = host * kept.astype(host.dtype)
    return pruned


def _spectral_norm(name: str, original: Array, left: Array, right: Array) -> HostArray:
    """Return W / (u^T W v), as in eval mode: u and v stay as they are."""
    dtype = weight(name, original).dtype
    W, u, v = _as_float64(name, original, left, right)
    if W.ndim != 2 or (u.shape, v.shape) != ((W.shape[0],), (W.shape[1],)):
        raise ShapeError(
            f"{name} is computed by spectral_norm from {W.shape}, u {u.shape} and v {v.shape}, "
            "expected W (m, n), u (m,) and v (n,), as dim=0 has them"
        )
    if W.shape[0] == W.shape[1]:
        raise ValueError(
            f"{name} is {W.shape}, of which spectral_norm with dim=0 and dim=1 make different "
            "weights that a file does not tell apart: save the computed weight"
        )
    scaled: HostArray = W / (u @ W @ v)
    return scaled.astype(dtype)


RECIPES: dict[tuple[str, ...], Callable[..., HostArray]] = {
    ("g", "v"): _weight_norm,
    ("original0", "original1"): _weight_norm,
    ("orig", "mask"): _pruned,
    ("orig", "u", "v"): _spectral_norm,
    ("original", "0._u", "0._v"): _spectral_norm,
}

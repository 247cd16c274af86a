"""A model in a shared library, run step by step; NumPy and ctypes are all it needs."""

import ctypes
import json
import os
import platform
from itertools import count
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from ...errors import check_shape
from ...typing import HostArray, Path

if TYPE_CHECKING:
    from ...nn.chain import Chain
    from ...nn.gru import GRU

FORMAT = 1
_opened = count()


def load(path: Path, model: "GRU | Chain | None" = None) -> "CStream":
    """Open a library that `build` made, as a stream of one row with a state of its own.

    Each call gives another stream; they share the weights.

    Parameters
    ----------
    path : str or path
    model : GRU, Chain or None
        Given, the library must be of this model, with the weights that it has now.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        It is no library of ours, of another model, or for another machine.
    """
    path = os.path.abspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no library {path}")
    code = _open(path)
    try:
        text = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(code, "gru_any_about")))
    except ValueError:
        raise ValueError(f"{path} is a library, but none that gru_any.deploy.c built") from None
    about = json.loads(text)
    if about["format"] != FORMAT:
        raise ValueError(
            f"{path} has format {about['format']}, and this version of gru_any reads {FORMAT}: "
            "build it again"
        )
    lost = set(about["needs"]) - processor()
    if about["machine"] != [platform.system(), platform.machine()] or lost:
        what = f"lacks {', '.join(sorted(lost))}" if lost else f"is a {platform.machine()}"
        raise ValueError(
            f"{path} was built for another machine, a {' '.join(about['machine'])}; this one "
            f"{what}. Build it here, or with native=False"
        )
    if model is not None:
        from .parts import parts_of

        if parts_of(model, about["weights"]).fingerprint != about["fingerprint"]:
            raise ValueError(f"{path} is of another model, or of other weights: build it again")
    return CStream(code, about)


def _open(path: str) -> ctypes.CDLL:
    """Open under a new name: the system would return what it has opened under this one before."""
    folder, name = os.path.split(path)
    if os.name == "posix":  # where // and /./ are the same as /, and spell a number here
        digits = f"{next(_opened):b}"
        folder += "".join("/." if digit == "1" else "/" for digit in digits)
    try:
        return ctypes.CDLL(f"{folder}/{name}")
    except OSError as e:
        why = str(e).replace(f"{folder}/{name}", "the file")
        raise ValueError(f"{path} is no library of this machine ({why})") from None


def processor() -> set[str]:
    """Return the features that the system says the processor has; none if it does not say."""
    try:
        with open("/proc/cpuinfo") as file:  # the system writes it as it is read: no further
            words = (line.split() for line in file if line.startswith(("flags", "Features")))
            return {*next(words, ())} - {"flags", "Features", ":"}
    except OSError:
        return set()


class CStream:
    """A model in C with a state of its own, called like a `Stream` with one row.

    Many threads may step through streams of their own, but not through one together.
    """

    def __init__(self, code: ctypes.CDLL, about: dict[str, Any]) -> None:
        self.about = about
        self._embeds, first = about["embeds"], about["batch_first"]
        # shapes in letters, without an axis of rows and with it
        self._step_letters, self._letters = (
            (("()", "(B,)"), ("(T,)", "(B, T)" if first else "(T, B)"))
            if self._embeds
            else (("(I,)", "(B, I)"), ("(T, I)", "(B, T, I)" if first else "(T, B, I)"))
        )
        self._state = np.zeros(about["floats"], "float32")
        self._x = (
            np.zeros(1, "int64") if self._embeds else np.zeros((1, about["inputs"]), "float32")
        )
        self._y = np.zeros((1, about["outputs"]), "float32")
        self._steps = code.gru_any_steps
        pointer = ctypes.c_void_p
        self._steps.argtypes = [pointer, ctypes.c_size_t, pointer, pointer]
        self._step = self._state.ctypes.data, 1, self._x.ctypes.data, self._y.ctypes.data

    def step(self, x_t: HostArray) -> HostArray:
        """Read one step: x_t (I,) or (1, I), float32; integers () or (1,) for an Embedding -> y_t.

        Raises
        ------
        ValueError, TypeError, IndexError
            x_t has another shape or dtype, or an index is out of range.
        """
        usual = isinstance(x_t, np.ndarray) and x_t.shape == self._x.shape
        if not (usual and x_t.dtype == self._x.dtype):  # the check takes longer than a small step
            self._checked("x_t", x_t, self._step_letters)
        self._x[...] = x_t
        if self._steps(*self._step):
            self._refuse("x_t", x_t)
        y = self._y.copy()
        return y if x_t.ndim == self._x.ndim else y[0]

    def __call__(self, x: HostArray) -> HostArray:
        """Read a chunk: x (T, I) or (T, 1, I), integers (T,) or (T, 1) for an Embedding -> y.

        A model with `batch_first` takes (1, T, I).
        """
        rows = self._checked("x", x, self._letters)
        axis = int(not self.about["batch_first"])  # of the rows
        steps = x.shape[1 - axis] if rows else len(x)
        flat = np.ascontiguousarray(x, self._x.dtype)
        if self._embeds and x.size and (x.min() < 0 or x.max() >= self.about["inputs"]):
            self._refuse("x", x)
        y = np.empty((steps, self.about["outputs"]), "float32")
        self._steps(self._step[0], steps, flat.ctypes.data, y.ctypes.data)
        return np.expand_dims(y, axis) if rows else y

    def reset(self) -> None:
        """Begin anew from zeros."""
        self._state[:] = 0

    @property
    def state(self) -> Any:
        """h (L, 1, H) of a GRU, a list of one h for each GRU of a Chain: copies.

        What it is set to is where the next call goes on; None for the beginning.
        """
        found, start = [], 0
        for L, H in self.about["states"]:
            found.append(self._state[start : start + L * H].reshape(L, 1, H).copy())
            start += L * H
        return found if self.about["chain"] else found[0]

    @state.setter
    def state(self, state: Any) -> None:
        if state is None:
            self.reset()
            return
        given, sizes = list(state) if self.about["chain"] else [state], self.about["states"]
        if len(given) != len(sizes):
            raise ValueError(f"state holds {len(given)}, expected {len(sizes)}: one for each GRU")
        for h, (L, H) in zip(given, sizes, strict=True):
            letters = "(L, H)" if np.ndim(h) == 2 else "(L, B, H)"
            check_shape("state", h, letters, {"L": L, "B": 1, "H": H})
        flat = np.concatenate([np.ravel(h) for h in given])
        self._state[: flat.size] = flat

    def __reduce__(self) -> NoReturn:
        raise TypeError("a library in memory cannot be copied: load(path) gives another stream")

    def _checked(self, name: str, x: HostArray, letters: tuple[str, str]) -> bool:
        """Check x, and return whether it has an axis of rows."""
        if not isinstance(x, np.ndarray | np.generic):
            raise TypeError(f"{name} is a {type(x).__name__}, expected an array of NumPy")
        if x.dtype.kind not in "iu" if self._embeds else x.dtype != np.float32:
            wanted = "integers" if self._embeds else f'float32: {name}.astype("float32")'
            raise TypeError(f"{name} has dtype {x.dtype}, expected {wanted}")
        alone, with_rows = letters
        rows = x.ndim != alone.count("T") + alone.count("I")
        if rows or x.ndim:
            sizes = {"I": self.about["inputs"], "B": 1}
            check_shape(name, x, with_rows if rows else alone, sizes)
        return rows

    def _refuse(self, name: str, x: HostArray) -> NoReturn:
        last = self.about["inputs"] - 1
        raise IndexError(f"{name} holds {x.min()} to {x.max()}, expected 0 to {last}")

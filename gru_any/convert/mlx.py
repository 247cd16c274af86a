"""MLX: `mlx.nn.GRU`. Reset after, gates in order r, z, n, one bias b, and c_n as `bhn`.

Files are those of `mlx.nn.Module.save_weights`, npz or safetensors
(https://ml-explore.github.io/mlx).
"""

import pathlib
from collections.abc import Iterable

from ..nn.gru import GRU
from ..typing import HostArray, Path
from .cells import Cells, cells_of, gru_of, under
from .files import naming, read_npz, read_safetensors, write_npz, write_safetensors
from .table import Table

TABLE = Table(
    "MLX",
    reset_after=True,
    rows={"Wx": "W_r W_z W_n", "Wh": "U_r U_z U_n", "b": "b_r+c_r b_z+c_z b_n", "bhn": "c_n"},
    bias_optional=True,
)


def from_arrays(cells: Cells, *, bidirectional: bool = False, batch_first: bool = True) -> GRU:
    """A GRU from the arrays of its layers; x is (B, T, I), as in MLX, unless `batch_first=False`.

    Parameters
    ----------
    cells : a mapping name -> array of one layer, or a list of them, layer by layer
        `Wx` (3H, I), `Wh` (3H, H), `b` (3H,), `bhn` (H,); the last two None or absent without
        bias. With `bidirectional`, forward before reverse.

    Raises
    ------
    KeyError, ValueError, TypeError
        A name is missing or unused; a shape or dtype does not fit.
    """
    return gru_of(TABLE, cells, bidirectional, batch_first)


def to_arrays(gru: GRU) -> list[dict[str, HostArray]]:
    """The arrays of each layer, in the order `from_arrays` takes; ValueError for reset before."""
    return cells_of(TABLE, gru)


def load(path: Path, prefix: str | Iterable[str] = "", *, bidirectional: bool = False) -> GRU:
    """A GRU from a file of MLX.

    Parameters
    ----------
    path : str or path, ending in .npz or .safetensors
    prefix : str, or a list of them, layer by layer
        What stands before the GRU's names in a file of a larger model, such as "encoder.gru.".
        Several layers are several GRUs in MLX: `["layers.0.", "layers.1."]`.

    Raises
    ------
    ValueError, KeyError, TypeError
        The file is damaged, or its arrays are not those of a GRU.
    """
    prefixes = [prefix] if isinstance(prefix, str) else prefix
    with naming(path):
        arrays = read_npz(path) if pathlib.Path(path).suffix == ".npz" else read_safetensors(path)
        return from_arrays([under(arrays, p) for p in prefixes], bidirectional=bidirectional)


def save(path: Path, gru: GRU) -> None:
    """Write a file for `mlx.nn.Module.load_weights`: of a GRU, or of a Sequential of GRUs.

    path : str or path, ending in .npz or .safetensors
    """
    cells = to_arrays(gru)
    prefixes = [f"layers.{i}." for i in range(len(cells))] if len(cells) > 1 else [""]
    arrays = {
        prefix + name: array
        for prefix, cell in zip(prefixes, cells, strict=True)
        for name, array in cell.items()
    }
    write = write_npz if pathlib.Path(path).suffix == ".npz" else write_safetensors
    write(path, arrays)

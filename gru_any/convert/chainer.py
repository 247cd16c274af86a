"""Chainer, which has two GRUs that differ: the links of `links.GRU`, and `links.NStepGRU`.

`links.GRU`, `StatefulGRU` and `StatelessGRU`: reset before, two biases that are added; z near 1
replaces the state, so the sign of z's weights is changed. (In its first step after `reset_state` a
StatefulGRU leaves out the second bias; the GRU made here does not, like a StatefulGRU after
`set_state` with zeros.) `NStepGRU` and `NStepBiGRU`: reset after. Files are those of
`chainer.serializers.save_npz` (https://docs.chainer.org).
"""

from collections.abc import Mapping

from ..nn.gru import GRU
from ..typing import Array, Arrays, Path
from .cells import Cells, cells_of, gru_of, under
from .files import naming, read_npz, write_npz
from .table import Table

LINK = Table(
    "Chainer's links.GRU",
    reset_after=False,
    rows={
        "W_r/W": "W_r",
        "W_r/b": "b_r",
        "U_r/W": "U_r",
        "U_r/b": "c_r",
        "W_z/W": "-W_z",
        "W_z/b": "-b_z",
        "U_z/W": "-U_z",
        "U_z/b": "-c_z",
        "W/W": "W_n",
        "W/b": "b_n",
        "U/W": "U_n",
        "U/b": "c_n",
    },
)
N_STEP = Table(
    "Chainer's NStepGRU",
    reset_after=True,
    rows={f"w{i}": block for i, block in enumerate(["W_r", "W_z", "W_n", "U_r", "U_z", "U_n"])}
    | {f"b{i}": block for i, block in enumerate(["b_r", "b_z", "b_n", "c_r", "c_z", "c_n"])},
)


def from_arrays(arrays: Cells, *, bidirectional: bool = False, batch_first: bool = False) -> GRU:
    """A GRU from the parameters of a link.

    Parameters
    ----------
    arrays : mapping name -> array, or a list of them for links.GRUs on top of each other
        `W_r/W`, `W_r/b`, ... of links.GRU (reset before), or `0/w0`, `0/b0`, ... of NStepGRU
        (reset after): the layers, with `bidirectional` (NStepBiGRU) forward before reverse.

    Raises
    ------
    KeyError, ValueError, TypeError
        A name is missing or unused; a shape or dtype does not fit.
    """
    if not isinstance(arrays, Mapping) or not any(name[:1].isdecimal() for name in arrays):
        return gru_of(LINK, arrays, bidirectional, batch_first)
    numbers = sorted({int(k.partition("/")[0]) for k in arrays if k.partition("/")[0].isdecimal()})
    if numbers != list(range(len(numbers))) or not all(k[:1].isdecimal() for k in arrays):
        raise KeyError(f"NStepGRU has names from 0/w0 on, these are {sorted(arrays)[:20]}")
    cells = [under(arrays, f"{i}/") for i in numbers]
    return gru_of(N_STEP, cells, bidirectional, batch_first)


def to_arrays(gru: GRU) -> Arrays | list[dict[str, Array]]:
    """The parameters as `from_arrays` takes them: of NStepGRU with reset_after, else of links.GRU.

    A mapping name -> array; for links.GRU with several layers or directions a list of them. Biases
    are always there: without them here, they are written as zeros.
    """
    if not gru.reset_after:
        links = cells_of(LINK, gru)
        return links[0] if len(links) == 1 else links
    cells = cells_of(N_STEP, gru)
    return {f"{i}/{name}": a for i, cell in enumerate(cells) for name, a in cell.items()}


def load(path: Path, prefix: str = "", *, bidirectional: bool = False) -> GRU:
    """A GRU from a file that `chainer.serializers.save_npz` wrote.

    Parameters
    ----------
    path : str or path
    prefix : str
        What stands before the link's names in the file of a larger model, such as "predictor/gru/".
    bidirectional : bool
        The link is an NStepBiGRU.

    Raises
    ------
    ValueError, KeyError, TypeError
        The file is damaged, or its arrays are not those of a GRU.
    """
    with naming(path):
        return from_arrays(under(read_npz(path), prefix), bidirectional=bidirectional)


def save(path: Path, gru: GRU) -> None:
    """Write a file for `chainer.serializers.load_npz`."""
    arrays = to_arrays(gru)
    if not isinstance(arrays, Mapping):
        raise ValueError(
            "links.GRU has one layer and one direction: save each layer, or use reset_after=True"
        )
    write_npz(path, arrays)

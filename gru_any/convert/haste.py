"""haste: `haste_pytorch.GRU` and `haste_tf.GRU`. Reset after, gates in order z, r, n.

The names are those of a layer's parameters (https://github.com/lmnt-com/haste). Zoneout and
dropout are settings of a layer, and are not weights: give both layers the same.
"""

from ..nn.gru import GRU
from ..typing import HostArray
from .cells import Cells, cells_of, gru_of
from .table import Table

TABLE = Table(
    "haste",
    reset_after=True,
    rows={
        "kernel": "W_z W_r W_n",
        "recurrent_kernel": "U_z U_r U_n",
        "bias": "b_z b_r b_n",
        "recurrent_bias": "c_z c_r c_n",
    },
    transposed=True,
)


def from_arrays(cells: Cells, *, bidirectional: bool = False, batch_first: bool = False) -> GRU:
    """A GRU from the parameters of its layers.

    Parameters
    ----------
    cells : a mapping name -> array of one layer, or a list of them, layer by layer
        `kernel` (I, 3H), `recurrent_kernel` (H, 3H), `bias` (3H,), `recurrent_bias` (3H,), which
        is also the layer's PyTorch state_dict. With `bidirectional`, forward before reverse.

    Raises
    ------
    KeyError, ValueError, TypeError
        A name is missing or unused; a shape or dtype does not fit.
    """
    return gru_of(TABLE, cells, bidirectional, batch_first)


def to_arrays(gru: GRU) -> list[dict[str, HostArray]]:
    """The parameters of each layer, as `from_arrays` takes them; ValueError for reset before.

    haste always has biases: without them here, they are written as zeros.
    """
    return cells_of(TABLE, gru)

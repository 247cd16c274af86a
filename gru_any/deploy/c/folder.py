"""A model as a folder of C files."""

import re

from ... import arguments
from ...files import write_folder_atomically
from ...nn.chain import Chain
from ...nn.gru import GRU
from ...typing import Path


def write(
    model: GRU | Chain,
    folder: Path,
    weights: str = "float32",
    *,
    constants: bool = True,
    name: str = "gru",
) -> None:
    """Write a model as C99 that needs no library but libm and allocates nothing.

    The step is printed from the equations as they are when this is called. Files: `gru.h` with the
    sizes, the struct of a state, `gru_reset` and `gru_step`; `gru.c`; the weights; a self-test with
    stored numbers; and a Makefile whose targets test, `sanitize` and print the `size`.

    Parameters
    ----------
    model : GRU or Chain of Embedding, Linear, GRU and Dropout layers
        Of float32, reading forward. Dropout does nothing.
    folder : str or path
        Is made. One that was written before is replaced as a whole.
    weights : str
        "float32", or "int8": matrices and tables are rounded to 127 levels on either side of zero,
        with a scale in float32 for each row. Biases and all arithmetic stay float32.
    constants : bool
        True: the weights are constants in `gru_weights.c`. False: they are in `gru_weights.bin`,
        the struct `gru_weights` as a little-endian machine has it in memory, which the program
        reads or maps; `gru_fits` tells whether they are this model's.
    name : str
        In place of "gru", for programs that hold several models.

    Raises
    ------
    ValueError, TypeError
        The model cannot be written as C, or holds NaN; the text says what to do.
    FileExistsError
        The folder holds files that neither this function nor the Makefile has made.
    OSError
        It cannot be written. It is never there in part.

    Examples
    --------
    >>> import os, tempfile
    >>> from gru_any import GRU
    >>> from gru_any.deploy import c
    >>> folder = os.path.join(tempfile.mkdtemp(), "out")
    >>> c.write(GRU(3, 4, seed=0), folder)
    >>> sorted(os.listdir(folder))
    ['Makefile', 'gru.c', 'gru.h', 'gru_selftest.c', 'gru_weights.c']
    """
    from .parts import parts_of  # not with this module: a program that only loads needs none
    from .sources import file_names, sources

    arguments.flag("constants", constants)
    if not isinstance(name, str) or not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise ValueError(f"name is {name!r}, expected small letters, digits and _, as in C")
    files = sources(parts_of(model, weights), name, constants)
    write_folder_atomically(folder, files, replaces=file_names(name))

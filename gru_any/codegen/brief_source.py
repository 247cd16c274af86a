"""From a schedule to source for a scan of NumPy's products with compiled loops between them."""

from .numba_source import HEAD, TANH, lines
from .numpy_source import HostSource, column
from .schedule import Group, Schedule


class BriefSource(HostSource):
    """A scan whose groups are compiled functions; `loops` is the module with these."""

    def __init__(self, schedule: Schedule, dtype: str) -> None:
        self.dtype = dtype
        self.loops = HEAD.format(dtype=dtype) + TANH[dtype]
        super().__init__(schedule)

    def group(self, n: int, group: Group) -> None:
        """Add the compiled loop of a group, and its call."""
        places = [*(load.place for load in group.loads), *(store.place for store in group.stores)]
        count, arrays = len(places), f"{self.dtype}[:, ::1]"
        loads = [f"v{load.column} = y{i}[j]" for i, load in enumerate(group.loads)]
        stores = [f"y{i}[j] = v{store.column}"
                  for i, store in enumerate(group.stores, len(loads))]  # fmt: skip
        self.loops += "\n".join([
            f"@njit('void({', '.join([arrays] * count)})', cache=CACHE, **flags)",
            f"def loop{n}({', '.join(f'x{i}' for i in range(count))}):",
            "    for i in range(len(x0)):",  # a loop over a flat view is not vectorised
            *(f"        y{i} = x{i}[i]" for i in range(count)),
            "        for j in range(x0.shape[1]):",
            *(f"            {line}" for line in (*loads, *lines(group.ops), *stores)),
            "",
            "",
            "",
        ])  # fmt: skip
        self.body.append(f"loop{n}({', '.join(map(column, places))})")

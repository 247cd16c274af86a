"""From a schedule to source for a scan of NumPy's products with compiled loops between them."""

from .numba_functions import functions
from .numba_source import HEAD, lines
from .numpy_source import HostSource, column
from .schedule import Group, Kind, Schedule


class BriefSource(HostSource):
    """A scan whose groups are compiled functions; `loops` is the module with these."""

    def __init__(self, schedule: Schedule, dtype: str) -> None:
        self.dtype = dtype
        self.loops = HEAD.format(dtype=dtype)
        self.loops += functions([op for group in schedule.groups for op in group.ops], dtype)
        super().__init__(schedule)

    def group(self, n: int, group: Group) -> None:
        """Add the compiled loop of a group, and its call."""
        places = [*(load.place for load in group.loads), *(store.place for store in group.stores)]
        count, whole = len(places), [place.array.kind is not Kind.ROWS for place in places]
        types = [f"{self.dtype if each else 'boolean'}[:, ::1]" for each in whole]
        size = f"x{whole.index(True)}"
        loads = [f"v{load.column} = y{i}[j]" for i, load in enumerate(group.loads)]
        stores = [f"y{i}[j] = v{store.column}"
                  for i, store in enumerate(group.stores, len(loads))]  # fmt: skip
        self.loops += "\n".join([
            f"@njit('void({', '.join(types)})', cache=CACHE, **flags)",
            f"def loop{n}({', '.join(f'x{i}' for i in range(count))}):",
            f"    for i in range(len({size})):",  # a loop over a flat view is not vectorised
            *(f"        y{i} = x{i}[{'i' if each else '0'}]" for i, each in enumerate(whole)),
            f"        for j in range({size}.shape[1]):",
            *(f"            {line}" for line in (*loads, *lines(group.ops), *stores)),
            "",
            "",
            "",
        ])  # fmt: skip
        self.body.append(f"loop{n}({', '.join(map(column, places))})")

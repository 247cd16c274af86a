"""The functions that Numba's source calls, in float32 as arithmetic that vectorises.

LLVM vectorises tanh, exp and log1p only with a library of Intel's. These functions have neither
branches nor tables, and NaN stays NaN. Both results of an `if` are computed before it, so that it
becomes a select. A power of two is the product of the powers 2^64, 2^32, ... in its exponent.
"""

from collections.abc import Iterable

from .rational import LIMIT, P, Q
from .trace import Op

HEAD = '@njit(nogil=True, error_model="numpy", fastmath={"contract"})'
INLINED = HEAD.replace(")", ", forceinline=True)")  # which LLVM finds too long otherwise
# exp(v) for |v| <= log(2) / 2, within 3e-9
EXP = (
    0.9999999999595244, 1.0000000377447194, 0.5000000107798716, 0.16666415400552254,
    0.04166621813745763, 0.008375135274284694, 0.0013948589938943554,
)  # fmt: skip
# atanh(v) / v in v^2 for |v| <= 1/3, within 4e-9
ATANH = (
    1.000000003938874, 0.3333315796754134, 0.2001242686169173, 0.13980709418099285,
    0.14087328628023674,
)  # fmt: skip
POWERS = (64, 64, 32, 16, 8, 4, 2, 1)  # twice 64: 2^-128 is denormal, which is slow


def _polynomial(coefficients: Iterable[float], v: str) -> str:
    """Print a polynomial by Horner's rule."""
    *others, text = (f"f({c!r})" for c in coefficients)
    for c in reversed(others):
        text = f"({text} * {v} + {c})"
    return text


def _each_power(condition: str, y: str, k: str, powers: Iterable[int] = POWERS) -> str:
    """Print, for each power p of two, y times 2^-p and k plus p where the condition holds."""
    return "".join(
        f"    more = {condition.format(p=p, q=2.0**p)}\n"
        f"    {y} = {y} * f({2.0**-p!r}) if more else {y}\n"
        f"    {k} = {k} + f({p}.0) if more else {k}\n"
        for p in powers
    )


# a rational function
TANH = f"""
{HEAD}
def tanh(x):
    y = f(0.5) * x
    u = y * y
    v = u * u
    p = f({P[4]}) * v + (f({P[3]}) * u + f({P[2]}))
    p = (p * v + (f({P[1]}) * u + f({P[0]}))) * y
    q = f({Q[3]}) * u + f({Q[2]})
    q = q * v + (f({Q[1]}) * u + f({Q[0]}))
    return math.copysign(f(1.0), x) if abs(x) >= f({LIMIT}) else (p + p) * q / (q * q + p * p)
"""
# exp(-|x|) = 2^k exp(v), k rounded by a sum that has no room for a fraction
FUNCTIONS = {
    "exp": f"""
{INLINED}
def exp(x):
    v = f(-127.0) if abs(x) > f(127.0) else -abs(x)
    k = (v * f(1.4426950408889634) + f(12582912.0)) - f(12582912.0)
    v = (v - k * f(0.693359375)) + k * f(2.1219444005469057e-4)
    y = {_polynomial(EXP, "v")}
{_each_power("k <= f(-{p}.0)", "y", "k")}\
    return f(1.0) / y if x > f(0.0) else y
""",
    # 2 tanh / (1 - tanh), where nothing is lost
    "expm1": f"""
{INLINED}
def expm1(x):
    t = tanh(f(0.5) * (f(1.0) if x > f(1.0) else x))
    far, near = exp(x) - f(1.0), (t + t) / (f(1.0) - t)
    return far if x > f(1.0) else near
""",
    # log(w) = k log(2) + 2 atanh((m - 1) / (m + 1)), w = 2^k m; near 1 without the sum 1 + x
    "log1p": f"""
{INLINED}
def log1p(x):
    w = f(1.0) + x
    inverse = f(1.0) / w
    m = inverse if w < f(1.0) else w
    k = f(0.0)
{_each_power("m >= f({q!r})", "m", "k", POWERS[1:])}\
    s, of_x = (m - f(1.0)) / (m + f(1.0)), x / (f(2.0) + x)
    sign = f(-1.0) if w < f(1.0) else f(1.0)
    near = abs(x) <= f(0.5)
    k = f(0.0) if near else sign * k
    s = of_x if near else sign * s
    u = s * s
    y = k * f({0.6931471805599453}) + (s + s) * {_polynomial(ATANH, "u")}
    end = f(math.inf) if w > f(0.0) else (f(-math.inf) if w == f(0.0) else f(math.nan))
    return y if (w > f(0.0)) & (w < f(math.inf)) else end
""",
}


def functions(ops: Iterable[Op], dtype: str) -> str:
    """Print tanh, and the other functions that these operations call."""
    called = {op.name for op in ops}
    called |= {"exp"} if "expm1" in called else set()
    if dtype != "float32":
        return "".join(f"\n{name} = math.{name}\n" for name in ("tanh", *optional(called)))
    return TANH + "\n".join(FUNCTIONS[name] for name in optional(called))


def optional(called: set[str]) -> list[str]:
    """Return the names of the optional functions that are called, in the order of printing."""
    return [name for name in FUNCTIONS if name in called]

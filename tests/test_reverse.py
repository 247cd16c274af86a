"""A GRU that reads from the end alone: the second half of a bidirectional one."""

import numpy as np
import pytest

from gru_any import GRU, gradcheck, load, save


@pytest.mark.parametrize("reset_after", [False, True])
def test_it_is_the_second_half_of_a_bidirectional_one(tmp_path, reset_after):
    rng = np.random.default_rng(0)
    both = GRU(3, 4, bidirectional=True, reset_after=reset_after, dtype="float64", seed=0)
    reverse = GRU(3, 4, reverse=True, reset_after=reset_after, dtype="float64")
    names = [name for name in both.params if name.endswith("_reverse")]
    reverse.load_params({name: both.params[name] for name in names})
    x, h0 = rng.standard_normal((6, 3, 3)), rng.standard_normal((2, 3, 4))
    save(tmp_path / "m", reverse)
    for gru in (reverse, load(tmp_path / "m")):
        y, h_n = gru(x, h0[1:], [6, 0, 3])
        expected, last = both(x, h0, [6, 0, 3])
        assert np.array_equal(y, expected[..., 4:])
        assert np.array_equal(h_n, last[1:])


def test_gradients_and_refusals():
    x = np.random.default_rng(0).standard_normal((5, 2, 3))
    gradcheck(GRU(3, 4, 2, reverse=True, seed=0), x, lengths=[5, 2], method="complex")
    with pytest.raises(ValueError, match="a reverse GRU cannot run step by step"):
        GRU(3, 4, reverse=True).step(np.zeros((2, 3), "float32"))
    with pytest.raises(ValueError, match="reverse and bidirectional are both True"):
        GRU(3, 4, reverse=True, bidirectional=True)


def test_the_way_without_reverse():
    """What converters advise: a GRU that reads forward, with each row turned within its length."""
    reverse, forward, lengths = GRU(3, 4, reverse=True, seed=0), GRU(3, 4), [5, 2]
    names = {name: name.removesuffix("_reverse") for name in reverse.params}
    forward.load_params({names[name]: array for name, array in reverse.params.items()})

    def turned(v):
        v = v.copy()
        for row, n in enumerate(lengths):
            v[:n, row] = v[:n, row][::-1]
        return v

    x = np.random.default_rng(0).standard_normal((5, 2, 3), dtype="float32")
    y, h_n = reverse(x, lengths=lengths)
    found, h = forward(turned(x), lengths=lengths)
    np.testing.assert_allclose(turned(found), y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(h, h_n, rtol=1e-5, atol=1e-6)

"""Other equations with their gradients, to be put in the place of ours."""

from gru_any.equations import reset_after, reset_before


def replaced(after):
    """Pairs of a name in gru_any.equations and a function for it: a step, and its gradient."""
    if after:
        return ("reset_after", half_candidate), ("reset_after_backward", half_candidate_backward)
    return ("reset_before", z_squared), ("reset_before_backward", z_squared_backward)


def z_squared(xp, a, h, U):
    """Reset before, with z^2 in the place of z."""
    _, (r, z, n, s) = reset_before(xp, a, h, U)
    return z * z * h + (1.0 - z * z) * n, (r, z, n, s)


def z_squared_backward(xp, g, h, saved, U):
    H = h.shape[-1]
    r, z, n, _ = saved
    da_n = g * (1.0 - z * z) * (1.0 - n * n)
    da_z = g * (h - n) * 2.0 * z * z * (1.0 - z)
    ds = da_n @ U[2 * H :, :]
    da_r = ds * h * r * (1.0 - r)
    da = xp.concat((da_r, da_z, da_n), axis=-1)
    return g * z * z + ds * r + da[..., : 2 * H] @ U[: 2 * H, :], (da,)


def half_candidate(xp, a, h, U, c):
    """Reset after, with n / 2 in the place of n."""
    _, (r, z, n, m) = reset_after(xp, a, h, U, c)
    return z * h + (1.0 - z) * (n / 2.0), (r, z, n, m)


def half_candidate_backward(xp, g, h, saved, U):
    r, z, n, m = saved
    da_n = g * (1.0 - z) * 0.5 * (1.0 - n * n)
    da_z = g * (h - n / 2.0) * z * (1.0 - z)
    dm = da_n * r
    da_r = da_n * m * r * (1.0 - r)
    da = xp.concat((da_r, da_z, da_n), axis=-1)
    dq = xp.concat((da_r, da_z, dm), axis=-1)
    return g * z + dq @ U, (da, dq)

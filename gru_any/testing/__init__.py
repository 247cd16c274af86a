"""Equipment of this package's own tests. Nothing imports it unasked.

`fake_cuda` stands in for a CUDA device with CuPy, so that the CUDA path can be tested on any
machine with g++. It runs the kernels on the CPU, in the same launches and captured graphs, and
checks memory and streams more strictly than a device does.

Your own tests may use it to find out whether code that uses `gru_any` would work with CuPy: whether
arrays of two libraries mix, and how often the host waits for the device.

    from gru_any import GRU
    from gru_any.testing.fake_cuda.array import asarray
    from gru_any.testing.fake_cuda.memory import count

    gru = GRU(8, 16, backend="gru_any.testing.fake_cuda.array")
    y, h_n = gru(asarray(x))        # x: a NumPy array
    y.get()                         # back to NumPy
    count["waits"]                  # how often the host has waited: here once

It says nothing about speed. It is no part of the public interface and may change with any release.
"""

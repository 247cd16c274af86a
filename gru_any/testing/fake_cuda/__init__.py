"""The fake device: a CUDA device that the host emulates.

array.py   its arrays and functions; importing it registers the library with `backend.cuda.device`
ops.py     launches, products, streams and captured graphs
memory.py  its memory and its streams, with a checker of both
shim.py    CUDA source, compiled for the CPU
"""

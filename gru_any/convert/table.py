"""The weights of one layer in one direction, from another library's names and back.

A table has a line for each of the other library's arrays: the blocks of which it is made, in the
letters of the equations:

    r = sigmoid(W_r x + b_r + U_r h + c_r)
    z = sigmoid(W_z x + b_z + U_z h + c_z)
    n = tanh(W_n x + b_n + r * (U_n h + c_n))    reset after
    n = tanh(W_n x + b_n + U_n (r * h))          reset before
"""

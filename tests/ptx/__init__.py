"""Executes compiled GPU code on the host, and counts it.

    program.py        PTX text -> programs
    machine.cpp, .py  runs them, 32 lanes of a warp at a time
    cuda.py           a module as nvcc compiles it, over a CUDA runtime (cudart.cpp) that launches
                      in the machine
    triton_driver.py  a driver for Triton that does
    hooks.py          where the backends of lslpn_kernels take these; the only file that knows them
    budgets.json      warp instructions of each kernel, written by
                      `python -m benchmarks.instructions --budgets`

What it finds that the emulation of the sources (tests/emulation) cannot: layouts of matrix
fragments, inline PTX, what a compiler does, the layout of parameters, alignment, shared memory that
is read before it is written, tensor cores that cut off sums, and everything about Triton. An
instruction that is missing here is an error that names it: add it to a table of machine.cpp, from
the PTX ISA.
"""

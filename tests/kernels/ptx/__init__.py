"""Executes compiled GPU code on the host, and counts it.

    program.py        PTX text -> programs
    machine.cpp, .py  runs them, 32 lanes of a warp at a time
    cuda.py           a module as nvcc compiles it, over a CUDA runtime (cudart.cpp) that launches
                      in the machine
    triton_driver.py  a driver for Triton that does
    hooks.py          where the backends of lslpn_kernels take these; the only file that knows them
    fixtures.py       `kernels`, for tests of the CUDA kernels
    budgets.json      warp instructions of each kernel, written by
                      `python -m benchmarks.instructions --budgets`

It finds wrong layouts of matrix fragments and of parameters, accesses out of bounds or misaligned,
races for shared memory and between blocks, shared memory that is read before it is written, and
what tensor cores cut off when they add. An instruction that is missing here is an error that names
it: add it to a table of machine.cpp, from the PTX ISA.
"""

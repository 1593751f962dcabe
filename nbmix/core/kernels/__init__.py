"""Compiled loops for the CPU, where torch would need many passes over memory.

The numerical ones have a torch counterpart in the module that calls them, which serves GPUs and the tests.
Loops take a range of rows, release the GIL and write into arrays that they are given; ``threads.over_rows``
runs ranges side by side. No result depends on the number of threads. Arrays that belong together come in one
named tuple. The package's cache folder, or the user's, keeps the machine code, so that only a first run
compiles; where neither can be written to, every run does.
"""

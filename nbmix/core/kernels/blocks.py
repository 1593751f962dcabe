"""How much work compiled loops take at a time.

None of it changes a result by more than rounding: where blocks have sums of their own, their size decides in
which order numbers are added.
"""

from __future__ import annotations

LANES = 8  # float64 in the widest vector register: nodes are padded to a multiple

LINE = 16  # float32 in a cache line: rows of tables that begin at one are read a fifth faster

UNROLLED = 16  # components that a loop over them takes at a time; what is left over is taken one by one

# what a thread takes before it asks for more

GENES_AT_ONCE = 512  # of tables over nodes and pairs, and of sums into them

PAIRS_AT_ONCE = 4096  # rows of a batch's table

CELLS_AT_ONCE = 64  # of the mixture with shared axes

MINIBATCH_GENES = 2048  # at least, in a step on a minibatch: each has sums of its own over the cells

MINIBATCH_TERMS = 500_000  # at least: logarithms of some ms, for which a thread is worth waking

# what stays in the caches of a core

GENES_A_BLOCK = 16  # whose nodes go through one vectorised logarithm, all components together

VALUES_A_BLOCK = 256  # genes or nonzeros of a minibatch, whose buffers stay in the first level cache

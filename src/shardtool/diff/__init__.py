"""Do two checkpoints hold the same tensors? Across formats, layouts and names, and with a name for what differs.

    sides           what each checkpoint says it is and has, brought to a common set of rules
    compare         missing, extra, shape, dtype, values
    prints          fingerprints of components: one pass over the data tells which axis was permuted, and how
    permutations    what people call a permutation
    variants        the tensor of a rule in the layouts of tools that get it wrong
    relations       values element by element: scaled, off by one, rounded
    diagnose        these together: what happened to a rule
    report          findings

No torch: numpy is enough.
"""

from shardtool.diff.compare import diff
from shardtool.diff.report import DiffReport, Finding

__all__ = ["DiffReport", "Finding", "diff"]

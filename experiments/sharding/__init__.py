"""The cost of a sharding layout: the collectives of the compiled train step, and its memory, FLOPs and time.

`python -m experiments.sharding` writes the records of all layouts; in a notebook `study()` returns them.
"""

from experiments.sharding.collectives import Collective, collectives
from experiments.sharding.harness import measure, study
from experiments.sharding.layouts import LAYOUTS, Layout, Rule
from experiments.sharding.report import layer_table, markdown, plot, table
from experiments.sharding.theory import expected

__all__ = [
    "LAYOUTS",
    "Collective",
    "Layout",
    "Rule",
    "collectives",
    "expected",
    "layer_table",
    "markdown",
    "measure",
    "plot",
    "study",
    "table",
]

"""One declaration a primitive: how its axes relate. Tracing, narrowing, gating and costing all follow from it.

A new primitive is one line in the file of its family (or a `register` call from outside) and one row in
`tests/test_rules.py`. A primitive without a rule pins every axis it touches.
"""

from treesurgeon.engine.rules import contract, elementwise, index, reduce, shape
from treesurgeon.engine.rules.base import Contraction, Mix, Rule, Site, lookup, register

__all__ = [
    "Contraction",
    "Mix",
    "Rule",
    "Site",
    "contract",
    "elementwise",
    "index",
    "lookup",
    "reduce",
    "register",
    "shape",
]

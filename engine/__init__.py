"""Pruning as JAX function transformations."""

from treesurgeon.engine.cost import Cost, cost
from treesurgeon.engine.coupling import trace
from treesurgeon.engine.errors import ArtifactError, NarrowError, PlanError, StructureError, TreesurgeonError
from treesurgeon.engine.flax import from_linen
from treesurgeon.engine.gating import gate
from treesurgeon.engine.graph import Block, Graph, Group, Leaf, Member, Plan, Tie
from treesurgeon.engine.narrowing import cut, narrow

__all__ = [
    "ArtifactError",
    "Block",
    "Cost",
    "Graph",
    "Group",
    "Leaf",
    "Member",
    "NarrowError",
    "Plan",
    "PlanError",
    "StructureError",
    "Tie",
    "TreesurgeonError",
    "cost",
    "cut",
    "from_linen",
    "gate",
    "narrow",
    "trace",
]

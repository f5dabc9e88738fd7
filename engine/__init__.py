"""Pruning as JAX function transformations."""

from treesurgeon.engine.checkpoint import Model, ModelSpec, load, save
from treesurgeon.engine.cost import Cost, cost
from treesurgeon.engine.coupling import trace
from treesurgeon.engine.errors import ArtifactError, NarrowError, PlanError, StructureError, TreesurgeonError
from treesurgeon.engine.flax import from_linen, from_nnx
from treesurgeon.engine.gating import gate
from treesurgeon.engine.graph import Block, Graph, Group, Leaf, Member, Plan, Tie
from treesurgeon.engine.importance import CRITERIA, activation_energy, importance
from treesurgeon.engine.narrowing import cut, narrow
from treesurgeon.engine.reconstruction import Reconstruction, fold, reconstruct
from treesurgeon.engine.refit import Refit, refit
from treesurgeon.engine.rules import Rule, register
from treesurgeon.engine.splitting import Split, split

__all__ = [
    "CRITERIA",
    "ArtifactError",
    "Block",
    "Cost",
    "Graph",
    "Group",
    "Leaf",
    "Member",
    "Model",
    "ModelSpec",
    "NarrowError",
    "Plan",
    "PlanError",
    "Reconstruction",
    "Refit",
    "Rule",
    "Split",
    "StructureError",
    "Tie",
    "TreesurgeonError",
    "activation_energy",
    "cost",
    "cut",
    "fold",
    "from_linen",
    "from_nnx",
    "gate",
    "importance",
    "load",
    "narrow",
    "reconstruct",
    "refit",
    "register",
    "save",
    "split",
    "trace",
]

"""Pruning as JAX function transformations."""

from treesurgeon.engine.checkpoint import Model, ModelSpec, load, save
from treesurgeon.engine.cost import Cost, contractions, cost
from treesurgeon.engine.coupling import trace
from treesurgeon.engine.criteria import CRITERIA, residual_energy
from treesurgeon.engine.errors import ArtifactError, NarrowError, PlanError, StructureError, TreesurgeonError
from treesurgeon.engine.flax import from_linen, from_nnx
from treesurgeon.engine.gating import gate
from treesurgeon.engine.graph import Block, Graph, Group, Leaf, Member, Plan, Tie
from treesurgeon.engine.importance import activation_energy, importance, normalise
from treesurgeon.engine.jaxprs import named_leaves, path_name
from treesurgeon.engine.narrowing import cut, narrow
from treesurgeon.engine.readings import fisher_energy, gram_matrices, zero_share
from treesurgeon.engine.reconstruction import Reconstruction, fold, reconstruct
from treesurgeon.engine.refit import MaskedRefit, Refit, refit, refit_masked
from treesurgeon.engine.rules import Rule, register
from treesurgeon.engine.selectivity import (
    activity_maps,
    class_means,
    class_selectivity,
    participation_ratio,
    selectivity_index,
    unit_activity,
)
from treesurgeon.engine.shortened import Shortened
from treesurgeon.engine.splitting import Split, split
from treesurgeon.engine.statistics import momenta, reestimate
from treesurgeon.engine.truncation import (
    Head,
    Truncated,
    dense_stack,
    features,
    find_head,
    gated_features,
    headless,
    levels,
    points,
    truncate,
)

__all__ = [
    "CRITERIA",
    "ArtifactError",
    "Block",
    "Cost",
    "Graph",
    "Group",
    "Head",
    "Leaf",
    "MaskedRefit",
    "Member",
    "Model",
    "ModelSpec",
    "NarrowError",
    "Plan",
    "PlanError",
    "Reconstruction",
    "Refit",
    "Rule",
    "Shortened",
    "Split",
    "StructureError",
    "Tie",
    "TreesurgeonError",
    "Truncated",
    "activation_energy",
    "activity_maps",
    "class_means",
    "class_selectivity",
    "contractions",
    "cost",
    "cut",
    "dense_stack",
    "features",
    "find_head",
    "fisher_energy",
    "fold",
    "from_linen",
    "from_nnx",
    "gate",
    "gated_features",
    "gram_matrices",
    "headless",
    "importance",
    "levels",
    "load",
    "momenta",
    "named_leaves",
    "narrow",
    "normalise",
    "participation_ratio",
    "path_name",
    "points",
    "reconstruct",
    "reestimate",
    "refit",
    "refit_masked",
    "register",
    "residual_energy",
    "save",
    "selectivity_index",
    "split",
    "trace",
    "truncate",
    "unit_activity",
    "zero_share",
]

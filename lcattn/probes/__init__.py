"""Measurements on models: what they compute in context, and how.

- attention maps and their scores: `attention_maps`, `as_shares`, `prefix_matching`,
  `previous_token`, `duplicate_token`, `copying`, `k_composition`; of an op, `effective_attention`;
- behaviour, of any model: `counterfactual_copy`, `occlusion`, `gradient_shares`, `sensitivity`,
  `by_role`;
- losses: `token_losses`, `in_context_score`, `loss_slope`, `trajectory`, `phase_change`;
- models without some heads: `keep_heads`, `with_patterns`;
- retrieval heads: `retrieval_scores`, `best_heads`, `random_heads`;
- problems for `lcattn.training.train_seeds`: `InductionProblem`; in-context classification is in
  `lcattn.probes.classification`;
- in-context learning as gradient descent: `lcattn.probes.regression`;
- languages of random automata: `lcattn.probes.languages`.
"""

from lcattn.probes.ablation import keep_heads, with_patterns
from lcattn.probes.attention import (
    HeadScores,
    as_shares,
    attention_maps,
    copying,
    duplicate_token,
    k_composition,
    prefix_matching,
    previous_token,
)
from lcattn.probes.behavior import (
    CounterfactualCopy,
    GradientShares,
    Roles,
    by_role,
    counterfactual_copy,
    effective_attention,
    gradient_shares,
    occlusion,
    sensitivity,
)
from lcattn.probes.induction import Attributions, InductionProblem, attributions
from lcattn.probes.losses import (
    in_context_score,
    loss_slope,
    phase_change,
    token_losses,
    trajectory,
)
from lcattn.probes.retrieval_heads import best_heads, random_heads, retrieval_scores

__all__ = [
    "Attributions",
    "CounterfactualCopy",
    "GradientShares",
    "HeadScores",
    "InductionProblem",
    "Roles",
    "as_shares",
    "attention_maps",
    "attributions",
    "best_heads",
    "by_role",
    "copying",
    "counterfactual_copy",
    "duplicate_token",
    "effective_attention",
    "gradient_shares",
    "in_context_score",
    "k_composition",
    "keep_heads",
    "loss_slope",
    "occlusion",
    "phase_change",
    "prefix_matching",
    "previous_token",
    "random_heads",
    "retrieval_scores",
    "sensitivity",
    "token_losses",
    "trajectory",
    "with_patterns",
]

"""The delta rule: DeltaNet, Gated DeltaNet, Kimi Delta Attention, Gated DeltaProduct, GDN-2."""

from fastweights.ops.delta_rule.functional import delta_rule, delta_rule_step

__all__ = ["delta_rule", "delta_rule_step"]

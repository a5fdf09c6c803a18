"""The sampling settings and the acceptance rule that the configuration names."""

from __future__ import annotations

from quasar.config.schema import DecodeConfig
from quasar.decoding.acceptance import AcceptanceRule, Typical, rule_for
from quasar.decoding.block_verification import BlockVerification
from quasar.decoding.sampling import Sampling
from quasar.decoding.synthetic import Synthetic, rates_for


def sampling_of(decode: DecodeConfig) -> Sampling:
    return Sampling(decode.temperature, decode.top_k, decode.top_p, decode.acceptance == "coupled")


def rule_of(decode: DecodeConfig) -> AcceptanceRule:
    """Return the rule of ``decode.acceptance``. A drafter's `rule`, if it has one, takes precedence."""
    sampling = sampling_of(decode)
    if decode.acceptance == "block":
        return BlockVerification(sampling)
    if decode.acceptance == "typical":
        return Typical(sampling, decode.typical_threshold, decode.typical_alpha)
    if decode.acceptance == "synthetic":
        length = decode.synthetic_length
        return Synthetic(sampling, decode.synthetic_rates if length is None else rates_for(length))
    return rule_for(sampling)

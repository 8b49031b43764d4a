from lcattn.testing.conformance.ops import op_checks
from lcattn.testing.conformance.cases import OpCase, MixerCase

"""What a mechanism promises. The conformance suite checks what is promised here."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traits:
    """Declared properties of a token mixer.

    Attributes:
      causal: output t depends on inputs 0..t only (checked by gradient and by perturbation).
      streaming: `extend` obeys the law of streaming (see `lcattn.nn.Mixer`).
      stochastic: the output depends on an rng.
      subquadratic: time and memory of a training step grow slower than T². The suite holds the
        memory to it; time is what benchmarks measure.
    """

    causal: bool
    streaming: bool
    stochastic: bool = False
    subquadratic: bool

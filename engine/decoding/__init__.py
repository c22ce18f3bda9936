"""Drawing image codes: the decoding loop, the sampler, and several codes per step."""

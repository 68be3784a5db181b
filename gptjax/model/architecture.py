"""The resolved shape of a model: what `config.model` means once the vocabulary is known."""

import dataclasses

from ml_collections import ConfigDict

from gptjax import parameters

FLOPS_CONVENTION = "6N + causal attention"


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Static description of a GPT. Hashable, so that it can be part of a compiled program's identity.

    `vocab_size` counts real tokens; the embedding table has `padded_vocab_size` rows and the logits of the
    padding are masked out.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    embed_dim: int
    head_dim: int
    mlp_dim: int
    context_length: int
    vocab_size: int
    padded_vocab_size: int
    norm: str
    norm_epsilon: float
    norm_placement: str
    activation: str
    num_experts: int
    experts_per_token: int
    positions: str
    ngram_order: int
    ngram_rows: int
    rope_theta: float
    rope_scaling: str
    rope_factor: float
    rope_low_freq_factor: float
    rope_high_freq_factor: float
    rope_original_length: int
    qk_norm: bool
    sliding_window: int
    use_bias: bool
    qkv_bias: bool
    tie_embeddings: bool
    logit_softcap: float
    value_embeddings: int
    residual_scalars: bool
    attention_gate: bool
    init_std: float
    init_multipliers: str
    mup_base_width: int
    dropout: float
    lora_rank: int
    lora_alpha: float
    lora_dropout: float
    lora_targets: str
    compute_dtype: str
    matmul: str
    attention: str
    scan_unroll: int
    remat: str

    @classmethod
    def from_config(cls, model: ConfigDict, vocab_size: int) -> "Architecture":
        """Fills in the sizes that `config.model` leaves at 0."""
        values = model.to_dict()
        multiple = values.pop("vocab_multiple")
        vocab_size = model.vocab_size or vocab_size
        default_mlp_dim = 4 * model.embed_dim
        if model.activation == "swiglu":  # three matrices instead of two, at the same number of parameters
            default_mlp_dim = _round_up(8 * model.embed_dim // 3, 64)
        values.update(
            num_kv_heads=model.num_kv_heads or model.num_heads,
            head_dim=model.head_dim or model.embed_dim // model.num_heads,
            mlp_dim=model.mlp_dim or default_mlp_dim,
            vocab_size=vocab_size,
            padded_vocab_size=_round_up(vocab_size, multiple),
            scan_unroll=model.scan_unroll or model.num_layers,
        )
        return cls(**values)

    def deviation(self, path: str) -> float:
        """The standard deviation of the initial values of a parameter, a matrix or a table."""
        factor = parameters.multiplier(self.init_multipliers, path, "model.init_multipliers")
        return parameters.deviation(path, self.init_std, self.num_layers, self.widening) * factor

    @property
    def widening(self) -> float:
        """muP: embed_dim over that of the base model whose learning rates are used (Yang et al. 2022); 1 without."""
        return self.embed_dim / self.mup_base_width if self.mup_base_width else 1.0

    def for_inference(self) -> "Architecture":
        """The same model, with the same parameters, for scoring and writing texts on any device.

        `attention` and `remat` say how a run trains. The attention kernel of training may refuse the packed or short
        rows of inference, or may not exist on the present device.
        """
        return dataclasses.replace(self, attention="auto", remat="none")

    def flops_per_token(self, context_length: int | None = None) -> float:
        """Training FLOPs per token, forward and backward.

        Convention "6N + causal attention": six per parameter of every matrix product, plus 6 x layers x heads x
        head_dim x context for the two attention products. Embedding look-ups and experts that a token does not use are
        left out; the head is counted once. The causal mask halves the square of the attention products; a sliding
        window leaves less of it. Where only adapters are trained, the factor is four instead of six, because the
        gradients of the matrices themselves are not computed; the adapters are not counted.
        """
        context_length = context_length or self.context_length
        window = min(self.sliding_window or context_length, context_length)
        seen = window * (2 - window / context_length)  # twice the mean number of keys that a query sees
        attention = self.embed_dim * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        gates = self.attention_gate * self.num_heads + (self.value_embeddings > 0) * self.num_kv_heads
        attention += self.embed_dim * gates
        mlp = self.embed_dim * self.mlp_dim * (3 if self.activation == "swiglu" else 2)
        if self.num_experts:
            mlp = mlp * self.experts_per_token + self.embed_dim * self.num_experts
        matrices = self.num_layers * (attention + mlp) + self.embed_dim * self.vocab_size
        return (4 if self.lora_rank else 6) * matrices + 6 * self.num_layers * self.num_heads * self.head_dim * seen


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple

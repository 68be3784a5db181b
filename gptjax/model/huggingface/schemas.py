"""What config.json and generation_config.json may hold: types, limits, and the keys that change nothing here."""

from typing import Annotated, Any, ClassVar

import pydantic

from gptjax import foreign

Field = pydantic.Field
Layers = Annotated[int, Field(ge=1, le=10_000)]
Heads = Annotated[int, Field(ge=1, le=10_000)]
Width = Annotated[int, Field(ge=1, le=10_000_000)]
Length = Annotated[int, Field(ge=1, le=100_000_000)]
Vocabulary = Annotated[int, Field(ge=1, le=10_000_000)]
TokenId = Annotated[int, Field(ge=0, lt=10_000_000)]
Epsilon = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, le=1)]

# Keys that do not change what a model computes: origin, storage, training, display, generation (read elsewhere).
_IGNORED = frozenset(
    " ".join(
        (
            "architectures transformers_version torch_dtype dtype use_cache initializer_range _name_or_path",
            "name_or_path attn_implementation _attn_implementation _attn_implementation_autoset output_attentions",
            "output_hidden_states return_dict return_dict_in_generate use_return_dict torchscript use_bfloat16",
            "tf_legacy_loss gradient_checkpointing task_specific_params problem_type id2label label2id num_labels",
            "finetuning_task prefix tokenizer_class pad_token_id sep_token_id decoder_start_token_id",
            "forced_bos_token_id forced_eos_token_id attention_dropout classifier_dropout model_type",
            "chunk_size_feed_forward output_past _commit_hash unsloth_version unsloth_fixed",
            # Defaults of generation that old files keep here; transformers reads them from generation_config.json.
            "do_sample max_length min_length temperature top_k top_p typical_p repetition_penalty length_penalty",
            "num_beams num_beam_groups num_return_sequences no_repeat_ngram_size encoder_no_repeat_ngram_size",
            "diversity_penalty early_stopping bad_words_ids suppress_tokens begin_suppress_tokens",
            "remove_invalid_values output_scores exponential_decay_length_penalty is_decoder",
            "cross_attention_hidden_size max_new_tokens",
        )
    ).split()
)


class ModelConfig(foreign.Schema):
    """The keys of all layouts."""

    IGNORED: ClassVar[frozenset[str]] = _IGNORED
    vocab_size: Vocabulary
    tie_word_embeddings: bool | None = None
    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | list[TokenId] | None = None
    quantization_config: Any = None
    is_encoder_decoder: bool | None = None
    pruned_heads: dict[str, Any] | None = None


class GPT2Config(ModelConfig):
    IGNORED: ClassVar[frozenset[str]] = _IGNORED | frozenset(
        " ".join(
            (
                "n_ctx embd_pdrop resid_pdrop attn_pdrop summary_type summary_use_proj summary_activation",
                "summary_proj_to_labels summary_first_dropout reorder_and_upcast_attn",
            )
        ).split()
    )
    n_layer: Layers
    n_head: Heads
    n_embd: Width
    n_inner: Width | None = None
    n_positions: Length
    layer_norm_epsilon: Epsilon | None = None
    activation_function: str | None = None
    scale_attn_by_inverse_layer_idx: bool | None = None
    scale_attn_weights: bool | None = None
    add_cross_attention: bool | None = None


class Rope(foreign.Schema):
    """`rope_scaling` and `rope_parameters`. Entries of kinds that are refused by name are not checked."""

    rope_type: str | None = None
    type: str | None = None
    factor: Annotated[float, Field(ge=1, le=1e6)] | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    original_max_position_embeddings: Length | None = None
    rope_theta: Annotated[float, Field(ge=1, le=1e15)] | None = None
    partial_rotary_factor: float | None = None


class LlamaConfig(ModelConfig):
    """The keys of Llama, Mistral, Qwen2 and Qwen3."""

    IGNORED: ClassVar[frozenset[str]] = _IGNORED | frozenset({"pretraining_tp", "rope_interleaved", "use_mrope"})
    num_hidden_layers: Layers
    num_attention_heads: Heads
    num_key_value_heads: Heads | None = None
    hidden_size: Width
    head_dim: Annotated[int, Field(ge=1, le=65_536)] | None = None
    intermediate_size: Width
    max_position_embeddings: Length
    rms_norm_eps: Epsilon | None = None
    hidden_act: str | None = None
    rope_theta: Annotated[float, Field(ge=1, le=1e15)] | None = None
    rope_scaling: Rope | None = None
    rope_parameters: Rope | None = None
    original_max_position_embeddings: Length | None = None
    partial_rotary_factor: float | None = None
    sliding_window: Annotated[int, Field(ge=0, le=100_000_000)] | None = None
    use_sliding_window: bool | None = None
    max_window_layers: Annotated[int, Field(ge=0, le=10_000)] | None = None
    layer_types: list[str] | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None


class GenerationConfig(foreign.Schema):
    """generation_config.json, and the same keys of a config.json where there is none."""

    IGNORED: ClassVar[frozenset[str]] = frozenset(
        " ".join(
            (
                "_from_model_config transformers_version pad_token_id decoder_start_token_id max_length",
                "max_new_tokens use_cache output_attentions output_hidden_states output_scores output_logits",
                "return_dict_in_generate cache_implementation max_time disable_compile trust_remote_code",
            )
        ).split()
    )
    eos_token_id: TokenId | list[TokenId] | None = None
    bos_token_id: TokenId | None = None
    do_sample: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1000)] | None = None
    top_k: Annotated[int, Field(ge=0, le=10_000_000)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=1000)] | None = None


class Index(foreign.Schema):
    """model.safetensors.index.json: which file holds a tensor."""

    weight_map: dict[str, Annotated[str, Field(min_length=1, max_length=255)]] = Field(min_length=1)

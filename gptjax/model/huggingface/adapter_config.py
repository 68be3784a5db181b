"""PEFT's adapter_config.json: every field is followed as in PEFT, or has no effect here, or is refused by name."""

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pydantic

from gptjax import foreign
from gptjax.errors import UserError
from gptjax.json_text import show

CONFIG = "adapter_config.json"
Rank = Annotated[int, pydantic.Field(ge=1, le=100_000)]
Alpha = Annotated[float, pydantic.Field(ge=0, le=1e6)]
# Values of `init_lora_weights` that leave the base model unchanged. All others (pissa, olora, loftq, corda, lora_ga,
# mica) change its weights when the adapter is made and when it is loaded.
_HARMLESS = ("gaussian", "orthogonal", "eva")
# Fields that change the computation and are not supported.
_MUST_BE_OFF = " ".join(
    (
        "use_dora lora_bias trainable_token_indices target_parameters layer_replication megatron_config",
        "alora_invocation_tokens use_qalora use_bdlora arrow_config kasa_config monteclora_config velora_config",
        "ensure_weight_tying",
    )
).split()


class AdapterConfig(foreign.Schema):
    """The fields that are read."""

    IGNORED: ClassVar[frozenset[str]] = frozenset(
        " ".join(
            (
                # Who made it, for what, how it was initialised or trained, where it runs.
                "task_type auto_mapping peft_version revision inference_mode loftq_config",
                "eva_config corda_config lora_ga_config megatron_core qalora_group_size runtime_config",
                # Which modules have an adapter, and whether matrices are transposed: the tensors show both.
                "target_modules exclude_modules layers_to_transform layers_pattern fan_in_fan_out",
            )
        ).split()
    ).union(_MUST_BE_OFF)
    peft_type: str | None = None
    base_model_name_or_path: str | None = None
    r: Rank = 8
    lora_alpha: Alpha = 8
    lora_dropout: Annotated[float, pydantic.Field(ge=0, lt=1)] | None = None
    use_rslora: bool | None = None
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Alpha] | None = None
    bias: str | None = None
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str | None = None

    @pydantic.field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        for pattern in value or {}:
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError):
                raise ValueError(f"an object whose names are regular expressions, unlike {show(pattern)}") from None
        return value

    def rank(self, module: str) -> int:
        return _matched(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """alpha / r of a module, or alpha / sqrt(r) (rank-stabilised)."""
        rank = self.rank(module)
        return _matched(self.alpha_pattern, module, self.lora_alpha) / (rank**0.5 if self.use_rslora else rank)


def read(directory: Path) -> AdapterConfig:
    """Raises UserError for adapters other than LoRA, and for fields that are not supported."""
    path = directory / CONFIG
    if not (path.exists() or path.is_symlink()):
        raise UserError(f"{path} is missing; name the directory that PEFT's save_pretrained has written")
    config = foreign.read(AdapterConfig, path)
    extra = config.model_extra or {}
    wrong = [f"{name}={show(extra[name])}" for name in _MUST_BE_OFF if extra.get(name)]
    if config.bias not in (None, "none"):
        wrong.append(f"bias={show(config.bias)}")
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights not in _HARMLESS:
        wrong.append(f"init_lora_weights={show(config.init_lora_weights)} (it changes the weights of the base)")
    wrong += [f"{name}={show(extra[name])}" for name in config.unknown() if extra[name] not in (False, [], {})]
    if config.peft_type != "LORA" or wrong:
        kind = f"peft_type {show(config.peft_type)}" + (" with " if wrong else "") + ", ".join(wrong[:5])
        raise UserError(
            f"{path}: {kind} is not plain LoRA; merge it into its base with PEFT (merge_and_unload, save_pretrained) "
            "and import that"
        )
    return config


def _matched(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name, as PEFT matches."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default

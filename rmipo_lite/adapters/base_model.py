"""The transformers model inside: what an adapter sits on, or what is trained as a whole."""

from peft import PeftMixedModel, PeftModel
from torch import nn
from transformers import PreTrainedModel


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a possible PeftModel.

    Raises:
        TypeError: it is something else; the message names it.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(base, PeftModel):
        raise TypeError(
            "model: a PeftModel inside another one; load the inner adapter into the base model by "
            "model.load_adapter(folder, name), or merge it first"
        )
    if isinstance(base, PeftMixedModel):
        raise TypeError(
            "model: adapters of several kinds at once (PeftMixedModel) are not supported; pass a "
            "PeftModel with one of them"
        )
    if not isinstance(base, PreTrainedModel):
        raise TypeError(
            "model: wanted a name or folder, a transformers PreTrainedModel or a PeftModel, got "
            f"{type(model).__name__}"
        )
    return base

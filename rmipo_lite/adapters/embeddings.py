"""Whether a model's embeddings are still those of the base it was loaded from.

New tokens, and rows that somebody gave a meaning, are nowhere but in this model: an adapter saved
without them is one of another model.
"""

from pathlib import Path
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from rmipo_lite.adapters.base_files import equal, file_name, stored

# Where the model itself remembers it, found out when a run begins.
EMBEDDINGS = "_rmipo_lite_own_embeddings"


def look_at_embeddings(base: PreTrainedModel) -> None:
    """Find out whether an adapter has to be saved with the embeddings."""
    vars(base)[EMBEDDINGS] = _differ(base)


def embeddings_are_own(base: PreTrainedModel) -> bool:
    """Whether an adapter has to be saved with the embeddings."""
    if EMBEDDINGS not in vars(base):
        look_at_embeddings(base)
    return bool(vars(base)[EMBEDDINGS])


def _differ(base: PreTrainedModel) -> bool:
    """Compares with the base model's files; those of a folder that can't be read are others."""
    if not base.name_or_path:
        return False
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    layers = [plain(layer) for layer in ends if layer is not None]
    if len(layers) == 2 and layers[0].weight is layers[1].weight:
        layers = layers[:1]
    return any(_is_other(base, layer) for layer in layers)


def _is_other(base: PreTrainedModel, layer: nn.Module) -> bool:
    there = stored(base, file_name(f"{name_in(base, layer)}.weight"))
    if there is None:
        return Path(str(base.name_or_path)).is_dir()
    return not equal(cast(Tensor, layer.weight), there)


def plain_embedding(base: PreTrainedModel) -> Any:
    """The embedding layer itself, whatever an adapter has put around it."""
    return plain(base.get_input_embeddings())


def plain(layer: Any) -> Any:
    """A layer itself, whatever an adapter has put around it."""
    if isinstance(layer, AuxiliaryTrainingWrapper):
        layer = layer.original_module
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def name_in(base: PreTrainedModel, layer: nn.Module) -> str:
    """The name of a module of the model."""
    return next(name for name, module in base.named_modules() if module is layer)

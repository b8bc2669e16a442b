"""`ReadsPairs`: a transformers Trainer that takes any preference dataset where it wants one."""

from functools import partial
from typing import Any, cast

from torch import nn

from rmipo_lite.adapters.base_model import causal_lm
from rmipo_lite.checkpoints.trainer_mixin import TrainerBeside
from rmipo_lite.config import RMiPOConfig
from rmipo_lite.data.report import DataReport
from rmipo_lite.parallel.once import once_a_machine
from rmipo_lite.tokens.pair import TokenizedPair
from rmipo_lite.tokens.prepare import is_several, is_tokenized, prepare
from rmipo_lite.training.refusals import refuse_other_vocabulary


class ReadsPairs(TrainerBeside):
    """Mixin for `transformers.Trainer`; put it before Trainer in the bases.

    Of several processes on a machine the first reads and tokenises.
    """

    def _tokenized(
        self,
        dataset: Any,
        args: RMiPOConfig,
        model: nn.Module,
        argument: str,
        split: str | None = None,
    ) -> tuple[list[TokenizedPair] | None, DataReport | None]:
        if dataset is None:
            return None, None
        config = causal_lm(model).config
        read = partial(
            prepare, dataset, self._tokenizer, args, config, argument=argument, split=split
        )
        ready = read() if is_tokenized(dataset) else once_a_machine(read)
        refuse_other_vocabulary(ready.pairs, model, self._tokenizer)
        return ready.pairs, ready.report

    def _tokenized_eval(
        self, dataset: Any, args: RMiPOConfig, model: nn.Module, split: str | None
    ) -> Any:
        if is_several(dataset):
            return {
                name: self._tokenized(part, args, model, f"eval_dataset[{name!r}]", split)[0]
                for name, part in dataset.items()
            }
        return self._tokenized(dataset, args, model, "eval_dataset", split)[0]

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Of pairs, or of any preference dataset, as `train_dataset` may be."""
        if not (eval_dataset is None or isinstance(eval_dataset, str)):
            eval_dataset, _ = self._tokenized(eval_dataset, self.args, self.model, "eval_dataset")
        return super().get_eval_dataloader(eval_dataset)  # type: ignore[misc]

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Likewise, for `predict`, whose result has the metrics and no predictions."""
        pairs, _ = self._tokenized(test_dataset, self.args, self.model, "test_dataset")
        return super().get_test_dataloader(cast(Any, pairs))  # type: ignore[misc]

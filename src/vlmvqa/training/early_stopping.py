"""Early stopping: end a training whose evaluation score has stopped improving."""

from __future__ import annotations

from typing import Any

from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from vlmvqa import ranks


class EarlyStopping(EarlyStoppingCallback):
    """transformers' callback, whose count continues in a resumed run."""

    def restore(self, state: TrainerState) -> bool:
        """Take the count of a checkpoint's state, with the patience of this run; return whether the training ended."""
        saved = state.stateful_callbacks.get(type(self).__name__, {"attributes": {}})
        self.early_stopping_patience_counter = saved["attributes"].get("early_stopping_patience_counter", 0)
        return self._has_ended(state)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Replace transformers' warning that the last weights are kept, which docs/training.md explains."""

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **more: Any,
    ) -> None:
        """Count evaluations without a better score; the count is saved with the checkpoint of this step."""
        super().on_evaluate(args, state, control, metrics, **more)
        state.stateful_callbacks[type(self).__name__] = self.state()
        self._has_ended(state)

    def _has_ended(self, state: TrainerState) -> bool:
        ended = self.early_stopping_patience_counter >= self.early_stopping_patience
        if ended:
            ranks.print_on_rank0(
                f"stopped early at step {state.global_step}: no improvement by more than "
                f"{self.early_stopping_threshold:g} in {self.early_stopping_patience_counter} evaluations"
            )
        return ended

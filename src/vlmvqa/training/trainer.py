"""`VqaTrainer`: transformers' Trainer, extended where training a VLM differs.

loss          sum over supervised tokens, divided by their weight in the global batch (counted here, `VLM.forward`
              divides)
data          rows in the order that the training set generates for each epoch, in full steps on every rank
optimizer     a learning rate per part, no weight decay on norms and biases, gradient clipping (`optimizer.py`)
strategies    FSDP2 models arrive sharded, DeepSpeed wraps the model here (`distributed.py`, `zero.py`); the result is
              checked before the first step (`runtime_checks.py`)
evaluation    generates and scores answers; logits are not collected
log           `log.jsonl`, one line per logging step, with throughput and time per phase (`throughput.py`)
checkpoints   the same files under every strategy and number of ranks (`checkpoint_state.py`), ignored until
              complete (`checkpoints.py`)
"""

from __future__ import annotations

import contextlib
import math
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments, set_seed

from vlmvqa import ranks
from vlmvqa.config.schema import DistSettings
from vlmvqa.data.processor import Processor
from vlmvqa.data.train_dataset import TrainDataset
from vlmvqa.errors import InputError
from vlmvqa.models import checkpoint
from vlmvqa.models.interface import Model, Settings
from vlmvqa.training import checkpoint_state, checkpoints, optimizer, runtime_checks
from vlmvqa.training.checkpoint_state import FullState
from vlmvqa.training.interrupt import BATCH_SYSTEM_SIGNALS, StopHandler, blocked_signals
from vlmvqa.training.log import LogFile, replace_progress_callbacks
from vlmvqa.training.throughput import ThroughputMeter

if TYPE_CHECKING:
    from vlmvqa.extras.adapters.peft_adapters import AdapterSettings
    from vlmvqa.training.early_stopping import EarlyStopping


@dataclass(frozen=True)
class TrainerOptions:
    """Settings of `VqaTrainer` in addition to TrainingArguments.

    Attributes:
        dist: the strategy.
        learning_rates: by part (vision, projector, language); None or missing: `args.learning_rate`.
        clip_percentile: see `optimizer.GradientClipping`.
        score: called with the full model at every evaluation; its metrics are logged with the prefix `eval_`.
        settings: the model's settings, to build the copy that is evaluated (`answering_model.py`).
        adapt: settings of the model's adapters, if any.
        compiled: the backend that compiled the model's blocks, if any.
        describe: writes config.json and the tokenizer into a checkpoint's folder; None: they are left out.
        early_stopping: ends the training before its last step, if it is given.
    """

    dist: DistSettings = field(default_factory=DistSettings)
    learning_rates: Mapping[str, float | None] = field(default_factory=dict)
    clip_percentile: int | None = None
    score: Callable[[Model], Mapping[str, float]] | None = None
    settings: Settings | None = None
    adapt: AdapterSettings | None = None
    compiled: str | None = None
    describe: Callable[[Path], None] | None = None
    early_stopping: EarlyStopping | None = None


class VqaTrainer(Trainer):
    """transformers' Trainer for a `Model` and a `TrainDataset`.

    Args:
        model: already sharded under fsdp (`distributed.shard`).
    """

    optimizer: Any
    control: Any

    def __init__(
        self,
        model: Model,
        args: TrainingArguments,
        training_set: TrainDataset,
        processor: Processor,
        options: TrainerOptions | None = None,
    ) -> None:
        self.options = options or TrainerOptions()
        self.vlm, self.folder = model, Path(str(args.output_dir))
        self.dist, self.describe = self.options.dist, self.options.describe
        self.base_fingerprint: str | None = None  # set once the adapters' base model is stored
        self.dtype = next(model.parameters()).dtype
        self.clipping = optimizer.GradientClipping(args.max_grad_norm, self.options.clip_percentile)
        self.stop_handler = StopHandler(self.dist.timeout_minutes)
        self.throughput = ThroughputMeter(model)
        self.step_losses: list[Tensor] = []  # of the micro-batches since the last step
        self.training_set = training_set
        # Checkpoints of a model with adapters contain what trains; its base model is stored elsewhere.
        adapted = self.options.adapt is not None
        self.saved_dtypes = {n: p.dtype for n, p in model.named_parameters() if p.requires_grad or not adapted}
        self.frozen = self._frozen_weights(args)
        # torch.compile compiles a kernel per row length, so few lengths; FlexAttention's blocks have 128 tokens.
        multiple = 128 if self.options.compiled or model.attention == "flex" else 8
        super().__init__(
            model=model,
            args=args,
            data_collator=lambda rows: processor.collate(rows, multiple),
            train_dataset=training_set,
            # `evaluate` has its own questions, but the Trainer only evaluates if it has a dataset.
            eval_dataset=training_set if self.options.score else None,
            callbacks=[LogFile(self.folder / "log.jsonl"), self.stop_handler, self.throughput],
        )
        if self.options.early_stopping is not None:
            self.add_callback(self.options.early_stopping)
        replace_progress_callbacks(self)
        training_set.set_step_rows(self.global_batch)
        # With a limit of 1 the Trainer would delete the newest checkpoint at the end and keep only the best.
        self.save_limit, args.save_total_limit = args.save_total_limit, None
        # Makes the Trainer neither wrap nor move a model that arrives sharded.
        self.is_distributed_loading_by_transformers = self.dist.strategy == "fsdp"

    def _frozen_weights(self, args: TrainingArguments) -> dict[str, Tensor]:
        """Return the frozen weights before DeepSpeed casts them, for saving; as meta tensors except on rank 0."""
        if not (self.dist.is_zero and (args.bf16 or args.fp16)) or self.options.adapt is not None:
            return {}
        device = "cpu" if ranks.is_first() else "meta"
        return {name: p.detach().to(device) for name, p in self.vlm.named_parameters() if not p.requires_grad}

    # ---- before the first step

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Wrap the model, load the checkpoint to resume from, and check the result against the config."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        for group in self.plain_optimizer().param_groups:
            # torchao's learning rate is a tensor, which accelerate moves away from offloaded shards.
            if isinstance(group["lr"], Tensor) and group["params"]:
                group["lr"] = group["lr"].to(group["params"][0].device)
        if self.dist.is_zero:
            from vlmvqa.training import zero

            self.full_state: FullState = zero.prepare(self)
        else:
            self.full_state = FullState(self.vlm, self.plain_optimizer())
        if resume_from_checkpoint is not None:
            from vlmvqa.training import checkpoint_loading

            checkpoint_loading.load(self, Path(resume_from_checkpoint))
        ranks.print_on_rank0(runtime_checks.check(self))
        self.stop_handler.start()
        if resume_from_checkpoint is None:
            torch.manual_seed(self.args.seed + ranks.rank())  # different dropout on each rank
        return prepared

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        arguments = super()._build_accelerator_args(**kwargs)
        for handler in arguments["kwargs_handlers"]:
            handler.gradient_as_bucket_view = True  # otherwise DDP stores every gradient twice
        return arguments

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if self.dist.strategy != "fsdp":  # its shards are in place already, possibly in host memory
            super()._move_model_to_device(model, device)

    def _defer_fsdp_gradient_reduction(self) -> Any:
        """Reduce gradients in every micro-batch: deferring would keep full gradients on every GPU."""
        return contextlib.nullcontext()

    @property
    def engine(self) -> Any:
        """The DeepSpeed engine that wraps the model."""
        return self.model_wrapped

    def plain_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer without accelerate's and DeepSpeed's wrappers."""
        return optimizer.unwrap_optimizer(self.optimizer)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer over `parameter_groups`; the scheduler scales each group's own learning rate."""
        if self.optimizer is None:
            kind, arguments = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind(self.parameter_groups(), **arguments)
            if self._is_8bit():
                from vlmvqa.training import quantized_moments

                quantized_moments.keep_fp32_moments(self.optimizer)
        return self.optimizer

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups (`optimizer.parameter_groups`).

        transformers' Trainer, too, keeps the moments of embeddings in fp32.
        """
        decayed = set(self.get_decay_parameter_names(self.vlm))
        embeddings = optimizer.embedding_weights(self.vlm) if self._is_8bit() else set[str]()
        rates, args = self.options.learning_rates, self.args
        return optimizer.parameter_groups(self.vlm, rates, args.learning_rate, args.weight_decay, decayed, embeddings)

    def _is_8bit(self) -> bool:
        return optimizer.is_8bit(str(getattr(self.args.optim, "value", self.args.optim)))

    # ---- a step

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        """Keep the order of the training set, which is that of its epoch; every rank gets every n-th batch."""
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(rows)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Start the DataLoader's workers with stop signals blocked."""
        with blocked_signals():
            return super().get_batch_samples(*args, **kwargs)

    def _prepare_inputs(self, inputs: dict[str, Tensor | Any]) -> dict[str, Tensor | Any]:
        """Move to the device, and cast under DeepSpeed, except for the loss weights: their sum divides the loss."""
        weights = inputs["weights"].to(self.args.device)
        return {**super()._prepare_inputs(inputs), "weights": weights}

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        """Return the loss's divisor: the weight of all labels of a step, over accumulated batches and ranks."""
        weight = torch.stack([batch["weights"].sum() for batch in batch_samples]).sum().to(device)
        return self.accelerator.gather(weight[None]).sum()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Train on a micro-batch."""
        self.stop_handler.heartbeat(self.state.global_step)
        self.throughput.begin(inputs)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss. If it isn't finite, neither is the gradient norm, which is checked before the step.

        DeepSpeed and the fp16 scaler skip such steps; with them the loss is checked here, which waits for the GPU.
        """
        loss: Any = super().compute_loss(*args, **kwargs)
        if (self.dist.is_zero or self.args.fp16) and not torch.isfinite(loss).all():
            raise self._diverged(f"the loss is {loss.item()}")
        self.step_losses.append(loss.detach())
        self.throughput.backward(loss)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip the gradients by their norm over all ranks; return the norm before clipping."""
        if self.dist.is_zero:  # clipped in the backward pass already
            return torch.tensor(float(self.engine.get_global_grad_norm() or 0.0))
        self.accelerator.unscale_gradients()
        gradients = [p.grad for p in self.vlm.parameters() if p.grad is not None]
        norm = get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        limit = self.clipping.limit(self.finite(norm))
        if limit < float("inf"):
            clip_grads_with_norm_(self.vlm.parameters(), limit, norm.to(gradients[0].device))
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        return self.finite(self._clip_grad_norm(model) if grad_norm is None else grad_norm)

    def finite(self, norm: Any) -> float:
        """Return a gradient norm as a number; stop the run if it isn't finite."""
        norm = float(norm)
        losses, self.step_losses = self.step_losses, []
        if not math.isfinite(norm) and not self.args.fp16:  # the fp16 scaler skips such steps
            bad = [loss for loss in map(float, losses) if not math.isfinite(loss)]
            raise self._diverged(f"the loss is {bad[0]}" if bad else f"the gradient norm is {norm}")
        return norm

    def _diverged(self, problem: str) -> InputError:
        complete = checkpoints.complete_checkpoints(self.folder)
        last = f"the last good checkpoint is {complete[-1]}" if complete else "no checkpoint was written before it"
        return InputError(
            f"{problem} at step {self.state.global_step + 1}, so training stopped before updating the weights; {last}; "
            "lower trainer.learning_rate or trainer.max_grad_norm, or look at the data"
        )

    # ---- evaluation and log

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Generate and score answers, instead of the Trainer's loop over logits."""
        from vlmvqa.training.answering_model import answering_model

        if self.options.score is None:
            raise InputError("the trainer was built without questions to evaluate on")
        with (
            self.stop_handler.paused(),
            self.throughput.paused(),
            blocked_signals(BATCH_SYSTEM_SIGNALS),
            torch.compiler.set_stance("force_eager"),  # answers have other shapes at every step
            answering_model(self) as model,
        ):
            metrics = {f"eval_{name}": value for name, value in self.options.score(model).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the throughput to a training step's record."""
        if "train_runtime" in logs:  # the Trainer's summary, which counts steps before a resume as this run's
            return
        if "loss" in logs:
            logs.update(self.throughput.report())
        super().log(logs, start_time)
        self.throughput.enter("data")

    # ---- checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        try:
            if self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = str(self.folder / f"checkpoint-{self.state.global_step}")
            # Writing may take longer than the step's timeout.
            step = self.state.global_step
            with self.stop_handler.paused(), self.throughput.paused(), checkpoints.writing(self.folder, step) as folder:
                checkpoint_state.save(self, folder)
        except Exception as error:  # tokenizers raises no more specific type
            free = shutil.disk_usage(self.folder).free  # before the incomplete checkpoint is removed
            if "No space left on device" not in str(error) and free > 2**20:
                raise  # torch.save only reports that its writer failed
            checkpoints.remove_incomplete(self.folder)
            complete = checkpoints.complete_checkpoints(self.folder)
            raise InputError(
                f"the disk of {self.folder} is full: checkpoint {self.state.global_step} was not kept"
                f"{f', {complete[-1]} is complete' if complete else ''}; free space and resume with resume=auto"
            ) from error
        if ranks.is_first():
            best = self.state.best_model_checkpoint
            if best is not None and Path(best).exists():
                checkpoints.point(self.folder / checkpoints.BEST, Path(best))
            checkpoints.rotate(self.folder, self.save_limit, best)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Do nothing: `checkpoint_loading.load` loads the weights once the model is wrapped."""

    def _load_best_model(self) -> None:
        from vlmvqa.training import checkpoint_loading

        assert self.state.best_model_checkpoint is not None
        checkpoint_loading.load_weights(self, Path(self.state.best_model_checkpoint) / checkpoint.WEIGHTS)

    @property
    def global_batch(self) -> int:
        """Number of rows per optimizer step, over all ranks."""
        return self.get_total_train_batch_size(self.args)

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, resume: str | None, trial: Any
    ) -> tuple[int, int]:
        """Return the epoch and micro-batch to resume at: after the rows trained on, whatever the batch was then."""
        epoch, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume, trial
        )
        stopping = self.options.early_stopping
        if self.state.global_step >= max_steps or (stopping is not None and stopping.restore(self.state)):
            return num_train_epochs, 0  # the run was finished
        if resume is None:
            return epoch, batches
        from vlmvqa.training import checkpoint_loading

        return checkpoint_loading.position(self, Path(resume), epoch, batches, num_update_steps_per_epoch)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load the rank's random state; with another number of ranks, seed it from seed, step and rank."""
        if checkpoint is None:
            return
        from vlmvqa.training import checkpoint_loading

        if checkpoint_loading.progress(Path(checkpoint))["world_size"] == ranks.world_size():
            super()._load_rng_state(checkpoint)
        else:
            set_seed(random.Random(f"{self.args.seed}-{self.state.global_step}-{ranks.rank()}").randrange(2**32))

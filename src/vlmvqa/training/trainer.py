"""Training is transformers' Trainer; here is only what it does not do.

loss          over supervised tokens, divided by their weight in the whole global batch (counted here, `VLM.forward`
              divides)
data          rows in the order that the training set has drawn for the epoch, in whole steps on every rank
optimizer     a learning rate a part (encoder, projector, language model), no decay on norms and biases; the gradient's
              norm, over all ranks, clipped to a bound and to a percentile of the last ones (`clipping.py`)
strategies    the model arrives sharded under FSDP2, DeepSpeed wraps it here (`parallel.py`); checked before the first
              step (`preflight.py`)
evaluation    answers are generated and scored, logits never leave the model
log           `log.jsonl`, one line a logging step, with the speed and where the time went (`speed.py`)
checkpoints   the same files under every strategy and number of ranks (`state.py`, `whole.py`); only whole ones
              count (`checkpoints.py`)
"""

from __future__ import annotations

import contextlib
import math
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from vlmvqa import ranks
from vlmvqa.config.schema import DistSettings
from vlmvqa.data.processor import Processor
from vlmvqa.data.train_dataset import TrainDataset
from vlmvqa.errors import InputError
from vlmvqa.extras.adapters import peft_adapters
from vlmvqa.extras.adapters.peft_adapters import AdapterSettings
from vlmvqa.models import checkpoint
from vlmvqa.models.checkpoint import Model, Settings
from vlmvqa.models.vlm import PARTS, cast_parameters
from vlmvqa.training import checkpoint_state, checkpoints, runtime_checks
from vlmvqa.training.callbacks import LogFile
from vlmvqa.training.clipping import Clipping
from vlmvqa.training.full_state import Whole, WholeZero
from vlmvqa.training.interrupt import PATIENT, Watch, held_back
from vlmvqa.training.throughput import SpeedMeter, show_speed


class VqaTrainer(Trainer):
    """transformers' Trainer over a `VLM` or `PretrainedVLM` and a `TrainDataset`.

    Args:
        model: under fsdp already sharded (`parallel.shard`).
        dist: the strategy.
        settings: what the model was built from, for a whole copy to evaluate where this one is sharded.
        score: called with a whole model at every evaluation; its numbers are logged with the prefix `eval_`.
        learning_rates: of each part, where it differs from `args.learning_rate` (None: it does not).
        clip_percentile: see `clipping.py`.
        adapt: what adapters the model has, if any.
        describe: writes what a checkpoint needs besides its weights to be loaded as a saved model (None: nothing).
    """

    optimizer: Any
    control: Any

    def __init__(
        self,
        model: Model,
        args: TrainingArguments,
        training_set: TrainDataset,
        processor: Processor,
        learning_rates: Mapping[str, float | None] | None = None,
        score: Callable[[Model], Mapping[str, float]] | None = None,
        dist: DistSettings | None = None,
        settings: Settings | None = None,
        clip_percentile: int | None = None,
        adapt: AdapterSettings | None = None,
        describe: Callable[[Path], None] | None = None,
    ) -> None:
        self.vlm, self.folder = model, Path(str(args.output_dir))
        self.dist, self.settings, self.adapt = dist or DistSettings(), settings, adapt
        self.base: str | None = None  # the fingerprint of what adapters lie over, once it lies somewhere
        self.dtype = next(model.parameters()).dtype
        self.learning_rates = dict(learning_rates or {})
        self.score, self.describe = score, describe
        self.clipping = Clipping(args.max_grad_norm, clip_percentile)
        self.watch = Watch(self.dist.timeout_minutes)
        self.speed = SpeedMeter(model)
        self.training_set = training_set
        # Before DeepSpeed rounds all weights to what is computed in: those that do not train are saved as they were.
        # What checkpoints hold, and in which type: with adapters what trains, its base lies elsewhere.
        self.saved = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad or adapt is None}
        rounds = self.dist.is_zero and (args.bf16 or args.fp16) and adapt is None
        self.frozen = {name: p.detach().cpu() for name, p in model.named_parameters() if rounds and not p.requires_grad}
        if not ranks.is_first():  # rank 0 keeps them, and tells the others
            self.frozen = {name: weight.to("meta") for name, weight in self.frozen.items()}
        # Few lengths where kernels are compiled for each; FlexAttention's blocks have 128 tokens.
        multiple = 128 if args.torch_compile or model.attention == "flex" else 8
        super().__init__(
            model=model,
            args=args,
            data_collator=lambda rows: processor.collate(rows, multiple),
            train_dataset=training_set,
            # `evaluate` brings its own questions, but the Trainer wants to see a data set before it evaluates.
            eval_dataset=training_set if score else None,
            callbacks=[LogFile(self.folder / "log.jsonl"), self.watch, self.speed],
        )
        show_speed(self)
        training_set.pad_to_multiple(self.global_batch)
        # The Trainer would delete the newest checkpoint when training ends and only one is to be kept beside the best.
        self.keep, args.save_total_limit = args.save_total_limit, None
        # For the Trainer, a model that arrives sharded: it neither wraps nor moves it.
        self.is_distributed_loading_by_transformers = self.dist.strategy == "fsdp"

    # ---- before the first step

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Everything in place, loaded where a run resumes, and checked to be what was asked for."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        for group in self.plain_optimizer().param_groups:
            # torchao's rate is a tensor, which accelerate moves away from offloaded shards.
            if isinstance(group["lr"], Tensor) and group["params"]:
                group["lr"] = group["lr"].to(group["params"][0].device)
        if self.dist.is_zero:
            unset_hf_deepspeed_config()  # accelerate has set it again (`parallel.correct_deepspeed`)
            self.whole: Whole = WholeZero(self.vlm, self.engine, self.frozen)
            self._clip_under_deepspeed()
        else:
            self.whole = Whole(self.vlm, self.plain_optimizer())
        if resume_from_checkpoint is not None:
            checkpoint_state.load(self, Path(resume_from_checkpoint))
        ranks.say(runtime_checks.check(self))
        self.watch.start()
        if resume_from_checkpoint is None:
            torch.manual_seed(self.args.seed + ranks.rank())  # each rank drops out its own activations
        return prepared

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        arguments = super()._build_accelerator_args(**kwargs)
        for handler in arguments["kwargs_handlers"]:
            handler.gradient_as_bucket_view = True  # else DDP holds every gradient twice
        return arguments

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if self.dist.strategy != "fsdp":  # its shards are where they belong, which may be host memory
            super()._move_model_to_device(model, device)

    def _defer_fsdp_gradient_reduction(self) -> Any:
        """FSDP2 reduces at every micro-batch: waiting would hold a whole model's gradients on every GPU."""
        return contextlib.nullcontext()

    @property
    def engine(self) -> Any:
        """DeepSpeed's wrapper of the model."""
        return self.model_wrapped

    def plain_optimizer(self) -> torch.optim.Optimizer:
        optimizer: Any = self.optimizer
        while hasattr(optimizer, "optimizer"):  # accelerate's and DeepSpeed's wrappers
            optimizer = optimizer.optimizer
        assert isinstance(optimizer, torch.optim.Optimizer)
        return optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Groups by part and by whether weights decay; the scheduler scales each group's own rate."""
        if self.optimizer is None:
            kind, arguments = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind(self.parameter_groups(), **arguments)
        return self.optimizer

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups: `params`, `lr`, `weight_decay`, and the `name` of the part."""
        decayed = set(self.get_decay_parameter_names(self.vlm))
        groups = []
        for part in PARTS:
            named = [(n, p) for n, p in self.vlm.named_parameters() if self.vlm.part_of(n) == part and p.requires_grad]
            rate = self.learning_rates.get(part)
            rate = self.args.learning_rate if rate is None else rate
            for decays in (True, False):
                params = [p for n, p in named if (n in decayed) == decays]
                decay = self.args.weight_decay if decays else 0.0
                if params:
                    groups.append({"params": params, "lr": rate, "weight_decay": decay, "name": part})
        if not groups:
            raise InputError("nothing trains: every part is set to trainable=none; set one to all")
        return groups

    # ---- a step

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        """The training set is in the order of its epoch already; every rank gets every n-th batch of it."""
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(rows)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        with held_back():  # the DataLoader's workers start in here
            return super().get_batch_samples(*args, **kwargs)

    def _prepare_inputs(self, inputs: dict[str, Tensor | Any]) -> dict[str, Tensor | Any]:
        """On the device; under DeepSpeed in what it computes in, but for the weights, whose sum divides the loss."""
        weights = inputs["weights"].to(self.args.device)
        return {**super()._prepare_inputs(inputs), "weights": weights}

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        """What a step's loss is divided by: the weight of all its labels, over accumulated batches and ranks."""
        weight = torch.stack([batch["weights"].sum() for batch in batch_samples]).sum().to(device)
        return self.accelerator.gather(weight[None]).sum()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        self.watch.beat(self.state.global_step)
        self.speed.begin(inputs)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss: Any = super().compute_loss(*args, **kwargs)
        # Here and not after the backward pass, in which DeepSpeed already takes its step.
        if not torch.isfinite(loss).all():
            raise self._diverged(f"the loss is {loss.item()}")
        self.speed.backward(loss)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip the gradient's norm, taken over all ranks; returns it as it was before."""
        if self.dist.is_zero:  # it has clipped, in the backward pass
            return torch.tensor(float(self.engine.get_global_grad_norm() or 0.0))
        self.accelerator.unscale_gradients()
        gradients = [p.grad for p in self.vlm.parameters() if p.grad is not None]
        norm = get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        limit = self.clipping.limit(self._finite(norm))
        if limit < float("inf"):
            clip_grads_with_norm_(self.vlm.parameters(), limit, norm.to(gradients[0].device))
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        return self._finite(self._clip_grad_norm(model) if grad_norm is None else grad_norm)

    def _clip_under_deepspeed(self) -> None:
        """DeepSpeed knows the norm only inside its step, and asks for the bound once a partition: answer it there."""
        zero, clip = self.engine.optimizer, self.engine.optimizer.unscale_and_clip_grads
        answered: list[int] = []

        def unscale_and_clip_grads(part: Any, total_norm: Any) -> Any:
            if answered != [self.state.global_step]:
                answered[:] = [self.state.global_step]
                limit = self.clipping.limit(self._finite(total_norm / zero.loss_scale))
                zero.clip_grad = 0.0 if limit == float("inf") else limit
            return clip(part, total_norm)

        zero.unscale_and_clip_grads = unscale_and_clip_grads

    def _finite(self, norm: Any) -> float:
        norm = float(norm)
        if not math.isfinite(norm) and not self.args.fp16:  # under fp16 the scaler steps over it
            raise self._diverged(f"the gradient norm is {norm}")
        return norm

    def _diverged(self, what: str) -> InputError:
        kept = checkpoints.whole_checkpoints(self.folder)
        last = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was written before it"
        return InputError(
            f"{what} at step {self.state.global_step + 1}, so training stopped before the weights took it in; {last}; "
            "lower trainer.learning_rate or trainer.max_grad_norm, or look at the data"
        )

    # ---- evaluation and log

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Generate and score answers, instead of the Trainer's loop over logits."""
        if self.score is None:
            raise InputError("the trainer was built without questions to evaluate on")
        with self.watch.paused(), self.speed.paused(), held_back(PATIENT), self._whole_model() as model:
            metrics = {f"eval_{name}": value for name, value in self.score(model).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @contextlib.contextmanager
    def _whole_model(self) -> Iterator[Model]:
        """The model to generate with: where it is sharded a whole copy, so that no rank waits for another's answers.

        Under bf16 the copy is of that type, half as large: it stands beside what trains.
        """
        if self.dist.strategy not in ("fsdp", "zero3") and (self.adapt is not None or not self.dist.is_zero):
            yield self.vlm
            return
        assert self.settings is not None
        copy = checkpoint.blank_like(self.vlm, self.settings)
        if self.adapt is not None:
            peft_adapters.attach(copy, self.adapt)
        copy = cast_parameters(copy, torch.bfloat16 if self.args.bf16 else self.dtype).to(self.args.device)
        parameters = dict(copy.named_parameters())
        with torch.no_grad():
            for name, weight in self.whole.weights():
                parameters.pop(name).copy_(weight)
        assert not parameters, f"the copy has weights that the model has not: {', '.join(parameters)}"
        yield copy.eval()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_runtime" in logs:  # the Trainer's last record: of the steps since a resume, as if they were all
            return
        if "loss" in logs:
            logs.update(self.speed.report())
        super().log(logs, start_time)
        self.speed.enter("data")

    # ---- checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        try:
            if self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = str(self.folder / f"checkpoint-{self.state.global_step}")
            # At the pace of the disk, not of the step.
            step = self.state.global_step
            with self.watch.paused(), self.speed.paused(), checkpoints.writing(self.folder, step) as folder:
                checkpoint_state.write(self, folder)
        except Exception as error:  # tokenizers raises no more specific type than this one
            free = shutil.disk_usage(self.folder).free  # before the unfinished checkpoint's part is given back
            if "No space left on device" not in str(error) and free > 2**20:
                raise  # torch.save says only that its writer failed
            checkpoints.remove_unfinished(self.folder)
            kept = checkpoints.whole_checkpoints(self.folder)
            raise InputError(
                f"the disk of {self.folder} is full: checkpoint {self.state.global_step} was not kept"
                f"{f', {kept[-1]} is whole' if kept else ''}; free space and resume with resume=auto"
            ) from error
        if ranks.is_first():
            best = self.state.best_model_checkpoint
            if best is not None and Path(best).exists():
                checkpoints.point(self.folder / checkpoints.BEST, Path(best))
            checkpoints.rotate(self.folder, self.keep, best)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing yet: weights are loaded once they are where they belong (`state.load`)."""

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        checkpoint_state.put_weights(self, Path(self.state.best_model_checkpoint) / checkpoint_state.WEIGHTS)

    @property
    def global_batch(self) -> int:
        """Rows an optimizer step sees, over all ranks."""
        return self.get_total_train_batch_size(self.args)

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, resume: str | None, trial: Any
    ) -> tuple[int, int]:
        """Where in the data to resume: after as many examples as the run has seen, whatever its batch was then."""
        epoch, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume, trial
        )
        if self.state.global_step >= max_steps:
            return num_train_epochs, 0  # it had finished
        before = checkpoint_state.progress(Path(resume))["global_batch"] if resume else self.global_batch
        if before == self.global_batch:
            return epoch, batches
        rows = len(self.training_set.packing)  # those that fill up the last step of an epoch are not counted
        epoch, steps = divmod(self.state.global_step, math.ceil(rows / before))
        within = math.ceil(min(steps * before, rows) / self.global_batch)
        epoch, within = epoch + within // num_update_steps_per_epoch, within % num_update_steps_per_epoch
        return epoch, within * self.args.gradient_accumulation_steps

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The rank's own random state; with another number of ranks a new one, drawn from seed, step and rank."""
        if checkpoint is None:
            return
        if checkpoint_state.progress(Path(checkpoint))["world_size"] == ranks.world_size():
            super()._load_rng_state(checkpoint)
        else:
            set_seed(random.Random(f"{self.args.seed}-{self.state.global_step}-{ranks.rank()}").randrange(2**32))

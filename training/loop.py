"""The training loop of every method: steps, averages, checkpoints, samples; stops when asked, goes on where it stopped."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm import tqdm

from .base_model import BaseModel
from .checkpoint import load_checkpoint, read_settings_of, save_checkpoint
from .dataset import Example, Order
from .denoising import Weighting, draw, stack_masks, total_loss, training_losses
from .encoding import Latent, TextStates, read_text, stack_texts
from .methods import Method
from .optimizers import make_optimizer
from .record import Record, memory, untimed
from .settings import Settings
from .shared import PersonalizeError
from .stopping import Stop, StoppedError

READ_EVERY = 10  # steps between looks at the loss on an accelerator, which must wait for each look


@dataclass
class Trainer:
    """A training that is ready to run: networks on their device, pictures and captions encoded."""

    accelerator: Accelerator
    base: BaseModel
    method: Method
    settings: Settings
    examples: Sequence[Example]
    latents: dict[Example, Latent]
    texts: dict[str, TextStates]
    """Of every caption, if the text encoders do not train."""
    order: Order
    record: Record
    watch: Callable[[int], None]
    """Called after validation_steps by the main process: measures, draws the curve and samples."""
    stop: Stop = field(default_factory=Stop)
    report: Callable[[int, int], None] = lambda _done, _steps: None
    """Called after each step."""

    def __post_init__(self) -> None:
        training = self.settings.training
        config = self.base.pipeline.scheduler.config
        self.scheduler = DDPMScheduler.from_config(config)
        self.weighting = Weighting.of(self.settings, config.num_train_timesteps)
        groups = self.method.groups
        self.names = [name for group in groups for name in group["names"]]
        self.parameters = [p for group in groups for p in group["params"]]
        plain = [{key: value for key, value in group.items() if key != "names"} for group in groups]
        self.optimizer = make_optimizer(plain, self.settings)
        shape = training.lr_scheduler or "constant"
        rises = shape == "constant" and training.lr_warmup_steps > 0
        self.schedule = get_scheduler(
            "constant_with_warmup" if rises else shape,
            self.optimizer,
            num_warmup_steps=training.lr_warmup_steps,
            num_training_steps=self.steps,
            num_cycles=training.lr_num_cycles,
            power=training.lr_power,
        )
        self.average = EMAModel(self.parameters, decay=training.ema_decay) if training.use_ema else None
        if training.fused_backward:
            self._group_of = {p: group for group in self.optimizer.param_groups for p in group["params"]}
            for parameter in self.parameters:
                parameter.register_post_accumulate_grad_hook(self._step_one)

    def _step_one(self, parameter: Tensor) -> None:
        """Of this weight alone: to let the optimiser pass over all others would take longer than the step itself."""
        groups = self.optimizer.param_groups
        self.optimizer.param_groups = [{**self._group_of[parameter], "params": [parameter]}]
        self.optimizer.step()
        self.optimizer.param_groups = groups
        parameter.grad = None

    @property
    def steps(self) -> int:
        """The optimiser's, in all."""
        training = self.settings.training
        if training.max_train_steps is not None:
            return training.max_train_steps
        return math.ceil(self.order.batches(training.num_train_epochs or 1) / training.gradient_accumulation_steps)

    def loss(self, number: int) -> Tensor:
        """Of this process's part of batch `number`, with gradients."""
        batch, training = self.order(number), self.settings.training
        size, rank = training.train_batch_size, self.accelerator.process_index
        both = range(0, len(batch), self.order.batch)  # the subject's pictures, then the class's
        places = [start + rank * size + i for start in both for i in range(size)]
        examples = [self.examples[batch[place]] for place in places]
        conditioning = self.method.conditioning
        if conditioning is not None:
            with self.accelerator.autocast():
                early = conditioning.early_loss(examples, number, places)
            if early is not None:
                return early
        latents = [self.latents[example] for example in examples]
        timesteps = self.scheduler.config.num_train_timesteps
        drawn = draw(latents, places, training.seed, number, timesteps, self.weighting)
        captions = [
            "" if which < 0 else example.captions[int(which * len(example.captions))]
            for example, which in zip(examples, drawn.captions, strict=True)
        ]
        if conditioning is not None:
            with self.accelerator.autocast():
                spoken = conditioning.tell(examples, number, places)
            captions = [caption if said else "" for caption, said in zip(captions, spoken, strict=True)]
        mask = stack_masks(latents, self.settings.data.masked_loss)
        with self.accelerator.autocast():
            text = self.text(captions)
            losses = training_losses(
                self.base.pipeline.unet,
                self.scheduler,
                drawn,
                text,
                mask,
                self.base.pipeline.vae_scale_factor,
                self.weighting,
            )
            beside = None if conditioning is None else conditioning.loss_beside(examples, number, places)
        total = total_loss(losses, [example.is_prior for example in examples], self.weighting)
        return total if beside is None else total + beside

    def text(self, captions: Sequence[str]) -> TextStates:
        """The captions as the UNet reads them, on its device."""
        if self.method.trains_text:
            spoken = [self.method.spoken(caption) for caption in captions]
            return read_text(self.base, spoken, self.settings.base.clip_skip)
        rows = [self.texts[caption] for caption in captions]
        stacked = stack_texts(rows)
        return stacked.to(self.accelerator.device, stacked.states.dtype)

    def step(self, number: int) -> Tensor:
        """One step of the optimiser; returns the loss, averaged over its batches."""
        training, total = self.settings.training, torch.zeros((), device=self.accelerator.device)
        torch.manual_seed(training.seed * 1_000_003 + number)  # for dropout
        for part in range(training.gradient_accumulation_steps):
            loss = self.loss(number * training.gradient_accumulation_steps + part)
            loss = loss / training.gradient_accumulation_steps
            self.accelerator.backward(loss)
            total += loss.detach()
        if training.fused_backward:
            self.schedule.step()
            if self.average is not None:
                self.average.step(self.parameters)
            return total
        self.share_gradients()
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.unscale_(self.optimizer)
        if training.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.parameters, training.max_grad_norm)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.step(self.optimizer)
            self.accelerator.scaler.update()
        else:
            self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.step(self.parameters)
        return total

    def share_gradients(self) -> None:
        """Average the gradients over all processes; one that a process has none of is zero there."""
        if self.accelerator.num_processes == 1:
            return
        parameters = self.parameters
        has = torch.tensor([float(p.grad is not None) for p in parameters], device=self.accelerator.device)
        parts = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1).float() for p in parameters]
        flat = self.accelerator.reduce(torch.cat([has, *parts]), "mean")
        counts, *parts = flat.split([len(parameters), *(p.numel() for p in parameters)])
        for parameter, count, part in zip(parameters, counts.tolist(), parts, strict=True):
            if count > 0:
                parameter.grad = part.view_as(parameter).to(parameter.dtype)

    def run(self, start: int, shared: dict[str, Any]) -> int:
        """From step `start` to the end, or until asked to stop; returns the steps done.

        Args:
            start: steps that were done before.
            shared: settings that a run which goes on must share.

        Raises:
            PersonalizeError: the loss is no number any more, or the memory is not enough.
        """
        watching, main = self.settings.watching, self.accelerator.is_main_process
        waiting: list[Tensor] = []
        self.stop.training = True
        every, alone = 1 if self.accelerator.device.type == "cpu" else READ_EVERY, self.accelerator.num_processes == 1
        bar = tqdm(
            range(start, self.steps),
            initial=start,
            total=self.steps,
            desc=self.method.name,
            unit=" steps",
            disable=not main,
        )
        done, kept = start, start
        for number in bar:
            try:
                waiting.append(self.step(number))
            except (torch.OutOfMemoryError, RuntimeError) as error:
                raise self.explained(error) from None
            done = number + 1
            last = done == self.steps
            save = done % watching.checkpointing_steps == 0 or last
            look = done % watching.validation_steps == 0 or last
            asked = False
            if len(waiting) >= every or save or look or (self.stop and alone):
                asked = self.read(waiting, done, kept)
                bar.set_postfix(self.record.shown() | {"GB": f"{memory():.1f}"}, refresh=False)
            if save or asked:
                self.save(done, shared, kept)
                kept = done
            if look and not asked:
                with untimed(bar):
                    self.look(done)
                asked = bool(self.stop) and alone and not last
                if asked and not save:
                    self.save(done, shared, kept)
            if asked:
                break
            self.report(done, self.steps)
        bar.close()
        return done

    def look(self, done: int) -> None:
        """Samples and measures; where they fail, the training goes on without."""
        if not self.accelerator.is_main_process:
            return
        try:
            self.watch(done)
        except StoppedError:
            tqdm.write(f"No samples after step {done}: they were stopped.", file=sys.stderr)
        except Exception as error:
            tqdm.write(f"No samples after step {done}: {self.explained(error)}", file=sys.stderr)

    def check_weights(self, done: int, kept: int) -> None:
        """A finite loss can have a gradient that is not; such weights are not kept.

        Raises:
            PersonalizeError: a weight is no number.
        """
        if not torch.stack([p.detach().isfinite().all() for p in self.parameters]).all():
            raise PersonalizeError(self.diverged(f"The weights after step {done} are not finite", kept))

    def diverged(self, what: str, kept: int) -> str:
        """What to do about it."""
        where = f"go on with --resume_from_checkpoint step-{kept:07}" if kept else "start again"
        half = " or use --mixed_precision bf16 or no" if self.settings.training.mixed_precision == "fp16" else ""
        return (
            f"{what}: the training has diverged. Lower --learning_rate (now {self.settings.training.learning_rate:g})"
            f"{half}, and {where}."
        )

    def read(self, waiting: list[Tensor], done: int, kept: int) -> bool:
        """Look at the losses since the last look, and log them; whether any process was asked to stop.

        Raises:
            PersonalizeError: a loss is no number.
        """
        asked = torch.full_like(waiting[0], float(bool(self.stop)))
        *losses, asking = self.accelerator.reduce(torch.stack([*waiting, asked]), "mean").tolist()
        first = done - len(waiting) + 1
        rate = self.schedule.get_last_lr()[0]
        waiting.clear()
        for i, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise PersonalizeError(self.diverged(f"The loss of step {first + i} is {loss}", kept))
            if self.accelerator.is_main_process:
                self.record.add(first + i, {"loss": loss, "lr": rate})
        return asking > 0 or (self.accelerator.num_processes == 1 and bool(self.stop))

    def save(self, done: int, shared: dict[str, Any], kept: int) -> None:
        """Write the checkpoint of step `done`; that of step `kept`, if not 0, is the last.

        Raises:
            PersonalizeError: it cannot be written, or a weight is no number.
        """
        self.check_weights(done, kept)
        if self.accelerator.is_main_process:
            folder = self.settings.folder / "checkpoints"
            try:
                self._save(done, shared, folder)
            except (OSError, RuntimeError) as error:  # torch.save raises the latter
                goes_on = f"it goes on from step {kept}" if kept else "it starts anew"
                raise PersonalizeError(
                    f"The checkpoint of step {done} cannot be written to {folder} "
                    f"({getattr(error, 'strerror', None) or error}): make room there and run the same command again; {goes_on}."
                ) from None
        self.accelerator.wait_for_everyone()

    def _save(self, done: int, shared: dict[str, Any], folder: Path) -> None:
        scaler, average = self.accelerator.scaler, self.average
        save_checkpoint(
            folder,
            done,
            dict(zip(self.names, self.parameters, strict=True)),
            None if average is None else dict(zip(self.names, average.shadow_params, strict=True)),
            {
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "averaged": 0 if average is None else average.optimization_step,
            },
            shared,
            self.settings.watching.checkpoints_total_limit,
        )

    def load(self, checkpoint) -> None:
        """Go on from a checkpoint."""
        average = None if self.average is None else dict(zip(self.names, self.average.shadow_params, strict=True))
        state = load_checkpoint(checkpoint, dict(zip(self.names, self.parameters, strict=True)), average)
        rates = self.schedule.base_lrs
        if read_settings_of(checkpoint)[1].get("optimizer") == self.settings.training.optimizer:
            self.optimizer.load_state_dict(state["optimizer"])
            self._lay_out_moments()
        self.schedule.load_state_dict(state["schedule"] | {"base_lrs": rates})
        for group, rate, shape in zip(self.optimizer.param_groups, rates, self.schedule.lr_lambdas, strict=True):
            group["initial_lr"], group["lr"] = rate, rate * shape(self.schedule.last_epoch)
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.optimization_step = state["averaged"]

    def _lay_out_moments(self) -> None:
        """In memory as the weights, which may have been stored without channels_last: fused AdamW does not look."""
        for parameter, state in self.optimizer.state.items():
            for name, value in state.items():
                if torch.is_tensor(value) and value.shape == parameter.shape and value.stride() != parameter.stride():
                    state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    def explained(self, error: Exception) -> Exception:
        """What to turn on where the memory was not enough; any other error as it is."""
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            return error
        training, data = self.settings.training, self.settings.data
        help_ = [
            ("--gradient_checkpointing", not training.gradient_checkpointing),
            ("--train_batch_size 1 with --gradient_accumulation_steps", training.train_batch_size > 1),
            ("--mixed_precision bf16", training.mixed_precision == "no"),
            ("--optimizer adamw8bit or adafactor", training.optimizer == "adamw"),
            ("--fused_backward", not training.fused_backward and training.gradient_accumulation_steps == 1),
            ("--no-train_text_encoder", bool(training.train_text_encoder)),
            (f"a --resolution below {data.resolution}", True),
        ]
        options = ", ".join(text for text, useful in help_ if useful)
        return PersonalizeError(f"There is not enough memory for a step. These need less: {options}.")

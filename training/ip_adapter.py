"""Train an IP-Adapter that makes one image prompt of several photographs of an identity, by leave-one-out.

    python -m training.ip_adapter --pretrained_model_name_or_path MODEL --image_encoder ENCODER \\
        --ip_adapter ip-adapter_sd15.safetensors --instance_data_dir PEOPLE --output_dir FOLDER

PEOPLE holds a folder for each identity with two or more pictures (`name/name_0001.jpg`). In each step one picture is
predicted from its caption and from a random number of the identity's others. What trains is the self-attention over the
references (--aggregation self-attention), and with --train_adapter the image projection and W'_k, W'_v of every
cross-attention layer (Ye et al. 2023, arXiv:2308.06721), from a published adapter or, without --ip_adapter, from scratch.
"""

import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import tee
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from .adapter_checks import check_width
from .adapter_module import RESAMPLER_DEPTH, TrainableAdapter, build, fresh_adapter
from .base_model import BaseModel
from .conditioning import Conditioning
from .distillation import Distillation
from .encoding import Cache
from .image_encoder import Features, load_image_encoder
from .leave_one_out import Dropout, LeaveOneOut
from .methods import PRECISIONS
from .options import IPAdapter as Options
from .settings import Settings
from .shared import SELF_ATTENTION, About, IPAdapter, PersonalizeError, read_ip_adapter, write_safetensors


class IPAdapterMethod:
    """The adapter that trains, beside a frozen base."""

    name = "ip_adapter"
    trains_text = False
    writes_all = False

    def __init__(self, base: BaseModel, settings: Settings):
        self.base, self.settings = base, settings
        options: Options = settings.method
        for module in (base.pipeline.unet, *base.text_encoders):
            module.requires_grad_(False)
        device = base.pipeline.unet.device
        self.teacher: IPAdapter | None = None
        self.taught: Features | None = None
        torch.manual_seed(settings.training.seed)
        encoder = load_image_encoder(options.image_encoder or "").to(device)
        if options.ip_adapter is None:
            kind = options.adapter_kind or "base"
            width = encoder.config.projection_dim if kind == "base" else encoder.config.hidden_size
            state = fresh_adapter(base.pipeline.unet, kind, width, options.resampler_depth or RESAMPLER_DEPTH)
            state.name = "the new adapter"
            if options.distil_from is not None:
                teacher = read_ip_adapter(Path(options.distil_from).expanduser())
                state["ip_adapter"] = teacher["ip_adapter"]
                self.teacher = IPAdapter.from_state(teacher)
        else:
            state = read_ip_adapter(Path(options.ip_adapter).expanduser())
        started = IPAdapter.from_state(state)
        width = encoder.config.projection_dim if started.variant.pooled else encoder.config.hidden_size
        check_width(started.name, started.variant, width, Path(options.image_encoder or "").name)
        self.adapter = build(
            started,
            options.aggregation,
            options.aggregation_stage,
            options.aggregator_width,
            options.aggregator_heads,
            options.aggregator_depth,
        ).to(device)
        self.adapter.check_fits(base.pipeline.unet, started.name, base.name)
        whole = trains_adapter(options)
        self.adapter.requires_grad_(whole)
        if self.adapter.aggregator is not None:
            self.adapter.aggregator.float().requires_grad_(True)
        named = [(f"adapter.{name}", p) for name, p in self.adapter.named_parameters() if p.requires_grad]
        own = [one for one in named if one[0].startswith("adapter.aggregator.")]
        others = [one for one in named if not one[0].startswith("adapter.aggregator.")]
        rates = [(settings.rate, others), (options.aggregator_lr or settings.rate, own)]
        self.groups = [
            {"params": [p for _, p in some], "lr": rate, "names": [n for n, _ in some]} for rate, some in rates if some
        ]
        self.encoder: CLIPVisionModelWithProjection | None = encoder
        self.features: Features | None = None
        self.conditioning: Conditioning | None = None
        digest = hashlib.sha256()
        for name, value in sorted(self.adapter.tensors().items()):
            digest.update(name.encode() + value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        self.started = digest.hexdigest()[:16]

    def see(self, paths: Iterable[Path], cache: Cache) -> None:
        """Encode pictures with the image encoder, or take their features from the cache."""
        if self.features is None:
            options: Options = self.settings.method
            pooled, crops = self.adapter.variant.pooled, options.reference_crops
            self.features = Features(cache, self.encoder, pooled, crops, (options.smallest_crop, options.largest_crop))
            if self.teacher is not None:
                self.taught = Features(cache, self.encoder, self.teacher.variant.pooled)
        paths, again = tee(paths)  # a progress bar goes on with the first
        self.features.add(self.encoder, paths)
        if self.taught is not None:
            self.taught.add(self.encoder, again)

    def begin(self, sets: Mapping[Path, Sequence[Path]]) -> None:
        """All is seen: the image encoder is let go, and steps can condition on the pictures of each identity."""
        options: Options = self.settings.method
        assert self.features is not None
        self.encoder = None
        text, references, both = options.text_dropout, options.reference_dropout, options.both_dropout
        parts, lesson = self.settings.training.gradient_accumulation_steps, None
        if self.teacher is not None and self.taught is not None:
            lesson = Distillation(self.teacher, self.taught, self.adapter, self.features)
        whole = trains_adapter(options)  # else nothing learns from a step without references
        self.conditioning = LeaveOneOut(
            self.adapter,
            self.base.pipeline.unet,
            self.features,
            sets,
            options.max_references,
            Dropout(text, references, both) if whole else Dropout(text, 0, 0),
            (options.distil_steps * parts, options.warmup_steps * parts),
            self.settings.training.seed,
            {"adapter to start from": self.started, "image encoder": self.features.digest},
            lesson,
            options.warmup_loss_weight,
        )

    def spoken(self, text: str) -> str:
        """Captions are ordinary words."""
        return text

    def write(self, folder: Path, name: str, about: About) -> list[Path]:
        """NAME.safetensors, in the official layout, with `aggregator.*` where one was trained."""
        path, dtype = folder / f"{name}.safetensors", PRECISIONS[self.settings.output.save_precision]
        tensors = {
            name: value.cpu().to(dtype) if value.is_floating_point() else value.cpu()
            for name, value in self.adapter.tensors().items()
        }
        write_safetensors(path, tensors, about.as_metadata())
        check_written(path, tensors, self.adapter)
        return [path]


def trains_adapter(options: Options) -> bool:
    """Whether the projection and W'_k, W'_v train: unless told otherwise, wherever the self-attention is not all that does."""
    if options.train_adapter is not None:
        return options.train_adapter
    return options.ip_adapter is None or options.aggregation != SELF_ATTENTION


def check_written(path: Path, tensors: dict[str, Tensor], adapter: TrainableAdapter) -> None:
    """Read a file back as the nodes read it.

    Raises:
        PersonalizeError: a tensor is not there, or it is read as something else than was trained.
    """
    state = read_ip_adapter(path)
    read = {f"{part}.{name}" for part, inner in state.items() for name in inner}
    found = IPAdapter.from_state(state)
    if read != tensors.keys() or found.variant != adapter.variant or len(found.layers) != len(adapter.to_k_ip):
        raise PersonalizeError(f"{path} was not written as it should be: run the same command again.")


if __name__ == "__main__":
    from .run import main

    sys.exit(main("ip_adapter", __doc__))

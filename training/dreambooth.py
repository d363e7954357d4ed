"""Fine-tune the whole model (DreamBooth): the best likeness, in the largest file.

    python -m training.dreambooth --pretrained_model_name_or_path MODEL --instance_data_dir PICTURES --output_dir FOLDER

The UNet trains, and unless --no-train_text_encoder the text encoders; with --with_prior_preservation also on pictures of
others of the class, so that the class stays what it was (Ruiz et al. 2023, eq. 2). The result is a checkpoint in which
only what trained differs from yours, or its difference from the base.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .base_model import BaseModel, read_checkpoint
from .conditioning import Conditioning
from .export import network_tensors, whole_checkpoint
from .methods import PRECISIONS, groups_of, text_modules
from .options import DreamBooth
from .settings import Settings
from .shared import (
    TEXT_MODELS,
    About,
    PersonalizeError,
    check_budget,
    check_delta,
    check_tensors,
    delta_tensors,
    host_text_tensors,
    host_unet_names,
    overwrite_tensors,
    plural,
    read_header,
    read_safetensors,
    truncated_delta_tensors,
    write_safetensors,
)


class DreamBoothMethod:
    """The UNet, and if wanted the text encoders, as a whole."""

    name = "dreambooth"
    conditioning: Conditioning | None = None

    def __init__(self, base: BaseModel, settings: Settings):
        self.base, self.settings = base, settings
        unet = base.pipeline.unet
        self.text = text_modules(base) if settings.training.train_text_encoder else []
        for encoder in base.text_encoders:
            encoder.requires_grad_(False)
        modules = [("unet", unet), *self.text]
        for _, module in modules:
            module.requires_grad_(True).to(torch.float32)
        options: DreamBooth = settings.method
        self.before = {name: _copy(module) for name, module in modules} if options.save_as != "full" else {}
        if self.before and options.delta_megabytes is not None:
            shapes = (parameter.shape for _, module in modules for parameter in module.parameters())
            check_budget(shapes, int(options.delta_megabytes * 1e6))
        self.trains_text, self.groups = bool(self.text), groups_of(base, self.text, settings)
        self.writes_all = base.file is None and options.save_as != "delta"
        self.check_names()

    def check_names(self) -> None:
        """Raises PersonalizeError where the base's file has no place for what trains."""
        source = self.base.file
        if source is None or source.suffix != ".safetensors":
            return
        known, _, _ = read_header(source)
        missing = [name for name in trained_tensors(self.base, self.text) if name not in known]
        if missing:
            advice = "" if missing[0].startswith("model.") else ", or use --no-train_text_encoder"
            raise PersonalizeError(
                f"{source.name} has no {missing[0]} ({plural(len(missing), 'such name')}), which would train: take a "
                f"checkpoint in "
                f"the usual layout{advice}."
            )

    def spoken(self, text: str) -> str:
        """The trigger is an ordinary word."""
        return text

    def write(self, folder: Path, name: str, about: About) -> list[Path]:
        """NAME.safetensors, NAME.delta.safetensors, or both."""
        options: DreamBooth = self.settings.method
        paths = []
        if options.save_as != "delta":
            paths.append(self._write_full(folder / f"{name}.safetensors", about))
        if options.save_as != "full":
            paths.append(self._write_delta(folder / f"{name}.delta.safetensors", about))
        return paths

    def _write_full(self, path: Path, about: About) -> Path:
        source, trained = self.base.file, trained_tensors(self.base, self.text)
        if source is not None and source.suffix == ".safetensors":
            overwrite_tensors(source, path, trained, about.as_metadata())
        else:
            dtype = PRECISIONS[self.settings.output.save_precision]
            tensors = read_checkpoint(source) if source is not None else whole_checkpoint(self.base)
            tensors |= trained
            write_safetensors(path, {k: _saved(v, dtype) for k, v in tensors.items()}, about.as_metadata())
        check_tensors(path, trained)
        return path

    def _write_delta(self, path: Path, about: About) -> Path:
        networks = {"unet": self.base.pipeline.unet, **dict(self.text)}
        changes = host_changes(
            self.base, {k: difference(net.state_dict(), self.before[k]) for k, net in networks.items()}
        )
        megabytes = self.settings.method.delta_megabytes
        if megabytes is None:
            tensors = delta_tensors(changes)
        else:
            tensors, kept = truncated_delta_tensors(changes, int(megabytes * 1e6), progress=_bar)
        write_safetensors(path, tensors, about.as_metadata())
        shapes = {name: tuple(change.shape) for name, change in changes.items()}
        check_delta(read_safetensors(path)[0], shapes, path.name)
        if megabytes is not None:
            print(f"{path.name} has {path.stat().st_size / 1e6:.1f} MB and {kept:.1%} of the change's squared length.")
        return path


def trained_tensors(base: BaseModel, text: Sequence[tuple[str, torch.nn.Module]]) -> dict[str, Tensor]:
    """The UNet's and some text encoders' weights under their single-file names."""
    return network_tensors(base.pipeline.unet, [encoder for _, encoder in text], base.layout)


def host_changes(base: BaseModel, changes: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """W - W0 under ComfyUI's names, of the networks "unet", "text_encoder" and "text_encoder_2" where they changed."""
    names = host_unet_names(base.unet_names())
    found = {names[name]: value for name, value in changes["unet"].items()}
    for text_model, (name, _) in zip(TEXT_MODELS[base.layout], text_modules(base), strict=False):
        if name in changes:
            found |= host_text_tensors(changes[name], text_model)
    return found


def _saved(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.detach().cpu().to(dtype if value.is_floating_point() else value.dtype)


def _copy(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}


def difference(after: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """W - W0 of a network's weights in fp32, on the CPU.

    Args:
        after, before: its tensors; `before` on the CPU.
    """
    return {k: v.detach().cpu().float() - before[k].float() for k, v in after.items() if v.is_floating_point()}


def _bar(names):
    return tqdm(names, desc="Singular values", unit=" matrices")


if __name__ == "__main__":
    from .run import main

    sys.exit(main("dreambooth", __doc__))

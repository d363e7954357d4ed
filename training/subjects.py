"""The pictures that fine-tuning learns from: of the subject or of several concepts, and of their classes."""

from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator

from .base_model import BaseModel
from .class_images import draw_class_images
from .concepts import concepts_of
from .dataset import Example, Sizes, fill_in, find_examples, find_priors
from .methods import templates_of
from .options import CustomDiffusion
from .settings import Settings
from .sizes import sized


def find_pictures(
    settings: Settings, sizes: Sizes, accelerator: Accelerator, base: BaseModel
) -> tuple[list[Example], list[Example]]:
    """Pictures of the subject and of its class, which are drawn if need be, and those that are kept out."""
    data, templates, seed = settings.data, templates_of(settings), settings.training.seed
    examples, priors = list[Example](), dict[Path, list[Example]]()
    for concept in concepts_of(settings):
        own = concept.of(data)
        examples += (mine := find_examples(Path(own.instance_data_dir or "").expanduser(), own, sizes, templates))
        folder = Path(own.class_data_dir or "").expanduser()
        if data.with_prior_preservation and folder not in priors:
            prompt = fill_in(data.class_prompt, own.trigger, own.class_name)
            drawn = draw_class_images(accelerator, base, folder, prompt, data.num_class_images, sizes.resolution, seed)
            if drawn:
                accelerator.print(f"{drawn} pictures of the class drawn into {folder}.")
            priors[folder] = find_priors(folder, own, [example.size for example in mine])
    if isinstance(settings.method, CustomDiffusion):
        examples = sized(examples, settings.method.size_variants, seed)
    examples += [example for some in priors.values() for example in some]
    if not data.validation_data_dir:
        return examples, []
    plain = replace(data, repeats=1, random_flip=False)
    return examples, find_examples(Path(data.validation_data_dir).expanduser(), plain, sizes, templates)

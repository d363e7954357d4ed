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
from .shared import plural
from .side_by_side import side_by_side
from .sizes import sized
from .stopping import Stop


def find_pictures(
    settings: Settings, sizes: Sizes, accelerator: Accelerator, base: BaseModel, stop: Stop
) -> tuple[list[Example], list[Example]]:
    """Pictures of the subject and of its class, which are drawn if need be, and those that are kept out."""
    data, templates, seed = settings.data, templates_of(settings), settings.training.seed
    concepts, pictures = concepts_of(settings), list[list[Example]]()
    sizes_of: dict[str | None, list[tuple[int, int]]] = {}
    for concept in concepts:
        own = concept.of(data)
        mine = find_examples(Path(own.instance_data_dir or "").expanduser(), own, sizes, templates)
        pictures.append(mine)
        sizes_of.setdefault(concept.class_folder, []).extend(example.size for example in mine)
    priors = list[Example]()
    for place, wanted in sizes_of.items() if data.with_prior_preservation else ():
        own = next(concept for concept in concepts if concept.class_folder == place).of(data)
        folder = Path(place or "").expanduser()
        prompt = fill_in(data.class_prompt, own.trigger, own.class_name)
        drawn = draw_class_images(
            accelerator, base, folder, prompt, data.num_class_images, sizes.resolution, seed, stop
        )
        if drawn:
            accelerator.print(f"{plural(drawn, 'picture')} of the class drawn into {folder}.")
        priors += find_priors(folder, own, wanted)
    examples = [example for mine in pictures for example in mine]
    if isinstance(settings.method, CustomDiffusion):
        examples = sized(examples, settings.method.size_variants or 0, seed)
        examples += side_by_side(pictures, settings.method.cut_mix or 0, sizes, seed)
    examples += priors
    if not data.validation_data_dir:
        return examples, []
    plain = replace(data, repeats=1, random_flip=False)
    return examples, find_examples(Path(data.validation_data_dir).expanduser(), plain, sizes, templates)

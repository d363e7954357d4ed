"""The demo's pictures in a real ComfyUI, by the nodes that a user would wire."""

import shutil
import tempfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from ..pocket.files import CHECKPOINT, IMAGE_ENCODER
from ..pocket.shipped import GUIDANCE, SIZE, STEPS
from ..shared import BEFORE_PROJECTION, IMAGE_SCALE, SELF_ATTENTION, list_pictures
from .methods import ADAPTER, BOX, PLAIN, PROMPTS, Made, prompt_of
from .server import Server

SEED = 7
SAMPLERS = "KSampler", "SamplerCustomAdvanced"


class Graph:
    """A workflow in the API's format."""

    def __init__(self) -> None:
        self.nodes: dict[str, dict[str, Any]] = {}

    def add(self, kind: str, **inputs: Any) -> str:
        """A node; its number, which inputs of others name as [number, output]."""
        number = str(len(self.nodes) + 1)
        self.nodes[number] = {"class_type": kind, "inputs": inputs}
        return number


def graph_of(rows: Sequence[Made], photos: Path, count: int) -> tuple[Graph, list[list[str]]]:
    """The workflow, and of each row and prompt the node that saves so many pictures, from the same noise for all rows."""
    graph = Graph()
    base = graph.add("CheckpointLoaderSimple", ckpt_name=Path(CHECKPOINT).name)
    empty = graph.add("CLIPTextEncode", clip=[base, 1], text="")
    latent = graph.add("EmptyLatentImage", width=SIZE, height=SIZE, batch_size=count)
    saved = []
    for row in rows:
        model, clip, vae, negative = [base, 0], [base, 1], [base, 2], [empty, 0]
        if row.method == "ip_adapter":
            encoder = graph.add("PersonalizeLoadImageEncoder", file=Path(IMAGE_ENCODER).name)
            adapter = graph.add("PersonalizeLoadIPAdapter", file=ADAPTER.name)
            given = {"clip_vision": [encoder, 0], "folder": str(photos), "weights": "", "framing": "crop"}
            references = graph.add("PersonalizeEncodeReferences", **given)
            how = {"weight": 1.0, "aggregation": SELF_ATTENTION, "start_percent": 0.0, "end_percent": 1.0}
            how |= {"pooling": BEFORE_PROJECTION, "layers": "all", "layer_list": ""}
            wires = {"model": model, "ip_adapter": [adapter, 0], "references": [references, 0]}
            model = [graph.add("PersonalizeApplyIPAdapter", **wires, **how), 0]
        elif row.method == "subject_diffusion":
            encoder = graph.add("PersonalizeLoadImageEncoder", file=Path(IMAGE_ENCODER).name)
            file = graph.add("PersonalizeLoadSubjectDiffusion", file=row.files[0].name)
            box = dict(
                zip(("left", "top", "width", "height"), (*BOX[:2], BOX[2] - BOX[0], BOX[3] - BOX[1]), strict=True)
            )
            photo = str(list_pictures(photos)[0])
            subject = graph.add("PersonalizeSubject", word=row.subject, file=photo, **box)
            wires = {"model": model, "clip": clip, "clip_vision": [encoder, 0], "subject_diffusion": [file, 0]}
            told = wires | {"subjects": [subject, 0], "negative_prompt": ""}
        elif row.title != PLAIN:
            own = {} if row.method == "dreambooth" else {"model": model, "clip": clip, "vae": vae}
            file = f"{row.kind}/{row.files[0].name}"
            loader = graph.add("PersonalizeLoadPersonalization", file=file, strength=1.0, **own)
            model, clip, vae = [loader, 0], [loader, 1], [loader, 2]
            negative = [graph.add("CLIPTextEncode", clip=clip, text=""), 0]
        nodes = []
        for number, wishes in enumerate(PROMPTS):
            text = prompt_of(wishes, row.subject)
            if row.method == "subject_diffusion":
                applied = graph.add("PersonalizeApplySubjectDiffusion", prompt=text, **told)
                samples = _guided(graph, applied, [latent, 0], SEED + number)
            else:
                positive = graph.add("CLIPTextEncode", clip=clip, text=text)
                sampling = {"seed": SEED + number, "steps": STEPS, "cfg": GUIDANCE, "sampler_name": "euler"}
                wires = {"model": model, "positive": [positive, 0], "negative": negative, "latent_image": [latent, 0]}
                samples = graph.add("KSampler", scheduler="normal", denoise=1.0, **sampling, **wires)
            decoded = graph.add("VAEDecode", samples=[samples, 0], vae=vae)
            nodes.append(
                graph.add("SaveImage", images=[decoded, 0], filename_prefix=f"demo/{row.method or PLAIN}_{number}")
            )
        saved.append(nodes)
    return graph, saved


def _guided(graph: Graph, applied: str, latent: list[Any], seed: int) -> str:
    """The node that samples what *Apply Subject-Diffusion* gives, as KSampler does the others."""
    scales = {"text_cfg": GUIDANCE, "subject_cfg": IMAGE_SCALE}
    wires = {"model": [applied, 0], "positive": [applied, 1], "negative": [applied, 2], "subjects_only": [applied, 3]}
    parts = {
        "guider": graph.add("PersonalizeSubjectGuider", **wires, **scales),
        "noise": graph.add("RandomNoise", noise_seed=seed),
        "sampler": graph.add("KSamplerSelect", sampler_name="euler"),
        "sigmas": graph.add("BasicScheduler", model=[applied, 0], scheduler="normal", steps=STEPS, denoise=1.0),
    }
    return graph.add(SAMPLERS[1], latent_image=latent, **{name: [node, 0] for name, node in parts.items()})


def in_comfyui(comfyui: Path, rows: Sequence[Made], photos: Path, count: int) -> list[list[list[Image.Image]]]:
    """Of each row and prompt its pictures.

    Raises:
        RuntimeError: the server does not start, or a node fails.
    """
    with tempfile.TemporaryDirectory(prefix="personalize-") as base:
        for row in rows:
            for i, file in enumerate(() if row.shipped else row.files):
                target = Path(base) / "models" / (row.kind if i == 0 else "embeddings")
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target)
        graph, saved = graph_of(rows, photos, count)
        samplers = {number for number, node in graph.nodes.items() if node["class_type"] in SAMPLERS}
        with (
            Server(comfyui, Path(base)) as server,
            tqdm(desc="Sampling in ComfyUI", total=len(samplers) * STEPS) as bar,
        ):
            done = dict.fromkeys(samplers, 0)

            def advance(node: str, step: int, _total: int) -> None:  # the host leaves out steps that follow fast
                if node in done:
                    done[node] = step
                    bar.update(sum(done.values()) - bar.n)

            outputs = server.run(graph.nodes, advance)
            bar.update(bar.total - bar.n)
            return [
                [[Image.open(BytesIO(server.picture(one))) for one in outputs[node]["images"]] for node in nodes]
                for nodes in saved
            ]

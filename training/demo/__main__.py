"""The pack's main job on a folder of photographs: references in, pictures out, one contact sheet.

Runs a shipped workflow in the ComfyUI of this machine, or the same computation through diffusers where there is none.
"""

import argparse
import json
import sys
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from ..shared import PersonalizeError, list_pictures
from .find import ROOT, comfyui_version, find_comfyui
from .server import Server
from .sheet import contact_sheet
from .workflow import to_prompt

WORKFLOW = ROOT / "workflows" / "ip_adapter_compare_aggregations.json"


def in_comfyui(comfyui: Path, photos: Path, workflow: dict[str, Any]) -> list[tuple[str, Image.Image]]:
    """Results of the workflow in a real server, labelled."""
    with tempfile.TemporaryDirectory(prefix="personalize-") as base, Server(comfyui, Path(base)) as server:
        prompt = to_prompt(workflow, server.get("/object_info"))
        for node in prompt.values():
            if node["class_type"] == "PersonalizeEncodeReferences":
                node["inputs"]["folder"] = str(photos)
        steps = {key: node["inputs"]["steps"] for key, node in prompt.items() if "steps" in node["inputs"]}
        with tqdm(desc="Sampling in ComfyUI", total=sum(steps.values()), unit=" steps") as bar:
            done = dict.fromkeys(steps, 0)

            def advance(node: str, step: int, _total: int) -> None:  # the host leaves out steps that follow fast
                if node in done:
                    done[node] = step
                    bar.update(sum(done.values()) - bar.n)

            outputs = server.run(prompt, advance)
            bar.update(bar.total - bar.n)
        return split(prompt, Image.open(BytesIO(server.picture(saved(prompt, outputs)))))


def saved(prompt: dict[str, Any], outputs: dict[str, Any]) -> dict[str, str]:
    """The picture of the workflow's SaveImage node."""
    node = next(key for key, node in prompt.items() if node["class_type"] == "SaveImage")
    return outputs[node]["images"][0]


def split(prompt: dict[str, Any], stitched: Image.Image) -> list[tuple[str, Image.Image]]:
    """The workflow's result is its pictures side by side, in the order of its Apply IP-Adapter nodes."""
    labels = [
        f"{node['inputs']['aggregation']}, weight {node['inputs']['weight']:g}"
        for _, node in sorted(prompt.items(), key=lambda item: int(item[0]))
        if node["class_type"] == "PersonalizeApplyIPAdapter"
    ]
    enlarged = next(n["inputs"]["scale_by"] for n in prompt.values() if n["class_type"] == "ImageScaleBy")
    gap = round(
        enlarged * next(n["inputs"]["spacing_width"] for n in prompt.values() if n["class_type"] == "ImageStitch")
    )
    width = (stitched.width + gap) // len(labels) - gap
    lefts = [i * (width + gap) for i in range(len(labels))]
    parts = [stitched.crop((left, 0, left + width, stitched.height)) for left in lefts]
    return list(zip(labels, parts, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m training.demo", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--photos", type=Path, default=ROOT / "workflows" / "example_photos", help="a folder of pictures"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "demo-output", help="where the contact sheet goes")
    options = parser.parse_args()
    photos = options.photos.expanduser().resolve()
    try:
        references = list_pictures(photos)
        options.output.mkdir(parents=True, exist_ok=True)
        print(f"{len(references)} photographs in {photos}")
        comfyui, workflow = find_comfyui(), json.loads(WORKFLOW.read_text())
        text = next(node["widgets_values"][0] for node in workflow["nodes"] if node.get("title") == "Prompt")
        if comfyui is not None:
            where = f"ComfyUI {comfyui_version(comfyui)}, workflow {WORKFLOW.name}"
            results = in_comfyui(comfyui, photos, workflow)
        else:
            from .headless import in_diffusers

            where = "headless, through diffusers"
            results = in_diffusers(photos, text)
        sheet = contact_sheet(references, results, f'{where}; pocket portraits, "{text}"')
        path = options.output / "contact_sheet.png"
        sheet.save(path)
    except (PersonalizeError, RuntimeError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"Contact sheet: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

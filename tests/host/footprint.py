"""What the pack costs a host and touches, told as JSON: run by test_footprint.py in a process of its own.

Python's audit events tell of every file that is opened for writing, of every connection and of every process started.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import conftest
from inprocess import BASE, Host, node

HEAVY = {"diffusers", "peft", "accelerate", "timm", "matplotlib", "torch_fidelity", "spacy", "pandas", "scipy.stats"}
WRITES = {
    "os.mkdir": (0,),
    "os.rename": (0, 1),
    "os.remove": (0,),
    "os.rmdir": (0,),
    "os.symlink": (1,),
    "os.link": (1,),
}


class Watch:
    """Writes and connections while it is on."""

    def __init__(self):
        self.on, self.written, self.other = False, set(), []
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        if not self.on:
            return
        if event == "open":
            path, mode, flags = arguments
            if isinstance(path, (str, bytes)) and (set(mode or "r") & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR)):
                self.written.add(os.path.abspath(os.fsdecode(path)))
        elif event in WRITES and not (
            isinstance(arguments[-1], int) and arguments[-1] >= 0
        ):  # in a folder told of before
            paths = [arguments[i] for i in WRITES[event] if isinstance(arguments[i], (str, bytes, os.PathLike))]
            self.written |= {os.path.abspath(os.fsdecode(path)) for path in paths}
        elif event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system"):
            self.other.append(f"{event} {arguments[-1]!r}"[:200])


def main():
    base, photos = Path(sys.argv[1]), sys.argv[2]
    watch, host = Watch(), Host(conftest.COMFYUI, base)
    before = set(sys.modules)
    watch.on = True
    loaded = host.loop.run_until_complete(host.nodes.load_custom_node(str(conftest.ROOT), module_parent="custom_nodes"))
    imported = sorted(HEAVY & (set(sys.modules) - before))
    model, clip, vae = host.nodes.CheckpointLoaderSimple().load_checkpoint(BASE)
    clip_vision = node(host, "LoadImageEncoder")("pocket_portraits_vision.safetensors")[0]
    adapter = node(host, "LoadIPAdapter")("pocket_portraits_ip_adapter.safetensors")[0]
    references, _ = node(host, "EncodeReferences")(clip_vision, folder="example_photos")
    (patched,) = node(host, "ApplyIPAdapter")(model, adapter, references, 1.0)
    node(host, "SaveReferences")(references, "mine")
    words = host.nodes.CLIPTextEncode().encode(clip, "a photo of a woman")[0]
    latent = {"samples": host.nodes.EmptyLatentImage().generate(64, 64, 1)[0]["samples"]}
    drawn = host.nodes.common_ksampler(patched, 1, 1, 4.0, "euler", "normal", words, words, latent)[0]
    picture = vae.decode(drawn["samples"])
    node(host, "ScoreImages")(picture, clip_vision, folder="example_photos", likeness="pocket judge")
    node(host, "TrainLoRA")(
        checkpoint=BASE,
        folder=photos,
        class_name="woman",
        trigger="ohwx",
        name="footprint",
        steps=2,
        learning_rate=0.0,
        resolution=0,
        seed=1,
        rank=4,
        sample_steps=2,
        sample_prompt="a photo of {trigger}",
    )
    watch.on = False
    found = {"loaded": loaded, "imported": imported, "written": sorted(watch.written), "other": watch.other}
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()

"""What Apply IP-Adapter costs a sampling step: against the bare model, and against the pack ComfyUI_IPAdapter_plus.

    python tests/benchmarks/ip_adapter_cost.py [--ipadapter-plus FOLDER] [--family sd15|sdxl] [--device cpu|cuda]

A step is one guided UNet evaluation (a batch of the conditional and the unconditional) of an euler sampler run, on a
structural checkpoint: SD1.5 in its full shapes, SDXL with all its layers at one narrow width. Its weights are random,
which changes no time. Both packs get the same adapter tensors, image features, noise and conditionings, for

- 4 tokens: a base adapter and one reference;
- 128 tokens: a Plus adapter and eight references, concatenated.

Every round samples each variant once, and the order turns from round to round, so that noise of the machine meets all
of them. A ratio is taken within a round; printed are the median of the rounds and (lowest to highest). The bare model
stands twice in a round: how far its ratio to itself is from 1 is what this machine cannot resolve. The time of a
sampling counts whole, with what happens once in it.

The other pack addresses the middle block by a number that ComfyUI does not use, so its middle layers do nothing; our
variant "without middle" does the same work, and its pictures must be the other pack's.
"""

import argparse
import asyncio
import gc
import importlib
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import COMFYUI, ROOT, comfyui_version
from structural import adapters, checkpoints

# name: (kind of adapter, width of its image features, number of references)
CASES = {
    "4 tokens (base adapter, 1 reference)": ("base", 1024, 1),
    "128 tokens (Plus adapter, 8 references concatenated)": ("plus", 1280, 8),
}
WEIGHT = 0.8
OURS, OURS_WITHOUT_MIDDLE, THEIRS = "ours", "ours without middle", "ComfyUI_IPAdapter_plus"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ipadapter-plus", type=Path, metavar="FOLDER", help="a checkout of ComfyUI_IPAdapter_plus")
    parser.add_argument("--family", choices=("sd15", "sdxl"), default="sd15")
    parser.add_argument("--size", type=int, help="side of the latent, an 8th of the picture's: 32 on cpu, 64 on cuda")
    parser.add_argument("--steps", type=int, default=4, help="steps of a sampling (default 4)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    arguments.size = arguments.size or (32 if arguments.device == "cpu" else 64)
    if COMFYUI is None:
        parser.error("no ComfyUI found: set COMFYUI_PATH")
    return arguments


def load_host(base: Path, device: str, packs: list[Path]) -> dict[str, Any]:
    """ComfyUI in this process with packs loaded by its own loader; its node classes by name."""
    sys.path.insert(0, str(COMFYUI))
    import comfy.options

    comfy.options.enable_args_parsing(False)
    from comfy.cli_args import args

    args.cpu, args.base_directory = device == "cpu", str(base)
    # utils.extra_config first: once nodes is imported, comfy/utils.py shadows ComfyUI's own utils
    for name in ("utils.extra_config", "execution"):
        importlib.import_module(name)
    nodes: Any = importlib.import_module("nodes")
    for pack in packs:
        if not asyncio.run(nodes.load_custom_node(str(pack.resolve()), module_parent="custom_nodes")):
            raise SystemExit(f"ComfyUI could not load {pack}")
    return nodes.NODE_CLASS_MAPPINGS


class Bench:
    """One model on one host, and the variants of it."""

    def __init__(self, arguments: argparse.Namespace, base: Path):
        self.steps, self.cuda = arguments.steps, arguments.device == "cuda"
        peer = arguments.ipadapter_plus
        self.nodes = load_host(base, arguments.device, [ROOT] + ([peer] if peer else []))
        self.ours: Any = self.nodes["PersonalizeApplyIPAdapter"]
        self.theirs: Any = self.nodes["IPAdapterEmbeds"]() if peer else None
        self.package = self.ours.__module__.rsplit(".nodes.", 1)[0]
        import comfy.sd

        path = checkpoints.full_checkpoint(arguments.family, base / "structural.ckpt")
        self.model = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False, output_clip=False)[0]
        self.layout, widths = self.pack_module("nodes.attention_patch").unet_layout(self.model)
        self.widths, self.cross = [width for width, _ in widths], widths[0][1]
        self.generator = torch.Generator().manual_seed(0)
        self.latent = torch.zeros(1, 4, arguments.size, arguments.size)
        self.noise = self.random(*self.latent.shape)
        self.conds = [[[self.random(1, 77, self.cross), {"pooled_output": self.random(1, 1280)}]] for _ in range(2)]

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def pack_module(self, name: str) -> Any:
        """A module of our pack, as ComfyUI loaded it."""
        return sys.modules[f"{self.package}.{name}"]

    def variants(self, kind: str, width: int, count: int) -> dict[str, Callable[[], Any]]:
        """Calls of the apply nodes that give a patched model."""
        state = adapters.random_adapter(kind, width, self.cross, self.widths)
        state = {part: {key: value.half() for key, value in inner.items()} for part, inner in state.items()}
        references = self.pack_module("models.references").References(
            pooled=self.random(count, 1024),
            patches=self.random(count, 257, 1280),
            zero_patches=self.random(257, 1280),
            weights=torch.ones(count),
            names=tuple(f"reference {i}" for i in range(count)),
        )
        indices = self.layout.transformer_indices()
        outside = sorted({index for layer, index in indices.items() if layer.block != "middle"})

        def ours(**options: Any) -> Any:
            return self.ours.execute(self.model, state, references, weight=WEIGHT, **options)[0]

        def theirs() -> Any:
            positive, negative = references.patches, references.zero_patches[None]
            if kind == "base":
                positive, negative = references.pooled, torch.zeros(1, width)
            return self.theirs.apply_ipadapter(
                self.model, state, positive, WEIGHT, "linear", 0.0, 1.0, neg_embed=negative, embeds_scaling="V only"
            )[0]

        variants: dict[str, Callable[[], Any]] = {OURS: ours}
        if self.theirs:
            listed = ", ".join(map(str, outside))
            variants |= {OURS_WITHOUT_MIDDLE: lambda: ours(layers="list", layer_list=listed), THEIRS: theirs}
        return variants

    def sample(self, model: Any) -> torch.Tensor:
        import comfy.sample

        positive, negative = self.conds
        arguments = (self.noise, self.steps, 5.0, "euler", "normal", positive, negative, self.latent)
        return comfy.sample.sample(model, *arguments, disable_pbar=True, seed=0).cpu()

    def timed(self, call: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
        gc.collect()
        self.synchronize()
        start = time.perf_counter()
        result = call(*arguments)
        self.synchronize()
        return time.perf_counter() - start, result

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def on_cuda(self, apply: Callable[[], Any]) -> str:
        """What only a GPU can tell of a variant: memory of its node and a sampling, and synchronisations a step."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model = apply()
        self.sample(model)
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.sample(model)
        torch.cuda.set_sync_debug_mode("default")
        count = sum("synchronizing" in str(warning.message) for warning in caught)
        return f"peak {peak:.0f} MiB above what was there, {count / self.steps:.1f} synchronisations a step"


def spread(values: list[float], digits: int = 3) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def measure(bench: Bench, repeats: int) -> None:
    bare, again = "bare model", "bare model, again"
    calls = {(case, name): call for case, of in CASES.items() for name, call in bench.variants(*of).items()}
    bench.sample(bench.model)  # loads the model
    if bench.cuda:
        print(f"{bare}: {bench.on_cuda(lambda: bench.model)}")
        for (case, name), call in calls.items():
            print(f"{case}, {name}: {bench.on_cuda(call)}")
    for call in calls.values():
        call()
    applying: dict[Any, list[float]] = {key: [] for key in calls}
    for _ in range(repeats):
        for key, call in calls.items():
            applying[key].append(bench.timed(call)[0])
    models = {("", bare): bench.model, ("", again): bench.model} | {key: call() for key, call in calls.items()}
    pictures = {key: bench.sample(model) for key, model in models.items()}  # which warms up, too
    stepping: dict[Any, list[float]] = {key: [] for key in models}
    keys = list(models)
    for turn in range(repeats):
        for key in keys[turn % len(keys) :] + keys[: turn % len(keys)]:
            stepping[key].append(bench.timed(bench.sample, models[key])[0] / bench.steps)

    def ratio(a: Any, b: Any) -> str:
        return spread([x / y for x, y in zip(stepping[a], stepping[b], strict=True)])

    print(f"\n{'':24}{'ms a step':28}{'to the bare model':26}ms of the apply node")
    print(f"{bare:24}{spread([1000 * t for t in stepping['', bare]], 0)}")
    print(f"{again:24}{spread([1000 * t for t in stepping['', again]], 0):28}{ratio(('', again), ('', bare))}")
    for case in CASES:
        print(case)
        for name in dict.fromkeys(name for _, name in calls):
            key = case, name
            step = spread([1000 * t for t in stepping[key]], 0)
            apply = spread([1000 * t for t in applying[key]], 0)
            print(f"  {name:22}{step:28}{ratio(key, ('', bare)):26}{apply}")
        if bench.theirs:
            theirs = case, THEIRS
            print(f"  to {THEIRS}: ours {ratio((case, OURS), theirs)}, without middle", end=" ")
            print(ratio((case, OURS_WITHOUT_MIDDLE), theirs))
            difference = relative(pictures[case, OURS_WITHOUT_MIDDLE], pictures[theirs])
            print(
                f"  pictures: without middle against {THEIRS}, largest relative difference {difference:.1e};", end=" "
            )
        effect = relative(pictures[case, OURS], pictures["", bare])
        print(f"{'' if bench.theirs else '  '}the adapter changes them by {effect:.2f}")
    if not bench.theirs:
        print("Not compared with ComfyUI_IPAdapter_plus: give its folder as --ipadapter-plus.")


@torch.inference_mode()
def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments, Path(folder))
        from comfy.ldm.modules.attention import optimized_attention

        where = torch.cuda.get_device_name() if bench.cuda else f"{torch.get_num_threads()} threads of a CPU"
        print(
            f"{arguments.family}, latent {arguments.size}x{arguments.size}, {len(bench.widths)} cross-attention layers, "
            f"{bench.model.model_dtype()} on {where}\nComfyUI {comfyui_version(COMFYUI)} with {optimized_attention.__name__}, "
            f"torch {torch.__version__}; {arguments.repeats} rounds of {arguments.steps} steps; load {os.getloadavg()[0]:.1f}"
        )
        measure(bench, arguments.repeats)
        print(f"load afterwards {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()

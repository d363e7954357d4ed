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
sampling counts whole, with what happens once in it. Finer is "added": the queries, keys and values of all
cross-attention layers of one step are recorded, each variant's attention is replayed on them, and the host's own
attention is taken off.

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

# Before torch: threads that spin while they wait lose whole time slices to any neighbour (5 times slower, measured).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

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
BARE, AGAIN = ("", "bare model"), ("", "bare model, again")
OURS, SAME_WORK, THEIRS = "ours", "ours without middle", "IPAdapter_plus"


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
            variants |= {SAME_WORK: lambda: ours(layers="list", layer_list=listed), THEIRS: theirs}
        return variants

    def sample(self, model: Any, steps: int | None = None) -> torch.Tensor:
        import comfy.sample

        arguments = (self.noise, steps or self.steps, 5.0, "euler", "normal", *self.conds, self.latent)
        return comfy.sample.sample(model, *arguments, disable_pbar=True, seed=0).cpu()

    def record(self) -> list[tuple[Any, ...]]:
        """(layer, q, k, v, options) of every cross-attention layer in one step."""
        from comfy.ldm.modules.attention import optimized_attention

        calls = []

        def recorder(layer: Any) -> Callable[..., torch.Tensor]:
            def attention(q, k, v, options):
                calls.append((tuple(layer), q, k, v, dict(options)))
                return optimized_attention(q, k, v, options["n_heads"])

            return attention

        model = self.model.clone()
        for layer in self.layout.file_order():
            model.set_model_attn2_replace(recorder(layer), layer.block, layer.id, layer.depth)
        self.sample(model, steps=1)
        return calls

    def replacements(self, model: Any) -> dict[Any, Callable[..., torch.Tensor]]:
        """The attention that the UNet of a patched model finds, by layer or block."""
        from comfy.patcher_extension import WrappersMP

        found: dict[Any, Any] = {}

        def look(executor, x, timesteps=None, context=None, y=None, control=None, transformer_options=None, **kwargs):
            found.update((transformer_options or {}).get("patches_replace", {}).get("attn2", {}))
            return executor(x, timesteps, context, y, control, transformer_options, **kwargs)

        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "look", look)
        self.sample(model, steps=1)
        return found

    @staticmethod
    def replay(calls: list[tuple[Any, ...]], replacements: dict[Any, Any]) -> None:
        from comfy.ldm.modules.attention import optimized_attention

        for layer, q, k, v, options in calls:
            attention = replacements.get(layer) or replacements.get(layer[:2])
            if attention is None:
                optimized_attention(q, k, v, options["n_heads"])
            else:
                attention(q, k, v, options)

    def timed(self, call: Callable[..., Any], *arguments: Any) -> float:
        """Milliseconds."""
        gc.collect()
        self.synchronize()
        start = time.perf_counter()
        call(*arguments)
        self.synchronize()
        return 1000 * (time.perf_counter() - start)

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


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def interleaved(
    rounds: int, calls: dict[Any, Callable[[], Any]], timed: Callable[..., float]
) -> dict[Any, list[float]]:
    """Milliseconds of every call in every round; each round begins with another one."""
    times: dict[Any, list[float]] = {key: [] for key in calls}
    keys = list(calls)
    for turn in range(rounds):
        for key in keys[turn % len(keys) :] + keys[: turn % len(keys)]:
            times[key].append(timed(calls[key]))
    return times


def measure(bench: Bench, rounds: int) -> None:
    nodes = {(case, name): call for case, of in CASES.items() for name, call in bench.variants(*of).items()}
    bench.sample(bench.model)  # loads the model
    if bench.cuda:
        for (case, name), call in {BARE: lambda: bench.model, **nodes}.items():
            print(f"{name}, {case}: {bench.on_cuda(call)}")
    models = {BARE: bench.model, AGAIN: bench.model} | {key: call() for key, call in nodes.items()}
    apply_times = interleaved(rounds, nodes, bench.timed)
    pictures = {key: bench.sample(model) for key, model in models.items()}  # which warms up, too
    samplings = {key: lambda model=model: bench.sample(model) for key, model in models.items()}
    times = interleaved(rounds, samplings, bench.timed)
    recorded = bench.record()
    patches = {key: bench.replacements(model) for key, model in models.items()}
    replays = {key: lambda patch=patch: bench.replay(recorded, patch) for key, patch in patches.items()}
    attention = interleaved(6 * rounds, replays, bench.timed)

    def ratio(a: Any, b: Any) -> str:
        return spread([x / y for x, y in zip(times[a], times[b], strict=True)], 3)

    def row(key: Any) -> str:
        added = [x - y for x, y in zip(attention[key], attention[BARE], strict=True)]
        columns = [
            spread([t / bench.steps for t in times[key]], 0),
            "" if key == BARE else ratio(key, BARE),
            f"{statistics.median(attention[key]):.1f}" if key == BARE else f"+{statistics.median(added):.1f}",
            spread(apply_times[key], 0) if key in nodes else "",
        ]
        return f"  {key[1]:20}" + "".join(f"{column:25}" for column in columns)

    titles = "ms a step", "to the bare model", "ms in cross-attention", "ms of the apply node"
    print(f"\n{'':22}" + "".join(f"{title:25}" for title in titles) + f"\n{row(BARE)}\n{row(AGAIN)}")
    for case in CASES:
        print(case, *(row(key) for key in nodes if key[0] == case), sep="\n")
        print(f"  pictures: the adapter changes them by {relative(pictures[case, OURS], pictures[BARE]):.2f}", end="")
        if bench.theirs:
            theirs, same = (case, THEIRS), (case, SAME_WORK)
            print(f"; without middle is {relative(pictures[same], pictures[theirs]):.0e} from {THEIRS}", end="")
            print(
                f"\n  ms a step to {THEIRS}: ours {ratio((case, OURS), theirs)}, without middle {ratio(same, theirs)}",
                end="",
            )
        print()
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

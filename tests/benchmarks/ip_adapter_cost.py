"""What Apply IP-Adapter costs a sampling step: against the bare model, and against the pack ComfyUI_IPAdapter_plus.

    python tests/benchmarks/ip_adapter_cost.py [--ipadapter-plus FOLDER] [--family sd15|sdxl] [--device cpu|cuda]

A step is one guided UNet evaluation (conditional and unconditional in one batch) of an euler sampler run, on a
structural checkpoint: SD1.5 in its full shapes, SDXL with all its layers at one narrow width. The weights are random.
Both packs get the same adapter tensors, image features, noise and conditionings, for 4 and for 128 tokens.

Every round calls each variant once and begins with another one, so that the machine's noise meets all of them. Printed
are the median of the rounds and (lowest to highest); a ratio is taken within a round. The bare model stands twice in a
round: how far it is from itself cannot be resolved. "In cross-attention" is finer: what all attn2 layers of one step
get is recorded, and each variant's attention is replayed on it; "+" is on top of the bare model's.

The other pack addresses the middle block by a number that ComfyUI does not use, so its middle layers do nothing; our
variant "without middle" does the same work, and its pictures must be the other pack's.
"""

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# Before torch: a thread that spins while it waits loses its time slice to any neighbour, and a step takes 5 times longer.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import COMFYUI, ROOT, comfyui_version
from inprocess import Host
from structural import adapters, checkpoints

CASES = {  # name: (kind of adapter, width of its image features, number of references)
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
    parser.add_argument("--steps", type=int, default=3, help="of a sampling (default 3)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    arguments.size = arguments.size or (32 if arguments.device == "cpu" else 64)
    return arguments if COMFYUI else parser.error("no ComfyUI found: set COMFYUI_PATH")


class Bench:
    """One model on one host, and the variants of it."""

    def __init__(self, arguments: argparse.Namespace, base: Path):
        self.steps, self.cuda, peer = arguments.steps, arguments.device == "cuda", arguments.ipadapter_plus
        packs = [ROOT, peer.resolve()] if peer else [ROOT]
        host = Host(COMFYUI, base, *packs, device=arguments.device)
        self.synchronize = torch.cuda.synchronize if self.cuda else (lambda: None)
        self.ours: Any = host.node("PersonalizeApplyIPAdapter")
        self.theirs: Any = host.node("IPAdapterEmbeds")() if peer else None
        self.references = host.module("models.references").References
        import comfy.sd

        path = checkpoints.full_checkpoint(arguments.family, base / "structural.ckpt")
        self.model = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False, output_clip=False)[0]
        self.layout, widths = host.module("nodes.attention_patch").unet_layout(self.model, "IP-Adapter")
        self.widths, self.cross = [width for width, _ in widths], widths[0][1]
        self.random = partial(torch.randn, generator=torch.Generator().manual_seed(0))
        self.latent = torch.zeros(1, 4, arguments.size, arguments.size)
        self.noise = self.random(*self.latent.shape)
        self.conds = [[[self.random(1, 77, self.cross), {"pooled_output": self.random(1, 1280)}]] for _ in range(2)]

    def variants(self, kind: str, width: int, count: int) -> dict[str, Callable[[], Any]]:
        """Calls of the apply nodes that give a patched model."""
        state = adapters.random_adapter(kind, width, self.cross, self.widths)
        state = {part: {key: value.half() for key, value in inner.items()} for part, inner in state.items()}
        pooled, patches, empty = self.random(count, 1024), self.random(count, 257, 1280), self.random(257, 1280)
        references = self.references(pooled, patches, empty, torch.ones(count), ("reference",) * count)
        indices = self.layout.transformer_indices()
        listed = ", ".join(map(str, sorted({index for layer, index in indices.items() if layer.block != "middle"})))

        def ours(**options: Any) -> Any:
            return self.ours.execute(self.model, state, references, weight=WEIGHT, **options)[0]

        def theirs() -> Any:
            features = (pooled, torch.zeros(1, width)) if kind == "base" else (patches, empty[None])
            arguments = (self.model, state, features[0], WEIGHT, "linear", 0.0, 1.0, features[1])
            return self.theirs.apply_ipadapter(*arguments, embeds_scaling="V only")[0]

        both: dict[str, Any] = {OURS: ours, SAME_WORK: partial(ours, layers="list", layer_list=listed), THEIRS: theirs}
        return both if self.theirs else {OURS: ours}

    def sample(self, model: Any, steps: int | None = None) -> torch.Tensor:
        import comfy.sample

        arguments = (self.noise, steps or self.steps, 5.0, "euler", "normal", *self.conds, self.latent)
        return comfy.sample.sample(model, *arguments, disable_pbar=True, seed=0).cpu()

    def replays(self, models: dict[Any, Any]) -> dict[Any, Callable[[], None]]:
        """For each model a call that repeats the cross-attention of one step of the bare one."""
        from comfy.ldm.modules.attention import optimized_attention
        from comfy.patcher_extension import WrappersMP

        recorded: list[tuple[Any, ...]] = []

        def host(q, k, v, options):
            return optimized_attention(q, k, v, options["n_heads"])

        def record(layer, q, k, v, options):
            recorded.append((layer, q, k, v, dict(options)))
            return host(q, k, v, options)

        def look(found, executor, x, timesteps, context, y, control, options, **kwargs):
            found.update(options.get("patches_replace", {}).get("attn2", {}))
            return executor(x, timesteps, context, y, control, options, **kwargs)

        def replay(patches):
            for layer, q, k, v, options in recorded:
                (patches.get(layer) or patches.get(layer[:2]) or host)(q, k, v, options)

        model = self.model.clone()
        for layer in self.layout.file_order():
            model.set_model_attn2_replace(partial(record, tuple(layer)), *layer)
        self.sample(model, steps=1)
        found: dict[Any, dict[Any, Any]] = {key: {} for key in models}
        for key in models:
            (model := models[key].clone()).add_wrapper(WrappersMP.DIFFUSION_MODEL, partial(look, found[key]))
            self.sample(model, steps=1)
        return {key: partial(replay, patches) for key, patches in found.items()}

    def interleaved(self, rounds: int, calls: dict[Any, Callable[[], Any]]) -> dict[Any, list[float]]:
        """Milliseconds of every call in every round."""
        times: dict[Any, list[float]] = {key: [] for key in calls}
        keys = list(calls)
        for turn in range(rounds):
            for key in keys[turn % len(keys) :] + keys[: turn % len(keys)]:
                gc.collect()
                self.synchronize()
                start = time.perf_counter()
                calls[key]()
                self.synchronize()
                times[key].append(1000 * (time.perf_counter() - start))
        return times

    def on_cuda(self, apply: Callable[[], Any]) -> str:
        """What only a GPU can tell of a variant: memory of its node and a sampling, and synchronisations a step."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.sample(model := apply())
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            self.sample(model)
        torch.cuda.set_sync_debug_mode("default")
        count = sum("synchronizing" in str(warning.message) for warning in caught) / self.steps
        return f"peak {peak:.0f} MiB above what was there, {count:.1f} synchronisations a step"


def spread(values: list[float], digits: int = 0) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def measure(bench: Bench, rounds: int) -> None:
    nodes = {(case, name): call for case, of in CASES.items() for name, call in bench.variants(*of).items()}
    bench.sample(bench.model)  # loads the model
    if bench.cuda:
        for key, call in {BARE: lambda: bench.model, **nodes}.items():
            print(*key, bench.on_cuda(call))
    models = {BARE: bench.model, AGAIN: bench.model} | {key: call() for key, call in nodes.items()}
    apply = bench.interleaved(rounds, nodes)
    pictures = {key: bench.sample(model) for key, model in models.items()}  # which warms up, too
    times = bench.interleaved(rounds, {key: partial(bench.sample, model) for key, model in models.items()})
    attention = bench.interleaved(6 * rounds, bench.replays(models))

    def ratio(a: Any, b: Any) -> str:
        return spread([x / y for x, y in zip(times[a], times[b], strict=True)], 3)

    def difference(a: Any, b: Any) -> float:
        return float((pictures[a] - pictures[b]).abs().max() / pictures[b].abs().max())

    def row(key: Any) -> str:
        layers, bare = statistics.median(attention[key]), statistics.median(attention[BARE])
        added = f"{bare:.1f}" if key == BARE else f"{layers - bare:+.1f} ({layers / bare:.2f} x)"
        columns = key[1], spread([t / bench.steps for t in times[key]]), ratio(key, BARE), added
        return "  " + "".join(f"{c:25}" for c in columns) + (spread(apply[key]) if key in apply else "")

    titles = "", "ms a step", "to the bare model", "ms in cross-attention", "ms of the apply node"
    print("\n  " + "".join(f"{title:25}" for title in titles), row(BARE), row(AGAIN), sep="\n")
    for case in CASES:
        print(case, *(row(key) for key in nodes if key[0] == case), sep="\n")
        ours, same, theirs = (case, OURS), (case, SAME_WORK), (case, THEIRS)
        print(f"  the adapter changes the picture by {difference(ours, BARE):.2f}")
        if bench.theirs:
            print(f"  without middle differs from {THEIRS} by {difference(same, theirs):.0e}")
            print(f"  a step, to {THEIRS}: ours {ratio(ours, theirs)}, without middle {ratio(same, theirs)}")
    if bench.theirs is None:
        print("Not compared with ComfyUI_IPAdapter_plus: give its folder as --ipadapter-plus.")


@torch.inference_mode()
def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments, Path(folder))
        attention = sys.modules["comfy.ldm.modules.attention"].optimized_attention.__name__
        where = torch.cuda.get_device_name() if bench.cuda else f"{torch.get_num_threads()} CPU threads"
        print(f"{arguments.family}, latent side {arguments.size}, {bench.model.model_dtype()} on {where},", end=" ")
        print(f"{arguments.repeats} rounds of {arguments.steps} steps, load {os.getloadavg()[0]:.1f};", end=" ")
        print(f"ComfyUI {comfyui_version(COMFYUI)}, {attention}, torch {torch.__version__}")
        measure(bench, arguments.repeats)
        print(f"load afterwards {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()

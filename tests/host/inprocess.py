"""ComfyUI loaded in this process."""

import asyncio
import importlib
import sys
from types import SimpleNamespace

BASE = "pocket_portraits.safetensors"


class Host:
    """ComfyUI loaded in process, with this pack and others loaded by ComfyUI's own custom-node loader."""

    def __init__(self, comfyui, base, *packs, device="cpu"):
        for folder in ("custom_nodes", "models", "input", "output"):
            (base / folder).mkdir(parents=True, exist_ok=True)
        sys.path.insert(0, str(comfyui))
        import comfy.options

        comfy.options.enable_args_parsing(False)
        from comfy.cli_args import args

        args.cpu = device == "cpu"
        args.base_directory = str(base)
        # utils.extra_config first: once nodes is imported, comfy/utils.py shadows ComfyUI's own utils
        for name in ("utils.extra_config", "execution", "folder_paths", "nodes"):
            importlib.import_module(name)
        import execution
        import folder_paths

        import nodes

        self.base, self.nodes, self.folder_paths = base, nodes, folder_paths
        loop = asyncio.new_event_loop()
        loop.run_until_complete(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
        for pack in packs:
            loaded = loop.run_until_complete(nodes.load_custom_node(str(pack), module_parent="custom_nodes"))
            assert loaded, f"ComfyUI could not load {pack}"
        self.loop = loop
        self.server = SimpleNamespace(client_id=None, last_node_id=None, last_prompt_id=None, sent=[])
        self.server.send_sync = lambda event, data, client_id=None: self.server.sent.append((event, data))
        self.server.prompt_queue = SimpleNamespace()
        self.execution = execution
        self.executor = execution.PromptExecutor(
            self.server, cache_type=execution.CacheType.CLASSIC, cache_args={"lru": 0, "ram": 0.0, "ram_inactive": 0.0}
        )

    def node(self, name):
        """A node's class, as ComfyUI loaded it."""
        return self.nodes.NODE_CLASS_MAPPINGS[name]

    def module(self, name):
        """A module of the pack, as ComfyUI loaded it: `models.references`, say."""
        package = self.node("PersonalizeApplyIPAdapter").__module__.rsplit(".nodes.", 1)[0]
        return sys.modules[f"{package}.{name}"]

    def run(self, prompt, outputs=None):
        """Validate and execute an API prompt as the server does; returns the ui outputs by node id.

        Raises HostError with the node's own message.
        """
        valid = self.loop.run_until_complete(self.execution.validate_prompt("test", prompt, outputs))
        if not valid[0]:
            raise HostError(f"{valid[1]} {valid[3]}")
        self.server.sent.clear()
        self.loop.run_until_complete(self.executor.execute_async(prompt, "test", {}, valid[2]))
        for event, data in self.executor.status_messages:
            if event == "execution_error":
                raise HostError(data["exception_message"].strip())
        return self.executor.history_result["outputs"]


class HostError(Exception):
    """What ComfyUI shows the user."""


def node(host, name):
    """One of our nodes as a function."""
    return lambda *arguments, **named: host.node(f"Personalize{name}").execute(*arguments, **named).result


def patched(patcher, key):
    """A weight as the host computes with it."""
    import comfy.lora
    import comfy.utils

    weight = comfy.utils.get_attr(patcher.model, key)
    kept = patcher.backup.get(key)
    weight = (weight if kept is None else kept.weight).float().clone()
    if key not in patcher.patches:
        return weight
    return comfy.lora.calculate_weight(patcher.patches[key], weight, key)

"""ComfyUI's own page in a headless Chromium, driven as a user does: an Editor has a method for each thing done."""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page, Playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
OPTIONS += ["--disable-sync", "--no-first-run"]
SIZE = {"width": 1800, "height": 1050}
EMPTY = (900, 400)
"""A place on the canvas that nothing covers."""
SETTINGS = {
    "Comfy.Minimap.Visible": False,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
    "Comfy.Pointer.DoubleClickTime": 1000,
}
"""A picture of a whole graph has its words and nothing before it; a double click may be slow."""
PATIENCE = 60_000
"""How long the page may take for a step, in milliseconds: a busy machine is slow."""

# The page says that it is ready, and loads its first workflow after that.
READY = "() => window.app?.vueAppReady && app.graph && app.extensionManager?.workflow.activeWorkflow"

PATH = "() => app.extensionManager.workflow.activeWorkflow?.path"

LISTEN = """() => {
    window.failures = [];
    for (const kind of ["execution_error", "execution_interrupted"])
        app.api.addEventListener(kind, event => failures.push(event.detail));
}"""

# What a template must not have: types that nobody registered, files that are not there.
MISSING = """() => app.graph.nodes.flatMap(node => [
    ...(LiteGraph.registered_node_types[node.type] ? [] : [`node type ${node.type}`]),
    ...(node.widgets ?? []).filter(widget => Array.isArray(widget.options?.values)
        && !widget.options.values.includes(widget.value)).map(widget => `${node.type}.${widget.name}: ${widget.value}`),
])"""

SET = """([type, name, value]) => {
    for (const node of app.graph.nodes.filter(node => node.type === type))
        node.widgets.find(widget => widget.name === name).value = value;
}"""

FINISHED = """() => failures.length || app.lastNodeErrors || app.graph.nodes
    .filter(node => ["SaveImage", "PreviewImage"].includes(node.type))
    .every(node => node.imgs?.length && node.imgs.every(picture => picture.complete && picture.naturalWidth))"""

# The view moves with an animation.
STILL = """() => {
    const view = [app.canvas.ds.scale, ...app.canvas.ds.offset].join();
    const same = window.lastView === view;
    window.lastView = view;
    return same;
}"""

SOCKETS = """id => {
    const node = app.graph.getNodeById(id);
    return {inputs: node.inputs.map(input => input.name), outputs: node.outputs.map(output => output.name)};
}"""

# Each input that is not a widget, and each output, gets the first partner whose socket fits. What stays alone is told.
CONNECT = """([id, types]) => {
    const node = app.graph.getNodeById(id), alone = [];
    const partner = (name, connect) => {
        for (const type of types) {
            const other = LiteGraph.createNode(type);
            if (!other) continue;
            app.graph.add(other);
            if (connect(other)) return;
            app.graph.remove(other);
        }
        alone.push(name);
    };
    const fits = (from, to) => from.type !== "*" && to.type !== "*" && LiteGraph.isValidConnection(from.type, to.type);
    for (const {name} of node.inputs.filter(input => !input.widget)) {
        const to = node.inputs.findIndex(input => input.name === name);
        partner(name, other => {
            const from = other.outputs.findIndex(output => fits(output, node.inputs[to]));
            return from >= 0 && other.connect(from, node, to);
        });
    }
    node.outputs.forEach((output, from) => partner(output.name, other => {
        const to = other.inputs.findIndex(input => fits(output, input));
        return to >= 0 && node.connect(from, other, to);
    }));
    return alone;
}"""


def launch(playwright: "Playwright") -> "Browser | None":
    """CHROMIUM_PATH; an installed Chromium, Chrome or Edge; the one that Playwright has installed; None without any."""
    from playwright.sync_api import Error

    found = os.environ.get("CHROMIUM_PATH") or next(filter(None, map(shutil.which, NAMES)), None)
    try:
        return playwright.chromium.launch(executable_path=found, args=OPTIONS)
    except Error:
        if found:
            raise
        return None


def wires(workflow: Mapping[str, Any]) -> set[tuple[int, str, int, str]]:
    """A workflow's links by the names of what they join: sockets are numbered as each frontend likes."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    return {
        (source, nodes[source]["outputs"][output]["name"], target, nodes[target]["inputs"][place]["name"])
        for _, source, output, target, place, _ in workflow["links"]
    }


def contents(workflow: Mapping[str, Any]) -> dict[int, tuple[str, list[Any]]]:
    """The type and the widgets' values of each node."""
    return {node["id"]: (node["type"], list(node.get("widgets_values") or [])) for node in workflow["nodes"]}


class Editor:
    """The page with the graph.

    Args:
        page: a page of a browser.
        url: the server's.
    """

    def __init__(self, page: "Page", url: str):
        self.page, self.url = page, url
        self.errors: set[str] = set()
        """What the page said was wrong since `start`, each with the address it is about."""
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: self._note(message.type, message.text, message.location["url"]))
        page.on("pageerror", lambda error: self._note("error", str(error), url))

    def _note(self, kind: str, text: str, url: str) -> None:
        # Whether other hosts answer is not ours: news, releases.
        if kind == "error" and url.startswith(self.url):
            self.errors.add(f"{text} {url.removeprefix(self.url)}")

    def start(self) -> None:
        """Load the page as one who comes for the first time: what was open is forgotten, what was saved is there."""
        self.page.goto(f"{self.url}/system_stats")
        self.page.evaluate("() => { localStorage.clear(); sessionStorage.clear(); }")
        self.page.goto(self.url)
        self.page.wait_for_function(READY)
        self.page.evaluate(LISTEN)

    def dialogs(self) -> "Locator":
        return self.page.get_by_role("dialog")

    def settle(self) -> None:
        """Close the templates, with which a server's first visitor is met, and make the settings."""
        self.dialogs().wait_for()
        self.page.keyboard.press("Escape")
        self.dialogs().wait_for(state="hidden")
        for name, value in SETTINGS.items():
            self.page.evaluate("item => app.extensionManager.setting.set(...item)", [name, value])

    def blank(self) -> None:
        """A new workflow without nodes."""
        before = self.page.evaluate(PATH)
        self.page.get_by_role("button", name="Create a new blank workflow").click()
        self.page.wait_for_function(f"before => ({PATH})() !== before && app.graph.nodes.length === 0", arg=before)

    def open_template(self, pack: str, name: str) -> None:
        """Open a template from the dialog, by the pack's name and its own."""
        self.page.locator(".templates-tab-button").click()
        self.dialogs().get_by_role("button", name=pack, exact=True).click()
        self.page.get_by_test_id(f"template-workflow-{name}").click()
        self.dialogs().wait_for(state="hidden")
        self.loaded(name)

    def open_saved(self, name: str) -> None:
        """Open a saved workflow from the side bar, whose list is drawn anew when it was read: a click until then is lost."""
        from playwright.sync_api import TimeoutError

        self.page.locator(".workflows-tab-button").click()
        for patience in (PATIENCE // 6, PATIENCE // 6, PATIENCE):
            self.page.get_by_test_id(f"tree-node-root/{name}.json").click()
            try:
                self.loaded(name, patience)
                break
            except TimeoutError:
                if patience == PATIENCE:
                    raise
        self.page.locator(".workflows-tab-button").click()

    def loaded(self, name: str, patience: int = PATIENCE) -> None:
        """Wait until the workflow of this name is the one on the canvas."""
        self.page.wait_for_function(
            "name => app.extensionManager.workflow.activeWorkflow?.filename === name && app.graph.nodes.length",
            arg=name,
            timeout=patience,
        )

    def save(self, name: str) -> None:
        """Save under a name."""
        self.page.keyboard.press("Control+s")
        self.dialogs().get_by_role("textbox").fill(name)
        with self.page.expect_response(lambda answer: "/userdata/workflows" in answer.url and answer.ok):
            self.dialogs().get_by_role("button", name="Confirm").click()
        self.dialogs().wait_for(state="hidden")

    def graph(self) -> dict[str, Any]:
        """The workflow as the page would save it."""
        return self.page.evaluate("() => app.graph.serialize()")

    def missing(self) -> list[str]:
        """Node types that nobody knows, and chosen files that are not there."""
        return self.page.evaluate(MISSING)

    def set(self, kind: str, widget: str, value: Any) -> None:
        """Set a widget of the nodes of a type."""
        self.page.evaluate(SET, [kind, widget, value])

    def run(self) -> list[Any]:
        """Press the button and wait for a picture in every output node; what failed."""
        self.page.get_by_test_id("queue-button").click()
        self.page.wait_for_function(FINISHED, timeout=5 * PATIENCE)
        return self.page.evaluate("() => app.lastNodeErrors ? [...failures, app.lastNodeErrors] : failures")

    def add(self, title: str, pack: str = "") -> int:
        """Search for a node by its title, take the one of this pack, drop it on the canvas; its id."""
        # Two clicks at the very same time are none to the page.
        self.page.mouse.dblclick(*EMPTY, delay=50)
        self.page.get_by_role("combobox", name="Add a node...").fill(title)
        self.page.get_by_role("option", name=re.compile(rf"^{re.escape(title)} {pack}\b")).click()
        self.dialogs().wait_for(state="hidden")
        self.page.mouse.move(*EMPTY)
        self.page.mouse.click(*EMPTY)
        self.page.wait_for_function("() => app.graph.nodes.length && !app.graph.nodes.some(node => node.flags.ghost)")
        return self.page.evaluate("() => app.graph.nodes.at(-1).id")

    def sockets(self, node: int) -> dict[str, list[str]]:
        """The names of a node's inputs and outputs."""
        return self.page.evaluate(SOCKETS, node)

    def connect(self, node: int, types: list[str]) -> list[str]:
        """Connect every socket of a node to new nodes of these types; the names of the sockets that none fits."""
        return self.page.evaluate(CONNECT, [node, types])

    def help(self) -> "Locator":
        """Open the help of the node that is selected."""
        self.page.get_by_test_id("info-button").click()
        page = self.page.get_by_test_id("properties-panel").locator(".node-help-content")
        page.locator("h1").wait_for()
        return page

    def close_help(self) -> None:
        panel = self.page.get_by_test_id("properties-panel")
        panel.get_by_role("button", name="Toggle properties panel").click()
        panel.wait_for(state="hidden")

    def screenshot(self, path: Path) -> None:
        """A picture of the page with the whole graph in it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        self.page.wait_for_function(STILL, polling=300)
        self.page.screenshot(path=path)


def words(text: str) -> list[str]:
    """The words of a text, without its marks, remarks, pictures and the addresses of its links."""
    text = re.sub(r"<!--.*?-->", "", text)
    text = re.sub(r"!\[[^]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
    return re.findall(r"[^\W_]+", text)

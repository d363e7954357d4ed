"""Pictures of several methods side by side."""

from comfy_api.latest import io, ui

from ..models.contact_sheet import CELL, contact_sheet, layout
from ..models.errors import PersonalizeError, plural
from .pictures import MOST, as_image, as_tensor, check_batch, number_of
from .schema import ADVANCED, Node, schema

LARGEST = 16384
"""Pixels of a side of the whole sheet: more is a mistake, and a square of that size already takes 3 GB as a tensor."""


class ContactSheet(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        row = io.Image.Input(
            "row", tooltip="A batch of pictures, from left to right, of any sizes: they are fitted into their places."
        )
        detail = io.String.Input("detail", force_input=True, tooltip="It stands below the label of the same number.")
        return schema(
            node_id="PersonalizeContactSheet",
            display_name="Contact Sheet",
            description="Lays batches of pictures out in labelled rows, below references: to compare methods, "
            "settings or seeds at a glance.",
            search_aliases=["image grid", "xy plot", "compare images", "comparison"],
            is_output_node=True,
            inputs=[
                io.Autogrow.Input(
                    "rows",
                    template=io.Autogrow.TemplatePrefix(row, prefix="row", min=0, max=MOST),
                    tooltip="A row each; a new input appears as you connect one.",
                ),
                io.String.Input(
                    "labels",
                    default="",
                    multiline=True,
                    placeholder="LoRA\nDreamBooth | rank 16",
                    tooltip="A line for each row; after a | it goes on below, in small letters.",
                ),
                io.String.Input(
                    "headings",
                    default="",
                    multiline=True,
                    placeholder="a photo of ohwx cat\na drawing of ohwx cat",
                    tooltip="A line for each column, such as its prompt. Empty: none.",
                ),
                io.Image.Input(
                    "references",
                    optional=True,
                    tooltip="Shown on top, as many as there are columns: the photographs, say.",
                ),
                io.Autogrow.Input(
                    "details",
                    template=io.Autogrow.TemplatePrefix(detail, prefix="detail", min=0, max=MOST),
                    tooltip="Texts below the labels, such as the summary of Score Images.",
                ),
                io.String.Input("note", default="", tooltip="A line at the foot of the sheet.", extra_dict=ADVANCED),
                io.Int.Input(
                    "cell",
                    default=CELL,
                    min=32,
                    max=1024,
                    step=8,
                    tooltip="Pixels of the side of a picture's place.",
                    extra_dict=ADVANCED,
                ),
            ],
            outputs=[io.Image.Output(display_name="sheet", tooltip="To Save Image; the node shows it, too.")],
        )

    @classmethod
    def execute(
        cls, rows=None, labels="", headings="", references=None, details=None, note="", cell: int = CELL
    ) -> io.NodeOutput:
        rows = rows or {}
        slots = [slot for slot in sorted(rows, key=number_of) if rows[slot] is not None]
        if not slots:
            raise PersonalizeError("There are no pictures: connect a batch to row0.")
        for slot in slots:
            check_batch(rows[slot], slot)
        said = labels.rstrip().splitlines()
        if len(said) > len(slots):
            raise PersonalizeError(
                f"There are {plural(len(said), 'label')} but {plural(len(slots), 'row')}: write a line for each."
            )
        lines = [[part.strip() for part in line.split("|")] for line in said] + [[""]] * (len(slots) - len(said))
        for slot, text in (details or {}).items():
            place = f"row{number_of(slot)}"
            if text is not None and place not in slots:
                raise PersonalizeError(f"{slot} has no row: connect {place}, or remove the text.")
            if text:
                own = slots.index(place)
                lines[own] = lines[own] + [part.strip() for part in text.replace("\n", "|").split("|")]
        if references is not None:
            check_batch(references, "references")
        counts = [len(rows[slot]) for slot in slots]
        above = headings.rstrip().splitlines()
        whole = layout(counts, lines, above, 0 if references is None else len(references), note, cell)
        if max(whole.width, whole.height) > LARGEST:
            raise PersonalizeError(
                f"The sheet would be {whole.width}x{whole.height} pixels, but a side may have {LARGEST}: lower cell, or give "
                "fewer rows, pictures or headings."
            )
        pictures = [[as_image(pixels) for pixels in rows[slot]] for slot in slots]
        shown = [] if references is None else [as_image(pixels) for pixels in references]
        sheet = as_tensor(contact_sheet(pictures, lines, above, shown, note, cell))
        return io.NodeOutput(sheet, ui=ui.PreviewImage(sheet, cls=cls))

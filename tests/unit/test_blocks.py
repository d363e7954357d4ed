"""The three numberings of the cross-attention layers."""

import pytest
from pack.models.blocks import SD15, SDXL, Layer, layer_weights
from pack.models.errors import PersonalizeError

# N in the file -> (ComfyUI block, transformer_index), as measured on the published files
SD15_TABLE = dict(
    zip(range(1, 12, 2), zip([("input", i) for i in (1, 2, 4, 5, 7, 8)], range(6), strict=True), strict=True)
)
SD15_TABLE |= {13 + 2 * i: (("output", 3 + i), 7 + i) for i in range(9)} | {31: (("middle", 0), 6)}
SDXL_TABLE = {
    **dict.fromkeys((1, 3), (("input", 4), 0)),
    **dict.fromkeys((5, 7), (("input", 5), 1)),
    **dict.fromkeys(range(9, 29, 2), (("input", 7), 2)),
    **dict.fromkeys(range(29, 49, 2), (("input", 8), 3)),
    **dict.fromkeys(range(49, 69, 2), (("output", 0), 5)),
    **dict.fromkeys(range(69, 89, 2), (("output", 1), 6)),
    **dict.fromkeys(range(89, 109, 2), (("output", 2), 7)),
    **dict.fromkeys((109, 111), (("output", 3), 8)),
    **dict.fromkeys((113, 115), (("output", 4), 9)),
    **dict.fromkeys((117, 119), (("output", 5), 10)),
    **dict.fromkeys(range(121, 141, 2), (("middle", 0), 4)),
}


@pytest.mark.parametrize(("layout", "table"), [(SD15, SD15_TABLE), (SDXL, SDXL_TABLE)], ids=["SD15", "SDXL"])
def test_numbering(layout, table):
    order, indices = layout.file_order(), layout.transformer_indices()
    assert len(order) == len(table) == len(set(order))
    for i, layer in enumerate(order):
        assert ((layer.block, layer.id), indices[layer]) == table[2 * i + 1]


def test_presets():
    assert {i for i in range(16) if i not in (4, 5, 6, 7, 8)} == {
        SD15.transformer_indices()[layer] for layer in layer_weights(SD15, "style")
    }
    composition = layer_weights(SD15, "composition")
    assert composition == {Layer("input", 7, 0): 0.25, Layer("input", 8, 0): 1.0}
    assert layer_weights(SD15, "style and composition") == layer_weights(SD15, "style") | composition
    assert {layer.id for layer in layer_weights(SDXL, "style")} == {1}
    assert len(layer_weights(SDXL, "style")) == len(layer_weights(SDXL, "composition")) == 10
    assert len(layer_weights(SDXL, "all")) == 70


def test_list():
    weights = layer_weights(SDXL, "list", "3:2.5, 6")
    assert len(weights) == 20
    assert {layer.block: weight for layer, weight in weights.items()} == {"input": 2.5, "output": 1.0}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "empty"),
        ("3:nan", '"3:nan" in the layer list'),
        ("3:1e400", '"3:1e400"'),
        ("3:x", '"3:x" in the layer list'),
        ("16", "Layer 16 is not in this model: its transformers are 0 to 15"),
        ("-1:2", "Layer -1"),
        ("6;7", '"6;7"'),
    ],
)
def test_bad_lists(text, sentence):
    with pytest.raises(PersonalizeError, match=sentence):
        layer_weights(SD15, "list", text)

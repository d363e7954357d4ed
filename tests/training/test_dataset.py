"""Pictures and captions as training examples."""

from finetuning import photos
from pack.training.dataset import Sizes, find_examples
from pack.training.options import Data


def test_captions_are_said_in_several_orders(tmp_path):
    folder = photos(tmp_path / "photos", 1)
    text = "a {trigger} {class} in a hat, smiling, in a forest"
    (folder / "01.txt").write_text(text)
    sizes = Sizes(64, 8, False)
    (plain,) = find_examples(folder, Data(trigger="ohwx", class_name="cat"), sizes, ())
    (example,) = find_examples(folder, Data(trigger="ohwx", class_name="cat", shuffle_captions=True), sizes, ())
    said = "a ohwx cat in a hat, smiling, in a forest"
    assert plain.captions == (said,)
    assert example.captions[0] == said
    assert len(example.captions) == 4
    assert len(set(example.captions)) > 1
    assert all(sorted(caption.split(", ")) == sorted(said.split(", ")) for caption in example.captions)
    assert find_examples(folder, Data(trigger="ohwx", class_name="cat", shuffle_captions=True), sizes, ()) == [example]

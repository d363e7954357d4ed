"""What is wrong with a build of a data set is told before a model loads, all at once."""

import pytest
from known_models import groups
from pack.models.errors import PersonalizeError
from pack.training.build_subject_data import build, main


def test_every_problem_is_told_at_once(given, tmp_path, capsys):
    (given / "broken.jpg").write_bytes(b"no picture")
    (given / "good.jpg").write_bytes((given / "good.png").read_bytes())
    (given / "small.txt").write_bytes("Käse".encode("latin-1"))
    (given / "white.txt").write_text("a SKS dog")
    (given / "inside.txt").write_text(" ")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "clip"}')
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text('{"model_type": "sam"}')
    (bare / "model.safetensors").write_bytes(b"")
    arguments = ["--pictures", str(given), "--output_dir", str(tmp_path / "out"), "--detector", str(other)]
    arguments += ["--segmenter", str(bare), "--tagger", str(other), "--min_nouns", "9"]
    arguments += ["--longest_side", "50"]
    assert main(arguments) == 1
    said = capsys.readouterr().err.rpartition("\r")[2].splitlines()
    expected = [
        "--min_nouns 9 is above --max_nouns 8: nothing would be kept.",
        f"--tagger {other} is no folder of a spaCy pipeline: meta.json is missing or damaged.",
        f"--detector {other} holds a model of type clip, but must be grounding-dino.",
        f"--segmenter {bare} has no processor_config.json or preprocessor_config.json: download all of the model's files,",
        f"good.jpg and good.png in {given} have one name, which the data set gives to one picture: rename one of them.",
    ]
    assert len(said) == len(expected), said
    for sentence, beginning in zip(said, expected, strict=True):
        assert sentence.startswith(beginning)
        assert sentence.endswith(".")
    (given / "good.jpg").unlink()
    assert main(arguments) == 1
    said = capsys.readouterr().err.rpartition("\r")[2].splitlines()[4:]
    expected = [
        f"broken.jpg in {given} cannot be read as a picture (it is damaged or of an unknown type).",
        f"The caption inside.txt in {given} is empty: write one, or delete the file.",
        f"The caption small.txt in {given} is not UTF-8: save it as that.",
        f'The caption of white.png in {given} has the word "sks", by which Subject-Diffusion calls subjects: use another word.',
        "--captioner is missing, and 8 pictures have no caption beside them (few_boxes.png): name a BLIP-2, such as "
        "Salesforce/blip2-opt-2.7b, or write NAME.txt beside NAME.jpg.",
    ]
    assert said == expected
    assert not (tmp_path / "out" / "settings.json").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pictures": None}, "--pictures is missing: the folder with pictures."),
        ({"output_dir": None}, "--output_dir is missing: the folder for the data set."),
        ({"detector": None}, "--detector is missing: a Grounding DINO, such as IDEA-Research/grounding-dino-tiny."),
        ({"segmenter": None}, "--segmenter is missing: a SAM, such as facebook/sam-vit-huge."),
        ({"pictures": "{tmp}/nowhere"}, "The folder {tmp}/nowhere does not exist."),
        (
            {"pictures": "{tmp}/all"},
            "The folder {tmp}/all has no pictures itself, but folders with pictures (given): name one of ",
        ),
        (
            {"output_dir": "{given}"},
            "--output_dir {given} is in --pictures {given}: use a folder apart from it, as what is ",
        ),
        (
            {"output_dir": "{given}/out"},
            "--output_dir {given}/out is in --pictures {given}: use a folder apart from it, ",
        ),
        (
            {"output_dir": "{tmp}"},
            "--output_dir {tmp} is around --pictures {given}: use a folder apart from it, as what ",
        ),
        ({"output_dir": "{given}/good.png/x"}, "--output_dir {given}/good.png/x is in --pictures"),
        (
            {"output_dir": "{tmp}/file/x"},
            "The folder {tmp}/file/x (--output_dir) cannot be written to (Not a directory).",
        ),
        ({"min_area": 0.5, "max_area": 0.4}, "--min_area 0.5 is above --max_area 0.4: nothing would be kept."),
        ({"min_boxes": 3, "max_boxes": 2}, "--min_boxes 3 is above --max_boxes 2: nothing would be kept."),
        ({"min_aspect": 4.0}, "--min_aspect 4 is above --max_aspect 3: nothing would be kept."),
        ({"score": 1.01}, "score is 1.01, but must be at most 1."),
        ({"batch_size": 0}, "batch_size is 0, but must be at least 1."),
        ({"white": -0.1}, "white is -0.1, but must be at least 0."),
        ({"fill": float("nan")}, "fill is nan, but must be a finite number."),
        ({"longest_side": "long"}, "longest_side is 'long', but must be a whole number."),
        ({"longest": 3}, "There is no option longest: do you mean longest_side?"),
    ],
)
def test_what_cannot_be(given, tmp_path, fakes, changes, said):
    (tmp_path / "file").write_text("")
    places = {"tmp": tmp_path, "given": given}
    changes = {name: value.format(**places) if isinstance(value, str) else value for name, value in changes.items()}
    with pytest.raises(PersonalizeError) as caught:
        build(*groups(given, tmp_path / "out", **changes))
    assert str(caught.value).startswith(said.format(**places))
    assert "\n" not in str(caught.value)
    assert fakes.loaded == []


def test_the_help_says_the_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--box_threshold X score of a box that Grounding DINO tells of, above [0.25]" in said
    assert "--min_area X share of the picture that a box covers, above [0.08]" in said

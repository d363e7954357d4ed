"""The one exception for what a user can mend."""


class PersonalizeError(ValueError):
    """Bad input. The message is one sentence, says both values and what to do, and is shown as it is."""

    __module__ = "Personalize"
    """ComfyUI shows this before the message: the module's real name there is its whole path."""


def plural(count: int, one: str, many: str = "") -> str:
    """ "1 picture is" or "2 pictures are"; `many` is `one` with an s where it is not given."""
    return f"{count} {one if count == 1 else many or f'{one}s'}"

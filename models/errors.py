"""The one exception for what a user can mend."""


class PersonalizeError(ValueError):
    """Bad input. The message is one sentence, says both values and what to do, and is shown as it is."""

    __module__ = "Personalize"
    """ComfyUI shows this before the message: the module's real name there is its whole path."""


def plural(count: int, thing: str) -> str:
    """ "1 picture", "2 pictures"."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"

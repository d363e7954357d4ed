"""What a picture shows of a pocket subject, by the judge."""

from dataclasses import fields

import numpy as np
import torch
from pack.training.pocket.attributes import Identity, Scene, Subject
from pack.training.pocket.draw import draw
from pack.training.pocket.vae import to_tensor

DRAWN = 20


def own_values(who, shown):
    """The identity's attributes that a picture can show, by name, where the judge reads `shown` in it."""
    subject = Subject(who, shown["pose"], shown["expression"], shown["hat_worn"] == "yes")
    scene = Scene((subject,), shown["background"], framing=shown["framing"], obstacle=shown["obstacle"])
    own = {f.name for f in fields(Identity)}
    return {name: value for name, value in scene.subject_values()[0].items() if name in own}


@torch.no_grad()
def own_vectors(judge, who):
    """The judge's identity features of drawings of a subject, in the mean."""
    drawn = [draw(Scene((Subject(who, "front", "smiling", bool(i % 3 == 0)),), "blue", seed=i)) for i in range(DRAWN)]
    return judge(to_tensor(np.stack([np.asarray(one) for one in drawn])))[1].mean(0)

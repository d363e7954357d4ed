"""What figures are called, which is better, and what they mean."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A figure, for people."""

    title: str
    better: str
    """"higher", "lower", or "" where neither is."""
    meaning: str
    least: float = -math.inf
    """What it cannot be below."""


KINDS = {
    "fid": Kind(
        "FID",
        "lower",
        "Fréchet distance between the features of generated and real pictures; depends on how many there are",
        0,
    ),
    "seed_fid": Kind(
        "FID by seed",
        "lower",
        "mean over the seeds of FID between the pictures PROMPT-sSEED.png of one seed, whose noise is the same for all "
        "identities, and the real ones (of that seed, if these have the same seeds): how varied identities are, which over "
        "all seeds together the noise makes up for; depends on how many pictures a seed has",
        0,
    ),
    "kid": Kind("KID", "lower", "kernel distance between the same features; does not depend on how many there are, and may fall below zero"),
    "wcfid": Kind(
        "FID within identities",
        "lower",
        "WCFID: the mean over the identities of FID between an identity's generated and its real pictures, which depends on "
        "how many each has; FID over all pictures does not see whose picture is whose",
        0,
    ),
    "bcfid": Kind("FID between identities", "lower", "BCFID: FID between the means of the identities, whoever is whose", 0),
    "is": Kind(
        "IS",
        "higher",
        "inception score: pictures of a clear class each, and of many classes together, be they the right ones or not",
        1,
    ),
    "seed_is": Kind(
        "IS by seed", "higher", "mean over the seeds of the inception score of the pictures of one seed", 1
    ),
    "bcis": Kind(
        "IS between identities",
        "higher",
        "BCIS: the part of IS that comes from the identities: pictures of one agree on their classes, and others have others",
        1,
    ),
    "identity_is": Kind(
        "IS over identities",
        "higher",
        "inception score whose classes are the identities of the real pictures, by the judge's identity features: pictures "
        "that show one of them clearly, and all of them alike",
        1,
    ),
    "uniform_is": Kind(
        "uniform-prior IS",
        "",
        "only how clear the class of each picture is; not the inception score: one picture again and again has as much",
        1,
    ),
    "likeness": Kind("likeness", "higher", "mean cosine of the judge's identity features to the identity's real pictures"),
    "likeness_to_others": Kind("likeness to others", "lower", "the same to the real pictures of all other identities"),
    "attributes": Kind("attributes", "higher", "share of the identity's visible attributes, but its kind, that the judge reads"),
    "prompt_following": Kind(
        "prompt following", "higher", "share of what NAME.json says the prompt asked for that the judge sees"
    ),
    "clip_i": Kind("CLIP-I", "higher", "mean cosine of CLIP's image features to the identity's real pictures"),
    "clip_t": Kind("CLIP-T", "higher", "mean cosine of CLIP's features of picture and prompt (NAME.txt)"),
    "dino": Kind("DINO", "higher", "mean cosine of DINO's features to the identity's real pictures"),
}  # fmt: skip

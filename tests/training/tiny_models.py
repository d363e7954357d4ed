"""BLIP-2, Grounding DINO, SAM and a spaCy pipeline of a few thousand random weights, in folders as published ones are.

Their classes, processors and tokenizers are the real ones; what they say means nothing. The tagger knows NOUNS.
"""

import spacy
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertTokenizerFast,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    PreTrainedTokenizerFast,
    SamConfig,
    SamImageProcessor,
    SamModel,
    SamProcessor,
    SwinConfig,
)

NOUNS = ("dog", "dogs", "cat", "ball", "grass", "sofa", "basketball", "café", "tree", "car")
OTHERS = ("a", "the", "and", "on", "beside", "red", "big")
LAYER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def save_models(folder):
    """The options that name the four."""
    captioner(folder / "blip-2")
    detector(folder / "grounding-dino")
    segmenter(folder / "sam")
    tagger(folder / "spacy")
    names = {"captioner": "blip-2", "detector": "grounding-dino", "segmenter": "sam", "tagger": "spacy"}
    return {option: str(folder / name) for option, name in names.items()}


def captioner(folder):
    words = ["<pad>", "<s>", "</s>", "<unk>", *NOUNS, *OTHERS, "<image>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    images = BlipImageProcessor(size={"height": 16, "width": 16})
    Blip2Processor(images, wrapped, num_query_tokens=2).save_pretrained(folder)
    config = Blip2Config(
        vision_config={**LAYER, "intermediate_size": 16, "image_size": 16, "patch_size": 8},
        qformer_config={
            **LAYER,
            "vocab_size": 8,
            "intermediate_size": 16,
            "encoder_hidden_size": 16,
            "cross_attention_frequency": 1,
        },
        text_config={
            **LAYER,
            "model_type": "opt",
            "vocab_size": len(words),
            "ffn_dim": 16,
            "word_embed_proj_dim": 16,
            "max_position_embeddings": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        num_query_tokens=2,
        image_token_index=words.index("<image>"),
    )
    shaken(Blip2ForConditionalGeneration, config, 0.3).save_pretrained(folder)


def detector(folder):
    words = [f"[unused{i}]" for i in range(1060)]  # BERT's, as the model knows its numbers of these:
    for i, word in {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}.items():
        words[i] = word
    plain = [noun for noun in NOUNS if noun not in ("basketball", "café")]
    for i, word in enumerate([*plain, "cafe", "basket", "##ball"], 1030):
        words[i] = word
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})
    images = GroundingDinoImageProcessor(size={"shortest_edge": 32, "longest_edge": 64})
    GroundingDinoProcessor(images, tokenizer).save_pretrained(folder)
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=32,
            patch_size=2,
            embed_dim=8,
            depths=[1, 1, 1],
            num_heads=[1, 2, 2],
            window_size=4,
            out_features=["stage2", "stage3"],
        ),
        text_config={
            **LAYER,
            "model_type": "bert",
            "vocab_size": len(words),
            "intermediate_size": 16,
            "max_position_embeddings": 256,
        },
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_n_points=2,
        decoder_n_points=2,
        num_queries=8,
        num_feature_levels=2,
    )
    model = shaken(GroundingDinoForObjectDetection, config, 0.2)
    with torch.no_grad():
        for head in model.bbox_embed:
            head.layers[-1].bias[2:] = 2.0  # boxes of half of the picture's sides, not a twentieth
    model.save_pretrained(folder)


def segmenter(folder):
    SamProcessor(SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})).save_pretrained(
        folder
    )
    config = SamConfig(
        vision_config={
            **LAYER,
            "output_channels": 16,
            "image_size": 64,
            "patch_size": 8,
            "mlp_dim": 16,
            "window_size": 4,
            "global_attn_indexes": [0],
            "num_pos_feats": 8,
        },
        prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4},
        mask_decoder_config={**LAYER, "mlp_dim": 16, "iou_head_depth": 2, "iou_head_hidden_dim": 16},
    )
    shaken(SamModel, config, 0.3).save_pretrained(folder)


def tagger(folder):
    pipeline = spacy.blank("en")
    rules = pipeline.add_pipe("attribute_ruler")
    rules.add([[{"LOWER": {"IN": list(NOUNS)}}]], {"POS": "NOUN"})
    pipeline.to_disk(folder)


def shaken(kind, config, size):
    """A model that says something else of each picture."""
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * size)
    return model

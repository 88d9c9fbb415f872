"""Small text encoders of transformers with random weights, saved as their authors save them."""

from pathlib import Path

import torch


def tiny_tokenizer(end=True):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "a",
        "the",
        "digit",
        "number",
        "three",
        "seven",
        "eight",
    ]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if end:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", eos_token="[SEP]"
    )


def tiny_model(kind):
    """A model of a few thousand numbers."""
    import transformers as tf

    sizes = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 32}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 12}
    if kind == "clip":
        text = tf.CLIPTextConfig(**sizes, eos_token_id=3, pad_token_id=0, bos_token_id=2)
        return tf.CLIPTextModel(text)
    if kind == "whole clip":
        text = tf.CLIPTextConfig(**sizes, eos_token_id=3, pad_token_id=0, bos_token_id=2)
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        vision |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
        return tf.CLIPModel(tf.CLIPConfig(text_config=text.to_dict(), vision_config=vision))
    if kind == "t5":
        return tf.T5ForConditionalGeneration(
            tf.T5Config(vocab_size=11, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        )
    return tf.BertForMaskedLM(tf.BertConfig(**sizes))


def save_tiny(folder, kind="bert", seed=0, end=True):
    """Save model and tokenizer; return the folder."""
    torch.manual_seed(seed)
    tiny_model(kind).save_pretrained(folder)
    tiny_tokenizer(end).save_pretrained(folder)
    return Path(folder)

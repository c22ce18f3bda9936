"""Trains the small byte-level BPE tokenizer of a model whose world is ShapesWorld."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from echogen.engine.prompt import (
    ASSISTANT,
    BEGIN_IMAGE,
    END_IMAGE,
    MARKS,
    PAD,
    QUESTION,
    USER,
    location_token,
)

# Spelled as in Janus's own tokenizer, so that its processor finds them by name.
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
IMAGE_PLACEHOLDER = "<image_placeholder>"


def train_tokenizer(texts: Iterable[str], bins: int, merges: int = 256) -> PreTrainedTokenizerFast:
    """Train on captions and expressions.

    Args:
        texts: captions and expressions of the world.
        bins: location tokens ``<loc_0>`` … ``<loc_{bins-1}>`` to add.
        merges: largest number of byte pairs to merge.

    Returns:
        A tokenizer with 256 bytes, the merges, Janus's control tokens and the box tokens.
    """
    special = [BOS, EOS, PAD, USER, ASSISTANT, IMAGE_PLACEHOLDER, BEGIN_IMAGE, END_IMAGE, *MARKS]
    special += [location_token(i) for i in range(bins)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + 256 + merges,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    frame = [f": {QUESTION}\n\n", f" {QUESTION}\n\n", ": "]
    tokenizer.train_from_iterator([*texts, *frame * 1000], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        extra_special_tokens={
            "image_token": IMAGE_PLACEHOLDER,
            "boi_token": BEGIN_IMAGE,
            "eoi_token": END_IMAGE,
        },
    )

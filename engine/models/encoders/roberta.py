"""RoBERTa and XLM-R: BERT whose positions are counted from behind the padding token, with a head of its own.

Source: Liu et al., "RoBERTa", 2019; Conneau et al., "Unsupervised Cross-lingual Representation Learning at Scale",
ACL 2020; tensor names as Hugging Face publishes them.
"""

from dataclasses import replace

from engine.models.encoders import bert, reading
from engine.models.encoders.spec import EncoderConfig
from engine.models.fields import Fields, invalid

_PADDING = 1  # what transformers takes where a configuration does not say
NAMES = replace(bert.NAMES, prefix="roberta.", dense="classifier.dense", classifier="classifier.out_proj")


def parse(architecture: str, fields: Fields) -> EncoderConfig:
    """The configuration of a RoBERTa or an XLM-R."""
    padding = reading.padding_id(fields.raw, _PADDING, fields.size("vocab_size"))
    config = bert.parse_learned(architecture, fields, padding)
    if config.max_context_tokens < 1:
        raise invalid("max_position_embeddings", f"more than {padding + 1}", config.num_places)
    return config

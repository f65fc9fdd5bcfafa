"""Networks of Hugging Face, built small from their configurations, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.robustness.inputs import images
from benchmarks.robustness.line import Line


def words(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Ids and the mask of padding."""
    ids = torch.randint(4, 60, (n, 9), generator=generator)
    mask = (torch.arange(9) < torch.randint(5, 10, (n, 1), generator=generator)).long()
    return {"input_ids": ids * mask + (1 - mask), "attention_mask": mask}


def prompts(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Ids without padding."""
    return {"input_ids": torch.randint(4, 60, (n, 9), generator=generator)}


def hf_line(
    name: str, config: str, model: str, batch: Any, keep: tuple[str, ...], plant: str | None, **options: Any
) -> Line:
    """A model of Hugging Face from its configuration."""

    def build() -> nn.Module:
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**options))

    def output(outputs: Any) -> Any:
        return outputs.logits if hasattr(outputs, "logits") else outputs.last_hidden_state

    return Line(name, f"Hugging Face {model}", build, batch, keep, plant, outputs=output, samples=16)


BERT = {
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 16,
    "num_labels": 4,
}
VIT = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 4,
}
QKV = (
    "*.query",
    "*.key",
    "*.value",
    "*.q_proj",
    "*.k_proj",
    "*.v_proj",
    "*.q_lin",
    "*.k_lin",
    "*.v_lin",
    "*.c_attn",
)
HF = (
    hf_line(
        "hf-bert",
        "BertConfig",
        "BertForSequenceClassification",
        words,
        ("classifier", *QKV),
        "bert.encoder.layer.0.intermediate.dense",
        **BERT,
    ),
    hf_line(
        "hf-roberta",
        "RobertaConfig",
        "RobertaForTokenClassification",
        words,
        ("classifier", *QKV),
        "roberta.encoder.layer.0.intermediate.dense",
        **BERT,
    ),
    hf_line(
        "hf-distilbert",
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        words,
        ("classifier", *QKV),
        "distilbert.transformer.layer.0.ffn.lin1",
        vocab_size=60,
        dim=24,
        n_layers=2,
        n_heads=2,
        hidden_dim=40,
        max_position_embeddings=16,
        num_labels=4,
    ),
    hf_line("hf-vit", "ViTConfig", "ViTForImageClassification", images(16), ("classifier", *QKV), None, **VIT),
    hf_line("hf-deit", "DeiTConfig", "DeiTForImageClassification", images(16), ("classifier", *QKV), None, **VIT),
    hf_line(
        "hf-swin",
        "SwinConfig",
        "SwinForImageClassification",
        images(32),
        ("classifier", *QKV),
        None,
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        num_labels=4,
    ),
    hf_line(
        "hf-segformer",
        "SegformerConfig",
        "SegformerForSemanticSegmentation",
        images(32),
        ("decode_head.classifier", *QKV),
        None,
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 24],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=24,
        num_labels=4,
    ),
    hf_line(
        "hf-convnext",
        "ConvNextConfig",
        "ConvNextForImageClassification",
        images(32),
        ("classifier",),
        None,
        hidden_sizes=[12, 16, 20, 24],
        depths=[1, 1, 1, 1],
        num_labels=4,
    ),
    hf_line(
        "hf-wav2vec2",
        "Wav2Vec2Config",
        "Wav2Vec2ForSequenceClassification",
        lambda n, g: torch.randn(n, 400, generator=g),
        ("classifier", *QKV),
        None,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        conv_dim=(12, 12),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=16,
        num_labels=4,
    ),
    hf_line(
        "hf-gpt2",
        "GPT2Config",
        "GPT2ForSequenceClassification",
        prompts,
        ("score", *QKV),
        None,
        vocab_size=60,
        n_embd=24,
        n_layer=2,
        n_head=2,
        n_positions=16,
        num_labels=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    ),
    hf_line(
        "hf-llama",
        "LlamaConfig",
        "LlamaForCausalLM",
        prompts,
        ("lm_head", *QKV),
        "model.layers.0.mlp.up_proj",
        vocab_size=60,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=40,
        max_position_embeddings=16,
    ),
)


def _whisper() -> nn.Module:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    return WhisperEncoder(
        WhisperConfig(
            num_mel_bins=8,
            d_model=24,
            encoder_layers=2,
            encoder_attention_heads=2,
            encoder_ffn_dim=40,
            max_source_positions=16,
        )
    )


WHISPER = Line(
    "hf-whisper",
    "Hugging Face WhisperEncoder",
    _whisper,
    lambda n, g: torch.randn(n, 8, 32, generator=g),
    ("conv2", "layers.1.fc2", "layers.1.self_attn.out_proj", *QKV),
    "layers.0.fc1",
    outputs=lambda out: out.last_hidden_state,
)
LINES = (*HF, WHISPER)

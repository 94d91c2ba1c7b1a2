"""What pipelines of several families have: text encoders, tokenizers and an autoencoder, tiny."""

import inspect
import json

from diffusers import AutoencoderKL, SanaPipeline
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    GemmaTokenizerFast,
    Qwen2Tokenizer,
    Qwen3Config,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

WORDS = [f"the digit {d}" for d in range(10)]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
CHAT = (
    "{% for m in messages %}<|im_start|>{{m['role']}}\n{{m['content']}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_clip(tokenizer, width: int, kind=CLIPTextModelWithProjection):
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=width,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_t5() -> tuple[T5EncoderModel, T5TokenizerFast]:
    letters = [(letter, -3.0) for letter in LETTERS]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    return T5EncoderModel(config), T5TokenizerFast(vocab=pieces, extra_ids=0)


def build_sd_vae(**config) -> AutoencoderKL:
    """The autoencoder of Stable Diffusion 3 and FLUX.1, which halves the resolution once here."""
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **config,
    )


def build_gemma_tokenizer() -> GemmaTokenizerFast:
    """It knows the words of the instruction that Sana puts before a prompt, which is about as many
    tokens as by its makers', not a thousand letters."""
    told = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"],
        initial_alphabet=[*LETTERS, "▁"],
        show_progress=False,
    )
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    learned.train_from_iterator(told, trainer)
    model = json.loads(learned.to_str())["model"]
    vocabulary = model["vocab"]
    vocabulary |= {f"<0x{i:02X}>": len(vocabulary) + i for i in range(256)}
    return GemmaTokenizerFast(vocab=vocabulary, merges=[tuple(pair) for pair in model["merges"]])


def build_qwen_tokenizer() -> Qwen2Tokenizer:
    vocabulary = {a: i for i, a in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary["<|endoftext|>"] = len(vocabulary)
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT
    return tokenizer


def configure_qwen(tokenizer, layers: int, width: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=width // 2,
    )

"""Small models to train from scratch on public images, in the layout of Stable Diffusion 1 or 3;
and ones of the published sizes with random weights, for tests and timings.

They have the parts of Stable Diffusion 1.5 or 2.1, so what works on one works on all.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from utils.arguments.pretraining import count_groups

REPEAT = 1_000_003  # a prime, so that no two rows of a matrix are alike


def build_tokenizer(captions: Iterable[str], vocab_size: int, max_length: int) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges are learned from `captions`.

    All 256 bytes are in the vocabulary, so any prompt can be encoded, not only those seen.
    """
    start, end = "<|startoftext|>", "<|endoftext|>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    empty = CLIPTokenizer()
    trainable = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trainable.normalizer = empty.backend_tokenizer.normalizer
    trainable.pre_tokenizer = empty.backend_tokenizer.pre_tokenizer
    trainable.train_from_iterator(
        sorted(set(captions)),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[start, end],
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    learned = trainable.get_vocab()
    # CLIP's vocabulary holds every byte twice: inside a word, and at its end ("</w>").
    bytes_twice = alphabet + [byte + "</w>" for byte in alphabet]
    words = bytes_twice + sorted(set(learned) - set(bytes_twice) - {start, end}, key=learned.get)
    vocab = {word: index for index, word in enumerate(words + [start, end])}
    merges = [tuple(merge) for merge in _list_merges(trainable)]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def _list_merges(tokenizer: Tokenizer) -> list[list[str]]:
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]


def build_autoencoder(
    channels: tuple[int, ...], layers: int = 1, latent_channels: int = 4
) -> AutoencoderKL:
    """An AutoencoderKL on RGB images; it divides the resolution by 2 ** (len(channels) - 1)."""
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=layers,
        latent_channels=latent_channels,
        norm_num_groups=count_groups(channels),
    )


def build_text_encoder(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=max(1, width // 32),
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet(
    sample_size: int, channels: tuple[int, ...], text_width: int, latent_channels: int = 4
) -> UNet2DConditionModel:
    """A U-Net with cross-attention at every resolution, for latents of `sample_size` pixels."""
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * len(channels),
        up_block_types=("CrossAttnUpBlock2D",) * len(channels),
        cross_attention_dim=text_width,
        attention_head_dim=4,
        norm_num_groups=count_groups(channels),
    )


def build_text_encoder_pair(
    tokenizer: CLIPTokenizer, width: int, layers: int
) -> list[CLIPTextModelWithProjection]:
    """Two text encoders, as Stable Diffusion 3 has them, of `width` together."""
    return [
        CLIPTextModelWithProjection(build_text_encoder(tokenizer, width // 2, layers).config)
        for _ in range(2)
    ]


def build_t5(width: int, max_length: int) -> tuple[T5EncoderModel, T5TokenizerFast]:
    """The third text encoder of Stable Diffusion 3, without which its pipelines cannot be loaded: a
    small one that tells words and gaps apart, and no more."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=max_length)
    config = T5Config(
        vocab_size=len(pieces), d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1
    )
    return T5EncoderModel(config), tokenizer


def build_transformer(
    sample_size: int, width: int, layers: int, text_width: int, latent_channels: int = 4
) -> SD3Transformer2DModel:
    """A transformer as in Stable Diffusion 3, for latents of `sample_size` pixels, each of which is
    a token."""
    return SD3Transformer2DModel(
        sample_size=sample_size,
        patch_size=1,
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=width // 32,
        joint_attention_dim=text_width,
        caption_projection_dim=width,
        pooled_projection_dim=text_width,
        pos_embed_max_size=sample_size,
    )


def build_scheduler(prediction_type: str = "v_prediction") -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def assemble_pipeline(vae, text_encoder, tokenizer, unet, scheduler) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def assemble_sd3(vae, encoders: list, tokenizers: list, transformer) -> StableDiffusion3Pipeline:
    """Of the encoders and tokenizers, T5's is the last."""
    return StableDiffusion3Pipeline(
        vae=vae,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        text_encoder_3=encoders[2],
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        tokenizer_3=tokenizers[2],
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


STABLE_DIFFUSION = {
    "1.5": ({"cross_attention_dim": 768}, {"layers": 12, "heads": 12, "act": "quick_gelu"}),
    "2.1": (
        {
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
        {"layers": 23, "heads": 16, "act": "gelu"},
    ),
}


def build_random_model(
    dtype: torch.dtype, kind: Callable[..., nn.Module], *configuration, **more
) -> nn.Module:
    """A model whose weights are made quickly: small, and ones where they scale a norm. Each tensor
    reads the same numbers, `REPEAT` of them over and over, from a place of its own on."""
    with torch.device("meta"):
        model = kind(*configuration, **more)
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    numbers = torch.empty(REPEAT).uniform_(-0.03, 0.03, generator=generator)
    for name, tensor in (dict(model.named_buffers()) | model.state_dict()).items():
        if name.endswith("position_ids"):
            tensor.copy_(torch.arange(tensor.numel()).view_as(tensor))
        elif not tensor.is_floating_point():
            tensor.zero_()
        elif tensor.ndim == 1:
            tensor.fill_(float("norm" in name and name.endswith("weight")))
        else:
            start = int(torch.randint(REPEAT, (), generator=generator))
            for part in tensor.view(-1).split(REPEAT):
                part.copy_(numbers.roll(-start)[: len(part)])
    return model if dtype == torch.float32 else model.to(dtype)


def build_stable_diffusion(
    version: str, captions: Iterable[str], dtype: torch.dtype = torch.float16
) -> StableDiffusionPipeline:
    """Stable Diffusion 1.5 or 2.1, all sizes as published, random weights: for tests, timings and
    plans. A tokenizer learned from a few captions stands for CLIP's."""
    unet, text = STABLE_DIFFUSION[version]
    tokenizer = build_tokenizer(captions, 600, 77)
    width = unet["cross_attention_dim"]
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width,
        num_hidden_layers=text["layers"], num_attention_heads=text["heads"],
        hidden_act=text["act"], max_position_embeddings=77,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    vae = build_random_model(
        dtype,
        AutoencoderKL,
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )
    return assemble_pipeline(
        vae,
        build_random_model(dtype, CLIPTextModel, config),
        tokenizer,
        build_random_model(dtype, UNet2DConditionModel, sample_size=64, **unet),
        build_scheduler("v_prediction" if version == "2.1" else "epsilon"),
    )


def save_in_fp16(pipeline: DiffusionPipeline, folder: str | Path) -> None:
    """Save with weights in fp16, such that a plain `from_pretrained` gives fp32 throughout.

    diffusers loads its models in fp32 unless asked otherwise, transformers in the type that their
    configuration names; left at fp16, a text encoder would not fit the denoiser it guides.
    """
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.half()  # `pipeline.to` warns of layers to be kept in fp32, where there are none
    pipeline.save_pretrained(folder)
    for path in Path(folder).glob("text_encoder*/config.json"):
        config = json.loads(path.read_text()) | {"dtype": "float32"}
        path.write_text(json.dumps(config, indent=2) + "\n")

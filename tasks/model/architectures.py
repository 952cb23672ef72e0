"""Which model classes have been read: their layers are what their config's fields say.

An architecture that is not here may use its fields in its own way: of its attention and experts
nothing is computed, only what the fields cannot but mean (norms over hidden_size, the router, the
feed-forward layers, the vocabulary). Read against the model files of SGLang 0.5.17 and 0.5.23
(`python/sglang/srt/models/`); a class that SGLang has no file for runs in its `transformers.py`.
"""

from __future__ import annotations

import re

_SUFFIX = re.compile(r"(ForCausalLM|ForConditionalGeneration|LMHeadModel|ChatModel|ModelLM)$")

_CLASSES = {
    "dense decoders: softmax attention over num_key_value_heads, one feed-forward part": """
        Apertus Aquila Arcee Baichuan BaiChuan Bloom ChatGLM ChatGLMModel Cohere Cohere2 DeciLM
        Ernie4_5 Ernie4_5_ Exaone Exaone4 Falcon Gemma Gemma2 Gemma3 Glm Glm4 GPT2 GPTBigCode GPTJ
        GPTNeoX Granite Helium HunYuanDenseV1 InternLM InternLM2 InternLM3 IQuestCoder LLaMA Llama
        MiMo MiniCPM Ministral Ministral3 Mistral Nemotron Olmo Olmo2 Olmo3 OPT Orion Persimmon
        Phi Phi3 QWen Qwen2 Qwen3 SDAR SeedOss Smol SmolLM3 Solar StableLm StableLM Starcoder2
        TeleFLM Xverse Yi
    """,
    "the same with experts": """
        Afmoe Arctic BailingMoe BailingMoE BailingMoeV2 Cohere2Moe Dbrx Deepseek Dots1
        Ernie4_5_Moe ExaoneMoe ExaoneMoE Gemma4 Glm4Moe GptOss GraniteMoe GraniteMoeShared Grok1
        Grok1Model HunYuanMoE HunYuanMoEV1 HYV2 HYV3 LLaDA2Moe Llama4 MiMoV2 MiMoV2Flash MiniMaxM2
        Mixtral Olmoe PhiMoe PhiMoE QuantMixtral Qwen2Moe Qwen3Moe SDARMoe XverseMoe
    """,
    "latent attention, with or without experts": """
        DeepseekV2 DeepseekV3 DeepseekV32 DeepseekV3_2 Glm4MoeLite GlmMoeDsa KimiK2 KimiK25
        MiniCPM3 MistralLarge3 SarvamMLA
    """,
    "hybrids of attention and linear attention or state-space layers": """
        Bamba FalconH1 FalconMamba GraniteMoeHybrid Jamba KimiLinear Lfm2 Lfm2Moe Mamba Mamba2
        MiniMax MiniMaxM1 MiniMaxText01 NemotronH NemotronHPuzzle Qwen3_5 Qwen3_5Moe Qwen3Next
    """,
    "a language model of the above inside a multimodal one": """
        Cohere2Vision DeepseekOCR DeepseekVL2 DeepseekVLV2 DotsOCR DotsVLM Ernie4_5_VLMoe
        Ernie4_5_VLMoeForConditionalGeneration Glm4v Glm4vMoe InternS1 InternVL InternVLChat
        KimiVL Lfm2Vl Llava LlavaLlama LlavaMistral LlavaNext LlavaOnevision LlavaQwen LlavaQwen2
        MiniCPMO MiniCPMV Mistral3 MultiModality NemotronH_Nano_VL_V2 NVILA PaddleOCRVL Phi3V
        Phi4MM Pixtral Qwen2_5_VL Qwen2_5Omni Qwen2_5OmniModel Qwen2Audio Qwen2VL Qwen3ASR
        Qwen3OmniMoe Qwen3VL Qwen3VLMoe Sarashina2Vision Voxtral
        VoxtralForConditionalGeneration YiVL
    """,
}
_MAPPED = frozenset(name for names in _CLASSES.values() for name in names.split())


def is_mapped(architecture: str) -> bool:
    """Whether the layers of this model class are known to be what its config's fields say."""
    return architecture in _MAPPED or _SUFFIX.sub("", architecture) in _MAPPED
